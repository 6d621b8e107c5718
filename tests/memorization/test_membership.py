"""Membership scores against all pairs."""

import numpy as np
import pytest

from fastmem.memorization.membership import auc


def test_auc_is_the_fraction_of_pairs() -> None:
    """Fails if the AUC is not the mean over all pairs, with ties counted half."""
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 9, 40) * 1.0, rng.integers(4, 12, 25) * 1.0
    pairs = (members[:, None] < others) + (members[:, None] == others) / 2
    assert auc(members, others) == pytest.approx(pairs.mean())
    assert auc(others, others) == 0.5
