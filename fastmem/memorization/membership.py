"""Membership scores: how well bits tell members from held-out sequences."""

import numpy as np

from fastmem.base.stats import Floats


def auc(members: Floats, held_out: Floats) -> float:
    """Fraction of pairs in which the member has fewer bits than the held-out sequence.

    Computes `(members[:, None] < held_out).mean()` with ties counted half: the area under the ROC
    curve of a threshold on bits.

    Example:
        >>> auc(np.array([1.0, 2.0]), np.array([2.0, 3.0]))
        0.875
    """
    others = np.sort(held_out)
    above = len(others) - np.searchsorted(others, members, "right")
    equal = len(others) - np.searchsorted(others, members, "left") - above
    return float((above + equal / 2).mean() / len(others))
