"""When a run has converged, and what more training would add. Pure functions over its stages.

A run until converged is trained in stages that each end at twice the steps of the one before, its
learning rate risen and fallen to zero in each. Measured on small models, a stage ends with as many
memorized bits as a fresh run of that many steps (docs/results.md), so a run can stop at the end of
any of them and has wasted nothing.
"""

import bisect
import math

import numpy as np
from numpy.typing import ArrayLike

from fastmem.stats import Floats, Interval

MAX_HALVINGS = 9
FIRST_STEPS = 100
"""The first stage has at least this many steps, where their number is known."""
UNTIMED_HALVINGS = 6
"""How often a budget in seconds is halved."""
RATIOS = (0.4, 0.95)
"""Of the gain of a doubling of steps to that of the one before: what was seen (docs/results.md)."""


def stage_ends(total_steps: int | None) -> list[float]:
    """The shares of a budget at which the learning rate falls to zero: …, 1/4, 1/2, 1.

    Args:
        total_steps: of the budget; None if they are not known.

    Example:
        >>> stage_ends(1000)  # after 125, 250, 500 and 1000 steps
        [0.125, 0.25, 0.5, 1.0]

    Source: warm restarts with doubled periods, arXiv 1608.03983.
    """
    halvings = UNTIMED_HALVINGS
    if total_steps is not None:
        halvings = min(MAX_HALVINGS, max(0, int(math.log2(max(1, total_steps / FIRST_STEPS)))))
    return [0.5**k for k in range(halvings, -1, -1)]


def in_stage(share: float, total_steps: int | None) -> tuple[float, float]:
    """Begin and end of the stage that comes after this share of the budget.

    Example:
        >>> in_stage(0.25, 1000)
        (0.25, 0.5)
    """
    ends = stage_ends(total_steps)
    place = min(bisect.bisect(ends, share), len(ends) - 1)
    return (ends[place - 1] if place else 0.0), ends[place]


def has_converged(memorized: ArrayLike, tolerance: float) -> bool:
    """Whether the last doubling of steps added less than a share `tolerance` of all bits.

    It takes three stages, bits above 0, and a gain no larger than that before: one that grows is
    of a model that has only begun to learn.

    Args:
        memorized: (K,) memorized bits at the end of each stage.
        tolerance: the share; 0 for never.

    Example:
        >>> has_converged([60.0, 90.0, 99.0], 0.02), has_converged([90.0, 99.0, 100.0], 0.02)
        (False, True)
    """
    bits = _checked(memorized)
    if tolerance == 0 or len(bits) < 3 or bits[-1] <= 0:
        return False
    before, last = np.diff(bits[-3:])
    return bool(last < tolerance * bits[-1] and last <= max(before, 0.0))


def extrapolated(memorized: ArrayLike, entropy: float, doublings: float = math.inf) -> Interval:
    """The memorized bits after so many more doublings of steps, with an interval.

    If bits(n) = b - a · n^-c, each doubling of n gains r = 2^-c of what the one before gained, and
    the sum of all gains to come is the last one times r + r² + … . The estimate takes r from the
    last two gains; the interval is from the least to the greatest of RATIOS. None of them is above
    the entropy.

    Args:
        memorized: (K,) memorized bits at the end of each stage, K ≥ 2; with two, or gains that
            are not positive, r is the middle of RATIOS.
        entropy: of the coded tokens, in bits.
        doublings: how many, from 0; by default without end.

    Example:
        >>> extrapolated([60.0, 80.0, 90.0], entropy=1000.0).estimate  # … 95, 97.5, → 100
        100.0
        >>> extrapolated([60.0, 80.0, 90.0], entropy=1000.0, doublings=1).estimate
        95.0
    """
    bits = _checked(memorized)
    if len(bits) < 2:
        raise ValueError(f"a gain takes the bits of two stages, not {len(bits)}: train longer")
    if not doublings >= 0:
        raise ValueError(f"doublings must be at least 0, not {doublings}")
    gains = np.diff(bits[-3:])
    low, high = RATIOS
    ratio = (low + high) / 2
    if len(gains) == 2 and gains.min() > 0:
        ratio = min(max(float(gains[1] / gains[0]), low), high)
    gain = max(float(gains[-1]), 0.0)
    limit = max(float(bits[-1]), entropy)
    reached = [
        min(float(bits[-1]) + gain * _geometric(r, doublings), limit) for r in (ratio, low, high)
    ]
    return Interval(*reached)


def _geometric(ratio: float, terms: float) -> float:
    """r + r² + … to so many terms, which may be a fraction."""
    return ratio * (1 - ratio**terms) / (1 - ratio)


def _checked(memorized: ArrayLike) -> Floats:
    bits = np.asarray(memorized, dtype=np.float64)
    if bits.ndim != 1:
        raise ValueError(f"memorized must be one number a stage, not of shape {bits.shape}")
    return bits
