"""Checks of the arguments that the public functions share.

N rows, D width, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from fastmem.base.arguments import number
from fastmem.likelihood import operators
from fastmem.likelihood.problem import Problem

FUSED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the fused kernels; float64 goes to plain PyTorch, which checks them."""
SINGLE = torch.finfo(torch.float32)
"""The kernels hold softcap, temperature and their inverses in float32."""


def is_spread(hidden: Tensor, weight: Tensor) -> bool:
    """True if one is a DTensor: fastmem.likelihood.distributed takes the call."""
    if type(hidden) in operators.PLAIN and type(weight) in operators.PLAIN:
        return False
    return hasattr(hidden, "placements") or hasattr(weight, "placements")


def refuse_dtensor(name: str, tensor: Tensor, fix: str) -> None:
    """ValueError for a DTensor."""
    placements = getattr(tensor, "placements", None)
    if placements is not None:
        raise ValueError(f"{name} is a DTensor, {placements}: pass {fix}")


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
        if not plain and not spread:
            refuse_dtensor(
                name, tensor, "full_tensor() or to_local() of it, or DTensors for hidden or weight"
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
        torch.float64 in (hidden.dtype, weight.dtype) or not in_autocast(hidden)
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


def in_autocast(tensor: Tensor) -> bool:
    # PyTorch 2.11 cannot compile is_autocast_available; meta alone lacks autocast.
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


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
