// The loops of likelihood.h, for one instruction set: included by likelihood_<isa>.cpp, each of
// which defines `Vec`, its vector of floats, in an unnamed namespace, so that the templates below
// are separate functions in each.
//
// A tile is Vec::kRows rows of hidden times kCols = 2 vectors of the vocabulary; its logits are
// summed in registers, pass through a buffer in the first-level cache, and are gone.
// L lanes of a vector; a panel is kCols tokens of the vocabulary; a block is as many panels as
// share the second-level cache with what they are multiplied by.

#include "likelihood_part.h"

namespace fastmem {
namespace {

constexpr std::size_t kRows = Vec::kRows;
constexpr std::size_t kLanes = Vec::kLanes;
constexpr std::size_t kCols = 2 * kLanes;
constexpr std::size_t kTile = kRows * kCols;

// A sum of 2^(z - shift) is rescaled only when z exceeds the shift by this many bits: what is
// below loses nothing, as floats keep their relative precision from 2^-126 to 2^127.
constexpr float kHeadroom = 32;

// Floats of the second-level cache that a block may take.
constexpr std::size_t kBlockFloats = std::size_t{1} << 17;

inline float widen(float x) { return x; }
inline float widen(std::uint16_t upper) {
  const std::uint32_t bits = std::uint32_t{upper} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// source[rows, D] to out[ceil(rows / W), D, W], zeros where there is no row.
template <std::size_t W, class T>
void pack_across(const T* source, std::size_t rows, std::size_t width, const float* centre,
                 float* out) {
  for (std::size_t begin = 0; begin < rows; begin += W, out += width * W) {
    const std::size_t here = std::min(W, rows - begin);
    constexpr std::size_t kStep = 16;
    for (std::size_t d0 = 0; d0 < width; d0 += kStep) {
      const std::size_t d1 = std::min(width, d0 + kStep);
      for (std::size_t w = 0; w < here; ++w) {
        const T* const row = source + (begin + w) * width;
        if (centre)
          for (std::size_t d = d0; d < d1; ++d) out[d * W + w] = widen(row[d]) - centre[d];
        else
          for (std::size_t d = d0; d < d1; ++d) out[d * W + w] = widen(row[d]);
      }
      if (here < W)
        for (std::size_t d = d0; d < d1; ++d) std::fill(out + d * W + here, out + (d + 1) * W, 0.F);
    }
  }
}

// source[rows, D] to out[ceil(D / kCols), padded, kCols]: zeros where there is no row (from `rows`
// to `padded`), no column, or where keep[row] is 0.
template <class T>
void pack_along(const T* source, std::size_t rows, std::size_t padded, std::size_t width,
                const float* centre, const std::uint8_t* keep, float* out) {
  for (std::size_t d0 = 0; d0 < width; d0 += kCols) {
    const std::size_t here = std::min(kCols, width - d0);
    for (std::size_t r = 0; r < rows; ++r, out += kCols) {
      const T* const row = source + r * width + d0;
      std::fill(out, out + kCols, 0.F);
      if (keep && !keep[r]) continue;
      for (std::size_t d = 0; d < here; ++d) out[d] = widen(row[d]);
      if (centre)
        for (std::size_t d = 0; d < here; ++d) out[d] -= centre[d0 + d];
    }
    std::fill(out, out + (padded - rows) * kCols, 0.F);
    out += (padded - rows) * kCols;
  }
}

// Products summed one after another in a register; longer sums are sums of these, so that their
// rounding grows with the square root of 64 and of D / 64, not of D.
constexpr std::size_t kDepth = 64;

// tile[kRows, kCols] = a[D, kRows]^T @ b[D, kCols].
inline void multiply(const float* a, const float* b, std::size_t width, float* tile) {
  for (std::size_t begin = 0; begin < width; begin += kDepth) {
    const std::size_t end = std::min(width, begin + kDepth);
    Vec sum[kRows][2];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = Vec::all(0);
    for (std::size_t d = begin; d < end; ++d, a += kRows, b += kCols) {
      const Vec b0 = Vec::load(b), b1 = Vec::load(b + kLanes);
#pragma GCC unroll 16
      for (std::size_t r = 0; r < kRows; ++r) {
        const Vec a_r = Vec::all(a[r]);
        sum[r][0] = fma(a_r, b0, sum[r][0]);
        sum[r][1] = fma(a_r, b1, sum[r][1]);
      }
    }
    if (begin > 0) {
#pragma GCC unroll 16
      for (std::size_t r = 0; r < kRows; ++r) {
        sum[r][0] = sum[r][0] + Vec::load(tile + r * kCols);
        sum[r][1] = sum[r][1] + Vec::load(tile + r * kCols + kLanes);
      }
    }
#pragma GCC unroll 16
    for (std::size_t r = 0; r < kRows; ++r) {
      sum[r][0].store(tile + r * kCols);
      sum[r][1].store(tile + r * kCols + kLanes);
    }
  }
}

// 2^f on [0, 1), relative error at most 4e-9 before rounding: minimax with 2^0 = 1 exactly.
inline Vec exp2_fraction(Vec f) {
  Vec p = Vec::all(0.00021877505059819669F);
  p = fma(p, f, Vec::all(0.0012401354033499956F));
  p = fma(p, f, Vec::all(0.009681204333901405F));
  p = fma(p, f, Vec::all(0.0554833710193634F));
  p = fma(p, f, Vec::all(0.24022945761680603F));
  p = fma(p, f, Vec::all(0.6931470632553101F));
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

// tile = softcap tanh((tile + bias) / softcap), and its slope if asked for.
inline void squash(float* tile, const float* bias, float softcap, float* slope) {
  const Vec cap = Vec::all(softcap), inverse = Vec::all(1 / softcap);
  for (std::size_t i = 0; i < kTile; i += kLanes) {
    const Vec t = tanh((Vec::load(tile + i) + Vec::load(bias + i % kCols)) * inverse);
    (cap * t).store(tile + i);
    if (slope) ((Vec::all(1) - t) * (Vec::all(1) + t)).store(slope + i);
  }
}

// What is added to the logits of each panel of tokens [begin, end).
class Biases {
 public:
  Biases(const Part& part, std::size_t begin, std::size_t end)
      : panels_((end - begin + kCols - 1) / kCols), last_(end - begin - (panels_ - 1) * kCols) {
    if (part.bias || part.softcap > 0) {
      inside_ = Floats(panels_ * kCols);
      for (std::size_t i = 0; i < panels_ * kCols; ++i)
        inside_[i] = part.bias && begin + i < end ? part.bias[begin + i] : 0;
    }
    for (std::size_t i = 0; i < kCols; ++i) pad_[i] = i < last_ ? 0 : -kInfinity;
    if (part.bias && part.softcap == 0)
      for (std::size_t i = last_; i < kCols; ++i) inside_[(panels_ - 1) * kCols + i] = -kInfinity;
    outside_ = part.softcap == 0 && part.bias;
  }

  // Before the softcap.
  const float* inside(std::size_t panel) const {
    return inside_.get() ? inside_.get() + panel * kCols : nullptr;
  }
  // After it, or without it: null where there is nothing to add. -inf takes out what is no token.
  const float* outside(std::size_t panel) const {
    if (outside_) return inside(panel);
    return panel + 1 == panels_ && last_ < kCols ? pad_ : nullptr;
  }

 private:
  std::size_t panels_, last_;
  Floats inside_;
  bool outside_;
  alignas(64) float pad_[kCols];
};

// The logits of one tile, base e, softcap and bias applied.
inline void logits(const Part& part, const float* a, const float* b, const float* inside,
                   float* tile, float* slope) {
  multiply(a, b, part.width, tile);
  if (part.softcap > 0) squash(tile, inside, part.softcap, slope);
}

// sum[r] += sum of 2^(scale * (tile[r] + bias) - shift[r]), lane by lane.
template <bool kBias>
inline void add_powers(const float* tile, const float* bias, float scale, float* shift,
                       float* sum) {
  const Vec s = Vec::all(scale);
  for (std::size_t r = 0; r < kRows; ++r, tile += kCols, shift += kLanes, sum += kLanes) {
    Vec z0 = Vec::load(tile), z1 = Vec::load(tile + kLanes);
    if (kBias) {
      z0 = z0 + Vec::load(bias);
      z1 = z1 + Vec::load(bias + kLanes);
    }
    Vec m = Vec::load(shift), total = Vec::load(sum);
    Vec x0 = fms(z0, s, m), x1 = fms(z1, s, m);
    if (any_greater(max(x0, x1), Vec::all(kHeadroom))) {
      const Vec raised = max(max(z0, z1) * s, m);
      total = total * exp2(m - raised);
      m = raised;
      m.store(shift);
      x0 = fms(z0, s, m);
      x1 = fms(z1, s, m);
    }
    (total + (exp2(x0) + exp2(x1))).store(sum);
  }
}

// out[r] = the logit of target[r] if it is in the tile, whose first token is `start`.
inline void pick_targets(const std::int32_t* target, std::uint32_t start, const float* tile,
                         const float* bias, float* out) {
  bool hit = false;
  for (std::size_t r = 0; r < kRows; ++r)
    hit |= static_cast<std::uint32_t>(target[r]) - start < kCols;
  if (!hit) return;
  for (std::size_t r = 0; r < kRows; ++r) {
    const std::uint32_t column = static_cast<std::uint32_t>(target[r]) - start;
    if (column < kCols) out[r] = tile[r * kCols + column] + (bias ? bias[column] : 0);
  }
}

// As add_powers, and leaves the powers in the tile. Where a shift is raised, those of the row in
// the `before` panels before this one are brought down to it.
inline void to_powers(float scale, const float* bias, std::size_t before, float* tile, float* shift,
                      float* sum) {
  const Vec s = Vec::all(scale);
  for (std::size_t r = 0; r < kRows; ++r, tile += kCols, shift += kLanes, sum += kLanes) {
    Vec z0 = Vec::load(tile), z1 = Vec::load(tile + kLanes);
    if (bias) {
      z0 = z0 + Vec::load(bias);
      z1 = z1 + Vec::load(bias + kLanes);
    }
    Vec m = Vec::load(shift), total = Vec::load(sum);
    Vec x0 = fms(z0, s, m), x1 = fms(z1, s, m);
    if (any_greater(max(x0, x1), Vec::all(kHeadroom))) {
      const Vec raised = max(max(z0, z1) * s, m);
      const Vec down = exp2(m - raised);
      for (std::size_t i = 1; i <= before; ++i)
        for (std::size_t j = 0; j < kCols; j += kLanes)
          (Vec::load(tile - i * kTile + j) * down).store(tile - i * kTile + j);
      total = total * down;
      m = raised;
      m.store(shift);
      x0 = fms(z0, s, m);
      x1 = fms(z1, s, m);
    }
    const Vec e0 = exp2(x0), e1 = exp2(x1);
    e0.store(tile);
    e1.store(tile + kLanes);
    (total + (e0 + e1)).store(sum);
  }
}

// A row of to_powers, in `panels` tiles, to d bits / d logits before softcap.
inline void to_gradients(const float* shifts, float top, float scale, float total, bool counts,
                         std::int32_t target, std::size_t panels, const float* slope, float* row) {
  if (!counts) {
    for (std::size_t p = 0; p < panels; ++p) std::fill_n(row + p * kTile, kCols, 0.F);
    return;
  }
  const Vec down = exp2(Vec::load(shifts) - Vec::all(top)), factor = down * Vec::all(scale / total);
  alignas(64) float lanes[kLanes];
  down.store(lanes);
  const auto column = static_cast<std::size_t>(target);
  float& at_target = row[column / kCols * kTile + column % kCols];
  const float power = at_target * lanes[column % kLanes];
  for (std::size_t p = 0; p < panels; ++p)
    for (std::size_t j = 0; j < kCols; j += kLanes)
      (Vec::load(row + p * kTile + j) * factor).store(row + p * kTile + j);
  // p - 1 where p is nearly 1: the difference first, which is exact.
  at_target = (power - total) * (scale / total);
  for (std::size_t p = 0; slope && p < panels; ++p)
    for (std::size_t j = 0; j < kCols; j += kLanes)
      (Vec::load(row + p * kTile + j) * Vec::load(slope + p * kTile + j)).store(row + p * kTile + j);
}

// Lanes of (shift, sum) to one: sum becomes that of 2^(z - shift).
inline void join_lanes(const float* shifts, const float* sums, float* shift, float* sum) {
  const Vec m = Vec::load(shifts);
  const float top = highest(m);
  *shift = top;
  *sum = add_lanes(Vec::load(sums) * exp2(m - Vec::all(top)));
}

// Lane by lane, for the rows of a tile.
struct Lanes {
  float *shift, *sum, *first, *second, *best, *best_at;
};

// As add_powers, and the moments of x, and the greatest logit with the first vector that has it.
template <Extra extra>
inline void add_statistics(const float* tile, const float* bias, float scale, std::int32_t at,
                           const Lanes& lanes) {
  const Vec s = Vec::all(scale), least = Vec::all(-1000);  // x^2 2^x is 0 below, and not NaN
  for (std::size_t i = 0; i < kTile; i += kLanes) {
    const std::size_t row = i / kCols * kLanes;
    Vec z = Vec::load(tile + i);
    if (bias) z = z + Vec::load(bias + i % kCols);
    if (extra & kBest) {
      const std::int32_t number = at + static_cast<std::int32_t>(i % kCols / kLanes);
      float token;
      std::memcpy(&token, &number, sizeof token);
      const Vec best = Vec::load(lanes.best + row);
      select_less(best, z, Vec::all(token), Vec::load(lanes.best_at + row))
          .store(lanes.best_at + row);
      select_less(best, z, z, best).store(lanes.best + row);
    }
    Vec m = Vec::load(lanes.shift + row), sum = Vec::load(lanes.sum + row), first, second;
    if (extra & kMoments) {
      first = Vec::load(lanes.first + row);
      second = Vec::load(lanes.second + row);
    }
    Vec x = fms(z, s, m);
    // Moments leave no headroom: about a shift far from the logits that count, they would cancel.
    if (any_greater(x, Vec::all(extra & kMoments ? 0 : kHeadroom))) {
      const Vec raised = max(z * s, m), down = max(least, m - raised), shrink = exp2(down);
      if (extra & kMoments) {
        second = shrink * fma(down, fma(down, sum, first + first), second);
        first = shrink * fma(down, sum, first);
      }
      sum = shrink * sum;
      m = raised;
      m.store(lanes.shift + row);
      x = fms(z, s, m);
    }
    const Vec e = exp2(x);
    (sum + e).store(lanes.sum + row);
    if (extra & kMoments) {
      x = max(least, x);
      const Vec ex = e * x;
      (first + ex).store(lanes.first + row);
      fma(ex, x, second).store(lanes.second + row);
    }
  }
}

// The statistics of a row, its lanes joined: those of moments are about `top`.
inline void join_statistics(const Lanes& lanes, float top, std::size_t row, Extra extra,
                            const RowSums& out) {
  if (extra & kMoments) {
    const Vec down = max(Vec::all(-1000), Vec::load(lanes.shift) - Vec::all(top));
    const Vec shrink = exp2(down), sum = Vec::load(lanes.sum), first = Vec::load(lanes.first);
    out.first[row] = add_lanes(shrink * fma(down, sum, first));
    out.second[row] =
        add_lanes(shrink * fma(down, fma(down, sum, first + first), Vec::load(lanes.second)));
  }
  if (extra & kBest) {
    float best = -kInfinity;
    std::int32_t token = -1;
    for (std::size_t i = 0; i < kLanes; ++i) {
      std::int32_t at;
      std::memcpy(&at, lanes.best_at + i, sizeof at);
      at = at * static_cast<std::int32_t>(kLanes) + static_cast<std::int32_t>(i);
      if (lanes.best[i] > best || (lanes.best[i] == best && at < token)) {
        best = lanes.best[i];
        token = at;
      }
    }
    out.best[row] = best;
    out.best_token[row] = token;
  }
}

template <class T, Extra extra>
void forward(const Part& part, Span rows, Span tokens, const RowSums& out) {
  const std::size_t width = part.width;
  const T* const hidden = static_cast<const T*>(part.hidden);
  const T* const weight = static_cast<const T*>(part.weight);
  const std::size_t all_panels = (tokens.size() + kCols - 1) / kCols;
  const std::size_t block =
      std::min(all_panels, std::max<std::size_t>(1, kBlockFloats / (width * kCols)));
  // As many rows at a time as fit a few megabytes, so that packing the weights costs nothing.
  const std::size_t chunk = std::min((rows.size() + kRows - 1) / kRows,
                                     std::max<std::size_t>(8, (1 << 20) / (width + kCols) / kRows));
  const Biases biases(part, tokens.begin, tokens.end);
  Floats a(chunk * kRows * width), b(block * kCols * width);
  Floats shifts(chunk * kRows * kLanes), sums(chunk * kRows * kLanes);
  Floats firsts(extra & kMoments ? 2 * chunk * kRows * kLanes : 0);
  Floats bests(extra & kBest ? 2 * chunk * kRows * kLanes : 0);
  const auto lanes_of = [&](std::size_t i) {
    const std::size_t at = i * kLanes, half = chunk * kRows * kLanes;
    return Lanes{shifts.get() + at,       sums.get() + at,  firsts.get() + at,
                 firsts.get() + half + at, bests.get() + at, bests.get() + half + at};
  };
  std::vector<std::int32_t> targets(chunk * kRows);
  alignas(64) float tile[kTile];
  bool packed = false;

  for (std::size_t row = rows.begin; row < rows.end; row += chunk * kRows) {
    const std::size_t here = std::min(chunk * kRows, rows.end - row);
    const std::size_t tiles = (here + kRows - 1) / kRows;
    pack_across<kRows>(hidden + row * width, here, width, nullptr, a.get());
    std::fill_n(shifts.get(), tiles * kRows * kLanes, kLowest);
    std::fill_n(sums.get(), tiles * kRows * kLanes, 0.F);
    if (extra & kMoments) std::fill_n(firsts.get(), 2 * chunk * kRows * kLanes, 0.F);
    if (extra & kBest) {
      std::fill_n(bests.get(), chunk * kRows * kLanes, -kInfinity);
      std::fill_n(bests.get() + chunk * kRows * kLanes, chunk * kRows * kLanes, 0.F);
    }
    for (std::size_t i = 0; i < tiles * kRows; ++i) targets[i] = i < here ? part.target(row + i) : -1;
    for (std::size_t first = 0; first < all_panels; first += block) {
      const std::size_t panels = std::min(block, all_panels - first);
      const std::size_t token = tokens.begin + first * kCols;
      if (!packed)
        pack_across<kCols>(weight + token * width, std::min(panels * kCols, tokens.end - token),
                           width, part.centre, b.get());
      packed = block == all_panels;
      for (std::size_t t = 0; t < tiles; ++t) {
        float* const shift = shifts.get() + t * kRows * kLanes;
        float* const sum = sums.get() + t * kRows * kLanes;
        const std::int32_t* const target = targets.data() + t * kRows;
        for (std::size_t p = 0; p < panels; ++p) {
          logits(part, a.get() + t * kRows * width, b.get() + p * kCols * width,
                 biases.inside(first + p), tile, nullptr);
          const float* const bias = biases.outside(first + p);
          if (extra != kNothing)
            add_statistics<extra>(tile, bias, part.scale,
                                  static_cast<std::int32_t>((first + p) * 2),
                                  lanes_of(t * kRows));
          else if (bias)
            add_powers<true>(tile, bias, part.scale, shift, sum);
          else
            add_powers<false>(tile, nullptr, part.scale, shift, sum);
          pick_targets(target, static_cast<std::uint32_t>(token + p * kCols), tile, bias,
                       out.target + row + t * kRows);
        }
      }
    }
    for (std::size_t i = 0; i < here; ++i) {
      join_lanes(shifts.get() + i * kLanes, sums.get() + i * kLanes, out.shift + row + i,
                 out.sum + row + i);
      if (extra != kNothing) join_statistics(lanes_of(i), out.shift[row + i], row + i, extra, out);
      if (extra & kBest) out.best_token[row + i] += static_cast<std::int32_t>(tokens.begin);
    }
  }
}

// out[m, columns] += sum, for m rows of `stride` floats.
template <std::size_t M, std::size_t kVecs>
inline void add_to(const Vec (&sum)[M][kVecs], std::size_t m, std::size_t columns,
                   std::size_t stride, float* out) {
  if (m == M && columns == kVecs * kLanes) {
#pragma GCC unroll 16
    for (std::size_t r = 0; r < M; ++r)
#pragma GCC unroll 2
      for (std::size_t j = 0; j < kVecs; ++j) {
        float* const to = out + r * stride + j * kLanes;
        (Vec::load_anywhere(to) + sum[r][j]).store_anywhere(to);
      }
    return;
  }
  alignas(64) float buffer[M][kVecs * kLanes];
#pragma GCC unroll 16
  for (std::size_t r = 0; r < M; ++r)
#pragma GCC unroll 2
    for (std::size_t j = 0; j < kVecs; ++j) sum[r][j].store(&buffer[r][j * kLanes]);
  for (std::size_t r = 0; r < m; ++r)
    for (std::size_t c = 0; c < columns; ++c) out[r * stride + c] += buffer[r][c];
}

// sum[i] += steps of g[i * kOut + step * kStep] * b[step].
template <std::size_t M, std::size_t kVecs, std::size_t kOut, std::size_t kStep,
          std::size_t kSteps>
inline void outer(const float* g, const float* b, Vec (&sum)[M][kVecs]) {
  for (std::size_t step = 0; step < kSteps; ++step, g += kStep, b += kCols) {
    Vec b_step[kVecs];
#pragma GCC unroll 2
    for (std::size_t j = 0; j < kVecs; ++j) b_step[j] = Vec::load(b + j * kLanes);
#pragma GCC unroll 16
    for (std::size_t i = 0; i < M; ++i) {
      const Vec g_i = Vec::all(g[i * kOut]);
#pragma GCC unroll 2
      for (std::size_t j = 0; j < kVecs; ++j) sum[i][j] = fma(g_i, b_step[j], sum[i][j]);
    }
  }
}

template <std::size_t M, std::size_t kVecs>
inline void clear(Vec (&sum)[M][kVecs]) {
#pragma GCC unroll 16
  for (std::size_t i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (std::size_t j = 0; j < kVecs; ++j) sum[i][j] = Vec::all(0);
}

// dhidden[m, columns] += g[panels, kRows, kCols] @ weight[panels * kCols, kCols]: one row tile.
template <std::size_t kVecs>
void add_dhidden(const float* g, const float* weight, std::size_t panels, std::size_t m,
                 std::size_t columns, std::size_t stride, float* out) {
  Vec sum[kRows][kVecs];
  clear(sum);
  for (std::size_t p = 0; p < panels; ++p)
    outer<kRows, kVecs, kCols, 1, kCols>(g + p * kTile, weight + p * kCols * kCols, sum);
  add_to(sum, m, columns, stride, out);
}

// dweight[m, columns] += g[tiles, kRows, M of kCols]^T @ hidden[tiles * kRows, kCols], where two
// tiles of g are `apart` floats from each other.
template <std::size_t M, std::size_t kVecs>
void add_dweight(const float* g, std::size_t apart, const float* hidden, std::size_t tiles,
                 std::size_t m, std::size_t columns, std::size_t stride, float* out) {
  Vec sum[M][kVecs];
  clear(sum);
  for (std::size_t t = 0; t < tiles; ++t)
    outer<M, kVecs, 1, kCols, kRows>(g + t * apart, hidden + t * kTile, sum);
  add_to(sum, m, columns, stride, out);
}

// The kCols tokens of a panel in groups that fit the registers: none longer than kRows.
constexpr std::size_t kGroups = (kCols + kRows - 1) / kRows;
constexpr std::size_t kLong = (kCols + kGroups - 1) / kGroups;
constexpr std::size_t kLongs = kCols - kGroups * (kLong - 1);  // groups of kLong; others one less

template <std::size_t kVecs>
void add_dweight_panel(const float* g, std::size_t apart, const float* hidden, std::size_t tiles,
                       std::size_t tokens, std::size_t columns, std::size_t stride, float* out) {
  std::size_t done = 0;
  for (std::size_t group = 0; group < kGroups && done < tokens; ++group) {
    const std::size_t size = group < kLongs ? kLong : kLong - 1;
    const std::size_t m = std::min(size, tokens - done);
    const auto add = group < kLongs ? add_dweight<kLong, kVecs> : add_dweight<kLong - 1, kVecs>;
    add(g + done, apart, hidden, tiles, m, columns, stride, out + done * stride);
    done += size;
  }
}

// What a row of a tile needs to turn logits into gradients.
struct RowRule {
  float shift;          // log-sum-exp, base 2
  float factor;         // upstream * scale * 2^(shift - log-sum-exp): the shift is rounded
  float at_target;      // upstream * scale
  std::int32_t target;  // -1 for rows that do not exist or do not count: their gradient is 0
};

// tile = d sum(upstream * bits) / d (logit before softcap).
inline void differentiate(const RowRule* rules, const float* bias, float scale, std::uint32_t start,
                          const float* slope, float* tile) {
  const Vec s = Vec::all(scale);
  for (std::size_t r = 0; r < kRows; ++r, tile += kCols) {
    const RowRule& rule = rules[r];
    if (rule.target < 0) {
      std::fill_n(tile, kCols, 0.F);
      continue;
    }
    const Vec shift = Vec::all(rule.shift), factor = Vec::all(rule.factor);
    for (std::size_t j = 0; j < kCols; j += kLanes) {
      Vec z = Vec::load(tile + j);
      if (bias) z = z + Vec::load(bias + j);
      (factor * exp2(fms(z, s, shift))).store(tile + j);
    }
    const std::uint32_t column = static_cast<std::uint32_t>(rule.target) - start;
    if (column < kCols) tile[column] -= rule.at_target;
    if (slope)
      for (std::size_t j = 0; j < kCols; j += kLanes)
        (Vec::load(tile + j) * Vec::load(slope + r * kCols + j)).store(tile + j);
  }
}

// A group of row tiles and a block of panels, and the gradients of their logits.
struct Block {
  const float* g;  // (tiles, panels, kRows, kCols)
  std::size_t tiles, panels;
  std::size_t top, height;    // first row, rows
  std::size_t token, tokens;  // first token, tokens
};

// Adds what the gradients of a block's logits give to those of bias, hidden and weight.
inline void add_gradients(const Block& block, std::size_t width, const float* weight_rows,
                          const float* hidden_rows, const Gradients& out) {
  const std::size_t slices = (width + kCols - 1) / kCols;
  const std::size_t tiles = block.tiles, panels = block.panels;
  for (std::size_t p = 0; out.bias && p < panels; ++p) {
    Vec sum[1][2];
    clear(sum);
    for (std::size_t t = 0; t < tiles; ++t) {
      const float* const tile = block.g + (t * panels + p) * kTile;
      for (std::size_t r = 0; r < kRows; ++r) {
        sum[0][0] = sum[0][0] + Vec::load(tile + r * kCols);
        sum[0][1] = sum[0][1] + Vec::load(tile + r * kCols + kLanes);
      }
    }
    add_to(sum, 1, std::min(kCols, block.tokens - p * kCols), 0, out.bias + block.token + p * kCols);
  }
  for (std::size_t slice = 0; out.hidden && slice < slices; ++slice) {
    const std::size_t columns = std::min(kCols, width - slice * kCols);
    const auto add = columns > kLanes ? add_dhidden<2> : add_dhidden<1>;
    for (std::size_t t = 0; t < tiles; ++t)
      add(block.g + t * panels * kTile, weight_rows + slice * panels * kCols * kCols, panels,
          std::min(kRows, block.height - t * kRows), columns, width,
          out.hidden + (block.top + t * kRows) * width + slice * kCols);
  }
  for (std::size_t slice = 0; out.weight && slice < slices; ++slice) {
    const std::size_t columns = std::min(kCols, width - slice * kCols);
    const auto add = columns > kLanes ? add_dweight_panel<2> : add_dweight_panel<1>;
    for (std::size_t p = 0; p < panels; ++p)
      add(block.g + p * kTile, panels * kTile, hidden_rows + slice * tiles * kTile, tiles,
          std::min(kCols, block.tokens - p * kCols), columns, width,
          out.weight + (block.token + p * kCols) * width + slice * kCols);
  }
}

template <class T>
void backward(const Part& part, Span rows, Span tokens, const RowGradients& in,
              const Gradients& out) {
  const std::size_t width = part.width;
  const T* const hidden = static_cast<const T*>(part.hidden);
  const T* const weight = static_cast<const T*>(part.weight);
  const std::size_t all_panels = (tokens.size() + kCols - 1) / kCols;
  const std::size_t slices = (width + kCols - 1) / kCols;
  // A group of row tiles meets a block of panels: the longer the group, the fewer passes over
  // dweight; the longer the block, the fewer over dhidden.
  const std::size_t group = std::max<std::size_t>(1, (width <= 256 ? 112 : 56) / kRows);
  const std::size_t fixed = 2 * group * kRows * width;
  const std::size_t room = kBlockFloats + kBlockFloats / 4;
  const std::size_t per_panel = kCols * (2 * width + group * kRows);
  const std::size_t block =
      std::min(all_panels, std::max<std::size_t>(2, room > fixed ? (room - fixed) / per_panel : 0));
  const std::size_t chunk = std::min((rows.size() + kRows - 1) / kRows,
                                     std::max<std::size_t>(group, (1 << 20) / width / kRows));
  const Biases biases(part, tokens.begin, tokens.end);
  Floats a(chunk * kRows * width), b(block * kCols * width);
  Floats b_rows(out.hidden ? slices * block * kCols * kCols : 0);
  Floats h_rows(out.weight ? slices * group * kTile : 0);
  Floats g(group * block * kTile);
  std::vector<RowRule> rules(chunk * kRows);
  std::vector<std::uint8_t> keep(chunk * kRows);
  alignas(64) float slope_tile[kTile];
  float* const slope = part.softcap > 0 ? slope_tile : nullptr;
  bool packed = false;

  for (std::size_t row = rows.begin; row < rows.end; row += chunk * kRows) {
    const std::size_t here = std::min(chunk * kRows, rows.end - row);
    const std::size_t tiles = (here + kRows - 1) / kRows;
    pack_across<kRows>(hidden + row * width, here, width, nullptr, a.get());
    for (std::size_t i = 0; i < tiles * kRows; ++i) {
      keep[i] = i < here && in.counts(part, row + i);
      rules[i] = {0, 0, 0, -1};
      if (!keep[i]) continue;
      const double lse = in.lse[row + i];
      const auto shift = static_cast<float>(lse);
      const float at_target = in.upstream[row + i] * part.scale;
      const auto rest = static_cast<float>(std::exp2(static_cast<double>(shift) - lse));
      rules[i] = {shift, at_target * rest, at_target, part.target(row + i)};
    }
    for (std::size_t first = 0; first < all_panels; first += block) {
      const std::size_t panels = std::min(block, all_panels - first);
      const std::size_t token = tokens.begin + first * kCols;
      const std::size_t in_block = std::min(panels * kCols, tokens.end - token);
      if (!packed) {
        pack_across<kCols>(weight + token * width, in_block, width, part.centre, b.get());
        if (out.hidden)
          pack_along(weight + token * width, in_block, panels * kCols, width, part.centre, nullptr,
                     b_rows.get());
      }
      packed = block == all_panels;
      for (std::size_t t0 = 0; t0 < tiles; t0 += group) {
        const std::size_t t1 = std::min(tiles, t0 + group);
        const std::size_t top = row + t0 * kRows;  // first row of the group
        const std::size_t height = std::min((t1 - t0) * kRows, here - t0 * kRows);
        for (std::size_t p = 0; p < panels; ++p)
          for (std::size_t t = t0; t < t1; ++t) {
            float* const tile = g.get() + ((t - t0) * panels + p) * kTile;
            logits(part, a.get() + t * kRows * width, b.get() + p * kCols * width,
                   biases.inside(first + p), tile, slope);
            differentiate(rules.data() + t * kRows, biases.outside(first + p), part.scale,
                          static_cast<std::uint32_t>(token + p * kCols), slope, tile);
          }
        if (out.weight)
          pack_along(hidden + top * width, height, (t1 - t0) * kRows, width, nullptr,
                     keep.data() + t0 * kRows, h_rows.get());
        add_gradients({g.get(), t1 - t0, panels, top, height, token, in_block}, width, b_rows.get(),
                      h_rows.get(), out);
      }
    }
  }
}

// Rows that a group holds at most: with fewer, summing dweight costs memory traffic.
constexpr std::size_t kGroupRows = 112;

// Both passes in one, for vocabularies so short that the logits of a group of rows stay in the
// second-level cache: one exponential and one product of each logit instead of two.
template <class T>
void forward_backward(const Part& part, Span rows, const RowSums& sums, const Gradients& out) {
  const std::size_t width = part.width, vocab = part.vocab;
  const T* const hidden = static_cast<const T*>(part.hidden);
  const T* const weight = static_cast<const T*>(part.weight);
  const std::size_t panels = (vocab + kCols - 1) / kCols;
  const std::size_t slices = (width + kCols - 1) / kCols;
  const std::size_t group = std::max<std::size_t>(
      1, std::min((rows.size() + kRows - 1) / kRows,
                  std::min(kGroupRows, std::max(kGroupRows / 2, 2 * kBlockFloats / vocab)) / kRows));
  const Biases biases(part, 0, vocab);
  Floats a(group * kRows * width), b(panels * kCols * width);
  Floats b_rows(out.hidden ? slices * panels * kCols * kCols : 0);
  Floats h_rows(out.weight ? slices * group * kTile : 0);
  Floats g(group * panels * kTile), slopes(part.softcap > 0 ? group * panels * kTile : 0);
  Floats shifts(group * kRows * kLanes), totals(group * kRows * kLanes);
  std::vector<std::int32_t> targets(group * kRows);
  std::vector<std::uint8_t> keep(group * kRows);
  pack_across<kCols>(weight, vocab, width, part.centre, b.get());
  if (out.hidden)
    pack_along(weight, vocab, panels * kCols, width, part.centre, nullptr, b_rows.get());

  for (std::size_t top = rows.begin; top < rows.end; top += group * kRows) {
    const std::size_t height = std::min(group * kRows, rows.end - top);
    const std::size_t tiles = (height + kRows - 1) / kRows;
    pack_across<kRows>(hidden + top * width, height, width, nullptr, a.get());
    std::fill_n(shifts.get(), tiles * kRows * kLanes, kLowest);
    std::fill_n(totals.get(), tiles * kRows * kLanes, 0.F);
    for (std::size_t i = 0; i < tiles * kRows; ++i) targets[i] = i < height ? part.target(top + i) : -1;
    for (std::size_t p = 0; p < panels; ++p)
      for (std::size_t t = 0; t < tiles; ++t) {
        float* const tile = g.get() + (t * panels + p) * kTile;
        float* const slope =
            part.softcap > 0 ? slopes.get() + (t * panels + p) * kTile : nullptr;
        logits(part, a.get() + t * kRows * width, b.get() + p * kCols * width, biases.inside(p),
               tile, slope);
        const float* const bias = biases.outside(p);
        pick_targets(targets.data() + t * kRows, static_cast<std::uint32_t>(p * kCols), tile, bias,
                     sums.target + top + t * kRows);
        to_powers(part.scale, bias, p, tile, shifts.get() + t * kRows * kLanes,
                  totals.get() + t * kRows * kLanes);
      }
    for (std::size_t i = 0; i < tiles * kRows; ++i) {
      float* const shift = shifts.get() + i * kLanes;
      float top_shift, total;
      join_lanes(shift, totals.get() + i * kLanes, &top_shift, &total);
      if (i < height) {
        sums.shift[top + i] = top_shift;
        sums.sum[top + i] = total;
      }
      keep[i] = targets[i] >= 0 && std::isfinite(total);
      float* const row = g.get() + i / kRows * panels * kTile + i % kRows * kCols;
      const float* const slope = part.softcap > 0 ? slopes.get() + (row - g.get()) : nullptr;
      to_gradients(shift, top_shift, part.scale, total, keep[i], targets[i], panels, slope, row);
    }
    if (out.weight)
      pack_along(hidden + top * width, height, tiles * kRows, width, nullptr, keep.data(),
                 h_rows.get());
    add_gradients({g.get(), tiles, panels, top, height, 0, vocab}, width, b_rows.get(),
                  h_rows.get(), out);
  }
}

constexpr Loops kLoops = {{{forward<float, kNothing>, forward<std::uint16_t, kNothing>},
                           {forward<float, kMoments>, forward<std::uint16_t, kMoments>},
                           {forward<float, kBest>, forward<std::uint16_t, kBest>},
                           {forward<float, kMomentsAndBest>, forward<std::uint16_t, kMomentsAndBest>}},
                          {backward<float>, backward<std::uint16_t>},
                          {forward_backward<float>, forward_backward<std::uint16_t>},
                          kRows,
                          kCols};

}  // namespace
}  // namespace fastmem
