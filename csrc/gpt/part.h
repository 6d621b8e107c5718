// What gpt.cpp, which shares the work out, and the loops of each instruction set agree on.
//
// A panel is some whole sequences whose tokens lie in lanes: a row of it is one feature of all of
// them, a token each lane, and each sequence begins at a vector. Lanes after its last token hold
// what is finite and has no gradient.
#pragma once

#include "gpt/gpt.h"
#include "likelihood/part.h"

namespace fastmem {

// The parameters of a layer, in their order.
enum LayerPart {
  kAttentionNorm,
  kAttentionNormBias,
  kAttend,
  kAttendBias,
  kProject,
  kProjectBias,
  kGeluNorm,
  kGeluNormBias,
  kWiden,
  kWidenBias,
  kShrink,
  kShrinkBias,
  kLayerParts
};

// One of the P parameters' tensors, and the thread's sum of its gradients: a matrix whose rows
// begin at vectors, or, of what has one number a row, a vector a row, to be added up when all is
// done.
struct GptTensor {
  std::size_t rows, columns;
  std::size_t at;      // in the parameters
  std::size_t sum_at;  // in the sums
  std::size_t stride;  // of the sums' rows
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
  std::size_t sequences, apart;  // of a panel: how many, and lanes from one to the next
  std::size_t lanes;             // of a panel
  std::size_t layer_apart;       // from what is kept of a layer to that of the next, 0 if it is not
  std::size_t panel_floats;      // of all that is kept of a panel
  std::size_t forward_floats, backward_floats;
  std::vector<GptTensor> tensors;
  std::size_t sum_floats = 0;
};

// What a thread works with. `tokens` are of `sequences` sequences, T + 1 apart.
struct GptPanel {
  const float* parameters;
  const std::int64_t* tokens;
  std::size_t sequences;
  float* kept;     // panel_floats, of the forward pass for the backward pass
  float* scratch;  // forward_floats or backward_floats
};

struct GptLoops {
  // Writes the hidden states, (sequences, T, D).
  void (*forward)(const Net&, const GptPanel&, float* hidden);
  // Adds the gradients to `sums`, given those of the hidden states.
  void (*backward)(const Net&, const GptPanel&, const float* dhidden, float* sums);
  std::size_t lanes;
};

extern const GptLoops kPortableGpt, kAvx2Gpt, kAvx512Gpt;

}  // namespace fastmem
