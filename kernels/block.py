"""Launches of the kernels of kernels/mlp.py, forward and backward, and their tiles.

E models, N rows each, D width, U hidden columns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastmem.kernels.mlp import forward_kernel, rows_kernel, sum_kernel, weights_kernel
from fastmem.kernels.tiles import capability, cdiv, generation, precision
from torch import Tensor

PROGRAMS = 264
"""Programs of `weights_kernel`, about: two for each multiprocessor of an H100."""
SUM_PARTS, SUM_SIZE = 128, 4096
"""The most parts, and the numbers, that a program of `sum_kernel` adds at a time."""


class Tile(NamedTuple):
    """Launch settings of a kernel."""

    rows: int
    hidden: int  # columns of U at a time
    warps: int
    stages: int = 2


def forward(
    x: Tensor, mixed: Tensor | None, weights: Sequence[Tensor], half: bool
) -> tuple[Tensor, Tensor]:
    """Returns the output, and with `mixed` the input of LayerNorm, for `backward`; else nothing.

    The output is (E, N, D) in the dtype of x with 8 weights, else in the dtype of the products:
    (E, N, U) with 4, (E, N, D) with 2. x (E, N, D) contiguous, in the dtype of the weights (float32
    or bfloat16); mixed (E, N, D) contiguous, in the dtype of the products. `weights` are proj,
    proj_bias, scale, shift, up, up_bias, down, down_bias, the middle four or the middle two, all
    (E, …), each contiguous in a model, with one stride between models. half: products in bfloat16,
    else of the weights' dtype, float32 by tf32x3.
    """
    E, N, D = x.shape
    U = hidden_columns(weights)
    kind = torch.bfloat16 if half else x.dtype
    full, device = kind == torch.float32, x.device
    middle = torch.empty(0 if mixed is None else x.shape, dtype=x.dtype, device=device)
    dtype, columns = (kind, U or D) if mixed is None else (x.dtype, D)
    out = torch.empty((E, N, columns), dtype=dtype, device=device)
    if out.numel() == 0:
        return out, middle
    parameters, strides = arranged(weights, half and D >= 64)
    tile = tiles_of(D, U, full, capability(device))[0]
    with torch.cuda.device_of(x):
        forward_kernel[(cdiv(N, tile.rows), E)](
            x, mixed, *parameters, middle, out, N, *strides,
            **constants(D, U, mixed is not None, full, tile, capability(device)),
        )  # fmt: skip
    return out, middle


def backward(
    dout: Tensor,  # as the output, contiguous
    residual: Tensor | None,
    x: Tensor,
    mixed: Tensor | None,
    weights: Sequence[Tensor],
    half: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx (E, N, D), dmixed if there is `mixed`, and the gradients of all weights of each
    model in their order, (E, P), which are `into` if given: contiguous in a model. x: the input of
    LayerNorm. residual: a gradient of x (E, N, D) from elsewhere, which dx includes; without
    `mixed` alone."""
    E, N, D = x.shape
    U, device = hidden_columns(weights), x.device
    has_down = mixed is not None
    kind = torch.bfloat16 if half else x.dtype
    full = kind == torch.float32
    dx = torch.empty_like(x)
    dmixed = torch.empty(x.shape if has_down else 0, dtype=kind, device=device)
    if into is None:
        size = sum(w.shape[1:].numel() for w in weights)
        into = torch.empty((E, size), dtype=x.dtype, device=device)
    if x.numel() == 0:
        return dx, dmixed, into.zero_()
    y = torch.empty(x.shape, dtype=kind, device=device) if U else None
    row_tile, tile = tiles_of(D, U, full, capability(device))[1:]
    residual = dout if has_down else residual
    parameters, strides = arranged(weights, half and D >= 64)
    proj, _, scale, shift, *products, _ = parameters

    pieces = pieces_of(E, N, D, U, has_down, row_tile, tile)
    buffer = torch.empty(E * sum(S * P for S, P, _ in pieces), device=device)
    parts = buffer.split([E * S * P for S, P, _ in pieces])

    def sum_products(i: int, rows: Tensor, d_rows: Tensor, has_down: bool, U: int) -> None:
        weights_kernel[(cdiv(U, tile.hidden), pieces[i][0], E)](
            rows, d_rows, *products, parts[i], N, strides[0], strides[2],
            rows_of_a_part(E, N, U, tile),
            **constants(D, U, has_down, full, tile, capability(device)),
        )  # fmt: skip

    with torch.cuda.device_of(x):
        rows_kernel[(pieces[0][0], E)](
            x, dout, residual, proj, scale, shift, *products, dx, dmixed, y, parts[0], N, *strides,
            HAS_RESIDUAL=residual is not None,
            **constants(D, U, has_down, full, row_tile, capability(device)),
        )  # fmt: skip
        if y is not None:
            sum_products(1, y, dout, has_down, U)
        if mixed is not None:
            sum_products(2, mixed, dx, False, D)
        summands = min(SUM_PARTS, triton.next_power_of_2(max(S for S, _, _ in pieces)))
        columns = SUM_SIZE // summands
        sum_kernel[(max(cdiv(P, columns) for _, P, _ in pieces), E, 1 + (U > 0) + has_down)](
            buffer, into, into.stride(0), into.shape[1],
            *[n for piece in pieces for n in piece], 2 * D,
            SIZE=summands, BLOCK=columns, num_warps=4,
        )  # fmt: skip
    return dx, dmixed, into


def pieces_of(
    E: int, N: int, D: int, U: int, has_down: bool, row_tile: Tile, tile: Tile
) -> list[tuple[int, int, int]]:
    """Returns the number of parts, their columns and the first one's column among all gradients: of
    rows_kernel, of weights_kernel for up, and for proj."""
    before = (D * D + D) * has_down
    found = [(cdiv(N, row_tile.rows), D * (2 + has_down), before), (0, 0, 0), (0, 0, 0)]
    if U:
        number = cdiv(N, rows_of_a_part(E, N, U, tile))
        found[1] = number, U * (D + 1 + has_down * D), before + 2 * D
    if has_down:
        found[2] = cdiv(N, rows_of_a_part(E, N, D, tile)), before, 0
    return found


def rows_of_a_part(E: int, N: int, U: int, tile: Tile) -> int:
    programs = max(1, PROGRAMS // (cdiv(U, tile.hidden) * E))
    return cdiv(cdiv(N, programs), tile.rows) * tile.rows


def hidden_columns(weights: Sequence[Tensor]) -> int:
    return 0 if len(weights) == 2 else weights[len(weights) // 2].shape[1]


def arranged(
    weights: Sequence[Tensor], narrow: bool
) -> tuple[list[Tensor | None], tuple[int, int, int]]:
    """Returns all eight weights, None where one is missing, and the strides between models of
    vectors, proj, and up. narrow: matrices in bfloat16, which many programs would convert."""
    given = [w.bfloat16() if narrow and w.ndim == 3 else w for w in weights]
    found = [*[None, None][: 8 - len(given)], *given]
    found += [None] * (8 - len(found))
    scale, proj, up = (0 if w is None else w.stride(0) for w in (found[2], found[0], found[4]))
    return found, (scale, proj, up)


# Tiles of forward_kernel, rows_kernel and weights_kernel by width, rounded up to a power of two.
# Chosen by compiling: none spills, and none was timed.
HOPPER = {
    **dict.fromkeys((16, 32, 64), (Tile(64, 32, 4), Tile(64, 32, 4), Tile(64, 64, 4))),
    128: (Tile(64, 64, 4), Tile(128, 32, 8), Tile(64, 128, 8)),
    256: (Tile(64, 64, 8), Tile(64, 32, 8), Tile(32, 64, 8)),
}
AMPERE = {
    **HOPPER,
    128: (Tile(64, 64, 4), Tile(128, 32, 8), Tile(64, 64, 8)),
    256: (Tile(64, 32, 8), Tile(32, 32, 8), Tile(32, 32, 8)),
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
    **HOPPER,
    128: (Tile(64, 64, 4), Tile(64, 64, 8), Tile(64, 64, 8)),
    256: (Tile(64, 64, 8), Tile(32, 64, 8), Tile(32, 64, 4)),
}
BLACKWELL_FLOAT32 = {**FLOAT32, 64: AMPERE_FLOAT32[64]}
TILES = {
    100: (BLACKWELL, BLACKWELL_FLOAT32), 90: (HOPPER, FLOAT32), 80: (AMPERE, AMPERE_FLOAT32)
}  # fmt: skip


def tiles_of(D: int, U: int, full: bool, capability: int) -> tuple[Tile, Tile, Tile]:
    """full: products in float32."""
    if U == 0:
        alone = Tile(min(64, 8192 // width_of(D)), 16, 8)
        return alone, alone, alone
    return TILES[generation(capability)][full][width_of(D)]


def width_of(D: int) -> int:
    return max(16, int(triton.next_power_of_2(D)))


def constants(
    D: int, U: int, has_down: bool, full: bool, tile: Tile, capability: int
) -> dict[str, Any]:
    return {
        "D": D,
        "U": U,
        "WIDTH": width_of(D),
        "HAS_DOWN": has_down,
        "KIND": tl.float32 if full else tl.bfloat16,
        "PRECISION": precision(4 if full else 2, capability),
        "BLOCK_N": tile.rows,
        "BLOCK_U": tile.hidden,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
