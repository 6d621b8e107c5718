"""Membership scores from shadow models, which were trained on random halves of the sequences.

N sequences, E shadow models. Where lengths differ, pass bits per token: both attacks compare
sequences by the same scale.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmem.base.arguments import number, numbers
from fastmem.base.stats import Floats

Variance = Literal["fixed", "example"]
SMALLEST = 1e-6
"""Least standard deviation, as a fraction of 1 + mean bits: the rounding of bits in float32."""


def lira(
    target: ArrayLike,
    shadows: ArrayLike,
    is_member: ArrayLike,
    *,
    online: bool,
    variance: Variance = "fixed",
) -> Floats:
    """The likelihood-ratio attack on each sequence; a higher score is more likely a member.

    The statistic is x = -bits. For each sequence, in and out are the mean of x over the shadow
    models with and without it, and s_in and s_out the standard deviations about these means.

    - offline: (x - out) / s_out, of which the paper's 1 - Pr[Z > x] is an increasing function
      that rounds to 1.
    - online: ln N(x; in, s_in²) - ln N(x; out, s_out²)

    variance "example" takes each sequence's own deviation; "fixed" the root of the mean square
    over all sequences, better below about 32 shadow models of each kind. The published code
    differs: it takes medians, and its fixed deviation includes the differences between sequences.

    Args:
        target: (N,) bits of each sequence by the model under attack.
        shadows: (E, N) bits by each shadow model, none of them the target.
        is_member: (E, N) whether the shadow model was trained on the sequence.
        online: whether models that were trained on a sequence count too.

    Returns:
        (N,) float64.

    Raises:
        ValueError: other shapes, bits that are not finite, an unknown variance, or a sequence with
            too few models: one on each side, two for "example".

    Example:
        >>> shadows = np.array([[9.0, 1.0], [2.0, 9.0], [8.0, 2.0], [1.0, 8.0]])
        >>> is_member = np.array([[False, True], [True, False]] * 2)
        >>> lira([1.5, 8.5], shadows, is_member, online=False)
        array([14.,  0.])

    Source: arXiv 2112.03570, algorithm 1 and section VI.
    """
    if variance not in get_args(Variance):
        raise ValueError(f"variance must be one of {get_args(Variance)}, not {variance!r}")
    least = 2 if variance == "example" else 1
    x, x_shadows, inside = _checked(target, shadows, is_member, online, least)
    mean, s_out = _moments(x_shadows, ~inside, variance)
    z_out = (x - mean) / s_out
    if not online:
        return z_out
    mean, s_in = _moments(x_shadows, inside, variance)
    z_in = (x - mean) / s_in
    return np.asarray((z_out**2 - z_in**2) / 2 + np.log(s_out / s_in))


def rmia(
    target: ArrayLike,
    shadows: ArrayLike,
    is_member: ArrayLike,
    *,
    online: bool,
    population: ArrayLike | None = None,
    a: float = 0.3,
    gamma: float = 1.0,
) -> Floats:
    """The relative attack on each sequence; a higher score is more likely a member.

    With p(x | θ) = 2^-bits, the score is the fraction of the population z with

        (p(x | target) / p(x)) / (p(z | target) / p(z)) >= gamma

    - online: p(x) = (mean over shadow models with x + mean over those without) / 2
    - offline: p(x) = ((1 + a) · mean over shadow models without x + 1 - a) / 2

    Everything is computed in logarithms, so bits of whole sequences do not underflow. The constant
    of the offline form is far above their probabilities, though: with a below 1 pass bits per
    token, as the published tool does.

    Args:
        target: (N,) bits of each sequence by the model under attack.
        shadows: (E, N) bits by each shadow model, none of them the target.
        is_member: (E, N) whether the shadow model was trained on the sequence.
        online: whether models that were trained on a sequence count too.
        population: places of the sequences that serve as z, by default all N.
        a: from 0 to 1, offline.
        gamma: above 0.

    Returns:
        (N,) float64 from 0 to 1.

    Raises:
        ValueError: as `lira`; a or gamma outside their limits, or an empty population.

    Example:
        >>> shadows = np.array([[9.0, 1.0], [2.0, 9.0], [8.0, 2.0], [1.0, 8.0]])
        >>> is_member = np.array([[False, True], [True, False]] * 2)
        >>> rmia([1.5, 8.5], shadows, is_member, online=True)
        array([1. , 0.5])

    Source: arXiv 2312.03262, equations 4 to 6 and the offline form of its appendix.
    """
    if not 0 <= number("a", a) <= 1 or not number("gamma", gamma) > 0:
        raise ValueError(f"a must be from 0 to 1 and gamma above 0, not {a} and {gamma}")
    x, x_shadows, inside = _checked(target, shadows, is_member, online, 1)
    outside = _mean_log2(x_shadows, ~inside)
    if online:
        p = np.logaddexp2(outside, _mean_log2(x_shadows, inside))
    else:
        constant = np.log2(1 - a) if a < 1 else -np.inf
        p = np.logaddexp2(outside + np.log2(1 + a), constant)
    ratio = x - p  # without the division of p by 2, which cancels
    try:
        others = np.sort(ratio if population is None else ratio[np.asarray(population)])
    except IndexError:
        raise ValueError(
            f"population {population!r} is not places among {len(x)} sequences: pass their indices"
        ) from None
    if not others.size:
        raise ValueError(f"the population has 0 of {len(x)} sequences: leave it out to take all")
    return np.asarray(np.searchsorted(others, ratio - np.log2(gamma), "right") / len(others))


def _moments(values: Floats, side: NDArray[np.bool_], variance: Variance) -> tuple[Floats, Floats]:
    """(N,) mean and standard deviation over the models of a side."""
    count = side.sum(0)
    mean = np.where(side, values, 0).sum(0) / count
    squares = np.where(side, (values - mean) ** 2, 0).sum(0)
    spread = squares / count if variance == "example" else squares.sum() / count.sum()
    return mean, np.maximum(np.sqrt(spread), SMALLEST * (1 + np.abs(mean)))


def _mean_log2(logs: Floats, side: NDArray[np.bool_]) -> Floats:
    """(N,) log2 of the mean of 2^logs over the models of a side."""
    total = np.logaddexp2.reduce(np.where(side, logs, -np.inf), axis=0)
    return np.asarray(total - np.log2(side.sum(0)))


def _checked(
    target: ArrayLike, shadows: ArrayLike, is_member: ArrayLike, online: bool, least: int
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """-bits and is_member; ValueError unless shapes fit, bits are finite and not below 0, and each
    sequence has `least` models without it, and with it for the online form."""
    if not isinstance(online, bool | np.bool_):
        raise ValueError(f"online must be True or False, not {online!r}")
    x, x_shadows = numbers("target", target), numbers("shadows", shadows)
    inside = np.asarray(is_member)
    if x.ndim != 1 or x_shadows.ndim != 2 or x_shadows.shape[1:] != x.shape:
        raise ValueError(
            f"target of shape {x.shape} and shadows of shape {x_shadows.shape}: pass (N,) and "
            "(E, N) bits"
        )
    if inside.shape != x_shadows.shape or inside.dtype != np.bool_:
        raise ValueError(
            f"is_member must be bool of shape {x_shadows.shape}, not {inside.dtype} of shape "
            f"{inside.shape}: say for each shadow model and sequence whether it was trained on"
        )
    for name, values in (("target", x[None]), ("shadows", x_shadows)):
        wrong = np.flatnonzero(~np.isfinite(values).all(0))
        if wrong.size:
            raise ValueError(
                f"{name} has bits not finite for sequence {wrong[0]} ({wrong.size} of {len(x)} "
                "sequences): score it again, or leave it out"
            )
        if values.min(initial=0) < 0:
            raise ValueError(f"{name} has {values.min()} bits: pass -log2 of probabilities")
    for what, side in (("not trained", ~inside), ("trained", inside))[: 2 if online else 1]:
        few = np.flatnonzero(side.sum(0) < least)
        if few.size:
            raise ValueError(
                f"{side[:, few[0]].sum()} of {len(side)} shadow models were {what} on sequence "
                f"{few[0]} ({few.size} of {len(x)} sequences have fewer than {least}): train more "
                "shadow models, or use the offline form or the fixed variance"
            )
    return -x, -x_shadows, inside
