#include "sequences.h"

#include <algorithm>
#include <array>
#include <exception>
#include <thread>
#include <vector>

#include "philox.h"

namespace fastmem {
namespace {

// Starting a thread costs tens of microseconds, this many tokens 100 to 300.
constexpr std::uint64_t kLeastTokensPerThread = 1 << 17;

// Calls f(begin, end) for parts that make up [0, n), each on its own thread.
template <class F>
void in_parts(std::size_t n, std::uint64_t tokens_per_item, std::size_t threads, const F& f) {
  const std::size_t least = kLeastTokensPerThread / tokens_per_item + 1;
  const std::size_t parts = std::max<std::size_t>(1, std::min(threads, n / least));
  const auto edge = [=](std::size_t part) {
    return n / parts * part + std::min(part, n % parts);
  };
  std::vector<std::thread> others;
  others.reserve(parts - 1);
  std::size_t started = 1;
  try {
    for (; started < parts; ++started)
      others.emplace_back(f, edge(started), edge(started + 1));
  } catch (const std::exception&) {
    // The system has no more threads to give: this one does the parts that got none.
  }
  f(0, edge(1));
  f(edge(started), n);
  for (auto& other : others) other.join();
}

// Blocks drawn at a time, so that the compiler can put Philox in vector registers. Blocks of
// neighbouring sequences share a batch, so that short sequences fill it too.
constexpr int kLanes = 16;
using Lanes = std::array<std::uint32_t, kLanes>;

struct Batch {
  Lanes block{}, index_low{}, index_high{};
  std::array<Lanes, 4> words;

  void draw(PhiloxKey key) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const PhiloxWords w = philox4x32({block[lane], 0, index_low[lane], index_high[lane]}, key);
      for (int k = 0; k < 4; ++k) words[k][lane] = w[k];
    }
  }
};

// V a power of two, at most 65536.
struct Halves {
  static constexpr int kTokens = 8;
  std::uint32_t mask;

  template <class Token>
  void tokens(const Batch& batch, int lane, PhiloxKey, Token* out) const {
    for (int k = 0; k < 4; ++k) {
      const std::uint32_t word = batch.words[k][lane];
      out[2 * k] = static_cast<Token>(word & mask);
      out[2 * k + 1] = static_cast<Token>((word >> 16) & mask);
    }
  }
};

// Any other V.
struct Products {
  static constexpr int kTokens = 4;
  std::uint32_t vocab;
  std::uint32_t threshold;  // 2^32 mod V

  template <class Token>
  void tokens(const Batch& batch, int lane, PhiloxKey key, Token* out) const {
    for (int k = 0; k < 4; ++k) {
      std::uint64_t product = std::uint64_t{batch.words[k][lane]} * vocab;
      for (std::uint32_t attempt = 1; low32(product) < threshold; ++attempt) {
        const PhiloxCounter counter = {batch.block[lane], attempt, batch.index_low[lane],
                                       batch.index_high[lane]};
        product = std::uint64_t{philox4x32(counter, key)[k]} * vocab;
      }
      out[k] = static_cast<Token>(high32(product));
    }
  }
};

// Sequences index_of(begin), ..., index_of(end - 1) to out[(end - begin) * S].
template <class Draw, class Token, class IndexOf>
void fill_part(const TokenRule& rule, const Draw& draw, const IndexOf& index_of, std::size_t begin,
               std::size_t end, Token* out) {
  const PhiloxKey key = {low32(rule.seed), high32(rule.seed)};
  const std::uint64_t blocks = (rule.length - 1) / Draw::kTokens + 1;
  const int tail = static_cast<int>(rule.length - (blocks - 1) * Draw::kTokens);
  Batch batch;
  std::uint64_t block = 0;
  while (begin < end) {
    int used = 0;
    for (; used < kLanes && begin < end; ++used) {
      const std::uint64_t index = index_of(begin);
      batch.block[used] = low32(block);
      batch.index_low[used] = low32(index);
      batch.index_high[used] = high32(index);
      if (++block == blocks) {
        block = 0;
        ++begin;
      }
    }
    batch.draw(key);
    for (int lane = 0; lane < used; ++lane) {
      if (batch.block[lane] != low32(blocks - 1)) {
        draw.tokens(batch, lane, key, out);
        out += Draw::kTokens;
      } else {
        Token last[Draw::kTokens];
        draw.tokens(batch, lane, key, last);
        out = std::copy_n(last, tail, out);
      }
    }
  }
}

template <class Token, class IndexOf>
void fill(const TokenRule& rule, const IndexOf& index_of, std::size_t n, Token* out,
          std::size_t threads) {
  const std::uint32_t vocab = rule.vocab;
  const bool halves = vocab <= 65536 && (vocab & (vocab - 1)) == 0;
  in_parts(n, rule.length, threads, [=](std::size_t begin, std::size_t end) {
    Token* const part = out + begin * rule.length;
    if (halves)
      fill_part(rule, Halves{vocab - 1}, index_of, begin, end, part);
    else
      fill_part(rule, Products{vocab, (0 - vocab) % vocab}, index_of, begin, end, part);
  });
}

// David Stafford's Mix13, the finalizer of SplitMix64: every bit in flips every bit out half the
// time.
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// How far an order is from uniform, in chi-square of all orders of a count over 300,000 epochs
// (1,500,000 for 8), in standard deviations: with the fewest bits that hold the count, 24 rounds
// still leave 13 at count 8, since a half of one bit hardly mixes; with at least 8 bits, 4 rounds
// are already within 2. So: at least 8 bits, which costs a count below 256 no more than 256 steps
// for its whole order, and three times those 4 rounds.
constexpr int kLeastBits = 8;
constexpr int kRounds = 12;
constexpr std::uint64_t kTokensPerPlace = 32;  // in time

// The attempt that sets the round keys' counters apart from all counters of the token rule, which
// would have to reject 2^32 - 1 words in a row, each with a probability below 1/2, to get there.
constexpr std::uint32_t kOrderDomain = 0xFFFFFFFF;

// The rule that sequences.h states at permutation().
class Order {
 public:
  Order(std::uint64_t seed, std::uint64_t epoch, std::uint64_t last) : last_(last) {
    int bits = kLeastBits;
    while (bits < 64 && last >> bits != 0) ++bits;
    low_bits_ = bits / 2;
    low_mask_ = (std::uint64_t{1} << low_bits_) - 1;
    high_mask_ = (std::uint64_t{1} << (bits - low_bits_)) - 1;
    for (std::uint32_t i = 0; i < kRounds / 2; ++i) {
      const PhiloxCounter counter = {i, kOrderDomain, low32(epoch), high32(epoch)};
      const PhiloxWords w = philox4x32(counter, {low32(seed), high32(seed)});
      keys_[2 * i] = w[0] | std::uint64_t{w[1]} << 32;
      keys_[2 * i + 1] = w[2] | std::uint64_t{w[3]} << 32;
    }
  }

  std::uint64_t operator()(std::uint64_t x) const {
    do {
      std::uint64_t low = x & low_mask_;
      std::uint64_t high = x >> low_bits_;
      for (int i = 0; i < kRounds; i += 2) {
        high ^= mix(low ^ keys_[i]) & high_mask_;
        low ^= mix(high ^ keys_[i + 1]) & low_mask_;
      }
      x = high << low_bits_ | low;
    } while (x > last_);
    return x;
  }

 private:
  std::uint64_t last_, low_mask_, high_mask_;
  int low_bits_;
  std::array<std::uint64_t, kRounds> keys_;
};

}  // namespace

template <class Token>
void fill_range(const TokenRule& rule, std::uint64_t begin, std::size_t n, Token* out,
                std::size_t threads) {
  fill(rule, [=](std::size_t i) { return begin + i; }, n, out, threads);
}

template <class Token>
void fill_indices(const TokenRule& rule, const std::uint64_t* indices, std::size_t n, Token* out,
                  std::size_t threads) {
  fill(rule, [=](std::size_t i) { return indices[i]; }, n, out, threads);
}

void permutation(std::uint64_t seed, std::uint64_t epoch, std::uint64_t last, std::uint64_t begin,
                 std::size_t n, std::uint64_t* out, std::size_t threads) {
  const Order order(seed, epoch, last);
  in_parts(n, kTokensPerPlace, threads, [&](std::size_t part, std::size_t end) {
    for (std::size_t i = part; i < end; ++i) out[i] = order(begin + i);
  });
}

#define FASTMEM_INSTANTIATE(Token)                                                               \
  template void fill_range(const TokenRule&, std::uint64_t, std::size_t, Token*, std::size_t);   \
  template void fill_indices(const TokenRule&, const std::uint64_t*, std::size_t, Token*,        \
                             std::size_t);
FASTMEM_INSTANTIATE(std::uint16_t)
FASTMEM_INSTANTIATE(std::uint32_t)
FASTMEM_INSTANTIATE(std::int32_t)
FASTMEM_INSTANTIATE(std::int64_t)
#undef FASTMEM_INSTANTIATE

}  // namespace fastmem
