"""What the backward pass needs of each row, before it walks over rows; dhidden made ahead; rows
times factors.

A walk over rows would compute these numbers again for each tile of each program: at D = 256 that
was half of its instructions.

N rows, D width, V vocabulary, E models.
"""

import functools

import torch
import triton
import triton.language as tl
from fastmem.kernels.launch import Key, Launch, Layout, aligned, key
from fastmem.kernels.tiles import cdiv
from torch import Tensor

STEP: tl.constexpr = tl.constexpr(4096.0)
"""Scales probabilities before they are rounded for the second product: float16 has numbers from
2**-24 to 65504."""


@triton.jit
def rows_kernel(
    made_ptr,  # (E, N, D) or None, as out_ptr
    weight_ptr,  # (E, V, D)
    targets_ptr,  # (E, N)
    grad_ptr,  # (E, N) upstream
    state_ptr,  # (3, E, N): of likelihood_ahead.py; else (2, E, N)
    amplitude_ptr,  # () or None: of amplitude_of
    rows_ptr,  # (3, E, N) or None
    out_ptr,
    scale,
    ignore_index,
    layer,  # E * N
    N,
    D,
    V,
    stride_we,
    stride_wv,
    stride_wd,
    stride_te,
    stride_tn,
    stride_ge,
    stride_gn,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WANT_OUT: tl.constexpr,
    WANT_ROWS: tl.constexpr,
    HAS_AMPLITUDE: tl.constexpr,
):
    """Stores target, upstream and upstream / total of rows of all models; out may be made."""
    layer = tl.cast(layer, tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    stored = rows < layer
    safe = tl.minimum(rows, layer - 1)
    e, n = safe // N, safe % N
    target = tl.load(targets_ptr + e * stride_te + n * stride_tn).to(tl.int64)
    counts = (target >= 0) & (target < V) & (target != ignore_index)
    # The upstream gradient of an ignored row may be NaN or infinite.
    grad = tl.load(grad_ptr + e * stride_ge + n * stride_gn).to(tl.float32)
    if WANT_ROWS:
        factor = scale
        if HAS_AMPLITUDE:
            factor *= tl.load(amplitude_ptr)
        upstream = grad * factor
        over = upstream / tl.load(state_ptr + layer + safe)
        # Of the same kind as the other two: one tensor.
        place = tl.where(counts, target, -1).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(rows_ptr + rows, place, mask=stored)
        tl.store(rows_ptr + layer + rows, upstream, mask=stored)
        tl.store(rows_ptr + 2 * layer + rows, tl.where(counts, over, 0.0), mask=stored)
    if WANT_OUT:
        d = tl.arange(0, BLOCK_D)
        mask = stored[:, None] & (d < D)[None, :]
        its = weight_ptr + e * stride_we + tl.where(counts, target, 0) * stride_wv
        its = tl.load(its[:, None] + d[None, :].to(tl.int64) * stride_wd, mask=mask, other=0.0)
        at = safe[:, None] * D + d[None, :]
        made = tl.load(made_ptr + at, mask=mask, other=0.0).to(tl.float32)
        missing = tl.load(state_ptr + 2 * layer + safe)
        out = (grad * scale)[:, None] * (made - missing[:, None] * its.to(tl.float32))
        out = tl.where(counts[:, None], out, 0.0)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


ENTRIES = 2048
"""Entries of dhidden of a program."""
ROWS = 256
"""Rows of a program that makes no dhidden."""


def constants(D: int, want: tuple[bool, bool], amplitude: bool) -> dict[str, int | bool]:
    """want: dhidden, rows."""
    wide = 1 << (D - 1).bit_length()
    return {
        "BLOCK_N": ENTRIES // wide if want[0] else ROWS,
        "BLOCK_D": wide,
        "WANT_OUT": want[0],
        "WANT_ROWS": want[1],
        "HAS_AMPLITUDE": amplitude,
    }


SCALED_ROWS, SCALED_COLUMNS = 16, 256
"""Of a program of `scale_kernel`."""


@triton.jit
def scale_kernel(
    x_ptr,  # (N, D)
    factor_ptr,  # (N,)
    out_ptr,  # (N, D)
    N,
    D,
    stride_n,
    stride_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    factor = tl.load(factor_ptr + rows, mask=rows < N, other=0.0)[:, None]
    stored = (rows < N)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_n + d[None, :] * stride_d, mask=stored, other=0.0)
    found = tl.where(factor == 0, 0.0, x.to(tl.float32) * factor)
    outs = out_ptr + rows[:, None] * D + d[None, :]
    tl.store(outs, found.to(out_ptr.dtype.element_ty), mask=stored)


def scaled(x: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Returns out = factor * x, 0 in rows of factor 0, whose x may be NaN. out: contiguous."""
    N, D = x.shape
    scale_kernel[(cdiv(N, SCALED_ROWS), cdiv(D, SCALED_COLUMNS))](
        x, factor, out, N, D, *x.stride(),
        BLOCK_N=SCALED_ROWS, BLOCK_D=SCALED_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=1024)
def plan(
    weight_key: Key,
    targets_key: Key,
    grad_bits_key: Key,
    alignment: tuple[bool, ...],  # of the data of these, of made and of the state
    shape: tuple[int, ...],  # E, N
    device: torch.device,
    ignore_index: int,
    want: tuple[bool, bool],
    amplitude: bool,
) -> Launch:
    weight, targets, grad_bits = Layout(*weight_key), Layout(*targets_key), Layout(*grad_bits_key)
    (E, N), (_, V, D) = shape, weight.models
    integers = (
        ignore_index, E * N, N, D, V,
        *weight.strides, *targets.expanded(E, N), *grad_bits.expanded(E, N),
    )  # fmt: skip
    block = constants(D, want, amplitude)
    grid = (cdiv(E * N, block["BLOCK_N"]), 1, 1)
    return Launch(rows_kernel, grid, device, integers, block, 4, 3)


def amplitude_of(
    grad_bits: Tensor, targets: Tensor, V: int, ignore_index: int, scale: float
) -> Tensor:
    """Returns () the factor with which upstream gradients of rows fit into float16."""
    # The upstream gradient of an ignored row may be NaN or infinite.
    ids = targets.to(torch.int64)
    counts = (ids >= 0) & (ids < V) & (ids != ignore_index)
    largest = torch.where(counts, grad_bits, 0).abs().amax().float() * scale
    return float(STEP.value) / largest.clamp_min(1e-30)


def prepare(
    grad_bits: Tensor,  # (E, N), any strides
    weight: Tensor,
    targets: Tensor,
    state: Tensor,  # (2 or 3, E, N)
    made: Tensor | None,  # of likelihood_ahead.forward
    scale: float,
    ignore_index: int,
    *,
    want_rows: bool,
    in_place: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns what gradient_kernel needs of rows, the amplitude, and dhidden if it was made ahead.

    in_place: dhidden in the memory of `made` if it has the same type.
    """
    device, rows, amplitude, out = weight.device, None, None, made
    if want_rows:
        if weight.dtype == torch.float16:
            V = weight.shape[-2]
            amplitude = amplitude_of(grad_bits, targets, V, ignore_index, scale)
        rows = torch.empty((3, *state.shape[1:]), dtype=torch.float32, device=device)
    if made is not None and not (in_place and made.dtype == weight.dtype):
        out = torch.empty(made.shape, dtype=weight.dtype, device=device)
    launch = plan(
        key(weight), key(targets), key(grad_bits), aligned(weight, targets, grad_bits, made, state),
        state.shape[1:], device, ignore_index, (made is not None, want_rows), amplitude is not None,
    )  # fmt: skip
    launch(made, weight, targets, grad_bits, state, amplitude, rows, out, scale)
    return rows, amplitude, out
