// Types shared by sequences.cpp, which divides the work, and the loops of each instruction set.
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

// Finds the token of a word in `cumulative`. The word's first bits give a place near the token, so
// that few steps are left. The number of these bits changes only the speed.
class Guide {
 public:
  static constexpr std::uint32_t kNear = 8;

  Guide(const TokenRule& rule, int bits);

  // `count` counts the entries at most the word among the next kNear.
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
  std::uint32_t reach_;  // a power of two: steps of reach_, reach_ / 2, ..., kNear, and at last
                         // up to kNear, reach every token
  int shift_;
  std::vector<std::uint32_t> first_;  // by first bits: the token of the smallest such word
};

// Sequences begin, begin + 1, ..., or with `indices` indices[0], indices[1], ...
struct Fill {
  TokenRule rule;
  std::uint64_t begin;
  const std::uint64_t* indices;
  const Guide* guide;  // or null
};

// A range of blocks, numbered through all sequences.
struct Blocks {
  std::uint64_t begin, end;
};

// True if a block has eight tokens, not four.
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
