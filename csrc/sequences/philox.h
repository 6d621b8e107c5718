// Philox4x32-10: four random 32-bit words as a pure function of a 128-bit counter and a 64-bit key.
//
// Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. Written from
// the paper; tests/csrc/philox_known_answers.txt has the authors' known answers.
#pragma once

#include <array>
#include <cstdint>

namespace fastmem {

using PhiloxCounter = std::array<std::uint32_t, 4>;
using PhiloxKey = std::array<std::uint32_t, 2>;
using PhiloxWords = std::array<std::uint32_t, 4>;

inline std::uint32_t low32(std::uint64_t x) { return static_cast<std::uint32_t>(x); }
inline std::uint32_t high32(std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); }

inline PhiloxWords philox4x32(PhiloxCounter counter, PhiloxKey key) {
  auto [x0, x1, x2, x3] = counter;
  auto [k0, k1] = key;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t even = std::uint64_t{0xD2511F53} * x0;
    const std::uint64_t odd = std::uint64_t{0xCD9E8D57} * x2;
    x0 = high32(odd) ^ x1 ^ k0;
    x1 = low32(odd);
    x2 = high32(even) ^ x3 ^ k1;
    x3 = low32(even);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {x0, x1, x2, x3};
}

}  // namespace fastmem
