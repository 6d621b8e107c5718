"""Bits and gradients of a reduced loss of wide models on a GPU, with three products.

A kernel stores powers of two of all logits of a chunk of rows, before their sum is known; the sum
then gives bits and the factor of each row, and cuBLAS multiplies the powers (kernels/chunks.py):

    e       = 2**(logit_bits - base)             (rows, V) as hidden; its sums are float32
    total   = e.sum(1)
    bits    = log2(total) + base - logit_bits[target]
    e[target] -= total
    factor  = upstream * scale / total
    dhidden = factor * (e @ weight),   dweight = e.mT @ (factor * hidden)

The base of a row is its target's logit, where no tile has a logit that is more than ABOVE bits
greater: any logits fit, and no pass looks for the greatest.

N rows, D width, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from fastmem.kernels.chunks import Gradients, Sums, columns_of, empty_gradients
from fastmem.kernels.combine import LOWEST
from fastmem.kernels.logits import LOG2_E, place, target_products, tile_of_logits
from fastmem.kernels.tiles import cdiv
from torch import Tensor

ABOVE: tl.constexpr = tl.constexpr(60.0)
"""Bits that a tile's greatest logit may be above the row's base: V powers and their products with
weight then fit float32 and bfloat16. A tile above has its own base."""


TARGET_ROWS, ENTRY_ROWS = 64, 32
"""Rows of a program of two small kernels."""


@triton.jit
def target_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,  # (N,)
    bias_ptr,
    shift_ptr,
    logit_ptr,  # (N,) bits of the target's logit
    scale,
    N,
    D,
    V,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_tn,
    stride_bv,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Stores each target's logit, rounded as the tile of `powers_kernel` that has its column."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    z = target_products(
        hidden_ptr, weight_ptr, targets_ptr, first, N, D, V,
        stride_hn, stride_hd, stride_wv, stride_wd, stride_tn, BLOCK_N, BLOCK_D, EVEN_D,
        SUM, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        target = tl.load(targets_ptr + tl.minimum(rows, N - 1) * stride_tn).to(tl.int64)
        column = tl.where((target >= 0) & (target < V), target, 0)
        z += tl.load(bias_ptr + column * stride_bv).to(tl.float32) - tl.load(shift_ptr)
    tl.store(logit_ptr + rows, z * scale, mask=rows < N)


@triton.jit
def powers_kernel(
    hidden_tiles,  # descriptors of hidden and weight, or None
    weight_tiles,
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    shift_ptr,
    column_ptr,  # (N,) int32: the target; -1 for a row without a gradient
    logit_ptr,  # (N,) bits of the target's logit: the row's base
    sums_ptr,  # (tiles, N)
    bases_ptr,  # (tiles, N)
    out_ptr,  # (N, stride)
    scale,
    stride,
    N,
    D,
    V,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Stores 2**(logit_bits - base), 0 in rows without a gradient, and each tile's sum and base."""
    tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(V, BLOCK_V)
    for i in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), flatten=hidden_tiles is not None
    ):
        tile_n, tile_v = place(i, N, V, BLOCK_N, BLOCK_V)
        rows, columns, x, _ = tile_of_logits(
            hidden_tiles, weight_tiles, hidden_ptr, weight_ptr, bias_ptr, shift_ptr,
            tile_n, tile_v, 1.0, N, D, V, stride_hn, stride_hd, stride_wv, stride_wd,
            BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, HAS_BIAS, False, SUM, PRECISION,
            STAGES,
        )  # fmt: skip
        stored = rows < N
        inside = tl.arange(0, BLOCK_V) < V - tile_v * BLOCK_V  # fewer registers than columns < V
        y = tl.where(inside[None, :], x * scale, float("-inf"))
        base = tl.maximum(tl.load(logit_ptr + rows, mask=stored, other=0.0), LOWEST)
        greatest = tl.max(y, 1)
        base = tl.where(greatest > base + ABOVE, greatest, base)
        e = tl.exp2(y - base[:, None])
        place_of_tile = tile_v.to(tl.int64) * N + rows
        tl.store(sums_ptr + place_of_tile, tl.sum(e, 1), mask=stored)
        tl.store(bases_ptr + place_of_tile, base, mask=stored)
        counts = tl.load(column_ptr + rows, mask=stored, other=-1) >= 0
        e = tl.where(counts[:, None], e, 0.0)
        outs = out_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        mask = stored[:, None] & (columns < stride)[None, :]
        tl.store(outs, e.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def total_kernel(
    sums_ptr,  # (tiles, N)
    bases_ptr,
    logit_ptr,  # (N,), as all below
    targets_ptr,
    upstream_ptr,
    bits_ptr,
    base_ptr,
    total_ptr,
    factor_ptr,
    scale,
    ignore_index,
    tiles,
    N,
    V,
    stride_tn,
    BLOCK_N: tl.constexpr,
):
    """Adds up each row's tiles: its base, total, bits, and the factor of its powers."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    stored = rows < N
    safe = tl.minimum(rows, N - 1)
    base = tl.full((BLOCK_N,), LOWEST, tl.float32)
    for t in range(tiles):
        base = tl.maximum(base, tl.load(bases_ptr + tl.cast(t, tl.int64) * N + safe))
    total = tl.zeros((BLOCK_N,), tl.float32)
    for t in range(tiles):
        at = tl.cast(t, tl.int64) * N + safe
        total += tl.load(sums_ptr + at) * tl.exp2(tl.load(bases_ptr + at) - base)
    bits = tl.log2(total) + (base - tl.load(logit_ptr + safe))
    bits = tl.where(bits < 0, 0.0, bits)  # unlike maximum, keeps NaN
    target = tl.load(targets_ptr + safe * stride_tn).to(tl.int64)
    ignored = target == ignore_index
    inside = (target >= 0) & (target < V)
    bits = tl.where(inside, bits, float("nan"))
    tl.store(bits_ptr + rows, tl.where(ignored, 0.0, bits), mask=stored)
    factor = tl.load(upstream_ptr + safe) * scale / total
    tl.store(factor_ptr + rows, tl.where(inside & (ignored == 0), factor, 0.0), mask=stored)
    tl.store(base_ptr + rows, base, mask=stored)
    tl.store(total_ptr + rows, total, mask=stored)


@triton.jit
def entry_kernel(
    bases_ptr,  # (tiles, N)
    base_ptr,  # (N,), as the next three
    total_ptr,
    bits_ptr,
    column_ptr,
    out_ptr,  # (N, stride)
    stride,
    N,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Gives each target the power minus the row's total, and a tile the row's base."""
    blocks = tl.cdiv(N, BLOCK_N)  # a second axis of the grid would end at 65,535 tiles
    tile = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    stored = rows < N
    safe = tl.minimum(rows, N - 1)
    column = tl.load(column_ptr + safe)
    # total * (1 - p) without the rounding of 1 - p, for memorized targets.
    nats = tl.load(bits_ptr + safe) * 0.6931471805599453
    series = nats * (1 - nats * (0.5 - nats * (0.16666667 - nats * 0.041666667)))
    missing = tl.where(nats < 0.03, series, 1 - tl.exp2(nats * -1.4426950408889634))
    entry = -missing * tl.load(total_ptr + safe)
    kind = out_ptr.dtype.element_ty
    outs = out_ptr + safe.to(tl.int64) * stride
    own = tl.load(bases_ptr + tile.to(tl.int64) * N + safe)
    base = tl.load(base_ptr + safe)
    here = stored & (column >= tile * BLOCK_V) & (column < (tile + 1) * BLOCK_V)
    if tl.max((own != base).to(tl.int32), 0) > 0:
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        mask = stored[:, None] & (columns < stride)[None, :]
        at = outs[:, None] + columns[None, :]
        e = tl.load(at, mask=mask, other=0.0).to(tl.float32) * tl.exp2(own - base)[:, None]
        tl.store(
            at, tl.where(columns[None, :] == column[:, None], entry[:, None], e).to(kind), mask=mask
        )
    else:
        tl.store(outs + tl.maximum(column, 0), entry.to(kind), mask=here)


def reduced(
    upstream: Tensor,  # (N,) float32
    hidden: Tensor,  # (N, D) bfloat16 or float32
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    shift: Tensor | None,  # ()
    temperature: float,
    ignore_index: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """Returns bits (N,) and the gradients of sum(upstream * bits): three products in all."""
    (N, D), V = hidden.shape, len(weight)
    scale = LOG2_E.value / temperature
    column = columns_of(targets, V, ignore_index)
    grads = empty_gradients(hidden, weight, bias, wanted)
    sums = Sums(hidden, weight, grads)
    tile, tiles = sums.tile, sums.tiles

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    of_targets = {**sums.constants, "BLOCK_N": TARGET_ROWS}
    del of_targets["BLOCK_V"]
    bits, per_tile = new(N), new(2 * tiles * sums.rows)
    for begin in range(0, N, sums.rows):
        end = min(begin + sums.rows, N)
        n, part = end - begin, slice(begin, end)
        h, t = hidden[part], targets[part]
        logit, base, total, factor = new(4, n)
        tile_sums, bases = per_tile[: 2 * tiles * n].view(2, tiles, n)
        strides = (*h.stride(), *weight.stride(), t.stride(0))
        target_kernel[(cdiv(n, TARGET_ROWS),)](
            h, weight, t, bias, shift, logit, scale, n, D, V, *strides,
            0 if bias is None else bias.stride(0),
            **of_targets,
            HAS_BIAS=bias is not None, num_warps=4,
        )  # fmt: skip
        vectors = (column[part], logit, tile_sums, bases)
        sums.launch(powers_kernel, begin, end, vectors, bias, shift, (scale,))
        total_kernel[(cdiv(n, 128),)](
            tile_sums, bases, logit, t, upstream[part], bits[part], base, total, factor,
            scale, ignore_index, tiles, n, V, t.stride(0), BLOCK_N=128, num_warps=4,
        )  # fmt: skip
        entry_kernel[(cdiv(n, ENTRY_ROWS) * tiles,)](
            bases, base, total, bits[part], column[part], sums.matrix, sums.matrix.stride(0), n,
            BLOCK_N=ENTRY_ROWS, BLOCK_V=tile.vocab, num_warps=4,
        )  # fmt: skip
        sums.add(begin, end, factor, None)
    sums.finish()
    return bits, grads
