"""When a run has converged, and what more training would add. Pure functions over its stages.

A run until converged is trained in stages that each end at twice the steps of the one before, its
learning rate risen and fallen to zero in each. Measured on small models, a stage ends with as many
memorized bits as a fresh run of that many steps (docs/lab.md), so a run can stop at the end of
any of them and has wasted nothing.
"""

import bisect
import math

import numpy as np
from numpy.typing import ArrayLike

from fastmem.base.arguments import number, numbers
from fastmem.base.stats import Floats, Interval

MAX_HALVINGS = 9
FIRST_STEPS = 100
"""The first stage has at least this many steps, where their number is known."""
UNTIMED_HALVINGS = 6
"""How often a budget in seconds is halved."""
RATIOS: list[float] = np.linspace(0.4, 0.9, 51).tolist()
"""Of the gain of a doubling of steps to that of the one before: what was seen (docs/lab.md)."""
FITTED = 4
"""Stages that an extrapolation looks at: earlier ones follow another law."""
NOISE = 0.0075
"""The least standard deviation of a stage's bits, as a share of them."""


def stage_ends(total_steps: int | None) -> list[float]:
    """The shares of a budget at which the learning rate falls to zero: …, 1/4, 1/2, 1.

    Args:
        total_steps: of the budget, at least 1; None if they are not known.

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


def in_stage(share: float, total_steps: int | None) -> tuple[float, float]:
    """Begin and end of the stage that comes after this share of the budget.

    Example:
        >>> in_stage(0.25, 1000)
        (0.25, 0.5)
    """
    if not 0 <= number("share", share) < math.inf:
        raise ValueError(f"share must be at least 0 and finite, not {share}")
    ends = stage_ends(total_steps)
    place = min(bisect.bisect(ends, share), len(ends) - 1)
    return (ends[place - 1] if place else 0.0), ends[place]


def has_converged(memorized: ArrayLike, tolerance: float) -> bool:
    """Whether the last doubling of steps changed the bits by less than a share `tolerance` of them.

    It takes three stages, bits above 0, and a gain no larger than that before: one that grows is
    of a model that has only begun to learn. Bits that fall by more are noise, and no end.

    Args:
        memorized: (K,) memorized bits at the end of each stage; nan, of a set whose entropy
            nobody knows, has never converged.
        tolerance: the share; 0 for never.

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
    """The memorized bits after so many more doublings of steps, with an interval.

    Fits bits(k) = b - a · r^k, a ≥ 0, to the last FITTED stages k: a power law b - a · n^-c in
    steps n, r = 2^-c. Each r of RATIOS has its least squares; the estimate is that of the best. The
    interval is from the lowest to the highest of those that leave at most 3² variances more than
    the best, two standard deviations wider; the deviation is what the best leaves, at least NOISE
    of the bits. How often this covers is in docs/lab.md. Nothing is above the entropy.

    Args:
        memorized: (K,) memorized bits at the end of each stage, K ≥ 3.
        entropy: of the coded tokens, in bits.
        doublings: how many, from 0; by default without end.

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
        raise ValueError(f"memorized must be finite, not {bits.tolist()}: leave such a run out")
    if not number("entropy", entropy) > 0:
        raise ValueError(f"entropy must be above 0 bits, not {entropy}")
    if not number("doublings", doublings) >= 0:
        raise ValueError(f"doublings must be at least 0, not {doublings}")
    bits = bits[-FITTED:]
    fits = [_fitted(bits, ratio, doublings) for ratio in RATIOS]
    left, estimate = min(fits)
    noise = max(math.sqrt(left / (len(bits) - 2)), NOISE * abs(float(bits[-1])))
    likely = [found for more, found in fits if more <= left + (3 * noise) ** 2]
    low, high = min(likely) - 2 * noise, max(likely) + 2 * noise
    limit = max(entropy, float(bits[-1]))
    return Interval(*(min(found, limit) for found in (estimate, low, high)))


def _fitted(bits: Floats, ratio: float, doublings: float) -> tuple[float, float]:
    """The sum of squares that b - a · ratio^k leaves, and its value so many stages later."""
    powers = ratio ** np.arange(len(bits))
    centred = powers - powers.mean()
    slope = min(float(centred @ bits / (centred @ centred)), 0.0)  # -a
    left = bits - bits.mean() - slope * centred
    later = bits.mean() + slope * (ratio ** (len(bits) - 1 + doublings) - powers.mean())
    return float(left @ left), float(later)


def _checked(memorized: ArrayLike) -> Floats:
    bits = numbers("memorized", memorized)
    if bits.ndim != 1:
        raise ValueError(f"memorized must be one number a stage, not of shape {bits.shape}")
    return bits
