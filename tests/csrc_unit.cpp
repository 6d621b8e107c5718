// Checks csrc/sequences.cpp without Python, so that sanitizers see it. From the root:
//
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -pthread
//       tests/csrc_unit.cpp csrc/sequences.cpp -o unit && ./unit tests/philox_known_answers.txt
//
// and the same with -fsanitize=thread. Says what failed and returns 1. Buffers are on the heap and
// of the exact size, so that a write beyond one is an error of the sanitizer.

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "../csrc/philox.h"
#include "../csrc/sequences.h"

namespace {

constexpr std::uint64_t kLast = ~std::uint64_t{0};
int failures = 0;

template <class... Parts>
void expect(bool holds, const Parts&... what) {
  if (holds) return;
  ++failures;
  (std::cerr << "FAILED: " << ... << what) << "\n";
}

// The token rule read off docs/design.md, a token at a time.
std::uint32_t token(std::uint64_t seed, std::uint64_t index, std::uint64_t t, std::uint32_t vocab) {
  using namespace fastmem;
  const auto block = [&](std::uint64_t number, std::uint32_t attempt) {
    return philox4x32({low32(number), attempt, low32(index), high32(index)},
                      {low32(seed), high32(seed)});
  };
  if (vocab <= 65536 && (vocab & (vocab - 1)) == 0) {
    const std::uint32_t word = block(t / 8, 0)[t % 8 / 2];
    return (t % 2 == 0 ? word & 0xFFFF : word >> 16) % vocab;
  }
  const auto threshold = static_cast<std::uint32_t>((std::uint64_t{1} << 32) % vocab);
  for (std::uint32_t attempt = 0;; ++attempt) {
    const std::uint64_t m = std::uint64_t{block(t / 4, attempt)[t % 4]} * vocab;
    if (low32(m) >= threshold) return high32(m);
  }
}

void known_answers(const std::string& path) {
  std::ifstream file(path);
  int answers = 0;
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream words(line);
    words >> std::hex;
    fastmem::PhiloxCounter counter;
    fastmem::PhiloxKey key;
    fastmem::PhiloxWords answer;
    for (auto& word : counter) words >> word;
    for (auto& word : key) words >> word;
    for (auto& word : answer) words >> word;
    expect(bool(words) && fastmem::philox4x32(counter, key) == answer, "known answer: ", line);
    ++answers;
  }
  expect(answers == 3, "3 known answers in ", path, ", found ", answers);
}

// Both ways to ask for n sequences, in exact-size memory that starts with no right token.
template <class Token>
void tokens(std::uint64_t seed, std::uint64_t begin, std::size_t n, std::uint64_t length,
            std::uint32_t vocab, std::size_t threads) {
  const auto marker = static_cast<Token>(0xCACACACACACACACA);
  const fastmem::TokenRule rule = {seed, length, vocab};
  const std::size_t size = n * length;
  const std::unique_ptr<Token[]> range(new Token[size]), list(new Token[size]);
  std::fill_n(range.get(), size, marker);
  std::fill_n(list.get(), size, marker);
  const std::unique_ptr<std::uint64_t[]> indices(new std::uint64_t[n]);
  for (std::size_t i = 0; i < n; ++i) indices[i] = begin + (n - 1 - i);
  fastmem::fill_range(rule, begin, n, range.get(), threads);
  fastmem::fill_indices(rule, indices.get(), n, list.get(), threads);
  for (std::size_t i = 0; i < n; ++i)
    for (std::uint64_t t = 0; t < length; ++t) {
      const auto right = static_cast<Token>(token(seed, begin + i, t, vocab));
      if (range[i * length + t] == right && list[(n - 1 - i) * length + t] == right) continue;
      return expect(false, "token ", t, " of sequence ", begin + i, ", seed ", seed, ", S ",
                    length, ", V ", vocab, ", threads ", threads, ", ", sizeof(Token), " bytes");
    }
}

template <class Token>
void all_sizes(const std::vector<std::uint32_t>& vocabs) {
  for (const std::uint32_t vocab : vocabs) {
    // S around a block of 4 and of 8; N S around a batch of 16 blocks; none at all.
    for (const std::uint64_t length : {1, 3, 4, 5, 7, 8, 9, 63, 64, 65})
      for (const std::size_t n : {0, 1, 2, 15, 16, 17}) tokens<Token>(7, 40, n, length, vocab, 3);
    // Each 64-bit input at its end, and where its low word carries.
    tokens<Token>(kLast, kLast - 4, 5, 9, vocab, 1);
    tokens<Token>(std::uint64_t{1} << 32, (std::uint64_t{1} << 32) - 2, 5, 9, vocab, 1);
  }
}

void order(std::uint64_t last, std::size_t threads) {
  const auto n = static_cast<std::size_t>(last + 1);
  const std::unique_ptr<std::uint64_t[]> whole(new std::uint64_t[n]);
  std::fill_n(whole.get(), n, kLast);
  fastmem::permutation(3, 5, last, 0, n, whole.get(), threads);
  for (std::size_t begin = 0; begin < n; begin += n / 3 + 1) {
    const std::size_t size = std::min(n - begin, n / 3 + 1);
    const std::unique_ptr<std::uint64_t[]> part(new std::uint64_t[size]);
    fastmem::permutation(3, 5, last, begin, size, part.get(), 1);
    expect(std::equal(&part[0], &part[0] + size, &whole[begin]), "part of an order of ", n);
  }
  std::sort(&whole[0], &whole[0] + n);
  for (std::size_t i = 0; i < n; ++i)
    if (whole[i] != i) return expect(false, "an order of ", n, " lacks ", i);
}

void long_orders() {
  for (const std::uint64_t last : {std::uint64_t{999'999'999'999}, kLast}) {
    const std::size_t n = 10'000;
    const std::unique_ptr<std::uint64_t[]> end(new std::uint64_t[n]);
    fastmem::permutation(kLast, kLast, last, last - (n - 1), n, end.get(), 2);
    std::sort(&end[0], &end[0] + n);
    expect(std::adjacent_find(&end[0], &end[0] + n) == &end[0] + n, "twice in an order to ", last);
    expect(end[n - 1] <= last, "beyond an order to ", last);
  }
}

}  // namespace

int main(int argc, char** argv) {
  known_answers(argc > 1 ? argv[1] : "tests/philox_known_answers.txt");

  const std::vector<std::uint32_t> small = {1, 2, 3, 128, 50257, 65535, 65536};
  const std::vector<std::uint32_t> large = {65537, 131072, 0x60000000, 0x7FFFFFFF, 0x80000000};
  all_sizes<std::uint16_t>(small);
  all_sizes<std::uint32_t>(small);
  all_sizes<std::int32_t>(small);
  all_sizes<std::int64_t>(small);
  all_sizes<std::uint32_t>(large);
  all_sizes<std::int32_t>(large);
  all_sizes<std::int64_t>(large);

  // Enough work for as many threads as are asked for, and parts of unequal size.
  for (const std::size_t threads : {1, 2, 7}) {
    tokens<std::uint16_t>(1, 0, 15'001, 65, 2048, threads);
    tokens<std::int64_t>(1, 0, 15'001, 65, 50257, threads);
    order(99'999, threads);
  }
  for (std::uint64_t last = 0; last < 600; ++last) order(last, 2);
  long_orders();

  std::cout << (failures == 0 ? "csrc_unit: all passed\n" : "csrc_unit: FAILED\n");
  return failures == 0 ? 0 : 1;
}
