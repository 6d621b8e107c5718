"""Random data sets with an exact entropy.

A random sequence is a pure function of (seed, index), so a data set is a range of indices: nothing
is stored, any part is computed in any order on any thread and device, and held-out data is the
next range. `fastmem.data.structure` and `fastmem.data.repetition` build on these sets.

N sequences (`count`), S tokens a sequence (`length`), V vocabulary (`vocab`).
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmem import _core
from fastmem.base.arguments import MAX_WORD, integer
from fastmem.data.sequences import GENERATOR, Rows, Sequences, Tokens, generated, sent

MAX_COUNT = 2**64
_LIMITS = {
    "count": (1, MAX_COUNT),
    "length": (1, 2**34),
    "vocab": (1, 2**31),
    "seed": (0, MAX_WORD),
    "start": (0, MAX_WORD),
}


@dataclass(frozen=True)
class RandomSequences(Sequences):
    """N sequences of S independent tokens of one distribution, computed from (seed, index).

    Sequence i of the set is sequence `start + i` of the 2**64 sequences of `seed`. Its token t
    depends on (seed, start + i, t) alone, by Philox4x32-10.
    """

    count: int
    length: int
    vocab: int
    seed: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            # A NumPy int becomes a plain int, so that sums cannot wrap.
            self._set(**{name: integer(name, getattr(self, name), low, high)})
        if self.start + self.count > MAX_COUNT:
            raise ValueError(
                f"start + count must be at most 2**64, got {self.start} + {self.count}; "
                f"from this start, at most {MAX_COUNT - self.start} sequences are left"
            )

    @property
    @abstractmethod
    def token_entropy_bits(self) -> float:
        """The entropy of one token."""

    @property
    def sequence_entropy_bits(self) -> float:
        """The entropy of one sequence: S times the entropy of a token."""
        return self.length * self.token_entropy_bits

    def held_out(self, count: int) -> Self:
        """The `count` sequences after this set, with the same rule and seed.

        Raises:
            ValueError: `count` is not an int, is below 1, or goes beyond index 2**64.

        >>> UniformSequences(count=100, length=64, vocab=2048).held_out(50).start
        100
        """
        left = MAX_COUNT - self.start - self.count
        if left == 0:
            raise ValueError(
                f"no sequences are left to hold out, got start + count = {self.start} + "
                f"{self.count} = 2**64; make the set smaller or start it lower"
            )
        count = integer("count", count, 1, left)
        return replace(self, count=count, start=self.start + self.count)

    def description(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in _LIMITS}
        return {"kind": self.kind, "generator": GENERATOR, **values}

    @classmethod
    def _described(cls, description: dict[str, Any]) -> Self:
        return cls(**generated(cls.kind, description, tuple(_LIMITS)))

    def _alike(self, count: int, length: int, seed: int) -> Self:
        return replace(self, count=count, length=length, seed=seed, start=0)

    def _streams(self) -> list[tuple[int, int, int]]:
        return [(self.seed, self.start, self.start + self.count)]

    def _entropy_from(self, position: int) -> float:
        return self.count * (max(0, self.length - position) * self.token_entropy_bits)

    def _rule(self, device: torch.device | None = None) -> dict[str, Any]:
        """The arguments of a generator beside the indices; arrays on the device."""
        return {"seed": self.seed, "vocab": self.vocab}

    def _fill(self, out: Tokens, rows: Rows, threads: int) -> None:
        if isinstance(rows, range):
            _core.fill_range(out, begin=self.start + rows.start, threads=threads, **self._rule())
        else:
            _core.fill_indices(out, self._numbers(rows), threads=threads, **self._rule())

    def _on_gpu(self, rows: Rows, dtype: torch.dtype, device: torch.device) -> Tensor:
        from fastmem.kernels import sequences  # needs Triton, which not every machine has

        out = torch.empty((len(rows), self.length), dtype=dtype, device=device)
        if isinstance(rows, range):
            sequences.fill(out, begin=self.start + rows.start, **self._rule(device))
        else:
            indices = sent(self._numbers(rows).view(np.int64), device)
            sequences.fill(out, indices=indices, **self._rule(device))
        return out

    def _numbers(self, rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return rows + np.uint64(self.start)


class UniformSequences(RandomSequences, kind="uniform"):
    """N sequences of S independent tokens, each uniform over V.

    The entropy is N · S · log2 V bits, of which N · (S - 1) · log2 V are coded. Sequence i of the
    set is sequence `start + i` of the 2**64 sequences of `seed`, for any size of the set. For
    indexing see `Sequences`.

    Args:
        count: N, from 1 to 2**64.
        length: S, from 1 to 2**34. Length 1 leaves no token to code, so nothing to score.
        vocab: V, from 1 to 2**31.
        seed: from 0 to 2**64 - 1.
        start: index of the first sequence, from 0; start + count is at most 2**64.

    Raises:
        ValueError: an argument is not an int, or is outside these limits.

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
    "Fast Random Integer Generation in an Interval", TOMACS 29(1), 2019 (no bias). csrc/sequences/
    sequences.h specifies the rule to the bit.
    """

    @property
    def token_entropy_bits(self) -> float:
        """log2 V."""
        return math.log2(self.vocab)
