"""Gradient of the token embedding on a GPU, by counting in place of a sort, and without atomics.

Computes, for each of E models,

    torch.zeros(V, D).index_add_(0, tokens, dx)

Three kernels put the positions of a token in its piece of a list, in their order: each piece of
SIZE positions counts its tokens; sums over the pieces are where the positions of a piece begin;
each position goes to its place. A program of the fourth sums the rows of one token, in float32 and
always in the same order: the same input gives the same bytes, and a row that is not finite changes
only its token.

E models, N positions, V tokens, D width.
"""

import torch
import triton
import triton.language as tl
from fastmem.kernels.tiles import cdiv
from torch import Tensor

SIZE = 128
"""Positions of a piece, each of which is compared with all others."""
WARPS = 8
"""Of a program that compares: four would spill."""
PIECES, TOKENS = 64, 32
"""Pieces and tokens of a program that sums counts."""
ROWS = 16
"""Positions of a token that are summed at a time."""


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
    ends_ptr,  # (E, V): of each token's positions in the list
    totals_ptr,  # (E, V)
    list_ptr,  # (E, N): positions, by token
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
    out_ptr,  # (E, V, D)
    N,
    V,
    D,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    e, v = tl.program_id(1).to(tl.int64), tl.program_id(0)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(ends_ptr + e * V + v)
    begin = end - tl.load(totals_ptr + e * V + v)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in tl.range(begin, end, ROWS):
        k = first + tl.arange(0, ROWS)
        n = tl.load(list_ptr + e * N + k, mask=k < end, other=0).to(tl.int64)
        mask = (k < end)[:, None] & (d < D)[None, :]
        acc += tl.load(dx_ptr + (e * N + n)[:, None] * D + d[None, :], mask=mask, other=0.0)
    out = tl.sum(acc, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (e * V + v) * D + d, out, mask=d < D)


def gradient(dx: Tensor, tokens: Tensor, V: int) -> Tensor:  # (E, N, D), (E, N) → (E, V, D)
    """Returns the gradient of the embedding, of the dtype of dx; both inputs contiguous."""
    E, N, D = dx.shape
    device, pieces = dx.device, cdiv(N, SIZE)
    out = torch.empty((E, V, D), dtype=dx.dtype, device=device)
    if out.numel() == 0 or N == 0:
        return out.zero_()
    counts = torch.zeros((E, pieces, V), dtype=torch.int32, device=device)
    ranks, places = torch.empty((2, E, N), dtype=torch.int32, device=device)
    totals = torch.empty((E, V), dtype=torch.int32, device=device)
    block = min(64, triton.next_power_of_2(D))
    with torch.cuda.device_of(dx):
        count_kernel[(pieces, E)](tokens, counts, ranks, N, V, SIZE=SIZE, num_warps=WARPS)
        sum_kernel[(cdiv(V, TOKENS), E)](counts, totals, pieces, V, PIECES=PIECES, TOKENS=TOKENS)
        ends = totals.cumsum(1, dtype=torch.int32)
        place_kernel[(pieces, E)](tokens, counts, ranks, ends, totals, places, N, V, SIZE=SIZE)
        gather_kernel[(V, E, cdiv(D, block))](
            dx, ends, totals, places, out, N, V, D, ROWS=ROWS, BLOCK_D=block, num_warps=1
        )
    return out


def table_bytes(E: int, N: int, V: int) -> int:
    """Bytes of the table of counts."""
    return 4 * E * cdiv(N, SIZE) * V
