// The walk over the vocabulary: sums of exp_logits = 2^(z - shift), lane by lane, with a running
// shift.

#include "likelihood/tile.h"

namespace fastmem {
namespace {

// A sum is rescaled only when a tile exceeds this limit. Below it nothing is lost: floats keep
// their relative precision from 2^-126 to 2^127.
constexpr float kMost = 1099511627776.F;  // 2^40

// Below this x, 2^x x^2 counts as 0, not NaN.
constexpr float kLeast = -1000;

// Divides a sum of no tokens, whose moments are 0.
constexpr float kTiny = std::numeric_limits<float>::min();

// Tokens whose exp_logits are added one after another, wherever a walk begins and ends; longer sums
// add such sums.
constexpr std::size_t kSpan = 1024;

// Floats of a block of weight, which stays in the second-level cache.
constexpr std::size_t kBlockFloats = std::size_t{1} << 17;

// Sums of exp_logits and, if asked for, of x and of its squared deviations from its mean.
struct Moments {
  float *sum, *first, *spread;
};

// State of a panel's walk, (J, kLanes) each.
struct Lanes {
  float* shift;
  Moments all;               // of whole spans of tokens
  Moments here;              // of the span in progress
  float *best, *best_token;  // if asked for; the token as the bits of a float
  float* at_target;          // 2^(z - shift) of the target, in a pass that makes gradients
};

// Moments of a vector of lanes, in registers.
struct Gathered {
  Vec sum, first, spread;

  static Gathered load(const Moments& m, std::size_t lane) {
    return {Vec::load(m.sum + lane), Vec::load(m.first + lane), Vec::load(m.spread + lane)};
  }
  void store(const Moments& m, std::size_t lane) const {
    sum.store(m.sum + lane);
    first.store(m.first + lane);
    spread.store(m.spread + lane);
  }
  // Raises the shift by -by; down = 2^by.
  void lower(Vec by, Vec down) {
    spread = spread * down;
    first = down * fma(by, sum, first);
    sum = sum * down;
  }
  Vec mean() const { return first / max(Vec::all(kTiny), sum); }
  // Adds others by Chan's formula, all of whose terms are positive: nothing cancels where x varies
  // little, or where one token has nearly all probability.
  void add(const Gathered& more) {
    const Vec apart = more.mean() - mean(), total = sum + more.sum;
    const Vec part = more.sum / max(Vec::all(kTiny), total);
    spread = spread + more.spread + apart * apart * (sum * part);
    first = first + more.first;
    sum = total;
  }
};

// Ends a span of tokens of a panel: adds `here` to `all`.
inline void fold(const Lanes& state, bool moments) {
  for (std::size_t lane = 0; lane < kPanel; lane += kLanes) {
    Gathered all = Gathered::load(state.all, lane);
    const Gathered here = Gathered::load(state.here, lane);
    if (moments)
      all.add(here);
    else
      all.sum = all.sum + here.sum;
    all.store(state.all, lane);
    Gathered{Vec::all(0), Vec::all(0), Vec::all(0)}.store(state.here, lane);
  }
}

// The states of several panels.
class States {
 public:
  States(std::size_t panels, Extra extra)
      : panels_(panels), data_(kFields * panels * kPanel), extra_(extra) {}

  void reset() {
    const std::size_t n = panels_ * kPanel;
    std::fill_n(data_.get(), kFields * n, 0.F);
    std::fill_n(data_.get(), n, kLowest);
    std::fill_n(data_.get() + 7 * n, n, -kInfinity);
  }

  Lanes panel(std::size_t p) const {
    const auto at = [&](std::size_t field) { return data_.get() + (field * panels_ + p) * kPanel; };
    return {at(0), {at(1), at(2), at(3)}, {at(4), at(5), at(6)}, at(7), at(8), at(9)};
  }

  // Copies the results of panel p to its rows.
  void copy(std::size_t p, std::size_t rows, std::size_t row, const RowSums& out) const {
    const Lanes lanes = panel(p);
    fold(lanes, extra_ & kMoments);
    for (std::size_t r = 0; r < rows; ++r) {
      out.shift[row + r] = lanes.shift[r];
      out.sum[row + r] = lanes.all.sum[r];
      if (extra_ & kMoments) {
        out.first[row + r] = lanes.all.first[r];
        out.spread[row + r] = lanes.all.spread[r];
      }
      if (extra_ & kBest) {
        out.best[row + r] = lanes.best[r];
        std::memcpy(out.best_token + row + r, lanes.best_token + r, sizeof(float));
        if (!(lanes.best[r] > -kInfinity)) out.best_token[row + r] = -1;
      }
    }
  }

 private:
  static constexpr std::size_t kFields = 10;
  std::size_t panels_;
  Floats data_;
  Extra extra_;
};

// The exp_logits that a panel keeps, (tokens, J, kLanes) from the walk's first token on, for `done`
// tokens, and their dhidden. Raising the shift rescales both.
struct Kept {
  float* exp_logits;
  std::size_t done;
  float* dhidden;  // (D, J, kLanes)
  std::size_t width;
};

// Multiplies the kept values of a vector of lanes by `down`.
inline void lower(std::size_t lane, std::size_t lanes, Vec down, const Lanes& state,
                  const Kept& kept) {
  const auto shrink = [&](float* x) { (Vec::load(x) * down).store(x); };
  shrink(state.at_target + lane);
  for (std::size_t v = 0; kept.exp_logits && v < kept.done; ++v)
    shrink(kept.exp_logits + v * lanes + lane);
  for (std::size_t d = 0; kept.dhidden && d < kept.width; ++d)
    shrink(kept.dhidden + d * lanes + lane);
}

// Adds a vector of lanes of a tile of logits (M, J, kLanes) to the state, and raises shifts that
// are too low. z = logits * to_bits.
template <Extra extra>
void absorb(const float* logits, float to_bits, std::size_t m, std::size_t lane, std::size_t lanes,
            std::int32_t token, const Lanes& state, const Kept& kept) {
  const Vec scale = Vec::all(to_bits);
  Vec shift = Vec::load(state.shift + lane);
  Gathered gathered = Gathered::load(state.here, lane);
  const auto at = [&](std::size_t i) { return Vec::load(logits + i * lanes + lane); };
  const auto x_at = [&](std::size_t i) { return fms(at(i), scale, shift); };
  const auto total = [&] {
    Vec e = Vec::all(0);
    for (std::size_t i = 0; i < m; ++i) e = e + exp2(x_at(i));
    return e;
  };
  Vec top = at(0);
  for (std::size_t i = 1; i < m; ++i) top = max(top, at(i));
  top = top * scale;
  // Moments need a shift near the greatest logits: about a shift further off they would cancel.
  Vec here = total();
  constexpr bool moments = extra & kMoments;
  const Vec raised = moments ? select_less(shift, top, top, shift)
                             : select_less(Vec::all(kMost), here, top, shift);
  if (any_greater(raised, shift)) {
    const Vec by = max(Vec::all(kLeast), shift - raised), down = exp2(by);
    Gathered all = Gathered::load(state.all, lane);
    all.lower(by, down);
    all.store(state.all, lane);
    gathered.lower(by, down);
    shift = raised;
    shift.store(state.shift + lane);
    lower(lane, lanes, down, state, kept);
    here = total();
  }
  if constexpr (moments) {
    Gathered tile = {here, Vec::all(0), Vec::all(0)};
    Vec e[kTokens], x[kTokens];
    for (std::size_t i = 0; i < m; ++i) {
      e[i] = exp2(x_at(i));
      x[i] = max(Vec::all(kLeast), x_at(i));
      tile.first = fma(e[i], x[i], tile.first);
    }
    const Vec mean = tile.mean();
    for (std::size_t i = 0; i < m; ++i)
      tile.spread = fma(e[i] * (x[i] - mean), x[i] - mean, tile.spread);
    gathered.add(tile);
  } else {
    gathered.sum = gathered.sum + here;
  }
  gathered.store(state.here, lane);
  for (std::size_t i = 0; (extra & kBest) && i < m; ++i) {
    const std::int32_t number = token + static_cast<std::int32_t>(i);
    float bits;
    std::memcpy(&bits, &number, sizeof bits);
    const Vec best = Vec::load(state.best + lane);
    select_less(best, at(i), Vec::all(bits), Vec::load(state.best_token + lane))
        .store(state.best_token + lane);
    select_less(best, at(i), at(i), best).store(state.best + lane);
  }
  for (std::size_t i = 0; kept.exp_logits && i < m; ++i)
    exp2(x_at(i)).store(kept.exp_logits + (kept.done + i) * lanes + lane);
}

// Adds any tile, through memory. Writes the softcap's `slopes` (tokens, J, kLanes) unless null.
template <Extra extra, std::size_t M, std::size_t J>
__attribute__((noinline)) void add_tile(const Part& part, const Rows& rows, const float* panel,
                                        const float* bias, std::int32_t token, const Lanes& state,
                                        const Kept& kept, float* slopes) {
  constexpr std::size_t lanes = J * kLanes;
  alignas(64) float z[M * lanes];
  Vec sum[M][J];
  products(rows, panel, part.width, sum);
  store(sum, z);
  for (std::size_t i = 0; i < M * lanes; i += kLanes)
    finished(part, Vec::load(z + i), Vec::all(bias ? bias[i / lanes] : 0),
             slopes ? slopes + i : nullptr)
        .store(z + i);
  for (std::size_t lane = 0; lane < lanes; lane += kLanes)
    absorb<extra>(z, part.scale, M, lane, lanes, token, state, kept);
}

// Adds a tile of products from registers and keeps its exp_logits; false if a shift is too low.
template <bool kBias, bool kKeep, std::size_t M, std::size_t J>
FASTMEM_INLINE bool add_exp_logits(const Vec (&z)[M][J], const float* bias, float to_bits,
                                   const Lanes& state, float* exp_logits) {
  const Vec scale = Vec::all(to_bits);
  Vec total[J];
#pragma GCC unroll 3
  for (std::size_t j = 0; j < J; ++j) total[j] = Vec::all(0);
#pragma GCC unroll 8
  for (std::size_t m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (std::size_t j = 0; j < J; ++j) {
      const Vec shift = Vec::load(state.shift + j * kLanes);
      const Vec e = exp2(fms(kBias ? z[m][j] + Vec::all(bias[m]) : z[m][j], scale, shift));
      total[j] = total[j] + e;
      if (kKeep) e.store(exp_logits + (m * J + j) * kLanes);
    }
  bool over = false;
#pragma GCC unroll 3
  for (std::size_t j = 0; j < J; ++j) over |= any_greater(total[j], Vec::all(kMost));
  if (over) return false;
#pragma GCC unroll 3
  for (std::size_t j = 0; j < J; ++j) {
    float* const sum = state.here.sum + j * kLanes;
    (Vec::load(sum) + total[j]).store(sum);
  }
  return true;
}

// Adds the tokens of `rows`, from `token` on, to the state of a panel.
template <Extra extra, bool kBias, bool kKeep, std::size_t J>
void walk_panel(const Part& part, Rows rows, std::size_t tokens, const float* panel,
                const float* bias, std::int32_t token, const Lanes& state, Kept kept,
                float* slopes) {
  const bool from_registers = extra == kNothing && part.softcap == 0;
  const std::size_t done = kept.done;
  const auto add = [&](auto m, std::size_t first) {
    constexpr std::size_t M = decltype(m)::value;
    const Rows here = {rows.at(first), rows.stride};
    const float* const b = kBias ? bias + first : nullptr;
    kept.done = done + first;
    if (from_registers) {
      float* const exp_logits = kKeep ? kept.exp_logits + kept.done * J * kLanes : nullptr;
      Vec sum[M][J];
      // Two calls: with one after the branch, the compiler sends all sums through memory.
      if (part.width <= kDepth) {
        clear(sum);
        multiply<true>(here.data, here.stride, panel, J * kLanes, part.width, sum);
        if (add_exp_logits<kBias, kKeep>(sum, b, part.scale, state, exp_logits)) return;
      } else {
        products(here, panel, part.width, sum);
        if (add_exp_logits<kBias, kKeep>(sum, b, part.scale, state, exp_logits)) return;
      }
    }
    add_tile<extra, M, J>(part, here, panel, b, token + static_cast<std::int32_t>(first), state,
                          kept, slopes ? slopes + first * J * kLanes : nullptr);
  };
  const auto number = static_cast<std::size_t>(token);
  for (std::size_t first = 0, end; first < tokens; first = end) {
    end = std::min(tokens, first + kSpan - (number + first) % kSpan);
    in_tiles(end, add, first);
    if ((number + end) % kSpan == 0) fold(state, extra & kMoments);
  }
}

template <Extra extra, bool kKeep>
inline void walk(const Part& part, Rows rows, std::size_t tokens, const float* panel,
                 std::size_t vecs, const float* bias, std::size_t token, const Lanes& state,
                 const Kept& kept, float* slopes) {
  with_vecs(vecs, [&](auto j) {
    const auto run = bias ? walk_panel<extra, true, kKeep, decltype(j)::value>
                          : walk_panel<extra, false, kKeep, decltype(j)::value>;
    run(part, rows, tokens, panel, bias, static_cast<std::int32_t>(token), state, kept, slopes);
  });
}

inline bool is_inside(const Part& part, Span tokens, std::size_t row) {
  const std::int32_t t = part.target(row);
  return t >= 0 && static_cast<std::size_t>(t) - tokens.begin < tokens.size();
}

// out[r] = logit of the target of row r of a panel, if `tokens` has it, summed in the order of its
// tile, so that both round alike. `scratch` holds a panel.
template <class T>
void targets_of(const Part& part, Span tokens, std::size_t row, std::size_t rows,
                const float* panel, Floats& scratch, float* out) {
  const std::size_t lanes = vecs_of(rows) * kLanes, width = part.width;
  alignas(64) float bias[kPanel] = {}, logit[kPanel];
  const T* const weight = static_cast<const T*>(part.weight);
  const auto inside = [&](std::size_t r) { return is_inside(part, tokens, row + r); };
  const auto row_at = [&](std::size_t r) -> const T* {
    return inside(r) ? weight + static_cast<std::size_t>(part.target(row + r)) * width : nullptr;
  };
  pack_panel(row_at, rows, width, scratch.get());
  for (std::size_t r = 0; part.bias && r < rows; ++r)
    if (inside(r)) bias[r] = part.bias[part.target(row + r)];
  for (std::size_t lane = 0; lane < lanes; lane += kLanes) {
    Vec all = Vec::all(0);
    for (std::size_t begin = 0; begin < width; begin += kDepth) {
      Vec sum = Vec::all(0);
      for (std::size_t d = begin; d < std::min(width, begin + kDepth); ++d) {
        Vec w = Vec::load(scratch.get() + d * lanes + lane);
        if (part.centre) w = w - Vec::all(part.centre[d]);
        sum = fma(w, Vec::load(panel + d * lanes + lane), sum);
      }
      all = begin > 0 ? sum + all : sum;
    }
    finished(part, all, Vec::load(bias + lane), nullptr).store(logit + lane);
  }
  for (std::size_t r = 0; r < rows; ++r)
    if (inside(r)) out[r] = logit[r];
}

// Tokens of a block of weight: a multiple of kTokens, or all.
inline std::size_t block_of(std::size_t floats, std::size_t width, std::size_t tokens) {
  return std::min(tokens, std::max<std::size_t>(1, floats / width / kTokens) * kTokens);
}

// Starts a panel's shifts at the logits of the targets, so that most need not be raised, and its
// sums at 0, or at NaN for a row that is not finite, whose logits a softcap may make finite.
inline void begin_panel(const Part& part, Span tokens, std::size_t row, std::size_t rows,
                        const float* panel, const float* target, const Lanes& state) {
  std::fill_n(state.shift, kPanel, -kLowest);  // a lane without a row has exp_logits of 0
  for (std::size_t r = 0; r < rows; ++r)
    state.shift[r] = is_inside(part, tokens, row + r) ? std::max(kLowest, target[r] * part.scale)
                                                      : kLowest;
  const std::size_t lanes = vecs_of(rows) * kLanes;
  for (std::size_t lane = 0; lane < lanes; lane += kLanes) {
    Vec sum = Vec::all(0);
    for (std::size_t d = 0; d < part.width; ++d)
      sum = fma(Vec::load(panel + d * lanes + lane), Vec::all(0), sum);
    sum.store(state.all.sum + lane);
  }
}

// Panels packed at a time: one if weight is one block, which stays in the cache; else as many as
// `room` holds, so that reading weight again costs little.
inline std::size_t chunk_of(Span rows, Span tokens, std::size_t block, std::size_t room,
                            std::size_t width) {
  if (tokens.size() <= block) return 1;
  return std::min((rows.size() + kPanel - 1) / kPanel,
                  std::max<std::size_t>(1, room / width / kPanel));
}

template <class T, Extra extra>
void forward(const Part& part, Span rows, Span tokens, std::size_t room, const RowSums& out) {
  const std::size_t width = part.width;
  const T* const hidden = static_cast<const T*>(part.hidden);
  const std::size_t block = block_of(std::min(kBlockFloats, room), width, tokens.size());
  const std::size_t chunk = chunk_of(rows, tokens, block, room, width);
  Weight<T> weight(part, block);
  Floats panels(chunk * kPanel * width), scratch(kPanel * width);
  States states(chunk, extra);
  for (std::size_t row = rows.begin; row < rows.end; row += chunk * kPanel) {
    const std::size_t here = std::min(chunk * kPanel, rows.end - row);
    const auto rows_in = [&](std::size_t p) { return std::min(kPanel, here - p * kPanel); };
    const std::size_t count = (here + kPanel - 1) / kPanel;
    states.reset();
    for (std::size_t p = 0; p < count; ++p) {
      float* const panel = panels.get() + p * kPanel * width;
      const std::size_t first = row + p * kPanel;
      pack_panel([&](std::size_t r) { return hidden + (first + r) * width; }, rows_in(p), width,
                 panel);
      float* const target = out.target + first;
      targets_of<T>(part, tokens, first, rows_in(p), panel, scratch, target);
      begin_panel(part, tokens, first, rows_in(p), panel, target, states.panel(p));
    }
    for (std::size_t token = tokens.begin; token < tokens.end; token += block) {
      const Span span = {token, std::min(tokens.end, token + block)};
      const Rows w = weight.rows(span);
      for (std::size_t p = 0; p < count; ++p)
        walk<extra, false>(part, w, span.size(), panels.get() + p * kPanel * width,
                           vecs_of(rows_in(p)), part.bias ? part.bias + token : nullptr, token,
                           states.panel(p), {}, nullptr);
    }
    for (std::size_t p = 0; p < count; ++p)
      states.copy(p, rows_in(p), row + p * kPanel, out);
  }
}

}  // namespace
}  // namespace fastmem
