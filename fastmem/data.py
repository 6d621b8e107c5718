"""Training and held-out data whose entropy is known exactly.

A sequence is a pure function of (seed, index), so a data set is a range of indices: nothing is
stored, any part is made in any order on any thread, and held-out data is the range that follows.
An order to visit a data set in is a pure function of (seed, epoch, place) in the same way.

N sequences (`count`), S tokens a sequence (`length`), V vocabulary (`vocab`).
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastmem import _core

GENERATOR = "philox4x32-10/1"
"""The rule that tokens and orders are made by, and its version: written into every manifest."""

_MAX_COUNT = 2**64
_MAX_LENGTH = 2**34
_MAX_VOCAB = 2**31
_MAX_WORD = 2**64 - 1

Indices = int | np.integer[Any] | slice | Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class UniformSequences:
    """N sequences of S tokens, each token uniform over V and independent of all the others.

    Sequence i of the set is number `start + i` of the 2**64 that `seed` names. Nothing is stored:
    indexing computes tokens from Philox4x32-10, token t of a sequence from bits that depend on
    (seed, start + i, t) alone, brought to [0, V) without bias.

        sequences[3]                 (S,)    uint16, or uint32 if V > 65536
        sequences[-1]                (S,)    the last, as in a list
        sequences[0:8]               (8, S)  any slice, with a step or none
        sequences[np.array([5, 2])]  (2, S)  any integer dtype, order or repetition; none negative

    Args:
        count: N, from 1 to 2**64.
        length: S, from 1 to 2**34. A set of length 1 has no coded token: no model can be scored.
        vocab: V, from 1 to 2**31.
        seed: from 0 to 2**64 - 1.
        start: index of the first sequence, from 0; start + count is at most 2**64.

    Raises:
        ValueError: an argument that is no int, or outside these limits.

    Two sets are equal if all five numbers are.

    >>> sequences = UniformSequences(count=4096, length=8, vocab=2048, seed=0)
    >>> sequences[0:2]
    array([[ 213, 1575, 1421,  361, 1100, 1111,  984,  768],
           [1505, 1093, 1706,  141,   83, 1817, 1520, 1016]], dtype=uint16)
    >>> sequences.sequence_entropy_bits
    88.0
    >>> sequences.held_out(1024)
    UniformSequences(count=1024, length=8, vocab=2048, seed=0, start=4096)

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (Philox); Lemire,
    "Fast Random Integer Generation in an Interval", TOMACS 29(1), 2019 (no bias). The rule to the
    bit is in csrc/sequences.h.
    """

    count: int
    length: int
    vocab: int
    seed: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("count", 1, _MAX_COUNT),
            ("length", 1, _MAX_LENGTH),
            ("vocab", 1, _MAX_VOCAB),
            ("seed", 0, _MAX_WORD),
            ("start", 0, _MAX_WORD),
        ):
            # Frozen: a plain int, even where a NumPy one was given, so that sums cannot wrap.
            object.__setattr__(self, name, _integer(name, getattr(self, name), low, high))
        if self.start + self.count > _MAX_COUNT:
            raise ValueError(
                f"start + count must be at most 2**64, got {self.start} + {self.count}; "
                f"from this start, at most {_MAX_COUNT - self.start} sequences are left"
            )

    def __len__(self) -> int:
        """N. Python itself refuses a length over sys.maxsize (OverflowError): use `count`."""
        return self.count

    def __iter__(self) -> Iterator[NDArray[np.integer[Any]]]:
        """The sequences in order, (S,) each; slices are much faster."""
        return (self[index] for index in range(self.count))

    def __getitem__(self, indices: Indices) -> NDArray[np.integer[Any]]:
        """The tokens of one sequence (S,) or several (n, S): `tokens` with its defaults."""
        return self.tokens(indices)

    def tokens(
        self,
        indices: Indices,
        dtype: DTypeLike | None = None,
        threads: int | None = None,
    ) -> NDArray[np.integer[Any]]:
        """What `sequences[indices]` gives, made directly in the dtype that a model takes.

        Args:
            indices: an int, a slice, or a 1-D list or array of ints, relative to the set.
            dtype: uint16 (V at most 65536), uint32, int32 or int64; None: uint16 if it holds V,
                else uint32.
            threads: the most that may be used, None: one a core. The tokens do not depend on it,
                and small work uses one.

        Returns:
            (S,) for an int, else (n, S).

        Raises:
            IndexError: an index outside the set; in an array also one below 0.
            ValueError: indices that are no ints, or not 1-D; another dtype; threads below 1.

        >>> UniformSequences(count=10, length=4, vocab=50257).tokens([9, 0], np.int64)
        array([[45713, 33019,  8311, 46069],
               [20054, 44252, 36974, 30429]])
        """
        token_dtype = self._token_dtype(dtype)
        limit = _threads(threads)
        if isinstance(indices, slice):
            return self._range_tokens(range(*indices.indices(self.count)), token_dtype, limit)
        if isinstance(indices, (int, np.integer)) and not isinstance(indices, bool):
            index = int(indices)
            if not -self.count <= index < self.count:
                raise IndexError(
                    f"index {index} is outside this set of {self.count} sequences; "
                    f"use {-self.count} to {self.count - 1}"
                )
            index %= self.count
            return self._range_tokens(range(index, index + 1), token_dtype, limit).reshape(-1)
        return self._list_tokens(self._index_array(indices), token_dtype, limit)

    @property
    def sequence_entropy_bits(self) -> float:
        """S · log2 V: the entropy of one sequence."""
        return self.length * math.log2(self.vocab)

    @property
    def entropy_bits(self) -> float:
        """N · S · log2 V: the entropy of the set."""
        return self.count * self.sequence_entropy_bits

    @property
    def coded_entropy_bits(self) -> float:
        """N · (S - 1) · log2 V: that of the tokens which a model codes, all but each first one."""
        return self.count * ((self.length - 1) * math.log2(self.vocab))

    def held_out(self, count: int) -> "UniformSequences":
        """The `count` sequences that follow this set: same rule and seed, and none in common.

        Raises:
            ValueError: `count` is no int, is below 1, or passes index 2**64.

        >>> UniformSequences(count=100, length=64, vocab=2048).held_out(50).start
        100
        """
        left = _MAX_COUNT - self.start - self.count
        if left == 0:
            raise ValueError(
                f"no sequences are left to hold out, got start + count = {self.start} + "
                f"{self.count} = 2**64; make the set smaller or start it lower"
            )
        count = _integer("count", count, 1, left)
        return replace(self, count=count, start=self.start + self.count)

    def _token_dtype(self, dtype: DTypeLike | None) -> np.dtype[np.integer[Any]]:
        if dtype is None:
            return np.dtype(np.uint16 if self.vocab <= 65536 else np.uint32)
        for allowed in (np.uint16, np.uint32, np.int32, np.int64):
            if np.dtype(dtype) == allowed:
                break
        else:
            raise ValueError(f"dtype must be uint16, uint32, int32 or int64, got {dtype!r}")
        if allowed is np.uint16 and self.vocab > 65536:
            raise ValueError(
                f"dtype uint16 holds a vocab of at most 65536, got {self.vocab}; use uint32"
            )
        return np.dtype(allowed)

    def _index_array(self, indices: object) -> NDArray[np.uint64]:
        # NumPy makes an empty list float64.
        empty_list = isinstance(indices, Sequence) and len(indices) == 0
        array = np.asarray(indices, dtype=np.uint64 if empty_list else None)
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise ValueError(
                "indices must be an int, a slice, or a 1-D list or array of ints, got shape "
                f"{array.shape} of {array.dtype}; use np.flatnonzero(mask) for a mask, "
                "indices.ravel() for more dimensions, indices.astype(np.int64) for whole floats"
            )
        if array.size and not (array.min() >= 0 and array.max() < self.count):
            raise IndexError(
                f"indices {array.min()} to {array.max()} are outside this set of {self.count} "
                f"sequences; in an array, use 0 to {self.count - 1}"
            )
        return array.astype(np.uint64) + np.uint64(self.start)

    def _range_tokens(
        self, indices: range, dtype: np.dtype[np.integer[Any]], threads: int
    ) -> NDArray[np.integer[Any]]:
        n = _length(indices)
        first = self.start + indices.start
        if indices.step != 1 and n > 1:
            # Modulo 2**64, where a step down is a large step up.
            steps = np.arange(n, dtype=np.uint64) * np.uint64(indices.step % 2**64)
            return self._list_tokens(steps + np.uint64(first), dtype, threads)
        out = np.empty((n, self.length), dtype)
        if n:  # an empty slice at the very end would begin at 2**64
            _core.fill_range(out, seed=self.seed, vocab=self.vocab, begin=first, threads=threads)
        return out

    def _list_tokens(
        self, indices: NDArray[np.uint64], dtype: np.dtype[np.integer[Any]], threads: int
    ) -> NDArray[np.integer[Any]]:
        out = np.empty((indices.size, self.length), dtype)
        _core.fill_indices(out, indices, seed=self.seed, vocab=self.vocab, threads=threads)
        return out


def permutation(
    seed: int,
    epoch: int,
    count: int,
    begin: int = 0,
    end: int | None = None,
    threads: int | None = None,
) -> NDArray[np.uint64]:
    """Places [begin, end) of the random order in which `epoch` visits 0, ..., count - 1.

    Each number appears once in an order. Any part is computed without the rest, with no memory but
    the result, so that a run resumes at any step and `count` can exceed memory.

    Args:
        seed: from 0 to 2**64 - 1.
        epoch: from 0 to 2**64 - 1. Each has an order of its own.
        count: from 1 to 2**64.
        begin: first place, from 0 to count.
        end: one past the last place, from begin to count; None: count.
        threads: the most that may be used, None: one a core. The order does not depend on it.

    Returns:
        (end - begin,) uint64.

    Raises:
        ValueError: an argument that is no int, or outside these limits.

    Orders are random in (seed, epoch). Those of two counts at the same (seed, epoch) resemble each
    other: use another seed where they must not.

    >>> permutation(seed=0, epoch=0, count=8)
    array([5, 3, 7, 4, 2, 6, 0, 1], dtype=uint64)
    >>> permutation(seed=0, epoch=0, count=8, begin=5)
    array([6, 0, 1], dtype=uint64)
    >>> permutation(seed=0, epoch=1, count=10**18, begin=10**17, end=10**17 + 2)
    array([230262204823291296, 987748370052112252], dtype=uint64)

    Source: Black, Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (a Feistel network
    and cycle walking). The order to the bit is in csrc/sequences.h.
    """
    seed = _integer("seed", seed, 0, _MAX_WORD)
    epoch = _integer("epoch", epoch, 0, _MAX_WORD)
    count = _integer("count", count, 1, _MAX_COUNT)
    begin = _integer("begin", begin, 0, count)
    end = _integer("end", count if end is None else end, begin, count)
    limit = _threads(threads)
    out = np.empty(_length(range(begin, end)), np.uint64)
    if out.size:  # an empty part at the very end would begin at 2**64
        _core.permutation(out, seed=seed, epoch=epoch, last=count - 1, begin=begin, threads=limit)
    return out


def batch_indices(seed: int, step: int, batch: int, count: int) -> NDArray[np.uint64]:
    """The sequences that training step `step` takes: the next `batch` in the order of all epochs.

    Epochs follow each other without a gap, each in its own `permutation(seed, epoch, count)`, so a
    batch may end one epoch and begin the next, and a step depends on no step before it.

    Args:
        seed: from 0 to 2**64 - 1.
        step: from 0 to 2**64 - 1.
        batch: from 1 to count.
        count: N, from 1 to 2**64.

    Returns:
        (batch,) uint64, relative to the set.

    Raises:
        ValueError: an argument that is no int, or outside these limits.

    >>> batch_indices(seed=0, step=0, batch=4, count=6)
    array([5, 3, 1, 4], dtype=uint64)
    >>> batch_indices(seed=0, step=1, batch=4, count=6)
    array([2, 0, 5, 3], dtype=uint64)
    """
    count = _integer("count", count, 1, _MAX_COUNT)
    batch = _integer("batch", batch, 1, count)
    epoch, begin = divmod(_integer("step", step, 0, _MAX_WORD) * batch, count)
    end = min(begin + batch, count)
    indices = permutation(seed, epoch, count, begin, end)
    if end - begin == batch:
        return indices
    rest = permutation(seed, epoch + 1, count, 0, batch - (end - begin))
    return np.concatenate([indices, rest])


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(
            f"{name} must be an integer from {low} to {high}, got {value!r} "
            f"({type(value).__name__}); pass an int"
        )
    number = int(value)
    if not low <= number <= high:
        raise ValueError(
            f"{name} must be from {low} to {high}, got {number}; choose one in these limits"
        )
    return number


def _threads(threads: int | None) -> int:
    if threads is not None:
        return _integer("threads", threads, 1, _MAX_WORD)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _length(places: range) -> int:
    try:
        return len(places)
    except OverflowError:
        raise ValueError(
            f"{places.start} to {places.stop} is more than one array can hold; take smaller parts"
        ) from None
