"""Bits per token on a GPU: linear layer, softmax and look-up in one kernel, no logits in memory.

Computes

    F.cross_entropy((hidden @ weight.mT).float(), targets, reduction="none") / ln 2

A program owns BLOCK_N rows and walks the vocabulary in tiles of BLOCK_V. For each row it keeps the
greatest logit so far (peak) and the sum of exp_logits = 2**(logit - peak) (total), in bits:

    x     = hidden @ weight.mT                   one tile, float32, never stored
    new   = max(peak, max(x) * scale)            scale = log2(e) / temperature
    total = total * 2**(peak - new) + sum(2**(x * scale - new))
    bits  = log2(total) + (peak - scale * x[target])

Without atomics, every sum has one order: the same input gives the same bits.

N rows, D width, V vocabulary, E models, S parts of a split vocabulary.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastmem.kernels.combine import (
    COMBINED_ROWS,
    LOWEST,
    added,
    combine_kernel,
    fields_of_a_part,
    finish,
    lowered,
    mean_of,
)
from fastmem.kernels.launch import Key, Launch, Layout, aligned, descriptor, key
from fastmem.kernels.logits import LOG2_E, bias_shift, finished_logits, logits_tile, matrix
from fastmem.kernels.tiles import (
    Tile,
    capability,
    cdiv,
    described,
    forward_tile,
    products,
    split_count,
)
from torch import Tensor

LANES: tl.constexpr = tl.constexpr(4)
"""Peaks and totals of a row, kept apart until the end of the walk.

A matrix instruction leaves a row in 4 threads, columns 2i and 2i + 1 (mod 8) in thread i. With a
peak and a total for each of them, no reduction of the walk crosses threads.
"""


class Likelihood(NamedTuple):
    """Results of one walk over the vocabulary, (E, N) float32; None if not asked for."""

    bits: Tensor  # at least 0; 0 where ignored, NaN where the target is outside [0, V)
    state: Tensor  # (2, E, N): peak and total, for the backward pass
    lse_bits: Tensor | None  # log2 of the sum of 2**logit_bits
    entropy_bits: Tensor | None  # -sum p log2 p
    variance: Tensor | None  # sum p (log2 p + entropy)**2
    is_greedy: Tensor | None  # bool: the target is the first column with the greatest logit


@triton.jit
def absorb(
    x,  # (BLOCK_N, BLOCK_V) logits
    column,  # of the tile's first logit
    scale,
    peak,  # (BLOCK_N, LANES), as the three sums
    total,
    first,
    spread,
    best,  # (BLOCK_N,)
    best_column,
    MOMENTS: tl.constexpr,
    GREEDY: tl.constexpr,
):
    """Adds a tile to the state of the walk."""
    BLOCK_N: tl.constexpr = x.shape[0]
    BLOCK_V: tl.constexpr = x.shape[1]
    if GREEDY:
        top, where = tl.max(x, 1, return_indices=True)
        best_column = tl.where(top > best, column + where, best_column)
        best = tl.maximum(best, top)
    y = tl.reshape(x, (BLOCK_N, BLOCK_V // (2 * LANES), LANES, 2))
    new = tl.maximum(peak, tl.max(tl.max(y, 3), 1) * scale)
    u = y * scale - new[:, None, :, None]
    e = tl.exp2(u)
    total, first, spread = lowered(total, first, spread, peak - new, MOMENTS)
    here = tl.sum(tl.sum(e, 3), 1)
    here_first = tl.zeros_like(here)
    here_spread = tl.zeros_like(here)
    if MOMENTS > 0:
        u = tl.maximum(u, -1000.0)  # 0 log 0 is 0
        here_first = tl.sum(tl.sum(e * u, 3), 1)
    if MOMENTS > 1:
        u -= mean_of(here_first, here)[:, None, :, None]
        here_spread = tl.sum(tl.sum(e * u * u, 3), 1)
    total, first, spread = added(total, first, spread, here, here_first, here_spread, MOMENTS)
    return new, total, first, spread, best, best_column


@triton.jit
def forward_kernel(
    hidden_tiles,  # descriptors of one model's (N, D) and (V, D), or None
    weight_tiles,
    hidden_ptr,  # (E, N, D)
    weight_ptr,  # (E, V, D)
    targets_ptr,  # (E, N)
    bias_ptr,  # (E, V) or None
    shift_ptr,  # (E,) or None: subtracted from the bias
    walk_ptr,  # (S, fields, E, N), or None when the vocabulary is not split
    bits_ptr,  # (E, N), as all outputs but state
    state_ptr,  # (2, E, N)
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
    part,  # columns of one part of the vocabulary
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
    BLOCK_V: tl.constexpr,
    EVEN_V: tl.constexpr,
    RESIDENT: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
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
    # Programs with the same rows are neighbours: they read hidden at about the same time.
    s = tl.program_id(0) % S
    e = tl.program_id(1).to(tl.int64)
    hidden_ptr += e * stride_he
    weight_ptr += e * stride_we
    targets_ptr += e * stride_te
    shift = 0.0
    if HAS_BIAS:
        bias_ptr += e * stride_be
        shift_ptr += e
        shift = tl.load(shift_ptr)
    first_row = (tl.program_id(0) // S).to(tl.int64) * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_N)
    safe = tl.minimum(rows, N - 1)  # rows past the end repeat the last and are not stored
    columns = tl.arange(0, BLOCK_V).to(tl.int64)
    d = tl.arange(0, BLOCK_D)

    DESCRIBED: tl.constexpr = hidden_tiles is not None
    h = hidden_tiles
    own = safe
    if RESIDENT:
        h = matrix(hidden_ptr, safe, d, stride_hn, stride_hd, D, EVEN_D)
    if DESCRIBED:
        own = first_row.to(tl.int32)
    peak = tl.full((BLOCK_N, LANES), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N, LANES), tl.float32)
    first = tl.zeros((BLOCK_N, LANES), tl.float32)
    spread = tl.zeros((BLOCK_N, LANES), tl.float32)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    best_column = tl.zeros((BLOCK_N,), tl.int32)

    begin = s * part
    end = tl.minimum(begin + part, V)
    whole = end
    if not EVEN_V:
        whole = begin + (end - begin) // BLOCK_V * BLOCK_V
    for v in tl.range(begin, whole, BLOCK_V, num_stages=STAGES, flatten=DESCRIBED):
        # Only the base of the tile moves: one 64-bit addition for each address.
        base = weight_ptr + tl.cast(v, tl.int64) * stride_wv
        w = weight_tiles
        if RESIDENT:
            w = matrix(base, columns, d, stride_wv, stride_wd, D, EVEN_D)
        x = logits_tile(
            h, w, hidden_ptr, base, own, v if DESCRIBED else columns,
            stride_hn, stride_hd, stride_wv, stride_wd,
            D, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, RESIDENT, SUM, PRECISION, STAGES,
        )  # fmt: skip
        x = finished_logits(
            x, columns + v, bias_ptr, shift, softcap, stride_bv, HAS_BIAS, HAS_SOFTCAP
        )
        peak, total, first, spread, best, best_column = absorb(
            x, v, scale, peak, total, first, spread, best, best_column, MOMENTS, GREEDY
        )
    if not EVEN_V and whole < end:
        # The ragged last tile: columns past the end repeat the last, or are 0, and become -inf.
        index = tl.minimum(columns + whole, V - 1)
        w = weight_tiles
        if RESIDENT:
            w = matrix(weight_ptr, index, d, stride_wv, stride_wd, D, EVEN_D)
        x = logits_tile(
            h, w, hidden_ptr, weight_ptr, own, whole if DESCRIBED else index,
            stride_hn, stride_hd, stride_wv, stride_wd,
            D, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, RESIDENT, SUM, PRECISION, STAGES,
        )  # fmt: skip
        x = finished_logits(x, index, bias_ptr, shift, softcap, stride_bv, HAS_BIAS, HAS_SOFTCAP)
        inside = columns + whole < end
        if BLOCK_V > 128:  # sums of 64 bits for 256 columns spill on Hopper
            inside = tl.arange(0, BLOCK_V) < end - whole
        x = tl.where(inside[None, :], x, float("-inf"))
        peak, total, first, spread, best, best_column = absorb(
            x, whole, scale, peak, total, first, spread, best, best_column, MOMENTS, GREEDY
        )

    greatest = tl.max(peak, 1)
    total, first, spread = lowered(total, first, spread, peak - greatest[:, None], MOMENTS)
    lane_total, lane_first = total, first
    total = tl.sum(total, 1)
    first = tl.sum(first, 1)
    if MOMENTS > 1:
        apart = mean_of(lane_first, lane_total) - mean_of(first, total)[:, None]
        spread += apart * apart * lane_total
    spread = tl.sum(spread, 1)
    if SPLIT:
        layer = tl.cast(layer, tl.int64)
        walk_ptr += s * fields_of_a_part(MOMENTS, GREEDY) * layer + e * N
        stored = rows < N
        tl.store(walk_ptr + rows, greatest, mask=stored)
        tl.store(walk_ptr + layer + rows, total, mask=stored)
        if MOMENTS > 0:
            tl.store(walk_ptr + 2 * layer + rows, first, mask=stored)
            tl.store(walk_ptr + 3 * layer + rows, spread, mask=stored)
        if GREEDY:
            tl.store(walk_ptr + 4 * layer + rows, best, mask=stored)
            tl.store(walk_ptr + 5 * layer + rows, best_column.to(tl.float32), mask=stored)
    else:
        finish(
            greatest, total, first, spread, best_column, first_row,
            hidden_ptr, weight_ptr, targets_ptr, bias_ptr, shift_ptr,
            bits_ptr + e * N, state_ptr + e * N, state_ptr + layer + e * N,
            lse_ptr + e * N if LSE else None,
            entropy_ptr + e * N if MOMENTS > 0 else None,
            variance_ptr + e * N if MOMENTS > 1 else None,
            greedy_ptr + e * N if GREEDY else None,
            scale, softcap, ignore_index, N, D, V,
            stride_hn, stride_hd, stride_wv, stride_wd, stride_tn, stride_bv,
            BLOCK_D, EVEN_D, SUM, PRECISION, HAS_BIAS, HAS_SOFTCAP, MOMENTS, GREEDY, LSE,
        )  # fmt: skip


class Plan(NamedTuple):
    """What shapes, strides and settings decide about a forward pass."""

    models: tuple[int, int]  # E, N
    parts: tuple[int, ...]  # shape of the sums of a split vocabulary; empty if it is whole
    described: tuple[int, int, int] | None  # rows, columns and depth of a tile
    walk: Launch
    combine: Launch | None


@functools.lru_cache(maxsize=1024)
def plan(
    hidden_key: Key,
    weight_key: Key,
    targets_key: Key,
    bias_key: Key | None,
    alignment: tuple[bool, ...],  # of the data of these four
    device: torch.device,
    softcap: bool,
    ignore_index: int,
    flags: tuple[bool, bool, bool, bool],  # lse, entropy, variance, greedy
    tile: Tile | None,
    splits: int | None,
) -> Plan:
    """Chooses tile and grid once for all calls of one shape."""
    hidden, weight, targets = Layout(*hidden_key), Layout(*weight_key), Layout(*targets_key)
    bias = None if bias_key is None else Layout(*bias_key)
    (E, N, D), V = hidden.models, weight.models[1]
    assert (weight.models[0], weight.models[2]) == (E, D), (hidden, weight)
    assert hidden.dtype == weight.dtype, (hidden, weight)
    lse, entropy, variance, greedy = flags
    heavy = entropy or variance or greedy or softcap
    even = hidden.aligned and weight.aligned and all(alignment[:2])
    itemsize = hidden.dtype.itemsize
    tile = tile or forward_tile(D, itemsize, capability(device), even, heavy, V)
    if splits is None:
        splits = split_count(cdiv(N, tile.rows) * E, V, tile.vocab, tile.resident(D), device)
        if D > 512:
            # Every tile reads the hidden rows again. Two programs for each block of rows halve the
            # rows in use at a time, which then fit into L2.
            splits = max(splits, 2)
    part = cdiv(cdiv(V, tile.vocab), splits) * tile.vocab
    splits = cdiv(V, part)
    moments = 2 if variance else int(entropy)
    sizes = (ignore_index, E * N, N, D, V, splits)
    strides = (
        *hidden.strides, *weight.strides, *targets.expanded(E, N),
        *((0, 0) if bias is None else bias.expanded(E, V)),
    )  # fmt: skip
    shared = {
        **products(D, itemsize, capability(device), tile.depth),
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap,
        "MOMENTS": moments,
        "GREEDY": greedy,
        "LSE": lse,
    }
    constants = {
        "BLOCK_N": tile.rows,
        "BLOCK_V": tile.vocab,
        "EVEN_V": V % tile.vocab == 0,
        "RESIDENT": tile.resident(D),
        "SPLIT": splits > 1,
        "STAGES": tile.stages,
        **shared,
    }
    walk = Launch(
        forward_kernel, (cdiv(N, tile.rows) * splits, E, 1), device,
        (*sizes, part, *strides), constants, tile.warps, tile.stages,
    )  # fmt: skip
    rows_apart = E == 1 and hidden.apart and weight.apart
    tiles = None
    if rows_apart and even and described(D, itemsize, tile.depth, capability(device)):
        tiles = tile[:3]
    if splits == 1:
        return Plan((E, N), (), tiles, walk, None)
    combine = Launch(
        combine_kernel, (cdiv(N, COMBINED_ROWS), E, 1), device,
        (*sizes, *strides), {"BLOCK_N": COMBINED_ROWS, **shared}, 4, 3,
    )  # fmt: skip
    parts = (splits, fields_of_a_part(moments, greedy), E, N)
    return Plan((E, N), parts, tiles, walk, combine)


def forward(
    hidden: Tensor,  # (N, D) or (E, N, D)
    weight: Tensor,  # (V, D) or (E, V, D)
    targets: Tensor,  # (N,) or (E, N)
    bias: Tensor | None = None,  # (V,) or (E, V)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    *,
    lse: bool = False,
    entropy: bool = False,
    variance: bool = False,
    greedy: bool = False,
    tile: Tile | None = None,
    splits: int | None = None,
    shape: tuple[int, ...] | None = None,
) -> Likelihood:
    """Returns the bits of each target and, on request, statistics of each row from the same walk.

    Takes float32, bfloat16 or float16 in any strides, sums in float32, and never waits for the
    device. shape is that of all results but state, (E, N) by default. tile and splits override the
    tables, for tests and measurements.
    """
    device = hidden.device
    planned = plan(
        key(hidden), key(weight), key(targets), None if bias is None else key(bias),
        aligned(hidden, weight, targets, bias), device,
        softcap is not None, ignore_index, (lse, entropy, variance, greedy), tile, splits,
    )  # fmt: skip
    shape = shape or planned.models
    bits = torch.empty(shape, dtype=torch.float32, device=device)
    walk = None
    if planned.combine is None:
        state = torch.empty((2, *planned.models), dtype=torch.float32, device=device)
    else:
        # The state of a split walk overwrites its first part: 16 bytes a token for two parts.
        walk = torch.empty(planned.parts, dtype=torch.float32, device=device)
        state = walk[0, :2]
    lse_bits = entropy_bits = spread = is_greedy = None
    if lse:
        lse_bits = torch.empty_like(bits)
    if entropy or variance:
        entropy_bits = torch.empty_like(bits)
    if variance:
        spread = torch.empty_like(bits)
    if greedy:
        is_greedy = torch.empty_like(bits, dtype=torch.bool)
    if 0 not in planned.models:
        arguments = (
            hidden, weight, targets, bias, bias_shift(bias, softcap, planned.models[0]), walk,
            bits, state, lse_bits, entropy_bits, spread, is_greedy,
            LOG2_E.value / temperature, softcap or 0.0,
        )  # fmt: skip
        tiles: tuple[Any, Any] = (None, None)
        if planned.described:
            rows, vocab, depth = planned.described
            tiles = descriptor(hidden, rows, depth), descriptor(weight, vocab, depth)
        planned.walk(*tiles, *arguments)
        if planned.combine is not None:
            planned.combine(*arguments)
    return Likelihood(bits, state, lse_bits, entropy_bits if entropy else None, spread, is_greedy)
