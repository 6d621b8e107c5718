// Checks csrc/likelihood/ without Python; .ci/run builds and runs it under sanitizers. Prints
// failures and returns 1. Buffers are on the heap and of the exact size, so that a sanitizer sees
// an access beyond the end; results start as NaN, so that a skipped entry shows.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "expect.h"
#include "likelihood/likelihood.h"

namespace {

using fastmem::Isa;
using fastmem::Likelihood;

constexpr double kLog2E = 1.4426950408889634;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr std::int64_t kIgnore = -100;

struct Case {
  std::size_t n, d, v;
  bool bias;
  float softcap, temperature;
  bool bfloat16;
  std::string name() const {
    return std::to_string(n) + " x " + std::to_string(d) + " x " + std::to_string(v) +
           (bias ? " bias" : "") + (softcap > 0 ? " softcap" : "") + (bfloat16 ? " bfloat16" : "");
  }
};

struct Data {
  std::vector<float> hidden, weight, bias, upstream;
  std::vector<std::uint16_t> hidden16, weight16;
  std::vector<std::int64_t> targets;
  Likelihood problem;

  explicit Data(const Case& c, unsigned seed = 1)
      : hidden(c.n * c.d), weight(c.v * c.d), bias(c.bias ? c.v : 0), upstream(c.n), targets(c.n) {
    std::mt19937 draw(seed);
    std::normal_distribution<float> normal;
    for (float& x : hidden) x = normal(draw);
    for (float& x : weight) x = 3 * normal(draw) / std::sqrt(static_cast<float>(c.d));
    for (float& x : bias) x = normal(draw);
    for (float& x : upstream) x = normal(draw);
    for (auto& t : targets) t = static_cast<std::int64_t>(draw() % c.v);
    if (c.bfloat16) {
      hidden16 = upper(hidden);
      weight16 = upper(weight);
    }
    problem = {1, c.n, c.d, c.v, nullptr, nullptr, c.bfloat16, nullptr, nullptr, c.softcap,
               c.temperature, kIgnore};
    point();
  }

  // Call it after the vectors have changed or moved.
  void point() {
    const bool half = problem.bfloat16;
    problem.hidden = half ? static_cast<const void*>(hidden16.data()) : hidden.data();
    problem.weight = half ? static_cast<const void*>(weight16.data()) : weight.data();
    problem.targets = targets.data();
    problem.bias = bias.empty() ? nullptr : bias.data();
  }

  // Cuts floats to bfloat16, and `floats` to the same values.
  static std::vector<std::uint16_t> upper(std::vector<float>& floats) {
    std::vector<std::uint16_t> out(floats.size());
    for (std::size_t i = 0; i < floats.size(); ++i) {
      std::uint32_t bits;
      std::memcpy(&bits, &floats[i], sizeof bits);
      out[i] = static_cast<std::uint16_t>(bits >> 16);
      bits = std::uint32_t{out[i]} << 16;
      std::memcpy(&floats[i], &bits, sizeof bits);
    }
    return out;
  }
};

struct Answer {
  std::vector<double> bits, dhidden, dweight, dbias;
};

// The formula of likelihood.h in double, a row at a time. Rows with a target outside [0, V) add
// nothing.
Answer naive(const Data& data, bool ones = false) {
  const auto [n, d, v] = std::tuple(data.problem.rows, data.problem.width, data.problem.vocab);
  Answer a{std::vector<double>(n), std::vector<double>(n * d), std::vector<double>(v * d),
           std::vector<double>(v)};
  std::vector<double> z(v), slope(v);
  for (std::size_t row = 0; row < n; ++row) {
    const std::int64_t target = data.targets[row];
    if (target == data.problem.ignore_index) continue;
    if (target < 0 || target >= static_cast<std::int64_t>(v)) {
      a.bits[row] = kNaN;
      std::fill_n(a.dhidden.begin() + static_cast<std::ptrdiff_t>(row * d), d, kNaN);
      continue;
    }
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (std::size_t k = 0; k < v; ++k) {
      double x = data.bias.empty() ? 0 : data.bias[k];
      for (std::size_t i = 0; i < d; ++i)
        x += double{data.hidden[row * d + i]} * data.weight[k * d + i];
      slope[k] = 1;
      if (data.problem.softcap > 0) {
        const double t = std::tanh(x / data.problem.softcap);
        x = data.problem.softcap * t;
        slope[k] = 1 - t * t;
      }
      z[k] = x / data.problem.temperature;
      top = std::max(top, z[k]);
    }
    for (const double x : z) sum += std::exp(x - top);
    a.bits[row] = (top + std::log(sum) - z[static_cast<std::size_t>(target)]) * kLog2E;
    const double up = (ones ? 1 : data.upstream[row]) * kLog2E / data.problem.temperature;
    for (std::size_t k = 0; k < v; ++k) {
      const double p = std::exp(z[k] - top) / sum;
      const double g = up * slope[k] * (p - (k == static_cast<std::size_t>(target) ? 1 : 0));
      a.dbias[k] += g;
      for (std::size_t i = 0; i < d; ++i) {
        a.dhidden[row * d + i] += g * data.weight[k * d + i];
        a.dweight[k * d + i] += g * data.hidden[row * d + i];
      }
    }
  }
  return a;
}

struct Result {
  std::vector<float> bits, dhidden, dweight, dbias;
  std::vector<double> lse;

  explicit Result(const Likelihood& p)
      : bits(p.models * p.rows, kNaN), dhidden(p.models * p.rows * p.width, kNaN),
        dweight(p.models * p.vocab * p.width, kNaN), dbias(p.models * p.vocab, kNaN),
        lse(p.models * p.rows, kNaN) {}
};

Result two_passes(const Data& data, Isa isa, std::size_t threads) {
  Result r(data.problem);
  fastmem::token_bits(data.problem, threads, isa, r.bits.data(), r.lse.data());
  fastmem::token_bits_backward(data.problem, data.upstream.data(), r.lse.data(), threads, isa,
                               r.dhidden.data(), r.dweight.data(), r.dbias.data());
  return r;
}

Result one_pass(const Data& data, Isa isa, std::size_t threads) {
  Result r(data.problem);
  fastmem::token_bits_and_gradients(data.problem, threads, isa, r.bits.data(), r.lse.data(),
                                    r.dhidden.data(), r.dweight.data(), r.dbias.data());
  return r;
}

// Expects NaN in the right places alone, and an error within `tolerance` elsewhere.
void expect_near(const std::vector<float>& ours, const std::vector<double>& right, double tolerance,
                 const std::string& what) {
  double worst = 0;
  for (std::size_t i = 0; i < right.size(); ++i) {
    if (std::isnan(right[i]) != std::isnan(ours[i])) worst = kNaN;
    if (std::isnan(right[i])) continue;
    worst = std::max(worst, std::abs(ours[i] - right[i]));
    if (std::isnan(worst)) break;
  }
  expect(worst <= tolerance, what, ": error ", worst);
}

void expect_right(const Result& r, const Answer& right, const std::string& what) {
  double most_bits = 0;
  for (const double b : right.bits) most_bits = std::max(most_bits, std::isnan(b) ? 0 : b);
  expect_near(r.bits, right.bits, 2e-5 + 1.2e-7 * most_bits, what + ", bits");
  for (const float b : r.bits) expect(!(b < 0), what, ": negative bits");
  const auto scale = [](const std::vector<double>& x) {
    double most = 1e-6;
    for (const double v : x)
      if (!std::isnan(v)) most = std::max(most, std::abs(v));
    return 1e-5 * most;
  };
  expect_near(r.dhidden, right.dhidden, scale(right.dhidden), what + ", dhidden");
  expect_near(r.dweight, right.dweight, scale(right.dweight), what + ", dweight");
  expect_near(r.dbias, right.dbias, scale(right.dbias), what + ", dbias");
}

bool same(const Result& a, const Result& b) {
  const auto equal = [](const auto& x, const auto& y) {
    return x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof x[0]) == 0;
  };
  return equal(a.bits, b.bits) && equal(a.lse, b.lse) && equal(a.dhidden, b.dhidden) &&
         equal(a.dweight, b.dweight) && equal(a.dbias, b.dbias);
}

// Models side by side have the results of each model alone.
void check_models(Isa isa, const std::string& on) {
  const std::size_t n = 70, d = 6, v = 40;
  std::vector<Data> each;
  for (unsigned e = 0; e < 3; ++e) each.emplace_back(Case{n, d, v, true, 0, 1, false}, e + 1);
  Data all = each[0];
  for (std::size_t e = 1; e < 3; ++e) {
    const auto append = [](auto& to, const auto& from) {
      to.insert(to.end(), from.begin(), from.end());
    };
    append(all.hidden, each[e].hidden);
    append(all.weight, each[e].weight);
    append(all.bias, each[e].bias);
    append(all.targets, each[e].targets);
    append(all.upstream, each[e].upstream);
  }
  all.problem.models = 3;
  all.point();
  for (Data& data : each) data.point();
  for (const std::size_t threads : {1, 2, 5})
    for (const bool ones : {false, true}) {
      const Result together = ones ? one_pass(all, isa, threads) : two_passes(all, isa, threads);
      for (std::size_t e = 0; e < 3; ++e) {
        Result alone(each[e].problem);
        const auto part = [&](auto& to, const auto& from) {
          const auto begin = from.begin() + static_cast<std::ptrdiff_t>(e * to.size());
          std::copy(begin, begin + static_cast<std::ptrdiff_t>(to.size()), to.begin());
        };
        part(alone.bits, together.bits);
        part(alone.dhidden, together.dhidden);
        part(alone.dweight, together.dweight);
        part(alone.dbias, together.dbias);
        expect_right(alone, naive(each[e], ones), "model " + std::to_string(e) + on);
      }
    }
}

// Statistics of rows whose logits rise beyond the limit that rescales a sum, against double.
void check_statistics(Isa isa, const std::string& on) {
  const std::size_t n = 53, d = 9, v = 300;
  for (const float rise : {0.F, 2.F, -2.F}) {
    Data data({n, d, v, true, 0, 1, false});
    for (std::size_t k = 0; k < v; ++k) data.bias[k] += rise * static_cast<float>(k);
    data.targets[4] = kIgnore;
    for (const std::size_t threads : {1, 3}) {
      std::vector<float> bits(n, kNaN), entropy(n, kNaN), variance(n, kNaN), lse(n, kNaN);
      std::vector<double> shifted(n, kNaN);
      std::vector<char> greedy(n, 2);
      static_assert(sizeof(bool) == 1);
      fastmem::token_bits(data.problem, threads, isa, bits.data(), shifted.data(),
                          {entropy.data(), variance.data(), lse.data(),
                           reinterpret_cast<bool*>(greedy.data())});
      for (std::size_t row = 0; row < n; ++row) {
        std::vector<double> z(v);
        double top = -1e300, sum = 0, h = 0, m = 0;
        for (std::size_t k = 0; k < v; ++k) {
          z[k] = data.bias[k];
          for (std::size_t i = 0; i < d; ++i)
            z[k] += double{data.hidden[row * d + i]} * data.weight[k * d + i];
          z[k] *= kLog2E;
          top = std::max(top, z[k]);
        }
        for (const double x : z) sum += std::exp2(x - top);
        const double all = top + std::log2(sum);
        for (const double x : z) h -= std::exp2(x - all) * (x - all);
        for (const double x : z) m += std::exp2(x - all) * (x - all + h) * (x - all + h);
        const auto best = std::max_element(z.begin(), z.end()) - z.begin();
        const std::string what = "statistics of row " + std::to_string(row) + on;
        expect(std::abs(entropy[row] - h) <= 1e-4, what, ": entropy ", entropy[row], " for ", h);
        expect(std::abs(variance[row] - m) <= 1e-4 * (1 + m), what, ": variance ", variance[row],
               " for ", m);
        expect(std::abs(lse[row] - all) <= 1e-4 + 2e-7 * all, what, ": lse ", lse[row], " for ",
               all);
        expect(greedy[row] == (row != 4 && best == data.targets[row]), what, ": greedy");
      }
    }
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 1, 1, false, 0, 1, false},       // the least
      {0, 3, 5, true, 0, 1, false},        // no rows
      {48, 128, 8, false, 0, 1, false},    // one tile of AVX-512, one depth
      {49, 129, 9, true, 0, 1, true},      // one more on each axis
      {47, 127, 7, true, 5, 0.7F, false},  // one less on each axis: tiles of 4, 2 and 1 tokens
      {24, 16, 4, false, 0, 2, true},      // one tile of AVX2; one vector of AVX-512 and a half
      {13, 17, 5, true, 20, 1, false},     // one more than a tile of the portable loops
      {113, 48, 130, true, 0, 1, false},   // three panels; kNear (128) tokens and two more
      {29, 300, 500, false, 3, 1, false},  // several blocks of the vocabulary, and of D
      {3, 1024, 90, true, 0, 1, false},    // rows of weight 4 KiB apart, which are copied
      {300, 30, 600, true, 0, 1, false},   // threads share the vocabulary
      {600, 30, 300, true, 4, 1, false},   // threads share the rows
  };
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (!fastmem::has_isa(isa)) continue;
    const std::string on = " on instruction set " + std::to_string(static_cast<int>(isa));
    for (const Case& c : cases) {
      const Data data(c);
      const Answer right = naive(data), right_ones = naive(data, true);
      for (const std::size_t threads : {1, 2, 5}) {
        const std::string what = c.name() + on + ", " + std::to_string(threads) + " thread(s)";
        const Result two = two_passes(data, isa, threads), one = one_pass(data, isa, threads);
        expect_right(two, right, what + ", two passes");
        expect_right(one, right_ones, what + ", one pass");
        expect(same(two, two_passes(data, isa, threads)), what, ": not the same bytes twice");
        expect(same(one, one_pass(data, isa, threads)), what, ": not the same bytes twice");
      }
    }

    // A vocabulary too long for a thread's caches: threads divide its tokens, two panels at a time.
    // The width makes work for three threads.
    const Data lengthy({60, 40, 4100, true, 0, 1, false});
    for (const std::size_t threads : {1, 3})
      expect_right(one_pass(lengthy, isa, threads), naive(lengthy, true), "long" + on);

    check_models(isa, on);
    check_statistics(isa, on);

    // Rows without bits leave all other rows unchanged.
    Data data({40, 20, 70, true, 0, 1, false});
    data.targets[3] = kIgnore;
    data.targets[9] = 70;
    data.targets[17] = -1;
    data.targets[21] = std::numeric_limits<std::int64_t>::min();
    data.targets[22] = std::numeric_limits<std::int64_t>::max();
    data.targets[23] = (std::int64_t{1} << 32) + 5;
    expect_right(two_passes(data, isa, 1), naive(data), "targets" + on);
    expect_right(one_pass(data, isa, 1), naive(data, true), "targets in one pass" + on);
    Data off = data;
    off.problem.softcap = data.problem.softcap = 3;  // a softcap makes an infinite logit finite
    const float infinity = std::numeric_limits<float>::infinity();
    for (const auto& [row, value] : {std::pair{5, kNaN}, {6, infinity}, {3, kNaN}}) {
      data.hidden[static_cast<std::size_t>(row) * 20 + 7] = value;
      // A row with a bad hidden state should equal a row with a bad target.
      if (row != 3) off.targets[static_cast<std::size_t>(row)] = 99;
    }
    data.point();
    expect_right(two_passes(data, isa, 1), naive(off), "hidden" + on);
    expect_right(one_pass(data, isa, 1), naive(off, true), "hidden in one pass" + on);

    // A token that exists can be ignored.
    Data ignoring({40, 20, 5, true, 0, 1, false});
    ignoring.problem.ignore_index = 3;
    expect_right(two_passes(ignoring, isa, 1), naive(ignoring), "ignoring" + on);
    expect_right(one_pass(ignoring, isa, 1), naive(ignoring, true), "ignoring in one pass" + on);

    // 0 and 1: logits that rise or fall by more than the limit that rescales a sum. 2: an offset of
    // 1e4 in a column and in the bias. 3: forbidden tokens. 4: exact logits so large that their
    // log-sum-exp is not exact, and one token without the offset, which prevents centring.
    for (const int kind : {0, 1, 2, 3, 4}) {
      Data hard({20, 3, 300, true, 0, 1, false});
      for (std::size_t k = 0; k < 300; ++k) {
        const auto step = static_cast<float>(kind == 0 ? k : 300 - k);
        if (kind < 2) hard.bias[k] = 1.5F * step;
        if (kind == 2) hard.bias[k] += 1e4F, hard.weight[3 * k] = 1e4F + step / 256;
        if (kind == 4) {
          hard.bias[k] = 0;
          hard.weight[3 * k] = k == 0 ? 0 : 1;
          hard.weight[3 * k + 1] = static_cast<float>(k % 128) / 64;
          hard.weight[3 * k + 2] = 0;
        }
        if (kind == 3 && k % 3 != 0) hard.bias[k] = -std::numeric_limits<float>::infinity();
      }
      for (auto& t : hard.targets) t -= kind == 3 ? t % 3 : 0;
      for (std::size_t row = 0; row < 20; ++row) {
        if (kind == 2) hard.hidden[3 * row] = 1;
        if (kind == 4) hard.hidden[3 * row] = 1024, hard.hidden[3 * row + 1] = 1;
      }
      const std::string what = "hard " + std::to_string(kind) + on;
      expect_right(two_passes(hard, isa, 1), naive(hard), what);
      expect_right(one_pass(hard, isa, 1), naive(hard, true), what + " in one pass");
    }

    // Each gradient alone equals the gradient made together with all others.
    const Data alone({31, 20, 50, true, 0, 1, false});
    const Result all = two_passes(alone, isa, 1);
    for (const int which : {0, 1, 2}) {
      Result r(alone.problem);
      fastmem::token_bits_backward(alone.problem, alone.upstream.data(), all.lse.data(), 1, isa,
                                   which == 0 ? r.dhidden.data() : nullptr,
                                   which == 1 ? r.dweight.data() : nullptr,
                                   which == 2 ? r.dbias.data() : nullptr);
      expect((r.dhidden == all.dhidden) == (which == 0) &&
                 (r.dweight == all.dweight) == (which == 1) &&
                 (r.dbias == all.dbias) == (which == 2),
             "gradient ", which, " alone", on);
    }
  }
  if (failures == 0) std::cout << "ok\n";
  return failures != 0;
}
