// The loops of gpt/part.h for one instruction set: shared/loops_<isa>.cpp includes this file.

#include "gpt/attention.h"
#include "gpt/part.h"

namespace fastmem {
namespace {

// Activations that a layer keeps of a panel: rows of `lanes` floats.
struct Layer {
  Layer(const Net& net, float* at) {
    const auto rows = [&](std::size_t n) {
      float* const here = at;
      at += n * net.lanes;
      return here;
    };
    attention_normal = rows(net.width);
    attention_scale = rows(1);
    qkv = rows(3 * net.width);
    inverse = rows(net.heads);
    mixed = rows(net.width);
    gelu_normal = rows(net.width);
    gelu_scale = rows(1);
    wide = rows(4 * net.width);
    slope = rows(4 * net.width);
    exp_logits = at;
  }

  // LayerNorm before its weight and bias, and one over the deviation.
  float *attention_normal, *attention_scale;
  float *qkv, *exp_logits, *inverse, *mixed;
  float *gelu_normal, *gelu_scale;
  float *wide, *slope;  // gelu(x), gelu'(x)
};

inline float* kept_layer(const Net& net, const GptPanel& panel, std::size_t l) {
  return panel.kept + l * net.layer_apart;
}

// Calls f(sequence, t, n, lane) for tokens t, …, t + n - 1 (n <= kLanes), sequence by sequence.
template <class F>
FASTMEM_INLINE void for_tokens(const Net& net, const GptPanel& panel, const F& f) {
  for (std::size_t s = 0; s < panel.sequences; ++s)
    for (std::size_t t = 0; t < net.time; t += kLanes)
      f(s, t, std::min(kLanes, net.time - t), s * net.apart + t);
}

inline std::size_t token_at(const Net& net, const GptPanel& panel, std::size_t s, std::size_t t) {
  return static_cast<std::size_t>(panel.tokens[s * (net.time + 1) + t]);
}

// x (D, lanes) = token and position embedding.
inline void embed(const Net& net, const GptPanel& panel, float* x) {
  const float* const position = panel.parameters + net.positions().at;
  std::fill_n(x, net.width * net.lanes, 0.F);
  for_tokens(net, panel, [&](std::size_t s, std::size_t t, std::size_t n, std::size_t lane) {
    const float *row[kLanes] = {}, *at[kLanes] = {};
    for (std::size_t i = 0; i < n; ++i) {
      row[i] = panel.parameters + net.embedding().at + token_at(net, panel, s, t + i) * net.width;
      at[i] = position + (t + i) * net.width;
    }
    to_lanes(
        [&](std::size_t i, std::size_t d) {
          return row[i] ? Vec::load_anywhere(row[i] + d) + Vec::load_anywhere(at[i] + d)
                        : Vec::all(0);
        },
        [&](std::size_t i, std::size_t d) { return row[i] ? row[i][d] + at[i][d] : 0; }, net.width,
        x + lane, net.lanes);
  });
}

// normal = (x - mean) / deviation, out = weight * normal + bias.
inline void layer_norm(const Net& net, const GptPanel& panel, const GptTensor& weight,
                       const GptTensor& bias, const float* x, float* normal, float* scale,
                       float* out) {
  const float* const w = panel.parameters + weight.at;
  const float* const b = panel.parameters + bias.at;
  const Vec one_over_width = Vec::all(1 / static_cast<float>(net.width));
  for (std::size_t lane = 0; lane < net.lanes; lane += kLanes) {
    Vec mean = Vec::all(0), square = Vec::all(0);
    for (std::size_t d = 0; d < net.width; ++d) mean = mean + Vec::load(x + d * net.lanes + lane);
    mean = mean * one_over_width;
    for (std::size_t d = 0; d < net.width; ++d) {
      const Vec off = Vec::load(x + d * net.lanes + lane) - mean;
      square = fma(off, off, square);
    }
    const Vec one_over = Vec::all(1) / sqrt(fma(square, one_over_width, Vec::all(1e-5F)));
    one_over.store(scale + lane);
    for (std::size_t d = 0; d < net.width; ++d) {
      const Vec n = (Vec::load(x + d * net.lanes + lane) - mean) * one_over;
      n.store(normal + d * net.lanes + lane);
      fma(n, Vec::all(w[d]), Vec::all(b[d])).store(out + d * net.lanes + lane);
    }
  }
}

// The result of layer_norm, from its `normal`.
inline void layer_norm_again(const Net& net, const GptPanel& panel, const GptTensor& weight,
                             const GptTensor& bias, const float* normal, float* out) {
  for (std::size_t d = 0; d < net.width; ++d) {
    const Vec w = Vec::all(panel.parameters[weight.at + d]);
    const Vec b = Vec::all(panel.parameters[bias.at + d]);
    for (std::size_t lane = d * net.lanes; lane < (d + 1) * net.lanes; lane += kLanes)
      fma(Vec::load(normal + lane), w, b).store(out + lane);
  }
}

// dx += gradient of layer_norm's x; sums += gradients of its weight and bias.
inline void layer_norm_back(const Net& net, const GptPanel& panel, const GptTensor& weight,
                            const GptTensor& bias, const float* normal, const float* scale,
                            const float* dout, float* dx, float* sums) {
  const float* const w = panel.parameters + weight.at;
  const Vec one_over_width = Vec::all(1 / static_cast<float>(net.width));
  for (std::size_t lane = 0; lane < net.lanes; lane += kLanes) {
    Vec mean = Vec::all(0), along = Vec::all(0);
    for (std::size_t d = 0; d < net.width; ++d) {
      const std::size_t at = d * net.lanes + lane;
      const Vec g = Vec::load(dout + at) * Vec::all(w[d]);
      mean = mean + g;
      along = fma(g, Vec::load(normal + at), along);
    }
    mean = mean * one_over_width;
    along = along * one_over_width;
    const Vec one_over = Vec::load(scale + lane);
    for (std::size_t d = 0; d < net.width; ++d) {
      const std::size_t at = d * net.lanes + lane;
      const Vec g = Vec::load(dout + at) * Vec::all(w[d]) - mean;
      const Vec rest = g - Vec::load(normal + at) * along;
      fma(rest, one_over, Vec::load(dx + at)).store(dx + at);
    }
  }
  for (std::size_t d = 0; d < net.width; ++d) {
    float* const to = sums + weight.sum_at + d * kLanes;
    Vec sum = Vec::load(to);
    for (std::size_t at = d * net.lanes; at < (d + 1) * net.lanes; at += kLanes)
      sum = fma(Vec::load(dout + at), Vec::load(normal + at), sum);
    sum.store(to);
  }
  add_lanes_of(dout, net.width, net.lanes, sums + bias.sum_at);
}

// tanh GELU as u times a logistic function; stores its slope.
inline Vec gelu(Vec u, float* slope) {
  constexpr float kInner = 1.5957691216057308F, kCube = 0.044715F;  // 2 sqrt(2 / pi)
  const Vec uu = u * u;
  const Vec inner = u * fma(uu, Vec::all(kInner * kCube), Vec::all(kInner));
  const Vec logistic = Vec::all(1) / (Vec::all(1) + exp2(inner * Vec::all(-kLog2E)));
  const Vec value = u * logistic;
  const Vec inner_slope = fma(uu, Vec::all(3 * kInner * kCube), Vec::all(kInner));
  fma(value * inner_slope, Vec::all(1) - logistic, logistic).store(slope);
  return value;
}

inline void forward(const Net& net, const GptPanel& panel, float* hidden) {
  const std::size_t lanes = net.lanes;
  float* const x = panel.scratch;
  float* const y = x + net.width * lanes;
  const auto add_to_x = [&](std::size_t row, std::size_t j, Vec sum) {
    float* const to = x + row * lanes + j * kLanes;
    (Vec::load(to) + sum).store(to);
  };
  embed(net, panel, x);
  for (std::size_t l = 0; l < net.layers; ++l) {
    const Layer kept(net, kept_layer(net, panel, l));
    const auto part = [&](LayerPart p) -> const GptTensor& { return net.layer(l, p); };
    layer_norm(net, panel, part(kAttentionNorm), part(kAttentionNormBias), x, kept.attention_normal,
               kept.attention_scale, y);
    linear(net, panel.parameters, part(kQkv), part(kQkvBias), y,
           [&](std::size_t row, std::size_t j, Vec sum) {
             sum.store(kept.qkv + row * lanes + j * kLanes);
           });
    attend(net, kept.qkv, kept.exp_logits, kept.inverse, kept.mixed);
    linear(net, panel.parameters, part(kOutProj), part(kOutProjBias), kept.mixed, add_to_x);
    layer_norm(net, panel, part(kGeluNorm), part(kGeluNormBias), x, kept.gelu_normal,
               kept.gelu_scale, y);
    linear(net, panel.parameters, part(kUpProj), part(kUpProjBias), y,
           [&](std::size_t row, std::size_t j, Vec sum) {
             const std::size_t at = row * lanes + j * kLanes;
             gelu(sum, kept.slope + at).store(kept.wide + at);
           });
    linear(net, panel.parameters, part(kDownProj), part(kDownProjBias), kept.wide, add_to_x);
  }
  float* const normal = kept_layer(net, panel, net.layers);
  layer_norm(net, panel, net.norm(), net.norm_bias(), x, normal, normal + net.width * lanes, y);
  for_tokens(net, panel, [&](std::size_t s, std::size_t t, std::size_t n, std::size_t lane) {
    float* const out = hidden + (s * net.time + t) * net.width;
    to_rows(y + lane, lanes, net.width, [&](const float* tile, std::size_t d, std::size_t some) {
      for (std::size_t i = 0; i < n; ++i)
        std::copy_n(tile + i * kLanes, some, out + i * net.width + d);
    });
  });
}

// sums += gradients of both embeddings, given the gradient of their sum.
inline void embed_back(const Net& net, const GptPanel& panel, const float* dx, float* sums) {
  float* const positions = sums + net.positions().sum_at;
  for_tokens(net, panel, [&](std::size_t s, std::size_t t, std::size_t n, std::size_t lane) {
    to_rows(dx + lane, net.lanes, net.width, [&](const float* g, std::size_t d, std::size_t some) {
      for (std::size_t i = 0; i < n; ++i, g += kLanes) {
        float* const row =
            sums + net.embedding().sum_at + token_at(net, panel, s, t + i) * net.width + d;
        float* const position = positions + (t + i) * net.positions().stride + d;
        for (std::size_t c = 0; c < some; ++c) {
          row[c] += g[c];
          position[c] += g[c];
        }
      }
    });
  });
}

inline void backward(const Net& net, const GptPanel& panel, const float* dhidden, float* sums) {
  const std::size_t lanes = net.lanes, D = net.width;
  float* const dx = panel.scratch;
  float* const y = dx + D * lanes;
  float* const dy = y + D * lanes;
  float* const dwide = dy + D * lanes;  // of qkv too
  float* const scores = dwide + 4 * D * lanes;
  float* const tile = scores + net.time * kLanes;
  float* const across = tile + kLanes * kLanes;
  const auto to = [&](float* out) {
    return [=](std::size_t row, std::size_t j, Vec sum) {
      sum.store(out + row * lanes + j * kLanes);
    };
  };

  std::fill_n(dy, D * lanes, 0.F);
  for_tokens(net, panel, [&](std::size_t s, std::size_t t, std::size_t n, std::size_t lane) {
    const float* const in = dhidden + (s * net.time + t) * D;
    to_lanes(
        [&](std::size_t i, std::size_t d) {
          return i < n ? Vec::load_anywhere(in + i * D + d) : Vec::all(0);
        },
        [&](std::size_t i, std::size_t d) { return i < n ? in[i * D + d] : 0; }, D, dy + lane,
        lanes);
  });
  std::fill_n(dx, D * lanes, 0.F);
  const float* const normal = kept_layer(net, panel, net.layers);
  layer_norm_back(net, panel, net.norm(), net.norm_bias(), normal, normal + D * lanes, dy, dx,
                  sums);

  for (std::size_t l = net.layers; l-- > 0;) {
    const Layer kept(net, kept_layer(net, panel, l));
    const auto part = [&](LayerPart p) -> const GptTensor& { return net.layer(l, p); };
    linear_gradients(net, part(kDownProj), part(kDownProjBias), dx, kept.wide, across, sums);
    linear_back(net, panel.parameters, part(kDownProj), dx,
                [&](std::size_t row, std::size_t j, Vec sum) {
                  const std::size_t at = row * lanes + j * kLanes;
                  (sum * Vec::load(kept.slope + at)).store(dwide + at);
                });
    layer_norm_again(net, panel, part(kGeluNorm), part(kGeluNormBias), kept.gelu_normal, y);
    linear_gradients(net, part(kUpProj), part(kUpProjBias), dwide, y, across, sums);
    linear_back(net, panel.parameters, part(kUpProj), dwide, to(dy));
    layer_norm_back(net, panel, part(kGeluNorm), part(kGeluNormBias), kept.gelu_normal,
                    kept.gelu_scale, dy, dx, sums);

    linear_gradients(net, part(kOutProj), part(kOutProjBias), dx, kept.mixed, across, sums);
    linear_back(net, panel.parameters, part(kOutProj), dx, to(dy));
    attend_back(net, kept.qkv, kept.exp_logits, kept.inverse, kept.mixed, dy, dwide, scores, tile);
    layer_norm_again(net, panel, part(kAttentionNorm), part(kAttentionNormBias),
                     kept.attention_normal, y);
    linear_gradients(net, part(kQkv), part(kQkvBias), dwide, y, across, sums);
    linear_back(net, panel.parameters, part(kQkv), dwide, to(dy));
    layer_norm_back(net, panel, part(kAttentionNorm), part(kAttentionNormBias),
                    kept.attention_normal, kept.attention_scale, dy, dx, sums);
  }
  embed_back(net, panel, dx, sums);
}

constexpr GptLoops kGptLoops = {forward, backward, kLanes};

}  // namespace
}  // namespace fastmem
