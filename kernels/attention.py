"""Causal attention of short sequences with narrow heads on a GPU, without padding of a head.

Computes

    F.scaled_dot_product_attention(q, k, v, is_causal=True)

A program has one sequence and as many heads as fill 16 columns, which it loads once. For each head
a product of matrix instructions masks one operand to the columns of the head, and the results add
up in the same columns. Scores of 64 queries and 64 keys (a panel) stay in registers:

    s   = (q of the head) @ k.T * scale          scale = log2(e) / sqrt(W)
    p   = 2**(s - lse)                           lse = log2(sum(2**s))
    out = p @ v
    ds  = p * (dout @ v.T - sum(dout * out))     the backward pass computes s and p again

Without atomics, every sum has one order: the same input gives the same bits. A number that is not
finite may spread to the other heads of its program, never to another sequence.

N sequences (of all models), T tokens, H heads, W width of a head, D = H * W.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastmem.kernels.logits import LOG2_E
from fastmem.kernels.tiles import capability, cdiv, precision
from torch import Tensor

PANEL = 64
"""Queries or keys of a program at a time."""
LOWEST: tl.constexpr = tl.constexpr(-1e30)
"""The score of a key after its query, and the first peak: finite, so that no difference is NaN."""


class Tile(NamedTuple):
    """Launch settings of a kernel."""

    heads: int  # of a program
    warps: int


@triton.jit
def panel(ptr, rows, columns, stride, T, inside):
    """Returns (SIZE, COLUMNS) of a sequence, 0 outside."""
    mask = (rows < T)[:, None] & inside[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def forward_kernel(
    qkv_ptr,  # (N, T, 3, H, W)
    out_ptr,  # (N, T, H, W)
    lse_ptr,  # (N, T, H)
    scale,
    T,
    D,
    H,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    EVEN_H: tl.constexpr,
    PANELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    own_panel = PANELS - 1 - tl.program_id(2) if PANELS > 1 else 0  # the longest walk first
    first_head = tl.program_id(1) * HEADS
    c = tl.arange(0, COLUMNS)
    inside = c < HEADS * WIDTH
    if not EVEN_H:
        inside = inside & (first_head * WIDTH + c < D)
    qkv_ptr += n * T * (3 * D) + first_head * WIDTH
    j = tl.arange(0, SIZE)
    i = own_panel * SIZE + j
    q = panel(qkv_ptr, i, c, 3 * D, T, inside)
    k = panel(qkv_ptr + D, j, c, 3 * D, T, inside)
    v = panel(qkv_ptr + 2 * D, j, c, 3 * D, T, inside)
    out = tl.zeros((SIZE, COLUMNS), tl.float32)
    for h in tl.range(0, HEADS):
        own = (c // WIDTH == h)[None, :]
        qh = tl.where(own, q, 0.0).to(q.dtype)
        peak = tl.full((SIZE,), LOWEST, tl.float32)
        total = tl.zeros((SIZE,), tl.float32)
        acc = tl.zeros((SIZE, COLUMNS), tl.float32)
        for other in tl.range(0, own_panel + 1 if PANELS > 1 else 1):
            if PANELS > 1:
                k = panel(qkv_ptr + D, other * SIZE + j, c, 3 * D, T, inside)
                v = panel(qkv_ptr + 2 * D, other * SIZE + j, c, 3 * D, T, inside)
            s = tl.dot(qh, tl.trans(k), input_precision=PRECISION) * scale
            s = tl.where(i[:, None] >= (other * SIZE + j)[None, :], s, LOWEST)
            new = tl.maximum(peak, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            shrink = tl.exp2(peak - new)
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            peak = new
        out = tl.where(own, acc / total[:, None], out)
        stored = i < T
        if not EVEN_H:
            stored = stored & (first_head + h < H)
        tl.store(lse_ptr + (n * T + i) * H + first_head + h, peak + tl.log2(total), mask=stored)
    outs = out_ptr + n * T * D + first_head * WIDTH + i[:, None] * D + c[None, :]
    tl.store(outs, out.to(out_ptr.dtype.element_ty), mask=(i < T)[:, None] & inside[None, :])


@triton.jit
def backward_kernel(
    qkv_ptr,  # (N, T, 3, H, W)
    out_ptr,  # (N, T, H, W)
    dout_ptr,  # (N, T, H, W)
    lse_ptr,  # (N, T, H)
    dqkv_ptr,  # (N, T, 3, H, W)
    scale,
    T,
    D,
    H,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    EVEN_H: tl.constexpr,
    PANELS: tl.constexpr,
    PRECISION: tl.constexpr,
    OWNS_QUERIES: tl.constexpr,  # walks the keys for dq; else the queries for dk, dv
):
    n = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    own_panel = tl.program_id(2) if PANELS > 1 else 0
    c = tl.arange(0, COLUMNS)
    inside = c < HEADS * WIDTH
    if not EVEN_H:
        inside = inside & (first_head * WIDTH + c < D)
    qkv_ptr += n * T * (3 * D) + first_head * WIDTH
    out_ptr += n * T * D + first_head * WIDTH
    dout_ptr += n * T * D + first_head * WIDTH
    lse_ptr += n * T * H + first_head
    j = tl.arange(0, SIZE)
    dq = tl.zeros((SIZE, COLUMNS), tl.float32)
    dk = tl.zeros((SIZE, COLUMNS), tl.float32)
    dv = tl.zeros((SIZE, COLUMNS), tl.float32)
    begin = 0 if OWNS_QUERIES else own_panel
    end = own_panel + 1 if OWNS_QUERIES else PANELS
    for other in tl.range(begin, end):
        i = (own_panel if OWNS_QUERIES else other) * SIZE + j
        keys = (other if OWNS_QUERIES else own_panel) * SIZE + j
        q = panel(qkv_ptr, i, c, 3 * D, T, inside)
        k = panel(qkv_ptr + D, keys, c, 3 * D, T, inside)
        v = panel(qkv_ptr + 2 * D, keys, c, 3 * D, T, inside)
        dout = panel(dout_ptr, i, c, D, T, inside)
        flow = dout.to(tl.float32) * panel(out_ptr, i, c, D, T, inside)
        seen = keys[:, None] <= i[None, :]
        # tf32x3 splits k and v: hoisted out of the loop, the parts would not fit the registers.
        for h in tl.range(0, HEADS, disable_licm=PRECISION == "tf32x3"):
            own = (c // WIDTH == h)[None, :]
            qh = tl.where(own, q, 0.0).to(q.dtype)
            douth = tl.where(own, dout, 0.0).to(q.dtype)
            delta = tl.sum(tl.where(own, flow, 0.0), 1)
            stored = i < T
            if not EVEN_H:
                stored = stored & (first_head + h < H)
            lse = tl.load(lse_ptr + i * H + h, mask=stored, other=0.0)
            # Keys along the rows: the products that add to dv and dk have p and ds in registers.
            s = tl.dot(k, tl.trans(qh), input_precision=PRECISION) * scale
            p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
            ds = p * (tl.dot(v, tl.trans(douth), input_precision=PRECISION) - delta[None, :])
            ds = ds.to(q.dtype)
            if not OWNS_QUERIES:
                dv = tl.dot(p.to(q.dtype), douth, dv, input_precision=PRECISION)
                dk = tl.dot(ds, qh, dk, input_precision=PRECISION)
            if OWNS_QUERIES or PANELS == 1:
                dq += tl.where(own, tl.dot(tl.trans(ds), k, input_precision=PRECISION), 0.0)
    rows = own_panel * SIZE + j
    dqkv_ptr += n * T * (3 * D) + first_head * WIDTH
    outs = dqkv_ptr + rows[:, None] * (3 * D) + c[None, :]
    stored = (rows < T)[:, None] & inside[None, :]
    kind = dqkv_ptr.dtype.element_ty
    factor = scale / LOG2_E  # s is in bits
    if OWNS_QUERIES or PANELS == 1:
        tl.store(outs, (dq * factor).to(kind), mask=stored)
    if not OWNS_QUERIES:
        tl.store(outs + D, (dk * factor).to(kind), mask=stored)
        tl.store(outs + 2 * D, dv.to(kind), mask=stored)


def forward(qkv: Tensor, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Returns the output (N, T, H, W) and lse (N, T, H) float32, for the backward pass.

    qkv is (N, T, 3, H, W) contiguous, bfloat16 or float32 (which tf32x3 multiplies). tile overrides
    the measured settings, for measurements.
    """
    N, T, _, H, W = qkv.shape
    out = torch.empty((N, T, H, W), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((N, T, H), dtype=torch.float32, device=qkv.device)
    launch(forward_kernel, qkv, tile or fastest_tile(H, W, qkv.itemsize), out, lse)
    return out, lse


def backward(
    dout: Tensor,  # (N, T, H, W) contiguous
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    tile: Tile | None = None,
) -> Tensor:
    """Returns the gradient of qkv: one kernel up to T = PANEL, above one for q and one for k, v."""
    _, T, _, H, W = qkv.shape
    dqkv = torch.empty_like(qkv)
    tile = tile or fastest_tile(H, W, qkv.itemsize)
    for owns_queries in (False, True)[: 1 + (T > PANEL)]:
        tensors = (out, dout, lse, dqkv)
        launch(backward_kernel, qkv, tile, *tensors, OWNS_QUERIES=owns_queries)
    return dqkv


def fastest_tile(H: int, W: int, itemsize: int) -> Tile:
    """Returns the setting that was fastest on an H100 (docs/lab.md), but that a forward pass in
    float32 has four warps as its backward pass: two are faster up to T = PANEL, and spill above."""
    return Tile(heads_of_a_program(H, W), 2 if W <= 16 and itemsize == 2 else 4)


def heads_of_a_program(H: int, W: int) -> int:
    """Returns at most 8, in at most 16 columns unless a head is wider; the same for each program
    where H allows."""
    most = max(1, min(8, 16 // W))
    return cdiv(H, cdiv(H, most))


def launch(kernel: Any, qkv: Tensor, tile: Tile, *tensors: Tensor, **flags: bool) -> None:
    N, T, _, H, W = qkv.shape
    if qkv.numel() == 0:
        return
    flags = flags | constants(T, H, W, tile, precision(qkv.itemsize, capability(qkv.device)))
    with torch.cuda.device_of(qkv):
        kernel[(N, cdiv(H, tile.heads), cdiv(T, PANEL))](
            qkv, *tensors, LOG2_E.value * W**-0.5, T, H * W, H, **flags
        )


def constants(T: int, H: int, W: int, tile: Tile, precision: str) -> dict[str, Any]:
    return {
        "HEADS": tile.heads,
        "WIDTH": W,
        "COLUMNS": max(16, triton.next_power_of_2(tile.heads * W)),
        "SIZE": PANEL,
        "EVEN_H": H % tile.heads == 0,
        "PANELS": cdiv(T, PANEL),
        "PRECISION": precision,
        "num_warps": tile.warps,
    }
