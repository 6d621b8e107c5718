// AVX-512: tiles of 8 tokens x 48 rows, 24 of the 32 registers.

#include "gpt/part.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
// GCC 12 takes the deliberately undefined operand inside its own intrinsics for an error (105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,fma")
#endif

namespace fastmem {
namespace {

struct Vec {
  static constexpr std::size_t kLanes = 16, kTokens = 8;
  __m512 v;

  static Vec all(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_load_ps(p)}; }
  static Vec load_anywhere(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_store_ps(p, v); }
  void store_anywhere(float* p) const { _mm512_storeu_ps(p, v); }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fms(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
// b if a or b is NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline Vec copy_sign(Vec size, Vec sign) {
  return {_mm512_or_ps(size.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.F)))};
}
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
// Alternates lanes of a and b: of their lower halves, then of their higher halves.
inline Vec interleave_low(Vec a, Vec b) {
  const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return {_mm512_permutex2var_ps(a.v, from, b.v)};
}
inline Vec interleave_high(Vec a, Vec b) {
  const __m512i from =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return {_mm512_permutex2var_ps(a.v, from, b.v)};
}
inline float add_lanes(Vec a) { return _mm512_reduce_add_ps(a.v); }

inline Vec exp2_fraction(Vec f);
inline Vec exp2(Vec x) {
  const Vec f = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  return {_mm512_scalef_ps(exp2_fraction(f).v, x.v)};
}

}  // namespace
}  // namespace fastmem

#include "gpt/loops.h"
#include "likelihood/loops.h"

namespace fastmem {
const Loops kAvx512Loops = kLoops;
const GptLoops kAvx512Gpt = kGptLoops;
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace fastmem {
const Loops kAvx512Loops = {};
const GptLoops kAvx512Gpt = {};
}
#endif
