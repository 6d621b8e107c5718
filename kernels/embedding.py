"""Embedding of tokens and positions on a GPU, and its gradient without a sort or atomics.

Computes, for each of E models, of sequences of T tokens end to end,

    weight[tokens] + positions[:T].repeat(N // T, 1)
    torch.zeros(V + S, D).index_add_(0, tokens, dx).index_add_(0, V + arange(N) % T, dx)

and another gradient of weight, such as of a tied head, with it.

Three kernels put the rows of a token in its piece of a list, in their order: each piece of SIZE
rows counts its tokens; sums over the pieces are where the rows of a piece begin; each row goes to
its place. A program of the fourth sums the rows of one token, or of one position, in float32 and
always in the same order: the same input gives the same bytes, and a row that is not finite changes
only its token and its position.

E models, N rows, V tokens, S positions, D width.
"""

import torch
import triton
import triton.language as tl
from fastmem.kernels.tiles import cdiv
from torch import Tensor

SIZE = 128
"""Rows of a piece, each of which is compared with all others."""
WARPS = 8
"""Of a program that compares: four would spill."""
PIECES, TOKENS = 64, 32
"""Pieces and tokens of a program that sums counts."""
ROWS, NUMBERS = 64, 2048
"""The most rows, and the numbers, that are read at a time."""


@triton.jit
def forward_kernel(
    tokens_ptr,  # (E, N)
    weight_ptr,  # (E, V, D), models stride_v apart
    positions_ptr,  # (E, S, D), stride_s apart
    out_ptr,  # (E, N, D)
    N,
    T,
    D,
    stride_v,
    stride_s,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (n < N)[:, None] & (d < D)[None, :]
    row = tl.load(tokens_ptr + e * N + n, mask=n < N, other=0)
    out = tl.load(weight_ptr + e * stride_v + row[:, None] * D + d, mask=mask, other=0.0)
    at = positions_ptr + e * stride_s + (n % T)[:, None] * D + d
    out = out.to(tl.float32) + tl.load(at, mask=mask, other=0.0).to(tl.float32)
    outs = out_ptr + (e * N + n)[:, None] * D + d
    tl.store(outs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def count_kernel(
    tokens_ptr,  # (E, N)
    counts_ptr,  # (E, pieces, V) of zeros
    ranks_ptr,  # (E, N): equal tokens before it in its piece
    N,
    V,
    SIZE: tl.constexpr,
):
    e, piece = tl.program_id(1).to(tl.int64), tl.program_id(0)
    j = tl.arange(0, SIZE)
    n = piece * SIZE + j
    t = tl.load(tokens_ptr + e * N + n, mask=n < N, other=-1).to(tl.int32)
    equal = t[:, None] == t[None, :]
    rank = tl.sum((equal & (j[None, :] < j[:, None])).to(tl.int32), 1)
    after = tl.sum((equal & (j[None, :] > j[:, None])).to(tl.int32), 1)
    tl.store(ranks_ptr + e * N + n, rank, mask=n < N)
    counts_ptr += (e * tl.num_programs(0) + piece) * V
    tl.store(counts_ptr + t, rank + 1, mask=(n < N) & (after == 0))


@triton.jit
def sum_kernel(
    counts_ptr,  # (E, pieces, V), made sums over the pieces before
    totals_ptr,  # (E, V)
    pieces,
    V,
    PIECES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    v = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    counts_ptr += e * pieces * V
    before = tl.zeros((TOKENS,), tl.int32)
    for begin in tl.range(0, pieces, PIECES):
        piece = (begin + tl.arange(0, PIECES)).to(tl.int64)
        mask = (piece < pieces)[:, None] & (v < V)[None, :]
        at = counts_ptr + piece[:, None] * V + v[None, :]
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, before[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        before += tl.sum(count, 0)
    tl.store(totals_ptr + e * V + v, before, mask=v < V)


@triton.jit
def place_kernel(
    tokens_ptr,  # (E, N)
    counts_ptr,  # (E, pieces, V)
    ranks_ptr,  # (E, N)
    ends_ptr,  # (E, V): of each token's rows in the list
    totals_ptr,  # (E, V)
    list_ptr,  # (E, N): rows, by token
    N,
    V,
    SIZE: tl.constexpr,
):
    e, piece = tl.program_id(1).to(tl.int64), tl.program_id(0)
    n = piece * SIZE + tl.arange(0, SIZE)
    t = tl.load(tokens_ptr + e * N + n, mask=n < N, other=0)
    begin = tl.load(ends_ptr + e * V + t) - tl.load(totals_ptr + e * V + t)
    begin += tl.load(counts_ptr + (e * tl.num_programs(0) + piece) * V + t)
    rank = tl.load(ranks_ptr + e * N + n, mask=n < N, other=0)
    tl.store(list_ptr + e * N + begin + rank, n, mask=n < N)


@triton.jit
def gather_kernel(
    dx_ptr,  # (E, N, D)
    ends_ptr,  # (E, V)
    totals_ptr,  # (E, V)
    list_ptr,  # (E, N)
    residual_ptr,  # (E, V, D), another gradient of weight, or None
    out_ptr,  # (E, V + S, D), models stride apart
    stride,
    N,
    T,
    V,
    D,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    v = tl.num_programs(0) - 1 - tl.program_id(0)  # positions first, which have more rows
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_token = v < V
    own = tl.where(v - V < T, N // T, 0)  # rows of a position, T apart
    end = tl.load(ends_ptr + e * V + v, mask=is_token, other=own)
    begin = end - tl.load(totals_ptr + e * V + v, mask=is_token, other=own)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in tl.range(begin, end, ROWS):
        k = first + tl.arange(0, ROWS)
        n = tl.load(list_ptr + e * N + k, mask=(k < end) & is_token, other=0)
        n = tl.where(is_token, n, v - V + k * T).to(tl.int64)
        mask = (k < end)[:, None] & (d < D)[None, :]
        acc += tl.load(dx_ptr + (e * N + n)[:, None] * D + d[None, :], mask=mask, other=0.0)
    out = tl.sum(acc, 0)
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + (e * V + v) * D + d, mask=(d < D) & is_token, other=0.0)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + e * stride + v.to(tl.int64) * D + d, out, mask=d < D)


def forward(tokens: Tensor, weight: Tensor, positions: Tensor, T: int) -> Tensor:
    """Returns (E, N, D); tokens (E, N) contiguous, the others contiguous in a model."""
    (E, N), D = tokens.shape, weight.shape[2]
    out = torch.empty((E, N, D), dtype=weight.dtype, device=weight.device)
    if out.numel():
        block = columns_of_a_program(D)
        with torch.cuda.device_of(weight):
            forward_kernel[(cdiv(N, NUMBERS // block), E, cdiv(D, block))](
                tokens, weight, positions, out, N, T, D, weight.stride(0), positions.stride(0),
                ROWS=NUMBERS // block, BLOCK_D=block, num_warps=4,
            )  # fmt: skip
    return out


def backward(
    dx: Tensor, residual: Tensor | None, tokens: Tensor, T: int, V: int, S: int, into: Tensor
) -> None:
    """Writes the gradients of weight and positions into (E, (V + S) * D), contiguous in a model.

    dx (E, N, D), residual (E, V, D) another gradient of weight, tokens (E, N); all contiguous.
    """
    E, N, D = dx.shape
    device, pieces = dx.device, cdiv(N, SIZE)
    if dx.numel() == 0:
        into.zero_()
        if residual is not None:
            into[:, : V * D] += residual.flatten(1)
        return
    counts = torch.zeros((E, pieces, V), dtype=torch.int32, device=device)
    ranks, places = torch.empty((2, E, N), dtype=torch.int32, device=device)
    totals = torch.empty((E, V), dtype=torch.int32, device=device)
    block = columns_of_a_program(D)
    rows = min(ROWS, NUMBERS // block)
    with torch.cuda.device_of(dx):
        count_kernel[(pieces, E)](tokens, counts, ranks, N, V, SIZE=SIZE, num_warps=WARPS)
        sum_kernel[(cdiv(V, TOKENS), E)](counts, totals, pieces, V, PIECES=PIECES, TOKENS=TOKENS)
        ends = totals.cumsum(1, dtype=torch.int32)
        place_kernel[(pieces, E)](tokens, counts, ranks, ends, totals, places, N, V, SIZE=SIZE)
        gather_kernel[(V + S, E, cdiv(D, block))](
            dx, ends, totals, places, residual, into, into.stride(0), N, T, V, D,
            HAS_RESIDUAL=residual is not None, ROWS=rows, BLOCK_D=block, num_warps=1,
        )  # fmt: skip


def columns_of_a_program(D: int) -> int:
    return min(64, int(triton.next_power_of_2(D)))


def table_bytes(E: int, N: int, V: int) -> int:
    """Bytes of the table of counts."""
    return 4 * E * cdiv(N, SIZE) * V
