// Checks csrc/gpt/ without Python; .ci/run builds and runs it under sanitizers. Prints failures and
// returns 1. Buffers are on the heap and of the exact size, so that a sanitizer sees an access
// beyond the end; results start as NaN, so that a skipped entry shows.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "expect.h"
#include "gpt/gpt.h"

namespace {

using fastmem::Gpt;
using fastmem::Isa;
using Doubles = std::vector<double>;

constexpr double kPi = 3.14159265358979323846, kLog2E = 1.4426950408889634;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Data {
  std::vector<float> parameters;
  std::vector<std::int64_t> tokens;
  Gpt problem;

  explicit Data(const Gpt& shape)
      : parameters(shape.models * shape.parameter_count()),
        tokens(shape.models * shape.batch * (shape.time + 1)),
        problem(shape) {
    std::mt19937 draw(1);
    std::normal_distribution<float> normal;
    for (float& x : parameters) x = 0.3F * normal(draw);
    for (auto& t : tokens) t = static_cast<std::int64_t>(draw() % shape.vocab);
    problem.parameters = parameters.data();
    problem.tokens = tokens.data();
  }
  Data(const Data&) = delete;

  std::string name() const {
    std::string all;
    for (const std::size_t n : {problem.models, problem.batch, problem.time, problem.layers,
                                problem.width, problem.heads, problem.vocab, problem.length})
      all += std::to_string(n) + " ";
    return all;
  }
};

// Reads the parameters of a model one after another.
struct Reader {
  const double* at;
  const double* take(std::size_t n) {
    const double* const here = at;
    at += n;
    return here;
  }
};

Doubles layer_norm(const Doubles& x, std::size_t width, Reader& read) {
  const double *const weight = read.take(width), *const bias = read.take(width);
  Doubles out(x.size());
  for (std::size_t row = 0; row < x.size(); row += width) {
    double mean = 0, square = 0;
    for (std::size_t d = 0; d < width; ++d) mean += x[row + d] / static_cast<double>(width);
    for (std::size_t d = 0; d < width; ++d)
      square += (x[row + d] - mean) * (x[row + d] - mean) / static_cast<double>(width);
    for (std::size_t d = 0; d < width; ++d)
      out[row + d] = (x[row + d] - mean) / std::sqrt(square + 1e-5) * weight[d] + bias[d];
  }
  return out;
}

Doubles linear(const Doubles& x, std::size_t in, std::size_t out, Reader& read) {
  const double *const weight = read.take(in * out), *const bias = read.take(out);
  Doubles y(x.size() / in * out);
  for (std::size_t row = 0; row < x.size() / in; ++row)
    for (std::size_t i = 0; i < out; ++i) {
      double sum = bias[i];
      for (std::size_t k = 0; k < in; ++k) sum += weight[i * in + k] * x[row * in + k];
      y[row * out + i] = sum;
    }
  return y;
}

// Attention of one sequence: (T, 3 D) to (T, D).
Doubles attention(const Doubles& qkv, std::size_t time, std::size_t width, std::size_t heads) {
  const std::size_t depth = width / heads;
  Doubles out(time * width);
  for (std::size_t head = 0; head < heads; ++head)
    for (std::size_t query = 0; query < time; ++query) {
      Doubles e(query + 1);
      double sum = 0;
      for (std::size_t key = 0; key <= query; ++key) {
        double score = 0;
        for (std::size_t d = head * depth; d < (head + 1) * depth; ++d)
          score += qkv[query * 3 * width + d] * qkv[key * 3 * width + width + d];
        e[key] = std::exp(score / std::sqrt(static_cast<double>(depth)));
        sum += e[key];
      }
      for (std::size_t key = 0; key <= query; ++key)
        for (std::size_t d = head * depth; d < (head + 1) * depth; ++d)
          out[query * width + d] += e[key] / sum * qkv[key * 3 * width + 2 * width + d];
    }
  return out;
}

void add(Doubles& to, const Doubles& x) {
  for (std::size_t i = 0; i < to.size(); ++i) to[i] += x[i];
}

// Appends the bits of one sequence to `bits`.
void naive_sequence(const Gpt& p, const Doubles& parameters, const std::int64_t* tokens,
                    Doubles& bits) {
  Reader read{parameters.data()};
  const double* const embedding = read.take(p.vocab * p.width);
  const double* const positions = read.take(p.length * p.width);
  Doubles x(p.time * p.width);
  for (std::size_t t = 0; t < p.time; ++t)
    for (std::size_t d = 0; d < p.width; ++d)
      x[t * p.width + d] = embedding[static_cast<std::size_t>(tokens[t]) * p.width + d] +
                           positions[t * p.width + d];
  for (std::size_t l = 0; l < p.layers; ++l) {
    const Doubles qkv = linear(layer_norm(x, p.width, read), p.width, 3 * p.width, read);
    add(x, linear(attention(qkv, p.time, p.width, p.heads), p.width, p.width, read));
    Doubles wide = linear(layer_norm(x, p.width, read), p.width, 4 * p.width, read);
    for (double& u : wide)
      u *= 0.5 * (1 + std::tanh(std::sqrt(2 / kPi) * (u + 0.044715 * u * u * u)));
    add(x, linear(wide, 4 * p.width, p.width, read));
  }
  x = layer_norm(x, p.width, read);
  for (std::size_t t = 0; t < p.time; ++t) {
    double sum = 0, own = 0;
    for (std::size_t v = 0; v < p.vocab; ++v) {
      double z = 0;
      for (std::size_t d = 0; d < p.width; ++d)
        z += x[t * p.width + d] * embedding[v * p.width + d];
      sum += std::exp(z);
      if (v == static_cast<std::size_t>(tokens[t + 1])) own = z;
    }
    bits.push_back((std::log(sum) - own) * kLog2E);
  }
}

// Bits of one model, (B, T).
Doubles naive(const Gpt& p, const Doubles& parameters, std::size_t model) {
  Doubles bits;
  for (std::size_t s = model * p.batch; s < (model + 1) * p.batch; ++s)
    naive_sequence(p, parameters, p.tokens + s * (p.time + 1), bits);
  return bits;
}

double mean(const Doubles& x) {
  double sum = 0;
  for (const double v : x) sum += v;
  return sum / static_cast<double>(x.size());
}

// Some entries of a model's gradient, by central differences: the first and last of each tensor.
struct Slopes {
  std::vector<std::size_t> places;
  Doubles values;

  Slopes(const Gpt& p, const Doubles& parameters, std::size_t model) {
    std::size_t at = 0;
    const auto tensor = [&](std::size_t size) {
      places.push_back(at);
      if (size > 1) places.push_back(at + size - 1);
      at += size;
    };
    const std::size_t D = p.width;
    tensor(p.vocab * D);
    tensor(p.time * D);
    if (p.length > p.time) tensor((p.length - p.time) * D);  // unused positions
    for (std::size_t l = 0; l < p.layers; ++l)
      for (const std::size_t size : {D, D, 3 * D * D, 3 * D, D * D, D, D, D, 4 * D * D, 4 * D,
                                     4 * D * D, D})
        tensor(size);
    tensor(D);
    tensor(D);
    Doubles moved = parameters;
    for (const std::size_t place : places) {
      const double step = 1e-4;
      moved[place] = parameters[place] + step;
      const double above = mean(naive(p, moved, model));
      moved[place] = parameters[place] - step;
      values.push_back((above - mean(naive(p, moved, model))) / (2 * step));
      moved[place] = parameters[place];
    }
  }
};

struct Result {
  std::vector<float> bits, gradients;
  std::vector<double> losses;

  Result(const Gpt& p, Isa isa, std::size_t threads)
      : bits(p.models * p.batch * p.time, kNaN),
        gradients(p.models * p.parameter_count(), kNaN),
        losses(p.models, kNaN) {
    fastmem::gpt_bits(p, threads, isa, bits.data());
    fastmem::gpt_gradients(p, threads, isa, losses.data(), gradients.data());
  }
};

bool same(const Result& a, const Result& b) {
  const auto equal = [](const auto& x, const auto& y) {
    return std::memcmp(x.data(), y.data(), x.size() * sizeof x[0]) == 0;
  };
  return equal(a.bits, b.bits) && equal(a.gradients, b.gradients) && equal(a.losses, b.losses);
}

void expect_right(const Gpt& p, const Result& r, std::size_t model, const Doubles& bits,
                  const Slopes& slopes, const std::string& what) {
  const float* const ours = r.bits.data() + model * bits.size();
  for (std::size_t i = 0; i < bits.size(); ++i)
    expect(std::abs(ours[i] - bits[i]) <= 1e-4, what, ": bits ", ours[i], " for ", bits[i]);
  expect(std::abs(r.losses[model] - mean(bits)) <= 1e-5, what, ": loss ", r.losses[model]);
  const float* const gradients = r.gradients.data() + model * p.parameter_count();
  for (std::size_t i = 0; i < slopes.places.size(); ++i) {
    const double g = gradients[slopes.places[i]], right = slopes.values[i];
    expect(std::abs(g - right) <= 2e-5 + 2e-4 * std::abs(right), what, ": gradient ",
           slopes.places[i], " is ", g, " for ", right);
  }
  for (std::size_t i = 0; i < p.parameter_count(); ++i)
    expect(std::isfinite(gradients[i]), what, ": gradient ", i);
}

}  // namespace

int main() {
  // E, B, T, L, D, H, V, S
  const Gpt cases[] = {
      {1, 1, 1, 1, 1, 1, 1, 1, nullptr, nullptr},      // the least
      {2, 3, 3, 2, 7, 7, 5, 4, nullptr, nullptr},      // less than a vector on each axis
      {1, 5, 17, 2, 16, 2, 33, 20, nullptr, nullptr},  // a vector and one token; several sequences
      {2, 3, 33, 1, 18, 3, 20, 33, nullptr, nullptr},  // a panel for each sequence
      {1, 2, 66, 1, 12, 1, 9, 70, nullptr, nullptr},   // more than a panel's 64 tokens
      {1, 140, 8, 1, 8, 4, 9, 9, nullptr, nullptr},    // two chunks; threads share the model
      {5, 23, 7, 1, 10, 2, 9, 9, nullptr, nullptr},    // threads share the models
  };
  for (const Gpt& shape : cases) {
    const Data data(shape);
    const Gpt& p = data.problem;
    std::vector<Doubles> bits;
    std::vector<Slopes> slopes;
    for (std::size_t e = 0; e < p.models; ++e) {
      const float* const own = p.parameters + e * p.parameter_count();
      const Doubles parameters(own, own + p.parameter_count());
      bits.push_back(naive(p, parameters, e));
      slopes.emplace_back(p, parameters, e);
    }
    for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
      if (!fastmem::has_isa(isa)) continue;
      for (const std::size_t threads : {1, 2, 5}) {
        const std::string what = data.name() + "on instruction set " +
                                 std::to_string(static_cast<int>(isa)) + ", " +
                                 std::to_string(threads) + " thread(s)";
        const Result r(p, isa, threads);
        for (std::size_t e = 0; e < p.models; ++e) expect_right(p, r, e, bits[e], slopes[e], what);
        expect(same(r, Result(p, isa, threads)), what, ": not the same bytes twice");
      }
    }
  }
  if (failures == 0) std::cout << "ok\n";
  return failures != 0;
}
