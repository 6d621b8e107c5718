// Tokens of random sequences: pure functions of their arguments. No Python, no state; the caller
// checks the limits written here and owns the memory. The result depends on neither `isa` nor
// `threads`, the most threads that are used; small work uses one.
//
// N sequences, S tokens a sequence, V vocabulary.
#pragma once

#include <cstddef>
#include <cstdint>

#include "shared/isa.h"

namespace fastmem {

constexpr std::uint64_t kMaxLength = std::uint64_t{1} << 34;  // 2^32 blocks of four tokens
constexpr std::uint64_t kMaxVocab = std::uint64_t{1} << 31;
constexpr std::uint64_t kMaxWeights = std::uint64_t{1} << 20;

// The token rule, philox4x32-10/1: token(seed, index, position), fixed for ever.
//
// Key = seed; counter = (block, attempt, index); both low word first. Philox gives w[0] ... w[3].
//   V a power of two, at most 65536: token t is in block t div 8, word (t mod 8) div 2, its low 16
//     bits if t is even and its high 16 bits if t is odd, mod V; attempt = 0.
//   any other V: token t is in block t div 4, m = w[t mod 4] * V in 64 bits; the token is
//     m div 2^32 if m mod 2^32 >= 2^32 mod V, else draw again with attempt + 1.
//   weights, any V up to kMaxWeights: token t is in block t div 4, attempt = 0; it is the number of
//     i in 1, ..., V - 1 with cumulative[i] <= w[t mod 4], so that token i has the probability
//     (cumulative[i + 1] - cumulative[i]) / 2^32, with cumulative[V] = 2^32.
//
// Lemire, "Fast Random Integer Generation in an Interval", TOMACS 29(1), 2019.
struct TokenRule {
  std::uint64_t seed;
  std::uint64_t length;             // S, 1 to kMaxLength
  std::uint32_t vocab;              // V, 1 to kMaxVocab
  const std::uint32_t* cumulative;  // (V,) from 0 on, never decreasing; or null
};

// Writes sequences begin, ..., begin + n - 1 (at most 2^64 - 1) to out[n * S].
// Token is std::uint16_t (V at most 65536), std::uint32_t, std::int32_t or std::int64_t.
template <class Token>
void fill_range(const TokenRule& rule, std::uint64_t begin, std::size_t n, Token* out,
                std::size_t threads, Isa isa);

// Writes sequences indices[0], ..., indices[n - 1], in this order, to out[n * S].
template <class Token>
void fill_indices(const TokenRule& rule, const std::uint64_t* indices, std::size_t n, Token* out,
                  std::size_t threads, Isa isa);

}  // namespace fastmem
