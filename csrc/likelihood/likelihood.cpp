#include "likelihood/likelihood.h"

#include <array>

#include "likelihood/part.h"
#include "likelihood/shares.h"
#include "likelihood/sums.h"

namespace fastmem {
namespace {

const Loops& loops_of(Isa isa) {
  return isa == Isa::avx512 ? kAvx512Loops : isa == Isa::avx2 ? kAvx2Loops : kPortableLoops;
}

// Zeros the gradients of a problem without rows.
void clear(const Likelihood& problem, float* dweight, float* dbias) {
  const std::size_t tokens = problem.models * problem.vocab;
  if (dweight) std::fill_n(dweight, tokens * problem.width, 0.F);
  if (dbias) std::fill_n(dbias, tokens, 0.F);
}

// Gradients of all pieces. Where pieces share memory, a model's first piece adds to the caller's
// array and each other piece to its own, and `join` adds these in the order of the pieces.
class Totals {
 public:
  Totals(const Likelihood& problem, const Shares& shares, const Gradients& out)
      : arrays_{Array{out.hidden, problem.rows, problem.width, shares.by_rows, {}},
                Array{out.weight, problem.vocab, problem.width, !shares.by_rows, {}},
                Array{out.bias, problem.vocab, 1, !shares.by_rows, {}}},
        models_(problem.models) {
    for (Array& array : arrays_) array.others.resize(models_ * (shares.slot_count - 1));
  }

  // The thread that fills the memory calls this, so that the memory is near. Pieces of later rows
  // with the same tokens add to the same gradients of weight and bias.
  Gradients begin(const Piece& piece) {
    const bool later = arrays_[1].split && piece.rows.begin > 0;
    const Span rows = {0, piece.rows.size()};
    const Span tokens = {later ? piece.tokens.end : piece.tokens.begin, piece.tokens.end};
    return {start(arrays_[0], piece, piece.rows.begin, rows), start(arrays_[1], piece, 0, tokens),
            start(arrays_[2], piece, 0, tokens)};
  }

  // Adds up dhidden for `rows` of each model, and the gradients of weight and bias.
  void join(Span rows) {
    for (const Array& array : arrays_) {
      const Span items = &array == arrays_.data() ? rows : Span{0, array.count};
      for (std::size_t i = 0; array.out && i < array.others.size(); ++i) {
        float* const out = array.at(i % models_, items.begin);
        for (std::size_t j = 0; array.others[i].get() && j < items.size() * array.size; ++j)
          out[j] += array.others[i][j];
      }
    }
  }

 private:
  struct Array {
    float* out;
    std::size_t count, size;  // items of a model, floats of an item
    bool split;               // each piece has its own span of items
    std::vector<Floats> others;

    float* at(std::size_t model, std::size_t item) const {
      return out + (model * count + item) * size;
    }
  };

  // The caller's array from item `first` on, or the piece's own; zeros the items `zeroed`.
  float* start(Array& array, const Piece& piece, std::size_t first, Span zeroed) const {
    if (!array.out) return nullptr;
    float* own = array.at(piece.model, first);
    if (!array.split && piece.slot > 0) {
      Floats& other = array.others[(piece.slot - 1) * models_ + piece.model];
      if (!other.get()) other = Floats(zeroed.end * array.size);
      own = other.get();
    }
    std::fill(own + zeroed.begin * array.size, own + zeroed.end * array.size, 0.F);
    return own;
  }

  std::array<Array, 3> arrays_;
  std::size_t models_;
};

// Writes NaN to dhidden of rows of NaN bits whose upstream is not 0; a null upstream is 1
// everywhere.
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

// Up to this vocabulary and this many floats, weight stays in a core's caches, and each thread
// takes its own rows.
constexpr std::size_t kShort = 4096, kShortWeight = std::size_t{1} << 21;

// Floats of dhidden that all threads together hold besides the caller's.
constexpr std::size_t kGathered = std::size_t{1} << 22;

// Panels that walk a long vocabulary together, so that weight and dweight are read once for all.
constexpr std::size_t kTogether = 2;

// Some panels of rows in one pass that makes bits and gradients, in spans of tokens.
class AheadPanels {
 public:
  AheadPanels(const Model& model, const Loops& loops, std::size_t panels, std::vector<Span> spans,
              bool dhidden)
      : model_(model),
        loops_(loops.of[model.problem.bfloat16]),
        spans_(std::move(spans)),
        panel_(loops.panel),
        lane_(loops.lanes),
        most_(panels * panel_),
        exp_logits_(model.problem.vocab * most_),
        dhidden_(dhidden ? spans_.size() * most_ * model.problem.width : 0),
        rows_(kFields * spans_.size() * most_),
        ahead_(spans_.size()) {
    for (std::size_t s = 0; s < spans_.size(); ++s) {
      const auto field = [&](std::size_t i) {
        return rows_.get() + (i * spans_.size() + s) * most_;
      };
      ahead_[s] = {exp_logits_.get() + spans_[s].begin * most_,
                   dhidden ? dhidden_.get() + s * most_ * model.problem.width : nullptr,
                   field(0), field(1), field(2), field(3), field(4)};
    }
  }

  void walk(std::size_t s, std::size_t row, std::size_t rows) {
    std::fill_n(ahead_[s].at_target, most_, 0.F);
    std::fill_n(ahead_[s].slope, most_, 0.F);
    loops_.ahead_walk(model_.part, row, rows, spans_[s], ahead_[s].dhidden != nullptr, ahead_[s]);
  }

  // After all spans: writes results, and dhidden of these rows unless null; `at` is the index of
  // the first row among the rows of all models.
  void join(std::size_t row, std::size_t rows, std::size_t at, float* bits, double* lse,
            float* dhidden) {
    const std::size_t width = model_.problem.width;
    for (std::size_t r = 0; r < rows; ++r) join_row(r, rows, row + r, at + r, bits, lse);
    for (std::size_t s = 0; dhidden && s < spans_.size(); ++s)
      for (std::size_t first = 0; first < rows; first += panel_)
        loops_.write_dhidden(model_.part, row + first, std::min(panel_, rows - first),
                             ahead_[s].dhidden + first * width, factor(s) + first,
                             ahead_[s].at_target + first, dhidden + first * width);
  }

  void tokens(std::size_t s, std::size_t row, std::size_t rows, bool write, const Gradients& out) {
    loops_.ahead_tokens(model_.part, row, rows, spans_[s], factor(s), ahead_[s], write, out);
  }

 private:
  static constexpr std::size_t kFields = 6;

  float* factor(std::size_t s) { return rows_.get() + (5 * spans_.size() + s) * most_; }

  void join_row(std::size_t r, std::size_t rows, std::size_t row, std::size_t at, float* bits,
                double* lse) {
    Found found = {kLowest, 0, kNaN, 0, 0, -1};
    for (const Ahead& a : ahead_) found.shift = std::max<double>(found.shift, a.shift[r]);
    for (const Ahead& a : ahead_) {
      found.sum += a.sum[r] * std::exp2(a.shift[r] - found.shift);
      if (!std::isnan(a.target[r])) found.target = a.target[r];
    }
    finish(model_, row, at, found, bits, lse, {});
    const bool counts = model_.part.target(row) >= 0 && std::isfinite(lse[at]);
    for (std::size_t s = 0; s < spans_.size(); ++s) {
      Ahead& a = ahead_[s];
      double down = counts ? a.shift[r] - found.shift : 0;
      if (down < -60) {  // 2^-down would overflow
        lower(s, r, rows, static_cast<float>(std::exp2(down)));
        down = 0;
      }
      const double total = found.sum * std::exp2(-down);
      factor(s)[r] = counts ? static_cast<float>(model_.part.scale / total) : 0;
      // p - 1 before it is scaled: where p is nearly 1, the difference is exact.
      const bool here = !std::isnan(a.target[r]);
      a.at_target[r] = here ? static_cast<float>((a.at_target[r] - total) * a.slope[r]) : 0;
    }
  }

  void lower(std::size_t s, std::size_t r, std::size_t rows, float down) {
    const std::size_t first = r / panel_ * panel_, lane = r - first;
    const std::size_t lanes = (std::min(panel_, rows - first) + lane_ - 1) / lane_ * lane_;
    const std::size_t tokens = spans_[s].size(), width = model_.problem.width;
    Ahead& a = ahead_[s];
    a.at_target[r] *= down;
    for (std::size_t v = 0; v < tokens; ++v)
      a.exp_logits[first * tokens + v * lanes + lane] *= down;
    for (std::size_t d = 0; a.dhidden && d < width; ++d)
      a.dhidden[first * width + d * lanes + lane] *= down;
  }

  const Model& model_;
  const LoopsOf& loops_;
  std::vector<Span> spans_;
  std::size_t panel_, lane_, most_;  // rows of a panel, of a vector, of all panels
  Floats exp_logits_, dhidden_, rows_;
  std::vector<Ahead> ahead_;
};

}  // namespace

void token_bits(const Likelihood& problem, std::size_t threads, Isa isa, float* bits, double* lse,
                const Statistics& statistics) {
  const Loops& loops = loops_of(isa);
  const std::vector<Model> models = models_of(problem);
  const Shares shares(problem, loops, threads, problem.rows >= problem.vocab);
  const bool moments = statistics.entropy || statistics.variance;
  const auto extra = static_cast<Extra>((moments ? kMoments : 0) | (statistics.greedy ? kBest : 0));
  Sums sums(problem, shares.by_rows ? 1 : shares.slot_count, extra);
  const auto finish_rows = [&](std::size_t e, Span rows) {
    for (std::size_t row = rows.begin; row < rows.end; ++row)
      finish(models[e], row, e * problem.rows + row, sums.row(e, row), bits, lse, statistics);
  };
  for_each_piece(shares, [&](const Piece& piece) {
    const Model& model = models[piece.model];
    const RowSums out = sums.at(shares.by_rows ? 0 : piece.slot, piece.model);
    loops.of[problem.bfloat16].forward[extra](model.part, piece.rows, piece.tokens, shares.room(),
                                              out);
    if (shares.by_rows) finish_rows(piece.model, piece.rows);
  });
  for (std::size_t e = 0; !shares.by_rows && e < models.size(); ++e)
    finish_rows(e, {0, problem.rows});
}

void token_bits_backward(const Likelihood& problem, const float* upstream, const double* lse,
                         std::size_t threads, Isa isa, float* dhidden, float* dweight,
                         float* dbias) {
  const Loops& loops = loops_of(isa);
  const std::vector<Model> models = models_of(problem);
  const std::size_t n = problem.rows, size = problem.vocab * problem.width;
  if (n == 0) return clear(problem, dweight, dbias);
  const Shares shares(problem, loops, threads, n >= problem.vocab && size <= kShortWeight);
  Totals totals(problem, shares, {dhidden, dweight, dbias});
  // Threads that share tokens each gather a dhidden of `step` rows at a time.
  const std::size_t panels = kGathered / shares.parts.size() / problem.width / loops.panel;
  const std::size_t step = shares.by_rows ? n : std::max<std::size_t>(1, panels) * loops.panel;
  for (std::size_t row = 0; row < n; row += step) {
    const Span rows = {row, std::min(n, row + step)};
    for_each_piece(shares, [&](Piece piece) {
      const std::size_t at = piece.model * n;
      if (!shares.by_rows) piece.rows = rows;
      loops.of[problem.bfloat16].backward(models[piece.model].part, piece.rows, piece.tokens,
                                          shares.room(), {upstream + at, lse + at},
                                          totals.begin(piece));
    });
    totals.join(rows);
  }
  mark_rows(models, lse, upstream, dhidden);
}

void token_bits_and_gradients(const Likelihood& problem, std::size_t threads, Isa isa, float* bits,
                              double* lse, float* dhidden, float* dweight, float* dbias) {
  const Loops& loops = loops_of(isa);
  const std::vector<Model> models = models_of(problem);
  const std::size_t n = problem.rows, width = problem.width, panel = loops.panel;
  const Gradients out = {dhidden, dweight, dbias};
  if (n == 0) return clear(problem, dweight, dbias);
  if (problem.vocab <= kShort && problem.vocab * width <= kShortWeight &&
      problem.models * n >= threads * panel) {
    const Shares shares(problem, loops, threads, true);
    Totals totals(problem, shares, out);
    for_each_piece(shares, [&](const Piece& piece) {
      AheadPanels ahead(models[piece.model], loops, 1, {piece.tokens}, dhidden != nullptr);
      const Gradients own = totals.begin(piece);
      for (std::size_t row = piece.rows.begin; row < piece.rows.end; row += panel) {
        const std::size_t rows = std::min(panel, piece.rows.end - row);
        ahead.walk(0, row, rows);
        float* const to = dhidden ? own.hidden + (row - piece.rows.begin) * width : nullptr;
        ahead.join(row, rows, piece.model * n + row, bits, lse, to);
        ahead.tokens(0, row, rows, false, own);
      }
    });
    totals.join({0, n});
  } else {
    // Panels one step after another, with their tokens divided: each thread has its part of
    // dweight.
    const std::size_t step = std::min(kTogether, (n + panel - 1) / panel) * panel;
    Likelihood one = problem;
    one.models = 1;
    one.rows = std::min(n, step);
    const Shares shares(one, loops, threads, false);
    std::vector<Span> spans;
    for (const auto& pieces : shares.parts)
      for (const Piece& piece : pieces) spans.push_back(piece.tokens);
    for (std::size_t e = 0; e < models.size(); ++e) {
      AheadPanels ahead(models[e], loops, step / panel, spans, dhidden != nullptr);
      const Gradients own = {dhidden ? dhidden + e * n * width : nullptr,
                             dweight ? dweight + e * problem.vocab * width : nullptr,
                             dbias ? dbias + e * problem.vocab : nullptr};
      if (dhidden) std::fill_n(own.hidden, n * width, 0.F);
      for (std::size_t row = 0; row < n; row += step) {
        const std::size_t rows = std::min(step, n - row);
        in_parallel(spans.size(), [&](std::size_t s) { ahead.walk(s, row, rows); });
        ahead.join(row, rows, e * n + row, bits, lse,
                   dhidden ? own.hidden + row * width : nullptr);
        if (dweight || dbias)
          in_parallel(spans.size(), [&](std::size_t s) {
            ahead.tokens(s, row, rows, row == 0, own);
          });
      }
    }
  }
  mark_rows(models, lse, nullptr, dhidden);
}

}  // namespace fastmem
