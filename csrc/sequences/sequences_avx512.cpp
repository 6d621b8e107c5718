// AVX-512: eight blocks at a time.

#include "sequences/part.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,popcnt"))), \
                             apply_to = function)
#else
// GCC 12 takes the deliberately undefined operand inside its own intrinsics for an error (105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,popcnt")
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

// The block of each lane, among eight consecutive blocks: interleaving then orders them.
constexpr int kOrder[] = {0, 4, 1, 5, 2, 6, 3, 7};
inline Vec interleave_low(Vec a, Vec b) { return {_mm512_unpacklo_epi64(a.v, b.v)}; }
inline Vec interleave_high(Vec a, Vec b) { return {_mm512_unpackhi_epi64(a.v, b.v)}; }

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_epi64(a.v, b.v)}; }
inline Vec operator&(Vec a, Vec b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Vec operator^(Vec a, Vec b) { return {_mm512_xor_si512(a.v, b.v)}; }
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
// The low 16 bits of each high half, gathered by lane, in the order of blocks.
inline Vec quarters_in_order(const Vec (&a)[4]) {
  alignas(64) static constexpr std::uint16_t from[32] = {
      0,  2,  32, 34, 8,  10, 40, 42, 16, 18, 48, 50, 24, 26, 56, 58,
      4,  6,  36, 38, 12, 14, 44, 46, 20, 22, 52, 54, 28, 30, 60, 62};
  return {_mm512_permutex2var_epi16(high_halves(a[0], a[1]).v, _mm512_load_si512(from),
                                    high_halves(a[2], a[3]).v)};
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
// Subtracts `limit` from each `a` that reaches it, and adds 1 to its carry.
inline void wrap(Vec& a, Vec& carries, Vec limit) {
  const __mmask8 over = _mm512_cmpge_epu64_mask(a.v, limit.v);
  a.v = _mm512_mask_sub_epi64(a.v, over, a.v, limit.v);
  carries.v = _mm512_mask_add_epi64(carries.v, over, carries.v, _mm512_set1_epi64(1));
}
// Counts the entries at most `limit` among Guide::kNear.
inline std::uint32_t count_at_most(const std::uint32_t* from, std::uint32_t limit) {
  const __m256i entries = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i all = _mm256_set1_epi32(static_cast<int>(limit));
  return static_cast<std::uint32_t>(
      __builtin_popcount(_mm256_cmple_epu32_mask(entries, all)));
}

}  // namespace
}  // namespace fastmem

#include "sequences/token_loops.h"

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
