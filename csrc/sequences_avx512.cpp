// AVX-512: eight blocks at a time.

#include "sequences_part.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,popcnt"))), \
                             apply_to = function)
#else
// GCC 12 takes the deliberately undefined operand inside its own intrinsics for an error (105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,popcnt")
#endif

namespace fastmem {
namespace {

struct Vec {
  static constexpr int kLanes = 8, kAtOnce = 4;
  __m512i v;

  static Vec all(std::uint64_t x) { return {_mm512_set1_epi64(static_cast<long long>(x))}; }
  static Vec load(const std::uint64_t* p) { return {_mm512_loadu_si512(p)}; }
  void store(void* p) const { _mm512_storeu_si512(p, v); }
};

// The block, of eight that follow each other, that each lane has: so that interleaving orders them.
constexpr int kOrder[] = {0, 4, 1, 5, 2, 6, 3, 7};
inline Vec interleave_low(Vec a, Vec b) { return {_mm512_unpacklo_epi64(a.v, b.v)}; }
inline Vec interleave_high(Vec a, Vec b) { return {_mm512_unpackhi_epi64(a.v, b.v)}; }
inline Vec in_order(Vec a) {
  return {_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), a.v)};
}

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_epi64(a.v, b.v)}; }
inline Vec operator&(Vec a, Vec b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Vec xor_all(Vec a, Vec b, Vec c) {
  return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)};
}
inline Vec times(Vec a, Vec b) { return {_mm512_mul_epu32(a.v, b.v)}; }
template <int kBits>
Vec shift_right(Vec a) {
  return {_mm512_srli_epi64(a.v, kBits)};
}
inline Vec low_halves(Vec a, Vec b) {
  return {_mm512_mask_shuffle_epi32(a.v, 0xAAAA, b.v, _MM_PERM_CCAA)};
}
inline Vec high_halves(Vec a, Vec b) {
  return {_mm512_mask_shuffle_epi32(b.v, 0x5555, a.v, _MM_PERM_DDBB)};
}
// The low 16 bits of the high halves of each, in one lane.
inline Vec quarters(Vec a, Vec b, Vec c, Vec d) {
  const __m512i even = high_halves(a, c).v, odd = high_halves(b, d).v;
  return {_mm512_or_si512(even, _mm512_slli_epi32(odd, 16))};
}
inline bool any_low_half_below(const Vec (&a)[4], Vec limit) {
  const __m512i least = _mm512_min_epu32(_mm512_min_epu32(a[0].v, a[1].v),
                                         _mm512_min_epu32(a[2].v, a[3].v));
  return _mm512_mask_cmplt_epu32_mask(0x5555, least, limit.v) != 0;
}
inline Vec if_low_half_below(Vec a, Vec limit, Vec yes, Vec no) {
  const __m512i low = _mm512_set1_epi64(0xFFFFFFFF);
  const __mmask8 below =
      _mm512_cmplt_epu64_mask(_mm512_and_si512(a.v, low), _mm512_and_si512(limit.v, low));
  return {_mm512_mask_blend_epi64(below, no.v, yes.v)};
}
inline Vec at_most(Vec a, Vec limit) { return {_mm512_min_epu64(a.v, limit.v)}; }
inline Vec gather(const std::uint64_t* from, Vec at) {
  return {_mm512_i64gather_epi64(at.v, from, 8)};
}
// Takes `limit` off each `a` that reaches it, and counts it in `carries`.
inline void wrap(Vec& a, Vec& carries, Vec limit) {
  const __mmask8 over = _mm512_cmpge_epu64_mask(a.v, limit.v);
  a.v = _mm512_mask_sub_epi64(a.v, over, a.v, limit.v);
  carries.v = _mm512_mask_add_epi64(carries.v, over, carries.v, _mm512_set1_epi64(1));
}
// How many of Guide::kNear entries are at most `limit`.
inline std::uint32_t count_at_most(const std::uint32_t* from, std::uint32_t limit) {
  const __m256i entries = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i all = _mm256_set1_epi32(static_cast<int>(limit));
  return static_cast<std::uint32_t>(
      __builtin_popcount(_mm256_cmple_epu32_mask(entries, all)));
}

}  // namespace
}  // namespace fastmem

#include "sequences_kernel.h"

namespace fastmem {
const SequenceLoops kAvx512Sequences = kLoops;
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace fastmem {
const SequenceLoops kAvx512Sequences = {};
}
#endif
