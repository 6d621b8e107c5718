"""Plain PyTorch for likelihood and attention: oracle of the tests, baseline of the benchmarks.

N rows, D width, V vocabulary, E models; in attention N sequences, T tokens, H heads, W width of a
head.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Bits and statistics of each token, (..., N); None if not asked for.

    In float32 (float64 for float64 inputs) unless stated, with p the softmax of a row:
    """

    bits: Tensor
    """-log2 p[target], as in token_bits."""
    entropy_bits: Tensor | None
    """-sum p log2 p: the code length that the model expects."""
    second_moment: Tensor | None
    """sum p (log2 p)², which is variance + entropy_bits²."""
    is_greedy: Tensor | None
    """bool: the target is the first token with the greatest logit, as in torch.argmax."""
    lse_bits: Tensor | None
    """log2 sum 2^z, with z the logits in bits, after bias, softcap and temperature."""
    variance: Tensor | None
    """sum p (log2 p + entropy_bits)², at least 0: the square of what Min-K%++ divides by."""


def token_bits(
    hidden: Tensor,  # (..., N, D)
    weight: Tensor,  # (..., V, D)
    targets: Tensor,  # (..., N)
    bias: Tensor | None = None,  # (..., V)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:  # (..., N)
    """Returns -log2 softmax(hidden @ weight.T + bias)[target], with all logits in memory.

    Casts half precision inputs to float32 before it multiplies and sums them. An ignored target
    costs 0 bits; any other target outside [0, V) gives NaN.
    """
    logits = logits_of(hidden, weight, bias, softcap, temperature)
    return _bits(torch.log_softmax(logits, dim=-1), targets, ignore_index)


def token_stats(
    hidden: Tensor,  # (..., N, D)
    weight: Tensor,  # (..., V, D)
    targets: Tensor,  # (..., N)
    bias: Tensor | None = None,  # (..., V)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> TokenStats:
    """Returns all statistics, with all logits in memory.

    Entropy, moments and lse_bits do not depend on the target. is_greedy is False for an
    ignored target or one outside [0, V). A row that is not finite has NaN and False.
    """
    logits = logits_of(hidden, weight, bias, softcap, temperature)
    return stats_of_logits(logits, targets, ignore_index)


def stats_of_logits(
    logits: Tensor,  # (..., N, V), float32 or float64
    targets: Tensor,  # (..., N)
    ignore_index: int = -100,
) -> TokenStats:
    """Returns the statistics of token_stats for logits in memory."""
    targets = targets.to(torch.int64)  # a narrow type may not hold ignore_index
    log_p = torch.log_softmax(logits, dim=-1)
    bits = _bits(log_p, targets, ignore_index)
    p, log2_p = log_p.exp(), log_p / math.log(2)
    possible = p != 0  # 0 log 0 is 0, and NaN stays
    first = torch.where(possible, p * log2_p, 0.0).sum(-1)
    second = torch.where(possible, p * log2_p * log2_p, 0.0).sum(-1)
    peak = logits.amax(-1)
    below = logits - peak.unsqueeze(-1)
    # torch.logsumexp gives inf for an infinite logit, not NaN.
    lse = (peak + below.exp().sum(-1).log()) / math.log(2)
    # log p is rounded near log V: about the peak, a row that is almost flat keeps its variance.
    below = torch.where(possible, below / math.log(2), 0.0)
    mean = (p * below).sum(-1, keepdim=True)
    variance = (p * (below - mean) ** 2).sum(-1)
    greedy = (logits.argmax(-1) == targets) & (targets != ignore_index) & ~lse.isnan()
    return TokenStats(bits, -first, second, greedy, lse, variance)


def attention(qkv: Tensor) -> Tensor:  # (N, T, 3, H, W) → (N, T, H, W)
    """Returns causal self-attention of each head, with all scores in memory."""
    q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=qkv.device).triu(1)
    p = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
    mixed: Tensor = (p @ v).transpose(1, 2).to(qkv.dtype)
    return mixed


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, temperature: float
) -> Tensor:
    compute = torch.promote_types(hidden.dtype, torch.float32)
    if softcap is not None:
        hidden = hidden + (hidden - hidden)  # NaN for infinity, which tanh would make finite
    logits = hidden.to(compute) @ weight.to(compute).mT
    if bias is not None:
        logits = logits + bias.to(compute).unsqueeze(-2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def _bits(log_p: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    # log_softmax has subtracted the maximum, which keeps the result at or above 0, and exact under
    # an offset that all logits of a row share.
    targets = targets.to(torch.int64).expand(log_p.shape[:-1])
    ignored = targets == ignore_index
    inside = (targets >= 0) & (targets < log_p.shape[-1])
    index = torch.where(inside, targets, 0).unsqueeze(-1)
    bits = log_p.gather(-1, index).squeeze(-1) * (-1 / math.log(2))
    bits = torch.where(inside, bits, torch.nan)
    return torch.where(ignored, 0.0, bits)
