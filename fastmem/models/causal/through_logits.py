"""Statistics of tokens through the logits that a model returns, a few sequences at a time.

B sequences, T tokens, V vocabulary.
"""

import torch
from torch import Tensor, nn

from fastmem.kernels.reference import TokenStats, stats_of_logits
from fastmem.models.causal.head import keeps_some, run

IGNORED = -100
"""The target of a token that is not scored."""
MAX_LOGITS = 1 << 26
"""Logits that a model holds at once if it is scored through them (256 MiB in float32)."""


def fill_through_logits(
    whole: TokenStats,  # each (B, T)
    model: nn.Module,
    vocab: int,
    inputs: Tensor,  # (B, T)
    targets: Tensor,  # (B, T)
) -> None:
    """Writes the statistics of the scored tokens into `whole`.

    Sequences of one length share a pass, without padding and with at most MAX_LOGITS logits.
    """
    scored = targets != IGNORED
    lengths = (scored * torch.arange(1, inputs.shape[1] + 1, device=scored.device)).amax(1)
    parts: dict[int, list[int]] = {}
    for row, length in enumerate(lengths.tolist()):
        parts.setdefault(length, []).append(row)
    for length, rows in parts.items():
        size = max(1, MAX_LOGITS // max(1, length * vocab))
        for begin in range(0, len(rows) if length else 0, size):
            some = rows[begin : begin + size]
            for first, last in _pieces(model, vocab, length):
                keep = None if (first, last) == (0, length) else torch.arange(first, last)
                logits = run(model, inputs[some, :length], keep)[:, first - last :]
                _fill(whole, some, first, logits, targets[some, first:last])


def _pieces(model: nn.Module, vocab: int, length: int) -> list[tuple[int, int]]:
    """Parts of a sequence whose logits are made at once: all of it unless it is too long and the
    model can leave out logits, which costs a pass for each part."""
    size = max(1, MAX_LOGITS // vocab)
    if size >= length or not keeps_some(model):
        return [(0, length)]
    return [(begin, min(length, begin + size)) for begin in range(0, length, size)]


def _fill(whole: TokenStats, rows: list[int], first: int, logits: Tensor, targets: Tensor) -> None:
    """Statistics of logits (n, T, V) into `whole`, from the place `first` of `rows`."""
    size = max(1, MAX_LOGITS // 8 // logits.shape[-1])  # statistics hold several copies
    for row, own, wanted in zip(rows, logits, targets.to(logits.device), strict=True):
        place = first
        for part, target in zip(own.split(size), wanted.split(size), strict=True):
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            stats = stats_of_logits(part, target, IGNORED)
            for to, values in zip(whole, stats, strict=True):
                assert to is not None
                assert values is not None
                kept = torch.where(target != IGNORED, values, torch.zeros_like(values))
                to[row, place : place + len(part)] = kept.to(to.device)
            place += len(part)
