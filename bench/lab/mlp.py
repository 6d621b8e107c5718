"""From the residual through LayerNorm, product, GELU, product and back, in one kernel, forward.

    python bench/lab/mlp.py FOLDER                       on a GPU; writes FOLDER/mlp.json
    TRITON_INTERPRET=1 python bench/lab/mlp.py FOLDER    tiny shapes: answers only

A program keeps its rows and what comes back to them; weights come from L2, a piece of the 4 D at a
time. Floors and predictions before the first run, us:

- D 32, N 32256: 3 (bytes), 2 (exponentials and reciprocals). Predicted 6.
- D 64, N 32256: 6, 4. Predicted 10.
- D 128, N 32256: 11, 9, products 11. Predicted 30.
- D 256, N 64512: 44, 36, products 85. Predicted 170.

N rows, float32 residual, bfloat16 weights and products, as bf16-mixed has them.
"""

import functools
import itertools
import sys
from typing import Any

import lab
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def mlp_kernel(
    x_ptr,  # (N, D)
    scale_ptr,  # (D,)
    shift_ptr,
    widen_ptr,  # (4 D, D)
    widen_bias_ptr,
    shrink_ptr,  # (D, 4 D)
    shrink_bias_ptr,
    out_ptr,  # (N, D)
    N,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    places = n[:, None] * D + d[None, :]
    x = tl.load(x_ptr + places, mask=(n < N)[:, None], other=0.0)
    centred = x - (tl.sum(x, 1) / D)[:, None]
    spread = tl.rsqrt(tl.sum(centred * centred, 1) / D + 1e-5)
    y = centred * spread[:, None] * tl.load(scale_ptr + d)[None, :]
    y = (y + tl.load(shift_ptr + d)[None, :]).to(tl.bfloat16)
    acc = tl.zeros((BLOCK_N, D), tl.float32)
    for start in tl.range(0, 4 * D, BLOCK_H, num_stages=STAGES):
        h = start + tl.arange(0, BLOCK_H)
        widen = tl.load(widen_ptr + h[:, None] * D + d[None, :])
        u = tl.dot(y, tl.trans(widen)) + tl.load(widen_bias_ptr + h).to(tl.float32)[None, :]
        # tanh's GELU: u / (1 + 2**t)
        t = u * (-2.302208198 - 0.1029432397 * u * u)
        u = u / (1.0 + tl.exp2(t))
        shrink = tl.load(shrink_ptr + d[:, None] * (4 * D) + h[None, :])
        acc = tl.dot(u.to(tl.bfloat16), tl.trans(shrink), acc)
    bias = tl.load(shrink_bias_ptr + d).to(tl.float32)
    # Read again: registers that would be held during the walk are the products'.
    x = tl.load(x_ptr + places, mask=(n < N)[:, None], other=0.0)
    tl.store(out_ptr + places, x + acc + bias[None, :], mask=(n < N)[:, None])


Weights = tuple[Tensor, ...]


def launch(x: Tensor, w: Weights, out: Tensor, tile: tuple[int, int, int, int]) -> None:
    rows, hidden, warps, stages = tile
    N, D = x.shape
    mlp_kernel[(triton.cdiv(N, rows),)](
        x, *w, out, N, D, rows, hidden, stages, num_warps=warps, num_stages=stages
    )


def plain(x: Tensor, w: Weights) -> Tensor:
    """As the engine has it, in the weights' type."""
    scale, shift, widen, widen_bias, shrink, shrink_bias = w
    y = F.layer_norm(x, x.shape[-1:], scale, shift).to(widen.dtype)
    u = F.gelu(F.linear(y, widen, widen_bias), approximate="tanh")
    return x + F.linear(u, shrink, shrink_bias)


def example(N: int, D: int) -> tuple[Tensor, Weights]:
    draw = torch.Generator(lab.DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=lab.DEVICE)

    x = 2 * normal(N, D) + 1
    norm = (1 + 0.2 * normal(D), 0.2 * normal(D))
    products = (normal(4 * D, D) / D**0.5, normal(4 * D), normal(D, 4 * D) / D**0.5, normal(D))
    return x, (*norm, *(p.bfloat16() for p in products))


CASES = [(32256, 32), (32256, 64), (32256, 128), (64512, 256)]
TILES = [
    tile
    for tile in itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (2, 3))
    if tile[0] // tile[2] in (16, 32)
]


def task(job: Any) -> str | None:
    D, tile = job
    try:
        x, w = example(256, D)
        launch(x, w, torch.empty_like(x), tile)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__} {error}"[:100]
    return None


def main(folder: str) -> None:
    rows: list[dict[str, Any]] = []
    cases = [(70, 32), (33, 64)] if lab.INTERPRETED else CASES
    tiles = TILES[:1] if lab.INTERPRETED else TILES
    if not lab.INTERPRETED:
        lab.compile_all(task, [(D, tile) for (_, D), tile in itertools.product(cases, tiles)])
    for N, D in cases:
        x, w = example(N, D)
        few = slice(0, 4096)
        exact = plain(x[few].double(), tuple(t.double() for t in w)) - x[few].double()
        limit = 2 * lab.off(plain(x[few], w) - x[few], exact)
        if not lab.INTERPRETED:
            for name, way in (("eager", plain), ("torch.compile", torch.compile(plain))):
                us = lab.kernels_us(functools.partial(way, x, w))
                rows.append({"N, D": (N, D), "way": name, "us": us})
                print((N, D), name, f"{us:.1f} us", flush=True)
        for tile in tiles:
            row: dict[str, Any] = {"N, D": (N, D), "way": "one kernel", "tile": tile}
            rows.append(row)
            try:
                out = torch.full_like(x, torch.nan)
                launch(x, w, out, tile)
                row["off"], row["limit"] = lab.off(out[few] - x[few], exact), limit
                right = row["off"] < limit and bool(out.isfinite().all())
                if right and not lab.INTERPRETED:
                    row["us"] = lab.kernels_us(functools.partial(launch, x, w, out, tile))
                print((N, D), tile, row.get("us", "right" if right else "WRONG"), flush=True)
            except Exception as error:
                row["error"] = f"{type(error).__name__} {error}"[:100]
        lab.write("mlp", rows, folder)


if __name__ == "__main__":
    main(sys.argv[1])
