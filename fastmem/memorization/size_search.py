"""Which data set sizes to train next, so that a model's capacity is found in few runs.

A decision is a function of the finished runs alone, so a sweep that is stopped goes on with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite, log2

from fastmem.memorization.capacity import NEARLY_ALL, RISE_PER_DOUBLING

BITS_PER_PARAMETER = 3.6
"""The published capacity, from which the first size is chosen."""
START = 0.25
"""The first set has this share of that capacity as its entropy: nearly any model memorizes it."""
FIRST_FACTOR, FACTOR = 5.0, 2.0
"""How much larger the next set is while all of the last is memorized."""
KNEE, NEAR = 1.05, 1.3
"""With a limited budget most bits are memorized of sets whose entropy is between so many times the
capacity: larger ones have fewer epochs (docs/lab.md)."""
AT = 1.2
"""Where between them."""
FAR = 2.5
"""A best size has another that is less than so many times larger."""
PLATEAU = 1.5
"""How much larger the set is that shows whether the plateau is flat."""
TIE = 0.01
"""A size that has all seeds stands for one that holds this share more."""
MOST_SIZES = 12
"""After so many sizes there is no bracket to be found, and the verdict says why."""


@dataclass(frozen=True)
class Finished:
    """A run that is done: strict memorized bits, and the entropy of what it coded."""

    count: int
    seed: int
    memorized: float
    entropy: float


def next_runs(
    finished: Sequence[Finished],
    parameters: int,
    sequence_bits: float,
    seeds: Sequence[int],
) -> list[tuple[int, int]]:
    """The (count, seed) of the runs to train next; none if the capacity is bracketed.

    With the first seed: a set of 0.25 · 3.6 · P bits, smaller ones until 95 % are memorized, five
    times and then twice larger ones until that fails, one of 1.2 times the capacity seen so far,
    and sets half as large again until the last adds at most 5 % per doubling: what
    `why_not_saturated` asks for. Then the other seeds of the best size, until a size with all of
    them is the best, or within 1 % of it.

    Args:
        finished: all finished runs of one model, of any size and seed, in any order.
        parameters: P.
        sequence_bits: entropy of the coded tokens of one sequence.
        seeds: the seeds to use; what there is of others counts too.

    Raises:
        ValueError: no seed, a parameter count or bits not above 0, or a run that is no number.

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
            raise ValueError(f"{run} is no finished run: leave it out")
    if not finished:
        first = START * BITS_PER_PARAMETER * parameters / sequence_bits
        return [(max(1, round(first)), seeds[0])]
    mean, share = _means(finished)
    size = _next_size(mean, share, sequence_bits)
    if size is not None:
        return [(size, seeds[0])]
    missing = {
        count: [
            seed for seed in seeds if (count, seed) not in {(r.count, r.seed) for r in finished}
        ]
        for count in mean
    }
    best = max(mean, key=lambda count: mean[count])
    if any(
        mean[n] >= (1 - TIE) * mean[best] for n, seeds_left in missing.items() if not seeds_left
    ):
        return []
    return [(best, seed) for seed in missing[best]]


def _means(finished: Sequence[Finished]) -> tuple[dict[int, float], dict[int, float]]:
    """Memorized bits by size, the mean of its runs, and as a share of the entropy."""
    by_count: dict[int, list[Finished]] = {}
    for run in finished:
        by_count.setdefault(run.count, []).append(run)
    sizes = sorted(by_count)
    mean = {n: sum(run.memorized for run in by_count[n]) / len(by_count[n]) for n in sizes}
    share = {n: mean[n] * len(by_count[n]) / sum(r.entropy for r in by_count[n]) for n in sizes}
    return mean, share


def _next_size(mean: dict[int, float], share: dict[int, float], sequence_bits: float) -> int | None:
    """A size that is not there yet and decides something, or None."""
    sizes = sorted(mean)
    low, top = sizes[0], sizes[-1]
    if len(sizes) >= MOST_SIZES:
        return None
    if share[low] < NEARLY_ALL and low > 1:
        return low // 2
    if share[top] >= NEARLY_ALL:
        return ceil(top * (FIRST_FACTOR if len(sizes) == 1 else FACTOR))
    best = max(sizes, key=lambda count: mean[count])
    if mean[best] <= 0:
        return None
    knee = mean[best] / sequence_bits
    at = ceil(AT * knee)
    if at not in sizes and not any(KNEE * knee <= count <= NEAR * knee for count in sizes):
        return at
    before = max((count for count in sizes if 4 * count <= 3 * top), default=low)
    rise = (mean[top] / mean[before] - 1) / log2(top / before) if mean[before] > 0 else 1.0
    if rise > RISE_PER_DOUBLING:
        return ceil(PLATEAU * top)
    larger = min((count for count in sizes if count > best), default=best)
    return ceil(PLATEAU * best) if larger > FAR * best else None
