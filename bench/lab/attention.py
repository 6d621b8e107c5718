"""Causal attention for short sequences and narrow heads: three ways, beside PyTorch's.

    python bench/lab/attention.py FOLDER                      on a GPU; writes FOLDER/attention.json
    TRITON_INTERPRET=1 python bench/lab/attention.py FOLDER   tiny shapes: answers only

Floors at B 512, T 63, 16 heads 2 wide: 33 million exponentials (all of 64 x 64) take 9 us, what
must be read and written 3 us. Predicted before the first run, forward and backward in us (PyTorch's
flash attention as the engine calls it: 163 + 500):

- groups: 20 + 45. Tensor cores. A program has the columns of as many heads as fill 16, loaded once;
  a product masks one operand to the columns of one head, so no head is padded by itself.
- rows: 18 + 40. Multiply-adds. A thread has one query and reads all keys, then one key and reads
  all queries; no sum crosses threads, and exponentials are taken twice in the backward pass.

Keys by way of shared memory were the third way: Triton compiles them to the instructions of rows.

B sequences, T tokens, H heads, D = H * WIDTH.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import lab
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
PANEL = 64


@triton.jit
def columns_of(ptr, b, i, first, c, T, D, inside, part: tl.constexpr):
    """(rows, columns) of q, k or v of one sequence; 0 outside."""
    ptrs = ptr + (b * T + i).to(tl.int64)[:, None] * (3 * D) + part * D + (first + c)[None, :]
    return tl.load(ptrs, mask=(i < T)[:, None] & inside[None, :], other=0.0)


@triton.jit
def group_forward(
    qkv_ptr,  # (B, T, 3, H, WIDTH)
    out_ptr,  # (B, T, H, WIDTH)
    lse_ptr,  # (B, T, H)
    T,
    D,
    H,
    scale,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
    COLUMNS: tl.constexpr,  # at least HEADS * WIDTH
    SIZE: tl.constexpr,  # of a panel
    PANELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b = tl.program_id(0)
    first = tl.program_id(1) * (HEADS * WIDTH)
    qb = PANELS - 1 - tl.program_id(2)
    c = tl.arange(0, COLUMNS)
    inside = c < HEADS * WIDTH
    j = tl.arange(0, SIZE)
    i = qb * SIZE + j
    q = columns_of(qkv_ptr, b, i, first, c, T, D, inside, 0)
    k = columns_of(qkv_ptr, b, j, first, c, T, D, inside, 1)
    v = columns_of(qkv_ptr, b, j, first, c, T, D, inside, 2)
    out = tl.zeros((SIZE, COLUMNS), tl.float32)
    for h in tl.range(0, HEADS):
        own = (c // WIDTH == h)[None, :]
        qh = tl.where(own, q, 0.0).to(q.dtype)
        peak = tl.full((SIZE,), -1e30, tl.float32)
        total = tl.zeros((SIZE,), tl.float32)
        acc = tl.zeros((SIZE, COLUMNS), tl.float32)
        for kb in tl.range(0, qb + 1 if PANELS > 1 else 1):
            if PANELS > 1:
                k = columns_of(qkv_ptr, b, kb * SIZE + j, first, c, T, D, inside, 1)
                v = columns_of(qkv_ptr, b, kb * SIZE + j, first, c, T, D, inside, 2)
            s = tl.dot(qh, tl.trans(k), input_precision=PRECISION) * scale
            s = tl.where(i[:, None] >= (kb * SIZE + j)[None, :], s, -1e30)
            new = tl.maximum(peak, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            shrink = tl.exp2(peak - new)
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            peak = new
        out = tl.where(own, acc / total[:, None], out)
        head = tl.program_id(1) * HEADS + h
        tl.store(lse_ptr + (b * T + i) * H + head, peak + tl.log2(total), mask=i < T)
    ptrs = out_ptr + (b * T + i).to(tl.int64)[:, None] * D + (first + c)[None, :]
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=(i < T)[:, None] & inside[None, :])


@triton.jit
def group_backward(
    qkv_ptr,
    out_ptr,
    grad_ptr,  # like out
    lse_ptr,
    dqkv_ptr,  # like qkv
    T,
    D,
    H,
    scale,
    factor,  # of the products before scale * log2(e): scale itself
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    PANELS: tl.constexpr,
    QUERIES: tl.constexpr,  # owns queries and makes dq; else owns keys: dk, dv, and dq of one panel
    PRECISION: tl.constexpr,
):
    b = tl.program_id(0)
    first = tl.program_id(1) * (HEADS * WIDTH)
    panel = tl.program_id(2)
    c = tl.arange(0, COLUMNS)
    inside = c < HEADS * WIDTH
    j = tl.arange(0, SIZE)
    dq = tl.zeros((SIZE, COLUMNS), tl.float32)
    dk = tl.zeros((SIZE, COLUMNS), tl.float32)
    dv = tl.zeros((SIZE, COLUMNS), tl.float32)
    begin = 0 if QUERIES else panel
    end = panel + 1 if QUERIES else PANELS
    for other in tl.range(begin, end):
        i = (panel if QUERIES else other) * SIZE + j  # queries
        key = (other if QUERIES else panel) * SIZE + j
        q = columns_of(qkv_ptr, b, i, first, c, T, D, inside, 0)
        k = columns_of(qkv_ptr, b, key, first, c, T, D, inside, 1)
        v = columns_of(qkv_ptr, b, key, first, c, T, D, inside, 2)
        places = (b * T + i).to(tl.int64)[:, None] * D + (first + c)[None, :]
        mask = (i < T)[:, None] & inside[None, :]
        grad = tl.load(grad_ptr + places, mask=mask, other=0.0)
        flow = grad.to(tl.float32) * tl.load(out_ptr + places, mask=mask, other=0.0)
        seen = key[:, None] <= i[None, :]
        for h in tl.range(0, HEADS):
            own = (c // WIDTH == h)[None, :]
            qh = tl.where(own, q, 0.0).to(q.dtype)
            gh = tl.where(own, grad, 0.0).to(q.dtype)
            delta = tl.sum(tl.where(own, flow, 0.0), 1)
            head = tl.program_id(1) * HEADS + h
            lse = tl.load(lse_ptr + (b * T + i) * H + head, mask=i < T, other=0.0)
            # Keys along the rows, so that what goes into dv and dk is an operand in registers.
            s = tl.dot(k, tl.trans(qh), input_precision=PRECISION) * scale
            p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
            ds = p * (tl.dot(v, tl.trans(gh), input_precision=PRECISION) - delta[None, :])
            ds = ds.to(q.dtype)
            if not QUERIES:
                dv = tl.dot(p.to(q.dtype), gh, dv, input_precision=PRECISION)
                dk = tl.dot(ds, qh, dk, input_precision=PRECISION)
            if QUERIES or PANELS == 1:
                dq += tl.where(own, tl.dot(tl.trans(ds), k, input_precision=PRECISION), 0.0)
    rows = panel * SIZE + j
    outs = dqkv_ptr + (b * T + rows).to(tl.int64)[:, None] * (3 * D) + (first + c)[None, :]
    stored = (rows < T)[:, None] & inside[None, :]
    kind = dqkv_ptr.dtype.element_ty
    if QUERIES or PANELS == 1:
        tl.store(outs, (dq * factor).to(kind), mask=stored)
    if not QUERIES:
        tl.store(outs + D, (dk * factor).to(kind), mask=stored)
        tl.store(outs + 2 * D, dv.to(kind), mask=stored)


@triton.jit
def low(words):
    """The first of two bfloat16 in 32 bits."""
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(words):
    return (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rows_forward(
    qkv_ptr,  # (B, T, 3, H) int32: heads 2 wide, both numbers in one word
    out_ptr,  # (B, T, H) int32
    lse_ptr,  # (B, T, H)
    T,
    H,
    scale,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,  # at a time
):
    b = tl.program_id(0)
    r = tl.arange(0, HEADS * 64)
    i = r % 64
    head = tl.program_id(1) * HEADS + r // 64
    stored = i < T
    base = qkv_ptr + b * T * 3 * H
    own = tl.load(base + i * 3 * H + head, mask=stored, other=0)
    q0 = low(own) * scale
    q1 = high(own) * scale
    peak = tl.full((HEADS * 64,), -1e30, tl.float32)
    total = tl.zeros((HEADS * 64,), tl.float32)
    o0 = tl.zeros((HEADS * 64,), tl.float32)
    o1 = tl.zeros((HEADS * 64,), tl.float32)
    for start in tl.range(0, 64, KEYS):
        j = start + tl.arange(0, KEYS)
        places = j[:, None] * 3 * H + head[None, :]
        key = tl.load(base + places + H, mask=(j < T)[:, None], other=0)
        value = tl.load(base + places + 2 * H, mask=(j < T)[:, None], other=0)
        s = q0[None, :] * low(key) + q1[None, :] * high(key)
        s = tl.where(j[:, None] <= i[None, :], s, -1e30)
        new = tl.maximum(peak, tl.max(s, 0))
        p = tl.exp2(s - new[None, :])
        shrink = tl.exp2(peak - new)
        total = total * shrink + tl.sum(p, 0)
        o0 = o0 * shrink + tl.sum(p * low(value), 0)
        o1 = o1 * shrink + tl.sum(p * high(value), 0)
        peak = new
    tl.store(lse_ptr + (b * T + i) * H + head, peak + tl.log2(total), mask=stored)
    tl.store(out_ptr + (b * T + i) * H + head, packed(o0 / total, o1 / total), mask=stored)


@triton.jit
def packed(a, b):
    """Two float32 as bfloat16 in 32 bits."""
    a = a.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.int32)
    b = b.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.int32)
    return (b << 16) | a


@triton.jit
def rows_backward(
    qkv_ptr,
    out_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,  # like lse, scratch
    dqkv_ptr,
    T,
    H,
    scale,
    factor,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    b = tl.program_id(0)
    r = tl.arange(0, HEADS * 64)
    i = r % 64
    head = tl.program_id(1) * HEADS + r // 64
    stored = i < T
    base = qkv_ptr + b * T * 3 * H
    row = i * 3 * H + head
    q = tl.load(base + row, mask=stored, other=0)
    k = tl.load(base + row + H, mask=stored, other=0)
    v = tl.load(base + row + 2 * H, mask=stored, other=0)
    g = tl.load(grad_ptr + (b * T + i) * H + head, mask=stored, other=0)
    o = tl.load(out_ptr + (b * T + i) * H + head, mask=stored, other=0)
    lse = tl.load(lse_ptr + (b * T + i) * H + head, mask=stored, other=0.0)
    g0, g1 = low(g), high(g)
    delta = g0 * low(o) + g1 * high(o)
    tl.store(delta_ptr + (b * T + i) * H + head, delta, mask=stored)
    q0, q1 = low(q) * scale, high(q) * scale
    dq0 = tl.zeros((HEADS * 64,), tl.float32)
    dq1 = tl.zeros((HEADS * 64,), tl.float32)
    for start in tl.range(0, 64, KEYS):  # this row as a query
        j = start + tl.arange(0, KEYS)
        places = j[:, None] * 3 * H + head[None, :]
        seen = (j < T)[:, None]
        key = tl.load(base + places + H, mask=seen, other=0)
        value = tl.load(base + places + 2 * H, mask=seen, other=0)
        s = q0[None, :] * low(key) + q1[None, :] * high(key) - lse[None, :]
        p = tl.where(j[:, None] <= i[None, :], tl.exp2(s), 0.0)
        ds = p * (g0[None, :] * low(value) + g1[None, :] * high(value) - delta[None, :])
        dq0 += tl.sum(ds * low(key), 0)
        dq1 += tl.sum(ds * high(key), 0)
    k0, k1, v0, v1 = low(k) * scale, high(k) * scale, low(v), high(v)
    dk0 = tl.zeros((HEADS * 64,), tl.float32)
    dk1 = tl.zeros((HEADS * 64,), tl.float32)
    dv0 = tl.zeros((HEADS * 64,), tl.float32)
    dv1 = tl.zeros((HEADS * 64,), tl.float32)
    tl.debug_barrier()  # delta of the other threads
    for start in tl.range(0, 64, KEYS):  # and as a key
        j = start + tl.arange(0, KEYS)
        seen = (j < T)[:, None]
        query = tl.load(base + j[:, None] * 3 * H + head[None, :], mask=seen, other=0)
        places = (b * T + j)[:, None] * H + head[None, :]
        grad = tl.load(grad_ptr + places, mask=seen, other=0)
        lses = tl.load(lse_ptr + places, mask=seen, other=0.0)
        deltas = tl.load(delta_ptr + places, mask=seen, other=0.0)
        s = k0[None, :] * low(query) + k1[None, :] * high(query) - lses
        p = tl.where(i[None, :] <= j[:, None], tl.exp2(s), 0.0)
        dv0 += tl.sum(p * low(grad), 0)
        dv1 += tl.sum(p * high(grad), 0)
        ds = p * (v0[None, :] * low(grad) + v1[None, :] * high(grad) - deltas)
        dk0 += tl.sum(ds * low(query), 0)
        dk1 += tl.sum(ds * high(query), 0)
    outs = dqkv_ptr + b * T * 3 * H + row
    tl.store(outs, packed(dq0 * factor, dq1 * factor), mask=stored)
    tl.store(outs + H, packed(dk0 * factor, dk1 * factor), mask=stored)
    tl.store(outs + 2 * H, packed(dv0, dv1), mask=stored)


Runs = tuple[Callable[[], Any], Callable[[], Any], Callable[[], tuple[Tensor, Tensor]]]


def ours(way: str, qkv: Tensor, grad: Tensor, heads: int, warps: int, last: int) -> Runs:
    """Forward, backward, and what they made. last: of rows, KEYS; of groups, most registers."""
    B, T, _, H, width = qkv.shape
    out = torch.empty(B, T, H, width, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, T, H, dtype=torch.float32, device=qkv.device)
    delta, dqkv = torch.empty_like(lse), torch.empty_like(qkv)
    factor = width**-0.5
    if way == "groups":
        panels = triton.cdiv(T, PANEL)
        constants: dict[str, Any] = {
            "WIDTH": width,
            "HEADS": heads,
            "COLUMNS": max(16, triton.next_power_of_2(heads * width)),
            "SIZE": PANEL,
            "PANELS": panels,
            "PRECISION": "tf32x3" if qkv.dtype == torch.float32 else "ieee",
            "num_warps": warps,
        }
        if last:
            constants["maxnreg"] = last
        if lab.INTERPRETED:
            constants["PRECISION"] = "ieee"
        grid = (B, H // heads, panels)
        shape = (T, H * width, H, factor * LOG2_E)

        def forward() -> None:
            group_forward[grid](qkv, out, lse, *shape, **constants)

        def backward() -> None:
            for queries in (False, True)[: 2 if panels > 1 else 1]:
                group_backward[grid](
                    qkv, out, grad, lse, dqkv, *shape, factor, QUERIES=queries, **constants
                )

    else:
        assert width == 2
        assert T <= 64
        words = [x.view(torch.int32).squeeze(-1) for x in (qkv, out, grad, dqkv)]
        grid = (B, H // heads)
        shape = (T, H, factor * LOG2_E)
        constants = {"HEADS": heads, "KEYS": last, "num_warps": warps}

        def forward() -> None:
            rows_forward[grid](words[0], words[1], lse, *shape, **constants)

        def backward() -> None:
            rows_backward[grid](
                words[0], words[1], words[2], lse, delta, words[3], *shape, factor, **constants
            )

    return forward, backward, lambda: (out, dqkv)


def attended(qkv: Tensor) -> Tensor:  # (B, T, 3, H, W) → (B, T, H, W)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()


def both_passes(qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = attended(leaf)
    return out.detach(), *torch.autograd.grad(out, leaf, grad)  # type: ignore[return-value]


def example(B: int, T: int, H: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator(lab.DEVICE).manual_seed(B + T + H)
    qkv = torch.randn(B, T, 3, H, width, generator=draw, device=lab.DEVICE)
    grad = torch.randn(B, T, H, width, generator=draw, device=lab.DEVICE)
    return (2 * qkv).to(dtype), grad.to(dtype)


BF16, FP32 = torch.bfloat16, torch.float32
CASES = [  # B, T, H, width: a layer of 1 x 32, 4 x 64 and 8 x 256, other widths, longer ones
    (512, 63, 16, 2, BF16), (512, 63, 32, 2, BF16), (1024, 63, 128, 2, BF16),
    (1024, 63, 4, 64, BF16), (512, 63, 32, 1, BF16), (512, 63, 8, 4, BF16), (512, 63, 4, 8, BF16),
    (512, 63, 2, 16, BF16), (128, 255, 16, 2, BF16), (256, 127, 16, 2, BF16),
    (512, 63, 16, 2, FP32), (1024, 63, 128, 2, FP32),
]  # fmt: skip
TINY = [
    (2, 63, 16, 2, BF16), (1, 5, 4, 2, BF16), (1, 130, 4, 4, BF16), (2, 64, 2, 16, BF16),
    (1, 33, 8, 1, FP32), (1, 70, 2, 64, BF16),
]  # fmt: skip


def variants(H: int, T: int, width: int, dtype: torch.dtype) -> list[tuple[str, int, int, int]]:
    """Way, heads of a program, warps; keys at a time, or the most registers of a thread."""
    made = [
        ("groups", heads, warps, registers)
        for heads in (1, 4, 8, 16)
        if H % heads == 0 and heads * width <= max(32, width)
        for warps, registers in ((2, 0), (4, 0), (4, 128))
    ]
    if width == 2 and dtype == BF16 and T <= 64:
        sizes = [(heads, keys) for heads in (1, 2, 4) for keys in (16, 32)]
        made += [("rows", h, 2 * h, k) for h, k in sizes if H % h == 0]
    return made


def task(pair: Any) -> str | None:
    """Compiles one variant."""
    (_, T, H, width, dtype), (way, *how) = pair
    try:
        forward, backward, _ = ours(way, *example(2, T, H, width, dtype), *how)
        forward()
        backward()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__} {error}"[:200]
    return None


def main(folder: str) -> None:
    rows: list[dict[str, Any]] = []
    row: dict[str, Any]
    cases = TINY if lab.INTERPRETED else CASES
    pairs = [(case, v) for case in cases for v in variants(*case[2:3], case[1], *case[3:])]
    if not lab.INTERPRETED:
        lab.compile_all(task, pairs)
    for case, group in itertools.groupby(pairs, lambda pair: pair[0]):
        qkv, grad = example(*case)
        few = slice(0, 2)  # sequences, in float64
        exact = both_passes(qkv[few].double(), grad[few].double())
        theirs = both_passes(qkv, grad)
        limits = [max(4e-6, 3 * lab.off(a[few], b)) for a, b in zip(theirs, exact, strict=True)]
        name = f"{case[:4]} {str(case[4])[6:]}"
        if not lab.INTERPRETED:
            row = {"case": name, "way": "torch"}
            row["forward_us"] = lab.kernels_us(functools.partial(attended, qkv))
            row["both_us"] = lab.kernels_us(functools.partial(both_passes, qkv, grad))
            rows.append(row)
            print(
                f"{name}: torch {row['forward_us']:.1f}, both {row['both_us']:.1f} us", flush=True
            )
        for _, (way, *how) in group:
            row = {"case": name, "way": way, "heads, warps, last": how}
            rows.append(row)
            try:
                forward, backward, made = ours(way, qkv, grad, *how)
                for x in made():
                    x.fill_(math.nan)
                forward()
                backward()
                errors = [lab.off(x[few], y) for x, y in zip(made(), exact, strict=True)]
                row["off"], row["limits"] = errors, limits
                right = all(e <= m for e, m in zip(errors, limits, strict=True))
                right = right and bool(made()[1].isfinite().all())
                if right and not lab.INTERPRETED:
                    row["forward_us"] = lab.kernels_us(forward)
                    row["backward_us"] = lab.kernels_us(backward)
                told = f"{row.get('forward_us', 0):.1f} + {row.get('backward_us', 0):.1f} us"
                print(f"{name}: {way} {how} {told if right else 'WRONG'} {errors}", flush=True)
            except Exception as error:
                row["error"] = f"{type(error).__name__} {error}"[:200]
                print(f"{name}: {way} {how} {row['error']}", flush=True)
        lab.write("attention", rows, folder)


if __name__ == "__main__":
    main(sys.argv[1])
