// Types shared by gpt.cpp, which divides the work, and the loops of each instruction set.
//
// A panel is some whole sequences whose tokens lie in lanes: a row is one feature of all tokens,
// and each sequence begins at a vector. Lanes after its last token hold finite numbers without
// gradient.
#pragma once

#include "gpt/gpt.h"
#include "likelihood/part.h"

namespace fastmem {

// The parameters of a layer, in order.
enum LayerPart {
  kAttentionNorm,
  kAttentionNormBias,
  kQkv,
  kQkvBias,
  kOutProj,
  kOutProjBias,
  kGeluNorm,
  kGeluNormBias,
  kUpProj,
  kUpProjBias,
  kDownProj,
  kDownProjBias,
  kLayerParts
};

// A tensor of parameters, and a thread's sum of its gradients: a matrix whose rows begin at vectors
// or, for a tensor with one column, a vector for each row, whose lanes `join` adds up.
struct GptTensor {
  std::size_t rows, columns;
  std::size_t at;      // index in the parameters
  std::size_t sum_at;  // index in the sums
  std::size_t stride;  // of a row of the sums
};

struct Net {
  Net(const Gpt& problem, std::size_t lanes, bool keep);

  const GptTensor& embedding() const { return tensors[0]; }
  const GptTensor& positions() const { return tensors[1]; }
  const GptTensor& layer(std::size_t l, LayerPart part) const {
    return tensors[2 + l * kLayerParts + part];
  }
  const GptTensor& norm() const { return tensors[tensors.size() - 2]; }
  const GptTensor& norm_bias() const { return tensors[tensors.size() - 1]; }

  std::size_t layers, width, heads, time;
  std::size_t vector;            // lanes of a vector
  std::size_t sequences, apart;  // sequences of a panel, and lanes from one to the next
  std::size_t lanes;             // of a panel
  std::size_t layer_apart;       // floats from a kept layer to the next, 0 if none is kept
  std::size_t panel_floats;      // kept for a panel
  std::size_t forward_floats, backward_floats;
  std::vector<GptTensor> tensors;
  std::size_t sum_floats = 0;
};

// The arguments of the loops. The sequences in `tokens` lie T + 1 apart.
struct GptPanel {
  const float* parameters;
  const std::int64_t* tokens;
  std::size_t sequences;
  float* kept;     // panel_floats, from the forward pass for the backward pass
  float* scratch;  // forward_floats or backward_floats
};

struct GptLoops {
  // Writes the hidden states, (sequences, T, D).
  void (*forward)(const Net&, const GptPanel&, float* hidden);
  // Adds the gradients to `sums`, given the gradients of the hidden states.
  void (*backward)(const Net&, const GptPanel&, const float* dhidden, float* sums);
  std::size_t lanes;
};

extern const GptLoops kPortableGpt, kAvx2Gpt, kAvx512Gpt;

}  // namespace fastmem
