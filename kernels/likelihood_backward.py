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

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastmem.kernels import chunks
from fastmem.kernels.chunks import Gradients
from fastmem.kernels.combine import sum_launch
from fastmem.kernels.launch import Key, Launch, Layout, aligned, key
from fastmem.kernels.logits import LOG2_E, bias_shift, capped, logits_tile, matrix
from fastmem.kernels.rows import STEP, prepare
from fastmem.kernels.tiles import (
    GradientTile,
    capability,
    cdiv,
    chunked,
    gradient_tile,
    products,
    split_count,
)
from torch import Tensor


@triton.jit
def gradient_kernel(
    own_ptr,  # (E, OWN, D): hidden if OWNS_ROWS, else weight
    walk_ptr,  # (E, WALK, D): weight if OWNS_ROWS, else hidden
    targets_ptr,  # (E, N), as grad_ptr: for OWNS_ROWS
    bias_ptr,  # (E, V) or None
    shift_ptr,  # (E,) or None
    grad_ptr,  # (E, N) upstream
    state_ptr,  # (2, E, N): peak and total of the forward walk
    amplitude_ptr,  # () or None, as rows_ptr of rows.py; both None for OWNS_ROWS
    rows_ptr,  # (3, E, N): target, upstream, upstream / total
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
    OWNS_ROWS: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_WALK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    EVEN_WALK: tl.constexpr,
    RESIDENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_AMPLITUDE: tl.constexpr,
    WANT_OUT: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
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
    if not OWNS_ROWS:
        rows_ptr += e * N
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
            D, BLOCK_OWN, BLOCK_WALK, BLOCK_D, EVEN_D, RESIDENT,
            SUM, PRECISION, STAGES,
        )  # fmt: skip

        columns = (walk + start if OWNS_ROWS else safe_own).to(tl.int32)
        if OWNS_ROWS:
            target = tl.load(targets_ptr + safe_own * stride_tn).to(tl.int64)
            counts = (target >= 0) & (target < V) & (target != ignore_index)
            target = tl.where(counts, target, -1).to(tl.int32)
            upstream = tl.full(target.shape, STEP, tl.float32)
            peak = tl.load(state_ptr + safe_own)
            over = tl.where(counts, upstream / tl.load(state_ptr + layer + safe_own), 0.0)
        else:
            # The sum runs over rows, each with its own upstream gradient.
            rows = walk + start
            target = tl.load(rows_ptr + rows).to(tl.int32, bitcast=True)
            upstream = tl.load(rows_ptr + layer + rows)
            over = tl.load(rows_ptr + 2 * tl.cast(layer, tl.int64) + rows)
            peak = tl.load(state_ptr + rows)
        # Rows lie along one axis of the tile, the vocabulary along the other.
        if OWNS_ROWS:
            target, upstream = target[:, None], upstream[:, None]
            peak, over = peak[:, None], over[:, None]
            columns = columns[None, :]
        else:
            target, upstream = target[None, :], upstream[None, :]
            peak, over = peak[None, :], over[None, :]
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
            acc = tl.dot(g.to(walk_ptr.dtype.element_ty), b, acc, input_precision=PRECISION)
        if WANT_BIAS:
            bias_acc += tl.sum(g, 1)

    stored = own < OWN
    first = (s.to(tl.int64) * tl.num_programs(2) + e) * OWN
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
        outs = out_ptr + first * D + own[:, None] * D + d_out[None, :]
        mask = stored[:, None] & (d_out[None, :] < D)
        tl.store(outs, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if WANT_BIAS and chunk == 0:
        bias_outs = bias_out_ptr + first + own
        tl.store(bias_outs, (bias_acc * factor).to(bias_out_ptr.dtype.element_ty), mask=stored)


class Plan(NamedTuple):
    """What shapes, strides and settings decide about a gradient."""

    owns_rows: bool
    parts: int  # of a split walk
    gradient: Launch
    sums: list[Launch | None]  # of the parts of out and of bias_out


@functools.lru_cache(maxsize=1024)
def plans(
    hidden_key: Key,
    weight_key: Key,
    targets_key: Key,
    bias_key: Key | None,
    grad_bits_key: Key,
    alignment: tuple[bool, ...],  # of the data of all these, and of the state
    device: torch.device,
    wanted: tuple[bool, bool, bool],  # dhidden, dweight, dbias
    softcap: bool,
    ignore_index: int,
    tile: GradientTile | None,
    splits: int | None,
) -> list[Plan]:
    """Chooses tiles and grids of the wanted gradients once for all calls of one shape."""
    hidden, weight, targets = Layout(*hidden_key), Layout(*weight_key), Layout(*targets_key)
    grad_bits = Layout(*grad_bits_key)
    bias = None if bias_key is None else Layout(*bias_key)
    E, V, D = weight.models
    N = hidden.models[1]
    assert hidden.models == (E, N, D), (hidden, weight)
    assert hidden.dtype == weight.dtype, (hidden, weight)
    kind = D, hidden.dtype.itemsize, capability(device)
    even = hidden.aligned and weight.aligned and all(alignment[:2])

    def plan(owns_rows: bool, want_out: bool, want_bias: bool) -> Plan:
        chosen = tile or gradient_tile(*kind, even, softcap, bias is not None, owns_rows)
        own, walk = (hidden, weight) if owns_rows else (weight, hidden)
        OWN, WALK = own.models[1], walk.models[1]
        chunks = cdiv(D, chosen.out) if want_out else 1
        programs, pieces = cdiv(OWN, chosen.own), cdiv(WALK, chosen.walk)
        S = splits or min(
            split_count(programs * chunks * E, WALK, chosen.walk, chosen.resident(D), device),
            max(1, WALK // OWN),  # the workspace is at most as large as the walked matrix
        )
        part = cdiv(pieces, S) * chosen.walk
        S = cdiv(WALK, part)
        constants = {
            "OWNS_ROWS": owns_rows,
            "BLOCK_OWN": chosen.own,
            "BLOCK_WALK": chosen.walk,
            "BLOCK_OUT": chosen.out,
            "EVEN_OUT": D % chosen.out == 0,
            "EVEN_WALK": WALK % chosen.walk == 0,
            "RESIDENT": chosen.resident(D),
            "HAS_BIAS": bias is not None,
            "HAS_SOFTCAP": softcap,
            "HAS_AMPLITUDE": hidden.dtype == torch.float16 and not owns_rows,
            "WANT_OUT": want_out,
            "WANT_BIAS": want_bias,
            **products(*kind, chosen.depth),
            "STAGES": chosen.stages,
        }
        integers = (
            ignore_index, E * N, N, D, V, chunks, part,
            *own.strides, *walk.strides, *targets.expanded(E, N),
            *((0, 0) if bias is None else bias.expanded(E, V)), *grad_bits.expanded(E, N),
        )  # fmt: skip
        grid, settings = (programs, chunks * S, E), (constants, chosen.warps, chosen.stages)
        gradient = Launch(gradient_kernel, grid, device, integers, *settings)
        sums = [sum_launch(n, S, device) if S > 1 else None for n in (E * OWN * D, E * V)]
        return Plan(owns_rows, S, gradient, sums)

    found = [plan(True, True, False)] if wanted[0] else []
    return found + ([plan(False, *wanted[1:])] if wanted[1] or wanted[2] else [])


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
    made: Tensor | None = None,
    in_place: bool = False,
    tile: GradientTile | None = None,
    splits: int | None = None,
    as_inputs: bool = False,
) -> Gradients:
    """Returns the wanted gradients: (E, N, D), (E, V, D) and (E, V), or shaped as the inputs.

    made, of likelihood_ahead.forward as the state, may be overwritten with dhidden if in_place.
    Ignored targets and targets outside [0, V) have no gradient. Never waits for the device. The
    workspace of a split walk over N is at most N × D float32.
    """
    assert not want_bias or bias is not None, "want_bias needs a bias, got None"
    device, empty = hidden.device, hidden.numel() == 0
    scale = LOG2_E.value / temperature
    if chunked(hidden.shape[-1], hidden.itemsize) and not empty and tile is None and splits is None:
        found = chunks.backward_of_models(
            grad_bits, hidden, weight, targets, state, bias, softcap, temperature, ignore_index,
            (want_hidden, want_weight, want_bias),
        )  # fmt: skip
        if as_inputs and hidden.ndim == 2:
            found = found.of(0)
        return found
    wanted = want_hidden and made is None, want_weight, want_bias
    dhidden, dweight, dbias = chunks.empty_gradients(hidden, weight, bias, wanted)
    if empty:
        for x in (dhidden, dweight, dbias):
            if x is not None:
                x.zero_()
    planned, shift, rows, amplitude = [], None, None, None
    if not empty:
        shift = bias_shift(bias, softcap, len(weight) if weight.ndim == 3 else 1)
        planned = plans(
            key(hidden), key(weight), key(targets), None if bias is None else key(bias),
            key(grad_bits), aligned(hidden, weight, targets, bias, grad_bits, state), device,
            wanted, softcap is not None, ignore_index, tile, splits,
        )  # fmt: skip
        made = made if want_hidden else None
        if made is not None or want_weight or want_bias:
            rows, amplitude, ahead = prepare(
                grad_bits, weight, targets, state, made, scale, ignore_index,
                want_rows=want_weight or want_bias, in_place=in_place,
            )  # fmt: skip
            dhidden = dhidden if ahead is None else ahead
    for owns_rows, S, gradient, sums in planned:
        own, walk = (hidden, weight) if owns_rows else (weight, hidden)
        outs = (dhidden, None) if owns_rows else (dweight, dbias)
        parts: Any = outs
        if S > 1:
            parts = [
                None
                if x is None
                else torch.empty((S, *x.shape), dtype=torch.float32, device=device)
                for x in outs
            ]
        gradient(
            own, walk, targets, bias, shift, grad_bits, state,
            *((None, None) if owns_rows else (amplitude, rows)), *parts,
            scale, softcap or 0.0,
        )  # fmt: skip
        for total, pieces, out in zip(sums, parts, outs, strict=True):
            if total is not None and out is not None:
                total(pieces, out)
    if as_inputs or hidden.ndim == 3:
        return Gradients(dhidden, dweight, dbias)
    return Gradients(*(None if x is None else x.unsqueeze(0) for x in (dhidden, dweight, dbias)))
