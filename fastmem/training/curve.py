"""The training curve: when a run is scored, on which sequences, and what a sample says of all.

N sequences in the data set, n of them in a sample.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmem.base.stats import Floats, Interval
from fastmem.data.order import permutation
from fastmem.data.sequences import Rows, Sequences, Tokens
from fastmem.memorization.convergence import stage_ends
from fastmem.training.config import TrainConfig

CURVE = sorted({0.5**k for k in range(1, 10)} | {k / 10 for k in range(1, 11)})
"""Fractions of the budget at which a run is scored."""
MIN_SAMPLE = 4096
"""Data sets up to this size are always scored whole: 32 forward passes of the default batch, 18
times, cost as much as 200 steps."""
_ORDER = 2**64 - 2
"""The epoch whose order begins with the sample: no training reaches it."""


@dataclass(frozen=True)
class Point:
    """Memorized bits at one step of a run: of the whole data set, or estimated from a sample."""

    step: int
    seconds: float
    memorized_bits: float
    """Strict convention; nan if the entropy of the data set is unknown."""
    sampled: int | None = None
    """Sequences in the sample; None if the whole data set was scored."""
    low: float | None = None
    """The 95 % interval of an estimate; None if the whole data set was scored."""
    high: float | None = None


def sample_size(config: TrainConfig, count: int) -> int:
    """How many of `count` sequences a score during training takes.

    At most as many as make the scores of the curve take a tenth of the time of the steps, where a
    forward pass costs a third of a step: 18 / 3 · n = trained sequences / 10. So a set is scored
    whole from 60 epochs on. At least MIN_SAMPLE, also where the steps are unknown, as with a budget
    in seconds.
    """
    steps = config.total_steps(count)
    trained = 0 if steps is None else steps * config.step_batch(count)
    return min(count, max(MIN_SAMPLE, 3 * trained // (10 * len(CURVE))))


def sample(config: TrainConfig, count: int) -> NDArray[np.uint64] | None:  # (n,)
    """The indices that scores during training take, in ascending order; None for all sequences.

    They are a pure function of the seed and the size of the set, so all scores of a run take the
    same sequences, before and after a resume, with any number of threads.
    """
    size = sample_size(config, count)
    return None if size == count else np.sort(permutation(config.seed, _ORDER, count, 0, size))


def whole_marks(config: TrainConfig, count: int) -> list[float]:
    """Fractions of the budget at which the whole data set is scored, however large.

    The end; with until="converged" the end of each stage, since the error of a sample can be as
    large as the gain that decides whether the run goes on.
    """
    return stage_ends(config.total_steps(count)) if config.until == "converged" else [1.0]


def score_sizes(config: TrainConfig, count: int, after: float = 0.0) -> list[int]:
    """Sequences of each score that is due after a fraction `after` of the budget."""
    steps = config.total_steps(count)

    def place(mark: float) -> float:  # several marks may fall on one step, which is scored once
        return mark if steps is None else math.ceil(round(mark * steps, 9))

    whole = {place(mark) for mark in whole_marks(config, count)}
    places = {place(mark) for mark in CURVE if mark > after}
    return [count if p in whole else sample_size(config, count) for p in sorted(places)]


def estimated(cost: Floats, sequences: Sequences) -> Interval:  # (n,)
    """Memorized bits of a data set from the bits / copies of n of its sequences, drawn at random.

    Computes coded entropy - N · mean, and 1.96 standard errors of N · mean on both sides.

    Example:
        >>> import fastmem
        >>> sequences = fastmem.UniformSequences(count=100, length=4, vocab=16)  # 1200 bits
        >>> estimated(np.array([5.0, 7.0, 5.0, 7.0]), sequences).estimate
        600.0

    Source: simple random sampling without replacement; Cochran, Sampling Techniques (1977),
    section 2.6.
    """
    N, n = sequences.count, len(cost)
    strict = sequences.coded_entropy_bits - N * float(cost.mean())
    half = 1.96 * N * float(cost.std(ddof=1)) * math.sqrt((1 - n / N) / n)
    return Interval(strict, strict - half, strict + half)


class CountedSubset(Sequences):
    """Some sequences of a data set, or all, which says how many were read.

    Args:
        base: the data set.
        indices: the sequences; None for all.
        on_read: called with the number of sequences read so far, before each read.
    """

    def __init__(
        self,
        base: Sequences,
        indices: NDArray[np.uint64] | None,
        on_read: Callable[[int], None],
    ) -> None:
        self.count = base.count if indices is None else len(indices)
        self.length, self.vocab = base.length, base.vocab
        self._base, self._indices, self._on_read, self._read = base, indices, on_read, 0

    @property
    def context(self) -> int:
        return self._base.context

    def description(self) -> dict[str, Any]:
        return self._base.description()

    @classmethod
    def _described(cls, description: dict[str, Any]) -> Sequences:
        raise ValueError("a part of a data set has no description")

    def _entropy_from(self, position: int) -> float:
        return math.nan if self._indices is not None else self._base._entropy_from(position)

    def _fill(self, out: Tokens, rows: Rows, threads: int) -> None:
        self._base._fill(out, self._places(rows), threads)

    def _on_gpu(self, rows: Rows, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._base._on_gpu(self._places(rows), dtype, device)

    def _places(self, rows: Rows) -> Rows:
        """The rows in the data set."""
        self._on_read(self._read)
        self._read += len(rows)
        if self._indices is None:
            return rows
        span = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        return self._indices[span]
