"""Bits per token from hidden states, computed without all logits in memory.

N rows, D width, V vocabulary, E models.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastmem.base.arguments import number
from fastmem.kernels import reference
from fastmem.kernels.reference import TokenStats
from fastmem.likelihood import operators
from fastmem.likelihood.problem import Problem

MAX_LOGITS = 1 << 24
"""Logits that plain PyTorch holds at once (64 MiB of float32): it takes more rows in chunks."""
FUSED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the fused kernels; float64 goes to plain PyTorch, which checks them."""
SINGLE = torch.finfo(torch.float32)
"""The kernels hold softcap, temperature and their inverses in float32."""
DEVICES = ["cpu", "meta", *(["cuda"] if importlib.util.find_spec("triton") else [])]
"""Devices with fused kernels. If the environment variable FASTMEM_REFERENCE is set and not empty
at import, plain PyTorch computes everything."""

if os.environ.get("FASTMEM_REFERENCE"):
    DEVICES = []


def token_bits(
    hidden: Tensor,  # (..., N, D)
    weight: Tensor,  # (V, D) or (..., V, D)
    targets: Tensor,  # (..., N)
    bias: Tensor | None = None,  # (V,) or (..., V)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    *,
    check: bool = False,
) -> Tensor:  # (..., N)
    """Code length of each target in bits: -log2 softmax(hidden @ weight.T)[target].

    Computes one tile of logits at a time, and computes it again in the backward pass:

        logits = hidden.float() @ weight.float().T + bias
        logits = softcap * tanh(logits / softcap)
        F.cross_entropy(logits / temperature, targets, reduction="none") / math.log(2)

    Args:
        hidden: hidden states, float64, float32, bfloat16 or float16.
        weight: output matrix, one for all rows, or one for each entry of hidden's leading axes
            (E models side by side: hidden (E, N, D), weight (E, V, D)).
        targets: token ids of any integer type, (..., N) or (N,) shared by all leading entries.
        bias: added to the logits.
        softcap: squashes the logits to (-softcap, softcap). A number, as temperature.
        temperature: divides the logits. To learn it, divide hidden and bias by a tensor instead.
        ignore_index: a target of this value costs 0 bits and has no gradient. bits.mean() counts
            it; `linear_cross_entropy` has F.cross_entropy's mean, in nats, which is
            bits.sum() / (targets != ignore_index).sum() in bits.
        check: raise if a target is outside [0, V): waits for a GPU, breaks the torch.compile graph.

    Returns:
        Bits, at least 0, in float32 (float64 for float64 inputs), differentiable once in hidden,
        weight and bias. Products are summed in float32: bits are right to 1e-4 while logits stay
        below 150, and to 4e-4 at logits of 700, like those of F.cross_entropy. A target outside
        [0, V) gives NaN and is never read, because an error would stall a GPU. A hidden state that
        is not finite gives NaN too. On a CPU the gradient of hidden is NaN in a row of NaN bits
        that the loss uses; such a row adds nothing to the gradients of weight and bias, except in
        float64. Autocast casts hidden and weight as in F.linear. On a CPU results are
        bitwise reproducible for the same torch.get_num_threads().

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message has both and the fix.

    Example:
        >>> hidden, weight = torch.zeros(3, 4), torch.zeros(8, 4)
        >>> token_bits(hidden, weight, torch.tensor([0, 5, 7]))
        tensor([3., 3., 3.])

    Source: H(x given θ̂) of arXiv 2505.24832, section 2, by the length of an arithmetic code.
    """
    if is_spread(hidden, weight):
        from fastmem.likelihood import distributed

        arguments = (hidden, weight, targets, bias, softcap, temperature, ignore_index)
        return distributed.token_bits(checked(*arguments, spread=True), check)
    problem = checked(hidden, weight, targets, bias, softcap, temperature, ignore_index)
    if check:
        check_targets(targets, weight.shape[-2], ignore_index)
    problem = flat(autocast(problem))
    if is_fused(problem):
        bits = _fused_bits(problem)
    else:
        (bits,) = _reference(lambda *inputs: (reference.token_bits(*inputs),), problem)
    if hidden.ndim == 2 or bits.shape == hidden.shape[:-1]:
        return bits
    return bits.view(hidden.shape[:-1])


def token_stats(
    hidden: Tensor,  # (..., N, D)
    weight: Tensor,  # (V, D) or (..., V, D)
    targets: Tensor,  # (..., N)
    bias: Tensor | None = None,  # (V,) or (..., V)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    *,
    entropy: bool = False,
    second_moment: bool = False,
    greedy: bool = False,
    lse: bool = False,
    variance: bool = False,
    check: bool = False,
) -> TokenStats:  # each (..., N)
    """token_bits and, on request, statistics of each row's softmax, in the same pass.

    Computes one tile of logits at a time, with the logits of token_bits:

        p = softmax(logits / temperature)
        entropy_bits = -(p * p.log2()).sum(-1)
        variance = (p * (p.log2() + entropy_bits) ** 2).sum(-1)
        second_moment = (p * p.log2() ** 2).sum(-1)
        is_greedy = logits.argmax(-1) == targets
        lse_bits = torch.logsumexp(logits / temperature, -1) / math.log(2)

    Args:
        entropy, second_moment, greedy, lse, variance: the statistics to compute; each other one is
            None. All other arguments are as in token_bits.

    Returns:
        Bits and statistics without gradients: use token_bits for a loss. An ignored target or one
        outside [0, V) has is_greedy False, and leaves all other statistics as they are. A row that
        is not finite has NaN and False. The variance is summed about the mean: it keeps its digits
        where all logits are nearly equal and where one token is nearly sure, and is 0 where they
        are equal.

    Raises:
        ValueError: as token_bits.

    Example:
        >>> hidden, weight = torch.zeros(3, 4), torch.zeros(8, 4)
        >>> stats = token_stats(hidden, weight, torch.tensor([0, 5, 7]), entropy=True, greedy=True)
        >>> stats.bits, stats.entropy_bits, stats.is_greedy
        (tensor([3., 3., 3.]), tensor([3., 3., 3.]), tensor([ True, False, False]))

    Source: bits as in token_bits; the moments of Min-K%++, arXiv 2404.02936, equation 3.
    """
    wanted = [entropy, second_moment, greedy, lse, variance]
    if is_spread(hidden, weight):
        from fastmem.likelihood import distributed

        arguments = (hidden, weight, targets, bias, softcap, temperature, ignore_index)
        return distributed.token_stats(checked(*arguments, spread=True), wanted, check)
    problem = checked(hidden, weight, targets, bias, softcap, temperature, ignore_index)
    if check:
        check_targets(targets, weight.shape[-2], ignore_index)
    with torch.no_grad():
        problem = flat(autocast(problem))
        if is_fused(problem):
            moments = [entropy or second_moment, variance or second_moment]
            bits, mean, spread, *others = operators.STATS(*problem, [*moments, greedy, lse])
            second = spread + mean**2 if second_moment else spread
            found = [bits, mean, second, *others, spread]
        else:
            found = _reference(reference.token_stats, problem)
    shape = hidden.shape[:-1]
    statistics: list[Any] = [
        x.view(shape) if want else None for x, want in zip(found[1:], wanted, strict=True)
    ]
    return TokenStats(found[0].view(shape), *statistics)


def is_spread(hidden: Tensor, weight: Tensor) -> bool:
    """True if one is a DTensor: fastmem.likelihood.distributed takes the call."""
    if type(hidden) in operators.PLAIN and type(weight) in operators.PLAIN:
        return False
    return hasattr(hidden, "placements") or hasattr(weight, "placements")


def prepared(*arguments: Any) -> Problem:
    """The checked problem, cast by autocast, with one leading axis at most."""
    return flat(autocast(checked(*arguments)))


def autocast(problem: Problem) -> Problem:
    """The problem as F.linear would see it in autocast."""
    hidden, weight = problem.hidden, problem.weight
    if not _in_autocast(hidden) or hidden.dtype == torch.float64:
        return problem
    compute = torch.get_autocast_dtype(hidden.device.type)
    return Problem(hidden.to(compute), weight.to(compute), *problem[2:])


def _in_autocast(tensor: Tensor) -> bool:
    # PyTorch 2.11 cannot compile is_autocast_available; meta alone lacks autocast.
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def flat(problem: Problem) -> Problem:
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


def _fused_bits(problem: Problem) -> Tensor:
    ahead = [False] * 3
    if torch.is_grad_enabled() and problem.hidden.device.type not in operators.DIRECT:
        ahead = [x is not None and x.requires_grad for x in problem.differentiable]
    return operators.token_bits(problem, ahead)[0]


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
        torch.autocast(hidden.device.type, enabled=False) if _in_autocast(hidden) else nullcontext()
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


def check_targets(targets: Tensor, vocab: int, ignore_index: int) -> None:
    """ValueError for a target outside [0, vocab)."""
    ids = targets.to(torch.int64)  # a narrow type may not hold the vocabulary
    outside = ((ids < 0) | (ids >= vocab)) & (ids != ignore_index)
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"the target at {where} is {ids[where]}: expected 0 to {vocab - 1}, a row of weight, "
            f"or ignore_index {ignore_index}"
        )


def checked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    spread: bool = False,
) -> Problem:
    """The problem, its settings as Python's numbers; ValueError if an argument does not fit.

    spread: DTensors do.
    """

    def shapes() -> str:
        return f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}"

    tensors = {"hidden": hidden, "weight": weight, "targets": targets}
    if bias is not None:
        tensors["bias"] = bias
    device = getattr(hidden, "device", None)
    for name, tensor in tensors.items():
        plain = type(tensor) in operators.PLAIN
        if not plain and not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device}, hidden on {device}: move {name} with .to()"
            )
        placements = None if plain or spread else getattr(tensor, "placements", None)
        if placements is not None:
            raise ValueError(
                f"{name} is a DTensor, {placements}, hidden and weight are plain tensors: pass "
                f"{name}.full_tensor() or {name}.to_local(), or DTensors for hidden or weight"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            form = "quantized" if tensor.is_quantized else tensor.layout
            raise ValueError(f"{name} is {form}: use .dequantize() or .to_dense()")
        if name == "targets":
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                raise ValueError(f"targets must be integers, not {tensor.dtype}: use .long()")
        elif tensor.dtype not in (*FUSED, torch.float64):
            raise ValueError(
                f"{name} must be floating point, with 16, 32 or 64 bits, not {tensor.dtype}: "
                "use .float()"
            )
    if hidden.ndim < 2 or weight.ndim < 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(f"{shapes()}: expected (..., N, D) and (..., V, D) with the same D")
    if weight.shape[-2] == 0:
        raise ValueError(f"{shapes()}: the vocabulary is empty, weight needs a row")
    if weight.ndim > 2 and weight.shape[:-2] != hidden.shape[:-2]:
        raise ValueError(f"{shapes()}: a weight for each model needs the leading axes of hidden")
    if targets.shape not in (hidden.shape[:-1], hidden.shape[-2:-1]):
        raise ValueError(
            f"targets {tuple(targets.shape)} with {shapes()}: expected one target for each row, "
            f"{tuple(hidden.shape[:-1])} or {tuple(hidden.shape[-2:-1])}"
        )
    if bias is not None and bias.shape not in (weight.shape[:-1], weight.shape[-2:-1]):
        raise ValueError(
            f"bias {tuple(bias.shape)} with {shapes()}: expected {tuple(weight.shape[:-1])}"
        )
    # Autocast does not cast float64.
    if hidden.dtype != weight.dtype and (
        torch.float64 in (hidden.dtype, weight.dtype) or not _in_autocast(hidden)
    ):
        raise ValueError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}: cast one with .to(), or use autocast"
        )
    if softcap is not None:
        softcap = _setting("softcap", softcap)
    temperature = _setting("temperature", temperature)
    if not isinstance(ignore_index, (int, np.integer)) or not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index must be an int64, not {ignore_index!r}: pass an int")
    return Problem(hidden, weight, targets, bias, softcap, temperature, int(ignore_index))


def _setting(name: str, value: object) -> float:
    setting = number(name, value)
    if not SINGLE.tiny <= setting <= SINGLE.max:
        raise ValueError(
            f"{name} must be above 0 and finite, not {setting}: pass {SINGLE.tiny:.2g} to "
            f"{SINGLE.max:.2g}, the range of float32"
        )
    return setting
