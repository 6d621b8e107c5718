// Tokens of uniformly random sequences, and an order to visit them in: pure functions of their
// arguments. No Python, no state; the caller checks the limits written here and owns the memory.
// The result never depends on `threads`, which is the most that are used; small work uses one.
//
// N sequences, S tokens a sequence, V vocabulary.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmem {

constexpr std::uint64_t kMaxLength = std::uint64_t{1} << 34;  // 2^32 blocks of four tokens
constexpr std::uint64_t kMaxVocab = std::uint64_t{1} << 31;

// The token rule, philox4x32-10/1: token(seed, index, position), the same for ever.
//
// Key = seed; counter = (block, attempt, index); both low word first. Philox gives w[0] ... w[3].
//   V a power of two, at most 65536: token t is in block t div 8, word (t mod 8) div 2, its low 16
//     bits if t is even and its high 16 bits if t is odd, mod V; attempt = 0.
//   any other V: token t is in block t div 4, m = w[t mod 4] * V in 64 bits; the token is m div 2^32
//     if m mod 2^32 >= 2^32 mod V, else the same is drawn again with attempt + 1.
//
// Lemire, "Fast Random Integer Generation in an Interval", TOMACS 29(1), 2019.
struct TokenRule {
  std::uint64_t seed;
  std::uint64_t length;  // S, 1 to kMaxLength
  std::uint32_t vocab;   // V, 1 to kMaxVocab
};

// Token is std::uint16_t (V at most 65536), std::uint32_t, std::int32_t or std::int64_t.
// Sequences begin, ..., begin + n - 1 (at most 2^64 - 1) to out[n * S].
template <class Token>
void fill_range(const TokenRule& rule, std::uint64_t begin, std::size_t n, Token* out,
                std::size_t threads);

// Sequences indices[0], ..., indices[n - 1], in that order, to out[n * S].
template <class Token>
void fill_indices(const TokenRule& rule, const std::uint64_t* indices, std::size_t n, Token* out,
                  std::size_t threads);

// Places begin, ..., begin + n - 1 (at most `last`) of a random order of 0, ..., last, to out[n].
// `last` is the count less one, since a count of 2^64 has no 64-bit integer.
//
// The order is a Feistel network on the fewest bits that hold `last`, at least 8, repeated from
// its own result until that is at most `last` (cycle walking): a bijection whatever its rounds do.
// With low the lower half of the bits, rounded down, and high the rest, rounds 0, 2, ..., 10 are
// high ^= mix(low ^ key[round]) and rounds 1, 3, ..., 11 are low ^= mix(high ^ key[round]), each
// cut to its half. Round keys 2i and 2i + 1 are words (0, 1) and (2, 3), low word first, of Philox
// with key = seed, counter = (i, 2^32 - 1, epoch): a counter that no token comes from, as that
// would need 2^32 - 1 rejections in a row. Orders of different counts at one (seed, epoch) share
// their round keys: each is random, but they are not independent of each other.
//
// Black, Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
void permutation(std::uint64_t seed, std::uint64_t epoch, std::uint64_t last, std::uint64_t begin,
                 std::size_t n, std::uint64_t* out, std::size_t threads);

}  // namespace fastmem
