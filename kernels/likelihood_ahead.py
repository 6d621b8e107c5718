"""Bits per token and the gradient of hidden from one walk on a GPU: two products instead of three.

A program owns BLOCK_N rows and walks the vocabulary as in likelihood.py. It multiplies a tile's
powers of two with the tile of weight that made them, which it still has:

    base    = logit_bits[target]                 so that the target's power is 1
    e       = 2**(logit_bits - base), e[target] = 0
    rest    = e.sum(1),   total = rest + 1
    bits    = log2(total)
    made    = (e @ weight) / total
    missing = rest / total                       1 - p of the target, without cancellation

The backward pass then multiplies no matrices for hidden (kernels/rows.py):

    dhidden = upstream * scale * (made - missing * weight[target])

float32 and bfloat16 hold powers of any such base. Where the vocabulary is more than ABOVE times as
probable as the target, a second launch repeats the walk for these rows with the greatest logit so
far as base, and rescales the sums when it rises; so does the only launch for float16.

N rows, D width, V vocabulary, E models.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastmem.kernels.combine import LOWEST
from fastmem.kernels.launch import Key, Launch, Layout, aligned, key
from fastmem.kernels.likelihood import LANES
from fastmem.kernels.logits import LOG2_E, bias_shift, logits_tile, matrix, target_products
from fastmem.kernels.tiles import (
    GradientTile,
    ahead_tile,
    capability,
    cdiv,
    products,
    split_count,
)
from torch import Tensor

ABOVE: tl.constexpr = tl.constexpr(2.0**60)
"""The largest total that is not walked again: products with weight and upstream fit float32."""
STEP_BITS: tl.constexpr = tl.constexpr(12.0)
STEP: tl.constexpr = tl.constexpr(4096.0)
"""The greatest power, 2**STEP_BITS: float16 has numbers from 2**-24 to 65504."""


class Ahead(NamedTuple):
    """Results of one walk over the vocabulary."""

    bits: Tensor  # (E, N) float32, or in the given shape
    state: Tensor  # (3, E, N) float32: base and total, as of the forward pass, and missing
    made: Tensor  # as hidden, bfloat16 or float32; of any value in rows without a gradient


@triton.jit
def ahead_kernel(
    hidden_ptr,  # (E, N, D)
    weight_ptr,  # (E, V, D)
    targets_ptr,  # (E, N)
    bias_ptr,  # (E, V) or None
    shift_ptr,  # (E,) or None: subtracted from the bias
    bits_ptr,  # (E, N)
    state_ptr,  # (3, E, N)
    out_ptr,  # (E, N, D)
    scale,
    ignore_index,
    layer,  # E * N
    N,
    D,
    V,
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
    BLOCK_OUT: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    EVEN_V: tl.constexpr,
    RESIDENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ONLINE: tl.constexpr,
    REPAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """ONLINE: the base is the greatest logit so far. REPAIRS: only rows with a total > ABOVE."""
    e = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_N)
    safe = tl.minimum(rows, N - 1)  # rows past the end repeat the last row and are not stored
    stored = rows < N
    bits_ptr += e * N
    state_ptr += e * N
    if REPAIRS:
        stored = stored & (tl.load(state_ptr + layer + safe) > ABOVE)
        if tl.max(stored.to(tl.int32), 0) == 0:
            return
    hidden_ptr += e * stride_he
    weight_ptr += e * stride_we
    targets_ptr += e * stride_te
    shift = 0.0
    if HAS_BIAS:
        bias_ptr += e * stride_be
        shift = tl.load(shift_ptr + e)
    d = tl.arange(0, BLOCK_D)
    d_out = tl.arange(0, BLOCK_OUT)
    target = tl.load(targets_ptr + safe * stride_tn).to(tl.int64)
    inside = (target >= 0) & (target < V)
    z = target_products(
        hidden_ptr, weight_ptr, targets_ptr, first_row, N, D, V,
        stride_hn, stride_hd, stride_wv, stride_wd, stride_tn, BLOCK_N, BLOCK_D, EVEN_D,
        SUM, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        column = tl.where(inside, target, 0)
        z += tl.load(bias_ptr + column * stride_bv).to(tl.float32) - shift
    z *= scale
    own = tl.where(inside, target, -1).to(tl.int32)

    h = None
    if RESIDENT:
        h = matrix(hidden_ptr, safe, d, stride_hn, stride_hd, D, EVEN_D)
    base = tl.maximum(z, LOWEST)
    rest = tl.zeros((BLOCK_N, LANES), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_OUT), tl.float32)
    for v in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        columns = tl.arange(0, BLOCK_V).to(tl.int64)
        if not EVEN_V:
            columns = tl.minimum(columns, V - 1 - v)  # columns past the end repeat the last column
        start = weight_ptr + tl.cast(v, tl.int64) * stride_wv
        w = None
        if RESIDENT:
            w = matrix(start, columns, d, stride_wv, stride_wd, D, EVEN_D)
        x = logits_tile(
            h, w, hidden_ptr, start, safe, columns, stride_hn, stride_hd, stride_wv, stride_wd,
            D, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, RESIDENT, SUM, PRECISION, STAGES,
        )  # fmt: skip
        if HAS_BIAS:
            more = tl.load(bias_ptr + (columns + v) * stride_bv).to(tl.float32) - shift
            x += more[None, :]
        low = base
        if ONLINE:
            new = tl.maximum(base, tl.max(x, 1) * scale)
            shrink = tl.exp2(base - new)
            rest *= shrink[:, None]
            acc *= shrink[:, None]
            base = new
            low = new - STEP_BITS
        power = tl.exp2(x * scale - low[:, None])
        index = tl.arange(0, BLOCK_V)
        others = index[None, :] != (own - v)[:, None]
        if not EVEN_V:
            others = others & (index < V - v)[None, :]
        power = tl.where(others, power, 0.0)
        y = tl.reshape(power, (BLOCK_N, BLOCK_V // (2 * LANES), LANES, 2))
        rest += tl.sum(tl.sum(y, 3), 1)
        if not RESIDENT:
            w = matrix(start, columns, d_out, stride_wv, stride_wd, D, EVEN_OUT)
        acc = tl.dot(power.to(weight_ptr.dtype.element_ty), w, acc, input_precision=PRECISION)

    without = tl.sum(rest, 1)
    factor = 1.0
    if ONLINE:
        factor = 1.0 / STEP
        without *= factor
    total = without + tl.where(inside, tl.exp2(z - base), 0.0)
    bits = tl.log2(total) + (base - z)
    bits = tl.where(bits < 0, 0.0, bits)  # unlike maximum, keeps NaN
    bits = tl.where(inside, bits, float("nan"))
    bits = tl.where(target == ignore_index, 0.0, bits)
    tl.store(bits_ptr + rows, bits, mask=stored)
    tl.store(state_ptr + rows, base, mask=stored)
    tl.store(state_ptr + layer + rows, total, mask=stored)
    tl.store(state_ptr + 2 * tl.cast(layer, tl.int64) + rows, without / total, mask=stored)
    outs = out_ptr + (e * N + rows)[:, None] * D + d_out[None, :]
    made = acc * (factor / total)[:, None]
    mask = stored[:, None] & (d_out[None, :] < D)
    tl.store(outs, made.to(out_ptr.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=1024)
def plan(
    hidden_key: Key,
    weight_key: Key,
    targets_key: Key,
    bias_key: Key | None,
    alignment: tuple[bool, ...],  # of the data of these four
    device: torch.device,
    ignore_index: int,
    tile: GradientTile | None,
) -> list[Launch] | None:
    """Chooses tile and grid once for all calls of one shape; None where two walks are taken."""
    hidden, weight, targets = Layout(*hidden_key), Layout(*weight_key), Layout(*targets_key)
    bias = None if bias_key is None else Layout(*bias_key)
    (E, N, D), V = hidden.models, weight.models[1]
    assert (weight.models[0], weight.models[2]) == (E, D), (hidden, weight)
    assert hidden.dtype == weight.dtype, (hidden, weight)
    kind = D, hidden.dtype.itemsize, capability(device)
    online = hidden.dtype == torch.float16
    even = hidden.aligned and weight.aligned and all(alignment[:2])
    first, again = tile or ahead_tile(*kind, online), tile or ahead_tile(*kind, True, True)
    if first is None or again is None or 0 in (E, N) or not (even or tile):
        return None
    # Sums of a split vocabulary would be as large as the gradient.
    resident = first.depth == first.out
    if split_count(cdiv(N, first.own) * E, V, first.walk, resident, device) > 1:
        return None
    integers = (
        ignore_index, E * N, N, D, V,
        *hidden.strides, *weight.strides, *targets.expanded(E, N),
        *((0, 0) if bias is None else bias.expanded(E, V)),
    )  # fmt: skip

    def launch(tile: GradientTile, online: bool, repairs: bool) -> Launch:
        flags = bias is not None, online, repairs
        return Launch(
            ahead_kernel, (cdiv(N, tile.own), E, 1), device, integers,
            constants(V, kind, tile, flags), tile.warps, tile.stages,
        )  # fmt: skip

    return [launch(first, online, False), *([] if online else [launch(again, True, True)])]


def constants(
    V: int, kind: tuple[int, int, int], tile: GradientTile, flags: tuple[bool, bool, bool]
) -> dict[str, Any]:
    """kind: D, bytes of a number, compute capability. flags: HAS_BIAS, ONLINE, REPAIRS."""
    return {
        "BLOCK_N": tile.own,
        "BLOCK_V": tile.walk,
        "BLOCK_OUT": tile.out,
        "EVEN_OUT": tile.out == kind[0],
        "EVEN_V": V % tile.walk == 0,
        "RESIDENT": tile.depth == tile.out,
        **dict(zip(("HAS_BIAS", "ONLINE", "REPAIRS"), flags, strict=True)),
        **products(*kind, tile.depth),
        "STAGES": tile.stages,
    }


def forward(
    hidden: Tensor,  # (N, D) or (E, N, D)
    weight: Tensor,  # (V, D) or (E, V, D)
    targets: Tensor,  # (N,) or (E, N)
    bias: Tensor | None = None,  # (V,) or (E, V)
    temperature: float = 1.0,
    ignore_index: int = -100,
    *,
    tile: GradientTile | None = None,
    shape: tuple[int, ...] | None = None,
) -> Ahead | None:
    """Returns bits and what dhidden is made of; None where the backward pass makes dhidden.

    Never waits for the device. shape is that of the bits, (E, N) by default.
    """
    device = hidden.device
    launches = plan(
        key(hidden), key(weight), key(targets), None if bias is None else key(bias),
        aligned(hidden, weight, targets, bias), device, ignore_index, tile,
    )  # fmt: skip
    if launches is None:
        return None
    models = (1, len(hidden)) if hidden.ndim == 2 else tuple(hidden.shape[:2])
    bits = torch.empty(shape or models, dtype=torch.float32, device=device)
    state = torch.empty((3, *models), dtype=torch.float32, device=device)
    # float16 lacks the exponents for what is not yet scaled.
    kept = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    made = torch.empty(hidden.shape, dtype=kept, device=device)
    shift = bias_shift(bias, None, models[0])
    for launch in launches:
        launch(hidden, weight, targets, bias, shift, bits, state, made, LOG2_E.value / temperature)
    return Ahead(bits, state, made)
