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


def embedding(
    tokens: Tensor, weight: Tensor, positions: Tensor, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(E, B, T), (E, V, D), (E, S, D) → (E, B · T, D): the sum of each token's row of its model's
    weight and of its position's; and weight itself, to which the kernel of the backward pass adds
    the gradient of what is returned. Differentiable once. into: see fastmem/models/block.py."""
    (_, _, T), (E, V, _) = tokens.shape, weight.shape
    if is_fused(tokens, weight):
        both: tuple[Tensor, Tensor] = _Fused.apply(into, tokens.flatten(1), T, weight, positions)  # type: ignore[no-untyped-call]
        return both
    rows = tokens + V * torch.arange(E, device=tokens.device)[:, None, None]
    x = F.embedding(rows, weight.flatten(0, 1))
    return (x + positions[:, None, :T]).flatten(1, 2), weight


def is_fused(tokens: Tensor, weight: Tensor) -> bool:
    """True on a GPU in float32 and bfloat16, while the table of counts is small."""
    if weight.device.type not in DEVICES or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    from fastmem.kernels import embedding

    E, V, _ = weight.shape
    return embedding.table_bytes(E, tokens[0].numel(), V) <= MOST_BYTES


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, into: Tensor | None, tokens: Tensor, T: int, weight: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.into, ctx.sizes = into, (T, weight.shape[1], positions.shape[1])
        ctx.save_for_backward(tokens)
        ctx.set_materialize_grads(False)
        return fused_embedding(tokens, weight, positions, T), weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, residual = gradients
        if dx is None:
            return None, None, None, residual, None
        (E, _, D), (_, V, S), into = dx.shape, ctx.sizes, ctx.into
        if into is None:
            into = torch.empty((E, (V + S) * D), dtype=dx.dtype, device=dx.device)
        fused_backward(dx, residual, *ctx.saved_tensors, *ctx.sizes, into)
        return None, None, None, *torch.split(into.view(E, V + S, D), [V, S], 1)


@torch.library.custom_op("fastmem::embedding", mutates_args=(), device_types="cuda")
def fused_embedding(tokens: Tensor, weight: Tensor, positions: Tensor, T: int) -> Tensor:
    from fastmem.kernels import embedding

    weight, positions = (
        w if w[:1].is_contiguous() else w.contiguous() for w in (weight, positions)
    )
    return embedding.forward(tokens.contiguous(), weight, positions, T)


@torch.library.custom_op("fastmem::embedding_backward", mutates_args={"into"}, device_types="cuda")
def fused_backward(
    dx: Tensor, residual: Tensor | None, tokens: Tensor, T: int, V: int, S: int, into: Tensor
) -> None:
    """Into (E, (V + S) * D): the gradients of weight, with residual, and of positions."""
    from fastmem.kernels import embedding

    residual = None if residual is None else residual.contiguous()
    embedding.backward(dx.contiguous(), residual, tokens.contiguous(), T, V, S, into)


@fused_embedding.register_fake
def _(tokens: Tensor, weight: Tensor, positions: Tensor, T: int) -> Tensor:
    return weight.new_empty((*tokens.shape, weight.shape[2]))
