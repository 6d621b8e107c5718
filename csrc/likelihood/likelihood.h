// Fused linear log-likelihood on the CPU, forward and backward: logits exist a tile at a time, in
// the first-level cache. No Python, no state; the caller owns the memory and checks the limits
// written here. The same arguments, `threads` and instruction set give the same bytes.
//
//   bits[n] = log2(sum_v 2^z[n, v]) - z[n, targets[n]],
//   z = log2(e) / temperature * squash(hidden @ weight^T + bias), squash(x) = softcap tanh(x / softcap)
//
// z may be up to 2^30 in size, past which its rounding alone is tens of bits, or any below the others.
// E models, N rows, D width, V vocabulary. A panel is up to 48 rows. What a function allocates is
// written with it; all of them copy bias (E x V) too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "shared/isa.h"

namespace fastmem {

struct Likelihood {
  std::size_t models, rows, width, vocab;  // E, N >= 0, D >= 1, 1 <= V < 2^31
  const void* hidden;                      // (E, N, D) float, or floats' upper halves (bfloat16)
  const void* weight;                      // (E, V, D) of the same type
  bool bfloat16;
  const std::int64_t* targets;  // (E, N): any value; outside [0, V) it gives NaN bits
  const float* bias;            // (E, V) or null
  float softcap;                // above 0, or 0 for none
  float temperature;            // above 0
  std::int64_t ignore_index;    // a target of this value costs 0 bits and has no gradient
};

// What else one walk over the vocabulary finds, of p = 2^z / sum(2^z): each (E, N), or null. Defined
// for ignored rows and for those whose target is outside too, except that neither is greedy.
struct Statistics {
  float* entropy;        // -sum p log2 p
  float* second_moment;  // sum p (log2 p)^2
  float* lse;            // log2(sum(2^z)), of all that z is
  bool* greedy;          // no token has a greater z than the target, and none before it an equal one
};

// Writes bits (at least 0) and `lse`, the log-sum-exp in base 2 that the backward pass needs. lse is
// of logits less what all logits of a row have in common (see Centred in likelihood.cpp).
// A row that is not finite gives NaN for itself alone, and is not greedy.
// Allocates 4 MiB of rows for all threads together, but at least two panels for each; for each, up
// to 512 KiB of weight, and up to 28 bytes a row where threads share tokens (N < V).
void token_bits(const Likelihood& problem, std::size_t threads, Isa isa, float* bits /* (E, N) */,
                double* lse /* (E, N) */, const Statistics& statistics = {});

// Overwrites the gradients of sum(upstream * bits); each may be null. A row whose bits are NaN,
// because its hidden state is not finite or its target is outside [0, V), gets NaN in dhidden, or 0
// if its upstream is 0, and adds nothing to dweight and dbias; an ignored row gets 0 and adds nothing.
// Allocates thrice token_bits' rows, and for each thread 256 KiB of weight and those tokens' powers of
// a panel. Beside the caller's gradients each further thread has a dweight of up to 8 MiB of its own,
// or, where tokens are shared, all threads have 16 MiB of dhidden (or a panel each).
void token_bits_backward(const Likelihood& problem, const float* upstream /* (E, N) */,
                         const double* lse /* (E, N) */, std::size_t threads, Isa isa,
                         float* dhidden /* (E, N, D) */, float* dweight /* (E, V, D) */,
                         float* dbias /* (E, V) */);

// Both at once for upstream = 1: a quarter less to multiply and half the exponentials. Powers, a float
// for each row and token, exist until a panel is finished: in each thread, which has a dweight of up
// to 8 MiB of its own, where the vocabulary is short; else once, for two panels together, whose tokens
// are shared out, with four panels and a dhidden of two for each thread.
void token_bits_and_gradients(const Likelihood& problem, std::size_t threads, Isa isa, float* bits,
                              double* lse, float* dhidden, float* dweight, float* dbias);

}  // namespace fastmem
