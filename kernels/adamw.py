"""AdamW of E models in two launches: clipping, moments, decay and update of every row.

Computes for each row e of gradients g and weights w, both (E, P), with t the steps so far:

    g *= min(1, clip / (norm(g) + 1e-6))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    w = w - rate * decay * w - rate * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + 1e-8)

The first kernel counts the step and sums the squares of pieces of each row; the second adds the
pieces in one order and updates. Rates and steps are read from device tensors, so that each replay
of a CUDA graph has the current values. Without atomics the same input gives the same bytes; a row
with a number that is not finite changes only itself.

Stochastic rounding adds 16 bits of Philox4x32, of key `seed` and counter (index in the row, step),
below a bfloat16: a run that resumes draws the same bits, without a state.

E models, P weights of a model.

Source: AdamW of arXiv 1711.05101; Philox of Salmon et al., "Parallel random numbers: as easy as 1,
2, 3" (2011), whose seven rounds pass BigCrush.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fastmem.kernels.tiles import cdiv
from torch import Tensor

BLOCK = 1024
"""Weights that a program has at a time."""
MOST_PIECES = 512
"""Pieces of a row in the sum of squares: by P alone, so that no device changes the bytes."""
ROUNDS: tl.constexpr = tl.constexpr(7)
EPSILON: tl.constexpr = tl.constexpr(1e-8)


@dataclass
class Rows:
    """What the update of E rows reads and writes, on their device."""

    weights: Tensor  # (E, P) float32 or bfloat16
    gradients: Tensor  # (E, P) of that dtype
    means: Tensor  # (E, P), moments in float32 or the dtype of the weights
    squares: Tensor  # (E, P)
    rates: Tensor  # (E,) float32
    steps: Tensor  # (E,) float32
    settings: Tensor  # (E, 5) float64: beta1, beta2, decay, clip, factor of the embeddings' rate
    embeddings: int  # the first weights of a row, with their own rate
    trained: Tensor | None = None  # (P,) bool; None if all are trained
    seeds: Tensor | None = None  # (E,) int64; None to round to the nearest


@triton.jit
def norm_kernel(
    gradients_ptr,  # (E, P)
    trained_ptr,  # (P,)
    steps_ptr,  # (E,)
    settings_ptr,  # (E, 5)
    corrections_ptr,  # (E, 2) out: 1 - beta**t of each moment
    sums_ptr,  # (E, pieces) out
    P,
    size,
    HAS_FROZEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    e, piece = tl.program_id(1).to(tl.int64), tl.program_id(0)
    if piece == 0:
        step = tl.load(steps_ptr + e) + 1
        tl.store(steps_ptr + e, step)
        moment = tl.arange(0, 2)
        # float64, as PyTorch: float32 would lose the digits of 1 - 0.99**1.
        power = tl.exp2(step.to(tl.float64) * tl.log2(tl.load(settings_ptr + e * 5 + moment)))
        tl.store(corrections_ptr + e * 2 + moment, (1 - power).to(tl.float32))
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in tl.range(0, size, BLOCK):
        i = piece.to(tl.int64) * size + begin + tl.arange(0, BLOCK)
        mask = i < P
        if HAS_FROZEN:
            mask = mask & tl.load(trained_ptr + i, mask=mask, other=False)
        g = tl.load(gradients_ptr + e * P + i, mask=mask, other=0.0).to(tl.float32)
        total += g * g
    tl.store(sums_ptr + e * tl.num_programs(0) + piece, tl.sum(total))


@triton.jit
def stochastically_rounded(x, seed, step, i):
    """Returns bfloat16 neighbours of x with the probabilities that keep the mean."""
    zero = i.to(tl.uint32) * 0
    low, high = (i & 0xFFFFFFFF).to(tl.uint32), (i >> 32).to(tl.uint32)
    noise, _, _, _ = tl.philox(seed, low, high, zero + step.to(tl.uint32), zero, ROUNDS)
    bits = (x.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)) & 0xFFFF0000
    # The addition would turn some NaN into numbers and hide a divergence.
    finite = tl.abs(x) < float("inf")
    return tl.where(finite, bits.to(tl.float32, bitcast=True), x).to(tl.bfloat16)


@triton.jit
def update_kernel(
    weights_ptr,  # (E, P)
    gradients_ptr,  # (E, P)
    means_ptr,  # (E, P)
    squares_ptr,  # (E, P)
    trained_ptr,  # (P,)
    rates_ptr,  # (E,)
    steps_ptr,  # (E,)
    settings_ptr,  # (E, 5)
    seeds_ptr,  # (E,)
    corrections_ptr,  # (E, 2)
    sums_ptr,  # (E, pieces)
    P,
    pieces,
    embeddings,
    HAS_FROZEN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < P
    if HAS_FROZEN:
        mask = mask & tl.load(trained_ptr + i, mask=mask, other=False)
    at = e * P + i
    w = tl.load(weights_ptr + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gradients_ptr + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(means_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(squares_ptr + at, mask=mask, other=0.0).to(tl.float32)
    settings_ptr += e * 5
    beta1, beta2 = tl.load(settings_ptr), tl.load(settings_ptr + 1)
    decay = tl.load(settings_ptr + 2).to(tl.float32)
    clip = tl.load(settings_ptr + 3).to(tl.float32)
    factor = tl.load(settings_ptr + 4).to(tl.float32)
    correction1 = tl.load(corrections_ptr + e * 2)
    correction2 = tl.load(corrections_ptr + e * 2 + 1)
    piece = tl.arange(0, PIECES)
    sums = tl.load(sums_ptr + e * pieces + piece, mask=piece < pieces, other=0.0)
    scale = clip / (tl.sqrt(tl.sum(sums)) + 1e-6)
    g *= tl.where(scale > 1, 1.0, scale)  # a minimum would lose NaN
    rate = tl.load(rates_ptr + e)
    rates = tl.where(i < embeddings, rate * factor, rate)
    m = beta1.to(tl.float32) * m + (1 - beta1).to(tl.float32) * g
    v = beta2.to(tl.float32) * v + (1 - beta2).to(tl.float32) * (g * g)
    w -= rates * decay * w
    w -= (rates / correction1) * m / (tl.sqrt(v) / tl.sqrt(correction2) + EPSILON)
    tl.store(means_ptr + at, m.to(means_ptr.dtype.element_ty), mask=mask)
    tl.store(squares_ptr + at, v.to(squares_ptr.dtype.element_ty), mask=mask)
    if STOCHASTIC:
        w = stochastically_rounded(w, tl.load(seeds_ptr + e), tl.load(steps_ptr + e), i)
    tl.store(weights_ptr + at, w.to(weights_ptr.dtype.element_ty), mask=mask)


def update(rows: Rows) -> None:
    """One step of each row, counted in rows.steps."""
    E, P = rows.weights.shape
    if rows.weights.numel() == 0:
        return
    size = BLOCK * cdiv(P, BLOCK * MOST_PIECES)
    pieces = cdiv(P, size)
    device = rows.weights.device
    sums = torch.empty((E, pieces), dtype=torch.float32, device=device)
    corrections = torch.empty((E, 2), dtype=torch.float32, device=device)
    grid = (cdiv(P, BLOCK), E)
    frozen = {"HAS_FROZEN": rows.trained is not None, "BLOCK": BLOCK}
    with torch.cuda.device_of(rows.weights):
        norm_kernel[(pieces, E)](
            rows.gradients, rows.trained, rows.steps, rows.settings, corrections, sums, P, size,
            **frozen,
        )  # fmt: skip
        update_kernel[grid](
            rows.weights, rows.gradients, rows.means, rows.squares, rows.trained, rows.rates,
            rows.steps, rows.settings, rows.seeds, corrections, sums, P, pieces, rows.embeddings,
            STOCHASTIC=rows.seeds is not None, PIECES=triton.next_power_of_2(pieces), **frozen,
        )  # fmt: skip
