// Tiles of logits. shared/loops_<isa>.cpp defines `Vec`, a vector of floats, in an unnamed
// namespace and then includes this file, so that each instruction set has its own copy.
//
// Rows of hidden lie in lanes: a panel is J (1 to kVecs) vectors of rows, packed as (D, J, kLanes).
// A tile is M tokens of the vocabulary (kTokens, or a smaller power of two at the end) times a
// panel, summed in registers. Weight is read in place, a number at a time, and a softmax never
// crosses lanes.
#pragma once

#include "likelihood/part.h"

namespace fastmem {
namespace {

constexpr std::size_t kLanes = Vec::kLanes;
constexpr std::size_t kTokens = Vec::kTokens;
constexpr std::size_t kVecs = 3;
constexpr std::size_t kPanel = kVecs * kLanes;

// A tile stays in registers only if every function that takes it is inlined.
#define FASTMEM_INLINE __attribute__((always_inline)) inline

// Products that are added one after another in a register. Longer sums add such sums, so that
// rounding grows with the square root of 128 and of D / 128, not of D.
constexpr std::size_t kDepth = 128;

// 2^f on [0, 1), relative error at most 1e-7 before rounding: minimax with 2^0 = 1 exactly. One
// more degree (4e-9) takes 3 % longer at D = 32.
inline Vec exp2_fraction(Vec f) {
  Vec p = Vec::all(0.00186713F);
  p = fma(p, f, Vec::all(0.00901703F));
  p = fma(p, f, Vec::all(0.05579992F));
  p = fma(p, f, Vec::all(0.24016444F));
  p = fma(p, f, Vec::all(0.6931513F));
  return fma(p, f, Vec::all(1));
}

// Cephes tanhf: the polynomial where e^(2x) would cancel. NaN stays NaN.
inline Vec tanh(Vec x) {
  const Vec xx = x * x;
  Vec p = Vec::all(-5.70498872745e-3F);
  p = fma(p, xx, Vec::all(2.06390887954e-2F));
  p = fma(p, xx, Vec::all(-5.37397155531e-2F));
  p = fma(p, xx, Vec::all(1.33314422036e-1F));
  p = fma(p, xx, Vec::all(-3.33332819422e-1F));
  const Vec small = fma(p * xx, x, x);
  const Vec size = max(x, Vec::all(0) - x);
  const Vec e = exp2(min(Vec::all(20), size) * Vec::all(2.885390081777927F));
  const Vec large = Vec::all(1) - Vec::all(2) / (e + Vec::all(1));
  return select_less(size, Vec::all(0.625F), small, copy_sign(large, x));
}

// Calls f(M, first) with constants M that add up to n: kTokens, then powers of two for the rest.
template <std::size_t M = kTokens, class F>
inline void in_tiles(std::size_t n, const F& f, std::size_t first = 0) {
  for (; n - first >= M; first += M) f(std::integral_constant<std::size_t, M>{}, first);
  if constexpr (M > 1)
    if (first < n) in_tiles<M / 2>(n, f, first);
}

// Calls f(J) with a constant J = vecs.
template <class F>
inline void with_vecs(std::size_t vecs, const F& f) {
  if (vecs == 1) return f(std::integral_constant<std::size_t, 1>{});
  if (vecs == 2) return f(std::integral_constant<std::size_t, 2>{});
  return f(std::integral_constant<std::size_t, 3>{});
}

inline std::size_t vecs_of(std::size_t items) {
  return std::min(kVecs, (items + kLanes - 1) / kLanes);
}

template <std::size_t M, std::size_t J>
FASTMEM_INLINE void clear(Vec (&sum)[M][J]) {
#pragma GCC unroll 8
  for (std::size_t m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (std::size_t j = 0; j < J; ++j) sum[m][j] = Vec::all(0);
}

template <std::size_t M, std::size_t J>
FASTMEM_INLINE void store(const Vec (&sum)[M][J], float* out) {
#pragma GCC unroll 8
  for (std::size_t m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (std::size_t j = 0; j < J; ++j) sum[m][j].store(out + (m * J + j) * kLanes);
}

// sum += the tile that `store` wrote to `from`.
template <std::size_t M, std::size_t J>
FASTMEM_INLINE void add(Vec (&sum)[M][J], const float* from) {
#pragma GCC unroll 8
  for (std::size_t m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (std::size_t j = 0; j < J; ++j)
      sum[m][j] = sum[m][j] + Vec::load(from + (m * J + j) * kLanes);
}

// sum[m] += a[m, k] * b[k] over k < steps; b[k] is J vectors, `b_stride` floats after b[k - 1].
// kAlong: a lies along k, with rows `stride` apart; else along m.
template <bool kAlong, std::size_t M, std::size_t J>
FASTMEM_INLINE void multiply(const float* a, std::size_t stride, const float* b,
                             std::size_t b_stride, std::size_t steps, Vec (&sum)[M][J]) {
  for (std::size_t k = 0; k < steps; ++k, b += b_stride, a += kAlong ? 1 : stride) {
    Vec b_k[J];
#pragma GCC unroll 3
    for (std::size_t j = 0; j < J; ++j) b_k[j] = Vec::load(b + j * kLanes);
#pragma GCC unroll 8
    for (std::size_t m = 0; m < M; ++m) {
      const Vec a_m = Vec::all(a[kAlong ? m * stride : m]);
#pragma GCC unroll 3
      for (std::size_t j = 0; j < J; ++j) sum[m][j] = fma(a_m, b_k[j], sum[m][j]);
    }
  }
}

// Rows of weight as floats.
struct Rows {
  const float* data;
  std::size_t stride;
  const float* at(std::size_t row) const { return data + row * stride; }
};

// sum = rows of weight times a panel.
template <std::size_t M, std::size_t J>
FASTMEM_INLINE void products(const Rows& rows, const float* panel, std::size_t width,
                             Vec (&sum)[M][J]) {
  clear(sum);
  multiply<true>(rows.data, rows.stride, panel, J * kLanes, std::min(width, kDepth), sum);
  for (std::size_t begin = kDepth; begin < width; begin += kDepth) {
    alignas(64) float before[M * J * kLanes];
    store(sum, before);
    clear(sum);
    multiply<true>(rows.data + begin, rows.stride, panel + begin * J * kLanes, J * kLanes,
                   std::min(kDepth, width - begin), sum);
    add(sum, before);
  }
}

// Writes a row of weight to `out` in float, centred.
template <class T>
inline void weight_row(const Part& part, std::size_t token, float* out) {
  const T* const row = static_cast<const T*>(part.weight) + token * part.width;
  if (part.centre)
    for (std::size_t d = 0; d < part.width; ++d) out[d] = to_float(row[d]) - part.centre[d];
  else
    for (std::size_t d = 0; d < part.width; ++d) out[d] = to_float(row[d]);
}

// Blocks of weight in float: in place, or copied if weight is bfloat16, is centred, or has rows a
// multiple of 4 KiB apart, which would compete for the same cache lines.
template <class T>
class Weight {
 public:
  Weight(const Part& part, std::size_t most)
      : part_(part),
        in_place_(sizeof(T) == sizeof(float) && !part.centre && part.width % 1024 != 0),
        stride_(in_place_ ? part.width : (part.width + 31) / 16 * 16),
        copy_(in_place_ ? 0 : most * stride_) {}

  Rows rows(Span tokens) {
    if (in_place_)
      return {static_cast<const float*>(part_.weight) + tokens.begin * part_.width, part_.width};
    if (tokens.begin != held_.begin || tokens.end != held_.end) {
      for (std::size_t i = 0; i < tokens.size(); ++i)
        weight_row<T>(part_, tokens.begin + i, copy_.get() + i * stride_);
      held_ = tokens;
    }
    return {copy_.get(), stride_};
  }

 private:
  const Part& part_;
  bool in_place_;
  std::size_t stride_;
  Floats copy_;
  Span held_{0, 0};
};

inline Vec load_floats(const float* p) { return Vec::load_anywhere(p); }
inline Vec load_floats(const std::uint16_t* p) {
  alignas(64) float x[kLanes];
  for (std::size_t i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return Vec::load(x);
}

// Writes lane i of the vectors at(0), …, at(kLanes - 1) to the vector at out + i * stride.
template <class At>
FASTMEM_INLINE void transpose(const At& at, float* out, std::size_t stride) {
  Vec row[kLanes];
  for (std::size_t i = 0; i < kLanes; ++i) row[i] = at(i);
  // Each round interleaves the halves, which moves a bit of the index from row to lane.
#pragma GCC unroll 4
  for (std::size_t size = 1; size < kLanes; size *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (std::size_t i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(row[i], row[i + kLanes / 2]);
      next[2 * i + 1] = interleave_high(row[i], row[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kLanes; ++i) row[i] = next[i];
  }
#pragma GCC unroll 16
  for (std::size_t i = 0; i < kLanes; ++i) row[i].store_anywhere(out + i * stride);
}

// Rows to lanes, i < kLanes: out[d * stride + i] = one(i, d); some(i, d) is the vector of kLanes
// numbers from d on.
template <class Some, class One>
FASTMEM_INLINE void to_lanes(const Some& some, const One& one, std::size_t width, float* out,
                             std::size_t stride) {
  const std::size_t whole = width / kLanes * kLanes;
  for (std::size_t d = 0; d < whole; d += kLanes)
    transpose([&](std::size_t i) { return some(i, d); }, out + d * stride, stride);
  for (std::size_t d = whole; d < width; ++d)
    for (std::size_t i = 0; i < kLanes; ++i) out[d * stride + i] = one(i, d);
}

// Lanes to rows: calls f(tile, d, n) for d = 0, kLanes, …; number d + c (c < n) of row i is
// tile[i * kLanes + c].
template <class F>
FASTMEM_INLINE void to_rows(const float* in, std::size_t stride, std::size_t width, const F& f) {
  alignas(64) float tile[kLanes * kLanes];
  for (std::size_t d = 0; d < width; d += kLanes) {
    const std::size_t n = std::min(kLanes, width - d);
    transpose([&](std::size_t i) { return i < n ? Vec::load(in + (d + i) * stride) : Vec::all(0); },
              tile, kLanes);
    f(tile, d, n);
  }
}

// Packs rows, at most a panel, to out (D, J, kLanes): row_at(r) points to row r, null for zeros.
template <class Row>
void pack_panel(const Row& row_at, std::size_t rows, std::size_t width, float* out) {
  const std::size_t lanes = vecs_of(rows) * kLanes;
  for (std::size_t first = 0; first < lanes; first += kLanes) {
    decltype(row_at(0)) row[kLanes];
    for (std::size_t i = 0; i < kLanes; ++i)
      row[i] = first + i < rows ? row_at(first + i) : nullptr;
    to_lanes(
        [&](std::size_t i, std::size_t d) {
          return row[i] ? load_floats(row[i] + d) : Vec::all(0);
        },
        [&](std::size_t i, std::size_t d) { return row[i] ? to_float(row[i][d]) : 0; }, width,
        out + first, lanes);
  }
}

// A vector of logits from products: adds bias, applies the softcap, and stores its slope unless
// null.
inline Vec finished(const Part& part, Vec product, Vec bias, float* slope) {
  const Vec logit = product + bias;
  if (part.softcap == 0) return logit;
  const Vec t = tanh(logit * Vec::all(1 / part.softcap));
  if (slope) ((Vec::all(1) - t) * (Vec::all(1) + t)).store(slope);
  return t * Vec::all(part.softcap);
}

}  // namespace
}  // namespace fastmem
