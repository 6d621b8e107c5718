// Bits and statistics of each row from the sums of the loops.
#pragma once

#include "likelihood/centred.h"
#include "likelihood/part.h"

namespace fastmem {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// One model of a problem.
struct Model {
  Model(const Likelihood& all, std::size_t e) : problem(one(all, e)), centred(problem) {
    part = {problem.width,    problem.vocab,  problem.hidden,  problem.weight,
            centred.centre(), centred.bias(), problem.targets, problem.ignore_index,
            problem.softcap,  static_cast<float>(kLog2E / problem.temperature)};
  }

  static Likelihood one(const Likelihood& all, std::size_t e) {
    Likelihood model = all;
    const std::size_t bytes = all.bfloat16 ? sizeof(std::uint16_t) : sizeof(float);
    model.models = 1;
    model.hidden = static_cast<const char*>(all.hidden) + e * all.rows * all.width * bytes;
    model.weight = static_cast<const char*>(all.weight) + e * all.vocab * all.width * bytes;
    model.targets = all.targets + e * all.rows;
    model.bias = all.bias ? all.bias + e * all.vocab : nullptr;
    return model;
  }

  Likelihood problem;
  Centred centred;
  Part part;
};

inline std::vector<Model> models_of(const Likelihood& problem) {
  std::vector<Model> models;
  models.reserve(problem.models);
  for (std::size_t e = 0; e < problem.models; ++e) models.emplace_back(problem, e);
  return models;
}

// RowSums of one row over all tokens.
struct Found {
  double shift, sum, target, first, spread;
  std::int32_t best_token;
};

// RowSums of all models, once for each slot: pieces of a model that share rows have a slot each.
class Sums {
 public:
  Sums(const Likelihood& problem, std::size_t slots, Extra extra)
      : rows_(problem.rows), layer_(problem.models * problem.rows), slots_(slots) {
    const std::size_t n = slots * layer_;
    const bool moments = extra & kMoments, best = extra & kBest;
    shift_.assign(n, kLowest);
    sum_.assign(n, 0);
    target_.assign(layer_, kNaN);
    first_.assign(moments ? n : 0, 0);
    spread_.assign(moments ? n : 0, 0);
    best_.assign(best ? n : 0, -kInfinity);
    best_token_.assign(best ? n : 0, -1);
  }

  RowSums at(std::size_t slot, std::size_t model) {
    const std::size_t target = model * rows_, i = slot * layer_ + target;
    const bool moments = !first_.empty(), best = !best_.empty();
    return {shift_.data() + i,
            sum_.data() + i,
            target_.data() + target,
            moments ? first_.data() + i : nullptr,
            moments ? spread_.data() + i : nullptr,
            best ? best_.data() + i : nullptr,
            best ? best_token_.data() + i : nullptr};
  }

  // Adds up all slots.
  Found row(std::size_t model, std::size_t row) const {
    Found all = {kLowest, 0, target_[model * rows_ + row], 0, 0, -1};
    float best = -kInfinity;
    for (std::size_t slot = 0; slot < slots_; ++slot)
      all.shift = std::max<double>(all.shift, shift_[index(slot, model, row)]);
    for (std::size_t slot = 0; slot < slots_; ++slot) {
      const std::size_t i = index(slot, model, row);
      const double down = std::max(shift_[i] - all.shift, -2000.), shrink = std::exp2(down);
      const double sum = sum_[i] * shrink, total = all.sum + sum;
      if (!first_.empty()) {
        const double first = (first_[i] + down * sum_[i]) * shrink;
        all.spread += spread_[i] * shrink;
        if (all.sum != 0 && sum != 0) {
          const double apart = first / sum - all.first / all.sum;
          all.spread += apart * apart * all.sum * (sum / total);
        }
        all.first += first;
      }
      all.sum = total;
      if (!best_.empty() && best_[i] > best) {
        best = best_[i];
        all.best_token = best_token_[i];
      }
    }
    return all;
  }

 private:
  std::size_t index(std::size_t slot, std::size_t model, std::size_t row) const {
    return slot * layer_ + model * rows_ + row;
  }

  std::size_t rows_, layer_, slots_;
  std::vector<float> shift_, sum_, target_, first_, spread_, best_;
  std::vector<std::int32_t> best_token_;
};

// Writes the results of a row; `at` is its index among the rows of all models.
inline void finish(const Model& model, std::size_t row, std::size_t at, const Found& found,
                   float* bits, double* lse, const Statistics& out) {
  const Likelihood& problem = model.problem;
  const double exact = kLog2E / problem.temperature / model.part.scale;  // the scale is rounded
  const double above = std::log2(found.sum);
  // Subtracts the target from the shift first: both may be large and their difference small. The
  // product is exact here and in fms, which rounds only the difference.
  const double cost = (found.shift - model.part.scale * found.target) * exact + above;
  bits[at] = problem.targets[row] == problem.ignore_index ? 0
             : cost < 0                                   ? 0
                                                          : static_cast<float>(cost);
  lse[at] = found.shift + above;
  if (out.lse)
    out.lse[at] = static_cast<float>(
        found.shift * exact + above +
        kLog2E / problem.temperature * model.centred.offset(problem, row));
  const double mean = found.first / found.sum, entropy = above - mean;
  if (out.entropy) out.entropy[at] = entropy < 0 ? 0 : static_cast<float>(entropy);
  if (out.variance) out.variance[at] = static_cast<float>(found.spread / found.sum);
  if (out.greedy) {
    const std::int32_t target = model.part.target(row);
    out.greedy[at] = target >= 0 && target == found.best_token && std::isfinite(above);
  }
}

}  // namespace fastmem
