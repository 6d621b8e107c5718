"""Bits and statistics of plain tensors on one device, of arguments that were checked.

N rows, D width, V vocabulary, E models.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastmem.kernels import reference
from fastmem.kernels.reference import TokenStats
from fastmem.likelihood import operators
from fastmem.likelihood.checks import FUSED, in_autocast
from fastmem.likelihood.problem import Problem

MAX_LOGITS = 1 << 24
"""Logits that plain PyTorch holds at once (64 MiB of float32): it takes more rows in chunks."""
DEVICES = ["cpu", "meta", *(["cuda"] if importlib.util.find_spec("triton") else [])]
"""Devices with fused kernels. If the environment variable FASTMEM_REFERENCE is set and not empty
at import, plain PyTorch computes everything."""

if os.environ.get("FASTMEM_REFERENCE"):
    DEVICES = []


def token_bits(problem: Problem) -> Tensor:  # (..., N)
    """Bits, by the fused kernels or by plain PyTorch."""
    hidden = problem.hidden
    problem = prepared(problem)
    if is_fused(problem):
        bits = operators.token_bits(problem)[0]
    else:
        (bits,) = _reference(lambda *inputs: (reference.token_bits(*inputs),), problem)
    if hidden.ndim == 2 or bits.shape == hidden.shape[:-1]:
        return bits
    return bits.view(hidden.shape[:-1])


def token_stats(problem: Problem, wanted: list[bool]) -> TokenStats:  # each (..., N)
    """wanted: entropy, second moment, greedy, lse, variance."""
    entropy, second_moment, greedy, lse, variance = wanted
    shape = problem.hidden.shape[:-1]
    with torch.no_grad():
        problem = prepared(problem)
        if is_fused(problem):
            moments = [entropy or second_moment, variance or second_moment]
            bits, mean, spread, *others = operators.STATS(*problem, [*moments, greedy, lse])
            second = spread + mean**2 if second_moment else spread
            found = [bits, mean, second, *others, spread]
        else:
            found = _reference(reference.token_stats, problem)
    statistics: list[Any] = [
        x.view(shape) if want else None for x, want in zip(found[1:], wanted, strict=True)
    ]
    return TokenStats(found[0].view(shape), *statistics)


def prepared(problem: Problem) -> Problem:
    """The problem, cast by autocast, with one leading axis at most."""
    return _flat(_autocast(problem))


def _autocast(problem: Problem) -> Problem:
    hidden, weight = problem.hidden, problem.weight
    if not in_autocast(hidden) or hidden.dtype == torch.float64:
        return problem
    compute = torch.get_autocast_dtype(hidden.device.type)
    return Problem(hidden.to(compute), weight.to(compute), *problem[2:])


def _flat(problem: Problem) -> Problem:
    """Merges the leading axes: into rows, or into an axis of models if weight has leading axes."""
    if problem.hidden.ndim == problem.weight.ndim == 2:
        return problem
    hidden, weight, targets, bias = problem[:4]
    rows = hidden.shape[:-1]
    if weight.ndim == 2:
        hidden, targets = hidden.flatten(0, -2), targets.expand(rows).flatten()
    else:
        bias = None if bias is None else bias.expand(weight.shape[:-1])
        if weight.ndim > 3:
            targets = targets.expand(rows).flatten(0, -2)
            bias = None if bias is None else bias.flatten(0, -2)
            hidden, weight = hidden.flatten(0, -3), weight.flatten(0, -3)
    return Problem(hidden, weight, targets, bias, *problem[4:])


def is_fused(problem: Problem) -> bool:
    """True if a fused kernel takes the problem; float64 and D = 0 go to plain PyTorch."""
    hidden = problem.hidden
    return hidden.device.type in DEVICES and hidden.dtype in FUSED and hidden.shape[-1] > 0


def _reference(compute: Callable[..., Sequence[Any]], problem: Problem) -> list[Tensor]:
    """Calls `compute` for each model and for chunks of rows with at most MAX_LOGITS logits."""
    hidden, weight, targets, bias = problem[:4]
    if weight.ndim == 3 and len(hidden) > 0:
        targets = targets.expand(hidden.shape[:-1])
        biases = [None] * len(hidden) if bias is None else bias
        models = zip(hidden, weight, targets, biases, strict=True)
        each = [_reference(compute, Problem(*model, *problem[4:])) for model in models]
        return [torch.stack(parts) for parts in zip(*each, strict=True)]
    rows = max(1, MAX_LOGITS // weight.shape[-2])
    plain = (
        torch.autocast(hidden.device.type, enabled=False) if in_autocast(hidden) else nullcontext()
    )
    with plain:
        if hidden.shape[-2] <= rows:
            return list(compute(*problem))
        chunks = [
            checkpoint(
                compute, h, weight, t, *problem[3:], use_reentrant=False, preserve_rng_state=False
            )
            for h, t in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        ]
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]
