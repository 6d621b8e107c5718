#include "sequences/order.h"

#include <algorithm>
#include <array>

#include "sequences/philox.h"
#include "shared/parts.h"

#if defined(__x86_64__) && defined(__GNUC__)
// Compiles a function and everything inlined in it for AVX-512.
#define FASTMEM_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl")))
#define FASTMEM_INLINE inline __attribute__((always_inline))
#else
#define FASTMEM_AVX512
#define FASTMEM_INLINE inline
#endif

namespace fastmem {
namespace {

// David Stafford's Mix13, the finalizer of SplitMix64: each input bit flips each output bit half
// the time.
FASTMEM_INLINE std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// Measured: chi-square of all orders of a count over 300,000 epochs (1,500,000 for count 8), in
// standard deviations from uniform. With the fewest bits that hold the count, 24 rounds still leave
// 13 at count 8, since a half of one bit hardly mixes; with at least 8 bits, 4 rounds are within 2.
// So: at least 8 bits, at which a count below 256 takes at most 256 steps for its whole order, and
// three times 4 rounds.
constexpr int kLeastBits = 8;
constexpr int kRounds = 12;
constexpr std::uint64_t kLeastPlacesPerThread = 1 << 12;

// The attempt of the round keys' counters, which no token reaches: it would take 2^32 - 1
// rejections in a row, each with a probability below 1/2.
constexpr std::uint32_t kOrderDomain = 0xFFFFFFFF;

// The rule of order.h.
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

  // Writes out[i] for i in [begin, end): the element at place(i), or with `inverse` the place of
  // element place(i), by the same walk backwards.
  template <bool inverse, class Place>
  void walk(std::uint64_t begin, std::uint64_t end, const Place& place, std::uint64_t* out,
            Isa isa) const {
    const auto step = isa == Isa::avx512 ? &Order::step_avx512<inverse> : &Order::step<inverse>;
    for (std::uint64_t i = begin; i < end; i += kAtOnce) {
      const std::uint64_t n = std::min<std::uint64_t>(kAtOnce, end - i);
      Batch x = {};
      for (std::uint64_t j = 0; j < n; ++j) x[j] = place(i + j);
      (this->*step)(x);
      while (std::any_of(x.begin(), x.end(), [=](std::uint64_t y) { return y > last_; })) {
        Batch next = x;
        (this->*step)(next);
        for (int j = 0; j < kAtOnce; ++j) x[j] = x[j] > last_ ? next[j] : x[j];
      }
      std::copy_n(x.begin(), n, out + i);
    }
  }

 private:
  // Mixes in progress at a time, since a mix waits for its products. Only AVX-512 multiplies 64-bit
  // lanes.
  static constexpr int kAtOnce = 16;
  using Batch = std::array<std::uint64_t, kAtOnce>;

  template <bool inverse>
  FASTMEM_INLINE void step_any(Batch& x) const {
    Batch low, high;
    for (int j = 0; j < kAtOnce; ++j) {
      low[j] = x[j] & low_mask_;
      high[j] = x[j] >> low_bits_;
    }
    for (int i = 0; i < kRounds; i += 2) {
      const int first = inverse ? kRounds - 1 - i : i, second = inverse ? first - 1 : first + 1;
      Batch& a = inverse ? low : high;
      Batch& b = inverse ? high : low;
      const std::uint64_t a_mask = inverse ? low_mask_ : high_mask_;
      const std::uint64_t b_mask = inverse ? high_mask_ : low_mask_;
      for (int j = 0; j < kAtOnce; ++j) a[j] ^= mix(b[j] ^ keys_[first]) & a_mask;
      for (int j = 0; j < kAtOnce; ++j) b[j] ^= mix(a[j] ^ keys_[second]) & b_mask;
    }
    for (int j = 0; j < kAtOnce; ++j) x[j] = high[j] << low_bits_ | low[j];
  }

  template <bool inverse>
  void step(Batch& x) const {
    step_any<inverse>(x);
  }

  template <bool inverse>
  FASTMEM_AVX512 void step_avx512(Batch& x) const {
    step_any<inverse>(x);
  }

  std::uint64_t last_, low_mask_, high_mask_;
  int low_bits_;
  std::array<std::uint64_t, kRounds> keys_;
};

}  // namespace

void permutation(const OrderRule& rule, std::uint64_t begin, std::size_t n, std::uint64_t* out,
                 std::size_t threads, Isa isa) {
  const Order order(rule);
  in_parts(n, kLeastPlacesPerThread, threads, [&](std::uint64_t part, std::uint64_t end) {
    order.walk<false>(part, end, [=](std::uint64_t i) { return begin + i; }, out, isa);
  });
}

void permutation_at(const OrderRule& rule, const std::uint64_t* places, std::size_t n, bool inverse,
                    std::uint64_t* out, std::size_t threads, Isa isa) {
  const Order order(rule);
  in_parts(n, kLeastPlacesPerThread, threads, [&](std::uint64_t part, std::uint64_t end) {
    const auto place = [=](std::uint64_t i) { return places[i]; };
    if (inverse)
      order.walk<true>(part, end, place, out, isa);
    else
      order.walk<false>(part, end, place, out, isa);
  });
}

}  // namespace fastmem
