#include "likelihood.h"

#include <array>

#include "likelihood_centred.h"
#include "likelihood_part.h"
#include "likelihood_shares.h"

namespace fastmem {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

const Loops& loops_of(Isa isa) {
  return isa == Isa::avx512 ? kAvx512Loops : isa == Isa::avx2 ? kAvx2Loops : kPortableLoops;
}

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

std::vector<Model> models_of(const Likelihood& problem) {
  std::vector<Model> models;
  models.reserve(problem.models);
  for (std::size_t e = 0; e < problem.models; ++e) models.emplace_back(problem, e);
  return models;
}

// RowSums of all models, and for each slot of a model whose rows its pieces share.
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
    second_.assign(moments ? n : 0, 0);
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
            moments ? second_.data() + i : nullptr,
            best ? best_.data() + i : nullptr,
            best ? best_token_.data() + i : nullptr};
  }

  // Sums of all slots of a row.
  struct Row {
    double shift, sum, first, second;
    std::int32_t best_token;
  };
  Row row(std::size_t model, std::size_t row) const {
    Row all = {kLowest, 0, 0, 0, -1};
    float best = -kInfinity;
    for (std::size_t slot = 0; slot < slots_; ++slot)
      all.shift = std::max<double>(all.shift, shift_[index(slot, model, row)]);
    for (std::size_t slot = 0; slot < slots_; ++slot) {
      const std::size_t i = index(slot, model, row);
      const double down = std::max(shift_[i] - all.shift, -2000.), shrink = std::exp2(down);
      all.sum += sum_[i] * shrink;
      if (!first_.empty()) {
        all.first += (first_[i] + down * sum_[i]) * shrink;
        all.second += (second_[i] + down * (2. * first_[i] + down * sum_[i])) * shrink;
      }
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
  std::vector<float> shift_, sum_, target_, first_, second_, best_;
  std::vector<std::int32_t> best_token_;
};

// Results of some rows of a model from their sums.
void finish(const Model& model, std::size_t e, Span rows, Sums& all, float* bits, double* lse,
            const Statistics& out) {
  const Likelihood& problem = model.problem;
  const double scale = model.part.scale, exact = kLog2E / problem.temperature;
  const float* const targets = all.at(0, e).target;
  const std::size_t first = e * problem.rows;
  for (std::size_t row = rows.begin; row < rows.end; ++row) {
    const Sums::Row sums = all.row(e, row);
    const double above = std::log2(sums.sum);
    // The shift less the target first: both are large where the difference is small. The scale was
    // rounded for both.
    const double cost = (sums.shift - scale * targets[row]) * (exact / scale) + above;
    bits[first + row] = problem.targets[row] == problem.ignore_index ? 0
                        : cost < 0                                   ? 0
                                                                     : static_cast<float>(cost);
    lse[first + row] = sums.shift + above;
    if (out.lse)
      out.lse[first + row] = static_cast<float>(sums.shift * (exact / scale) + above +
                                                exact * model.centred.offset(problem, row));
    const double mean = sums.first / sums.sum, entropy = above - mean;
    if (out.entropy) out.entropy[first + row] = entropy < 0 ? 0 : static_cast<float>(entropy);
    if (out.second_moment)
      out.second_moment[first + row] =
          static_cast<float>(sums.second / sums.sum + above * (above - 2 * mean));
    if (out.greedy) {
      const std::int32_t target = model.part.target(row);
      out.greedy[first + row] = target >= 0 && target == sums.best_token && std::isfinite(above);
    }
  }
}

// Gradients that pieces add to: where pieces share memory, the first of a model adds to the
// caller's and each other to its own, joined in the order of the pieces.
class Totals {
 public:
  Totals(const Likelihood& problem, const Shares& shares, const Gradients& out)
      : arrays_{Array{out.hidden, problem.rows, problem.width, shares.by_rows, {}},
                Array{out.weight, problem.vocab, problem.width, !shares.by_rows, {}},
                Array{out.bias, problem.vocab, 1, !shares.by_rows, {}}},
        models_(problem.models) {
    for (Array& array : arrays_) array.others.resize(models_ * (shares.slot_count - 1));
    if (problem.rows == 0)  // no piece will
      for (Array& array : arrays_)
        if (array.out) std::fill_n(array.out, models_ * array.count * array.size, 0.F);
  }

  // Called by the thread that then fills it, so that its memory is near.
  Gradients zeros(const Piece& piece) {
    const auto start = [&](Array& array) -> float* {
      if (!array.out) return nullptr;
      float* own = array.out + piece.model * array.count * array.size;
      Span span = &array == arrays_.data() ? piece.rows : piece.tokens;
      if (!array.split && piece.slot > 0) {
        Floats& other = array.others[(piece.slot - 1) * models_ + piece.model];
        other = Floats(array.count * array.size);
        own = other.get();
      }
      std::fill(own + span.begin * array.size, own + span.end * array.size, 0.F);
      return own;
    };
    return {start(arrays_[0]), start(arrays_[1]), start(arrays_[2])};
  }

  void join() {
    for (const Array& array : arrays_)
      for (std::size_t i = 0; array.out && i < array.others.size(); ++i) {
        float* const out = array.out + i % models_ * array.count * array.size;
        for (std::size_t j = 0; array.others[i].get() && j < array.count * array.size; ++j)
          out[j] += array.others[i][j];
      }
  }

 private:
  struct Array {
    float* out;
    std::size_t count, size;  // of items in a model, and of each
    bool split;               // each piece has its own span of items
    std::vector<Floats> others;
  };
  std::array<Array, 3> arrays_;
  std::size_t models_;
};

// NaN in dhidden for rows whose bits are NaN and count: an upstream of null is 1 everywhere.
void mark_rows(const std::vector<Model>& models, const double* lse, const float* upstream,
               float* dhidden) {
  if (!dhidden) return;
  for (const Model& model : models) {
    const Likelihood& problem = model.problem;
    const RowGradients rows = {nullptr, lse};
    for (std::size_t row = 0; row < problem.rows; ++row)
      if (problem.targets[row] != problem.ignore_index && !rows.counts(model.part, row) &&
          !(upstream && upstream[row] == 0))
        std::fill_n(dhidden + row * problem.width, problem.width, kNaN);
    lse += problem.rows;
    upstream = upstream ? upstream + problem.rows : nullptr;
    dhidden += problem.rows * problem.width;
  }
}

}  // namespace

bool has_isa(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::portable;
}

Isa best_isa() {
  return has_isa(Isa::avx512) ? Isa::avx512 : has_isa(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

void token_bits(const Likelihood& problem, std::size_t threads, Isa isa, float* bits, double* lse,
                const Statistics& statistics) {
  const Loops& loops = loops_of(isa);
  const std::vector<Model> models = models_of(problem);
  const Shares shares(problem, loops, threads, problem.rows >= problem.vocab);
  const bool moments = statistics.entropy || statistics.second_moment;
  const Extra extra = static_cast<Extra>((moments ? kMoments : 0) | (statistics.greedy ? kBest : 0));
  Sums sums(problem, shares.by_rows ? 1 : shares.slot_count, extra);
  for_each_piece(shares, [&](const Piece& piece) {
    const Model& model = models[piece.model];
    const RowSums out = sums.at(shares.by_rows ? 0 : piece.slot, piece.model);
    loops.forward[extra][problem.bfloat16](model.part, piece.rows, piece.tokens, out);
    if (shares.by_rows) finish(model, piece.model, piece.rows, sums, bits, lse, statistics);
  });
  for (std::size_t e = 0; !shares.by_rows && e < models.size(); ++e)
    finish(models[e], e, {0, problem.rows}, sums, bits, lse, statistics);
}

void token_bits_backward(const Likelihood& problem, const float* upstream, const double* lse,
                         std::size_t threads, Isa isa, float* dhidden, float* dweight,
                         float* dbias) {
  const Loops& loops = loops_of(isa);
  const std::vector<Model> models = models_of(problem);
  const Shares shares(problem, loops, threads, problem.rows >= problem.vocab);
  Totals totals(problem, shares, {dhidden, dweight, dbias});
  for_each_piece(shares, [&](const Piece& piece) {
    const std::size_t row = piece.model * problem.rows;
    loops.backward[problem.bfloat16](models[piece.model].part, piece.rows, piece.tokens,
                                     {upstream + row, lse + row}, totals.zeros(piece));
  });
  totals.join();
  mark_rows(models, lse, upstream, dhidden);
}

void token_bits_and_gradients(const Likelihood& problem, std::size_t threads, Isa isa, float* bits,
                              double* lse, float* dhidden, float* dweight, float* dbias) {
  const Loops& loops = loops_of(isa);
  const std::vector<Model> models = models_of(problem);
  const Shares shares(problem, loops, threads, true);
  Totals totals(problem, shares, {dhidden, dweight, dbias});
  Sums sums(problem, 1, kNothing);
  for_each_piece(shares, [&](const Piece& piece) {
    const Model& model = models[piece.model];
    loops.forward_backward[problem.bfloat16](model.part, piece.rows, sums.at(0, piece.model),
                                             totals.zeros(piece));
    finish(model, piece.model, piece.rows, sums, bits, lse, {});
  });
  totals.join();
  mark_rows(models, lse, nullptr, dhidden);
}

}  // namespace fastmem
