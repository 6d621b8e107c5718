"""Sets with repeated sequences: inserted canaries, and exact duplicates.

N sequences (`count`), S tokens a sequence (`length`), V vocabulary (`vocab`), R repeated sequences.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmem import _core
from fastmem.base.arguments import MAX_WORD, array_length, integer, threads_or_all
from fastmem.data.derived import DerivedSequences
from fastmem.data.sequences import Rows, Sequences, Tokens, checked_set, sent
from fastmem.data.uniform import MAX_COUNT

PLACES_EPOCH = 2**64 - 1
"""The epoch whose order gives the places of repeated sequences; no training reaches this epoch."""


@dataclass(frozen=True)
class CanarySequences(DerivedSequences, kind="canaries"):
    """A set into which R other sequences, the canaries, are inserted at `times` places each.

    Of the N = base.count + R · times rows, row i has rank P(i), where P is
    `permutation(seed, 2**64 - 1, N)`. A rank q below R · times is canary q mod R, any other rank is
    sequence q - R · times of the base. So the places are known (`places`), spread evenly, and
    never stored. A model need not memorize the places: the entropy of the set is the entropy of
    the base plus the entropy of the canaries, each canary counted once.

    Args:
        base: any set without a prefix.
        canaries: another set of the same length, with a vocabulary inside the base's vocabulary,
            and with no sequence of the base: with another seed, or with other sequence numbers.
        times: places of each canary, from 1. For several frequencies use a set with canaries as
            the base of another.
        seed: of the places, from 0 to 2**64 - 1.

    Raises:
        ValueError: the sets do not fit or have common sequences; a number is outside its limits.

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

    canaries: Sequences
    times: int
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        base, canaries = self.base, self.canaries
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
        if overlap(base, canaries):
            raise ValueError(
                "canaries must not be sequences of the base; give them another seed, or take "
                "base.held_out(n)"
            )
        times = integer("times", self.times, 1, MAX_WORD)
        self._set(times=times, seed=integer("seed", self.seed, 0, MAX_WORD))
        self._set(count=_checked_count(base.count + canaries.count * times))

    @property
    def places(self) -> NDArray[np.uint64]:  # (R, times)
        """The places of each canary, ascending: sequences[places[j]] are copies of canaries[j].

        If the base has repeated sequences, its own `places` count in the base, not in this set.
        """
        return _places(self, self.canaries.count)

    def held_out(self, count: int) -> Sequences:
        """Held-out sequences of the base, without canaries; for more canaries: canaries.held_out.

        Raises:
            ValueError: the canaries are the sequences after the base.
        """
        held_out = self.base.held_out(count)
        if overlap(held_out, self.canaries):
            raise ValueError("the sequences after the base are the canaries; give another seed")
        return held_out

    def _fill(self, out: Tokens, rows: Rows, threads: int) -> None:
        # First base sequences in every row, then canaries, which are few, over their rows.
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
        """Which rows are canaries, the number of each such canary, and the base sequence of every
        row (0 for a canary)."""
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

    def _streams(self) -> list[tuple[int, int, int]]:
        return [*self.base._streams(), *self.canaries._streams()]


@dataclass(frozen=True)
class RepeatedSequences(DerivedSequences, kind="repeated"):
    """A set that has its first R sequences `times` times, and the rest once: exact duplicates.

    Made by `repeated`. Of the N = R · (times - 1) + base.count rows, row i has rank P(i), where P
    is `permutation(seed, 2**64 - 1, N)`. A rank q below R · (times - 1) is sequence q mod R of the
    base, any other rank is sequence q - R · (times - 1). The entropy is the entropy of the base:
    repetitions add nothing.

    Args:
        base: any set without repeated sequences.
        first: R, from 1 to base.count.
        times: copies of each repeated sequence, from 2.
        seed: of the places, from 0 to 2**64 - 1.

    Raises:
        ValueError: the base has repeated sequences; a number is outside its limits.
    """

    first: int
    times: int
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base._repeats():
            raise ValueError(
                f"base must not repeat sequences itself, got {type(self.base).__name__}; repeat "
                "first and add canaries to that: CanarySequences(repeated(…), …)"
            )
        count = self.base.count
        first = integer("first", self.first, 1, count)
        times = integer("times", self.times, 2, MAX_WORD)
        self._set(first=first, times=times, seed=integer("seed", self.seed, 0, MAX_WORD))
        self._set(count=_checked_count(count + first * (times - 1)))

    @property
    def places(self) -> NDArray[np.uint64]:  # (R, times)
        """The places of each repeated sequence, ascending: sequences[places[j]] are all base[j].

        Canaries that another set inserts into this set move these places.
        """
        return _places(self, self.first)

    def _fill(self, out: Tokens, rows: Rows, threads: int) -> None:
        self.base._fill(out, self._numbers(rows, threads), threads)

    def _on_gpu(self, rows: Rows, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.base._on_gpu(self._numbers(rows, threads_or_all(None)), dtype, device)

    def _copies(self, rows: Rows) -> NDArray[np.int64]:
        numbers = self._numbers(rows, threads_or_all(None))
        return np.where(numbers < np.uint64(self.first), self.times, 1)

    def _numbers(self, rows: Rows, threads: int) -> NDArray[np.uint64]:
        """The base sequence of each row."""
        ranks = _order(self, rows, threads)
        extra = np.uint64(self.count - self.base.count)
        return np.where(ranks < extra, ranks % np.uint64(self.first), ranks - extra)

    def _repeats(self) -> bool:
        return True


def repeated(
    base: Sequences,
    fraction: float | None = None,
    times: int | None = None,
    seed: int = 0,
    *,
    share: float | None = None,
) -> RepeatedSequences:
    """The set with a fraction of its sequences `times` times: exact duplicates.

    Args:
        base: any set without repeated sequences, of N sequences.
        fraction: of the N, above 0 and at most 1: the first round(fraction · N), halves up, at
            least one.
        times: copies of each repeated sequence, from 2.
        seed: of the places, from 0 to 2**64 - 1.
        share: the name of `fraction` in version 0.1.0.

    Returns:
        A set of N + round(fraction · N) · (times - 1) rows in random order, with the entropy of
        the base.

    Raises:
        ValueError: the base has repeated sequences; a number is missing or outside its limits.

    >>> from fastmem import UniformSequences
    >>> base = UniformSequences(count=6, length=4, vocab=16)
    >>> sequences = repeated(base, fraction=1 / 3, times=3)
    >>> sequences.copies(), sequences.entropy_bits == base.entropy_bits
    (array([1, 3, 3, 1, 3, 1, 1, 3, 3, 3]), True)
    >>> bool((sequences[sequences.places[1]] == base[1]).all())
    True

    Source: Lee et al., "Deduplicating Training Data Makes Language Models Better", ACL 2022;
    Kandpal et al., "Deduplicating Training Data Mitigates Privacy Risks in Language Models",
    ICML 2022.
    """
    checked_set("base", base)
    if (fraction is None) == (share is None):
        raise ValueError(
            f"fraction must be given, or its old name share, and not both, got {fraction!r} and "
            f"{share!r}; pass fraction=0.1 for a tenth"
        )
    given: Any = share if fraction is None else fraction
    is_number = isinstance(given, (int, float, np.number)) and not isinstance(given, bool)
    if not is_number or not 0 < given <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {given!r}; 0.1 is a tenth")
    first = math.floor(Fraction(float(given)) * base.count + Fraction(1, 2))
    if first == 0:
        raise ValueError(
            f"fraction must be at least half of 1 / {base.count}, got {given}, which is not one "
            "sequence; use a larger fraction or base"
        )
    return RepeatedSequences(base, first, integer("times", times, 2, MAX_WORD), seed)


def _places(sequences: CanarySequences | RepeatedSequences, R: int) -> NDArray[np.uint64]:
    ranks = np.arange(array_length(range(R * sequences.times)), dtype=np.uint64)
    places = _order(sequences, ranks, threads_or_all(None), inverse=True)
    return np.sort(places.reshape(sequences.times, R).T, axis=1)


def _order(
    sequences: CanarySequences | RepeatedSequences, rows: Rows, threads: int, inverse: bool = False
) -> NDArray[np.uint64]:
    """The ranks of rows, or with `inverse` the rows of ranks."""
    out = np.empty(len(rows), np.uint64)
    order: dict[str, Any] = {"seed": sequences.seed, "epoch": PLACES_EPOCH}
    order["last"] = sequences.count - 1
    if isinstance(rows, range):
        _core.permutation(out, begin=rows.start, threads=threads, **order)
    else:
        _core.permutation_at(out, rows, threads=threads, inverse=inverse, **order)
    return out


def overlap(a: Sequences, b: Sequences) -> bool:
    """True if two sets have random sequences in common."""
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
