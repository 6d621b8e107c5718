// Any machine: four blocks at a time, in loops that a compiler can put in vector registers.

#include "sequences_part.h"

namespace fastmem {
namespace {

struct Vec {
  static constexpr int kLanes = 4, kAtOnce = 1;
  std::uint64_t v[kLanes];

  static Vec all(std::uint64_t x) { return {{x, x, x, x}}; }
  static Vec load(const std::uint64_t* p) {
    Vec a;
    std::memcpy(a.v, p, sizeof a.v);
    return a;
  }
  void store(void* p) const { std::memcpy(p, v, sizeof v); }
};

template <class F>
Vec each(const F& f) {
  Vec a;
  for (int lane = 0; lane < Vec::kLanes; ++lane) a.v[lane] = f(lane);
  return a;
}

constexpr int kOrder[] = {0, 2, 1, 3};
inline Vec interleave_low(Vec a, Vec b) { return {{a.v[0], b.v[0], a.v[2], b.v[2]}}; }
inline Vec interleave_high(Vec a, Vec b) { return {{a.v[1], b.v[1], a.v[3], b.v[3]}}; }
inline Vec in_order(Vec a) { return {{a.v[0], a.v[2], a.v[1], a.v[3]}}; }

inline std::uint64_t low(std::uint64_t x) { return x & 0xFFFFFFFF; }

inline Vec operator+(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator&(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] & b.v[i]; });
}
inline Vec xor_all(Vec a, Vec b, Vec c) {
  return each([&](int i) { return a.v[i] ^ b.v[i] ^ c.v[i]; });
}
inline Vec times(Vec a, Vec b) {
  return each([&](int i) { return low(a.v[i]) * low(b.v[i]); });
}
template <int kBits>
Vec shift_right(Vec a) {
  return each([&](int i) { return a.v[i] >> kBits; });
}
inline Vec low_halves(Vec a, Vec b) {
  return each([&](int i) { return low(a.v[i]) | b.v[i] << 32; });
}
inline Vec high_halves(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] >> 32 | (b.v[i] >> 32 << 32); });
}
// The low 16 bits of the high halves of each, in one lane.
inline Vec quarters(Vec a, Vec b, Vec c, Vec d) {
  return each([&](int i) {
    return a.v[i] >> 32 | b.v[i] >> 32 << 16 | c.v[i] >> 32 << 32 | d.v[i] >> 32 << 48;
  });
}
inline bool any_low_half_below(const Vec (&a)[4], Vec limit) {
  std::uint64_t least = ~std::uint64_t{0};
  for (const Vec& x : a)
    for (const std::uint64_t lane : x.v) least = std::min(least, low(lane));
  return least < limit.v[0];
}
inline Vec if_low_half_below(Vec a, Vec limit, Vec yes, Vec no) {
  return each([&](int i) { return low(a.v[i]) < limit.v[i] ? yes.v[i] : no.v[i]; });
}
inline Vec at_most(Vec a, Vec limit) {
  return each([&](int i) { return std::min(a.v[i], limit.v[i]); });
}
inline Vec gather(const std::uint64_t* from, Vec at) {
  return each([&](int i) { return from[at.v[i]]; });
}
// Takes `limit` off each `a` that reaches it, and counts it in `carries`.
inline void wrap(Vec& a, Vec& carries, Vec limit) {
  for (int i = 0; i < Vec::kLanes; ++i) {
    const bool over = a.v[i] >= limit.v[i];
    a.v[i] -= over ? limit.v[i] : 0;
    carries.v[i] += over;
  }
}
// How many of Guide::kNear entries are at most `limit`.
inline std::uint32_t count_at_most(const std::uint32_t* from, std::uint32_t limit) {
  std::uint32_t n = 0;
  for (std::uint32_t i = 0; i < Guide::kNear; ++i) n += from[i] <= limit;
  return n;
}

}  // namespace
}  // namespace fastmem

#include "sequences_kernel.h"

namespace fastmem {
const SequenceLoops kPortableSequences = kLoops;
}
