"""float32 logits by three TF32 products, emulated: errors of bits and gradients, without a GPU.

    python bench/lab/tf32x3.py [--draws N] [--depths 16 32]

A TF32 matrix instruction is modelled as 8 products at a time, aligned with the sum to the greatest
exponent, added with GUARD bits more than float32 has, and truncated. Pieces of `depth` are added
with compensation, as in kernels/logits.py. Bits and gradients are then computed in float64, so that
all errors come from logits. "apart": the forward pass alone takes TF32, and its sums divide the
probabilities of IEEE products. "both": both passes take TF32. Gradients are those of hidden; their
errors are multiples of the error of PyTorch's float32 gradients.

N rows, D width, V vocabulary.
"""

import argparse
import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
GUARD = 0
N, V = 70, 150
DEPTHS = {
    32: 16,
    64: 32,
    128: 32,
    256: 16,
    512: 16,
    768: 16,
    1600: 16,
}  # tf32_tile of kernels/tiles.py


def truncated(x: Array, top: Array, bits: int) -> Array:
    """Cuts x to so many bits below the exponent of top."""
    unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(top), 1e-300))) - bits)
    return np.trunc(x / unit) * unit


def tf32(x: Array) -> Array:
    """Rounds to TF32, halves away from 0."""
    words = x.astype(np.float32).view(np.uint32)
    return ((words + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).astype(float)


def instruction(a: Array, b: Array, total: Array) -> Array:  # (N, K), (K, V), (N, V)
    for k in range(0, a.shape[1], 8):
        terms = a[:, k : k + 8, None] * b[None, k : k + 8]
        top = np.maximum(np.abs(terms).max(1), np.abs(total))
        found = truncated(terms, top[:, None], 23 + GUARD).sum(1)
        found += truncated(total, top, 23 + GUARD)
        total = truncated(found, found, 23)
    return total


def product(a: Array, b: Array, kind: str) -> Array:
    """Returns a float32 product of one piece."""
    total = np.zeros((a.shape[0], b.shape[1]))
    if kind == "ieee":
        for k in range(a.shape[1]):  # multiply-adds, each rounded once
            total = (total + a[:, k, None] * b[k]).astype(np.float32).astype(float)
        return total
    large_a, large_b = tf32(a), tf32(b)
    small_a, small_b = (truncated(x, x, 10) for x in (a - large_a, b - large_b))
    total = instruction(small_a, large_b, total)
    total = instruction(large_a, small_b, total)
    return instruction(large_a, large_b, total)


def logits(hidden: Tensor, weight: Tensor, kind: str, depth: int) -> Tensor:
    a, b = hidden.double().numpy(), weight.double().numpy().T
    total = np.zeros((len(a), b.shape[1]), np.float32)
    lost = np.zeros_like(total)
    for k in range(0, a.shape[1], depth):
        piece = product(a[:, k : k + depth], b[k : k + depth], kind).astype(np.float32) - lost
        new = total + piece
        lost = (new - total) - piece
        total = new
    return torch.from_numpy(total).double()


def gradient(p: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return (p - torch.nn.functional.one_hot(targets, V)) @ weight.double()


def errors(D: int, depth: int, seed: int) -> Iterator[tuple[int, str, list[float], list[float]]]:
    """Yields greatest logit, target, errors of bits (ieee, tf32x3, PyTorch) and of gradients (ieee,
    apart, both) as multiples of PyTorch's."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator)
    direction = torch.randn(V, D, generator=generator)
    mean = (hidden @ direction.T).amax(-1).mean()
    for greatest in (5, 50, 500):
        weight = direction * (greatest / mean)
        right = hidden.double() @ weight.double().T
        ways = {
            "ieee": logits(hidden, weight, "ieee", 16),
            "tf32x3": logits(hidden, weight, "tf32x3", depth),
            "PyTorch": (hidden @ weight.T).double(),
        }
        for name, targets in (("greatest", right.argmax(-1)), ("least", right.argmin(-1))):

            def bits(x: Tensor, targets: Tensor = targets) -> Tensor:
                return -torch.log_softmax(x, -1).gather(-1, targets[:, None])[:, 0] / math.log(2)

            exact = gradient(right.softmax(-1), targets, weight)
            lse = ways["tf32x3"].logsumexp(-1, keepdim=True)
            grads = {way: gradient(x.softmax(-1), targets, weight) for way, x in ways.items()}
            grads["apart"] = gradient((ways["ieee"] - lse).exp(), targets, weight)
            off = {way: (x - exact).abs().max().item() for way, x in grads.items()}
            yield (
                greatest,
                name,
                [(bits(x) - bits(right)).abs().max().item() for x in ways.values()],
                [off[k] / off["PyTorch"] for k in ("ieee", "apart", "tf32x3")],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="TF32 products, emulated")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--depths", type=int, nargs="+", help="for all widths; default: the tiles'")
    given = parser.parse_args()
    print(f"the worst of {given.draws} draws: D, depth, greatest logit, target; ", end="")
    print("bits ieee, tf32x3, PyTorch; gradients ieee, apart, both")
    for D in DEPTHS:
        for depth in given.depths or [DEPTHS[D]]:
            draws = [list(errors(D, depth, seed)) for seed in range(given.draws)]
            for rows in zip(*draws, strict=True):
                greatest, name = rows[0][:2]
                bits, grads = (
                    [max(values) for values in zip(*(row[i] for row in rows), strict=True)]
                    for i in (2, 3)
                )
                print(
                    f"{D:4} {depth:3} {greatest:4} {name:9}",
                    *(f"{x:.1e}" for x in bits),
                    *(f"{x:.2f}" for x in grads),
                    flush=True,
                )


if __name__ == "__main__":
    main()
