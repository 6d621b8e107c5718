"""Inputs of token_bits, oracles and error limits for the tests on a CPU.

N rows, D width, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BIT = 1e-4
"""The largest error of a token's bits, besides the rounding of a float32 result."""

Case = tuple[Tensor, Tensor, Tensor, Tensor | None]


# N, D, V: aligned, then odd on each axis, then all odd, then one of each.
SHAPES = [(64, 32, 128), (63, 32, 128), (64, 31, 128), (64, 32, 127), (37, 13, 101), (1, 1, 1)]


def example(
    N: int, D: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, ...]:
    """The same numbers on every device: drawn on the CPU, returned on the default device."""
    device, cpu = torch.get_default_device(), torch.device("cpu")
    generator = torch.Generator(cpu).manual_seed(N * 7 + D * 3 + V + seed)
    hidden = torch.randn(N, D, generator=generator, device=cpu).to(device, dtype)
    weight = torch.randn(V, D, generator=generator, device=cpu).to(device, dtype)
    return hidden, weight, torch.randint(V, (N,), generator=generator, device=cpu).to(device)


def random_case(n: int, d: int, v: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=draw).to(dtype)
    weight = (3 / d**0.5 * torch.randn(v, d, generator=draw)).to(dtype)
    targets = torch.randint(v, (n,), generator=draw)
    return hidden, weight, targets, torch.randn(v, generator=draw)


def gradients(
    f: Callable[..., Tensor],
    case: Case,
    upstream: Tensor | None = None,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    **settings: Any,
) -> tuple[Tensor, list[Tensor | None]]:
    """Returns bits and the wanted gradients of sum(upstream * bits), or of the mean."""
    hidden, weight, targets, bias = case
    leaves = [
        None if x is None else x.detach().clone().requires_grad_(want)
        for x, want in zip((hidden, weight, bias), wanted, strict=True)
    ]
    bits = f(leaves[0], leaves[1], targets, leaves[2], **settings)
    loss = bits.mean() if upstream is None else (bits * upstream.to(bits.dtype)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return bits.detach(), [None if x is None else x.grad for x in leaves]


def doubled(case: Case) -> Case:
    hidden, weight, targets, bias = case
    return hidden.double(), weight.double(), targets, None if bias is None else bias.double()


def eager(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """token_bits in plain PyTorch, in the dtype of the inputs."""
    logits = F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits / temperature, targets, reduction="none") / math.log(2)


def assert_bits(bits: Tensor, right: Tensor) -> None:
    assert bits.dtype == torch.float32
    assert torch.equal(bits.isnan(), right.isnan())
    good = ~right.isnan()
    assert (bits[good] >= 0).all()
    error = (bits[good].double() - right[good]).abs() - right[good].abs() * 2**-23
    if len(error) > 0:
        assert error.max() <= BIT


def assert_gradients(
    ours: list[Tensor | None], theirs: list[Tensor | None], right: list[Tensor | None]
) -> None:
    """Allows twice PyTorch's own error against float64, plus a floor for sums of a few terms, where
    one of the two results is exact by luck."""
    for mine, other, truth in zip(ours, theirs, right, strict=True):
        if truth is None:
            assert mine is None
            continue
        assert mine is not None
        assert other is not None
        assert mine.dtype == other.dtype
        assert mine.shape == truth.shape
        floor = truth.norm() * 2e-7
        assert (mine.double() - truth).norm() <= 2 * (other.double() - truth).norm() + floor
