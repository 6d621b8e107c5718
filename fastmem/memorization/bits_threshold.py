"""How well a threshold on bits tells members from non-members, without draws, for sweeps.

M members, N non-members.
"""

import math
from collections.abc import Sequence

import numpy as np

from fastmem.base.stats import Floats, Interval, clopper_pearson
from fastmem.memorization.membership import auc
from fastmem.memorization.roc import low_fpr, median_f1

FPR = (0.01, 0.001)


def threshold_quality(
    members: Floats, non_members: Floats, fpr: Sequence[float] = FPR
) -> dict[str, Interval | None]:
    """AUC, F1 and low true positive rates of a threshold on bits, with intervals without draws.

    The estimates are those of `fastmem.roc(-bits, labels)` for as many members as non-members. The
    interval of the AUC is normal, with DeLong's variance. F1 by the median rule, the fraction of
    members in the cheaper half, has the Clopper-Pearson interval of a fraction, which is wider than
    that of a bootstrap.

    Args:
        members: (M,) bits.
        non_members: (N,) bits.
        fpr: false positive rates.

    Returns:
        "auc", "f1" and "tpr_0.01" and so on; None where the rate is less than one non-member.

    Example:
        >>> quality = threshold_quality(np.arange(100.0), np.arange(50.0, 150.0))
        >>> quality["auc"].estimate, round(quality["f1"].estimate, 9), quality["tpr_0.001"]
        (0.875, 0.75, None)

    Source: the variance, DeLong et al., Biometrics 44 (1988).
    """
    ours, theirs = np.sort(members), np.sort(non_members)
    rates = {f"tpr_{rate:g}": low_fpr(-ours, -theirs, rate).tpr for rate in fpr}
    return {"auc": _auc(ours, theirs), "f1": _f1(ours, theirs), **rates}


def _auc(ours: Floats, theirs: Floats) -> Interval:
    """The fraction of pairs in which the member is cheaper."""
    area = auc(ours, theirs)
    variance = 0.0
    for values, others in ((ours, theirs), (theirs, ours)):
        below = np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")
        places = below / (2 * len(others))
        if len(values) > 1:
            variance += float(places.var(ddof=1)) / len(values)
    error = 1.96 * math.sqrt(variance)
    return Interval(area, max(0.0, area - error), min(1.0, area + error))


def _f1(ours: Floats, theirs: Floats) -> Interval:
    """The fraction of members in the cheaper half of both sets at equal weight."""
    M, N = len(ours), len(theirs)
    distinct, places = np.unique(-np.concatenate([ours, theirs]), return_inverse=True)
    counts = [np.bincount(part, minlength=len(distinct)) for part in np.split(places, [M])]
    f1 = float(median_f1(N * counts[0][None], M * counts[1][None])[0])
    exact = clopper_pearson(round(f1 * M), M)
    return Interval(f1, exact.low, exact.high)
