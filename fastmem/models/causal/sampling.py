"""Bits of tokens under ways of sampling: a temperature, top-k.

B sequences, T tokens, V vocabulary, n rows of logits.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmem.likelihood.api import token_bits
from fastmem.models.causal.anatomy import evaluating
from fastmem.models.causal.head import run
from fastmem.models.causal.lm import CausalLM
from fastmem.models.causal.through_logits import IGNORED

CHUNK_LOGITS = 1 << 22
"""Logits of a chunk (16 MiB in float32)."""


class Way(NamedTuple):
    """A way of sampling: logits / temperature, then the k greatest of them, or all."""

    temperature: float
    top_k: int | None = None

    @property
    def name(self) -> str:
        """Such as t0.7_k40."""
        return f"t{self.temperature:g}" + (f"_k{self.top_k}" if self.top_k else "")


def sampling_bits(
    lm: CausalLM,
    inputs: Tensor,  # (B, T)
    targets: Tensor,  # (B, T)
    ways: Sequence[Way],
) -> list[Tensor]:  # each (B, T)
    """-log2 of the probability that each way of sampling draws each target.

    Computes, for each way,

        z = model(inputs).logits / temperature
        z[z < z.topk(k).values[..., -1:]] = -inf
        F.cross_entropy(z.mT, targets, reduction="none") / math.log(2)

    All ways share one pass of the model. A temperature alone needs no logits; top-k takes the
    logits of the rows with a target, in chunks. Equal logits at the k-th place all stay.

    Args:
        lm: a model that has scored a batch before, so that `lm.through` is proved.
        inputs, targets: as in `CausalLM.token_stats`.
        ways: ways of sampling, with temperatures above 0 and k from 1.

    Returns:
        float32 (float64 for a model in float64); inf where a target is never drawn, 0 where the
        target is -100.
    """
    inputs, targets = inputs.to(lm.device), targets.to(lm.device)
    found = [torch.zeros(targets.shape, dtype=lm.dtype, device=lm.device) for _ in ways]
    scored = targets != IGNORED
    if not bool(scored.any()):
        return found
    with torch.no_grad(), evaluating(lm.model):
        if lm.through == "hidden":
            parts = _of_hidden(lm, lm.hidden(inputs)[scored], targets[scored], ways)
            for whole, part in zip(found, parts, strict=True):
                whole[scored] = part.to(whole)
            return found
        for row in range(len(inputs)):  # logits of one sequence at a time, without padding
            kept = scored[row]
            if bool(kept.any()):
                end = int(kept.nonzero()[-1]) + 1
                logits = run(lm.model, inputs[row : row + 1, :end])[0, -end:][kept[:end]]
                for whole, way in zip(found, ways, strict=True):
                    whole[row, kept] = _of_logits(logits, targets[row, kept], way).to(whole)
    return found


def _of_hidden(
    lm: CausalLM, hidden: Tensor, targets: Tensor, ways: Sequence[Way]
) -> list[Tensor]:  # each (n,)
    head = lm.head
    assert head is not None
    weight, bias = head.weight, head.bias
    hidden, targets = hidden.to(weight.device), targets.to(weight.device)
    rows = max(1, CHUNK_LOGITS // head.vocab)
    found = []
    for way in ways:
        if way.top_k is None:
            scale = head.softcap, head.temperature * way.temperature
            found.append(token_bits(hidden, weight, targets, bias, *scale))
            continue
        parts = []
        for some, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            logits = (some @ weight.T).to(torch.promote_types(some.dtype, torch.float32))
            logits = logits if bias is None else logits + bias
            if head.softcap is not None:
                logits = head.softcap * torch.tanh(logits / head.softcap)
            parts.append(_of_logits(logits / head.temperature, wanted, way))
        found.append(torch.cat(parts))
    return found


def _of_logits(logits: Tensor, targets: Tensor, way: Way) -> Tensor:  # (n, V), (n,) → (n,)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / way.temperature
    targets = targets.to(logits.device)
    if way.top_k is not None and way.top_k < logits.shape[-1]:
        least = logits.topk(way.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    log_p = logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    return -log_p / math.log(2)
