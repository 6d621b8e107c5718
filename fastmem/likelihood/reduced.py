"""The reduced loss of plain tensors; on a GPU the forward pass of a wide model makes its gradients.

N rows, D width, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastmem.likelihood import local
from fastmem.likelihood.problem import Problem

DEVICES = ["cuda"] if "cuda" in local.DEVICES else []
"""Devices with the kernels: none without Triton, or with FASTMEM_REFERENCE set."""

WIDE = [torch.bfloat16, torch.float32]
"""Dtypes whose exponents hold a power of two of any logit."""


def cross_entropy(
    problem: Problem, weight: Tensor | None, token_weight: Tensor | None, reduction: str
) -> Tensor:
    """`linear_cross_entropy` of a checked problem."""
    reduces = reduction != "none" and problem.hidden.device.type in DEVICES
    if reduces:
        problem = local.prepared(problem)
    ignored, factor = factors(problem.targets, problem.ignore_index, weight, token_weight)
    if reduces and is_reduced(problem) and (factor is None or not factor.requires_grad):
        # A row that costs nothing is counted as a row of factor 0. A mean's divisor is part of the
        # factors: 16-bit gradients would round it once more.
        nats = torch.where(ignored, 0.0, math.log(2) if factor is None else factor * math.log(2))
        if reduction == "mean":
            nats = nats / count(factor, ignored)
        return weighted_bits(problem, nats.float())
    bits = local.token_bits(problem)
    if factor is not None:
        bits = bits * factor.to(bits.dtype)
    if reduction == "none":
        return bits * math.log(2)
    total = bits.sum() * math.log(2)
    return total if reduction == "sum" else total / count(factor, ignored)


def factors(
    targets: Tensor, index: int, weight: Tensor | None, token_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Ignored rows; each row's weight of token and class, float32 at least, 0 where ignored."""
    ignored = targets == index
    if weight is None and token_weight is None:
        return ignored, None
    factor = None if token_weight is None else _wide(token_weight.reshape(targets.shape))
    if weight is not None:
        outside = (targets < 0) | (targets >= len(weight))  # bits are NaN, or ignored
        of_class = _wide(weight)[targets.long().masked_fill(outside, 0)]
        factor = of_class if factor is None else factor * of_class
    assert factor is not None
    return ignored, factor.masked_fill(ignored, 0)


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def count(factor: Tensor | None, ignored: Tensor) -> Tensor:
    """What divides a mean."""
    return (~ignored).sum() if factor is None else factor.sum()


def is_reduced(problem: Problem) -> bool:
    """True where three products for both passes take less time (docs/design.md has the table)."""
    hidden, weight, _, bias, softcap = problem[:5]
    if hidden.dtype not in WIDE or softcap is not None:
        return False
    from fastmem.kernels.tiles import chunked

    wide = len(hidden) > 0 and chunked(hidden.shape[1], hidden.itemsize)
    wanted = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    plain = not torch._C._are_functorch_transforms_active()
    return wide and wanted and torch.is_grad_enabled() and plain


def weighted_bits(problem: Problem, factor: Tensor) -> Tensor:  # (N,) → ()
    """Returns the sum of factor * bits, differentiable once, in all but `factor`."""
    hidden, weight, targets, bias, _, *settings = problem
    wanted = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
    bits: Tensor = made_ahead(hidden, weight, targets, bias, factor, *settings, wanted)[0]
    return bits


@torch.library.custom_op("fastmem::weighted_bits", mutates_args=(), device_types="cuda")
def made_ahead(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    temperature: float,
    ignore_index: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, and its gradients in hidden, weight and bias where they are wanted."""
    from fastmem.kernels import reduced
    from fastmem.kernels.logits import bias_shift

    shift = None if bias is None else bias_shift(bias, None)[0]  # type: ignore[index]
    with torch.cuda.device_of(hidden):  # type: ignore[no-untyped-call]
        bits, grads = reduced.reduced(
            factor, hidden, weight, targets, bias, shift, temperature, ignore_index,
            (wanted[0], wanted[1], wanted[2]),
        )  # fmt: skip
    made = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return (bits * factor).sum(), *made  # type: ignore[return-value]


@made_ahead.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    made = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if want and x is not None
        else hidden.new_empty(0)
        for x, want in zip((hidden, weight, bias), rest[-1], strict=True)
    ]
    return hidden.new_empty((), dtype=torch.float32), *made


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _gradient(ctx: Any, upstream: Tensor, *_: None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # create_graph: autograd knows nothing of how these gradients arose
        raise RuntimeError(
            "linear_cross_entropy is differentiable once: for more pass float64, or use "
            "torch.nn.functional.cross_entropy"
        )
    dhidden, dweight, dbias = (
        grad * upstream if want else None
        for grad, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return dhidden, dweight, None, dbias, None, None, None, None


made_ahead.register_autograd(_gradient, setup_context=_save)
