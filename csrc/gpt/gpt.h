// GPT-2 on the CPU: bits per token and their gradients, of E models of one shape at once, without
// autograd and without logits. No Python, no state; the caller owns the memory and checks the
// limits written here. The same arguments, `threads` and instruction set give the same bytes.
//
// A model is what fastmem.GPT computes: token and position embedding, layers of attention and of a
// four times wider tanh GELU, each behind a LayerNorm and added to what came in, a last LayerNorm,
// and the token embedding again as output matrix. Its P parameters lie one after another in the
// order of GPT.named_parameters().
#pragma once

#include <cstddef>
#include <cstdint>

#include "shared/isa.h"

namespace fastmem {

struct Gpt {
  std::size_t models, batch, time;  // E, B >= 1, and T from 1 to 2^15 inputs a sequence
  std::size_t layers, width, heads, vocab, length;  // L and D to 2^16, a divisor of D, V, S >= T
  const float* parameters;                          // (E, P)
  const std::int64_t* tokens;  // (E, B, T + 1) in [0, V): inputs, each with the next as target

  std::size_t parameter_count() const {
    return (vocab + length + 2) * width + layers * (12 * width + 13) * width;
  }
};

// Writes what each token after the first costs.
// Allocates for each thread what one panel (some 64 tokens) is in a layer.
void gpt_bits(const Gpt& problem, std::size_t threads, Isa isa, float* bits /* (E, B, T) */);

// Writes the mean of these bits for each model, and overwrites its gradient.
// Allocates for each thread the activations of up to 1024 tokens, at most 16 MiB of them where a
// panel is less (14 D floats a token and layer, and T / 2 floats a token, head and layer), a
// gradient of each model that it shares with another thread or of one, and one more of the
// embedding.
void gpt_gradients(const Gpt& problem, std::size_t threads, Isa isa, double* losses /* (E,) */,
                   float* gradients /* (E, P) */);

}  // namespace fastmem
