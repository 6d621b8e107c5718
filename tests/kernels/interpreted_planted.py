"""Kernels with planted errors, interpreted: the checks catch each of them."""

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases.likelihood_cases import example
from cases.triton_interpreted import LIMIT, exact_bits, gradients, planted, worst
from fastmem.kernels import likelihood, likelihood_backward


def forward_error(module: ModuleType) -> float:
    """Over rising logits, an odd number of rows, a ragged width and a ragged, split vocabulary."""
    weight = torch.linspace(-20, 20, 301)[:, None].repeat(1, 40)
    hidden, targets = torch.rand(37, 40) / 40, torch.randint(301, (37,))
    exact = exact_bits(hidden, weight, targets)
    errors = [
        worst(module.forward(hidden, weight, targets, splits=splits).bits[0], exact)
        for splits in (1, 2)
    ]
    return max(errors) if not any(map(math.isnan, errors)) else math.inf


def backward_error(module: ModuleType) -> float:
    hidden, weight, targets = example(37, 16, 101)
    upstream = torch.linspace(-2, 1, 37)
    state = likelihood.forward(hidden, weight, targets).state
    exact = gradients(torch.float64, upstream, [hidden, weight, None], targets)
    ours = module.backward(upstream, hidden, weight, targets, state)
    errors = [
        worst(got[0], right)
        for got, right in zip(ours[:2], exact[:2], strict=True)
        if right is not None
    ]
    return max(errors) if not any(map(math.isnan, errors)) else math.inf


RESCALE = "total, first, second = lowered(total, first, second, peak - new, MOMENTS)\n    "
PLANTED = {
    "rescale dropped": ("likelihood.py", RESCALE + "total +=", "total +="),
    "rescale of parts dropped": ("combine.py", RESCALE + "    part_total", "part_total"),
    "rows swapped": ("combine.py", "bits_ptr + rows", "bits_ptr + (rows ^ 1)"),
    "mask off by one": ("likelihood.py", "columns + whole < end", "columns + whole <= end"),
    "a neighbour's target": (
        "logits.py",
        "n[:, None] == m[None, :]",
        "n[:, None] == m[None, :] + 1",
    ),
    "pieces that lose the first": ("logits.py", "total = acc + own", "total = own"),
    "a part left out": ("combine.py", "in range(S):", "in range(S - 1):"),
    "target off by one": ("likelihood_backward.py", "columns == target,", "columns == target + 1,"),
    "mask of the walk off by one": (
        "likelihood_backward.py",
        "tl.arange(0, BLOCK_WALK) < WALK",
        "tl.arange(0, BLOCK_WALK) <= WALK",
    ),
    "upstream left out": ("likelihood_backward.py", "* (scale / STEP)", "* 0 + (scale / STEP)"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(name: str, tmp_path: Path) -> None:
    """Fails if a check passes a kernel with an error."""
    file, right, wrong = PLANTED[name]
    kernels = planted(file, right, wrong, tmp_path)
    if file == "likelihood_backward.py":
        assert backward_error(likelihood_backward) <= LIMIT
        assert backward_error(kernels.likelihood_backward) > 10 * LIMIT
    else:
        assert forward_error(likelihood) <= LIMIT
        assert forward_error(kernels.likelihood) > 10 * LIMIT
