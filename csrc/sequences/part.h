// What sequences.cpp, which shares the work out, and the loops of each instruction set agree on.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "sequences/sequences.h"

namespace fastmem {

// The token of a word by `cumulative`: its first bits say where to search, so that few steps are
// left. The number of bits changes the speed alone.
class Guide {
 public:
  static constexpr std::uint32_t kNear = 8;

  Guide(const TokenRule& rule, int bits);

  // `count` is how many of the next kNear entries are at most the word.
  template <class Count>
  std::uint32_t token(std::uint32_t word, const Count& count) const {
    std::uint32_t t = first_[std::uint64_t{word} >> shift_];
    for (std::uint32_t step = reach_; step >= kNear; step /= 2) {
      const std::uint32_t next = std::min(t + step, last_);
      t += (cumulative_[next] <= word ? ~std::uint32_t{0} : 0) & (next - t);
    }
    return std::min(t + count(&cumulative_[t + 1], word), last_);
  }

 private:
  std::vector<std::uint32_t> cumulative_;  // (V + kNear,)
  std::uint32_t last_;                     // V - 1
  std::uint32_t reach_;                    // a power of two: steps of it, half of it, ..., kNear,
                                           // and kNear more reach any token
  int shift_;
  std::vector<std::uint32_t> first_;  // the token of the smallest word that begins with these bits
};

// Sequences begin, begin + 1, ..., or with `indices` indices[0], indices[1], ...
struct Fill {
  TokenRule rule;
  std::uint64_t begin;
  const std::uint64_t* indices;
  const Guide* guide;  // or null
};

// Blocks are counted through all sequences.
struct Blocks {
  std::uint64_t begin, end;
};

// Whether a block has eight tokens and not four.
inline bool of_halves(const TokenRule& rule) {
  return !rule.cumulative && rule.vocab <= 65536 && (rule.vocab & (rule.vocab - 1)) == 0;
}

struct SequenceLoops {
  void (*uint16)(const Fill&, Blocks, std::uint16_t* out);
  void (*uint32)(const Fill&, Blocks, std::uint32_t* out);
  void (*int64)(const Fill&, Blocks, std::int64_t* out);
};

extern const SequenceLoops kPortableSequences, kAvx2Sequences, kAvx512Sequences;

}  // namespace fastmem
