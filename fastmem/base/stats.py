"""Estimates with intervals. NumPy only."""

import math
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_DRAWS = 20_000


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval; low and high are None where it has none."""

    estimate: float
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Plain numbers for JSON."""
        return asdict(self)

    def __truediv__(self, divisor: float) -> "Interval":
        low = None if self.low is None else self.low / divisor
        high = None if self.high is None else self.high / divisor
        return Interval(self.estimate / divisor, low, high)


def percentile_interval(estimate: float, replicates: Floats, level: float = 0.95) -> Interval:
    """An estimate with the central interval that holds a fraction `level` of its replicates.

    Example:
        >>> percentile_interval(2.0, np.array([0.0, 1.0, 2.0, 3.0, 4.0]), level=0.5)
        Interval(estimate=2.0, low=1.0, high=3.0)

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    tail = (1 - level) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return Interval(float(estimate), float(low), float(high))


@cache
def studentized_range(values: int, df: float, level: float = 0.95) -> float:
    """A quantile of the range of K normal values over their estimated standard deviation.

    K means with the standard error s differ, at 1 - level for all pairs together, where they are
    more than this times s apart. It is computed from 20,000 fixed draws, to about 1 %.

    Args:
        values: K, from 2.
        df: degrees of freedom of the standard deviation; math.inf where it is known; below 1 the
            result is inf.
        level: such as 0.95.

    Example:
        >>> round(studentized_range(3, 10), 1)  # tables: 3.88
        3.9

    Source: Tukey, The Problem of Multiple Comparisons (1953).
    """
    if df < 1:
        return math.inf
    rng = np.random.default_rng(0)
    spread = np.ptp(rng.standard_normal((_DRAWS, values)), axis=1)
    deviation = 1.0 if math.isinf(df) else np.sqrt(rng.chisquare(df, _DRAWS) / df)
    return float(np.quantile(spread / deviation, level))


def slope_through_origin(x: Floats, y: Floats) -> Floats:
    """The (...) least-squares slopes of y = slope · x through (..., M) points: Σxy / Σx².

    Example:
        >>> slope_through_origin(np.array([1.0, 2.0]), np.array([[3.0, 6.0], [4.0, 8.0]]))
        array([3., 4.])
    """
    return np.asarray((x * y).sum(-1) / (x * x).sum(-1))


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """The rate `successes / trials` with its exact binomial interval.

    low is the rate at which at least as many successes have the probability (1 - level) / 2, high
    the rate at which at most as many have it. A rate of 0 has low 0, a rate of 1 has high 1.

    Raises:
        ValueError: no trial, or successes outside 0 to trials.

    Example:
        >>> rate = clopper_pearson(1, 1000)
        >>> f"{rate.estimate:.1%} from {rate.low:.4%} to {rate.high:.2%}"
        '0.1% from 0.0025% to 0.56%'

    Source: Clopper and Pearson, Biometrika 26 (1934).
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials: give 0 to {trials}, from 1 up")
    tail, failures = (1 - level) / 2, trials - successes
    low = _beta_quantile(tail, successes, failures + 1) if successes else 0.0
    high = _beta_quantile(1 - tail, successes + 1, failures) if failures else 1.0
    return Interval(successes / trials, low, high)


def _beta_quantile(probability: float, a: float, b: float) -> float:
    """The x below which the beta distribution has the probability, by bisection."""
    low, high = 0.0, 1.0
    while low < (x := (low + high) / 2) < high and high - low > 1e-14 * high:
        low, high = (x, high) if _beta_cdf(x, a, b) < probability else (low, x)
    return x


def _beta_cdf(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function, by its continued fraction (Lentz)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_cdf(1 - x, b, a)
    front = a * math.log(x) + b * math.log1p(-x) - math.log(a)
    front += math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 100_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            c, d = 1 + term / c, 1 / (1 + term * d)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(front) * fraction
