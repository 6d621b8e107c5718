"""Whether a run has converged, and what more training would add: functions of its stages.

With until="converged" a run trains in stages. Each stage ends at twice the steps of the stage
before, and in each the learning rate rises and falls to zero. On small models a stage ends with as
many memorized bits as a new run of the same number of steps (measured: docs/lab.md), so a run that
stops at the end of a stage has wasted nothing.
"""

import bisect
import math

import numpy as np
from numpy.typing import ArrayLike

from fastmem.base.arguments import number, numbers
from fastmem.base.stats import Floats, Interval

MAX_HALVINGS = 9
FIRST_STEPS = 100
"""Least steps of the first stage of a budget that is not in seconds."""
UNTIMED_HALVINGS = 6
"""Halvings of a budget in seconds."""
RATIOS: list[float] = np.linspace(0.4, 0.9, 51).tolist()
"""Measured range of the gain of a doubling of steps over the gain before (docs/lab.md)."""
FITTED = 4
"""Stages that an extrapolation fits, the last ones: earlier stages follow another law."""
NOISE = 0.0075
"""Least standard deviation of the bits of a stage, as a fraction of these bits."""


def stage_ends(total_steps: int | None) -> list[float]:
    """The fractions of a budget at which the learning rate reaches zero: …, 1/4, 1/2, 1.

    Args:
        total_steps: steps of the budget, at least 1; None for a budget in seconds.

    Example:
        >>> stage_ends(1000)  # after 125, 250, 500 and 1000 steps
        [0.125, 0.25, 0.5, 1.0]

    Source: warm restarts with doubled periods, arXiv 1608.03983.
    """
    halvings = UNTIMED_HALVINGS
    if total_steps is not None:
        if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
            raise ValueError(f"total_steps must be an int from 1 up, or None, not {total_steps!r}")
        halvings = min(MAX_HALVINGS, max(0, int(math.log2(max(1, total_steps / FIRST_STEPS)))))
    return [0.5**k for k in range(halvings, -1, -1)]


def in_stage(spent: float, total_steps: int | None) -> tuple[float, float]:
    """Begin and end of the stage that follows once a fraction `spent` of the budget is spent.

    Example:
        >>> in_stage(0.25, 1000)
        (0.25, 0.5)
    """
    if not 0 <= number("spent", spent) < math.inf:
        raise ValueError(f"spent must be at least 0 and finite, not {spent}")
    ends = stage_ends(total_steps)
    place = min(bisect.bisect(ends, spent), len(ends) - 1)
    return (ends[place - 1] if place else 0.0), ends[place]


def has_converged(memorized: ArrayLike, tolerance: float) -> bool:
    """True if the last doubling of steps changed the bits by less than a fraction `tolerance`.

    False with fewer than three stages, with bits of 0 or below, and if the last gain exceeds the
    gain before: such a model has only begun to learn. A larger fall of the bits is noise: False.

    Args:
        memorized: (K,) memorized bits at the end of each stage; nan, for a data set of unknown
            entropy, never converges.
        tolerance: the fraction of the bits; 0 never converges.

    Example:
        >>> has_converged([60.0, 90.0, 99.0], 0.02), has_converged([90.0, 99.0, 100.0], 0.02)
        (False, True)
    """
    if not number("tolerance", tolerance) >= 0:
        raise ValueError(f"tolerance must be at least 0, not {tolerance}")
    bits = _checked(memorized)
    if len(bits) < 3 or bits[-1] <= 0:
        return False
    before, last = np.diff(bits[-3:])
    return bool(abs(last) < tolerance * bits[-1] and last <= max(before, 0.0))


def extrapolated(memorized: ArrayLike, entropy: float, doublings: float = math.inf) -> Interval:
    """The memorized bits after `doublings` more doublings of steps, with an interval.

    Fits bits(k) = b - a · r^k, a ≥ 0, to the last FITTED stages k: a power law b - a · n^-c in
    steps n, r = 2^-c. Each r of RATIOS has a least-squares fit; the best fit gives the estimate.
    The interval spans the predictions of the fits whose residual sum of squares is at most 3²
    variances above the best, widened by two standard deviations; the deviation is estimated from
    the residuals of the best fit, and is at least NOISE of the bits. Estimate and bounds are cut
    at the entropy. Measured coverage: docs/lab.md.

    Args:
        memorized: (K,) memorized bits at the end of each stage, K ≥ 3.
        entropy: entropy of the coded tokens, in bits.
        doublings: doublings of steps, at least 0; by default infinitely many.

    Example:
        >>> found = extrapolated([60.0, 80.0, 90.0, 95.0], entropy=1000.0)  # … 97.5, → 100
        >>> round(found.estimate, 6), found.low < 96 < 104 < found.high
        (100.0, True)
        >>> round(extrapolated([60.0, 80.0, 90.0, 95.0], 1000.0, doublings=1).estimate, 6)
        97.5
    """
    bits = _checked(memorized)
    if len(bits) < 3:
        raise ValueError(f"a trend takes the bits of three stages, not {len(bits)}: train longer")
    if not np.isfinite(bits).all():
        raise ValueError(f"memorized must be finite, not {bits.tolist()}: leave the run out")
    if not number("entropy", entropy) > 0:
        raise ValueError(f"entropy must be above 0 bits, not {entropy}")
    if not number("doublings", doublings) >= 0:
        raise ValueError(f"doublings must be at least 0, not {doublings}")
    bits = bits[-FITTED:]
    fits = [_fitted(bits, ratio, doublings) for ratio in RATIOS]
    least, estimate = min(fits)
    noise = max(math.sqrt(least / (len(bits) - 2)), NOISE * abs(float(bits[-1])))
    likely = [later for squares, later in fits if squares <= least + (3 * noise) ** 2]
    low, high = min(likely) - 2 * noise, max(likely) + 2 * noise
    limit = max(entropy, float(bits[-1]))
    return Interval(*(min(value, limit) for value in (estimate, low, high)))


def _fitted(bits: Floats, ratio: float, doublings: float) -> tuple[float, float]:
    """The residual sum of squares of b - a · ratio^k, and its value `doublings` stages later."""
    powers = ratio ** np.arange(len(bits))
    centred = powers - powers.mean()
    slope = min(float(centred @ bits / (centred @ centred)), 0.0)  # -a
    residuals = bits - bits.mean() - slope * centred
    later = bits.mean() + slope * (ratio ** (len(bits) - 1 + doublings) - powers.mean())
    return float(residuals @ residuals), float(later)


def _checked(memorized: ArrayLike) -> Floats:
    bits = numbers("memorized", memorized)
    if bits.ndim != 1:
        raise ValueError(f"memorized must be one number a stage, not of shape {bits.shape}")
    return bits
