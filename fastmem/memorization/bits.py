"""Memorized bits from code lengths, in the strict and in the published convention."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fastmem.base.stats import Floats
from fastmem.data.array import as_sequences
from fastmem.data.sequences import Sequences


@dataclass(frozen=True)
class Memorized:
    """Bits of a data set that a model memorized, and the entropy of the data set.

    strict counts the coded tokens. published also credits the tokens that are not coded, such as
    the first of each sequence, with the mean of the coded tokens, as the paper does: strict ·
    entropy / coded entropy, which is strict · S / (S - 1) for sequences without a shared prefix.
    entropy_bits counts all S tokens.

    All three are nan if the entropy of the data set is unknown, as for a file of text.
    """

    strict: float
    published: float
    entropy_bits: float

    @property
    def fraction(self) -> float:
        """The fraction of the entropy that is memorized, the same in both conventions."""
        return self.published / self.entropy_bits if self.entropy_bits else 0.0

    @property
    def share(self) -> float:
        """The name of `fraction` in 0.1.0."""
        return self.fraction


def memorized_bits(bits: Floats, sequences: Sequences | ArrayLike) -> Memorized:
    """Memorized bits of a data set: coded entropy - Σ bits / copies.

    A sequence that the data set repeats counts once, in the entropy and in the sum. For uniform
    tokens the result is N · (S - 1) · log2 V - Σ bits.

    Args:
        bits: (N,) code length of each sequence without its first token, from `sequence_bits`.
        sequences: the data set that was scored.

    Returns:
        Bits, below 0 if the model codes worse than chance, nan if the entropy is unknown.

    Raises:
        ValueError: bits is not one finite number for each sequence, or a sequence is one token.

    Example:
        >>> import fastmem
        >>> sequences = fastmem.UniformSequences(count=2, length=4, vocab=16)
        >>> memorized_bits(np.array([0.0, 6.0]), sequences)
        Memorized(strict=18.0, published=24.0, entropy_bits=32.0)
        >>> twice = fastmem.repeated(sequences, fraction=1, times=2)  # two sequences, four rows
        >>> memorized_bits(np.array([6.0, 6.0, 6.0, 6.0]), twice).strict
        12.0

    Source: arXiv 2505.24832, section 3 and equation 2; a lower bound, by its proposition 1.
    """
    sequences = as_sequences("sequences must be a set of sequences", sequences)
    try:
        bits = np.asarray(bits)
    except (TypeError, ValueError, RuntimeError) as error:  # of torch, such as for bfloat16
        raise ValueError(
            f"bits must be an array of floats, not a {type(bits).__name__} ({error}): pass what "
            "sequence_bits returns"
        ) from None
    if bits.shape != (sequences.count,) or bits.dtype.kind != "f":
        raise ValueError(
            f"bits must be one float for each of {sequences.count} sequences, "
            f"not {bits.dtype} of shape {bits.shape}: pass what sequence_bits returns"
        )
    if sequences.length < 2:
        raise ValueError("length is 1: only tokens after the first are coded; use 2 or more")
    if not np.isfinite(bits).all():
        raise ValueError(
            f"bits has {np.count_nonzero(~np.isfinite(bits))} values not finite: train the model "
            "again at a lower rate"
        )
    if bits.min(initial=0) < 0:
        raise ValueError(
            f"bits is {bits.min()} for sequence {bits.argmin()}: pass what sequence_bits returns, "
            "at least 0"
        )
    if sequences._repeats():
        bits = bits / sequences.copies()
    total = float(bits.sum(dtype=np.float64))
    strict = sequences.coded_entropy_bits - total
    return Memorized(strict, published_bits(strict, sequences), sequences.entropy_bits)


def published_bits(strict: float, sequences: Sequences) -> float:
    """Converts strict memorized bits to the published convention: · entropy / coded entropy."""
    coded = sequences.coded_entropy_bits
    return strict * sequences.entropy_bits / coded if coded else strict
