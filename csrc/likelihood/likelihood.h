// Fused linear log-likelihood on the CPU, forward and backward: one tile of logits exists at a
// time, in the first-level cache. No Python, no state; the caller owns the memory and checks the
// limits written here. The same arguments, `threads` and instruction set give the same bytes.
//
//   bits[n] = log2(sum_v 2^z[n, v]) - z[n, targets[n]],
//   z = log2(e) / temperature * squash(hidden @ weight^T + bias),
//   squash(x) = softcap tanh(x / softcap)
//
// The greatest z of a row lies within ±2^30: beyond, rounding alone costs tens of bits. Every other
// z of the row may be lower, down to -inf.
// E models, N rows, D width, V vocabulary. A panel is up to 48 rows. Each function states what it
// allocates besides a copy of bias (E x V).
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
  const std::int64_t* targets;  // (E, N); a target outside [0, V) gives NaN bits
  const float* bias;            // (E, V) or null
  float softcap;                // above 0, or 0 for none
  float temperature;            // above 0
  std::int64_t ignore_index;    // a target of this value costs 0 bits and has no gradient
};

// Statistics of p = 2^z / sum(2^z) from one walk over the vocabulary: each (E, N), or null. A row
// with an ignored target or one outside [0, V) has them too, and is not greedy.
struct Statistics {
  float* entropy;   // -sum p log2 p
  float* variance;  // sum p (log2 p + entropy)^2
  float* lse;       // log2(sum(2^z)), of logits that are not centred
  bool* greedy;     // the target is the first token with the greatest z
};

// Writes bits (at least 0) and `lse`, the log-sum-exp in base 2 for the backward pass, of centred
// logits (see Centred in centred.h). A row that is not finite gives NaN in this row alone, and is
// not greedy. Allocates 4 MiB of rows for all threads together, but at least two panels for each
// thread; for each thread up to 512 KiB of weight, and up to 28 bytes a row if threads share tokens
// (N < V).
void token_bits(const Likelihood& problem, std::size_t threads, Isa isa, float* bits /* (E, N) */,
                double* lse /* (E, N) */, const Statistics& statistics = {});

// Overwrites the gradients of sum(upstream * bits); each may be null. A row of NaN bits, from a
// hidden state that is not finite or a target outside [0, V), gets NaN in dhidden, or 0 if its
// upstream is 0, and adds nothing to dweight and dbias; an ignored row gets 0 and adds nothing.
// Allocates three times the rows of token_bits, and for each thread 256 KiB of weight and the
// exp_logits of these tokens and a panel. Each thread after the first has its own dweight of up to
// 8 MiB or, if threads share tokens, all threads together have 16 MiB of dhidden (or a panel each).
void token_bits_backward(const Likelihood& problem, const float* upstream /* (E, N) */,
                         const double* lse /* (E, N) */, std::size_t threads, Isa isa,
                         float* dhidden /* (E, N, D) */, float* dweight /* (E, V, D) */,
                         float* dbias /* (E, V) */);

// Both passes at once for upstream = 1: a quarter fewer multiplications, half the exponentials. It
// keeps exp_logits, a float for each row and token, until a panel is finished. If the vocabulary is
// short, each thread keeps a panel's exp_logits and has its own dweight of up to 8 MiB. Else the
// threads share the tokens of two panels, and each has four panels and the dhidden of two.
void token_bits_and_gradients(const Likelihood& problem, std::size_t threads, Isa isa, float* bits,
                              double* lse, float* dhidden, float* dweight, float* dbias);

}  // namespace fastmem
