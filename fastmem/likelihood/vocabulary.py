"""Bits and statistics where each rank holds its own tokens of the vocabulary, and all rows.

Each rank walks its own part of the vocabulary (the kernels of one device). With lse[r] the
log-sum-exp of rank r's logits in bits, three all-reduces of N numbers make the bits:

    peak  = max_r lse[r]
    lse   = peak + log2(sum_r 2^(lse[r] - peak))
    bits  = sum_r (the target is on rank r) * (bits[r] + lse - lse[r])

The backward pass needs no communication but the sum of dhidden, which the caller makes: the kernels
get the log-sum-exp of all ranks for their own, and so compute p of the whole vocabulary.

N rows, D width, V tokens of this rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastmem.kernels import reference
from fastmem.kernels.reference import TokenStats
from fastmem.likelihood import local, operators
from fastmem.likelihood.problem import Problem

CORE = {"cpu"}
"""Devices of the C++ core; all others have the Triton kernels."""
IGNORED, OUTSIDE = -100, -1
"""Targets of a rank that are ignored, and those outside of all ranks' tokens. A target of another
rank is V, the first token past the rank's own."""


class Part(NamedTuple):
    """One rank's part of a problem."""

    problem: Problem  # (N, D), (V, D), (N,) as `part_of` numbers them
    first: int  # token of the whole vocabulary that is this rank's token 0
    groups: Sequence[Any]  # process groups over which the vocabulary is divided


def part_of(problem: Problem, first: int, tokens: int, groups: Sequence[Any]) -> Part:
    """Returns the part of the rank that holds `weight`, the rows from `first` on of `tokens`."""
    V = len(problem.weight)
    targets = problem.targets.to(torch.int64)
    own = targets - first
    inside = (targets >= 0) & (targets < tokens)
    own = torch.where((own >= 0) & (own < V), own, torch.where(inside, V, OUTSIDE))
    own = torch.where(targets == problem.ignore_index, IGNORED, own)
    return Part(problem._replace(targets=own, ignore_index=IGNORED), first, groups)


def token_bits(part: Part) -> Tensor:  # (N,)
    """Bits of the whole vocabulary, differentiable: dhidden is that of this rank's tokens alone."""
    hidden, weight, targets, bias, *_ = part.problem
    bits: Tensor = _Bits.apply(hidden, weight, bias, targets, part)  # type: ignore[no-untyped-call]
    return bits


def token_stats(part: Part, wanted: list[bool]) -> TokenStats:
    """All statistics of `wanted`: entropy, second moment, greedy, lse, variance."""
    entropy, second, greedy, _, variance = wanted
    moments = [entropy or second or variance, second or variance]
    walk = _walk(part, [*moments, greedy, True])
    bits, total, above = _bits(part, walk)
    results: list[Tensor | None] = [None] * 5
    if moments[0]:
        # Of this rank's tokens: their probability, and the bits that the model expects of them.
        p = torch.exp2(-above)
        own = torch.where(p > 0, walk.entropy.double() + above, 0)
        mean = _reduce(p * own, part)
        spread = mean
        if moments[1]:
            within = torch.where(p > 0, walk.variance.double() + (own - mean) ** 2, 0)
            spread = _reduce(p * within, part)
        mean = mean.clamp_min(0)
        results = [mean, spread + mean**2, None, None, spread]
    if greedy:
        results[2] = _greedy(part, walk) & ~total.isnan()
    results[3] = total
    return TokenStats(
        bits,
        *(
            None if x is None or not want else x if x.dtype == torch.bool else x.float()
            for x, want in zip(results, wanted, strict=True)
        ),
    )


class _Walk(NamedTuple):
    """What a rank finds in its own tokens. (N,) float32; empty where it was not asked for."""

    bits: Tensor
    entropy: Tensor
    variance: Tensor
    greedy: Tensor
    lse: Tensor
    state: Tensor  # for the backward pass


def _walk(part: Part, wanted: list[bool]) -> _Walk:
    problem = part.problem
    hidden, V = problem.hidden, len(problem.weight)
    if V == 0:  # more ranks than tokens to divide
        none = hidden.new_zeros(len(hidden), dtype=torch.float32)
        state = none.double().expand(1, 1, -1) if hidden.device.type in CORE else none[None, None]
        return _Walk(none, none, none, none.bool(), none - torch.inf, state)
    if hidden.device.type in CORE:
        # The core may centre the columns of weight, which the backward pass cannot: with the row
        # of zeros neither does. Under a softcap neither does anyway, and the row would count.
        problem = _extended(problem) if problem.softcap is None else problem
    return _Walk._make(operators.WALK(*problem, wanted))


def _extended(problem: Problem) -> Problem:
    """The problem with rows of zeros whose logits are -inf: the first is the target V.

    A target elsewhere leaves the softmax's part of the gradient, and kernels give a row without a
    target no gradient. The row of zeros takes the other part, and passes nothing on.
    """
    hidden, weight, _, bias, *_ = problem
    V, D = weight.shape
    more = 1 if weight.device.type in CORE else 128 - V % 128  # whole tiles stay whole
    if bias is None:
        bias = hidden.new_zeros(V, dtype=torch.float32)
    weight = torch.cat([weight, weight.new_zeros(more, D)])
    return problem._replace(
        weight=weight, bias=torch.cat([bias, bias.new_full((more,), -torch.inf)])
    )


def _bits(part: Part, walk: _Walk) -> tuple[Tensor, Tensor, Tensor]:
    """Bits, float32; the log-sum-exp of all ranks, and by how much it is above this rank's."""
    targets, V = part.problem.targets, len(part.problem.weight)
    lse = walk.lse.double()
    peak = _reduce(lse.clone(), part, dist.ReduceOp.MAX)
    rest = _reduce(torch.exp2(lse - peak), part).log2()
    # Where this rank has nearly all probability, bits are this difference: it must not be rounded.
    above = (peak - lse) + rest
    here = (targets >= 0) & (targets < V)
    bits = _reduce(torch.where(here, walk.bits.double() + above, 0), part)
    bits = torch.where(targets == OUTSIDE, torch.nan, bits)
    return bits.float(), peak + rest, above


def _greedy(part: Part, walk: _Walk) -> Tensor:
    """True where the target is its rank's first greatest token, and this rank the first of all."""
    best = _greatest(part.problem, walk.state)
    ours = best == _reduce(best.clone(), part, dist.ReduceOp.MAX)
    first = torch.where(ours, part.first, torch.iinfo(torch.int64).max)
    leads = ours & (part.first == _reduce(first, part, dist.ReduceOp.MIN))
    return _reduce((walk.greedy & leads).to(torch.int32), part) > 0


def _greatest(problem: Problem, state: Tensor) -> Tensor:  # (N,)
    """Each row's greatest logit among this rank's tokens: -inf if it has none."""
    hidden, weight, _, bias, softcap, temperature, _ = problem
    if len(weight) == 0:
        return hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    if hidden.device.type not in CORE:
        from fastmem.kernels.logits import LOG2_E, bias_shift

        shift = bias_shift(bias, softcap)
        peak = state[0, 0]
        return peak if shift is None else peak + shift * (LOG2_E.value / temperature)
    rows = max(1, local.MAX_LOGITS // len(weight))
    settings = (weight, bias, softcap, temperature)
    return torch.cat(
        [reference.logits_of(h, *settings).amax(-1) for h in torch.split(hidden, rows)]
    )


def _reduce(x: Tensor, part: Part, op: Any = dist.ReduceOp.SUM) -> Tensor:
    for group in part.groups:
        dist.all_reduce(x, op, group=group)
    return x


class _Bits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, part: Part
    ) -> Tensor:
        walk = _walk(part, [False, False, False, True])
        bits, _, above = _bits(part, walk)
        state = walk.state.clone()
        state[0] += above
        # A rank whose logits are all -inf: any number leaves them 0, and inf - inf would not.
        state = torch.where(walk.lse == -torch.inf, 1.0, state)
        ctx.save_for_backward(hidden, weight, targets, bias, state)
        ctx.settings = part.problem[4:]
        return bits

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        *tensors, state = ctx.saved_tensors
        problem = Problem(*tensors, *ctx.settings)
        needs = list(ctx.needs_input_grad[:3])
        V = len(problem.weight)
        if V == 0:
            grads = [x if x is None else torch.zeros_like(x) for x in problem.differentiable]
        else:
            none = [state.new_empty(0)] * 3
            grads = operators.BACKWARD(upstream, state, *none, *_extended(problem), needs)
        dhidden, dweight, dbias = (
            g if need else None for g, need in zip(grads, needs, strict=True)
        )
        dweight, dbias = (None if g is None else g[:V] for g in (dweight, dbias))
        return dhidden, dweight, dbias, None, None
