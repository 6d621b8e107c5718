// Gradients of hidden, weight and bias from the exp_logits of panels.

#include "likelihood/forward.h"

namespace fastmem {
namespace {

// Tokens whose exp_logits stay in the first-level cache until they are multiplied.
constexpr std::size_t kNear = 128;

// out (D, J, kLanes) += rows^T @ exp_logits (tokens, J, kLanes).
template <std::size_t J>
void add_dhidden(Rows rows, std::size_t tokens, const float* exp_logits, std::size_t width,
                 float* out) {
  in_tiles(width, [&](auto m, std::size_t d) {
    constexpr std::size_t M = decltype(m)::value;
    Vec sum[M][J];
    clear(sum);
    multiply<false>(rows.data + d, rows.stride, exp_logits, J * kLanes, tokens, sum);
    add(sum, out + d * J * kLanes);
    store(sum, out + d * J * kLanes);
  });
}

// One panel: exp_logits of some tokens, and the rows of hidden from pack_hidden.
struct Made {
  const float* exp_logits;  // (tokens, J, kLanes)
  const float* hidden;
  const float* factor;  // of each row
  std::size_t rows;

  std::size_t lanes() const { return vecs_of(rows) * kLanes; }
};

// out[M, columns] += exp_logits of M tokens from v on (M, rows) @ hidden (rows, columns from d on),
// over all panels; `write` overwrites. A row of out has `width` floats.
template <std::size_t M, std::size_t J>
void add_dweight(const std::vector<Made>& made, std::size_t v, std::size_t d, std::size_t columns,
                 std::size_t width, bool write, float* out) {
  Vec sum[M][J];
  clear(sum);
  for (const Made& panel : made) {
    const std::size_t lanes = panel.lanes(), rows = panel.rows;
    const float* const a = panel.exp_logits + v * lanes;
    const float* const b = panel.hidden + rows * d;
    std::size_t k = 0;
    // With a long vocabulary out is in memory, and few loads can be under way at once: prefetch one
    // line a step.
    for (; &panel == made.data() && k < std::min(rows, M * J); ++k) {
      __builtin_prefetch(out + k / J * width + k % J * kLanes, 1);
      multiply<true>(a + k, lanes, b + k * J * kLanes, J * kLanes, 1, sum);
    }
    multiply<true>(a + k, lanes, b + k * J * kLanes, J * kLanes, rows - k, sum);
  }
  if (columns == J * kLanes) {
#pragma GCC unroll 8
    for (std::size_t m = 0; m < M; ++m)
#pragma GCC unroll 3
      for (std::size_t j = 0; j < J; ++j) {
        float* const to = out + m * width + j * kLanes;
        (write ? sum[m][j] : sum[m][j] + Vec::load_anywhere(to)).store_anywhere(to);
      }
    return;
  }
  alignas(64) float buffer[M * J * kLanes];
  store(sum, buffer);
  for (std::size_t m = 0; m < M; ++m)
    for (std::size_t c = 0; c < columns; ++c) {
      const float more = buffer[m * J * kLanes + c];
      out[m * width + c] = write ? more : out[m * width + c] + more;
    }
}

// Packs hidden times factor as (slices of kPanel columns, rows, J, kLanes): zeros past the last
// column and in rows of factor 0.
template <class T>
void pack_hidden(const T* hidden, std::size_t rows, std::size_t width, const float* factor,
                 float* out) {
  for (std::size_t d = 0; d < width; d += kPanel) {
    const std::size_t columns = std::min(kPanel, width - d), lanes = vecs_of(columns) * kLanes;
    for (std::size_t r = 0; r < rows; ++r, out += lanes) {
      std::size_t c = 0;
      if (factor[r] != 0)
        for (; c < columns; ++c) out[c] = to_float(hidden[r * width + d + c]) * factor[r];
      std::fill(out + c, out + lanes, 0.F);
    }
  }
}

// out[tokens] += exp_logits times factor, summed over a panel; `write` overwrites.
inline void add_dbias(const Made& panel, Span tokens, bool write, float* out) {
  const std::size_t lanes = panel.lanes();
  alignas(64) float factor[kPanel] = {};
  std::copy_n(panel.factor, panel.rows, factor);
  for (std::size_t v = tokens.begin; v < tokens.end; ++v) {
    Vec sum = Vec::all(0);
    for (std::size_t lane = 0; lane < lanes; lane += kLanes)
      sum = fma(Vec::load(panel.exp_logits + v * lanes + lane), Vec::load(factor + lane), sum);
    out[v] = add_lanes(sum) + (write ? 0 : out[v]);
  }
}

// Adds the panels' gradients to dweight and dbias of `tokens` tokens; `write` overwrites. The
// gradients of the logits are exp_logits times factor.
inline void add_token_gradients(const std::vector<Made>& made, std::size_t tokens,
                                std::size_t width, bool write, float* dweight, float* dbias) {
  for (std::size_t begin = 0; begin < tokens; begin += kNear) {
    const Span near = {begin, std::min(tokens, begin + kNear)};
    for (std::size_t p = 0; dbias && p < made.size(); ++p)
      add_dbias(made[p], near, write && p == 0, dbias);
    if (!dweight) continue;
    const auto add = [&](auto m, std::size_t v) {
      constexpr std::size_t M = decltype(m)::value;
      for (std::size_t d = 0; d < width; d += kPanel) {
        const std::size_t columns = std::min(kPanel, width - d);
        with_vecs(vecs_of(columns), [&](auto j) {
          constexpr std::size_t J = decltype(j)::value;
          add_dweight<M, J>(made, v, d, columns, width, write, dweight + v * width + d);
        });
      }
    };
    in_tiles(near.end, add, near.begin);
  }
}

// Adds factor times a panel's `sum` over tokens to its dhidden. If at_target is not null, `sum`
// lacks the targets, which are added.
template <class T>
void write_dhidden(const Part& part, std::size_t row, std::size_t rows, const float* sum,
                   const float* factor, const float* at_target, float* out) {
  const std::size_t lanes = vecs_of(rows) * kLanes, width = part.width;
  Floats across(lanes * width), target(width);
  for (std::size_t lane = 0; lane < lanes; lane += kLanes)
    to_rows(sum + lane, lanes, width, [&](const float* tile, std::size_t d, std::size_t n) {
      for (std::size_t i = 0; i < kLanes; ++i)
        std::copy_n(tile + i * kLanes, n, across.get() + (lane + i) * width + d);
    });
  for (std::size_t r = 0; r < rows; ++r) {
    const std::int32_t t = part.target(row + r);
    const float* const from = across.get() + r * width;
    float* const to = out + r * width;
    if (factor[r] == 0) continue;
    if (!at_target || at_target[r] == 0) {
      for (std::size_t d = 0; d < width; ++d) to[d] += factor[r] * from[d];
      continue;
    }
    weight_row<T>(part, static_cast<std::size_t>(t), target.get());
    for (std::size_t d = 0; d < width; ++d)
      to[d] += factor[r] * (from[d] + at_target[r] * target[d]);
  }
}

// Zeros the exp_logits of rows that do not count and of lanes without a row: if weight or bias is
// not finite they may be NaN, and NaN times 0 is NaN.
template <class Counts>
inline void clear_exp_logits(const Counts& counts, std::size_t rows, std::size_t tokens,
                             float* exp_logits) {
  const std::size_t lanes = vecs_of(rows) * kLanes;
  for (std::size_t r = 0; r < lanes; ++r)
    if (r >= rows || !counts(r))
      for (std::size_t v = 0; v < tokens; ++v) exp_logits[v * lanes + r] = 0;
}

// Moves the exp_logit of each row's target, if it is among these tokens, to `at_target` and its
// slope to `slope`. Multiplies all other exp_logits by the softcap's slopes.
inline void take_targets(const std::int32_t* targets, std::size_t rows, std::size_t token,
                         std::size_t tokens, float* exp_logits, const float* slopes,
                         float* at_target, float* slope) {
  const std::size_t lanes = vecs_of(rows) * kLanes;
  for (std::size_t r = 0; r < rows; ++r) {
    const std::size_t v = static_cast<std::size_t>(targets[r]) - token;
    if (targets[r] < 0 || v >= tokens) continue;
    at_target[r] = exp_logits[v * lanes + r];
    slope[r] = slopes ? slopes[v * lanes + r] : 1;
    exp_logits[v * lanes + r] = 0;
  }
  for (std::size_t i = 0; slopes && i < tokens * lanes; i += kLanes)
    (Vec::load(exp_logits + i) * Vec::load(slopes + i)).store(exp_logits + i);
}

template <class T>
void backward(const Part& part, Span rows, Span tokens, std::size_t room, const RowGradients& in,
              const Gradients& out) {
  const std::size_t width = part.width;
  const T* const hidden = static_cast<const T*>(part.hidden);
  // Rows of weight and dweight share the cache with the panel, its exp_logits and its gradients.
  const std::size_t block = block_of(kBlockFloats / 2, width, tokens.size());
  const std::size_t slices = (width + kPanel - 1) / kPanel;
  const std::size_t chunk = chunk_of(rows, tokens, block, room, width);
  Weight<T> weight(part, block);
  Floats panels(chunk * kPanel * width), sums(out.hidden ? chunk * kPanel * width : 0);
  Floats along(out.weight ? chunk * kPanel * slices * kPanel : 0);
  Floats exp_logits(block * kPanel), slopes(part.softcap > 0 ? block * kPanel : 0);
  States states(chunk, kNothing);
  std::vector<float> factor(chunk * kPanel), whole(chunk * kPanel), slope(chunk * kPanel);
  std::vector<std::int32_t> targets(chunk * kPanel);
  for (std::size_t row = rows.begin; row < rows.end; row += chunk * kPanel) {
    const std::size_t here = std::min(chunk * kPanel, rows.end - row);
    const auto rows_in = [&](std::size_t p) { return std::min(kPanel, here - p * kPanel); };
    const std::size_t count = (here + kPanel - 1) / kPanel;
    states.reset();
    if (out.hidden) std::fill_n(sums.get(), count * kPanel * width, 0.F);
    for (std::size_t p = 0; p < count; ++p) {
      const std::size_t first = row + p * kPanel;
      const Lanes state = states.panel(p);
      std::fill_n(state.shift, kPanel, -kLowest);  // a lane without a row has exp_logits of 0
      for (std::size_t r = 0; r < rows_in(p); ++r) {
        const std::size_t i = p * kPanel + r;
        targets[i] = in.counts(part, first + r) ? part.target(first + r) : -1;
        factor[i] = targets[i] >= 0 ? in.upstream[first + r] * part.scale : 0;
        if (targets[i] < 0) continue;
        // The shift is rounded: the exp_logits of a row add up to 2^(lse - shift), not to 1.
        const double lse = in.lse[first + r];
        state.shift[r] = static_cast<float>(lse);
        whole[i] = static_cast<float>(std::exp2(lse - state.shift[r]));
        factor[i] /= whole[i];
      }
      pack_panel(
          [&](std::size_t r) {
            return targets[p * kPanel + r] >= 0 ? hidden + (first + r) * width : nullptr;
          },
          rows_in(p), width, panels.get() + p * kPanel * width);
      if (out.weight)
        pack_hidden(hidden + first * width, rows_in(p), width, factor.data() + p * kPanel,
                    along.get() + p * kPanel * slices * kPanel);
    }
    for (std::size_t token = tokens.begin; token < tokens.end; token += block) {
      const Span span = {token, std::min(tokens.end, token + block)};
      const Rows w = weight.rows(span);
      for (std::size_t p = 0; p < count; ++p) {
        const std::size_t vecs = vecs_of(rows_in(p)), lanes = vecs * kLanes;
        const Lanes state = states.panel(p);
        float* const sum = out.hidden ? sums.get() + p * kPanel * width : nullptr;
        for (std::size_t v = 0; v < span.size(); v += kNear) {
          const std::size_t near = std::min(kNear, span.size() - v);
          float* const g = exp_logits.get() + v * lanes;
          float* const bends = part.softcap > 0 ? slopes.get() + v * lanes : nullptr;
          const Rows w_near = {w.at(v), w.stride};
          walk<kNothing, true>(part, w_near, near, panels.get() + p * kPanel * width, vecs,
                               part.bias ? part.bias + token + v : nullptr, token + v, state,
                               {g, 0, nullptr, 0}, bends);
          const std::int32_t* const target = targets.data() + p * kPanel;
          take_targets(target, rows_in(p), token + v, near, g, bends, state.at_target,
                       slope.data() + p * kPanel);
          clear_exp_logits([&](std::size_t r) { return target[r] >= 0; }, rows_in(p), near, g);
          // p - 1 before it is scaled: where p is nearly 1, the difference is exact.
          for (std::size_t r = 0; r < rows_in(p); ++r)
            if (target[r] >= 0 && static_cast<std::size_t>(target[r]) - (token + v) < near)
              g[(static_cast<std::size_t>(target[r]) - token - v) * lanes + r] =
                  (state.at_target[r] - whole[p * kPanel + r]) * slope[p * kPanel + r];
          if (sum)
            with_vecs(vecs, [&](auto j) {
              add_dhidden<decltype(j)::value>(w_near, near, g, width, sum);
            });
        }
        add_token_gradients({{exp_logits.get(), along.get() + p * kPanel * slices * kPanel,
                              factor.data() + p * kPanel, rows_in(p)}},
                            span.size(), width, false,
                            out.weight ? out.weight + token * width : nullptr,
                            out.bias ? out.bias + token : nullptr);
      }
    }
    for (std::size_t p = 0; out.hidden && p < count; ++p)
      write_dhidden<T>(part, row + p * kPanel, rows_in(p), sums.get() + p * kPanel * width,
                       factor.data() + p * kPanel, nullptr,
                       out.hidden + (row - rows.begin + p * kPanel) * width);
  }
}

// Walks some panels of rows over a span of tokens, before totals over all tokens are known: keeps
// exp_logits and their sums for dhidden, panel after panel.
template <class T>
void ahead_walk(const Part& part, std::size_t row, std::size_t rows, Span tokens, bool hidden_too,
                Ahead& a) {
  const std::size_t width = part.width, panels = (rows + kPanel - 1) / kPanel;
  const T* const hidden = static_cast<const T*>(part.hidden);
  Weight<T> weight(part, kNear);
  Floats packed(panels * kPanel * width), scratch(kPanel * width);
  alignas(64) float slopes[kNear * kPanel];
  States states(panels, kNothing);
  states.reset();
  std::vector<std::int32_t> targets(rows);
  for (std::size_t r = 0; r < rows; ++r) targets[r] = part.target(row + r);
  std::fill_n(a.target, rows, std::numeric_limits<float>::quiet_NaN());
  if (hidden_too) std::fill_n(a.dhidden, panels * kPanel * width, 0.F);
  // Calls f(panel, first row, number of rows, place in `packed` and dhidden).
  const auto for_each_panel = [&](const auto& f) {
    for (std::size_t p = 0; p < panels; ++p)
      f(p, p * kPanel, std::min(kPanel, rows - p * kPanel), p * kPanel * width);
  };
  for_each_panel([&](std::size_t p, std::size_t first, std::size_t count, std::size_t at) {
    float* const panel = packed.get() + at;
    pack_panel([&](std::size_t r) { return hidden + (row + first + r) * width; }, count, width,
               panel);
    targets_of<T>(part, tokens, row + first, count, panel, scratch, a.target + first);
    begin_panel(part, tokens, row + first, count, panel, a.target + first, states.panel(p));
  });
  for (std::size_t token = tokens.begin; token < tokens.end; token += kNear) {
    const Span span = {token, std::min(tokens.end, token + kNear)};
    const Rows w = weight.rows(span);
    const std::size_t done = token - tokens.begin;
    float* const bends = part.softcap > 0 ? slopes : nullptr;
    for_each_panel([&](std::size_t p, std::size_t first, std::size_t count, std::size_t at) {
      const std::size_t vecs = vecs_of(count);
      const Lanes state = states.panel(p);
      float* const exp_logits = a.exp_logits + first * tokens.size();
      float* const g = exp_logits + done * vecs * kLanes;
      float* const dhidden = hidden_too ? a.dhidden + at : nullptr;
      walk<kNothing, true>(part, w, span.size(), packed.get() + at, vecs,
                           part.bias ? part.bias + token : nullptr, token, state,
                           {exp_logits, done, dhidden, width}, bends);
      take_targets(targets.data() + first, count, token, span.size(), g, bends, state.at_target,
                   a.slope + first);
      if (dhidden)
        with_vecs(vecs, [&](auto j) {
          add_dhidden<decltype(j)::value>(w, span.size(), g, width, dhidden);
        });
    });
  }
  for_each_panel([&](std::size_t p, std::size_t first, std::size_t count, std::size_t) {
    const Lanes state = states.panel(p);
    fold(state, false);
    std::copy_n(state.shift, count, a.shift + first);
    std::copy_n(state.all.sum, count, a.sum + first);
    std::copy_n(state.at_target, count, a.at_target + first);
  });
}

// dweight and dbias of a span of tokens from the exp_logits of ahead_walk. a.at_target is the
// target's exp_logit less its total, times its slope; factor is 0 for a row that does not count.
template <class T>
void ahead_tokens(const Part& part, std::size_t row, std::size_t rows, Span tokens,
                  const float* factor, const Ahead& a, bool write, const Gradients& out) {
  const std::size_t width = part.width, panels = (rows + kPanel - 1) / kPanel;
  const std::size_t slices = (width + kPanel - 1) / kPanel, apart = kPanel * slices * kPanel;
  const T* const hidden = static_cast<const T*>(part.hidden);
  Floats along(out.weight ? panels * apart : 0);
  std::vector<Made> made(panels);
  for (std::size_t p = 0; p < panels; ++p) {
    const std::size_t first = p * kPanel, count = std::min(kPanel, rows - first);
    const std::size_t lanes = vecs_of(count) * kLanes;
    float* const exp_logits = a.exp_logits + first * tokens.size();
    float* const packed = along.get() + p * apart;
    made[p] = {exp_logits, packed, factor + first, count};
    clear_exp_logits([&](std::size_t r) { return factor[first + r] != 0; }, count, tokens.size(),
                 exp_logits);
    for (std::size_t r = 0; r < count; ++r)
      if (factor[first + r] != 0 && is_inside(part, tokens, row + first + r)) {
        const auto target = static_cast<std::size_t>(part.target(row + first + r));
        exp_logits[(target - tokens.begin) * lanes + r] = a.at_target[first + r];
      }
    if (out.weight)
      pack_hidden(hidden + (row + first) * width, count, width, factor + first, packed);
  }
  add_token_gradients(made, tokens.size(), width, write,
                      out.weight ? out.weight + tokens.begin * width : nullptr,
                      out.bias ? out.bias + tokens.begin : nullptr);
}

}  // namespace
}  // namespace fastmem
