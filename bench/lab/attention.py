"""Tiles of the package's attention kernels (kernels/attention.py), beside PyTorch's attention.

    python bench/lab/attention.py FOLDER                      on a GPU; writes FOLDER/attention.json
    TRITON_INTERPRET=1 python bench/lab/attention.py FOLDER   tiny shapes: answers only

Floors at B 512, T 63, 16 heads 2 wide: 33 million exponentials (all of 64 x 64) take 9 us, what
must be read and written 3 us. Predicted before the first run of the prototype, forward and backward
in us: 20 + 45 (PyTorch's flash attention as the engine calls it: 163 + 500). docs/lab.md has the
variants that lost.

B sequences, T tokens, H heads.
"""

import functools
import itertools
import sys
from typing import Any

import lab
import torch
import torch.nn.functional as F
from fastmem.kernels import attention as kernels
from torch import Tensor


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


def tiles(H: int, width: int) -> list[kernels.Tile]:
    return [
        kernels.Tile(heads, warps)
        for heads in (1, 4, 8, 16)
        if H % heads == 0 and heads * width <= max(32, width)
        for warps in (2, 4)
    ]


def task(pair: Any) -> str | None:
    """Compiles one tile."""
    (_, T, H, width, dtype), tile = pair
    try:
        qkv, grad = example(2, T, H, width, dtype)
        kernels.backward(grad, qkv, *kernels.forward(qkv, tile), tile)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__} {error}"[:200]
    return None


def main(folder: str) -> None:
    rows: list[dict[str, Any]] = []
    row: dict[str, Any]
    cases = TINY if lab.INTERPRETED else CASES
    pairs = [(case, tile) for case in cases for tile in tiles(*case[2:4])]
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
        for _, tile in group:
            row = {"case": name, "way": "groups", "heads, warps": tile}
            rows.append(row)
            try:
                out, lse = kernels.forward(qkv, tile)
                found = out, kernels.backward(grad, qkv, out, lse, tile)
                errors = [lab.off(x[few], y) for x, y in zip(found, exact, strict=True)]
                row["off"], row["limits"] = errors, limits
                right = all(e <= m for e, m in zip(errors, limits, strict=True))
                right = right and bool(found[1].isfinite().all())
                if right and not lab.INTERPRETED:
                    backward = functools.partial(kernels.backward, grad, qkv, out, lse, tile)
                    row["forward_us"] = lab.kernels_us(
                        functools.partial(kernels.forward, qkv, tile)
                    )
                    row["backward_us"] = lab.kernels_us(backward)
                told = f"{row.get('forward_us', 0):.1f} + {row.get('backward_us', 0):.1f} us"
                print(f"{name}: {tile} {told if right else 'WRONG'} {errors}", flush=True)
            except Exception as error:
                row["error"] = f"{type(error).__name__} {error}"[:200]
                print(f"{name}: {tile} {row['error']}", flush=True)
        lab.write("attention", rows, folder)


if __name__ == "__main__":
    main(sys.argv[1])
