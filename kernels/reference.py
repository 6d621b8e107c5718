"""Plain PyTorch for every kernel: the oracle of the tests and the baseline of the benchmarks.

N rows, D width, V vocabulary, E models.
"""

import math

import torch
from torch import Tensor


def token_bits(
    hidden: Tensor,  # (..., N, D)
    weight: Tensor,  # (..., V, D)
    targets: Tensor,  # (..., N)
    bias: Tensor | None = None,  # (..., V)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:  # (..., N)
    """-log2 softmax(hidden @ weight.T + bias)[target], with all logits in memory.

    Half precision inputs are widened first, so that their products and sums are float32. An
    ignored target costs 0 bits; any other target outside [0, V) gives NaN.
    """
    compute = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(compute) @ weight.to(compute).mT
    if bias is not None:
        logits = logits + bias.to(compute).unsqueeze(-2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    # Subtracting the maximum inside log_softmax, before the target is taken, keeps the result
    # at or above 0 and exact under an offset that all logits of a row share.
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    targets = targets.to(torch.int64).expand(log_p.shape[:-1])
    ignored = targets == ignore_index
    inside = (targets >= 0) & (targets < weight.shape[-2])
    index = torch.where(inside, targets, 0).unsqueeze(-1)
    bits = log_p.gather(-1, index).squeeze(-1) * (-1 / math.log(2))
    bits = torch.where(inside, bits, torch.nan)
    return torch.where(ignored, 0.0, bits)
