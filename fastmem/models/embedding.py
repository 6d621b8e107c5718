"""Token embedding in training: its gradient by Triton kernels on a GPU, else by PyTorch.

E models, B batch, T tokens, V vocabulary, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmem.models.attention import DEVICES

MOST_BYTES = 1 << 26
"""The largest table of counts; above, PyTorch sorts the tokens."""


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:  # (E, B, T), (E, V, D) → (E, B, T, D)
    """Each token's row of its model's weight, differentiable once."""
    if is_fused(tokens, weight):
        out: Tensor = fused_embedding(tokens, weight)
        return out
    E, V, _ = weight.shape
    rows = tokens + V * torch.arange(E, device=tokens.device)[:, None, None]
    return F.embedding(rows, weight.flatten(0, 1))


def is_fused(tokens: Tensor, weight: Tensor) -> bool:
    """True on a GPU in float32 and bfloat16, while the table of counts is small."""
    if weight.device.type not in DEVICES or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    from fastmem.kernels import embedding

    E, V, _ = weight.shape
    return embedding.table_bytes(E, tokens[0].numel(), V) <= MOST_BYTES


@torch.library.custom_op("fastmem::embedding", mutates_args=(), device_types="cuda")
def fused_embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    E, V, D = weight.shape
    rows = tokens + V * torch.arange(E, device=tokens.device)[:, None, None]
    return F.embedding(rows, weight.reshape(E * V, D))


@torch.library.custom_op("fastmem::embedding_backward", mutates_args=(), device_types="cuda")
def fused_backward(dx: Tensor, tokens: Tensor, V: int) -> Tensor:
    from fastmem.kernels import embedding

    return embedding.gradient(dx.flatten(1, 2).contiguous(), tokens.flatten(1).contiguous(), V)


@fused_embedding.register_fake
def _(tokens: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((*tokens.shape, weight.shape[2]))


@fused_backward.register_fake
def _(dx: Tensor, tokens: Tensor, V: int) -> Tensor:
    return dx.new_empty((len(dx), V, dx.shape[-1]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.vocab = inputs[1].shape[1]


def _gradient(ctx: Any, dx: Tensor) -> tuple[None, Tensor]:
    return None, fused_backward(dx, *ctx.saved_tensors, ctx.vocab)


fused_embedding.register_autograd(_gradient, setup_context=_save)
