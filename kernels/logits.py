"""Logits inside a kernel: tiles of products, bias and softcap, and the products of the targets.

N rows, D width, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

PIECE: tl.constexpr = tl.constexpr(1024)
"""Columns of one sum where a product is summed in pieces."""
GROUP: tl.constexpr = tl.constexpr(16)
"""Blocks of rows that are neighbours in time, so that a tile of weight is read from the cache."""
PICKED: tl.constexpr = tl.constexpr(64)
"""Targets at a time: their logits are computed for all rows of a program, which keeps one a row."""


@triton.jit
def matrix(ptr, index, d, stride, stride_d, D, EVEN_D: tl.constexpr):
    """Loads (index, d) of a matrix, 0 where d >= D. Indices are int64 and in range."""
    ptrs = ptr + index[:, None] * stride + d[None, :].to(tl.int64) * stride_d
    if EVEN_D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=d[None, :] < D, other=0.0)


@triton.jit
def logits_tile(
    a,  # (BLOCK_A, BLOCK_D) if RESIDENT, else a descriptor or None: read here, piece by piece
    b,
    a_ptr,
    b_ptr,
    index_a,  # (BLOCK_A,) int64, in range; of a descriptor the first row, int32
    index_b,
    stride_a,
    stride_ad,
    stride_b,
    stride_bd,
    D,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    RESIDENT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(BLOCK_A, BLOCK_B) products of rows of a with rows of b.

    SUM: "one" sum of all products; "pieces": each PIECE columns have one sum, and ordinary
    instructions add these sums, because matrix instructions truncate, which costs bits in long
    sums; "compensated": each BLOCK_D columns have one sum, and a logit of 500 is rounded like one
    of them. Products by TF32 are added by ordinary instructions anyway.
    """
    acc = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    lost = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    if RESIDENT:
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    elif a is not None:
        for d0 in tl.range(0, D, BLOCK_D):
            acc = tl.dot(a.load([index_a, d0]), tl.trans(b.load([index_b, d0])), acc)
    elif SUM == "pieces":
        for first in tl.range(0, D, PIECE, num_stages=1):
            step = tl.cast(first, tl.int64)
            acc += logits_tile(
                None, None, a_ptr + step * stride_ad, b_ptr + step * stride_bd, index_a, index_b,
                stride_a, stride_ad, stride_b, stride_bd, tl.minimum(D - first, PIECE),
                BLOCK_A, BLOCK_B, BLOCK_D, EVEN_D, False, "one", PRECISION, STAGES,
            )  # fmt: skip
    else:
        d = tl.arange(0, BLOCK_D)
        for d0 in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            step = tl.cast(d0, tl.int64)
            piece = matrix(
                a_ptr + step * stride_ad, index_a, d, stride_a, stride_ad, D - d0, EVEN_D
            )
            other = matrix(
                b_ptr + step * stride_bd, index_b, d, stride_b, stride_bd, D - d0, EVEN_D
            )
            if SUM == "compensated":
                own = tl.dot(piece, tl.trans(other), input_precision=PRECISION) - lost
                total = acc + own
                lost = (total - acc) - own
                acc = total
            else:
                acc = tl.dot(piece, tl.trans(other), acc, input_precision=PRECISION)
    return acc


@triton.jit
def target_products(
    hidden_ptr,  # (N, D)
    weight_ptr,  # (V, D)
    targets_ptr,  # (N,)
    first,  # row of the program, int64
    N,
    D,
    V,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_tn,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Returns (BLOCK_N,) products of rows with their targets' weights; token 0 if outside [0, V).

    Uses the instructions and the order of summation of the walk's tiles. Any other product would
    round differently, and where the target has the greatest logit its bits are this difference: at
    500 it was 3e-4 of a bit.
    """
    PICK: tl.constexpr = BLOCK_N if BLOCK_N < PICKED else PICKED
    DEPTH: tl.constexpr = BLOCK_D if BLOCK_D < 64 else 64  # in smaller pieces, the same order
    n = tl.arange(0, BLOCK_N)
    rows = tl.minimum(first + n, N - 1)
    z = tl.zeros((BLOCK_N,), tl.float32)
    for pick in tl.range(0, BLOCK_N, PICK, num_stages=1):
        m = pick + tl.arange(0, PICK)
        target = tl.load(targets_ptr + tl.minimum(first + m, N - 1) * stride_tn).to(tl.int64)
        column = tl.where((target >= 0) & (target < V), target, 0)
        x = logits_tile(
            None, None, hidden_ptr, weight_ptr, rows, column,
            stride_hn, stride_hd, stride_wv, stride_wd,
            D, BLOCK_N, PICK, DEPTH, EVEN_D, False, SUM, PRECISION, 1,
        )  # fmt: skip
        z += tl.sum(tl.where(n[:, None] == m[None, :], x, 0.0), 1)
    return z


@triton.jit
def capped(x, softcap):
    """Returns softcap * tanh(x / softcap) and its slope.

    tanh has a relative error of 2e-7: a series replaces 1 - t where it would cancel. The slope
    comes from t, since 1 - tanh**2 would lose all digits where tanh is almost 1.
    """
    x = x / softcap
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    r = 1.0 / (1.0 + t)
    far = (1.0 - t) * r
    far = tl.where(x < 0, -far, far)
    y = x * x
    near = x + x * y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
    slope = 4.0 * t * r * r
    return softcap * tl.where(y < 0.0625, near, far), slope


@triton.jit
def finished_logits(
    x,
    index,  # (BLOCK_V,) columns, in range
    bias_ptr,
    shift,
    softcap,
    stride_bv,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    if HAS_BIAS:
        x += (tl.load(bias_ptr + index * stride_bv).to(tl.float32) - shift)[None, :]
    if HAS_SOFTCAP:
        x, _ = capped(x, softcap)
    return x


@triton.jit
def place(i, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Returns the place of tile i, the rows changing fastest, GROUP of them at a time."""
    i = tl.cast(i, tl.int32)  # the interpreter counts in Python
    blocks = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(V, BLOCK_V)
    group = i // (GROUP * tiles)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    inside = i % (GROUP * tiles)
    return group * GROUP + inside % size, inside // size


@triton.jit
def tile_of_logits(
    hidden_tiles, weight_tiles, hidden_ptr, weight_ptr, bias_ptr, shift_ptr,
    tile_n, tile_v, softcap, N, D, V, stride_hn, stride_hd, stride_wv, stride_wd,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Returns rows, columns, logits and their slopes by the softcap; of any value past the end."""
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    safe = tl.minimum(columns, V - 1)
    own, other = tl.minimum(rows, N - 1).to(tl.int64), safe.to(tl.int64)
    if hidden_tiles is not None:
        own, other = tile_n * BLOCK_N, tile_v * BLOCK_V
    x = logits_tile(
        hidden_tiles, weight_tiles, hidden_ptr, weight_ptr, own, other,
        stride_hn, stride_hd, stride_wv, stride_wd, D, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, False,
        SUM, PRECISION, STAGES,
    )  # fmt: skip
    if HAS_BIAS:
        shift = tl.load(shift_ptr)
        x += (tl.load(bias_ptr + safe).to(tl.float32) - shift)[None, :]
    slope = 1.0
    if HAS_SOFTCAP:
        x, slope = capped(x, softcap)
    return rows, columns, x, slope


def bias_shift(bias: Tensor | None, softcap: float | None, E: int = 1) -> Tensor | None:
    """Returns (E,) the shift of each model's logits, so that a large bias costs no precision.

    Softmax is invariant to it, a softcap is not. It is the largest finite bias if the subtraction
    is exact for every other bias, else 0: one large bias must not round the bias of other tokens.
    """
    if bias is None:
        return None
    bias = bias.float().expand(E, bias.shape[-1])
    finite = bias.isfinite()
    top = torch.where(finite, bias, -torch.inf).amax(-1, keepdim=True)
    exact = (~finite | ((bias - top) + top == bias)).all(-1) & top[:, 0].isfinite()
    return torch.where(exact & (softcap is None), top[:, 0], 0.0)
