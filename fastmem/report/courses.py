"""How a curve goes beyond its noise, for the sentences of figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastmem.base.stats import Floats, studentized_range

Course = Literal["rises and falls", "falls and rises", "rises", "falls", "flat"]
LEVEL = 0.95
"""Fraction of curves without any change that a sentence must call flat."""


@dataclass(frozen=True)
class Curve:
    """Means over seeds at K sizes, with their standard errors."""

    sizes: list[int]
    means: Floats  # (K,)
    errors: Floats  # (K,) 0 where nothing was repeated
    df: float
    """Degrees of freedom of the errors; inf where they are known."""

    @property
    def top(self) -> int:
        return int(self.means.argmax())

    @property
    def z(self) -> float:
        """Standard errors of a difference beyond which two of K sizes differ."""
        return studentized_range(max(2, len(self.sizes)), self.df, LEVEL) / math.sqrt(2)

    def above_zero(self) -> bool:
        """True if the highest mean is above 0 beyond its noise."""
        return bool(self.means[self.top] > self.z * self.errors[self.top])


def curve(
    sizes: Sequence[int],
    values: Sequence[float],
    errors: Sequence[float] | None = None,
    power: float = 0.0,
) -> Curve:
    """The curve of R runs: their means at each size.

    The error of a mean is the larger of two: of the runs' own errors, and of the spread of seeds.
    The spread is pooled over sizes, in which it goes as size^power.

    Args:
        sizes: (R,)
        values: (R,)
        errors: (R,) standard error of each run; None: not known.
        power: 1/2 for sums over independent sequences, -1/2 for means over them.

    Example:
        >>> found = curve([1, 1, 4, 4], [3.0, 5.0, 8.0, 6.0], power=0.5)
        >>> found.sizes, found.means, found.errors.round(2)
        ([1, 4], array([4., 7.]), array([0.79, 1.58]))
    """
    n, y = np.asarray(sizes), np.asarray(values, dtype=np.float64)
    own = np.zeros(y.size) if errors is None else np.asarray(errors, dtype=np.float64)
    each = np.unique(n)
    places = [np.flatnonzero(n == size) for size in each]
    means, seeds = np.array([y[at].mean() for at in places]), np.array([at.size for at in places])
    scale = each.astype(np.float64) ** power
    df = y.size - each.size
    squares = sum(
        float(((y[at] - mean) ** 2).sum()) / by**2
        for at, mean, by in zip(places, means, scale, strict=True)
    )
    by_seeds = math.sqrt(squares / df if df else 0.0) * scale / np.sqrt(seeds)
    given = np.array([math.hypot(*own[at]) / at.size for at in places])
    known = bool((given >= by_seeds).all())
    errors_of_means = np.maximum(by_seeds, given)
    return Curve([int(size) for size in each], means, errors_of_means, math.inf if known else df)


def course(found: Curve) -> Course:
    """How the curve goes, where it changes beyond its noise.

    It rises and falls if its highest mean is above a smaller and a larger size by the Tukey-Kramer
    test of all pairs of sizes; in the same way for the others.

    Example:
        >>> course(curve([1, 2, 4], [1.0, 5.0, 2.0], [0.1, 0.1, 0.1]))
        'rises and falls'
        >>> course(curve([1, 2, 4], [1.0, 1.1, 0.9], [0.3, 0.3, 0.3]))
        'flat'
    """
    rises, falls = _sides(found.means, found.errors, found.z)
    if rises and falls:
        return "rises and falls"
    drops, climbs = _sides(-found.means, found.errors, found.z)
    if drops and climbs:
        return "falls and rises"
    if rises or falls:
        return "rises" if rises else "falls"
    return "flat"


def _sides(means: Floats, errors: Floats, z: float) -> tuple[bool, bool]:
    """Whether the highest mean is above a mean before it, and above a mean after it."""
    top = int(means.argmax())
    above = means[top] - means > z * np.hypot(errors, errors[top])
    return bool(above[:top].any()), bool(above[top + 1 :].any())
