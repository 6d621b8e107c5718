"""Causal self-attention in training: the Triton kernels on a GPU, else PyTorch.

N sequences (of all models), T tokens, H heads, W width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmem.likelihood import local

DEVICES = ["cuda"] if "cuda" in local.DEVICES else []
"""Devices with fused kernels: none without Triton, or with FASTMEM_REFERENCE set."""


def attention(qkv: Tensor) -> Tensor:  # (N, T, 3, H, W) → (N, T, H, W)
    """Each token's mixture of the values up to it, for each head, differentiable once."""
    if is_fused(qkv):
        out: Tensor = fused_attention(qkv)[0]
        return out
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def is_fused(qkv: Tensor) -> bool:
    """True for short sequences and narrow heads, where the kernels are faster (docs/lab.md)."""
    _, T, _, _, W = qkv.shape
    widest = {torch.float32: 16, torch.bfloat16: 64 if T <= 64 else 16}
    return qkv.device.type in DEVICES and T <= 256 and widest.get(qkv.dtype, 0) >= W


@torch.library.custom_op("fastmem::attention", mutates_args=(), device_types="cuda")
def fused_attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and lse for the backward pass."""
    from fastmem.kernels import attention

    return attention.forward(qkv.contiguous())


@torch.library.custom_op("fastmem::attention_backward", mutates_args=(), device_types="cuda")
def fused_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    from fastmem.kernels import attention

    return attention.backward(dout.contiguous(), qkv.contiguous(), out, lse)


@fused_attention.register_fake
def _(qkv: Tensor) -> tuple[Tensor, Tensor]:
    N, T, _, H, W = qkv.shape
    return qkv.new_empty((N, T, H, W)), qkv.new_empty((N, T, H), dtype=torch.float32)


@fused_backward.register_fake
def _(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _save(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _gradient(ctx: Any, dout: Tensor, _: None) -> Tensor:
    gradient: Tensor = fused_backward(dout, *ctx.saved_tensors)
    return gradient


fused_attention.register_autograd(_gradient, setup_context=_save)
