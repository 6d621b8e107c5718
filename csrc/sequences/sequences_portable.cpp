// Any machine: two blocks at a time, by GCC's and Clang's vector extension. (GCC 12 gives wrong
// products for the same code as loops over arrays.)

#include "sequences/part.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Tokens are written as parts of longer integers, low part first: needs little-endian"
#endif

namespace fastmem {
namespace {

typedef std::uint64_t Two __attribute__((vector_size(16)));

struct Vec {
  static constexpr int kLanes = 2, kAtOnce = 2;
  Two v;

  static Vec all(std::uint64_t x) { return {Two{x, x}}; }
  static Vec load(const std::uint64_t* p) { return {Two{p[0], p[1]}}; }
  void store(void* p) const { std::memcpy(p, &v, sizeof v); }
};

constexpr int kOrder[] = {0, 1};
inline Vec interleave_low(Vec a, Vec b) { return {Two{a.v[0], b.v[0]}}; }
inline Vec interleave_high(Vec a, Vec b) { return {Two{a.v[1], b.v[1]}}; }

constexpr std::uint64_t kLow = 0xFFFFFFFF;

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator&(Vec a, Vec b) { return {a.v & b.v}; }
inline Vec operator^(Vec a, Vec b) { return {a.v ^ b.v}; }
inline Vec xor_all(Vec a, Vec b, Vec c) { return {a.v ^ b.v ^ c.v}; }
inline Vec times(Vec a, Vec b) { return {(a.v & kLow) * (b.v & kLow)}; }
template <int kBits>
Vec shift_right(Vec a) {
  return {a.v >> kBits};
}
inline Vec low_halves(Vec a, Vec b) { return {(a.v & kLow) | b.v << 32}; }
inline Vec high_halves(Vec a, Vec b) { return {a.v >> 32 | b.v >> 32 << 32}; }
// The low 16 bits of each high half, gathered by lane, in the order of blocks.
inline Vec quarters_in_order(const Vec (&a)[4]) {
  return {a[0].v >> 32 | a[1].v >> 32 << 16 | a[2].v >> 32 << 32 | a[3].v >> 32 << 48};
}
inline bool any_low_half_below(const Vec (&a)[4], Vec limit) {
  bool any = false;
  for (const Vec& x : a) any |= (x.v[0] & kLow) < limit.v[0] || (x.v[1] & kLow) < limit.v[0];
  return any;
}
inline Vec if_low_half_below(Vec a, Vec limit, Vec yes, Vec no) {
  return {(a.v & kLow) < limit.v ? yes.v : no.v};
}
inline Vec at_most(Vec a, Vec limit) { return {a.v < limit.v ? a.v : limit.v}; }
inline Vec gather(const std::uint64_t* from, Vec at) { return {Two{from[at.v[0]], from[at.v[1]]}}; }
// Subtracts `limit` from each `a` that reaches it, and adds 1 to its carry.
inline void wrap(Vec& a, Vec& carries, Vec limit) {
  const Two over = reinterpret_cast<Two>(a.v >= limit.v);
  a.v -= over & limit.v;
  carries.v -= over;
}
// Counts the entries at most `limit` among Guide::kNear.
inline std::uint32_t count_at_most(const std::uint32_t* from, std::uint32_t limit) {
  std::uint32_t n = 0;
  for (std::uint32_t i = 0; i < Guide::kNear; ++i) n += from[i] <= limit;
  return n;
}

}  // namespace
}  // namespace fastmem

#include "sequences/token_loops.h"

namespace fastmem {
const SequenceLoops kPortableSequences = kLoops;
}
