// Subtracts a constant from the logits of each row, which changes no probability.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "likelihood/likelihood.h"
#include "likelihood/part.h"

namespace fastmem {

// A constant that all logits of a row share costs precision: near 10^4 a float keeps 10^-3.
// Centring subtracts it from the inputs where the difference is exact or nearly so: the largest
// bias from each bias, if this hardly rounds any; and from a column of weight, if its entries have
// one sign and lie within a factor of 2 of each other, the smallest in magnitude (exact: Sterbenz).
// Under a softcap nothing is subtracted: it is not invariant to constants.
class Centred {
 public:
  explicit Centred(const Likelihood& problem) {  // of one model
    if (problem.bias) {
      const float* const end = problem.bias + problem.vocab;
      float top = -kInfinity;
      for (const float* b = problem.bias; problem.softcap == 0 && b < end; ++b)
        if (*b > top && *b < kInfinity) top = *b;
      for (const float* b = problem.bias; b < end; ++b)
        if (std::abs(*b) < kInfinity && !is_near(*b, top)) top = 0;
      if (top == -kInfinity) top = 0;
      top_ = top;
      bias_.reserve(problem.vocab);
      for (const float* b = problem.bias; b < end; ++b) bias_.push_back(*b - top);
    }
    if (problem.softcap == 0) {
      if (problem.bfloat16)
        find_centre(static_cast<const std::uint16_t*>(problem.weight), problem);
      else
        find_centre(static_cast<const float*>(problem.weight), problem);
    }
  }

  const float* bias() const { return bias_.empty() ? nullptr : bias_.data(); }
  const float* centre() const { return centre_.empty() ? nullptr : centre_.data(); }
  // The constant subtracted from the logits of a row, base e, before the temperature.
  double offset(const Likelihood& problem, std::size_t row) const {
    return problem.bfloat16 ? offset_of(static_cast<const std::uint16_t*>(problem.hidden), row)
                            : offset_of(static_cast<const float*>(problem.hidden), row);
  }

 private:
  // True if a - b rounds no more than a logit of 4.
  static bool is_near(float a, float b) {
    return std::abs((double{a} - b) - double{a - b}) <= 0x1p-22;
  }

  template <class T>
  void find_centre(const T* weight, const Likelihood& problem) {
    const std::size_t width = problem.width;
    // Columns still within a factor of 2, with their smallest and largest entry.
    struct Column {
      std::size_t d;
      float low, high;
    };
    std::vector<Column> columns;
    for (std::size_t d = 0; d < width; ++d) {
      const float x = to_float(weight[d]);
      if (x != 0 && std::abs(x) < kInfinity) columns.push_back({d, x, x});
    }
    for (std::size_t v = 1; v < problem.vocab && !columns.empty(); ++v) {
      std::size_t kept = 0;
      for (Column column : columns) {
        const float x = to_float(weight[v * width + column.d]);
        column.low = std::min(column.low, x);
        column.high = std::max(column.high, x);
        const bool near = column.low > 0   ? column.high <= 2 * column.low
                          : column.high < 0 ? column.low >= 2 * column.high
                                            : false;
        if (near && x == x) columns[kept++] = column;
      }
      columns.resize(kept);
    }
    if (columns.empty()) return;
    centre_.assign(width, 0);
    for (const Column& column : columns)
      centre_[column.d] = column.low > 0 ? column.low : column.high;
  }

  template <class T>
  double offset_of(const T* hidden, std::size_t row) const {
    const std::size_t width = centre_.size();
    double sum = top_;
    for (std::size_t d = 0; d < width; ++d)
      if (centre_[d] != 0)
        sum += static_cast<double>(to_float(hidden[row * width + d])) * centre_[d];
    return sum;
  }

  double top_ = 0;
  std::vector<float> bias_, centre_;
};

}  // namespace fastmem
