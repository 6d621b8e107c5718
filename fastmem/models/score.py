"""Code length of each sequence of a data set under a model."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from fastmem.base.stats import Floats
from fastmem.data.array import as_sequences
from fastmem.data.sequences import Sequences
from fastmem.models.engine import FusedEngine, Precision, compute_in, converted, flat, is_fused
from fastmem.models.gpt import GPT, GPTConfig, check_model


class NotFinite(ValueError):
    """The code length of a sequence is not finite, since weights are not finite."""


def sequence_bits(
    model: GPT,
    sequences: Sequences | ArrayLike,
    precision: Precision = "fp32",
    batch: int | None = None,
    progress: bool = False,
) -> Floats:  # (N,)
    """The code length of each sequence under the model, in bits, without its first token.

    Computes `model.token_bits(tokens).double().sum(-1)` for all N sequences, a batch at a time. A
    prefix that all sequences share is not coded: the first `sequences.context` tokens are left
    out. In float32 on a CPU the C++ core computes the bits of a GPT as made; a model with hooks,
    masks or other modules computes them itself.

    Args:
        model: the model; its device does the work.
        sequences: the data set, with a vocabulary and a length up to those of the model, or tokens
            as `from_array` takes them.
        precision: "fp32" computes in float32, or in float64 if the weights are float64,
            "bf16-mixed" in bfloat16 from float32 weights, the others in bfloat16. Weights of
            another dtype are converted, in a copy of the model.
        batch: sequences at a time; changes only speed and rounding.
        progress: shows a bar on a terminal.

    Returns:
        float64, in the order of the sequences: strict convention, S - 1 coded tokens each, S - P
        with a prefix of P tokens.

    Raises:
        ValueError: a model that is not a GPT, or on meta; a data set that does not fit the model;
            an unknown precision; a batch below 1; or bits that are not finite (weights that
            diverged).

    Example:
        >>> import fastmem
        >>> model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4))
        >>> bits = sequence_bits(model, fastmem.UniformSequences(10, length=4, vocab=16))
        >>> bits.shape, bool(abs(bits.mean() - 12) < 0.1)  # untrained: 3 tokens of 4 bits
        ((10,), True)
    """
    sequences = as_sequences("sequences must be a set of sequences", sequences)
    check_model(model)
    check_fit(model.config, sequences)
    if batch is None:
        batch = max(1, (8192 if model.device.type == "cpu" else 131072) // sequences.length)
    elif not isinstance(batch, (int, np.integer)) or batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch!r}")
    context, model = compute_in(precision, model.device), converted(model, precision)
    fused = FusedEngine(model, flat(model)[None]) if is_fused(model, precision) else None
    bits = np.empty(sequences.count)
    starts = range(0, sequences.count, batch)
    with torch.no_grad(), context:
        for start in tqdm(starts, "score", disable=None if progress else True, leave=False):
            stop = min(start + batch, sequences.count)
            tokens = sequences.to_torch(model.device, slice(start, stop))
            token_bits = fused.bits(tokens[None])[0] if fused else model.token_bits(tokens)
            coded = token_bits[:, sequences.context - 1 :]  # token_bits leaves out the first token
            bits[start:stop] = coded.double().sum(-1).cpu().numpy()
    if not np.isfinite(bits).all():
        raise NotFinite(
            f"the bits of sequence {int(np.argmin(np.isfinite(bits)))} are not finite, since the "
            "weights are not: train the model again at a lower rate"
        )
    return bits


def check_fit(config: GPTConfig, sequences: Sequences) -> None:
    """ValueError if a model of this shape cannot code these sequences."""
    if sequences.length < 2:
        raise ValueError("length is 1: only tokens after the first are coded; use 2 or more")
    if sequences.vocab < 2:
        raise ValueError("vocab is 1: a token that is always the same has no bits; use 2 or more")
    if sequences.coded_entropy_bits == 0:
        raise ValueError("the tokens are always the same and have no bits: give other weights")
    if sequences.length > config.length:
        raise ValueError(
            f"sequences of length {sequences.length} for a model of length {config.length}: "
            f"give the model at least {sequences.length}"
        )
    if sequences.vocab > config.vocab:
        raise ValueError(
            f"tokens of a vocabulary of {sequences.vocab} for a model of {config.vocab}: "
            f"give the model at least {sequences.vocab}"
        )
