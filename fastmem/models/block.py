"""LayerNorm and linear layers of a transformer in training: Triton kernels on a GPU, else PyTorch.

E models, N rows, D width, U hidden columns: 4 D of an MLP, 3 D of q, k, v, P weights in all.
`into` (E, P) is where the kernels put the gradients of the weights, in their order: the gradients
that autograd returns are views of it then, until the next backward pass. They are new tensors
without `into`, and where PyTorch computes them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmem.models.attention import DEVICES

WIDEST = {torch.bfloat16: 256, torch.float32: 64}
"""The largest D by the dtype of the products: wider rows of sums do not fit the registers."""
WIDEST_NORM = 256
"""The largest D of LayerNorm alone."""


def norm_linear(
    x: Tensor, weights: Sequence[Tensor], into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x itself (E, N, D), and (E, N, U) of the linear layer of its LayerNorm.

    weights: scale, shift, weight (E, U, D), bias. The kernel of the backward pass adds the gradient
    of the x that is returned.
    """
    if is_fused(x, weights):
        both: tuple[Tensor, Tensor] = _fused(x, None, weights, into)
        return both
    scale, shift, weight, bias = weights
    return x, linear(norm(x, [scale, shift]), weight, bias)


def mlp(
    x: Tensor, mixed: Tensor, weights: Sequence[Tensor], into: Tensor | None = None
) -> Tensor:  # twice (E, N, D) → same
    """x + down(gelu(up(LayerNorm(x)))) of x + proj(mixed): a block after attention, tanh's GELU.

    weights: proj (E, D, D), proj_bias, scale, shift, up (E, U, D), up_bias, down (E, D, U),
    down_bias.
    """
    if is_fused(x, weights):
        out: Tensor = _fused(x, mixed.to(_kind(x)), weights, into)
        return out
    proj, proj_bias, scale, shift, up, up_bias, down, down_bias = weights
    x = x + linear(mixed, proj, proj_bias)
    hidden = F.gelu(linear(norm(x, [scale, shift]), up, up_bias), approximate="tanh")
    return x + linear(hidden, down, down_bias)


def norm(x: Tensor, weights: Sequence[Tensor], into: Tensor | None = None) -> Tensor:
    """LayerNorm with the scale and shift of each model; by the kernels in the products' dtype."""
    if is_fused(x, weights):
        out: Tensor = _fused(x, None, weights, into)
        return out
    wide = torch.promote_types(x.dtype, torch.float32)  # rounds once, as nn.LayerNorm does
    scale, shift = (part[:, None].to(wide) for part in weights)
    return torch.addcmul(shift, F.layer_norm(x.to(wide), x.shape[-1:]), scale).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], x, weight.mT)


def is_fused(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """True for narrow models, where the kernels need no intermediate matrix (docs/lab.md)."""
    if x.device.type not in DEVICES:  # before autocast, which some devices lack
        return False
    same = all(w.dtype == x.dtype and w.device == x.device for w in weights)
    widest = WIDEST_NORM if len(weights) == 2 else WIDEST.get(_kind(x), 0)
    fits = x.dtype in WIDEST and x.shape[-1] <= widest
    return same and fits and (_half(x) or not _autocast(x))


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _half(x: Tensor) -> bool:
    """True if the products are in bfloat16 although the weights are float32."""
    return _autocast(x) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16


def _kind(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if _half(x) else x.dtype


def _fused(x: Tensor, mixed: Tensor | None, weights: Sequence[Tensor], into: Tensor | None) -> Any:
    return _Fused.apply(_half(x), into, x, mixed, *weights)  # type: ignore[no-untyped-call]


class _Fused(torch.autograd.Function):
    """x (with four weights) and the output, without a sum of the gradients of x."""

    @staticmethod
    def forward(
        ctx: Any,
        half: bool,
        into: Tensor | None,
        x: Tensor,
        mixed: Tensor | None,
        *weights: Tensor,
    ) -> Any:
        out, middle = fused_block(x, mixed, weights, half)
        ctx.half, ctx.into = half, into
        ctx.save_for_backward(x if mixed is None else middle, mixed, *weights)
        ctx.set_materialize_grads(False)
        return (x, out) if len(weights) == 4 else out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mixed, *weights = ctx.saved_tensors
        residual, dout = (None, *gradients)[-2:]
        if dout is None:
            return None, None, residual, *[None] * (1 + len(weights))
        dx, dmixed, flat = fused_backward(dout, residual, x, mixed, weights, ctx.half, ctx.into)
        flat = flat if ctx.into is None else ctx.into
        pieces = torch.split(flat, [w.shape[1:].numel() for w in weights], 1)
        views = [p.view(w.shape) for p, w in zip(pieces, weights, strict=True)]
        return None, None, dx, None if mixed is None else dmixed, *views


@torch.library.custom_op("fastmem::block", mutates_args=(), device_types="cuda")
def fused_block(
    x: Tensor, mixed: Tensor | None, weights: Sequence[Tensor], half: bool
) -> tuple[Tensor, Tensor]:
    """`mlp` and the input of its LayerNorm, `norm_linear` or `norm`."""
    from fastmem.kernels import block

    return block.forward(x.contiguous(), _contiguous(mixed), _strided(weights), half)


@torch.library.custom_op("fastmem::block_backward", mutates_args={"into"}, device_types="cuda")
def fused_backward(
    dout: Tensor,
    residual: Tensor | None,
    x: Tensor,
    mixed: Tensor | None,
    weights: Sequence[Tensor],
    half: bool,
    into: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of mixed and, as one tensor (E, P) or into it, of all weights."""
    from fastmem.kernels import block

    rows = dout.contiguous(), _contiguous(residual), x.contiguous(), _contiguous(mixed)
    dx, dmixed, flat = block.backward(*rows, _strided(weights), half, into)
    return dx, dmixed, flat if into is None else x.new_empty(0)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _strided(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The weights, or copies, contiguous in a model and with one stride between models."""
    first = weights[0]
    whole = all(w[:1].is_contiguous() for w in weights)
    if whole and (len(first) == 1 or len({w.stride(0) for w in weights}) == 1):
        return weights
    copy = torch.cat([w.flatten(1) for w in weights], 1)
    pieces = torch.split(copy, [w.shape[1:].numel() for w in weights], 1)
    return [p.view(w.shape) for p, w in zip(pieces, weights, strict=True)]


@fused_block.register_fake
def _(
    x: Tensor, mixed: Tensor | None, weights: Sequence[Tensor], half: bool
) -> tuple[Tensor, Tensor]:
    if mixed is not None:
        return x.new_empty(x.shape), x.new_empty(x.shape)
    kind = torch.bfloat16 if half else x.dtype
    return x.new_empty((*x.shape[:2], weights[-1].shape[1]), dtype=kind), x.new_empty(0)


@fused_backward.register_fake
def _(
    dout: Tensor,
    residual: Tensor | None,
    x: Tensor,
    mixed: Tensor | None,
    weights: Sequence[Tensor],
    half: bool,
    into: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    kind = torch.bfloat16 if half else x.dtype
    dmixed = x.new_empty(0 if mixed is None else x.shape, dtype=kind)
    size = sum(w.shape[1:].numel() for w in weights)
    return x.new_empty(x.shape), dmixed, x.new_empty((len(x), size) if into is None else 0)
