#include "sequences/sequences.h"

#include "sequences/part.h"
#include "shared/parts.h"

namespace fastmem {
namespace {

// As many tokens take as long as starting a few threads.
constexpr std::uint64_t kLeastTokensPerThread = 1 << 18;

const SequenceLoops& loops_of(Isa isa) {
  return isa == Isa::avx512 ? kAvx512Sequences
         : isa == Isa::avx2 ? kAvx2Sequences
                            : kPortableSequences;
}

template <class Token>
void fill(const Fill& fill, std::size_t n, Token* out, std::size_t threads, Isa isa) {
  const SequenceLoops& loops = loops_of(isa);
  const std::uint64_t per_block = of_halves(fill.rule) ? 8 : 4;
  const std::uint64_t blocks = (fill.rule.length - 1) / per_block + 1;
  in_parts(n * blocks, kLeastTokensPerThread / per_block, threads,
           [&](std::uint64_t begin, std::uint64_t end) {
             Token* const part =
                 out + begin / blocks * fill.rule.length + begin % blocks * per_block;
             if constexpr (sizeof(Token) == 2)
               loops.uint16(fill, {begin, end}, part);
             else if constexpr (sizeof(Token) == 4)
               loops.uint32(fill, {begin, end}, reinterpret_cast<std::uint32_t*>(part));
             else
               loops.int64(fill, {begin, end}, part);
           });
}

template <class Token>
void guided_fill(Fill rules, std::size_t n, Token* out, std::size_t threads, Isa isa) {
  if (!rules.rule.cumulative) return fill(rules, n, out, threads, isa);
  // The guide has at most half as many entries as tokens to make, and at most 2^16.
  int bits = 0;
  while (bits < 16 && n * rules.rule.length >> (bits + 2) != 0) ++bits;
  const Guide guide(rules.rule, bits);
  rules.guide = &guide;
  fill(rules, n, out, threads, isa);
}

}  // namespace

Guide::Guide(const TokenRule& rule, int bits)
    : cumulative_(rule.cumulative, rule.cumulative + rule.vocab),
      last_(rule.vocab - 1),
      reach_(kNear / 2),
      shift_(32 - bits) {
  first_.reserve(std::size_t{1} << bits);
  std::uint32_t t = 0, furthest = 0;
  for (std::uint64_t word = 0; word >> 32 == 0; word += std::uint64_t{1} << shift_) {
    const std::uint32_t before = t;
    while (t < last_ && cumulative_[t + 1] <= word) ++t;
    if (word > 0) furthest = std::max(furthest, t - before);
    first_.push_back(t);
  }
  furthest = std::max(furthest, last_ - t);
  while (2 * reach_ < furthest) reach_ *= 2;
  cumulative_.resize(rule.vocab + kNear, ~std::uint32_t{0});
}

template <class Token>
void fill_range(const TokenRule& rule, std::uint64_t begin, std::size_t n, Token* out,
                std::size_t threads, Isa isa) {
  guided_fill({rule, begin, nullptr, nullptr}, n, out, threads, isa);
}

template <class Token>
void fill_indices(const TokenRule& rule, const std::uint64_t* indices, std::size_t n, Token* out,
                  std::size_t threads, Isa isa) {
  guided_fill({rule, 0, indices, nullptr}, n, out, threads, isa);
}

#define FASTMEM_INSTANTIATE(Token)                                                             \
  template void fill_range(const TokenRule&, std::uint64_t, std::size_t, Token*, std::size_t,  \
                           Isa);                                                               \
  template void fill_indices(const TokenRule&, const std::uint64_t*, std::size_t, Token*,      \
                             std::size_t, Isa);
FASTMEM_INSTANTIATE(std::uint16_t)
FASTMEM_INSTANTIATE(std::uint32_t)
FASTMEM_INSTANTIATE(std::int32_t)
FASTMEM_INSTANTIATE(std::int64_t)
#undef FASTMEM_INSTANTIATE

}  // namespace fastmem
