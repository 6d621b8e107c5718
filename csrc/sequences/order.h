// Random orders of sequences: pure functions of their arguments. No Python, no state; the caller
// checks the limits written here and owns the memory. The result depends on neither `isa` nor
// `threads`, the most threads that are used; small work uses one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "shared/isa.h"

namespace fastmem {

// A random order of 0, ..., last. `last` is the count minus 1, since a count of 2^64 does not fit
// in 64 bits.
//
// The order is a Feistel network on the fewest bits that hold `last`, at least 8, applied again
// until the result is at most `last` (cycle walking): a bijection for any round function. With low
// the lower half of the bits, rounded down, and high the rest, rounds 0, 2, ..., 10 are high ^=
// mix(low ^ key[round]) and rounds 1, 3, ..., 11 are low ^= mix(high ^ key[round]), each cut to its
// half. Round keys 2i and 2i + 1 are words (0, 1) and (2, 3), low word first, of Philox with key =
// seed, counter = (i, 2^32 - 1, epoch). No token uses this counter: it would need 2^32 - 1
// rejections in a row. Orders of different counts at one (seed, epoch) share their round keys: each
// is random, but they depend on each other.
//
// Black, Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
struct OrderRule {
  std::uint64_t seed, epoch, last;
};

// Writes the elements at places begin, ..., begin + n - 1 (at most `last`) to out[n].
void permutation(const OrderRule& rule, std::uint64_t begin, std::size_t n, std::uint64_t* out,
                 std::size_t threads, Isa isa);

// Writes the elements at places[0], ..., places[n - 1] (each at most `last`, else this may not
// end), or with `inverse` the places of these elements, to out[n].
void permutation_at(const OrderRule& rule, const std::uint64_t* places, std::size_t n, bool inverse,
                    std::uint64_t* out, std::size_t threads, Isa isa);

}  // namespace fastmem
