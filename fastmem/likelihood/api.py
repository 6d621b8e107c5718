"""Bits per token from hidden states, without a full set of logits in memory.

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
from fastmem.likelihood import operators as likelihood_ops

MAX_LOGITS = 1 << 24
"""The most logits that exist at once (64 MiB of float32) where no kernel fuses them away: more
rows are taken in chunks."""
FUSED = (torch.float32, torch.bfloat16, torch.float16)
"""What the fused kernels take; float64 is for checking them."""
SINGLE = torch.finfo(torch.float32)
"""Softcap and temperature are float32 numbers in the kernels, and so are their inverses."""
DEVICES = ["cpu", "meta", *(["cuda"] if importlib.util.find_spec("triton") else [])]
"""Where there are fused kernels. The environment variable FASTMEM_REFERENCE, set to anything but
nothing before the import, leaves none: all is then computed by plain PyTorch."""

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
    """What each target costs to code, in bits: -log2 softmax(hidden @ weight.T)[target].

    Computes, a tile of logits at a time and again in the backward pass,

        logits = hidden.float() @ weight.float().T + bias
        logits = softcap * tanh(logits / softcap)
        F.cross_entropy(logits / temperature, targets, reduction="none") / math.log(2)

    Args:
        hidden: hidden states, float64, float32, bfloat16 or float16.
        weight: output matrix, one for all rows, or one for each entry of hidden's leading axes
            (E models side by side: hidden (E, N, D), weight (E, V, D)).
        targets: token ids of any integer type, (..., N) or (N,) shared by all leading entries.
        bias: added to the logits.
        softcap: logits are squashed to (-softcap, softcap).
        temperature: logits are divided by it.
        ignore_index: a target of this value costs 0 bits and has no gradient.
        check: raises if a target is outside [0, V); this waits for a GPU, and under torch.compile
            it breaks the graph.

    Returns:
        Bits, at least 0, float32 (float64 for float64 inputs), differentiable in hidden, weight
        and bias, once. Products are summed in float32: bits are right to 1e-4 while logits stay
        below 150, and to 4e-4 at 700, as F.cross_entropy's are. A target outside [0, V) gives NaN:
        it is never read, and finding it here would stall a GPU. So does a hidden state that is not
        finite. On a CPU such a row has a gradient of NaN in hidden if its bits are used, and, but
        in float64, adds nothing to those of weight and bias. Under autocast, hidden and weight are
        cast as F.linear's are. The same bytes twice on a CPU need the same torch.get_num_threads().

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with both and the fix.

    Example:
        >>> hidden, weight = torch.zeros(3, 4), torch.zeros(8, 4)
        >>> token_bits(hidden, weight, torch.tensor([0, 5, 7]))
        tensor([3., 3., 3.])

    Source: H(x given θ̂) of arXiv 2505.24832, section 2, by the length of an arithmetic code.
    """
    _check(hidden, weight, targets, bias, softcap, temperature, ignore_index)
    if check:
        _check_targets(targets, weight.shape[-2], ignore_index)
    problem = _flat(*_autocast(hidden, weight), targets, bias)
    settings = (softcap, temperature, ignore_index)
    if _is_fused(problem):
        bits = _fused_bits(problem, settings)
    else:
        (bits,) = _reference(_bits_alone, problem, settings)
    return bits if bits.shape == hidden.shape[:-1] else bits.view(hidden.shape[:-1])


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
    check: bool = False,
) -> TokenStats:  # each (..., N)
    """token_bits, and on request what the whole softmax of each row says, from the same pass.

    Computes, a tile of logits at a time, with logits and bits as token_bits has them,

        p = softmax(logits / temperature)
        entropy_bits = -(p * p.log2()).sum(-1)
        second_moment = (p * p.log2() ** 2).sum(-1)
        is_greedy = logits.argmax(-1) == targets
        lse_bits = torch.logsumexp(logits / temperature, -1) / math.log(2)

    Args:
        entropy, second_moment, greedy, lse: which of these to compute; the others are None. The
            others of its arguments are those of token_bits.

    Returns:
        Without gradients: for a loss use token_bits. Where a target is ignored or outside [0, V),
        is_greedy is False and the rest, bits excepted, what it would be with any other target.
        A row that is not finite has NaN and False.

    Raises:
        ValueError: as token_bits.

    Example:
        >>> hidden, weight = torch.zeros(3, 4), torch.zeros(8, 4)
        >>> stats = token_stats(hidden, weight, torch.tensor([0, 5, 7]), entropy=True, greedy=True)
        >>> stats.bits, stats.entropy_bits, stats.is_greedy
        (tensor([3., 3., 3.]), tensor([3., 3., 3.]), tensor([ True, False, False]))

    Source: bits as token_bits; the moments are those of Min-K%++, arXiv 2404.02936, equation 3.
    """
    _check(hidden, weight, targets, bias, softcap, temperature, ignore_index)
    if check:
        _check_targets(targets, weight.shape[-2], ignore_index)
    wanted = [entropy, second_moment, greedy, lse]
    with torch.no_grad():
        problem = _flat(*_autocast(hidden, weight), targets, bias)
        settings = (softcap, temperature, ignore_index)
        if _is_fused(problem):
            found = likelihood_ops.STATS(*problem, *settings, wanted)
        else:
            found = _reference(reference.token_stats, problem, settings)
    shape = hidden.shape[:-1]
    asked = (x.view(shape) if want else None for x, want in zip(found[1:], wanted, strict=True))
    return TokenStats(found[0].view(shape), *asked)


Problem = tuple[Tensor, Tensor, Tensor, Tensor | None]  # hidden, weight, targets, bias
Settings = tuple[float | None, float, int]  # softcap, temperature, ignore_index


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if not _in_autocast(hidden):
        return hidden, weight
    compute = torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype == torch.float64:
        return hidden, weight
    return hidden.to(compute), weight.to(compute)


def _in_autocast(tensor: Tensor) -> bool:
    # Not is_autocast_available, which PyTorch 2.11 cannot compile; meta is the one that has none.
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _flat(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Problem:
    """With one weight (N, D), (V, D), (N,), (V,); else with one leading axis, of models."""
    rows = hidden.shape[:-1]
    if weight.ndim == 2:
        if hidden.ndim > 2:
            hidden, targets = hidden.flatten(0, -2), targets.expand(rows).flatten()
    else:
        bias = None if bias is None else bias.expand(weight.shape[:-1])
        if weight.ndim > 3:
            targets = targets.expand(rows).flatten(0, -2)
            bias = None if bias is None else bias.flatten(0, -2)
            hidden, weight = hidden.flatten(0, -3), weight.flatten(0, -3)
    return hidden, weight, targets, bias


def _is_fused(problem: Problem) -> bool:
    """Whether the kernels take it; all else, above all float64, is plain PyTorch."""
    hidden = problem[0]
    return hidden.device.type in DEVICES and hidden.dtype in FUSED and hidden.shape[-1] > 0


def _fused_bits(problem: Problem, settings: Settings) -> Tensor:
    hidden, weight, _, bias = problem
    ahead = [False] * 3
    if torch.is_grad_enabled() and hidden.device.type == "cpu":
        ahead = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
    return likelihood_ops.token_bits(*problem, *settings, ahead)[0]


def _reference(
    compute: Callable[..., Sequence[Any]], problem: Problem, settings: Settings
) -> list[Tensor]:
    """compute, for one model after another and a few rows at a time: MAX_LOGITS."""
    hidden, weight, targets, bias = problem
    if weight.ndim == 3 and len(hidden) > 0:
        targets = targets.expand(hidden.shape[:-1])
        biases = [None] * len(hidden) if bias is None else bias
        models = zip(hidden, weight, targets, biases, strict=True)
        each = [_reference(compute, model, settings) for model in models]
        return [torch.stack(parts) for parts in zip(*each, strict=True)]
    rows = max(1, MAX_LOGITS // weight.shape[-2])
    plain = (
        torch.autocast(hidden.device.type, enabled=False) if _in_autocast(hidden) else nullcontext()
    )
    with plain:
        if hidden.shape[-2] <= rows:
            return list(compute(*problem, *settings))
        chunks = [
            checkpoint(
                compute,
                h,
                weight,
                t,
                bias,
                *settings,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for h, t in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        ]
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def _bits_alone(*problem: Any) -> tuple[Tensor]:
    return (reference.token_bits(*problem),)


def _check_targets(targets: Tensor, vocab: int, ignore_index: int) -> None:
    ids = targets.to(torch.int64)  # a narrow type may not hold the vocabulary
    outside = ((ids < 0) | (ids >= vocab)) & (ids != ignore_index)
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"the target at {where} is {ids[where]}: expected 0 to {vocab - 1}, the vocabulary of "
            f"weight, or ignore_index {ignore_index}"
        )


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> None:
    tensors = {"hidden": hidden, "weight": weight, "targets": targets}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device}, hidden on {hidden.device}: move one with .to()"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            form = "quantized" if tensor.is_quantized else tensor.layout
            raise ValueError(f"{name} is {form}: use .dequantize() or .to_dense()")
        if name == "targets":
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                raise ValueError(f"targets must be integers, not {tensor.dtype}: use .long()")
        elif tensor.dtype not in (*FUSED, torch.float64):
            raise ValueError(
                f"{name} must be floating point, of 16, 32 or 64 bits, not {tensor.dtype}: "
                "use .float()"
            )
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}"
    if hidden.ndim < 2 or weight.ndim < 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(f"{shapes}: expected (..., N, D) and (..., V, D) with the same D")
    if weight.shape[-2] == 0:
        raise ValueError(f"{shapes}: the vocabulary is empty, weight needs at least one row")
    if weight.ndim > 2 and weight.shape[:-2] != hidden.shape[:-2]:
        raise ValueError(f"{shapes}: a weight for each model needs the leading axes of hidden")
    if targets.shape not in (hidden.shape[:-1], hidden.shape[-2:-1]):
        raise ValueError(
            f"targets {tuple(targets.shape)} with {shapes}: expected one for each row, "
            f"{tuple(hidden.shape[:-1])} or {tuple(hidden.shape[-2:-1])}"
        )
    if bias is not None and bias.shape not in (weight.shape[:-1], weight.shape[-2:-1]):
        raise ValueError(
            f"bias {tuple(bias.shape)} with {shapes}: expected {tuple(weight.shape[:-1])}"
        )
    # Autocast leaves float64 as it is.
    mixed = torch.float64 in (hidden.dtype, weight.dtype) or not _in_autocast(hidden)
    if hidden.dtype != weight.dtype and mixed:
        raise ValueError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}: cast one with .to(), or use autocast"
        )
    for name, setting in (("softcap", softcap), ("temperature", temperature)):
        if setting is not None and not (SINGLE.tiny <= setting <= SINGLE.max):
            raise ValueError(
                f"{name} must be above 0 and finite, not {setting}: pass {SINGLE.tiny:.2g} to "
                f"{SINGLE.max:.2g}, what float32 has"
            )
    if not isinstance(ignore_index, int) or not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index must be an int64, not {ignore_index!r}: pass an int")
