"""Embedding of tokens and positions in training: by Triton kernels on a GPU, else by PyTorch.

E models, B batch, T tokens, V vocabulary, S positions, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmem.models.attention import DEVICES

MOST_BYTES = 1 << 26
"""The largest table of counts; above, PyTorch sorts the tokens."""


def embedding(tokens: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """(E, B, T), (E, V, D), (E, S, D) → (E, B · T, D): the sum of each token's row of its model's
    weight and of its position's, differentiable once."""
    (_, _, T), (E, V, _) = tokens.shape, weight.shape
    if is_fused(tokens, weight):
        out: Tensor = fused_embedding(tokens.flatten(1), weight, positions, T)
        return out
    rows = tokens + V * torch.arange(E, device=tokens.device)[:, None, None]
    x = F.embedding(rows, weight.flatten(0, 1))
    return (x + positions[:, None, :T]).flatten(1, 2)


def is_fused(tokens: Tensor, weight: Tensor) -> bool:
    """True on a GPU in float32 and bfloat16, while the table of counts is small."""
    if weight.device.type not in DEVICES or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    from fastmem.kernels import embedding

    E, V, _ = weight.shape
    return embedding.table_bytes(E, tokens[0].numel(), V) <= MOST_BYTES


@torch.library.custom_op("fastmem::embedding", mutates_args=(), device_types="cuda")
def fused_embedding(tokens: Tensor, weight: Tensor, positions: Tensor, T: int) -> Tensor:
    from fastmem.kernels import embedding

    weight, positions = (
        w if w[:1].is_contiguous() else w.contiguous() for w in (weight, positions)
    )
    return embedding.forward(tokens.contiguous(), weight, positions, T)


@torch.library.custom_op("fastmem::embedding_backward", mutates_args=(), device_types="cuda")
def fused_backward(dx: Tensor, tokens: Tensor, T: int, V: int, S: int) -> Tensor:
    """The gradients of weight and positions, as one tensor (E, V + S, D)."""
    from fastmem.kernels import embedding

    return embedding.gradient(dx.contiguous(), tokens.contiguous(), T, V, S)


@fused_embedding.register_fake
def _(tokens: Tensor, weight: Tensor, positions: Tensor, T: int) -> Tensor:
    return weight.new_empty((*tokens.shape, weight.shape[2]))


@fused_backward.register_fake
def _(dx: Tensor, tokens: Tensor, T: int, V: int, S: int) -> Tensor:
    return dx.new_empty((len(dx), V + S, dx.shape[-1]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    tokens, weight, positions, T = inputs
    ctx.save_for_backward(tokens)
    ctx.sizes = T, weight.shape[1], positions.shape[1]


def _gradient(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
    both = fused_backward(dx, *ctx.saved_tensors, *ctx.sizes)
    weight, positions = torch.split(both, ctx.sizes[1:], 1)
    return None, weight, positions, None


fused_embedding.register_autograd(_gradient, setup_context=_save)
