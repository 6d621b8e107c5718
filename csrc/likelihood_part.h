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

// likelihood.h's Likelihood, ready to be multiplied.
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

// By row: sum of 2^(z - shift) over a span of tokens; the target's logit, base e, if it is there.
struct RowSums {
  float* shift;
  float* sum;
  float* target;
};

struct RowGradients {
  const float* upstream;
  const double* lse;

  bool counts(const Part& part, std::size_t row) const {
    return part.target(row) >= 0 && std::isfinite(lse[row]);
  }
};

// Added to; each may be null.
struct Gradients {
  float* hidden;  // (N, D)
  float* weight;  // (V, D)
  float* bias;    // (V,)
};

// Of inputs in float, and in bfloat16.
struct Loops {
  void (*forward[2])(const Part&, Span rows, Span tokens, const RowSums& out);
  void (*backward[2])(const Part&, Span rows, Span tokens, const RowGradients& in,
                      const Gradients& out);
  // All tokens; the gradients are of the sum of bits.
  void (*forward_backward[2])(const Part&, Span rows, const RowSums& sums, const Gradients& out);
  std::size_t rows, columns;  // of a tile: parts that begin at multiples of them waste nothing
};

extern const Loops kPortableLoops, kAvx2Loops, kAvx512Loops;

}  // namespace fastmem
