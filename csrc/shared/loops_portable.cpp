// Any machine: GCC's and Clang's vector extension, four floats; tiles of 4 tokens x 12 rows.

#include "gpt/part.h"

namespace fastmem {
namespace {

typedef float Four __attribute__((vector_size(16)));
typedef double FourDoubles __attribute__((vector_size(32)));
typedef std::int32_t FourInts __attribute__((vector_size(16)));

struct Vec {
  static constexpr std::size_t kLanes = 4, kTokens = 4;
  Four v;

  static Vec all(float x) { return {Four{x, x, x, x}}; }
  static Vec load(const float* p) { return {*reinterpret_cast<const Four*>(p)}; }
  static Vec load_anywhere(const float* p) {
    Four v;
    std::memcpy(&v, p, sizeof v);
    return {v};
  }
  void store(float* p) const { *reinterpret_cast<Four*>(p) = v; }
  void store_anywhere(float* p) const { std::memcpy(p, &v, sizeof v); }
};

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
// Rounded once: in double the product is exact.
inline Vec fms(Vec a, Vec b, Vec c) {
  const FourDoubles product =
      __builtin_convertvector(a.v, FourDoubles) * __builtin_convertvector(b.v, FourDoubles);
  return {__builtin_convertvector(product - __builtin_convertvector(c.v, FourDoubles), Four)};
}
// b if a or b is NaN.
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline bool any_greater(Vec a, Vec b) {
  const FourInts greater = a.v > b.v;
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
}
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return {a.v < b.v ? yes.v : no.v}; }
inline Vec copy_sign(Vec size, Vec sign) {
  const FourInts bit = reinterpret_cast<FourInts>(sign.v) & INT32_MIN;
  return {reinterpret_cast<Four>(reinterpret_cast<FourInts>(size.v) | bit)};
}
inline Vec sqrt(Vec a) {
  return {Four{std::sqrt(a.v[0]), std::sqrt(a.v[1]), std::sqrt(a.v[2]), std::sqrt(a.v[3])}};
}
// Alternates lanes of a and b: of their lower halves, then of their higher halves.
inline Vec interleave_low(Vec a, Vec b) { return {Four{a.v[0], b.v[0], a.v[1], b.v[1]}}; }
inline Vec interleave_high(Vec a, Vec b) { return {Four{a.v[2], b.v[2], a.v[3], b.v[3]}}; }
inline float add_lanes(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

inline Vec exp2_fraction(Vec f);
// 0 below 2^-126, infinity from 2^128.
inline Vec exp2(Vec x) {
  x = min(Vec::all(128), max(Vec::all(-126.5F), x));
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const Vec magic = Vec::all(12582912);
  const Vec rounded = (x - Vec::all(0.5F)) + magic;
  const FourInts exponent =
      (reinterpret_cast<FourInts>(rounded.v) - reinterpret_cast<FourInts>(magic.v) + 127) << 23;
  return exp2_fraction(x - (rounded - magic)) * Vec{reinterpret_cast<Four>(exponent)};
}

}  // namespace
}  // namespace fastmem

#include "gpt/loops.h"
#include "likelihood/loops.h"

namespace fastmem {
const Loops kPortableLoops = kLoops;
const GptLoops kPortableGpt = kGptLoops;
}
