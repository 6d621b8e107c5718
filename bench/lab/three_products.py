"""Loss and both gradients of a linear head in three products, above the widths of our own kernels.

    python bench/lab/three_products.py FOLDER       on a GPU; writes FOLDER/three_products.json
    TRITON_INTERPRET=1 python bench/lab/three_products.py FOLDER        a tiny shape: answers only

For a chunk of rows one Triton kernel makes logits x and stores E = 2**(x - reference) in bfloat16,
with a reference for each row, and float32 sums of E a tile; cuBLAS makes the other two products:

    total = sum E,  bits = log2(total) + reference - x[target],  dx = (E / total - [target]) / N
    E[target] becomes (2**-bits - 1) * total, so that a memorized target loses no digits
    dhidden = (E @ weight) / (total N),  dweight += E.T @ (hidden / (total N)), summed in float32

bfloat16 has the exponents of float32: any reference within 100 bits of the log-sum-exp does, and no
pass over E is needed to rescale it. Here it is the greatest of the first 256 logits and the
target's. A row where that is too low has an infinite total, which a kernel for such rows would have
to mend.

Floors and predictions before the first run, ms of forward and backward (three products at 800 TF/s;
torch.compile, and the plain way: cuBLAS logits, one row kernel, two products):

- (65536, 1600, 50257): floor 40. Predicted 46: 16 of the kernel at 650 TF/s, 28 of cuBLAS, 2 of
  the rest. torch.compile 60, plain 55 with V padded to 50304.
- (131072, 512, 2048): floor 1.03. Predicted 1.35. torch.compile 2.1, plain 1.72.
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


@triton.jit
def powers_kernel(
    hidden,  # (N, D), or a descriptor of it, and the next too
    weight,  # (stride, D): V, and zeros
    reference_ptr,  # (N,)
    powers_ptr,  # (N, stride), 0 from V on
    sums_ptr,  # (tiles of V, N)
    N,
    D,
    V,
    stride,
    scale,
    programs,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIBED: tl.constexpr,
    FLATTEN: tl.constexpr,
    HALVES: tl.constexpr,
):
    rows_of_tiles = tl.cdiv(N, BLOCK_N)
    columns_of_tiles = tl.cdiv(V, BLOCK_V)
    for tile in tl.range(
        tl.program_id(0), rows_of_tiles * columns_of_tiles, programs, flatten=FLATTEN
    ):
        # Rows change fastest, GROUP of them at a time: what they share stays in L2.
        group = tile // (GROUP * columns_of_tiles)
        size = tl.minimum(rows_of_tiles - group * GROUP, GROUP)
        tile_n = group * GROUP + tile % (GROUP * columns_of_tiles) % size
        tile_v = tile % (GROUP * columns_of_tiles) // size
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        safe_n = tl.minimum(n, N - 1).to(tl.int64)
        safe_v = tl.minimum(v, stride - 1).to(tl.int64)
        acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for start in tl.range(0, D, BLOCK_D):
            if DESCRIBED:
                a = hidden.load([tile_n * BLOCK_N, start])
                b = weight.load([tile_v * BLOCK_V, start])
            else:
                d = start + tl.arange(0, BLOCK_D)
                inside = (d < D)[None, :]
                a = tl.load(hidden + safe_n[:, None] * D + d[None, :], mask=inside, other=0.0)
                b = tl.load(weight + safe_v[:, None] * D + d[None, :], mask=inside, other=0.0)
            acc = tl.dot(a, tl.trans(b), acc)
        base = tl.load(reference_ptr + safe_n)
        outs = powers_ptr + n.to(tl.int64)[:, None] * stride
        if HALVES:  # half of the registers at a time
            left, right = tl.split(
                tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1))
            )
            w = tile_v * BLOCK_V + tl.arange(0, BLOCK_V // 2)
            e = tl.where((w < V)[None, :], tl.exp2(left * scale - base[:, None]), 0.0)
            total = tl.sum(e, 1)
            tl.store(
                outs + w[None, :], e.to(tl.bfloat16), mask=(n < N)[:, None] & (w < stride)[None, :]
            )
            w += BLOCK_V // 2
            e = tl.where((w < V)[None, :], tl.exp2(right * scale - base[:, None]), 0.0)
            total += tl.sum(e, 1)
            tl.store(
                outs + w[None, :], e.to(tl.bfloat16), mask=(n < N)[:, None] & (w < stride)[None, :]
            )
        else:
            e = tl.where((v < V)[None, :], tl.exp2(acc * scale - base[:, None]), 0.0)
            total = tl.sum(e, 1)
            tl.store(
                outs + v[None, :], e.to(tl.bfloat16), mask=(n < N)[:, None] & (v < stride)[None, :]
            )
        tl.store(sums_ptr + tile_v * N + n, total, mask=n < N)


@triton.jit
def target_kernel(
    hidden_ptr, weight_ptr, targets_ptr, near_ptr, target_ptr, reference_ptr, D, scale,
    NEAR: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A row's target logit and reference, in bits."""
    n = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + n)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = tl.load(hidden_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        acc += a * tl.load(weight_ptr + target * D + d, mask=d < D, other=0.0).to(tl.float32)
    z = tl.sum(acc, 0) * scale
    near = tl.load(near_ptr + n * NEAR + tl.arange(0, NEAR)).to(tl.float32) * scale
    tl.store(target_ptr + n, z)
    tl.store(reference_ptr + n, tl.maximum(tl.max(near, 0), z))


@triton.jit
def finish_kernel(
    sums_ptr, reference_ptr, target_ptr, targets_ptr, hidden_ptr, powers_ptr,
    bits_ptr, factor_ptr, scaled_ptr, N, D, stride, tiles, upstream,
    TILES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A row's bits, its target's entry of E, its factor 1 / (total N), and hidden times that."""
    n = tl.program_id(0).to(tl.int64)
    total = 0.0
    for start in range(0, tiles, TILES):
        t = start + tl.arange(0, TILES)
        total += tl.sum(tl.load(sums_ptr + t * N + n, mask=t < tiles, other=0.0), 0)
    bits = tl.log2(total) + (tl.load(reference_ptr + n) - tl.load(target_ptr + n))
    x = tl.maximum(bits, 0.0) * 0.6931471805599453
    series = x * (1 - x * (0.5 - x * (0.16666667 - x * 0.041666667)))
    missing = tl.where(x < 0.03, series, 1 - tl.exp2(-bits))
    entry = powers_ptr + n * stride + tl.load(targets_ptr + n)
    tl.store(entry, (-missing * total).to(tl.bfloat16))
    factor = upstream / total
    tl.store(bits_ptr + n, bits)
    tl.store(factor_ptr + n, factor)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = tl.load(hidden_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + n * D + d, (a * factor).to(tl.bfloat16), mask=d < D)


@triton.jit
def plain_kernel(x_ptr, targets_ptr, bits_ptr, stride, V, scale, upstream, BLOCK: tl.constexpr):
    """A row of bfloat16 logits into bits and, in place, gradients."""
    n = tl.program_id(0).to(tl.int64)
    x_ptr += n * stride
    c = tl.arange(0, BLOCK)
    peak = tl.full((BLOCK,), -1e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for v in range(0, V, BLOCK):
        x = tl.load(x_ptr + v + c, mask=v + c < V, other=float("-inf")).to(tl.float32) * scale
        new = tl.maximum(peak, x)
        total = total * tl.exp2(peak - new) + tl.exp2(x - new)
        peak = new
    top = tl.max(peak, 0)
    sum_ = tl.sum(total * tl.exp2(peak - top), 0)
    target = tl.load(targets_ptr + n)
    tl.store(bits_ptr + n, tl.log2(sum_) + top - tl.load(x_ptr + target).to(tl.float32) * scale)
    for v in range(0, V, BLOCK):
        x = tl.load(x_ptr + v + c, mask=v + c < V, other=0.0).to(tl.float32) * scale
        g = tl.exp2(x - top) * (upstream / sum_) - tl.where(v + c == target, upstream, 0.0)
        tl.store(x_ptr + v + c, g.to(tl.bfloat16), mask=v + c < V)


Tile = tuple[int, int, int, int, int, str]
"""Rows, vocabulary, depth, warps, stages; how: "pointers", "described", "persistent"..."""
Found = tuple[Tensor, Tensor, Tensor]
NEAR = 256


def padded(V: int) -> int:
    return -(-V // 64) * 64


def with_zeros(w: Tensor) -> Tensor:
    """Itself, or a copy with rows of zeros: a product over 50257 columns takes 7 times as long as
    one over 50304, and stores masked at an odd column are single numbers."""
    return F.pad(w, (0, 0, 0, padded(len(w)) - len(w))) if len(w) % 64 else w


def powers(
    h: Tensor, w: Tensor, V: int, reference: Tensor, E: Tensor, sums: Tensor, tile: Tile
) -> None:
    """w: padded, of as many rows as E has columns."""
    rows, vocab, depth, warps, stages, how = tile
    N, D = h.shape
    tiles = triton.cdiv(N, rows) * triton.cdiv(V, vocab)
    programs = tiles
    if "persistent" in how:
        programs = min(tiles, torch.cuda.get_device_properties(h.device).multi_processor_count)
    a, b = h, w
    if how != "pointers":
        from triton.tools.tensor_descriptor import TensorDescriptor

        a = TensorDescriptor.from_tensor(h, [rows, depth])
        b = TensorDescriptor.from_tensor(w, [vocab, depth])
    powers_kernel[(programs,)](
        a, b, reference, E, sums, N, D, V, E.stride(0), LOG2_E, programs,
        BLOCK_N=rows, BLOCK_V=vocab, BLOCK_D=depth, GROUP=8, DESCRIBED=how != "pointers",
        FLATTEN="persistent" in how, HALVES="halves" in how, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in float32."""
    if out.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        out.add_(a.float() @ b.float())


def three_products(h: Tensor, w: Tensor, t: Tensor, chunk: int, tile: Tile) -> Found:
    """bits, and the gradients of the mean of bits * ln 2."""
    (N, D), V = h.shape, len(w)
    w = with_zeros(w)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=h.device)

    bits, dh = new(N), torch.empty_like(h)
    dw = torch.zeros(len(w), D, dtype=torch.float32, device=h.device)
    E = new(chunk, len(w), dtype=h.dtype)
    tiles = triton.cdiv(V, tile[1])
    target, reference, factor, scaled = new(chunk), new(chunk), new(chunk), torch.empty_like(h)
    near = min(NEAR, 1 << (V.bit_length() - 1))
    for i in range(0, N, chunk):
        hc, tc = h[i : i + chunk], t[i : i + chunk]
        n = len(hc)
        sums = new(tiles, n)
        first = hc @ w[:near].T
        target_kernel[(n,)](hc, w, tc, first, target, reference, D, LOG2_E, near, 512)
        powers(hc, w, V, reference, E[:n], sums, tile)
        finish_kernel[(n,)](
            sums, reference, target, tc, hc, E, bits[i:], factor, scaled, n, D, E.stride(0),
            tiles, 1 / N, 256, 512,
        )  # fmt: skip
        torch.mm(E[:n], w, out=dh[i : i + chunk])
        dh[i : i + chunk].mul_(factor[:n, None])
        add_product(dw, E[:n].T, scaled[:n])
    return bits, dh, dw[:V]


def plain(h: Tensor, w: Tensor, t: Tensor, chunk: int) -> Found:
    (N, D), V = h.shape, len(w)
    bits, dh, w = torch.empty(N, device=h.device), torch.empty_like(h), with_zeros(w)
    dw = torch.zeros(len(w), D, dtype=torch.float32, device=h.device)
    X = torch.empty(chunk, len(w), dtype=h.dtype, device=h.device)
    for i in range(0, N, chunk):
        hc = h[i : i + chunk]
        x = X[: len(hc)]
        torch.mm(hc, w.T, out=x)
        plain_kernel[(len(hc),)](
            x, t[i:], bits[i:], X.stride(0), V, LOG2_E, 1 / N,
            BLOCK=1024 if V < 4096 else 4096, num_warps=8,
        )  # fmt: skip
        torch.mm(x, w, out=dh[i : i + chunk])
        add_product(dw, x.T, hc)
    return bits, dh, dw[:V]


def eager(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), t)


def example(N: int, D: int, V: int, known: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """known: targets that cost 0.003 to 0.1 bits."""
    draw = torch.Generator(lab.DEVICE).manual_seed(0)
    h = torch.randn(N, D, generator=draw, device=lab.DEVICE)
    w = torch.randn(V, D, generator=draw, device=lab.DEVICE) / D**0.5
    t = torch.randint(V, (N,), generator=draw, device=lab.DEVICE)
    if known:
        spread = torch.linspace(0, 5, N, device=lab.DEVICE)
        h = h + w[t] * (math.log(V) + 2 + spread)[:, None]
    return h.bfloat16(), w.bfloat16(), t


def exact(h: Tensor, w: Tensor, t: Tensor) -> Found:
    a, b = (x.double().requires_grad_() for x in (h, w))
    nats = F.cross_entropy(a @ b.T, t, reduction="none")
    return (nats / math.log(2)).detach(), *torch.autograd.grad(nats.mean(), (a, b))


SHAPES = [(65536, 1600, 50257, (8192,)), (131072, 512, 2048, (32768, 131072))]
SHAPES += [(131072, 256, 2048, (131072,)), (131072, 1024, 32768, (16384,))]
TILES: list[Tile] = [
    (rows, vocab, depth, 8, stages, how)
    for rows, vocab, depth, stages in ((128, 256, 64, 3), (128, 256, 64, 4), (256, 128, 64, 3))
    for how in ("pointers", "described", "persistent", "persistent, halves")
] + [(128, 128, 64, 4, 4, how) for how in ("described", "persistent", "persistent, halves")]


def task(job: tuple[int, Tile]) -> str | None:
    D, tile = job
    try:
        h, w, _ = example(300, D, 2048 if D < 1600 else 50257)
        E = torch.empty(300, padded(len(w)), device="cuda", dtype=torch.bfloat16)
        sums = torch.empty(triton.cdiv(len(w), tile[1]), 300, device="cuda")
        powers(h, with_zeros(w), len(w), torch.zeros(300, device="cuda"), E, sums, tile)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__} {error}"[:200]
    return None


def check(tile: Tile) -> str:
    """Empty if right: no worse than twice PyTorch in bfloat16, bits within 1e-4."""
    shapes = ((300, 528, 300 if lab.INTERPRETED else 5003, 128), (512, 256, 2048, 512))
    for N, D, V, chunk in shapes[: 1 if lab.INTERPRETED else 2]:
        for known in (False, True):
            h, w, t = example(N, D, V, known)
            right = exact(h, w, t)
            a, b = (x.detach().requires_grad_() for x in (h, w))
            theirs = torch.autograd.grad(F.cross_entropy((a @ b.T).float(), t), (a, b))
            ours = three_products(h, w, t, chunk, tile)
            error = (ours[0] - right[0]).abs().max().item()
            pairs = zip(ours[1:], theirs, right[1:], strict=True)
            offs = [(lab.off(x, z), lab.off(y, z)) for x, y, z in pairs]
            if not error < 1e-4 or not all(x < 2 * y for x, y in offs):
                print(f"WRONG {tile} known {known}: bits {error:.1e}, gradients {offs}", flush=True)
                return "wrong"
            print(f"right {tile} known {known}: bits {error:.1e}, gradients {offs}", flush=True)
    return ""


def main(folder: str) -> None:
    if lab.INTERPRETED:
        for how in ("pointers", "described"):
            print(check((64, 64, 64, 4, 1, how)) or "right")
        return
    rows: list[dict[str, Any]] = []

    def tell(what: str, run: Callable[[], Any], flops: float, **more: Any) -> float:
        """Seconds; infinite where it does not run."""
        row = {"what": what, **more}
        rows.append(row)
        seconds = math.inf
        try:
            seconds = lab.kernels_us(run) / 1e6
            row["ms"], row["tflops"] = 1e3 * seconds, flops / seconds / 1e12
        except Exception as error:
            row["error"] = f"{type(error).__name__} {error}"[:200]
        print(*row.values(), flush=True)
        lab.write("three_products", rows, folder)
        torch.cuda.empty_cache()
        return seconds

    lab.compile_all(task, list(itertools.product((1600, 512), TILES)))
    for N, D, V, chunks in SHAPES:
        time_shape(N, D, V, chunks, tell)


def time_shape(N: int, D: int, V: int, chunks: tuple[int, ...], tell: Any) -> None:
    h, w, t = example(N, D, V)
    n, flops, wide = chunks[-1], 2 * N * D * V, with_zeros(w)
    one: dict[str, Any] = {"shape": (n, D, V)}
    E = torch.empty(n, padded(V), device="cuda", dtype=torch.bfloat16)
    reference = torch.full((n,), 5.0, device="cuda")
    found: dict[Tile, float] = {}
    for tile in TILES:
        sums = torch.empty(triton.cdiv(V, tile[1]), n, device="cuda")
        run = functools.partial(powers, h[:n], wide, V, reference, E, sums, tile)
        found[tile] = tell("kernel", run, flops * n / N, **one, tile=tile)
    del E
    right = [tile for tile in sorted(TILES, key=found.__getitem__)[:3] if not check(tile)]
    for chunk in chunks:
        more: dict[str, Any] = {"shape": (N, D, V), "chunk": chunk}
        for tile in right[:1]:
            run = functools.partial(three_products, h, w, t, chunk, tile)
            tell("three products", run, 3 * flops, **more, tile=tile)
        tell("plain", functools.partial(plain, h, w, t, chunk), 3 * flops, **more)
    x = torch.empty(n, padded(V), device="cuda", dtype=torch.bfloat16).normal_()
    dh, dw = torch.empty_like(h[:n]), torch.zeros(padded(V), D, device="cuda")
    tell("cuBLAS dhidden", functools.partial(torch.mm, x, wide, out=dh), flops * n / N, **one)
    run = functools.partial(add_product, dw, x.T, h[:n])
    tell("cuBLAS dweight", run, flops * n / N, **one)
    del x, dh, dw
    compiled = torch.compile(eager, dynamic=False)
    leaves = [x.detach().requires_grad_() for x in (h, w)]

    def both() -> Any:
        return torch.autograd.grad(compiled(*leaves, t), leaves)

    tell("torch.compile", both, 3 * flops, shape=(N, D, V))


if __name__ == "__main__":
    main(sys.argv[1])
