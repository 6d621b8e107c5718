// Checks csrc/sequences/ without Python; .ci/run builds and runs it under sanitizers. Prints
// failures and returns 1. Buffers are on the heap and of the exact size, so that a sanitizer sees a
// write beyond the end.

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "sequences/order.h"
#include "sequences/philox.h"
#include "sequences/sequences.h"
#include "expect.h"

namespace {

constexpr std::uint64_t kLast = ~std::uint64_t{0};

// The token rule of csrc/sequences/sequences.h, a token at a time.
std::uint32_t token(const fastmem::TokenRule& rule, std::uint64_t index, std::uint64_t t) {
  using namespace fastmem;
  const std::uint32_t vocab = rule.vocab;
  const auto block = [&](std::uint64_t number, std::uint32_t attempt) {
    return philox4x32({low32(number), attempt, low32(index), high32(index)},
                      {low32(rule.seed), high32(rule.seed)});
  };
  if (rule.cumulative) {
    const std::uint32_t word = block(t / 4, 0)[t % 4];
    std::uint32_t n = 0;
    for (std::uint32_t i = 1; i < vocab; ++i) n += rule.cumulative[i] <= word;
    return n;
  }
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

std::vector<fastmem::Isa> instruction_sets() {
  std::vector<fastmem::Isa> all;
  for (const auto isa : {fastmem::Isa::portable, fastmem::Isa::avx2, fastmem::Isa::avx512})
    if (fastmem::has_isa(isa)) all.push_back(isa);
  return all;
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

// Makes n sequences by range and by indices, in memory of the exact size without right tokens.
template <class Token>
void tokens(const fastmem::TokenRule& rule, std::uint64_t begin, std::size_t n,
            std::size_t threads) {
  const auto marker = static_cast<Token>(0xCACACACACACACACA);
  const std::uint64_t length = rule.length;
  const std::size_t size = n * length;
  const std::unique_ptr<Token[]> right(new Token[size]), range(new Token[size]),
      list(new Token[size]);
  for (std::size_t i = 0; i < size; ++i)
    right[i] = static_cast<Token>(token(rule, begin + i / length, i % length));
  const std::unique_ptr<std::uint64_t[]> indices(new std::uint64_t[n]);
  for (std::size_t i = 0; i < n; ++i) indices[i] = begin + (n - 1 - i);
  for (const auto isa : instruction_sets()) {
    std::fill_n(range.get(), size, marker);
    std::fill_n(list.get(), size, marker);
    fastmem::fill_range(rule, begin, n, range.get(), threads, isa);
    fastmem::fill_indices(rule, indices.get(), n, list.get(), threads, isa);
    bool same = std::equal(&range[0], &range[0] + size, &right[0]);
    for (std::size_t i = 0; i < n; ++i)
      same &= std::equal(&list[i * length], &list[i * length] + length,
                         &right[(n - 1 - i) * length]);
    expect(same, n, " sequences from ", begin, ", seed ", rule.seed, ", S ", length, ", V ",
           rule.vocab, rule.cumulative ? ", weights" : "", ", threads ", threads, ", ",
           sizeof(Token), " bytes, instruction set ", static_cast<int>(isa));
  }
}

template <class Token>
void all_sizes(const std::vector<fastmem::TokenRule>& rules) {
  for (fastmem::TokenRule rule : rules) {
    // S around blocks of 4 and 8 tokens; N S around a vector of blocks and a batch of 64; N = 0.
    for (const std::uint64_t length : {1, 3, 4, 5, 7, 8, 9, 16, 63, 64, 65})
      for (const std::size_t n : {0, 1, 2, 7, 8, 9, 63, 65}) {
        rule.seed = 7;
        rule.length = length;
        tokens<Token>(rule, 40, n, 3);
      }
    // Each 64-bit input at its greatest value, and where its low word carries.
    rule.length = 9;
    rule.seed = kLast;
    tokens<Token>(rule, kLast - 4, 5, 1);
    rule.seed = std::uint64_t{1} << 32;
    tokens<Token>(rule, (std::uint64_t{1} << 32) - 2, 5, 1);
    // Sequences of whole vectors: few sequences, on both sides of a carry; the longest; one longer.
    rule.length = 64;
    tokens<Token>(rule, (std::uint64_t{1} << 32) - 12, 26, 1);
    tokens<Token>(rule, kLast - 12, 13, 1);
    for (const std::uint64_t length : {256, 288, 512, 576}) {
      rule.length = length;
      tokens<Token>(rule, 40, 9, 1);
    }
  }
}

// Sums of weights: even, none for most tokens, and nearly all for one.
std::vector<std::vector<std::uint32_t>> weights() {
  std::vector<std::vector<std::uint32_t>> all = {
      {0}, {0, 1}, {0, 0xFFFFFFFF}, {0, 0, 0, 0x80000000, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF}};
  std::vector<std::uint32_t> even(300), steep(1000);
  for (std::uint32_t i = 0; i < even.size(); ++i) even[i] = i * 14316557;
  for (std::uint32_t i = 1; i < steep.size(); ++i) steep[i] = 0xFFFF0000 + 40 * i;
  all.push_back(even);
  all.push_back(steep);
  return all;
}

void order(std::uint64_t last, std::size_t threads, fastmem::Isa isa) {
  const auto n = static_cast<std::size_t>(last + 1);
  const std::unique_ptr<std::uint64_t[]> whole(new std::uint64_t[n]);
  std::fill_n(whole.get(), n, kLast);
  const fastmem::OrderRule rule = {3, 5, last};
  fastmem::permutation(rule, 0, n, whole.get(), threads, isa);
  for (std::size_t begin = 0; begin < n; begin += n / 3 + 1) {
    const std::size_t size = std::min(n - begin, n / 3 + 1);
    const std::unique_ptr<std::uint64_t[]> part(new std::uint64_t[size]);
    fastmem::permutation(rule, begin, size, part.get(), 1, isa);
    expect(std::equal(&part[0], &part[0] + size, &whole[begin]), "part of an order of ", n);
  }
  const std::unique_ptr<std::uint64_t[]> places(new std::uint64_t[n]), again(new std::uint64_t[n]);
  fastmem::permutation_at(rule, whole.get(), n, true, places.get(), threads, isa);
  fastmem::permutation_at(rule, places.get(), n, false, again.get(), threads, isa);
  expect(std::equal(&again[0], &again[0] + n, &whole[0]), "an order of ", n, " at its places");
  for (std::size_t i = 0; i < n; ++i)
    if (places[i] != i) return expect(false, "an order of ", n, " backwards, at ", i);
  std::sort(&whole[0], &whole[0] + n);
  for (std::size_t i = 0; i < n; ++i)
    if (whole[i] != i) return expect(false, "an order of ", n, " lacks ", i);
}

void long_orders(fastmem::Isa isa) {
  for (const std::uint64_t last : {std::uint64_t{999'999'999'999}, kLast}) {
    const std::size_t n = 10'000;
    const std::unique_ptr<std::uint64_t[]> end(new std::uint64_t[n]);
    const fastmem::OrderRule rule = {kLast, kLast, last};
    fastmem::permutation(rule, last - (n - 1), n, end.get(), 2, isa);
    const std::unique_ptr<std::uint64_t[]> places(new std::uint64_t[n]);
    fastmem::permutation_at(rule, end.get(), n, true, places.get(), 2, isa);
    for (std::size_t i = 0; i < n; ++i)
      expect(places[i] == last - (n - 1) + i, "an order to ", last, " backwards, at ", i);
    std::sort(&end[0], &end[0] + n);
    expect(std::adjacent_find(&end[0], &end[0] + n) == &end[0] + n, "twice in an order to ", last);
    expect(end[n - 1] <= last, "beyond an order to ", last);
  }
}

}  // namespace

int main(int argc, char** argv) {
  known_answers(argc > 1 ? argv[1] : "tests/csrc/philox_known_answers.txt");

  const auto uniform = [](const std::vector<std::uint32_t>& vocabs) {
    std::vector<fastmem::TokenRule> rules;
    for (const std::uint32_t vocab : vocabs) rules.push_back({0, 1, vocab, nullptr});
    return rules;
  };
  const auto small = uniform({1, 2, 3, 128, 50257, 65535, 65536});
  const auto large = uniform({65537, 131072, 0x60000000, 0x7FFFFFFF, 0x80000000});
  const auto sums = weights();
  std::vector<fastmem::TokenRule> weighted;
  for (const auto& cumulative : sums)
    weighted.push_back({0, 1, static_cast<std::uint32_t>(cumulative.size()), cumulative.data()});
  for (const auto& rules : {small, weighted}) {
    all_sizes<std::uint16_t>(rules);
    all_sizes<std::uint32_t>(rules);
    all_sizes<std::int32_t>(rules);
    all_sizes<std::int64_t>(rules);
  }
  all_sizes<std::uint32_t>(large);
  all_sizes<std::int32_t>(large);
  all_sizes<std::int64_t>(large);

  // Enough work for all threads, and parts of unequal size, cut between sequences and within them.
  for (const std::size_t threads : {1, 2, 7}) {
    tokens<std::uint16_t>({1, 65, 2048, nullptr}, 0, 15'001, threads);
    // 15 in a million tokens are drawn again.
    tokens<std::uint16_t>({1, 64, 65175, nullptr}, 0, 15'001, threads);
    tokens<std::int64_t>({1, 300'001, 50257, nullptr}, 0, 3, threads);
    tokens<std::uint16_t>({1, 999'999, 7, sums[3].data()}, 0, 1, threads);
    for (const auto isa : instruction_sets()) order(99'999, threads, isa);
  }
  for (const auto isa : instruction_sets()) {
    for (std::uint64_t last = 0; last < 600; ++last) order(last, 2, isa);
    long_orders(isa);
  }

  std::cout << (failures == 0 ? "ok\n" : "FAILED\n");
  return failures == 0 ? 0 : 1;
}
