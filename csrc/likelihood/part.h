// What likelihood.cpp, which shares the work out, and the loops of each instruction set agree on.
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

// Where a running maximum begins: below every logit that is not -inf, and finite, so that
// 2^(-inf - kLowest) is 0 and not NaN.
constexpr float kLowest = -1e30F;

// Uninitialized floats on a cache line.
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

struct Span {
  std::size_t begin, end;
  std::size_t size() const { return end - begin; }
};

// One model of likelihood.h's Likelihood, ready to be multiplied.
struct Part {
  std::size_t width, vocab;
  const void* hidden;
  const void* weight;
  const float* centre;  // (D,) taken off each row of weight, or null
  const float* bias;    // (V,) or null
  const std::int64_t* targets;
  std::int64_t ignore_index;
  float softcap;
  float scale;  // log2(e) / temperature

  // -1 if there is none.
  std::int32_t target(std::size_t row) const {
    const std::int64_t t = targets[row];
    const bool inside = t != ignore_index && t >= 0 && t < static_cast<std::int64_t>(vocab);
    return inside ? static_cast<std::int32_t>(t) : -1;
  }
};

// What a walk over a span of tokens finds of a row, x = z - shift.
struct RowSums {
  float* shift;
  float* sum;     // of 2^x
  float* target;  // its logit, base e, if it is in the span
  float* first;   // sum of x 2^x: this and the next if moments are asked for
  float* second;  // sum of x^2 2^x
  float* best;    // the greatest z, and the first token that has it: if asked for
  std::int32_t* best_token;
};

// Which of RowSums a walk finds beside the first three.
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
  float* hidden;  // (N, D), of the rows walked alone
  float* weight;  // (V, D)
  float* bias;    // (V,)
};

// Some panels of rows over a span of tokens, before totals over all tokens are known: by row, but for
// the first two, panel by panel in the layouts of the loops.
struct Ahead {
  float* powers;   // 2^(z - shift) for each token and row, 0 where the token is the row's target
  float* dhidden;  // powers times weight, (D, a panel)
  float *shift, *sum;
  float* target;     // its logit, base e, if it is in the span, else NaN
  float* at_target;  // 2^(z - shift) of the target if it is in the span
  float* slope;      // of the softcap there
};

// For inputs of one type.
struct LoopsOf {
  // `room` is how many floats of rows to pack at a time, and one panel at least.
  void (*forward[kExtras])(const Part&, Span rows, Span tokens, std::size_t room,
                           const RowSums& out);
  void (*backward)(const Part&, Span rows, Span tokens, std::size_t room, const RowGradients& in,
                   const Gradients& out);
  // The gradients of the sum of bits, in two steps, the second of which adds to those of weight and
  // bias or, with `write`, writes them; write_dhidden is of one panel.
  void (*ahead_walk)(const Part&, std::size_t row, std::size_t rows, Span tokens, bool dhidden,
                     Ahead& out);
  void (*ahead_tokens)(const Part&, std::size_t row, std::size_t rows, Span tokens,
                       const float* factor, const Ahead& in, bool write, const Gradients& out);
  void (*write_dhidden)(const Part&, std::size_t row, std::size_t rows, const float* sum,
                        const float* factor, const float* at_target, float* out /* (rows, D) */);
};

// Of inputs in float, and in bfloat16.
struct Loops {
  LoopsOf of[2];
  std::size_t panel, lanes, tokens;  // rows of a panel and of a vector; tokens of a tile
};

extern const Loops kPortableLoops, kAvx2Loops, kAvx512Loops;

}  // namespace fastmem
