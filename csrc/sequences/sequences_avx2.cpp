// AVX2: four blocks at a time.

#include "sequences/part.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,popcnt")
#endif

namespace fastmem {
namespace {

struct Vec {
  static constexpr int kLanes = 4, kAtOnce = 2;
  __m256i v;

  static Vec all(std::uint64_t x) { return {_mm256_set1_epi64x(static_cast<long long>(x))}; }
  static Vec load(const std::uint64_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  void store(void* p) const { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
};

// The block of each lane, among four consecutive blocks: interleaving then orders them.
constexpr int kOrder[] = {0, 2, 1, 3};
inline Vec interleave_low(Vec a, Vec b) { return {_mm256_unpacklo_epi64(a.v, b.v)}; }
inline Vec interleave_high(Vec a, Vec b) { return {_mm256_unpackhi_epi64(a.v, b.v)}; }

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_epi64(a.v, b.v)}; }
inline Vec operator&(Vec a, Vec b) { return {_mm256_and_si256(a.v, b.v)}; }
inline Vec operator^(Vec a, Vec b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline Vec xor_all(Vec a, Vec b, Vec c) {
  return {_mm256_xor_si256(_mm256_xor_si256(b.v, c.v), a.v)};
}
inline Vec times(Vec a, Vec b) { return {_mm256_mul_epu32(a.v, b.v)}; }
template <int kBits>
Vec shift_right(Vec a) {
  return {_mm256_srli_epi64(a.v, kBits)};
}
inline Vec low_halves(Vec a, Vec b) {
  return {_mm256_blend_epi32(a.v, _mm256_slli_epi64(b.v, 32), 0xAA)};
}
inline Vec high_halves(Vec a, Vec b) {
  return {_mm256_blend_epi32(_mm256_srli_epi64(a.v, 32), b.v, 0xAA)};
}
// The low 16 bits of each high half, gathered by lane, in the order of blocks.
inline Vec quarters_in_order(const Vec (&a)[4]) {
  const __m256i even = high_halves(a[0], a[2]).v, odd = high_halves(a[1], a[3]).v;
  return {_mm256_permute4x64_epi64(_mm256_or_si256(even, _mm256_slli_epi32(odd, 16)), 0xD8)};
}
inline __m256i low_half_below(__m256i a, __m256i limit) {
  const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF);
  return _mm256_cmpgt_epi64(_mm256_and_si256(limit, low), _mm256_and_si256(a, low));
}
inline bool any_low_half_below(const Vec (&a)[4], Vec limit) {
  const __m256i least = _mm256_min_epu32(_mm256_min_epu32(a[0].v, a[1].v),
                                         _mm256_min_epu32(a[2].v, a[3].v));
  const __m256i below = low_half_below(least, limit.v);
  return !_mm256_testz_si256(below, below);
}
inline Vec if_low_half_below(Vec a, Vec limit, Vec yes, Vec no) {
  return {_mm256_blendv_epi8(no.v, yes.v, low_half_below(a.v, limit.v))};
}
// Signed: sequences in memory are fewer than 2^63.
inline Vec at_most(Vec a, Vec limit) {
  return {_mm256_blendv_epi8(a.v, limit.v, _mm256_cmpgt_epi64(a.v, limit.v))};
}
inline Vec gather(const std::uint64_t* from, Vec at) {
  return {_mm256_i64gather_epi64(reinterpret_cast<const long long*>(from), at.v, 8)};
}
// Subtracts `limit` from each `a` that reaches it, and adds 1 to its carry.
inline void wrap(Vec& a, Vec& carries, Vec limit) {
  const __m256i below = _mm256_cmpgt_epi64(limit.v, a.v);
  a.v = _mm256_sub_epi64(a.v, _mm256_andnot_si256(below, limit.v));
  carries.v = _mm256_add_epi64(carries.v, _mm256_add_epi64(below, _mm256_set1_epi64x(1)));
}
// Counts the entries at most `limit` among Guide::kNear.
inline std::uint32_t count_at_most(const std::uint32_t* from, std::uint32_t limit) {
  const __m256i entries = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i all = _mm256_set1_epi32(static_cast<int>(limit));
  const __m256i at_most = _mm256_cmpeq_epi32(_mm256_max_epu32(entries, all), all);
  return static_cast<std::uint32_t>(
      __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(at_most))));
}

}  // namespace
}  // namespace fastmem

#include "sequences/token_loops.h"

namespace fastmem {
const SequenceLoops kAvx2Sequences = kLoops;
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace fastmem {
const SequenceLoops kAvx2Sequences = {};
}
#endif
