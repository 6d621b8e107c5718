"""The data set sizes to train next, so that few runs bracket the capacity of a model.

Each decision depends on the finished runs alone, so a stopped sweep resumes with the same decision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite

from fastmem.memorization.capacity import NEARLY_ALL, RISE_PER_DOUBLING, means, rise_per_doubling

BITS_PER_PARAMETER = 3.6
"""The published capacity, which gives the first size."""
START = 0.25
"""Entropy of the first data set, as a fraction of this capacity: nearly any model memorizes it."""
FIRST_FACTOR, FACTOR = 5.0, 2.0
"""Growth of the data set while the last is nearly all memorized: the first time, and later."""
KNEE, NEAR = 1.05, 1.3
"""With a limited budget the most bits are memorized of a data set whose entropy is between KNEE and
NEAR times the capacity: larger data sets have fewer epochs (docs/lab.md)."""
AT = 1.2
"""The size to try between KNEE and NEAR."""
FAR = 2.5
"""The next size above the best is at most this many times larger."""
PLATEAU = 1.5
"""Growth of the data set to see whether the plateau is flat."""
TIE = 0.01
"""A size with all seeds counts as the best if its bits are within this fraction of the best."""
MOST_SIZES = 12
"""Sizes after which the search ends without a bracket, and the verdict says why."""


@dataclass(frozen=True)
class Finished:
    """A finished run: strict memorized bits, and the entropy of the coded tokens."""

    count: int
    seed: int
    memorized: float
    entropy: float


def next_runs(
    finished: Sequence[Finished], parameters: int, sequence_bits: float, seeds: Sequence[int]
) -> list[tuple[int, int]]:
    """The (count, seed) of the runs to train next; empty if the capacity is bracketed.

    With the first seed: a data set of 0.25 · 3.6 · P bits; halved until 95 % are memorized; five
    times and then twice as large until fewer are memorized; one of 1.2 times the largest capacity
    so far; then 1.5 times as large until the last adds at most 5 % per doubling, as
    `why_not_saturated` requires. Then the other seeds of the best size, until a size with all
    seeds is the best, or within 1 % of the best.

    Args:
        finished: all finished runs of one model, of any size and seed, in any order.
        parameters: P.
        sequence_bits: entropy of the coded tokens of one sequence.
        seeds: seeds to train; finished runs of other seeds count too.

    Raises:
        ValueError: no seed, a parameter count or bits not above 0, or a run with an invalid number.

    Example:
        >>> next_runs([], parameters=1000, sequence_bits=100.0, seeds=(0, 1))
        [(9, 0)]
        >>> curve = {9: 900.0, 45: 2500.0, 30: 2600.0}  # memorized bits by size
        >>> done = [Finished(n, 0, bits, 100.0 * n) for n, bits in curve.items()]
        >>> next_runs(done[:1], 1000, 100.0, (0, 1)), next_runs(done[:2], 1000, 100.0, (0, 1))
        ([(45, 0)], [(30, 0)])
        >>> next_runs(done, 1000, 100.0, (0, 1))  # the plateau is flat: seeds for the best
        [(30, 1)]
    """
    if not seeds:
        raise ValueError("a bracket needs at least one seed: give --seeds 0")
    if not (parameters > 0 and 0 < sequence_bits < float("inf")):
        raise ValueError(
            f"parameters and the bits of a sequence must be above 0, not {parameters} and "
            f"{sequence_bits}"
        )
    for run in finished:
        if not (run.count >= 1 and isfinite(run.memorized) and 0 < run.entropy < float("inf")):
            raise ValueError(f"{run} is not a finished run: leave it out")
    if not finished:
        first = START * BITS_PER_PARAMETER * parameters / sequence_bits
        return [(max(1, round(first)), seeds[0])]
    columns = zip(*((run.count, run.memorized, run.entropy) for run in finished), strict=True)
    mean, fraction = means(*columns)
    size = _next_size(mean, fraction, sequence_bits)
    if size is not None:
        return [(size, seeds[0])]
    trained = {(run.count, run.seed) for run in finished}
    missing = {count: [s for s in seeds if (count, s) not in trained] for count in mean}
    best = max(mean, key=lambda count: mean[count])
    if any(mean[count] >= (1 - TIE) * mean[best] for count in mean if not missing[count]):
        return []
    return [(best, seed) for seed in missing[best]]


def _next_size(
    mean: dict[int, float], fraction: dict[int, float], sequence_bits: float
) -> int | None:
    """The next size to train; None if the capacity is bracketed or the search has ended."""
    sizes = sorted(mean)
    low, top = sizes[0], sizes[-1]
    if len(sizes) >= MOST_SIZES:
        return None
    if fraction[low] < NEARLY_ALL and low > 1:
        return low // 2
    if fraction[top] >= NEARLY_ALL:
        return ceil(top * (FIRST_FACTOR if len(sizes) == 1 else FACTOR))
    best = max(sizes, key=lambda count: mean[count])
    if mean[best] <= 0:
        return None
    knee = mean[best] / sequence_bits
    at = ceil(AT * knee)
    if at not in sizes and not any(KNEE * knee <= count <= NEAR * knee for count in sizes):
        return at
    if rise_per_doubling(mean) > RISE_PER_DOUBLING:
        return ceil(PLATEAU * top)
    larger = min((count for count in sizes if count > best), default=best)
    return ceil(PLATEAU * best) if larger > FAR * best else None
