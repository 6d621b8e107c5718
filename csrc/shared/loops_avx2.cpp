// AVX2 and FMA: tiles of 4 tokens x 24 rows, 12 of the 16 registers.

#include "gpt/part.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace fastmem {
namespace {

struct Vec {
  static constexpr std::size_t kLanes = 8, kTokens = 4;
  __m256 v;

  static Vec all(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_load_ps(p)}; }
  static Vec load_anywhere(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_store_ps(p, v); }
  void store_anywhere(float* p) const { _mm256_storeu_ps(p, v); }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fms(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
// b if a or b is NaN.
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline bool any_greater(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0;
}
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline Vec copy_sign(Vec size, Vec sign) {
  return {_mm256_or_ps(size.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.F)))};
}
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
// Alternates lanes of a and b: of their lower halves, then of their higher halves.
inline Vec interleave_low(Vec a, Vec b) {
  return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x20)};
}
inline Vec interleave_high(Vec a, Vec b) {
  return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x31)};
}
inline float add_lanes(Vec a) {
  alignas(32) float x[8];
  a.store(x);
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

inline Vec exp2_fraction(Vec f);
// 0 below 2^-126, infinity from 2^128.
inline Vec exp2(Vec x) {
  x = min(Vec::all(128), max(Vec::all(-126.5F), x));
  const Vec n = {_mm256_floor_ps(x.v)};
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return exp2_fraction(x - n) * Vec{_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}

}  // namespace
}  // namespace fastmem

#include "gpt/loops.h"
#include "likelihood/loops.h"

namespace fastmem {
const Loops kAvx2Loops = kLoops;
const GptLoops kAvx2Gpt = kGptLoops;
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace fastmem {
const Loops kAvx2Loops = {};
const GptLoops kAvx2Gpt = {};
}
#endif
