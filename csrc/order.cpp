#include "order.h"

#include <array>

#include "parts.h"
#include "philox.h"

namespace fastmem {
namespace {

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
constexpr std::uint64_t kLeastPlacesPerThread = 1 << 12;

// The attempt that sets the round keys' counters apart from all counters of the token rule, which
// would have to reject 2^32 - 1 words in a row, each with a probability below 1/2, to get there.
constexpr std::uint32_t kOrderDomain = 0xFFFFFFFF;

// The rule that sequences.h states at permutation().
class Order {
 public:
  explicit Order(const OrderRule& rule) : last_(rule.last) {
    int bits = kLeastBits;
    while (bits < 64 && last_ >> bits != 0) ++bits;
    low_bits_ = bits / 2;
    low_mask_ = (std::uint64_t{1} << low_bits_) - 1;
    high_mask_ = (std::uint64_t{1} << (bits - low_bits_)) - 1;
    for (std::uint32_t i = 0; i < kRounds / 2; ++i) {
      const PhiloxCounter counter = {i, kOrderDomain, low32(rule.epoch), high32(rule.epoch)};
      const PhiloxWords w = philox4x32(counter, {low32(rule.seed), high32(rule.seed)});
      keys_[2 * i] = w[0] | std::uint64_t{w[1]} << 32;
      keys_[2 * i + 1] = w[2] | std::uint64_t{w[3]} << 32;
    }
  }

  std::uint64_t element(std::uint64_t x) const {
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

  // element() backwards: the walk that leads from a place to its element, from its other end.
  std::uint64_t place(std::uint64_t x) const {
    do {
      std::uint64_t low = x & low_mask_;
      std::uint64_t high = x >> low_bits_;
      for (int i = kRounds; i > 0; i -= 2) {
        low ^= mix(high ^ keys_[i - 1]) & low_mask_;
        high ^= mix(low ^ keys_[i - 2]) & high_mask_;
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

void permutation(const OrderRule& rule, std::uint64_t begin, std::size_t n, std::uint64_t* out,
                 std::size_t threads) {
  const Order order(rule);
  in_parts(n, kLeastPlacesPerThread, threads, [&](std::size_t part, std::size_t end) {
    for (std::size_t i = part; i < end; ++i) out[i] = order.element(begin + i);
  });
}

void permutation_at(const OrderRule& rule, const std::uint64_t* places, std::size_t n, bool inverse,
                    std::uint64_t* out, std::size_t threads) {
  const Order order(rule);
  in_parts(n, kLeastPlacesPerThread, threads, [&](std::size_t part, std::size_t end) {
    for (std::size_t i = part; i < end; ++i)
      out[i] = inverse ? order.place(places[i]) : order.element(places[i]);
  });
}

}  // namespace fastmem
