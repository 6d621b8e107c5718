"""How well a score tells members from non-members, with intervals.

Counts c1 (members) and c0 (non-members) are (R, K): how often each of the K distinct scores, in
ascending order, was drawn in each of R draws of the sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmem.base.arguments import numbers
from fastmem.base.stats import Floats, Interval, clopper_pearson, percentile_interval

MIN_SEQUENCES = 20
"""Least members and least non-members: below it an interval says nothing."""
REPLICATES = 1000
CHUNK = 2**15
"""Counts at a time, which stay in the cache; at least one draw. It changes no result."""
ALWAYS = 2 / 3
"""F1 of calling every sequence of a balanced set a member."""
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class LowFpr:
    """The true positive rate at a low false positive rate; None with `reason` if it cannot be told.

    fpr is the false positive rate that the threshold really has, with its interval.
    """

    tpr: Interval | None
    fpr: Interval | None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        tpr = self.tpr.to_dict() if self.tpr else dict.fromkeys(("estimate", "low", "high"))
        return {**tpr, "fpr": self.fpr and self.fpr.to_dict(), "reason": self.reason}


@dataclass(frozen=True)
class Roc:
    """What `roc` returns; `balanced` says which sequences f1 counts."""

    members: int
    non_members: int
    auc: Interval
    tpr: dict[float, LowFpr]
    balanced_accuracy: Interval
    f1: dict[str, Interval]
    balanced: str

    def __repr__(self) -> str:
        auc = f"AUC {self.auc.estimate:.3f} [{self.auc.low:.3f}, {self.auc.high:.3f}]"
        return f"Roc({auc}, {self.members:,} members, {self.non_members:,} non-members)"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **vars(self),
            "auc": self.auc.to_dict(),
            "tpr": {f"{fpr:g}": rate.to_dict() for fpr, rate in self.tpr.items()},
            "balanced_accuracy": self.balanced_accuracy.to_dict(),
            "f1": {rule: value.to_dict() for rule, value in self.f1.items()},
        }


def roc(
    scores: ArrayLike, labels: ArrayLike, *, fpr: Sequence[float] = (0.01, 0.001), seed: int = 0
) -> Roc:
    """The quality of a score, of which a higher value means member, with 95 % intervals.

    - auc: the fraction of pairs in which the member scores higher, ties counted half.
    - tpr: at each `fpr`, the fraction of members above the threshold with at most ⌊fpr · N₀⌋ of
      the N₀ non-members above it, ties included. Intervals are Clopper-Pearson.
    - balanced_accuracy: (TPR + TNR) / 2 at the best threshold, chosen on the same sequences and
      therefore above 0.5 by chance.
    - f1: on as many members as non-members (a draw from the larger class), by three rules.
      "calibrated": the threshold that is best on one half, applied to the other half. "median":
      the upper half of the scores are members, ties at the median in proportion. "always": every
      sequence is a member, 2/3, the floor that a threshold must beat.

    All other intervals are percentiles of a bootstrap over sequences (1000 draws from each class
    by its own), in which thresholds are chosen anew.

    Args:
        scores: (N,) scores; infinities are in order.
        labels: (N,) true (1) for members, false (0) for non-members.
        fpr: false positive rates.
        seed: of the draws.

    Raises:
        ValueError: lengths that differ, nan, labels other than 0 and 1, or fewer than 20 members
            or non-members.

    Example:
        >>> result = roc(np.arange(40.0), np.arange(40) >= 20, fpr=(0.05, 0.01))
        >>> result.auc
        Interval(estimate=1.0, low=1.0, high=1.0)
        >>> result.tpr[0.05].tpr.low > 0.8, result.tpr[0.01].reason
        (True, 'cannot be told: 1 % of 20 non-members is less than one sequence')

    Source: low false positive rates, arXiv 2112.03570; the rules, docs/method.md.
    """
    values, is_member = checked(scores, labels)
    check_rates(fpr)
    distinct, places = np.unique(values, return_inverse=True)
    K, rng = len(distinct), np.random.default_rng(seed)
    groups = [places[is_member], places[~is_member]]
    halves, balanced = _balanced_halves(groups, rng)
    area, accuracy = _bootstrap([_auc, _accuracy], groups, K, rng)
    calibrated, median = _bootstrap([_f1_calibrated, _f1_median], halves, K, rng)
    return Roc(
        members=len(groups[0]),
        non_members=len(groups[1]),
        auc=area,
        tpr={rate: low_fpr(values[is_member], values[~is_member], rate) for rate in fpr},
        balanced_accuracy=accuracy,
        f1={"calibrated": calibrated, "median": median, "always": Interval(ALWAYS)},
        balanced=balanced,
    )


def roc_points(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """(K + 1,) false and true positive rates of all thresholds, from (0, 0) to (1, 1).

    Raises:
        ValueError: the scores or labels are not those that `roc` takes.

    Example:
        >>> fpr, tpr = roc_points(np.arange(40) // 20, np.arange(40) >= 20)
        >>> fpr, tpr
        (array([0., 0., 1.]), array([0., 1., 1.]))
    """
    values, is_member = checked(scores, labels)
    distinct, places = np.unique(values, return_inverse=True)
    rates = [
        np.cumsum([0, *np.bincount(places[chosen], minlength=len(distinct))[::-1]]) / chosen.sum()
        for chosen in (~is_member, is_member)
    ]
    return rates[0], rates[1]


def check_rates(fpr: Sequence[float]) -> None:
    """ValueError unless each false positive rate is between 0 and 1."""
    if np.ndim(fpr) != 1 or not all(0 < rate < 1 for rate in fpr):
        raise ValueError(f"fpr must be rates between 0 and 1, not {fpr!r}: try (0.01, 0.001)")


def checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    """Scores and labels as arrays; the errors of `roc`."""
    values, truth = numbers("scores", scores), numbers("labels", labels)
    if values.ndim != 1 or values.shape != truth.shape:
        raise ValueError(
            f"scores of shape {values.shape} and labels of shape {truth.shape}: give one label "
            "for each score"
        )
    if not np.isin(truth, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, not {truth[~np.isin(truth, (0, 1))][0]:g}")
    if np.isnan(values).any():
        raise ValueError(
            f"the score of sequence {np.isnan(values).argmax()} is nan ({np.isnan(values).sum()} "
            f"of {len(values)}): score the sequence again, or leave it out"
        )
    members = int(truth.sum())
    if min(members, len(truth) - members) < MIN_SEQUENCES:
        raise ValueError(
            f"{members} members and {len(truth) - members} non-members: give at least "
            f"{MIN_SEQUENCES} of each"
        )
    return values, truth == 1


def low_fpr(members: Floats, others: Floats, fpr: float) -> LowFpr:
    """The rates above the highest threshold that keeps at most ⌊fpr · N₀⌋ false positives."""
    allowed = int(fpr * len(others) + 1e-9)
    if allowed < 1:
        reason = f"{100 * fpr:g} % of {len(others):,} non-members is less than one sequence"
        return LowFpr(None, None, f"cannot be told: {reason}")
    threshold = np.partition(others, len(others) - allowed - 1)[len(others) - allowed - 1]
    hits, alarms = (int((scores > threshold).sum()) for scores in (members, others))
    return LowFpr(clopper_pearson(hits, len(members)), clopper_pearson(alarms, len(others)))


def _balanced_halves(groups: list[Counts], rng: np.random.Generator) -> tuple[list[Counts], str]:
    """Two random halves of as many members as non-members, and a sentence about them."""
    sizes = [len(group) for group in groups]
    size = min(sizes)
    drawn = [rng.permutation(group)[:size] for group in groups]
    text = f"{size:,} members and {size:,} non-members"
    if max(sizes) > size:
        larger = ("members", "non-members")[int(np.argmax(sizes))]
        text += f", a random {size:,} of {max(sizes):,} {larger}"
    return [part for g in drawn for part in (g[: size // 2], g[size // 2 :])], text


def _bootstrap(
    statistics: Sequence[Callable[..., Floats]],
    groups: list[Counts],
    K: int,
    rng: np.random.Generator,
) -> list[Interval]:
    """Each statistic of the counts of the groups, and its interval over draws of each group."""
    counts = [np.bincount(group, minlength=K)[None] for group in groups]
    estimates = [float(statistic(*counts)[0]) for statistic in statistics]
    rows = max(1, CHUNK // max(K, *map(len, groups)))
    streams = rng.spawn(len(groups))  # a shared stream would make draws depend on `rows`
    replicates: list[list[Floats]] = [[] for _ in statistics]
    for begin in range(0, REPLICATES, rows):
        R = min(rows, REPLICATES - begin)
        counts = [_drawn(group, R, K, own) for group, own in zip(groups, streams, strict=True)]
        for statistic, results in zip(statistics, replicates, strict=True):
            results.append(statistic(*counts))
    return [
        percentile_interval(estimate, np.concatenate(results))
        for estimate, results in zip(estimates, replicates, strict=True)
    ]


def _drawn(group: Counts, R: int, K: int, rng: np.random.Generator) -> Counts:
    """(R, K) counts of R draws of a group with replacement."""
    places = group[rng.integers(len(group), size=(R, len(group)))]
    places += K * np.arange(R)[:, None]
    return np.bincount(places.ravel(), minlength=R * K).reshape(R, K)


def _auc(c1: Counts, c0: Counts) -> Floats:
    below = np.cumsum(c0, axis=1) - c0 / 2
    return np.asarray((c1 * below).sum(1) / (c1.sum(1) * c0.sum(1)))


def _accuracy(c1: Counts, c0: Counts) -> Floats:
    """½ + the largest TPR - FPR over thresholds, with the one above all scores, divided by 2."""
    below = [np.cumsum(c, axis=1) / c.sum(1, keepdims=True) for c in (c1, c0)]
    return np.asarray(0.5 + np.maximum(0, (below[1] - below[0]).max(1)) / 2)


def _f1_calibrated(best1: Counts, test1: Counts, best0: Counts, test0: Counts) -> Floats:
    """F1 of the test half at the score that is the best threshold of the other half.

    Of equally good thresholds the highest is a score of that half, not a place between two.
    """
    K = best1.shape[1]
    chosen = K - 1 - _f1(best1, best0)[:, ::-1].argmax(1)
    return np.take_along_axis(_f1(test1, test0), chosen[:, None], axis=1)[:, 0]


def _f1(c1: Counts, c0: Counts) -> Floats:
    """(R, K) F1 if the scores from each distinct score up are members."""
    hits, alarms = (np.cumsum(c[:, ::-1], axis=1)[:, ::-1] for c in (c1, c0))
    return np.asarray(2 * hits / (c1.sum(1, keepdims=True) + hits + alarms))


def _f1_median(best1: Counts, test1: Counts, best0: Counts, test0: Counts) -> Floats:
    return median_f1(best1 + test1, best0 + test0)


def median_f1(c1: Counts, c0: Counts) -> Floats:
    """(R,) fractions of members in the upper half of as many members as non-members, ties in
    proportion: precision, recall and F1 are equal there."""
    both = c1 + c0
    upto, half = np.cumsum(both, axis=1), both.sum(1, keepdims=True) / 2
    at = (upto >= half).argmax(1)[:, None]
    take = np.take_along_axis
    share = (take(upto, at, axis=1) - half) / take(both, at, axis=1)
    above = c1.sum(1, keepdims=True) - take(np.cumsum(c1, axis=1), at, axis=1)
    return np.asarray((above + share * take(c1, at, axis=1)) / c1.sum(1, keepdims=True))[:, 0]
