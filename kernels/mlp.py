"""LayerNorm and the products behind it, forward and backward, without intermediate matrices.

Computes, for E models at once,

    y   = (x - mean) * rstd * scale + shift      LayerNorm of a row
    out = x + gelu(y @ up.T + up_bias) @ down.T + down_bias      with down: an MLP, tanh's GELU
    out = y @ up.T + up_bias                                     without: such as q, k, v

A program of the forward pass has some rows, and walks the U hidden columns with sums of (rows, D)
in registers. The backward pass computes LayerNorm, the first product and GELU again. A program of
`rows_kernel` has rows, walks the columns and makes dx; one of `weights_kernel` has columns of a
model, walks a part of the rows and makes the gradients of their weights. Both write sums of their
part in float32, which `sum_kernel` adds up in order: the same input gives the same bits.

A number that is not finite stays in its row of out and dx, and reaches the weights' gradients.

E models, N rows each, D width, U hidden columns: 4 D or 3 D.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastmem.kernels.tiles import capability, cdiv
from torch import Tensor

PROGRAMS = 264
"""Programs of `weights_kernel`, about: two for each multiprocessor of an H100."""
SUM_COLUMNS, SUM_PARTS = 64, 32


class Tile(NamedTuple):
    """Launch settings of a kernel."""

    rows: int
    hidden: int  # columns of U at a time
    warps: int
    stages: int = 2


@triton.jit
def matrix(ptr, rows, columns, stride, ROWS, COLUMNS):
    """Returns (rows, columns), 0 outside of (ROWS, COLUMNS)."""
    mask = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def normalized(x, d, D: tl.constexpr):
    """Returns (x - mean) * rstd and rstd of rows that are 0 from D on."""
    x = x.to(tl.float32)
    centred = tl.where((d < D)[None, :], x - (tl.sum(x, 1) / D)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + 1e-5)
    return centred * rstd[:, None], rstd


@triton.jit
def scaled(xhat, scale_ptr, shift_ptr, d, D: tl.constexpr):
    scale = tl.load(scale_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    return xhat * scale[None, :] + shift[None, :]


@triton.jit
def gate(u):
    """Returns s of gelu(u) = u * s = u / (1 + 2**t): (1 + tanh(sqrt(2 / pi) (u + c u**3))) / 2."""
    return 1.0 / (1.0 + tl.exp2(u * (-2.302208198 - 0.1029432397 * u * u)))


@triton.jit
def slope(u, s):
    return s + u * s * (1.0 - s) * (1.5957691216 + 0.2140644488 * u * u)


@triton.jit
def forward_kernel(
    x_ptr,  # (E, N, D)
    scale_ptr,  # (E, D), models stride_e apart, as of biases
    shift_ptr,
    up_ptr,  # (E, U, D), stride_m apart
    up_bias_ptr,
    down_ptr,  # (E, D, U), stride_m apart
    down_bias_ptr,
    out_ptr,  # (E, N, D) or (E, N, U)
    N,
    stride_e,
    stride_m,
    D: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,  # D rounded up to a power of two
    HAS_DOWN: tl.constexpr,
    KIND: tl.constexpr,  # of the products
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n, d, weights = tl.arange(0, BLOCK_N), tl.arange(0, WIDTH), e * stride_e
    left = tl.minimum(N - first, BLOCK_N).to(tl.int32)
    x_ptr += (e * N + first) * D
    x = matrix(x_ptr, n, d, D, left, D)
    xhat, _ = normalized(x, d, D)
    y = scaled(xhat, scale_ptr + weights, shift_ptr + weights, d, D).to(KIND)
    acc = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for start in tl.range(0, U, BLOCK_U):
        h = start + tl.arange(0, BLOCK_U)
        up = matrix(up_ptr + e * stride_m, h, d, D, U, D).to(KIND)
        u = tl.dot(y, tl.trans(up), input_precision=PRECISION)
        u += tl.load(up_bias_ptr + weights + h, mask=h < U, other=0.0).to(tl.float32)[None, :]
        if HAS_DOWN:
            down = matrix(down_ptr + e * stride_m, d, h, U, D, U).to(KIND)
            u = (u * gate(u)).to(KIND)
            acc = tl.dot(u, tl.trans(down), acc, input_precision=PRECISION)
        else:
            outs = out_ptr + (e * N + first) * U + n[:, None] * U + h[None, :]
            mask = (n < left)[:, None] & (h < U)[None, :]
            tl.store(outs, u.to(out_ptr.dtype.element_ty), mask=mask)
    if HAS_DOWN:
        bias = tl.load(down_bias_ptr + weights + d, mask=d < D, other=0.0).to(tl.float32)
        # Read again: registers that would be held during the walk are the products'.
        acc += matrix(x_ptr, n, d, D, left, D).to(tl.float32) + bias[None, :]
        outs = out_ptr + (e * N + first) * D + n[:, None] * D + d[None, :]
        mask = (n < left)[:, None] & (d < D)[None, :]
        tl.store(outs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rows_kernel(
    x_ptr,  # (E, N, D)
    dout_ptr,  # (E, N, D) or (E, N, U)
    scale_ptr,
    shift_ptr,
    up_ptr,
    up_bias_ptr,
    down_ptr,
    dx_ptr,  # (E, N, D)
    y_ptr,  # (E, N, D), for weights_kernel
    parts_ptr,  # (E, programs, 2 D or 3 D): of scale, shift and down_bias
    N,
    stride_e,
    stride_m,
    D: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_DOWN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n, d, weights = tl.arange(0, BLOCK_N), tl.arange(0, WIDTH), e * stride_e
    left = tl.minimum(N - first, BLOCK_N).to(tl.int32)
    own = (e * N + first) * D
    places = own + n[:, None] * D + d[None, :]
    stored = (n < left)[:, None] & (d < D)[None, :]
    xhat, _ = normalized(matrix(x_ptr + own, n, d, D, left, D), d, D)
    y = scaled(xhat, scale_ptr + weights, shift_ptr + weights, d, D).to(KIND)
    tl.store(y_ptr + places, y, mask=stored)
    if HAS_DOWN:
        dout = matrix(dout_ptr + own, n, d, D, left, D).to(KIND)
    dy = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for start in tl.range(0, U, BLOCK_U):
        h = start + tl.arange(0, BLOCK_U)
        up = matrix(up_ptr + e * stride_m, h, d, D, U, D).to(KIND)
        if HAS_DOWN:
            u = tl.dot(y, tl.trans(up), input_precision=PRECISION)
            u += tl.load(up_bias_ptr + weights + h, mask=h < U, other=0.0).to(tl.float32)[None, :]
            down = matrix(down_ptr + e * stride_m, d, h, U, D, U).to(KIND)
            du = tl.dot(dout, down, input_precision=PRECISION) * slope(u, gate(u))
        else:
            du = matrix(dout_ptr + (e * N + first) * U, n, h, U, left, U)
        dy = tl.dot(du.to(KIND), up, dy, input_precision=PRECISION)
    # Read again, as in forward_kernel.
    xhat, rstd = normalized(matrix(x_ptr + own, n, d, D, left, D), d, D)
    parts_ptr += (e * tl.num_programs(0) + tl.program_id(0)) * (D * (2 + HAS_DOWN)) + d
    tl.store(parts_ptr, tl.sum(dy * xhat, 0), mask=d < D)
    tl.store(parts_ptr + D, tl.sum(dy, 0), mask=d < D)
    dy *= tl.load(scale_ptr + weights + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    mean, along = tl.sum(dy, 1) / D, tl.sum(dy * xhat, 1) / D
    dx = rstd[:, None] * (dy - mean[:, None] - xhat * along[:, None])
    if HAS_DOWN:
        residual = matrix(dout_ptr + own, n, d, D, left, D).to(tl.float32)
        tl.store(parts_ptr + 2 * D, tl.sum(residual, 0), mask=d < D)
        dx += residual
    tl.store(dx_ptr + places, dx.to(dx_ptr.dtype.element_ty), mask=stored)


@triton.jit
def weights_kernel(
    y_ptr,  # (E, N, D)
    dout_ptr,  # (E, N, D) or (E, N, U)
    up_ptr,
    up_bias_ptr,
    down_ptr,
    parts_ptr,  # (E, S, P): of up, up_bias and down
    N,
    stride_e,
    stride_m,
    rows,  # of a part, a multiple of BLOCK_N
    D: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_DOWN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    part, e = tl.program_id(1), tl.program_id(2).to(tl.int64)
    h, d = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U), tl.arange(0, WIDTH)
    weights = e * stride_e
    if HAS_DOWN:
        up = matrix(up_ptr + e * stride_m, h, d, D, U, D).to(KIND)
        down = matrix(down_ptr + e * stride_m, d, h, U, D, U).to(KIND)
        bias = tl.load(up_bias_ptr + weights + h, mask=h < U, other=0.0).to(tl.float32)
    dup = tl.zeros((BLOCK_U, WIDTH), tl.float32)
    ddown = tl.zeros((BLOCK_U, WIDTH), tl.float32)
    dbias = tl.zeros((BLOCK_U,), tl.float32)
    y_ptr += e * N * D
    dout_ptr += e * N * (D if HAS_DOWN else U)
    for start in tl.range(part * rows, tl.minimum(part * rows + rows, N), BLOCK_N):
        first = tl.cast(start, tl.int64)
        n, left = tl.arange(0, BLOCK_N), N - start
        y = matrix(y_ptr + first * D, n, d, D, left, D)
        # Columns of U along the rows: the products that add up have them in registers.
        if HAS_DOWN:
            dout = matrix(dout_ptr + first * D, n, d, D, left, D).to(KIND)
            u = tl.dot(up, tl.trans(y), input_precision=PRECISION) + bias[:, None]
            s = gate(u)
            ddown = tl.dot((u * s).to(KIND), dout, ddown, input_precision=PRECISION)
            du = tl.dot(tl.trans(down), tl.trans(dout), input_precision=PRECISION) * slope(u, s)
        else:
            du = tl.trans(matrix(dout_ptr + first * U, n, h, U, left, U))
        dup = tl.dot(du.to(KIND), y, dup, input_precision=PRECISION)
        dbias += tl.sum(du.to(tl.float32), 1)
    parts_ptr += (e * tl.num_programs(1) + part) * (U * (D + 1 + HAS_DOWN * D))
    mask = (h < U)[:, None] & (d < D)[None, :]
    tl.store(parts_ptr + h[:, None] * D + d[None, :], dup, mask=mask)
    tl.store(parts_ptr + U * D + h, dbias, mask=h < U)
    if HAS_DOWN:
        parts_ptr += U * D + U
        tl.store(parts_ptr + d[None, :] * U + h[:, None], ddown, mask=mask)


@triton.jit
def sum_kernel(
    parts_ptr,  # (E, S, P)
    out_ptr,  # (E, P), rows stride_e apart
    S,
    P,
    stride_e,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the parts, SIZE at a time, in order."""
    p, e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    total = tl.zeros((SIZE, BLOCK), tl.float32)
    for start in tl.range(0, S, SIZE):
        first = (e * S + start) * P
        total += matrix(parts_ptr + first, tl.arange(0, SIZE), p, P, S - start, P)
    out = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + e * stride_e + p, out, mask=p < P)


def forward(x: Tensor, weights: Sequence[Tensor], half: bool, tile: Tile | None = None) -> Tensor:
    """Returns (E, N, D) in the dtype of x if `weights` has `down`, else (E, N, U) of the products.

    x is (E, N, D) contiguous, in the dtype of the weights (float32 or bfloat16). `weights` are
    scale, shift, up, up_bias and perhaps down, down_bias, all (E, …), each contiguous in a model,
    with one stride between models. half: products in bfloat16, else of the weights'
    dtype, float32 by tf32x3. tile overrides the setting, for measurements.
    """
    E, N, D = x.shape
    U = weights[2].shape[1]
    has_down = len(weights) > 4
    shape = (E, N, D) if has_down else (E, N, U)
    kind = torch.bfloat16 if half else x.dtype
    full = kind == torch.float32
    out = torch.empty(shape, dtype=x.dtype if has_down else kind, device=x.device)
    if out.numel() == 0:
        return out
    weights = narrowed(weights, half)
    tile = tile or tiles_of(D, full, capability(x.device))[0]
    with torch.cuda.device_of(x):
        forward_kernel[(cdiv(N, tile.rows), E)](
            x, *padded(weights), out, N, weights[0].stride(0), weights[2].stride(0),
            **constants(D, U, has_down, full, tile, x),
        )  # fmt: skip
    return out


def backward(
    dout: Tensor,  # as the output, contiguous
    x: Tensor,
    weights: Sequence[Tensor],
    half: bool,
    tiles: tuple[Tile, Tile] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns dx (E, N, D), and the gradients of all weights of each model, (E, P): of scale, shift
    and perhaps down_bias, then of up, up_bias and perhaps down."""
    E, N, D = x.shape
    U = weights[2].shape[1]
    has_down = len(weights) > 4
    kind = torch.bfloat16 if half else x.dtype
    full = kind == torch.float32
    dx, y = torch.empty_like(x), torch.empty(x.shape, dtype=kind, device=x.device)
    few, many = D * (2 + has_down), U * (D + 1 + has_down * D)
    gradients = torch.empty((E, few + many), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, gradients.zero_()
    row_tile, tile = tiles or tiles_of(D, full, capability(x.device))[1:]
    slices = cdiv(U, tile.hidden)
    rows = cdiv(cdiv(N, max(1, PROGRAMS // (slices * E))), tile.rows) * tile.rows
    parts = torch.empty((E, cdiv(N, row_tile.rows), few), device=x.device)
    wide_parts = torch.empty((E, cdiv(N, rows), many), device=x.device)
    weights = narrowed(weights, half)
    scale, shift, *products = padded(weights)[:5]
    assert scale is not None
    assert weights[2] is not None
    strides = scale.stride(0), weights[2].stride(0)
    with torch.cuda.device_of(x):
        rows_kernel[(parts.shape[1], E)](
            x, dout, scale, shift, *products, dx, y, parts, N, *strides,
            **constants(D, U, has_down, full, row_tile, x),
        )  # fmt: skip
        weights_kernel[(slices, wide_parts.shape[1], E)](
            y, dout, *products, wide_parts, N, *strides, rows,
            **constants(D, U, has_down, full, tile, x),
        )  # fmt: skip
        for summands, out in ((parts, gradients), (wide_parts, gradients[:, few:])):
            _, S, P = summands.shape
            sum_kernel[(cdiv(P, SUM_COLUMNS), E)](
                summands, out, S, P, few + many, SIZE=SUM_PARTS, BLOCK=SUM_COLUMNS, num_warps=4
            )
    return dx, gradients


def padded(weights: Sequence[Tensor]) -> list[Tensor | None]:
    return [*weights, *[None] * (6 - len(weights))]


def narrowed(weights: Sequence[Tensor], half: bool) -> list[Tensor]:
    """Returns the weights with matrices in bfloat16 where many programs would convert them."""
    if not half or weights[2].dtype == torch.bfloat16 or weights[0].shape[1] < 64:
        return list(weights)
    return [w.bfloat16() if w.ndim == 3 else w for w in weights]


# Tiles of forward_kernel, rows_kernel and weights_kernel by width, rounded up to a power of two.
# Chosen by compiling: none spills, and none was timed.
TILES = {
    **dict.fromkeys((16, 32, 64), (Tile(64, 32, 4), Tile(64, 32, 4), Tile(64, 64, 4))),
    128: (Tile(128, 64, 8), Tile(128, 32, 8), Tile(64, 128, 8)),
    256: (Tile(64, 64, 8), Tile(32, 64, 8), Tile(32, 64, 8)),
}
AMPERE = {
    **TILES,
    128: (Tile(64, 64, 4), Tile(128, 32, 8), Tile(64, 64, 8)),
    256: (Tile(64, 64, 8), Tile(32, 64, 8), Tile(32, 32, 8)),
}
FLOAT32 = {
    **dict.fromkeys((16, 32), (Tile(64, 32, 4), Tile(64, 32, 4), Tile(32, 64, 4))),
    64: (Tile(64, 32, 4), Tile(64, 32, 4), Tile(32, 32, 8)),
}
AMPERE_FLOAT32 = {
    **dict.fromkeys((16, 32), (Tile(64, 32, 4), Tile(64, 32, 4), Tile(16, 32, 4))),
    64: (Tile(32, 32, 4), Tile(32, 32, 4), Tile(32, 32, 8)),
}


BLACKWELL = {
    **TILES,
    128: (Tile(128, 64, 8), Tile(128, 32, 8), Tile(64, 64, 8)),
    256: (Tile(64, 64, 8), Tile(32, 64, 8), Tile(32, 64, 4)),
}
BLACKWELL_FLOAT32 = {**FLOAT32, 64: AMPERE_FLOAT32[64]}


def tiles_of(D: int, full: bool, capability: int) -> tuple[Tile, Tile, Tile]:
    """full: products in float32."""
    halves, singles = (
        (AMPERE, AMPERE_FLOAT32)
        if capability < 90
        else (TILES, FLOAT32)
        if capability < 100
        else (BLACKWELL, BLACKWELL_FLOAT32)
    )
    return (singles if full else halves)[width_of(D)]


def width_of(D: int) -> int:
    return max(16, int(triton.next_power_of_2(D)))


def constants(
    D: int, U: int, has_down: bool, full: bool, tile: Tile, x: Tensor | int
) -> dict[str, Any]:
    """x: a tensor, or a compute capability."""
    # Turing has neither tf32 nor bfloat16.
    newer = (capability(x.device) if isinstance(x, Tensor) else x) >= 80
    return {
        "D": D,
        "U": U,
        "WIDTH": width_of(D),
        "HAS_DOWN": has_down,
        "KIND": tl.float32 if full else tl.bfloat16,
        "PRECISION": "tf32x3" if newer and full else "ieee",
        "BLOCK_N": tile.rows,
        "BLOCK_U": tile.hidden,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
