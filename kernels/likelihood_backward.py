"""Gradients of bits per token on a GPU, from recomputed tiles of logits.

    g[v] = grad * d bits / d x[v] = grad * scale * (p[v] - [v = target])
    dhidden = g @ weight,   dweight = g.mT @ hidden,   dbias = g.sum(0)
    scale = log2(e) / temperature

The two products are one kernel with exchanged roles: a program *owns* rows of one matrix and
*walks* the other. It computes a tile of logits again, turns it into gradients and multiplies them
with the walked tile, which it has already. Only one program writes a row: without atomics, every
sum has one order.

N rows, D width, V vocabulary, E models, S parts of a split walk.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastmem.kernels import chunks
from fastmem.kernels.likelihood import bias_shift, with_models
from fastmem.kernels.logits import LOG2_E, capped, logits_tile, matrix
from fastmem.kernels.tiles import (
    CHUNKED_ABOVE,
    GradientTile,
    aligned,
    capability,
    cdiv,
    gradient_tile,
    split_count,
)
from torch import Tensor

STEP: tl.constexpr = tl.constexpr(4096.0)
"""Scales probabilities before they are rounded for the second product: float16 has numbers from
2**-24 to 65504."""


class Gradients(NamedTuple):
    """Gradients of the sum of grad_bits * bits in the dtypes of the inputs; None if not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@triton.jit
def gradient_kernel(
    own_ptr,  # (E, OWN, D): hidden if OWNS_ROWS, else weight
    walk_ptr,  # (E, WALK, D): weight if OWNS_ROWS, else hidden
    targets_ptr,  # (E, N)
    bias_ptr,  # (E, V) or None
    shift_ptr,  # (E,) or None
    grad_ptr,  # (E, N) upstream
    state_ptr,  # (2, E, N): peak and total of the forward walk
    amplitude_ptr,  # () or None: see backward
    out_ptr,  # (S, E, OWN, D)
    bias_out_ptr,  # (S, E, V) or None
    scale,
    softcap,
    ignore_index,
    layer,  # E * N
    N,
    D,
    V,
    chunks,  # programs that share D
    part,  # walked rows of one part
    stride_oe,
    stride_on,
    stride_od,
    stride_we,
    stride_wn,
    stride_wd,
    stride_te,
    stride_tn,
    stride_be,
    stride_bv,
    stride_ge,
    stride_gn,
    stride_xs,
    stride_xe,
    stride_xn,
    stride_xd,
    stride_ys,
    stride_ye,
    stride_yv,
    OWNS_ROWS: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_WALK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    EVEN_WALK: tl.constexpr,
    RESIDENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_AMPLITUDE: tl.constexpr,
    WANT_OUT: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    STAGES: tl.constexpr,
):
    s = tl.program_id(1) // chunks
    chunk = tl.program_id(1) % chunks
    d_out = chunk * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    e = tl.program_id(2).to(tl.int64)
    own_ptr += e * stride_oe
    walk_ptr += e * stride_we
    targets_ptr += e * stride_te
    grad_ptr += e * stride_ge
    state_ptr += e * N
    shift = 0.0
    if HAS_BIAS:
        bias_ptr += e * stride_be
        shift = tl.load(shift_ptr + e)
    amplitude = 1.0
    if HAS_AMPLITUDE:
        amplitude = tl.load(amplitude_ptr)

    OWN = N if OWNS_ROWS else V
    WALK = V if OWNS_ROWS else N
    own = tl.program_id(0).to(tl.int64) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    safe_own = tl.minimum(own, OWN - 1)  # rows past the end repeat the last row, not stored
    d = tl.arange(0, BLOCK_D)
    a = None
    if RESIDENT:
        a = matrix(own_ptr, safe_own, d, stride_on, stride_od, D, EVEN_D)
    acc = tl.zeros((BLOCK_OWN, BLOCK_OUT), tl.float32)
    bias_acc = tl.zeros((BLOCK_OWN,), tl.float32)

    begin = s * part
    end = tl.minimum(begin + part, WALK)
    for start in tl.range(begin, end, BLOCK_WALK, num_stages=STAGES):
        walk = tl.arange(0, BLOCK_WALK).to(tl.int64)
        if not EVEN_WALK:
            walk = tl.minimum(walk, WALK - 1 - start)
        base = walk_ptr + tl.cast(start, tl.int64) * stride_wn
        b = None
        if RESIDENT:
            b = matrix(base, walk, d, stride_wn, stride_wd, D, EVEN_D)
        x = logits_tile(
            a, b, own_ptr, base, safe_own, walk, stride_on, stride_od, stride_wn, stride_wd,
            D, BLOCK_OWN, BLOCK_WALK, BLOCK_D, EVEN_D, RESIDENT, STAGES,
        )  # fmt: skip

        rows = safe_own if OWNS_ROWS else walk + start
        columns = (walk + start if OWNS_ROWS else safe_own).to(tl.int32)
        target = tl.load(targets_ptr + rows * stride_tn).to(tl.int64)
        counts = (target >= 0) & (target < V) & (target != ignore_index)
        target = tl.where(counts, target, -1).to(tl.int32)
        upstream = tl.full(target.shape, STEP, tl.float32)
        if not OWNS_ROWS:
            # The sum runs over rows, each with its own upstream gradient.
            upstream = tl.load(grad_ptr + rows * stride_gn).to(tl.float32) * (scale * amplitude)
        peak = tl.load(state_ptr + rows)
        over = tl.where(counts, upstream / tl.load(state_ptr + layer + rows), 0.0)
        # Rows lie along one axis of the tile, the vocabulary along the other.
        if OWNS_ROWS:
            target, upstream, peak, over = (
                target[:, None],
                upstream[:, None],
                peak[:, None],
                over[:, None],
            )
            columns = columns[None, :]
        else:
            target, upstream, peak, over = (
                target[None, :],
                upstream[None, :],
                peak[None, :],
                over[None, :],
            )
            columns = columns[:, None]
        if HAS_BIAS:
            x += tl.load(bias_ptr + columns.to(tl.int64) * stride_bv).to(tl.float32) - shift
        slope = 1.0
        if HAS_SOFTCAP:
            x, slope = capped(x, softcap)
        # p - 1 before rounding: p of a memorized target is almost 1.
        g = tl.exp2(x * scale - peak) * over - tl.where(columns == target, upstream, 0.0)
        if HAS_SOFTCAP:
            g *= slope
        if not EVEN_WALK:
            g = tl.where((start + tl.arange(0, BLOCK_WALK) < WALK)[None, :], g, 0.0)
        if WANT_OUT:
            if not RESIDENT:
                b = matrix(base, walk, d_out, stride_wn, stride_wd, D, EVEN_OUT)
            acc = tl.dot(g.to(walk_ptr.dtype.element_ty), b, acc, input_precision="ieee")
        if WANT_BIAS:
            bias_acc += tl.sum(g, 1)

    stored = own < OWN
    factor = 1.0 / amplitude
    if OWNS_ROWS:
        rows_factor = tl.load(grad_ptr + safe_own * stride_gn).to(tl.float32) * (scale / STEP)
        # The upstream gradient of an ignored row may be NaN or infinite.
        target = tl.load(targets_ptr + safe_own * stride_tn).to(tl.int64)
        counts = (target >= 0) & (target < V) & (target != ignore_index)
        acc *= tl.where(counts, rows_factor, 0.0)[:, None]
    else:
        acc *= factor
    if WANT_OUT:
        outs = out_ptr + s.to(tl.int64) * stride_xs + e * stride_xe
        outs = outs + own[:, None] * stride_xn + d_out[None, :].to(tl.int64) * stride_xd
        mask = stored[:, None] & (d_out[None, :] < D)
        if ACCUMULATE:
            acc += tl.load(outs, mask=mask, other=0.0).to(tl.float32)
        tl.store(outs, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if WANT_BIAS and chunk == 0:
        bias_outs = bias_out_ptr + s.to(tl.int64) * stride_ys + e * stride_ye + own * stride_yv
        tl.store(bias_outs, (bias_acc * factor).to(bias_out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def sum_kernel(
    parts_ptr,  # (S, E, V, D) contiguous float32
    out_ptr,  # (E, V, D)
    total,  # E * V * D
    V,
    D,
    S,
    stride_e,
    stride_v,
    stride_d,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the parts of a split walk, in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
    row = i // D
    outs = out_ptr + row // V * stride_e + row % V * stride_v + i % D * stride_d
    acc = tl.zeros((BLOCK,), tl.float32)
    for s in range(S):
        acc += tl.load(parts_ptr + tl.cast(s, tl.int64) * total + i, mask=mask, other=0.0)
    if ACCUMULATE:
        acc += tl.load(outs, mask=mask, other=0.0).to(tl.float32)
    tl.store(outs, acc.to(out_ptr.dtype.element_ty), mask=mask)


SUM_BLOCK = 1024


def backward(
    grad_bits: Tensor,  # (E, N), any strides
    hidden: Tensor,  # (N, D) or (E, N, D)
    weight: Tensor,  # (V, D) or (E, V, D)
    targets: Tensor,  # (N,) or (E, N)
    state: Tensor,  # (2, E, N), from forward
    bias: Tensor | None = None,  # (V,) or (E, V)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    *,
    want_hidden: bool = True,
    want_weight: bool = True,
    want_bias: bool = False,
    dweight_out: Tensor | None = None,
    tile: GradientTile | None = None,
    splits: int | None = None,
) -> Gradients:
    """Returns the wanted gradients: (E, N, D), (E, V, D) and (E, V).

    dweight_out, shaped like weight, accumulates dweight (tied embeddings) and is returned. Ignored
    targets and targets outside [0, V) have no gradient. Never waits for the device. The workspace
    of a split walk over N is at most N × D float32.
    """
    assert not want_bias or bias is not None, "want_bias needs a bias, got None"
    hidden, weight, targets, bias = with_models(hidden, weight, targets, bias)
    E, N, D = hidden.shape
    V = weight.shape[1]
    grad_bits = grad_bits.expand(E, N)
    kind = (
        D, hidden.itemsize, capability(hidden), aligned(hidden, weight),
        softcap is not None, bias is not None,
    )  # fmt: skip
    shift = bias_shift(bias, softcap)
    scale = LOG2_E.value / temperature
    device = hidden.device

    if chunked(hidden) and E > 0 and N > 0 and tile is None and splits is None:
        return chunked_backward(
            grad_bits, hidden, weight, targets, state, bias, softcap, temperature, ignore_index,
            (want_hidden, want_weight, want_bias), dweight_out,
        )  # fmt: skip

    def launch(
        owns_rows: bool,
        own: Tensor,
        walk: Tensor,
        out: Tensor | None,  # shaped like own
        bias_out: Tensor | None,  # (E, V)
        accumulate: bool,
    ) -> None:
        chosen = tile or gradient_tile(*kind, owns_rows)
        chunks = 1 if out is None else cdiv(D, chosen.out)
        programs, pieces = cdiv(own.shape[1], chosen.own), cdiv(walk.shape[1], chosen.walk)
        S = splits or min(
            split_count(programs * chunks * E, pieces, device),
            max(1, walk.shape[1] // own.shape[1]),  # the workspace is at most as large as walk
        )
        part = cdiv(pieces, S) * chosen.walk
        S = cdiv(walk.shape[1], part)
        amplitude = None
        if own.dtype == torch.float16 and not owns_rows:
            # The upstream gradient of an ignored row may be NaN or infinite.
            ids = targets.to(torch.int64)
            counts = (ids >= 0) & (ids < V) & (ids != ignore_index)
            largest = torch.where(counts, grad_bits, 0).abs().amax().float() * scale
            amplitude = STEP.value / largest.clamp_min(1e-30)
        outs = [out, bias_out]
        if S == 1:
            parts = [None if t is None else t.unsqueeze(0) for t in outs]
        else:
            parts = [
                None
                if t is None
                else torch.empty((S, *t.shape), dtype=torch.float32, device=device)
                for t in outs
            ]
        x, y = parts
        gradient_kernel[(programs, chunks * S, E)](
            own, walk, targets, bias, shift, grad_bits, state, amplitude, x, y,
            scale, softcap or 0.0, ignore_index,
            E * N, N, D, V, chunks, part,
            *own.stride(), *walk.stride(), *targets.stride(),
            *((0, 0) if bias is None else bias.stride()), *grad_bits.stride(),
            *((0, 0, 0, 0) if x is None else x.stride()),
            *((0, 0, 0) if y is None else y.stride()),
            OWNS_ROWS=owns_rows,
            BLOCK_OWN=chosen.own,
            BLOCK_WALK=chosen.walk,
            BLOCK_D=chosen.depth,
            BLOCK_OUT=chosen.out,
            EVEN_D=D % chosen.depth == 0,
            EVEN_OUT=D % chosen.out == 0,
            EVEN_WALK=walk.shape[1] % chosen.walk == 0,
            RESIDENT=chosen.resident(D),
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_AMPLITUDE=amplitude is not None,
            WANT_OUT=x is not None,
            WANT_BIAS=y is not None,
            ACCUMULATE=accumulate and S == 1,
            STAGES=chosen.stages,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )  # fmt: skip
        if S > 1:
            for t, pieces_of_t in zip(outs, parts, strict=True):
                if t is not None:
                    last = t.shape[-1]
                    sum_kernel[(cdiv(t.numel(), SUM_BLOCK),)](
                        pieces_of_t, t, t.numel(), t.shape[1], last if t.ndim == 3 else 1, S,
                        *(t.stride() if t.ndim == 3 else (*t.stride(), 0)),
                        ACCUMULATE=accumulate and t is out,
                        BLOCK=SUM_BLOCK,
                        num_warps=4,
                    )  # fmt: skip

    def zeros(x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=x.dtype, device=device)

    # Contiguous for any strides of the inputs, as the operator's fake implementation promises.
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=device) if want_hidden else None
    dbias = zeros(bias) if want_bias and bias is not None else None
    dweight = None
    if want_weight:
        dweight = zeros(weight) if dweight_out is None else dweight_out.view(weight.shape)
    if E > 0 and N > 0:
        with torch.cuda.device_of(hidden):
            if dhidden is not None:
                launch(True, hidden, weight, dhidden, None, False)
            if dweight is not None or dbias is not None:
                launch(False, weight, hidden, dweight, dbias, dweight_out is not None)
    return Gradients(dhidden, dweight, dbias)


def chunked(hidden: Tensor) -> bool:
    """True if the gradients are made in chunks: the table of tiles.CHUNKED_ABOVE."""
    return hidden.itemsize == 2 and hidden.shape[-1] > CHUNKED_ABOVE


def chunked_backward(
    grad_bits: Tensor,  # (E, N)
    hidden: Tensor,  # (E, N, D)
    weight: Tensor,
    targets: Tensor,
    state: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    wanted: tuple[bool, bool, bool],
    dweight_out: Tensor | None,
) -> Gradients:
    """`backward`, one model after another."""
    shift = bias_shift(bias, softcap)
    outs: list[list[Tensor]] = [[], [], []]
    with torch.cuda.device_of(hidden):
        for e in range(len(hidden)):
            found = chunks.backward(
                grad_bits[e], hidden[e], weight[e], targets[e], state[:, e],
                None if bias is None else bias[e], None if shift is None else shift[e],
                softcap, temperature, ignore_index, wanted,
                weight.dtype if dweight_out is None else torch.float32,
            )  # fmt: skip
            for out, gradient in zip(outs, found, strict=True):
                out += [] if gradient is None else [gradient]
    dhidden, dweight, dbias = (
        None if not out else out[0][None] if len(out) == 1 else torch.stack(out) for out in outs
    )
    if dweight_out is not None and dweight is not None:
        dweight = dweight_out.view(weight.shape).add_(dweight)
    return Gradients(dhidden, dweight, dbias)
