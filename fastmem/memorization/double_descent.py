"""The peak of the test loss against data over capacity: where double descent begins.

R runs, K data set sizes of one shape.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastmem.base.arguments import numbers
from fastmem.base.stats import Floats, Interval, percentile_interval, studentized_range

LEVEL = 0.95
_NEAR, _FAR = 0.05, 4.0
"""Sizes that reach beyond these ratios on both sides would show a peak near the capacity."""


@dataclass(frozen=True)
class DoubleDescent:
    """The peak of the test loss, or why none was seen."""

    peak_ratio: Interval | None
    """Data over capacity at the peak: the geometric mean over the shapes with a peak."""
    found: str
    """What was found, in one or two sentences; without a peak, also what to run."""
    peaks: dict[str, float] = field(default_factory=dict)
    """Data over capacity at the peak of each shape with a peak."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        peak = self.peak_ratio and self.peak_ratio.to_dict()
        return {"peak_ratio": peak, "found": self.found, "peaks": self.peaks}


@dataclass(frozen=True)
class _Curve:
    """The runs of one shape, by size."""

    shape: str
    counts: list[int]
    ratios: Floats  # (K,)
    losses: list[Floats]  # (K,) of (seeds,)

    @property
    def means(self) -> Floats:
        return np.array([one.mean() for one in self.losses])


def double_descent(
    ratio: ArrayLike,
    test_bits: ArrayLike,
    shape: Sequence[str],
    count: ArrayLike,
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> DoubleDescent:
    """The ratio at which the test loss peaks, with an interval of 95 %.

    A shape has a peak at a size if the mean test loss over seeds is higher there than at a smaller
    and at a larger size by more than the noise of seeds: by the Tukey-Kramer test of all pairs of
    sizes, at a level of 5 % over all shapes together. A rising, a falling and a U-shaped curve so
    show a peak in at most 5 % of studies. The ratio is that of the highest such size. With one seed
    the noise is the scatter of shapes; with one seed and one shape it is not known, and no peak is
    claimed.

    Each replicate of the interval draws shapes with a peak, the seeds of each size, and a ratio
    between the sizes next to the highest, since a peak may lie anywhere between these two.

    Args:
        ratio: (R,) bits of the data over the capacity of the model, of each run.
        test_bits: (R,) test loss of each run, in any unit.
        shape: (R,) name of the shape of each run.
        count: (R,) data set size of each run. Runs of one shape and size are its seeds.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: arrays that differ in length, hold a value that is not finite, or a ratio that
            is not above 0.

    Example:
        >>> runs = [(n, b + d) for n, b in ((1, 5), (2, 9), (4, 6), (8, 4)) for d in (0.0, 0.1)]
        >>> n, bits = zip(*runs)
        >>> found = double_descent(n, bits, ["1x8"] * 8, n)
        >>> found.peak_ratio.estimate, found.peaks
        (2.0, {'1x8': 2.0})

    Source: arXiv 2505.24832, section 4; Kramer, Biometrics 12 (1956).
    """
    curves = _curves(ratio, test_bits, shape, count)
    if not curves:
        return DoubleDescent(None, "No run has a test loss and a known capacity.")
    peaks: dict[str, int] = {}
    level = 1 - (1 - LEVEL) / len(curves)
    noise = _noise(curves)
    for curve, (variance, df) in zip(curves, noise, strict=True):
        place, margin = _highest(curve, variance)
        if place is not None and margin > studentized_range(len(curve.counts), df, level):
            peaks[curve.shape] = place
    with_peak = [curve for curve in curves if curve.shape in peaks]
    others = _without_peak(
        [curve for curve in curves if curve.shape not in peaks],
        known=any(df for _, df in noise),
    )
    if not peaks:
        return DoubleDescent(None, f"No peak of the test loss was seen. {others}")
    at = {curve.shape: float(curve.ratios[peaks[curve.shape]]) for curve in with_peak}
    value = _interval(with_peak, at, replicates, np.random.default_rng(seed))
    assert value.low is not None
    assert value.high is not None
    each = ", ".join(f"{name} at {_short(where)}" for name, where in at.items())
    all_of = {1: "the only shape", 2: "both shapes"}.get(len(curves), f"all {len(curves)} shapes")
    of = f"{len(peaks)} of {len(curves)} shapes" if others else all_of
    found = (
        f"The test loss peaks where the data hold {_short(value.estimate)} [{_short(value.low)}, "
        f"{_short(value.high)}] times the capacity of the model, in {of}: {each}."
    )
    return DoubleDescent(value, f"{found} {others}".strip(), at)


def _curves(
    ratio: ArrayLike, test_bits: ArrayLike, shape: Sequence[str], count: ArrayLike
) -> list[_Curve]:
    x, y, n = numbers("ratio", ratio), numbers("test_bits", test_bits), numbers("count", count)
    names = np.asarray(shape, dtype=str)
    if not x.ndim == 1 or not x.shape == y.shape == n.shape == names.shape:
        raise ValueError(
            "ratio, test_bits, shape and count must have one value a run, got shapes "
            f"{x.shape}, {y.shape}, {names.shape} and {n.shape}"
        )
    if bad := np.count_nonzero(~(np.isfinite(x) & np.isfinite(y) & np.isfinite(n) & (x > 0))):
        raise ValueError(f"{bad} of {x.size} runs have a ratio not above 0 or a value not finite")
    curves = []
    for name in dict.fromkeys(names.tolist()):
        own = names == name
        counts = np.unique(n[own])
        at = [own & (n == one) for one in counts]
        ratios = np.array([np.exp(np.log(x[one]).mean()) for one in at])
        losses = [y[one] for one in at]
        curves.append(_Curve(name, [int(one) for one in counts], ratios, losses))
    return curves


def _noise(curves: Sequence[_Curve]) -> list[tuple[float, int]]:
    """The variance of a run of each shape and its degrees of freedom, 0 where it is not known.

    Seeds of one size differ by noise. Where each size has one seed, the noise is what an effect of
    the shape and an effect of the size leave, of shapes with the same number of sizes: it holds
    real differences between shapes too, so that it is rather too large.
    """
    found = []
    for curve in curves:
        df = sum(one.size - 1 for one in curve.losses)
        squares = sum(float(((one - one.mean()) ** 2).sum()) for one in curve.losses)
        found.append((squares / df if df else 0.0, df))
    if any(df for _, df in found) or len({len(curve.counts) for curve in curves}) > 1:
        return found
    y = np.stack([curve.means for curve in curves])  # (shapes, K)
    left = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    df = (y.shape[0] - 1) * (y.shape[1] - 1)
    return [(float((left**2).sum()) / df if df else 0.0, df)] * len(curves)


def _highest(curve: _Curve, variance: float = 1.0) -> tuple[int | None, float]:
    """The interior local maximum that stands highest over both sides, and its margin.

    The margin is the smaller of its differences to the best smaller and to the best larger size,
    over the standard error of a difference by √2, the unit of Tukey and Kramer.
    """
    means, n = curve.means, np.array([one.size for one in curve.losses])
    best, most = None, -math.inf
    for k in range(1, len(means) - 1):
        if means[k] < max(means[k - 1], means[k + 1]):
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            over = (means[k] - means) / np.sqrt(variance * (1 / n[k] + 1 / n) / 2)
        margin = float(min(over[:k].max(), over[k + 1 :].max()))
        if best is None or margin > most:
            best, most = k, margin
    return best, most


def _interval(
    curves: Sequence[_Curve], at: dict[str, float], replicates: int, rng: np.random.Generator
) -> Interval:
    """Of the geometric mean of the peaks of these shapes."""
    found = []
    for _ in range(replicates):
        places = []
        for i in rng.integers(len(curves), size=len(curves)):
            curve = curves[i]
            drawn = [rng.choice(one, one.size) for one in curve.losses]
            place, _ = _highest(replace(curve, losses=drawn))
            if place is not None:
                beside = np.log(curve.ratios[[place - 1, place + 1]])
                places.append(rng.uniform(*beside))
        if places:
            found.append(np.mean(places))
    estimate = math.exp(np.mean(np.log(list(at.values()))))
    return percentile_interval(estimate, np.exp(found))


_REASONS = {
    "few": "Fewer than 3 sizes were run: {}.",
    "one seed": "With one seed the noise is not known; the loss is highest inside: {}.",
    "noise": "The loss is higher inside than on both sides, by less than the noise: {}.",
    "smallest": "The loss is highest at the smallest data set: {}.",
    "largest": "The loss is highest at the largest data set: {}.",
    "none": "The loss does not rise and fall again: {}.",
}


def _without_peak(curves: Sequence[_Curve], known: bool) -> str:
    """Why shapes show no peak, and the flags that may show it; "" without such shapes."""
    found: dict[str, list[str]] = {}
    whose: dict[str, list[_Curve]] = {}
    for curve in curves:
        reason, at = _reason(curve, known)
        found.setdefault(reason, []).append(f"{curve.shape} ({at})")
        whose.setdefault(reason, []).append(curve)
    runs = []
    if small := [*whose.get("few", []), *whose.get("smallest", [])]:
        n = min(curve.counts[0] for curve in small)
        runs += [f"smaller data sets (--counts {n // 4} {n // 2})"] if n >= 4 else []
    if large := [*whose.get("few", []), *whose.get("largest", [])]:
        n = max(curve.counts[-1] for curve in large)
        runs.append(f"larger data sets (--counts {2 * n} {4 * n})")
    if "one seed" in found or "noise" in found:
        runs.append("more seeds (--seeds 0 1 2 3)")
    if "none" in found:
        runs.append("a longer training (--steps), since models that overfit have a peak")
    texts = [_REASONS[reason].format(_listed(shapes)) for reason, shapes in found.items()]
    return " ".join([*texts, *([f"Run {' and '.join(runs)}."] if runs else [])])


def _reason(curve: _Curve, known: bool) -> tuple[str, str]:
    """A key of `_REASONS`, and the ratios that show it."""
    means, ratios = curve.means, curve.ratios
    span = f"ratios {_short(ratios[0])} to {_short(ratios[-1])}"
    if len(means) < 3:
        return "few", span
    place, margin = _highest(curve)
    if place is not None and margin > 0:
        return "noise" if known else "one seed", f"ratio {_short(ratios[place])}"
    if ratios[0] < _NEAR and ratios[-1] > _FAR:
        return "none", span
    if means[0] >= means[-1]:
        return "smallest", f"ratio {_short(ratios[0])}"
    return "largest", f"ratio {_short(ratios[-1])}"


def _listed(shapes: Sequence[str]) -> str:
    more = f" and {len(shapes) - 6} more" if len(shapes) > 6 else ""
    return ", ".join(shapes[:6]) + more


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"
