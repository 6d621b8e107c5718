// GPT-2 on the CPU: bits per token and their gradients, of E models of one shape at once, without
// autograd and without all logits in memory. No Python, no state; the caller owns the memory and
// checks the limits written here. The same arguments, `threads` and instruction set give the same
// bytes.
//
// A model computes fastmem.GPT: token and position embeddings, pre-LayerNorm blocks of attention
// and of a four times wider tanh GELU with residual connections, a last LayerNorm, and the token
// embedding as output matrix. Its P parameters lie in the order of GPT.named_parameters().
#pragma once

#include <cstddef>
#include <cstdint>

#include "shared/isa.h"

namespace fastmem {

struct Gpt {
  std::size_t models, batch, time;  // E, B >= 1, and T from 1 to 2^15 inputs a sequence
  std::size_t layers, width, heads, vocab, length;  // L and D to 2^16, a divisor of D, V, S >= T
  const float* parameters;                          // (E, P)
  const std::int64_t* tokens;  // (E, B, T + 1) in [0, V): each input's target is the next token

  std::size_t parameter_count() const {
    return (vocab + length + 2) * width + layers * (12 * width + 13) * width;
  }
};

// Writes the bits of each token after the first. Allocates for each thread the activations of one
// panel (some 64 tokens) in one layer.
void gpt_bits(const Gpt& problem, std::size_t threads, Isa isa, float* bits /* (E, B, T) */);

// Writes the mean bits of each model, and overwrites its gradient. Allocates for each thread the
// activations of up to 1024 tokens, at most 16 MiB or one panel (14 D floats for each token and
// layer, and T / 2 floats for each token, head and layer); a gradient for each model that it shares
// with other threads, and at least one; and one more gradient of the embedding.
void gpt_gradients(const Gpt& problem, std::size_t threads, Isa isa, double* losses /* (E,) */,
                   float* gradients /* (E, P) */);

}  // namespace fastmem
