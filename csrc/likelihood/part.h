// Types shared by likelihood.cpp, which divides the work, and the loops of each instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

namespace fastmem {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The first value of a running maximum: below every logit but -inf, and finite, so that
// 2^(-inf - kLowest) is 0, not NaN.
constexpr float kLowest = -1e30F;

// Uninitialized floats, aligned to a cache line.
class Floats {
 public:
  Floats() = default;
  explicit Floats(std::size_t n)
      : data_(static_cast<float*>(::operator new(n * sizeof(float), kLine))) {}
  Floats(Floats&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Floats& operator=(Floats&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Floats() { ::operator delete(data_, kLine); }

  float* get() const { return data_; }
  float& operator[](std::size_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kLine{64};
  float* data_ = nullptr;
};

inline float to_float(float x) { return x; }
inline float to_float(std::uint16_t upper) {  // of bfloat16, the upper half of a float
  const std::uint32_t bits = std::uint32_t{upper} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Span {
  std::size_t begin, end;
  std::size_t size() const { return end - begin; }
};

// One model of a Likelihood, centred.
struct Part {
  std::size_t width, vocab;
  const void* hidden;
  const void* weight;
  const float* centre;  // (D,) subtracted from each row of weight, or null
  const float* bias;    // (V,) or null
  const std::int64_t* targets;
  std::int64_t ignore_index;
  float softcap;
  float scale;  // log2(e) / temperature

  // -1 if the target is ignored or outside [0, V).
  std::int32_t target(std::size_t row) const {
    const std::int64_t t = targets[row];
    const bool inside = t != ignore_index && t >= 0 && t < static_cast<std::int64_t>(vocab);
    return inside ? static_cast<std::int32_t>(t) : -1;
  }
};

// Results of a walk over a span of tokens, an entry a row, with x = z - shift.
struct RowSums {
  float* shift;
  float* sum;     // of 2^x
  float* target;  // logit of the target, base e, if the span has it
  float* first;   // sum of x 2^x, with kMoments
  float* spread;  // sum of (x - mean)^2 2^x, mean = first / sum, with kMoments
  float* best;    // the greatest z, with kBest
  std::int32_t* best_token;  // the first token with this z
};

// Results of a walk besides shift, sum and target.
enum Extra { kNothing, kMoments, kBest, kMomentsAndBest, kExtras };

struct RowGradients {
  const float* upstream;
  const double* lse;

  bool counts(const Part& part, std::size_t row) const {
    return part.target(row) >= 0 && std::isfinite(lse[row]);
  }
};

// Each may be null.
struct Gradients {
  float* hidden;  // (N, D), of the walked rows alone
  float* weight;  // (V, D)
  float* bias;    // (V,)
};

// Results of some panels over a span of tokens, before totals over all tokens are known. exp_logits
// and dhidden lie panel after panel in the layouts of the loops, all other fields by row.
struct Ahead {
  float* exp_logits;  // 2^(z - shift) of each token and row, 0 at the row's target
  float* dhidden;     // exp_logits times weight, (D, a panel)
  float *shift, *sum;
  float* target;     // logit of the target, base e, if the span has it, else NaN
  float* at_target;  // 2^(z - shift) of the target if the span has it
  float* slope;      // of the softcap at the target
};

// Loops for one type of inputs.
struct LoopsOf {
  // Packs `room` floats of rows at a time, and at least one panel.
  void (*forward[kExtras])(const Part&, Span rows, Span tokens, std::size_t room,
                           const RowSums& out);
  void (*backward)(const Part&, Span rows, Span tokens, std::size_t room, const RowGradients& in,
                   const Gradients& out);
  // Gradients of the sum of bits in two steps. The second adds to the gradients of weight and bias
  // or, with `write`, overwrites them. write_dhidden takes one panel.
  void (*ahead_walk)(const Part&, std::size_t row, std::size_t rows, Span tokens, bool dhidden,
                     Ahead& out);
  void (*ahead_tokens)(const Part&, std::size_t row, std::size_t rows, Span tokens,
                       const float* factor, const Ahead& in, bool write, const Gradients& out);
  void (*write_dhidden)(const Part&, std::size_t row, std::size_t rows, const float* sum,
                        const float* factor, const float* at_target, float* out /* (rows, D) */);
};

// For inputs in float, and in bfloat16.
struct Loops {
  LoopsOf of[2];
  std::size_t panel, lanes, tokens;  // rows of a panel and of a vector; tokens of a tile
};

extern const Loops kPortableLoops, kAvx2Loops, kAvx512Loops;

}  // namespace fastmem
