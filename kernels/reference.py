"""Plain PyTorch for every kernel: the oracle of the tests and the baseline of the benchmarks.

N rows, D width, V vocabulary, E models.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """What one pass over the vocabulary finds of each token, (..., N); None if not asked for.

    With p the softmax of a row, in float32 (float64 for float64 inputs) unless stated:
    """

    bits: Tensor
    """-log2 p[target], as token_bits has it."""
    entropy_bits: Tensor | None
    """-sum p log2 p: what the model expected to pay."""
    second_moment: Tensor | None
    """sum p (log2 p)²; less entropy_bits², it is the variance that Min-K%++ divides by."""
    is_greedy: Tensor | None
    """bool: the target has the greatest logit, of equals the lowest index, as torch.argmax."""
    lse_bits: Tensor | None
    """log2 sum 2^z, with z the logits in bits, after bias, softcap and temperature."""


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
    logits = _logits(hidden, weight, bias, softcap, temperature)
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
    """All statistics, with all logits in memory.

    Those of the softmax are of the row, whatever its target; is_greedy is False for a target that
    is ignored or outside, and all are NaN (is_greedy False) for a row that is not finite.
    """
    targets = targets.to(torch.int64)  # a narrow type may not hold ignore_index
    logits = _logits(hidden, weight, bias, softcap, temperature)
    log_p = torch.log_softmax(logits, dim=-1)
    bits = _bits(log_p, targets, ignore_index)
    p, log2_p = log_p.exp(), log_p / math.log(2)
    possible = p != 0  # 0 log 0 is 0, and NaN stays
    first = torch.where(possible, p * log2_p, 0.0).sum(-1)
    second = torch.where(possible, p * log2_p * log2_p, 0.0).sum(-1)
    peak = logits.amax(-1)
    # Not torch.logsumexp, which has an answer for an infinite logit.
    lse = (peak + (logits - peak.unsqueeze(-1)).exp().sum(-1).log()) / math.log(2)
    greedy = (logits.argmax(-1) == targets) & (targets != ignore_index) & ~lse.isnan()
    return TokenStats(bits, -first, second, greedy, lse)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, temperature: float
) -> Tensor:
    compute = torch.promote_types(hidden.dtype, torch.float32)
    if softcap is not None:
        hidden = hidden + (hidden - hidden)  # NaN for infinity, which the tanh would make finite
    logits = hidden.to(compute) @ weight.to(compute).mT
    if bias is not None:
        logits = logits + bias.to(compute).unsqueeze(-2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def _bits(log_p: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    # The maximum was subtracted before the target is taken, which keeps the result at or above 0
    # and exact under an offset that all logits of a row share.
    targets = targets.to(torch.int64).expand(log_p.shape[:-1])
    ignored = targets == ignore_index
    inside = (targets >= 0) & (targets < log_p.shape[-1])
    index = torch.where(inside, targets, 0).unsqueeze(-1)
    bits = log_p.gather(-1, index).squeeze(-1) * (-1 / math.log(2))
    bits = torch.where(inside, bits, torch.nan)
    return torch.where(ignored, 0.0, bits)
