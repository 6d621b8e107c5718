"""The linear layers of a transformer's block in training: Triton kernels on a GPU, else PyTorch.

E models, N rows, D width, U hidden columns: 4 D of an MLP, 3 D of q, k, v.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmem.models.attention import DEVICES

WIDEST = {torch.bfloat16: 256, torch.float32: 64}
"""The largest D by the dtype of the products: wider rows of sums do not fit the registers."""


def norm_linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:  # (E, N, D) → (E, N, U)
    """The linear layer of a LayerNorm. weights: scale, shift, weight (E, U, D), bias."""
    if is_fused(x, weights):
        out: Tensor = fused_block(x, *weights, None, None, half=_half(x))
        return out
    scale, shift, weight, bias = weights
    return linear(norm(x, scale, shift), weight, bias)


def mlp(x: Tensor, weights: Sequence[Tensor]) -> Tensor:  # (E, N, D) → (E, N, D)
    """x + down(gelu(up(LayerNorm(x)))), with tanh's GELU.

    weights: scale, shift, up (E, U, D), up_bias, down (E, D, U), down_bias.
    """
    if is_fused(x, weights):
        out: Tensor = fused_block(x, *weights, half=_half(x))
        return out
    scale, shift, up, up_bias, down, down_bias = weights
    hidden = F.gelu(linear(norm(x, scale, shift), up, up_bias), approximate="tanh")
    return x + linear(hidden, down, down_bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], x, weight.mT)


def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm with the scale and shift of each model."""
    wide = torch.promote_types(x.dtype, torch.float32)  # rounds once, as nn.LayerNorm does
    scale, shift = (part[:, None].to(wide) for part in (scale, shift))
    return torch.addcmul(shift, F.layer_norm(x.to(wide), x.shape[-1:]), scale).to(x.dtype)


def is_fused(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """True for narrow models, where the kernels need no intermediate matrix (docs/lab.md)."""
    if x.device.type not in DEVICES:  # before autocast, which some devices lack
        return False
    same = all(w.dtype == x.dtype and w.device == x.device for w in weights)
    kind = torch.bfloat16 if _half(x) else x.dtype
    fits = x.dtype in WIDEST and x.shape[-1] <= WIDEST.get(kind, 0)
    return same and fits and (_half(x) or not _autocast(x))


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _half(x: Tensor) -> bool:
    """True if the products are in bfloat16 although the weights are float32."""
    return _autocast(x) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16


@torch.library.custom_op("fastmem::block", mutates_args=(), device_types="cuda")
def fused_block(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor | None,
    down_bias: Tensor | None,
    half: bool,
) -> Tensor:
    """`mlp`, or `norm_linear` without `down`."""
    from fastmem.kernels import mlp

    weights = [w for w in (scale, shift, up, up_bias, down, down_bias) if w is not None]
    return mlp.forward(x.contiguous(), _strided(weights), half)


@torch.library.custom_op("fastmem::block_backward", mutates_args=(), device_types="cuda")
def fused_backward(
    dout: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor | None,
    down_bias: Tensor | None,
    half: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and, as one tensor (E, P), of all weights (`_split`)."""
    from fastmem.kernels import mlp

    weights = [w for w in (scale, shift, up, up_bias, down, down_bias) if w is not None]
    return mlp.backward(dout.contiguous(), x.contiguous(), _strided(weights), half)


def _strided(weights: list[Tensor]) -> list[Tensor]:
    """The weights, or copies, contiguous in a model and with one stride between models."""
    first = weights[0]
    whole = all(w[:1].is_contiguous() for w in weights)
    if whole and (len(first) == 1 or len({w.stride(0) for w in weights}) == 1):
        return weights
    copy = torch.cat([w.flatten(1) for w in weights], 1)
    pieces = torch.split(copy, [w.shape[1:].numel() for w in weights], 1)
    return [p.view(w.shape) for p, w in zip(pieces, weights, strict=True)]


@fused_block.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, up: Tensor, *rest: Any) -> Tensor:
    _, down, _, half = rest
    if down is not None:
        return x.new_empty(x.shape)
    shape, dtype = (*x.shape[:2], up.shape[1]), torch.bfloat16 if half else x.dtype
    return x.new_empty(shape, dtype=dtype)


@fused_backward.register_fake
def _(dout: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    size = sum(w[0].numel() for w in rest[:-1] if w is not None)
    return x.new_empty(x.shape), x.new_empty((x.shape[0], size))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.half = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dx, gradients = fused_backward(dout, *ctx.saved_tensors, ctx.half)
    _, scale, shift, up, up_bias, down, down_bias = ctx.saved_tensors
    pieces = _split(gradients, [scale, shift, down_bias, up, up_bias, down])
    scale, shift, down_bias, up, up_bias, down = pieces
    return dx, scale, shift, up, up_bias, down, down_bias, None


def _split(gradients: Tensor, weights: list[Tensor | None]) -> list[Tensor | None]:
    """Views of the gradients (E, P) in the shapes of the weights, None where one is missing."""
    sizes = [0 if w is None else w.shape[1:].numel() for w in weights]
    pieces = torch.split(gradients, sizes, 1)
    return [None if w is None else p.view(w.shape) for p, w in zip(pieces, weights, strict=True)]


fused_block.register_autograd(_gradient, setup_context=_save)
