"""Sequences that stand in a set several times: canaries, and exact duplicates of its own.

N sequences (`count`), S tokens a sequence (`length`), V vocabulary (`vocab`), R of them repeated.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmem import _core
from fastmem.base.arguments import MAX_WORD, array_length, integer, threads_or_all
from fastmem.data.sequences import (
    GENERATOR,
    Rows,
    Sequences,
    Tokens,
    checked_set,
    from_description,
    generated,
    sent,
)
from fastmem.data.uniform import MAX_COUNT

PLACES_EPOCH = 2**64 - 1
"""The epoch whose order says where repeated sequences stand: one that no training reaches."""


@dataclass(frozen=True)
class CanarySequences(Sequences, kind="canaries"):
    """A set with R other sequences, the canaries, that each stand at `times` places in it.

    Of the N = base.count + R · times rows, row i has rank P(i), where P is
    `permutation(seed, 2**64 - 1, N)`. Rank q below R · times is canary q mod R, any other is
    sequence q - R · times of the base. So the places are known (`places`), spread evenly, and
    never stored. They are no information that a model must hold: the entropy is that of the base
    plus that of the canaries, each counted once.

    Args:
        base: any set without a prefix.
        canaries: another of the same length, of a vocabulary that the base's contains, and apart
            from it: of another seed, or of numbers that the base does not use.
        times: how often each canary stands in the set, from 1. Nest sets for several frequencies.
        seed: of the places, from 0 to 2**64 - 1.

    Raises:
        ValueError: sets that do not fit, or share sequences; numbers outside these limits.

    >>> from fastmem import UniformSequences
    >>> base = UniformSequences(count=6, length=4, vocab=16)
    >>> sequences = CanarySequences(base, canaries=base.held_out(2), times=3)
    >>> sequences.places
    array([[1, 4, 9],
           [2, 7, 8]], dtype=uint64)
    >>> sequences[sequences.places[1]]
    array([[13, 12,  1, 12],
           [13, 12,  1, 12],
           [13, 12,  1, 12]], dtype=uint16)
    >>> sequences.copies()
    array([1, 3, 3, 1, 3, 1, 1, 3, 3, 3, 1, 1])
    >>> sequences.entropy_bits  # (6 + 2) · 4 · 4
    128.0

    Source: Carlini et al., "The Secret Sharer", USENIX Security 2019 (canaries).
    """

    base: Sequences
    canaries: Sequences
    times: int
    seed: int = 0
    count: int = field(init=False, repr=False)
    length: int = field(init=False, repr=False)
    vocab: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        base, canaries = self.base, self.canaries
        checked_set("base", base)
        checked_set("canaries", canaries)
        if canaries.length != base.length:
            raise ValueError(
                f"canaries must be as long as the base, got {canaries.length} and {base.length} "
                f"tokens; make them {base.length}"
            )
        if canaries.vocab > base.vocab:
            raise ValueError(
                f"canaries must be of the base's vocabulary of {base.vocab}, got {canaries.vocab}; "
                "make it smaller"
            )
        if base.context > 1 or canaries.context > 1:
            raise ValueError(
                f"base and canaries must have no prefix, got {base.context} and {canaries.context} "
                "tokens; prefix the set with canaries: PrefixedSequences(CanarySequences(…), …)"
            )
        if _overlap(base, canaries):
            raise ValueError(
                "canaries must not be of the sequences that the base is made of; give them another "
                "seed, or take base.held_out(n)"
            )
        times = integer("times", self.times, 1, MAX_WORD)
        self._set(times=times, seed=integer("seed", self.seed, 0, MAX_WORD))
        count = _checked_count(base.count + canaries.count * times)
        self._set(count=count, length=base.length, vocab=base.vocab)

    @property
    def places(self) -> NDArray[np.uint64]:  # (R, times)
        """Where each canary stands, ascending: sequences[places[j]] are all canaries[j].

        Those of a repeated set that is the base count in the base, not in this set.
        """
        return _places(self, self.canaries.count)

    def held_out(self, count: int) -> Sequences:
        """Held-out sequences of the base, without canaries; more of those: canaries.held_out."""
        held_out = self.base.held_out(count)
        if _overlap(held_out, self.canaries):
            raise ValueError(
                "the sequences that follow the base are the canaries; give these another seed"
            )
        return held_out

    def description(self) -> dict[str, Any]:
        sets = {"base": self.base.description(), "canaries": self.canaries.description()}
        own = {"times": self.times, "seed": self.seed}
        return {"kind": self.kind, "generator": GENERATOR, **sets, **own}

    @classmethod
    def _described(cls, description: dict[str, Any]) -> "CanarySequences":
        fields = generated(cls.kind, description, ("base", "canaries", "times", "seed"))
        base, canaries = (from_description(fields.pop(name)) for name in ("base", "canaries"))
        return cls(base, canaries, **fields)

    def _fill(self, out: Tokens, rows: Rows, threads: int) -> None:
        # The base is written everywhere and then the canaries, of which there are few, over it.
        canary, canaries, others = self._split(rows, threads)
        self.base._fill(out, others, threads)
        if len(canary):
            out[canary] = self.canaries.tokens(canaries, out.dtype, threads)

    def _on_gpu(self, rows: Rows, dtype: torch.dtype, device: torch.device) -> Tensor:
        canary, canaries, others = self._split(rows, threads_or_all(None))
        out = self.base._on_gpu(others, dtype, device)
        if len(canary):
            # torch has no indexed assignment for unsigned dtypes: the bits are the same.
            signed = {torch.uint16: torch.int16, torch.uint32: torch.int32}.get(dtype, dtype)
            tokens = self.canaries._on_gpu(canaries, dtype, device).view(signed)
            out.view(signed)[sent(canary, device)] = tokens
        return out

    def _copies(self, rows: Rows) -> NDArray[np.int64]:
        canary, canaries, others = self._split(rows, threads_or_all(None))
        copies = self.base._copies(others)
        copies[canary] = self.times * self.canaries._copies(canaries)
        return copies

    def _split(
        self, rows: Rows, threads: int
    ) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.uint64]]:
        """Which of the rows are canaries, which canaries they are, and for all rows the number in
        the base, where a canary has any."""
        ranks = _order(self, rows, threads)
        first = np.uint64(self.canaries.count * self.times)
        canary = np.flatnonzero(ranks < first)
        canaries = ranks[canary] % np.uint64(self.canaries.count)
        ranks[canary] = first
        return canary, canaries, ranks - first

    def _repeats(self) -> bool:
        return True

    def _entropy_from(self, position: int) -> float:
        return self.base._entropy_from(position) + self.canaries._entropy_from(position)

    def _alike(self, count: int, length: int, seed: int) -> Sequences:
        return self.base._alike(count, length, seed)

    def _streams(self) -> list[tuple[int, int, int]]:
        return [*self.base._streams(), *self.canaries._streams()]


@dataclass(frozen=True)
class RepeatedSequences(Sequences, kind="repeated"):
    """A set whose first R sequences stand in it `times` times, the others once: exact duplicates.

    Made by `repeated`. Of the N = R · (times - 1) + base.count rows, row i has rank P(i), where P
    is `permutation(seed, 2**64 - 1, N)`. Rank q below R · (times - 1) is sequence q mod R of the
    base, any other is sequence q - R · (times - 1). The entropy is that of the base: a repetition
    adds none.

    Args:
        base: any set that repeats none of its sequences.
        first: R, from 1 to base.count.
        times: how often each of them stands in the set, from 2.
        seed: of the places, from 0 to 2**64 - 1.

    Raises:
        ValueError: a base that is no such set; numbers outside these limits.
    """

    base: Sequences
    first: int
    times: int
    seed: int = 0
    count: int = field(init=False, repr=False)
    length: int = field(init=False, repr=False)
    vocab: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        checked_set("base", self.base)
        if self.base._repeats():
            raise ValueError(
                f"base must not repeat sequences itself, got {type(self.base).__name__}; repeat "
                "first and add canaries to that: CanarySequences(repeated(…), …)"
            )
        count = self.base.count
        first = integer("first", self.first, 1, count)
        times = integer("times", self.times, 2, MAX_WORD)
        self._set(first=first, times=times, seed=integer("seed", self.seed, 0, MAX_WORD))
        count = _checked_count(count + first * (times - 1))
        self._set(count=count, length=self.base.length, vocab=self.base.vocab)

    @property
    def context(self) -> int:
        """That of the base."""
        return self.base.context

    @property
    def places(self) -> NDArray[np.uint64]:  # (R, times)
        """Where each repeated sequence stands, ascending: sequences[places[j]] are all base[j].

        In this set; one that inserts canaries into it moves them.
        """
        return _places(self, self.first)

    def held_out(self, count: int) -> Sequences:
        """Held-out sequences of the base."""
        return self.base.held_out(count)

    def description(self) -> dict[str, Any]:
        own = {"first": self.first, "times": self.times, "seed": self.seed}
        base = self.base.description()
        return {"kind": self.kind, "generator": GENERATOR, "base": base, **own}

    @classmethod
    def _described(cls, description: dict[str, Any]) -> "RepeatedSequences":
        fields = generated(cls.kind, description, ("base", "first", "times", "seed"))
        return cls(from_description(fields.pop("base")), **fields)

    def _fill(self, out: Tokens, rows: Rows, threads: int) -> None:
        self.base._fill(out, self._numbers(rows, threads), threads)

    def _on_gpu(self, rows: Rows, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.base._on_gpu(self._numbers(rows, threads_or_all(None)), dtype, device)

    def _copies(self, rows: Rows) -> NDArray[np.int64]:
        numbers = self._numbers(rows, threads_or_all(None))
        return np.where(numbers < np.uint64(self.first), self.times, 1)

    def _numbers(self, rows: Rows, threads: int) -> NDArray[np.uint64]:
        """Which sequence of the base each row is."""
        ranks = _order(self, rows, threads)
        extra = np.uint64(self.count - self.base.count)
        return np.where(ranks < extra, ranks % np.uint64(self.first), ranks - extra)

    def _repeats(self) -> bool:
        return True

    def _entropy_from(self, position: int) -> float:
        return self.base._entropy_from(position)

    def _alike(self, count: int, length: int, seed: int) -> Sequences:
        return self.base._alike(count, length, seed)

    def _streams(self) -> list[tuple[int, int, int]]:
        return self.base._streams()


def repeated(base: Sequences, share: float, times: int, seed: int = 0) -> RepeatedSequences:
    """The set with a share of its sequences standing in it `times` times: exact duplicates.

    Args:
        base: any set that repeats none of its N sequences.
        share: of the N, above 0 and at most 1: the first round(share · N), halves up, at least one.
        times: from 2.
        seed: of the places, from 0 to 2**64 - 1.

    Returns:
        A set of N + round(share · N) · (times - 1) rows in random order, with the entropy of base.

    Raises:
        ValueError: a base that is no such set; numbers outside these limits.

    >>> from fastmem import UniformSequences
    >>> base = UniformSequences(count=6, length=4, vocab=16)
    >>> sequences = repeated(base, share=1 / 3, times=3)
    >>> sequences.copies(), sequences.entropy_bits == base.entropy_bits
    (array([1, 3, 3, 1, 3, 1, 1, 3, 3, 3]), True)
    >>> bool((sequences[sequences.places[1]] == base[1]).all())
    True

    Source: Lee et al., "Deduplicating Training Data Makes Language Models Better", ACL 2022;
    Kandpal et al., "Deduplicating Training Data Mitigates Privacy Risks in Language Models",
    ICML 2022.
    """
    checked_set("base", base)
    is_number = isinstance(share, (int, float, np.number)) and not isinstance(share, bool)
    if not is_number or not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share!r}; 0.1 is a tenth")
    first = math.floor(Fraction(float(share)) * base.count + Fraction(1, 2))
    if first == 0:
        raise ValueError(
            f"share must be at least half of 1 / {base.count}, got {share}: it is no sequence; "
            "use a larger share or base"
        )
    return RepeatedSequences(base, first, times, seed)


def _places(sequences: CanarySequences | RepeatedSequences, R: int) -> NDArray[np.uint64]:
    ranks = np.arange(array_length(range(R * sequences.times)), dtype=np.uint64)
    places = _order(sequences, ranks, threads_or_all(None), inverse=True)
    return np.sort(places.reshape(sequences.times, R).T, axis=1)


def _order(
    sequences: CanarySequences | RepeatedSequences, rows: Rows, threads: int, inverse: bool = False
) -> NDArray[np.uint64]:
    """The ranks of rows, or the rows of ranks."""
    out = np.empty(len(rows), np.uint64)
    order: dict[str, Any] = {"seed": sequences.seed, "epoch": PLACES_EPOCH}
    order["last"] = sequences.count - 1
    if isinstance(rows, range):
        _core.permutation(out, begin=rows.start, threads=threads, **order)
    else:
        _core.permutation_at(out, rows, threads=threads, inverse=inverse, **order)
    return out


def _overlap(a: Sequences, b: Sequences) -> bool:
    return any(
        seed == other and begin < stop and start < end
        for seed, begin, end in a._streams()
        for other, start, stop in b._streams()
    )


def _checked_count(count: int) -> int:
    if count > MAX_COUNT:
        raise ValueError(
            f"the set must have at most 2**64 sequences, got {count}; repeat fewer, or less often"
        )
    return count
