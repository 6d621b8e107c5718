"""Bits per token from hidden states, without a full set of logits in memory.

N rows, D width, V vocabulary, E models.
"""

import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastmem import _core
from fastmem.kernels import reference

MAX_LOGITS = 1 << 24
"""The most logits that exist at once (64 MiB of float32) where no kernel fuses them away: more
rows are taken in chunks."""
FUSED = (torch.float32, torch.bfloat16, torch.float16)
"""What the fused kernels take; float64 is for checking them."""


def token_bits(
    hidden: Tensor,  # (..., N, D)
    weight: Tensor,  # (V, D) or (..., V, D)
    targets: Tensor,  # (..., N)
    bias: Tensor | None = None,  # (V,) or (..., V)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
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

    Returns:
        Bits, at least 0, float32 (float64 for float64 inputs), differentiable in hidden, weight
        and bias, once. A target outside [0, V) gives NaN: it is never read, and finding it here
        would stall a GPU. On a CPU such a row, and one whose hidden state is not finite, has a
        gradient of NaN in hidden if its bits are used, and adds nothing to those of weight and
        bias. Under autocast, hidden and weight are cast as F.linear's are. The same bytes twice on
        a CPU need the same torch.get_num_threads().

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with both and the fix.

    Example:
        >>> hidden, weight = torch.zeros(3, 4), torch.zeros(8, 4)
        >>> token_bits(hidden, weight, torch.tensor([0, 5, 7]))
        tensor([3., 3., 3.])

    Source: H(x given θ̂) of arXiv 2505.24832, section 2, by the length of an arithmetic code.
    """
    _check(hidden, weight, targets, bias, softcap, temperature)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        compute = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(compute), weight.to(compute)
    targets = targets.expand(hidden.shape[:-1])
    settings = (softcap, temperature, ignore_index)
    if weight.ndim == 2:
        rows = hidden.reshape(-1, hidden.shape[-1])
        bits = _one_model(rows, weight, targets.reshape(-1), bias, settings)
    else:
        # One model after another: their logits share the limit.
        h, w, t = hidden.flatten(0, -3), weight.flatten(0, -3), targets.flatten(0, -2)
        b = [None] * len(h) if bias is None else bias.expand(weight.shape[:-1]).flatten(0, -2)
        each = [_one_model(*model, settings) for model in zip(h, w, t, b, strict=True)]
        bits = torch.stack(each) if each else torch.empty(0, device=hidden.device)
    return bits.reshape(hidden.shape[:-1])


def _one_model(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    settings: tuple[float | None, float, int],
) -> Tensor:  # (N,)
    if hidden.device.type == "cpu" and hidden.dtype in FUSED and hidden.shape[1] > 0:
        learns = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
        needs = [torch.is_grad_enabled() and learn for learn in learns]
        bits: Tensor = _fused(hidden, weight, targets.long(), bias, *settings, needs)[0]
        return bits
    with torch.autocast(hidden.device.type, enabled=False):
        return _chunked(hidden, weight, targets, bias, settings)


# Gradients that are made before the upstream gradient is known are those of the sum of all bits.
Gradients = tuple[Tensor, Tensor, Tensor]  # of hidden, weight and bias, empty where not asked for


@torch.library.custom_op("fastmem::token_bits", mutates_args=(), device_types="cpu")
def _fused(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    ahead: list[bool],  # gradients to make already, of hidden, weight and bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Bits (N,), their log-sum-exp (N,) for the backward pass, and gradients of their sum."""
    settings = (softcap, temperature, ignore_index)
    outputs = _fused_fake(hidden, weight, targets, bias, *settings, ahead)
    bits, lse, *grads = (x.numpy()[None] for x in outputs)
    _core.token_bits(
        bits,
        lse,
        *(grad if need else None for grad, need in zip(grads, ahead, strict=True)),
        **_problem(hidden, weight, targets, bias, settings),
    )
    return outputs


def _fused_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    ahead: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bits = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return bits, torch.empty_like(bits, dtype=torch.float64), *_empty(hidden, weight, bias, ahead)


def _empty(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> Gradients:
    dhidden, dweight, dbias = (
        hidden.new_empty(x.shape if need and x is not None else 0, dtype=torch.float32)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )
    return dhidden, dweight, dbias


@torch.library.custom_op("fastmem::token_bits_backward", mutates_args=(), device_types="cpu")
def _fused_backward(
    upstream: Tensor,  # (N,)
    lse: Tensor,  # (N,) float64
    ahead: list[Tensor],  # what _fused made of Gradients
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    needs: list[bool],  # hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(upstream * bits), float32."""
    made = all(len(grad) > 0 for grad, need in zip(ahead, needs, strict=True) if need)
    if made and bool((upstream == upstream[0]).all()) and upstream[0] != 0:
        # What mean() and sum() give: the gradients that were made ahead, times one number.
        dhidden, dweight, dbias = (grad * upstream[0] for grad in ahead)
        return dhidden, dweight, dbias
    grads = _empty(hidden, weight, bias, needs)
    _core.token_bits_backward(
        *(grad.numpy()[None] if need else None for grad, need in zip(grads, needs, strict=True)),
        upstream=_array(upstream),
        lse=_array(lse),
        **_problem(hidden, weight, targets, bias, (softcap, temperature, ignore_index)),
    )
    return grads


def _fused_backward_fake(
    upstream: Tensor,
    lse: Tensor,
    ahead: list[Tensor],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(hidden, weight, bias, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, *ctx.settings, _ = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 8
    hidden, weight, targets, bias, lse, *ahead = ctx.saved_tensors
    inputs = (hidden, weight, targets, bias)
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = _fused_backward(upstream, lse, ahead, *inputs, *ctx.settings, needs)
    dhidden, dweight, dbias = (
        grad.to(x.dtype) if need else None
        for grad, x, need in zip(grads, (hidden, weight, bias), needs, strict=True)
    )
    return dhidden, dweight, None, dbias, None, None, None, None


def _one_by_one(op: Any) -> Any:
    """The rule of torch.vmap: one entry of the mapped axis after another."""

    def entry(x: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, list | tuple):
            return [entry(part, d, i) for part, d in zip(x, dim, strict=True)]
        return x if dim is None else x.select(dim, i)

    def mapped(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, tuple[int, ...]]:
        each = [
            op(*(entry(x, dim, i) for x, dim in zip(args, dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = [torch.stack(parts) for parts in zip(*each, strict=True)]
        return tuple(outputs), (0,) * len(outputs)

    return mapped


_fused.register_fake(_fused_fake)
_fused.register_autograd(_backward, setup_context=_save)
_fused.register_vmap(_one_by_one(_fused))
_fused_backward.register_fake(_fused_backward_fake)
_fused_backward.register_vmap(_one_by_one(_fused_backward))


def _problem(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    settings: tuple[float | None, float, int],
) -> dict[str, Any]:
    """The arguments that both functions of the C++ core take."""
    softcap, temperature, ignore_index = settings
    return {
        "hidden": _array(hidden),
        "weight": _array(weight),
        "targets": _array(targets),
        "bias": None if bias is None else _array(bias.float()),
        "softcap": softcap or 0.0,
        "temperature": temperature,
        "ignore_index": ignore_index,
        "threads": torch.get_num_threads(),
    }


def _array(tensor: Tensor) -> NDArray[Any]:
    """The same memory where NumPy can have it, as of one model; bfloat16 as its bits."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.float16:
        tensor = tensor.float()
    half = tensor.dtype == torch.bfloat16
    return (tensor.view(torch.uint16) if half else tensor).numpy()[None]


def _chunked(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    settings: tuple[float | None, float, int],
) -> Tensor:  # (N,)
    rows = max(1, MAX_LOGITS // weight.shape[0])
    if len(hidden) <= rows:
        return reference.token_bits(hidden, weight, targets, bias, *settings)
    return torch.cat(
        [
            checkpoint(
                reference.token_bits,
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
    )


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
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
        if name == "targets":
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                raise ValueError(f"targets must be integers, not {tensor.dtype}: use .long()")
        elif not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}: use .float()")
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
    autocast = torch.is_autocast_enabled(hidden.device.type)
    if hidden.dtype != weight.dtype and not autocast:
        raise ValueError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}: cast one with .to(), or use autocast"
        )
    if softcap is not None and not (0 < softcap < math.inf):
        raise ValueError(f"softcap must be above 0 and finite, not {softcap}")
    if not (0 < temperature < math.inf):
        raise ValueError(f"temperature must be above 0 and finite, not {temperature}")
