"""Combines the parts of a walk: writes bits and statistics from its sums, or adds up gradients.

N rows, D width, V vocabulary, E models, S parts of a split vocabulary.
"""

import torch
import triton
import triton.language as tl
from fastmem.kernels.launch import Launch
from fastmem.kernels.logits import capped, target_products
from fastmem.kernels.tiles import cdiv

LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
"""The first peak: below every logit, and finite, so that peak - peak is 0."""
TINY: tl.constexpr = tl.constexpr(2.0**-126)
"""Divides a sum of no columns, whose moments are 0."""


@triton.constexpr_function
def fields_of_a_part(moments, greedy):
    """Fields of a row in a part of a walk: peak, total; first, spread; best, best_column."""
    return 6 if greedy else 4 if moments else 2


@triton.jit
def lowered(total, first, spread, down, MOMENTS: tl.constexpr):
    """Rescales sums of e, e u and e (u - mean)**2, e = 2**u, as every u becomes u + down <= u."""
    if MOMENTS > 0:
        down = tl.maximum(down, -1000.0)  # 2**-1000 is 0 and 0 * 1000 is not NaN
    shrink = tl.exp2(down)
    if MOMENTS > 0:
        first = shrink * (first + down * total)
    if MOMENTS > 1:
        spread = shrink * spread
    return shrink * total, first, spread


@triton.jit
def mean_of(first, total):
    return first / tl.maximum(total, TINY)


@triton.jit
def added(total, first, spread, more_total, more_first, more_spread, MOMENTS: tl.constexpr):
    """Adds sums of other columns, by Chan's formula: no term is negative, so that none cancels."""
    both = total + more_total
    if MOMENTS > 1:
        apart = mean_of(more_first, more_total) - mean_of(first, total)
        spread += more_spread + apart * apart * (total * mean_of(more_total, both))
    if MOMENTS > 0:
        first += more_first
    return both, first, spread


@triton.jit
def finish(
    peak,  # (BLOCK_N,), as the next four
    total,
    first,
    spread,
    best_column,
    first_row,  # of the program, int64
    hidden_ptr,  # of this model, as all pointers
    weight_ptr,
    targets_ptr,
    bias_ptr,
    shift_ptr,
    bits_ptr,
    peak_ptr,
    total_ptr,
    lse_ptr,
    entropy_ptr,
    variance_ptr,
    greedy_ptr,
    scale,
    softcap,
    ignore_index,
    N,
    D,
    V,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_tn,
    stride_bv,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    GREEDY: tl.constexpr,
    LSE: tl.constexpr,
):
    """Computes the target's logit again, which spares the walk selecting it; stores all outputs."""
    BLOCK_N: tl.constexpr = peak.shape[0]
    rows = first_row + tl.arange(0, BLOCK_N)
    stored = rows < N
    safe = tl.minimum(rows, N - 1)
    target = tl.load(targets_ptr + safe * stride_tn).to(tl.int64)
    ignored = target == ignore_index
    inside = (target >= 0) & (target < V)
    column = tl.where(inside, target, 0)
    z = target_products(
        hidden_ptr, weight_ptr, targets_ptr, first_row, N, D, V,
        stride_hn, stride_hd, stride_wv, stride_wd, stride_tn, BLOCK_N, BLOCK_D, EVEN_D,
        SUM, PRECISION,
    )  # fmt: skip
    if HAS_SOFTCAP:
        # In a row that is not finite all products are NaN or infinite; a softcap makes them finite.
        total = tl.where(tl.abs(z) < float("inf"), total, float("nan"))
    shift = 0.0
    if HAS_BIAS:
        shift = tl.load(shift_ptr)
        z += tl.load(bias_ptr + column * stride_bv).to(tl.float32) - shift
    if HAS_SOFTCAP:
        z, _ = capped(z, softcap)
    above = tl.log2(total)
    bits = above + (peak - z * scale)
    bits = tl.where(bits < 0, 0.0, bits)  # unlike maximum, keeps NaN
    bits = tl.where(inside, bits, float("nan"))
    bits = tl.where(ignored, 0.0, bits)
    tl.store(bits_ptr + rows, bits, mask=stored)
    tl.store(peak_ptr + rows, peak, mask=stored)
    tl.store(total_ptr + rows, total, mask=stored)
    if LSE:
        tl.store(lse_ptr + rows, above + (peak + shift * scale), mask=stored)
    if MOMENTS > 0:  # log2 p = u - above, u <= 0 <= above: the terms do not cancel
        tl.store(entropy_ptr + rows, above - first / total, mask=stored)
    if MOMENTS > 1:
        tl.store(variance_ptr + rows, spread / total, mask=stored)
    if GREEDY:
        greedy = (best_column == target) & inside & (ignored == 0) & (total == total)
        tl.store(greedy_ptr + rows, greedy, mask=stored)


@triton.jit
def combine_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    bias_ptr,
    shift_ptr,
    walk_ptr,  # (S, fields, E, N); state_ptr points to the first two fields of the first part
    bits_ptr,
    state_ptr,
    lse_ptr,
    entropy_ptr,
    variance_ptr,
    greedy_ptr,
    scale,
    softcap,
    ignore_index,
    layer,  # E * N
    N,
    D,
    V,
    S,
    stride_he,
    stride_hn,
    stride_hd,
    stride_we,
    stride_wv,
    stride_wd,
    stride_te,
    stride_tn,
    stride_be,
    stride_bv,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    GREEDY: tl.constexpr,
    LSE: tl.constexpr,
):
    """Combines the parts of a split vocabulary, in order."""
    FIELDS: tl.constexpr = fields_of_a_part(MOMENTS, GREEDY)
    layer = tl.cast(layer, tl.int64)
    e = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    safe = tl.minimum(first_row + tl.arange(0, BLOCK_N), N - 1)
    peak = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    first = tl.zeros((BLOCK_N,), tl.float32)
    spread = tl.zeros((BLOCK_N,), tl.float32)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    best_column = tl.zeros((BLOCK_N,), tl.int32)
    for s in range(S):
        part = walk_ptr + tl.cast(s, tl.int64) * FIELDS * layer + e * N + safe
        part_peak = tl.load(part)
        part_total = tl.load(part + layer)
        part_first = tl.zeros((BLOCK_N,), tl.float32)
        part_spread = tl.zeros((BLOCK_N,), tl.float32)
        if MOMENTS > 0:
            part_first = tl.load(part + 2 * layer)
            part_spread = tl.load(part + 3 * layer)
        new = tl.maximum(peak, part_peak)
        total, first, spread = lowered(total, first, spread, peak - new, MOMENTS)
        part_total, part_first, part_spread = lowered(
            part_total, part_first, part_spread, part_peak - new, MOMENTS
        )
        peak = new
        total, first, spread = added(
            total, first, spread, part_total, part_first, part_spread, MOMENTS
        )
        if GREEDY:
            top = tl.load(part + 4 * layer)
            column = tl.load(part + 5 * layer).to(tl.int32)
            best_column = tl.where(top > best, column, best_column)
            best = tl.maximum(best, top)
    if HAS_BIAS:
        bias_ptr += e * stride_be
        shift_ptr += e
    tl.debug_barrier()  # finish overwrites the first part, which other threads have read
    finish(
        peak, total, first, spread, best_column, first_row,
        hidden_ptr + e * stride_he, weight_ptr + e * stride_we, targets_ptr + e * stride_te,
        bias_ptr, shift_ptr,
        bits_ptr + e * N, state_ptr + e * N, state_ptr + layer + e * N,
        lse_ptr + e * N if LSE else None,
        entropy_ptr + e * N if MOMENTS > 0 else None,
        variance_ptr + e * N if MOMENTS > 1 else None,
        greedy_ptr + e * N if GREEDY else None,
        scale, softcap, ignore_index, N, D, V,
        stride_hn, stride_hd, stride_wv, stride_wd, stride_tn, stride_bv,
        BLOCK_D, EVEN_D, SUM, PRECISION, HAS_BIAS, HAS_SOFTCAP, MOMENTS, GREEDY, LSE,
    )  # fmt: skip


COMBINED_ROWS = 64
"""Rows of a program of combine_kernel: few, because the vocabulary is split if rows are few."""


@triton.jit
def sum_kernel(
    parts_ptr,  # (S, total) float32
    out_ptr,  # (total,)
    total,
    S,
    BLOCK: tl.constexpr,
):
    """Adds up the parts of a split walk, in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
    acc = tl.zeros((BLOCK,), tl.float32)
    for s in range(S):
        acc += tl.load(parts_ptr + tl.cast(s, tl.int64) * total + i, mask=mask, other=0.0)
    tl.store(out_ptr + i, acc.to(out_ptr.dtype.element_ty), mask=mask)


SUM_BLOCK = 1024


def sum_launch(total: int, S: int, device: torch.device) -> Launch:
    programs = cdiv(total, SUM_BLOCK)
    constants = {"BLOCK": SUM_BLOCK}
    return Launch(sum_kernel, (programs, 1, 1), device, (total, S), constants, 4, 3)
