"""Membership by a threshold on bits, without draws, against `roc` and against a bootstrap."""

import numpy as np
import pytest

import fastmem
from fastmem.memorization.bits_threshold import threshold_quality


@pytest.mark.parametrize("distance", [0.0, 0.5, 3.0, 50.0])
@pytest.mark.parametrize("digits", [0, 9])  # 0: many ties
def test_estimates_are_those_of_roc(distance: float, digits: int) -> None:
    """Fails if AUC, F1 or a low true positive rate differs from `roc`, ties included, or if the
    interval of the AUC differs from that of its bootstrap."""
    rng = np.random.default_rng(3)
    members = rng.normal(0, 2, 2000).round(digits)
    others = rng.normal(distance, 2, 2000).round(digits)
    found = threshold_quality(members, others)
    labels = np.repeat([1, 0], 2000)
    expected = fastmem.roc(-np.r_[members, others], labels)
    auc, f1 = found["auc"], found["f1"]
    assert auc is not None
    assert f1 is not None
    assert auc.estimate == pytest.approx(expected.auc.estimate, abs=1e-12)
    assert f1.estimate == pytest.approx(expected.f1["median"].estimate, abs=1e-12)
    assert auc.low == pytest.approx(expected.auc.low, abs=0.004)
    assert auc.high == pytest.approx(expected.auc.high, abs=0.004)
    assert f1.low is not None
    assert f1.low <= expected.f1["median"].low + 1e-9  # wider
    for fpr in (0.01, 0.001):
        assert found[f"tpr_{fpr:g}"] == expected.tpr[fpr].tpr


def test_few_sequences() -> None:
    """Fails if a rate below one sequence is told, or sets of other sizes need as many members."""
    found = threshold_quality(np.arange(4.0), np.arange(2.0, 32.0))
    assert (found["tpr_0.01"], found["tpr_0.001"]) == (None, None)
    auc, f1 = found["auc"], found["f1"]
    assert auc is not None
    assert f1 is not None
    assert auc.estimate == (30 + 30 + 29.5 + 28.5) / 120
    # Of 30 copies of each member as many as non-members, the cheaper half has all members.
    copies = threshold_quality(np.repeat(np.arange(4.0), 30), np.repeat(np.arange(2.0, 32.0), 4))
    assert copies["f1"] is not None
    assert f1.estimate == pytest.approx(copies["f1"].estimate)
