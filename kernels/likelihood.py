"""Bits per token on a GPU: linear layer, softmax and look-up in one kernel, no logits in memory.

Computes

    F.cross_entropy((hidden @ weight.mT).float(), targets, reduction="none") / ln 2

A program owns BLOCK_N rows and walks the vocabulary in tiles of BLOCK_V, keeping for each row the
greatest logit so far and the sum of 2**(logit - greatest), all in bits:

    x     = hidden @ weight.mT                   one tile, float32, never stored
    new   = max(peak, max(x) * scale)            scale = log2(e) / temperature
    total = total * 2**(peak - new) + sum(2**(x * scale - new))
    bits  = log2(total) + (peak - scale * x[target])

There are no atomics and every sum has one order: the same input gives the same bits.

N rows, D width, V vocabulary, E models, S parts of a split vocabulary.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
"""What peak starts at: below every logit, and finite, so that it can be subtracted from itself."""

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

LANES: tl.constexpr = tl.constexpr(4)
"""Columns of a tile whose peak and total are kept apart until the end of the walk.

In a matrix instruction's result a row lies in 4 threads, columns 2i, 2i + 1 (mod 8) in thread i. A
peak and total for each keeps all reductions of the walk inside a thread.
"""


class Tile(NamedTuple):
    """How a kernel cuts its work, and with what it runs."""

    rows: int  # BLOCK_N
    vocab: int  # BLOCK_V
    depth: int  # BLOCK_D: of one product; the whole of D when it is resident
    warps: int
    stages: int  # tiles of the walk in flight

    def resident(self, D: int) -> bool:
        return self.depth == D


# For each width whose hidden tile stays in the program, and 0 for all others, read in pieces of
# `depth` at each step of the walk. Registers, spills and shared memory of every row are read from
# the compiled kernels by bench/aot.py.
HOPPER = {
    # 128 rows a program: a row of weight read from L2 serves 128 rows, which takes less time than
    # their exponentials. 4 warps hold 128 logits a thread, so that what a tile costs besides its
    # logits is shared by many; two programs fit an SM, and one's exponentials hide another's
    # products.
    16: Tile(128, 128, 16, 4, 3),
    32: Tile(128, 128, 32, 4, 3),
    64: Tile(128, 128, 64, 4, 3),
    128: Tile(128, 128, 128, 4, 2),  # a third stage would not leave room for a second program
    # Products now take longer than exponentials, and weight from L2 longer than both at 128 rows a
    # program: 256 rows, in 128 KiB of shared memory.
    256: Tile(256, 64, 256, 8, 2),
    512: Tile(128, 32, 512, 8, 2),  # all that fits beside 128 rows of 1 KiB
    # The largest tile of logits, for the fewest bytes a product. 128 × 256 spills.
    0: Tile(256, 128, 64, 8, 3),
}
FORWARD_TILES = {
    # 8 warps spill at 512, and 256 × 128 at 0.
    100: {**HOPPER, 512: Tile(128, 32, 512, 4, 2), 0: Tile(128, 128, 64, 8, 3)},
    90: HOPPER,
    # Operands come from registers, where a resident row of 256 does not fit. 64 columns keep all
    # warps side by side along the rows: along the vocabulary they would meet in shared memory.
    80: {
        16: Tile(128, 64, 16, 4, 3),
        32: Tile(128, 64, 32, 4, 3),
        64: Tile(128, 64, 64, 4, 3),
        128: Tile(128, 64, 128, 4, 3),
        0: Tile(128, 128, 32, 8, 3),  # within the 99 KiB of sm_86 and sm_89
    },
}

# Rows that no 16-byte load can read come element by element, with an address each.
UNALIGNED_TILE = Tile(128, 64, 32, 8, 2)

# float32 products are ordinary multiply-adds (input_precision="ieee", for 1e-4 bit), whose unrolled
# code grows with the depth. The depth is the backward pass's too: logits that are summed in another
# order there would not have this peak and total, and p - 1 shows it.
FLOAT32_TILE = Tile(64, 64, 16, 8, 2)


class Likelihood(NamedTuple):
    """What one walk over the vocabulary finds, each (E, N) float32; None if not asked for."""

    bits: Tensor  # at least 0; 0 where ignored, NaN where the target is outside [0, V)
    state: Tensor  # (2, E, N): peak and total, for the backward pass
    lse_bits: Tensor | None  # log2 of the sum of 2**logit_bits
    entropy_bits: Tensor | None  # -sum p log2 p
    second_moment: Tensor | None  # sum p (log2 p)**2
    is_greedy: Tensor | None  # bool: the target has the greatest logit, of equals the lowest index


@triton.jit
def tanh(x):
    """To 3e-7 relative: the series where 1 - 2 / (1 + e**2x) would cancel."""
    y = x * x
    near = x + x * y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
    far = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))
    return tl.where(tl.abs(x) < 0.25, near, far)


@triton.jit
def matrix(ptr, index, d, stride, stride_d, D, EVEN_D: tl.constexpr):
    """(index, d) of a matrix, 0 where d >= D. An index must be inside."""
    ptrs = ptr + index[:, None] * stride + d[None, :] * stride_d
    if EVEN_D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=d[None, :] < D, other=0.0)


@triton.jit
def logits_tile(
    a,  # (BLOCK_A, BLOCK_D) if RESIDENT, else None: read here, piece by piece
    b,
    a_ptr,
    b_ptr,
    index_a,  # (BLOCK_A,) int64, inside
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
):
    """(BLOCK_A, BLOCK_B) products of rows of a with rows of b."""
    acc = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    if RESIDENT:
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    else:
        d = tl.arange(0, BLOCK_D)
        for d0 in tl.range(0, D, BLOCK_D):
            step = tl.cast(d0, tl.int64)
            piece = matrix(
                a_ptr + step * stride_ad, index_a, d, stride_a, stride_ad, D - d0, EVEN_D
            )
            other = matrix(
                b_ptr + step * stride_bd, index_b, d, stride_b, stride_bd, D - d0, EVEN_D
            )
            acc = tl.dot(piece, tl.trans(other), acc, input_precision="ieee")
    return acc


@triton.jit
def finished_logits(
    x,
    index,  # (BLOCK_V,) columns, inside
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
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def lowered(total, first, second, down, MOMENTS: tl.constexpr):
    """Sums of e, e u and e u**2 with e = 2**u, when every u becomes u + down; down <= 0."""
    if MOMENTS > 0:
        down = tl.maximum(down, -1000.0)  # 2**-1000 is 0 and 0 * 1000**2 is not NaN
    shrink = tl.exp2(down)
    if MOMENTS > 1:
        second = shrink * (second + down * (2.0 * first + down * total))
    if MOMENTS > 0:
        first = shrink * (first + down * total)
    return shrink * total, first, second


@triton.jit
def absorb(
    x,  # (BLOCK_N, BLOCK_V) logits
    column,  # of the tile's first logit
    scale,
    peak,  # (BLOCK_N, LANES), and the four sums beside it
    total,
    first,
    second,
    best,  # (BLOCK_N,)
    best_column,
    MOMENTS: tl.constexpr,
    GREEDY: tl.constexpr,
):
    """The walk's state after one more tile."""
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
    total, first, second = lowered(total, first, second, peak - new, MOMENTS)
    total += tl.sum(tl.sum(e, 3), 1)
    if MOMENTS > 0:
        u = tl.maximum(u, -1000.0)  # 0 log 0 is 0
        first += tl.sum(tl.sum(e * u, 3), 1)
    if MOMENTS > 1:
        second += tl.sum(tl.sum(e * u * u, 3), 1)
    return new, total, first, second, best, best_column


@triton.jit
def finish(
    peak,  # (BLOCK_N,), and the rest too
    total,
    first,
    second,
    best_column,
    rows,  # int64
    hidden_ptr,  # of this model, and the rest too
    weight_ptr,
    targets_ptr,
    bias_ptr,
    shift_ptr,
    bits_ptr,
    peak_ptr,
    total_ptr,
    lse_ptr,
    entropy_ptr,
    moment_ptr,
    greedy_ptr,
    scale,
    softcap,
    ignore_index,
    N,
    D,
    V,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_tn,
    stride_bv,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    GREEDY: tl.constexpr,
    LSE: tl.constexpr,
):
    """The target's logit, by its own product so that the walk need not look for it; the outputs."""
    BLOCK_N: tl.constexpr = rows.shape[0]
    CHUNK: tl.constexpr = 32
    stored = rows < N
    safe = tl.minimum(rows, N - 1)
    target = tl.load(targets_ptr + safe * stride_tn).to(tl.int64)
    ignored = target == ignore_index
    inside = (target >= 0) & (target < V)
    column = tl.where(inside, target, 0)
    z = tl.zeros((BLOCK_N,), tl.float32)
    for d0 in tl.range(0, D, CHUNK, num_stages=1):
        d = d0 + tl.arange(0, CHUNK)
        h = matrix(hidden_ptr, safe, d, stride_hn, stride_hd, D, False).to(tl.float32)
        w = matrix(weight_ptr, column, d, stride_wv, stride_wd, D, False).to(tl.float32)
        z += tl.sum(h * w, 1)
    shift = 0.0
    if HAS_BIAS:
        shift = tl.load(shift_ptr)
        z += tl.load(bias_ptr + column * stride_bv).to(tl.float32) - shift
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    above = tl.log2(total)
    bits = above + (peak - z * scale)
    bits = tl.where(bits < 0, 0.0, bits)  # unlike maximum, keeps NaN
    bits = tl.where(inside, bits, float("nan"))
    bits = tl.where(ignored, 0.0, bits)
    tl.store(bits_ptr + rows, bits, mask=stored)
    tl.store(peak_ptr + rows, peak, mask=stored)
    tl.store(total_ptr + rows, total, mask=stored)
    if LSE:
        tl.store(lse_ptr + rows, above + (peak + shift * scale), mask=stored)
    # log2 p = u - above, u <= 0 <= above: no term below cancels another.
    if MOMENTS > 0:
        mean = first / total
        tl.store(entropy_ptr + rows, above - mean, mask=stored)
    if MOMENTS > 1:
        moment = second / total + above * (above - 2.0 * mean)
        tl.store(moment_ptr + rows, moment, mask=stored)
    if GREEDY:
        greedy = (best_column == target) & inside & (ignored == 0) & (total == total)
        tl.store(greedy_ptr + rows, greedy, mask=stored)


@triton.jit
def forward_kernel(
    hidden_ptr,  # (E, N, D)
    weight_ptr,  # (E, V, D)
    targets_ptr,  # (E, N)
    bias_ptr,  # (E, V) or None
    shift_ptr,  # (E,) or None: what is taken off the bias
    walk_ptr,  # (fields, S, E, N), or None when the vocabulary is not split
    bits_ptr,  # (E, N), and the outputs below too
    state_ptr,  # (2, E, N)
    lse_ptr,
    entropy_ptr,
    moment_ptr,
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
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    RESIDENT: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    GREEDY: tl.constexpr,
    LSE: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Parts of the vocabulary are neighbours: they read the same rows at about the same time.
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
    rows = (tl.program_id(0) // S).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe = tl.minimum(rows, N - 1)  # rows past the end repeat the last one and are not stored
    columns = tl.arange(0, BLOCK_V).to(tl.int64)
    d = tl.arange(0, BLOCK_D)

    h = None
    if RESIDENT:
        h = matrix(hidden_ptr, safe, d, stride_hn, stride_hd, D, EVEN_D)
    peak = tl.full((BLOCK_N, LANES), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N, LANES), tl.float32)
    first = tl.zeros((BLOCK_N, LANES), tl.float32)
    second = tl.zeros((BLOCK_N, LANES), tl.float32)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    best_column = tl.zeros((BLOCK_N,), tl.int32)

    begin = s * part
    end = tl.minimum(begin + part, V)
    whole = end
    if not EVEN_V:
        whole = begin + (end - begin) // BLOCK_V * BLOCK_V
    for v in tl.range(begin, whole, BLOCK_V, num_stages=STAGES):
        # The tile's base moves, offsets inside it stay: one 64-bit addition an address.
        base = weight_ptr + tl.cast(v, tl.int64) * stride_wv
        w = None
        if RESIDENT:
            w = matrix(base, columns, d, stride_wv, stride_wd, D, EVEN_D)
        x = logits_tile(
            h, w, hidden_ptr, base, safe, columns, stride_hn, stride_hd, stride_wv, stride_wd,
            D, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, RESIDENT,
        )  # fmt: skip
        x = finished_logits(
            x, columns + v, bias_ptr, shift, softcap, stride_bv, HAS_BIAS, HAS_SOFTCAP
        )
        peak, total, first, second, best, best_column = absorb(
            x, v, scale, peak, total, first, second, best, best_column, MOMENTS, GREEDY
        )
    if not EVEN_V and whole < end:
        # The ragged end: columns past it repeat the last one and count for nothing.
        index = tl.minimum(columns + whole, V - 1)
        w = None
        if RESIDENT:
            w = matrix(weight_ptr, index, d, stride_wv, stride_wd, D, EVEN_D)
        x = logits_tile(
            h, w, hidden_ptr, weight_ptr, safe, index, stride_hn, stride_hd, stride_wv, stride_wd,
            D, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, RESIDENT,
        )  # fmt: skip
        x = finished_logits(x, index, bias_ptr, shift, softcap, stride_bv, HAS_BIAS, HAS_SOFTCAP)
        x = tl.where((columns + whole < end)[None, :], x, float("-inf"))
        peak, total, first, second, best, best_column = absorb(
            x, whole, scale, peak, total, first, second, best, best_column, MOMENTS, GREEDY
        )

    greatest = tl.max(peak, 1)
    total, first, second = lowered(total, first, second, peak - greatest[:, None], MOMENTS)
    total = tl.sum(total, 1)
    first = tl.sum(first, 1)
    second = tl.sum(second, 1)
    if SPLIT:
        walk_ptr += s.to(tl.int64) * layer + e * N
        field = tl.cast(S, tl.int64) * layer
        stored = rows < N
        tl.store(walk_ptr + rows, greatest, mask=stored)
        tl.store(walk_ptr + field + rows, total, mask=stored)
        if MOMENTS > 0:
            tl.store(walk_ptr + 2 * field + rows, first, mask=stored)
            tl.store(walk_ptr + 3 * field + rows, second, mask=stored)
        if GREEDY:
            tl.store(walk_ptr + 4 * field + rows, best, mask=stored)
            tl.store(walk_ptr + 5 * field + rows, best_column.to(tl.float32), mask=stored)
    else:
        finish(
            greatest, total, first, second, best_column, rows,
            hidden_ptr, weight_ptr, targets_ptr, bias_ptr, shift_ptr,
            bits_ptr + e * N, state_ptr + e * N, state_ptr + layer + e * N,
            lse_ptr + e * N if LSE else None,
            entropy_ptr + e * N if MOMENTS > 0 else None,
            moment_ptr + e * N if MOMENTS > 1 else None,
            greedy_ptr + e * N if GREEDY else None,
            scale, softcap, ignore_index, N, D, V,
            stride_hn, stride_hd, stride_wv, stride_wd, stride_tn, stride_bv,
            HAS_BIAS, HAS_SOFTCAP, MOMENTS, GREEDY, LSE,
        )  # fmt: skip


@triton.jit
def combine_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    bias_ptr,
    shift_ptr,
    walk_ptr,  # (fields, S, E, N)
    bits_ptr,
    state_ptr,
    lse_ptr,
    entropy_ptr,
    moment_ptr,
    greedy_ptr,
    scale,
    softcap,
    ignore_index,
    layer,  # E * N
    N,
    D,
    V,
    S,
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
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    GREEDY: tl.constexpr,
    LSE: tl.constexpr,
):
    """Parts of a split vocabulary into one, in the order of the vocabulary."""
    e = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe = tl.minimum(rows, N - 1)
    field = tl.cast(S, tl.int64) * layer
    peak = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    first = tl.zeros((BLOCK_N,), tl.float32)
    second = tl.zeros((BLOCK_N,), tl.float32)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    best_column = tl.zeros((BLOCK_N,), tl.int32)
    for s in range(S):
        part = walk_ptr + tl.cast(s, tl.int64) * layer + e * N + safe
        part_peak = tl.load(part)
        part_total = tl.load(part + field)
        part_first = tl.zeros((BLOCK_N,), tl.float32)
        part_second = tl.zeros((BLOCK_N,), tl.float32)
        if MOMENTS > 0:
            part_first = tl.load(part + 2 * field)
            part_second = tl.load(part + 3 * field)
        new = tl.maximum(peak, part_peak)
        total, first, second = lowered(total, first, second, peak - new, MOMENTS)
        part_total, part_first, part_second = lowered(
            part_total, part_first, part_second, part_peak - new, MOMENTS
        )
        peak = new
        total += part_total
        first += part_first
        second += part_second
        if GREEDY:
            top = tl.load(part + 4 * field)
            column = tl.load(part + 5 * field).to(tl.int32)
            best_column = tl.where(top > best, column, best_column)
            best = tl.maximum(best, top)
    if HAS_BIAS:
        bias_ptr += e * stride_be
        shift_ptr += e
    finish(
        peak, total, first, second, best_column, rows,
        hidden_ptr + e * stride_he, weight_ptr + e * stride_we, targets_ptr + e * stride_te,
        bias_ptr, shift_ptr,
        bits_ptr + e * N, state_ptr + e * N, state_ptr + layer + e * N,
        lse_ptr + e * N if LSE else None,
        entropy_ptr + e * N if MOMENTS > 0 else None,
        moment_ptr + e * N if MOMENTS > 1 else None,
        greedy_ptr + e * N if GREEDY else None,
        scale, softcap, ignore_index, N, D, V,
        stride_hn, stride_hd, stride_wv, stride_wd, stride_tn, stride_bv,
        HAS_BIAS, HAS_SOFTCAP, MOMENTS, GREEDY, LSE,
    )  # fmt: skip


COMBINE_ROWS = 64
"""Rows of a program of combine_kernel: few, because it runs only where rows are few."""


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
    second_moment: bool = False,
    greedy: bool = False,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Likelihood:
    """Bits of each target and, on request, statistics of each row from the same walk.

    Float32, bfloat16 or float16, any strides; sums in float32. Nothing here waits for the device.
    tile and splits override the tables, for tests and measurements.
    """
    hidden, weight, targets, bias = with_models(hidden, weight, targets, bias)
    E, N, D = hidden.shape
    V = weight.shape[1]
    heavy = entropy or second_moment or greedy or softcap is not None
    tile = tile or forward_tile(
        D, hidden.itemsize, capability(hidden), aligned(hidden, weight), heavy, V % 128 > 0
    )
    if splits is None:
        splits = split_count(cdiv(N, tile.rows) * E, cdiv(V, tile.vocab), hidden.device)
        if D > 512:
            # Hidden rows are read again for every tile. Two programs to a set of rows halve the
            # rows in use at a time, which then fit into L2.
            splits = max(splits, 2)
    part = cdiv(cdiv(V, tile.vocab), splits) * tile.vocab
    splits = cdiv(V, part)
    moments = 2 if second_moment else int(entropy)
    fields = 6 if greedy else 4 if moments else 2

    def new(*shape: int, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Any:
        return torch.empty(shape, dtype=dtype, device=hidden.device) if wanted else None

    bits, state = new(E, N), new(2, E, N)
    lse_bits, entropy_bits = new(E, N, wanted=lse), new(E, N, wanted=moments > 0)
    moment = new(E, N, wanted=second_moment)
    is_greedy = new(E, N, wanted=greedy, dtype=torch.bool)
    walk = new(fields, splits, E, N, wanted=splits > 1)
    found = Likelihood(bits, state, lse_bits, entropy_bits if entropy else None, moment, is_greedy)
    if E == 0 or N == 0:
        return found
    shift = bias_shift(bias, softcap)
    arguments = (
        hidden, weight, targets, bias, shift, walk,
        bits, state, lse_bits, entropy_bits, moment, is_greedy,
        LOG2_E.value / temperature, softcap or 0.0, ignore_index, E * N, N, D, V,
    )  # fmt: skip
    strides = (
        *hidden.stride(), *weight.stride(), *targets.stride(),
        *((0, 0) if bias is None else bias.stride()),
    )  # fmt: skip
    flags = {
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "MOMENTS": moments,
        "GREEDY": greedy,
        "LSE": lse,
    }
    forward_kernel[(cdiv(N, tile.rows) * splits, E)](
        *arguments,
        splits,
        part,
        *strides,
        BLOCK_N=tile.rows,
        BLOCK_V=tile.vocab,
        BLOCK_D=tile.depth,
        EVEN_D=D % tile.depth == 0,
        EVEN_V=V % tile.vocab == 0,
        RESIDENT=tile.resident(D),
        SPLIT=splits > 1,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **flags,
    )
    if splits > 1:
        combine_kernel[(cdiv(N, COMBINE_ROWS), E)](
            *arguments, splits, *strides, BLOCK_N=COMBINE_ROWS, num_warps=4, **flags
        )
    return found


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def with_models(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All four with an axis of models: (E, N, D), (E, V, D), (E, N), (E, V)."""
    hidden = hidden if hidden.ndim == 3 else hidden.unsqueeze(0)
    weight = weight if weight.ndim == 3 else weight.unsqueeze(0)
    E, N, D = hidden.shape
    assert (weight.shape[0], weight.shape[2]) == (E, D), (hidden.shape, weight.shape)
    assert hidden.dtype == weight.dtype, (hidden.dtype, weight.dtype)
    if bias is not None:
        bias = bias.expand(E, weight.shape[1])
    return hidden, weight, targets.expand(E, N), bias


def bias_shift(bias: Tensor | None, softcap: float | None) -> Tensor | None:
    """(E,) what is taken off every logit of a model, so that a great bias costs no precision.

    A softmax does not see it, but a softcap would.
    """
    if bias is None:
        return None
    return bias.float().amax(-1) if softcap is None else bias.new_zeros(len(bias)).float()


def capability(tensor: Tensor) -> int:
    """The compute capability as in sm_90; the interpreter stands for that one."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return major * 10 + minor


def forward_tile(
    D: int, itemsize: int, capability: int, aligned: bool, heavy: bool, ragged: bool = False
) -> Tile:
    """The row of the table for this width.

    heavy: statistics or a softcap keep more of each logit in registers, so half as many. So does a
    ragged vocabulary, whose last tile is code of its own.
    """
    if itemsize == 4:
        tile = FLOAT32_TILE
    elif not aligned:
        tile = UNALIGNED_TILE
    else:
        table = FORWARD_TILES[generation(capability)]
        tile = table.get(D, table[0])
        heavy = heavy or (ragged and D in table)
    return tile._replace(vocab=max(32, tile.vocab // 2)) if heavy else tile


def aligned(*matrices: Tensor) -> bool:
    """Whether 16-byte loads can read the rows: what the compiler is told when it specializes."""
    return all(
        t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in t.stride()[:-1])
        for t in matrices
    )


def generation(capability: int) -> int:
    """The newest table that a GPU can use: 8.x is Ampere or Ada, 9.0 Hopper, then Blackwell."""
    return 80 if capability < 90 else 90 if capability < 100 else 100


def split_count(programs: int, pieces: int, device: torch.device) -> int:
    """Parts of a walk of this many pieces, when so many programs alone would leave a GPU idle.

    Two programs for each multiprocessor, but at least four pieces a part: each part pays once for
    its start.
    """
    if device.type != "cuda":
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wanted // max(programs, 1), pieces // 4))
