"""Estimates with intervals. NumPy only."""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval; low and high are None if nothing was resampled."""

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


def slope_through_origin(x: Floats, y: Floats) -> Floats:
    """The (...) least-squares slopes of y = slope · x through (..., M) points: Σxy / Σx².

    Example:
        >>> slope_through_origin(np.array([1.0, 2.0]), np.array([[3.0, 6.0], [4.0, 8.0]]))
        array([3., 4.])
    """
    return np.asarray((x * y).sum(-1) / (x * x).sum(-1))
