"""Bits per token from hidden states, without a full set of logits in memory.

N rows, D width, V vocabulary, E models.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastmem.kernels import reference

MAX_LOGITS = 1 << 24
"""The most logits that exist at once (64 MiB of float32): more rows are taken in chunks."""


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

    Computes, a chunk of rows at a time and again in the backward pass,

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
        and bias. A target outside [0, V) gives NaN: it is never read, and finding it here would
        stall a GPU. Under autocast, hidden and weight are cast as F.linear's are.

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
    with torch.autocast(device, enabled=False):
        if weight.ndim == 2:
            rows = hidden.reshape(-1, hidden.shape[-1])
            bits = _chunked(rows, weight, targets.reshape(-1), bias, settings)
        else:
            # One model after another: their logits share the limit.
            h, w, t = hidden.flatten(0, -3), weight.flatten(0, -3), targets.flatten(0, -2)
            b = None if bias is None else bias.expand(weight.shape[:-1]).flatten(0, -2)
            each = [
                _chunked(h[e], w[e], t[e], None if b is None else b[e], settings)
                for e in range(len(h))
            ]
            bits = torch.stack(each) if each else torch.empty(0, device=hidden.device)
    return bits.reshape(hidden.shape[:-1])


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
