// Causal attention over a panel: queries lie in lanes, and a softmax never crosses lanes.

#include "gpt/products.h"

namespace fastmem {
namespace {

constexpr float kLog2E = 1.4426950408889634F;

// One head of one sequence: where its rows begin, and its exp_logits: for each vector of queries a
// vector for each key that the last query sees.
struct Head {
  std::size_t query, key, value;  // indices in qkv
  std::size_t mixed, inverse;     // indices in mixed and inverse
  float* exp_logits;
};

inline std::size_t keys_of(const Net& net, std::size_t query) {
  return std::min(net.time, query + kLanes);
}

// Calls f(head) for each head of each sequence.
template <class F>
inline void for_each_head(const Net& net, float* exp_logits, const F& f) {
  const std::size_t depth = net.width / net.heads;
  std::size_t size = 0;
  for (std::size_t query = 0; query < net.apart; query += kLanes)
    size += keys_of(net, query) * kLanes;
  for (std::size_t sequence = 0; sequence < net.sequences; ++sequence)
    for (std::size_t head = 0; head < net.heads; ++head, exp_logits += size) {
      const std::size_t at = head * depth * net.lanes + sequence * net.apart;
      const std::size_t whole = net.width * net.lanes;
      f(Head{at, at + whole, at + 2 * whole, at, head * net.lanes + sequence * net.apart,
             exp_logits});
    }
}

// mixed = softmax(q k^T / sqrt(depth)) v. Keeps the exp_logits of the softmax and, in `inverse`, a
// row for each head, one over their sums.
inline void attend(const Net& net, const float* qkv, float* exp_logits, float* inverse,
                   float* mixed) {
  const std::size_t depth = net.width / net.heads, lanes = net.lanes;
  const Vec scale = Vec::all(kLog2E / std::sqrt(static_cast<float>(depth)));
  alignas(64) float numbers[kLanes];
  for (std::size_t i = 0; i < kLanes; ++i) numbers[i] = static_cast<float>(i);
  const Vec lane = Vec::load(numbers);
  for_each_head(net, exp_logits, [&](const Head& head) {
    float* p = head.exp_logits;
    for (std::size_t query = 0; query < net.apart; query += kLanes) {
      const std::size_t keys = keys_of(net, query);
      narrow_product<false, 1>(qkv + head.key, lanes, keys, qkv + head.query + query, lanes, depth,
                               [&](std::size_t key, std::size_t, Vec score) {
                                 (score * scale).store(p + key * kLanes);
                               });
      for (std::size_t key = query; key < keys; ++key) {
        float* const at = p + key * kLanes;
        const Vec own = Vec::all(static_cast<float>(key - query));
        select_less(lane, own, Vec::all(-kInfinity), Vec::load(at)).store(at);
      }
      Vec top = Vec::load(p);
      for (std::size_t key = 1; key < keys; ++key) top = max(top, Vec::load(p + key * kLanes));
      Vec sum = Vec::all(0);
      for (std::size_t key = 0; key < keys; ++key) {
        const Vec e = exp2(Vec::load(p + key * kLanes) - top);
        e.store(p + key * kLanes);
        sum = sum + e;
      }
      const Vec one_over = Vec::all(1) / sum;
      one_over.store(inverse + head.inverse + query);
      narrow_product<true, 1>(qkv + head.value, lanes, depth, p, kLanes, keys,
                              [&](std::size_t d, std::size_t, Vec out) {
                                (out * one_over).store(mixed + head.mixed + d * lanes + query);
                              });
      p += keys * kLanes;
    }
  });
}

// rows (depth, keys) += of (depth, queries) @ in^T, for `in` (keys, kLanes): a sum over queries.
// `tile` is room for a transposed tile.
inline void add_over_queries(const Net& net, const float* of, const float* in, std::size_t keys,
                             float* tile, float* rows) {
  const std::size_t depth = net.width / net.heads;
  for (std::size_t key = 0; key < keys; key += kLanes) {
    transpose_tile(in + key * kLanes, kLanes, std::min(kLanes, keys - key), tile, kLanes);
    narrow_product<true, 1>(of, net.lanes, depth, tile, kLanes, kLanes,
                            [&](std::size_t d, std::size_t, Vec sum) {
                              float* const to = rows + d * net.lanes + key;
                              (Vec::load(to) + sum).store(to);
                            });
  }
}

// dqkv from dmixed. Overwrites exp_logits. `scores` is room for T vectors, `tile` for kLanes.
inline void attend_back(const Net& net, const float* qkv, float* exp_logits, const float* inverse,
                        const float* mixed, const float* dmixed, float* dqkv, float* scores,
                        float* tile) {
  const std::size_t depth = net.width / net.heads, lanes = net.lanes;
  const Vec scale = Vec::all(1 / std::sqrt(static_cast<float>(depth)));
  std::fill_n(dqkv + net.width * lanes, 2 * net.width * lanes, 0.F);
  for_each_head(net, exp_logits, [&](const Head& head) {
    float* p = head.exp_logits;
    for (std::size_t query = 0; query < net.apart; query += kLanes) {
      const std::size_t keys = keys_of(net, query);
      const float* const dout = dmixed + head.mixed + query;
      Vec delta = Vec::all(0);
      for (std::size_t d = 0; d < depth; ++d)
        delta = fma(Vec::load(dout + d * lanes),
                    Vec::load(mixed + head.mixed + d * lanes + query), delta);
      const Vec one_over = Vec::load(inverse + head.inverse + query);
      narrow_product<false, 1>(qkv + head.value, lanes, keys, dout, lanes, depth,
                               [&](std::size_t key, std::size_t, Vec dweight) {
                                 const Vec weight = Vec::load(p + key * kLanes) * one_over;
                                 weight.store(p + key * kLanes);
                                 ((dweight - delta) * weight * scale).store(scores + key * kLanes);
                               });
      narrow_product<true, 1>(qkv + head.key, lanes, depth, scores, kLanes, keys,
                              [&](std::size_t d, std::size_t, Vec sum) {
                                sum.store(dqkv + head.query + d * lanes + query);
                              });
      add_over_queries(net, dout, p, keys, tile, dqkv + head.value);
      add_over_queries(net, qkv + head.query + query, scores, keys, tile, dqkv + head.key);
      p += keys * kLanes;
    }
  });
}

}  // namespace
}  // namespace fastmem
