"""Rates, F1 and intervals against scikit-learn, closed forms and loops over thresholds."""

from typing import Any

import numpy as np
import pytest

import fastmem
from fastmem.memorization import roc as module
from fastmem.memorization.roc import roc_points


def drawn(members: int, others: int, shift: float, seed: int = 0, ties: int = 0) -> Any:
    """Normal scores, members higher by `shift`, and labels; rounded to 1 / ties."""
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(shift, 1, members), rng.normal(0, 1, others)])
    order = rng.permutation(members + others)
    labels = np.repeat([1, 0], [members, others])
    return (np.round(scores * ties) / ties if ties else scores)[order], labels[order]


@pytest.mark.parametrize("ties", [0, 1])
def test_auc_and_curve_are_those_of_scikit_learn(ties: int) -> None:
    """Fails if the area or a point of the curve differs from scikit-learn's, with ties or not."""
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels = drawn(300, 150, 0.7, ties=ties)
    result = fastmem.roc(scores, labels)
    assert result.auc.estimate == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
    fpr, tpr, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(roc_points(scores, labels), (fpr, tpr))
    best = max((1 + t - f) / 2 for f, t in zip(fpr, tpr, strict=True))
    assert result.balanced_accuracy.estimate == pytest.approx(best)


@pytest.mark.parametrize("ties", [0, 2])
def test_low_fpr_is_the_best_of_all_thresholds(ties: int) -> None:
    """Fails if a threshold with few enough false positives has a higher TPR, or ties are split."""
    scores, labels = drawn(500, 1000, 1.0, ties=ties)
    members, others = scores[labels == 1], scores[labels == 0]
    for rate, found in fastmem.roc(scores, labels, fpr=(0.05, 0.01, 0.001)).tpr.items():
        fits = [t for t in scores if (others > t).mean() <= rate]
        assert found.tpr
        assert found.fpr
        assert found.tpr.estimate == max((members > t).mean() for t in fits)
        assert found.fpr.estimate == max((others > t).mean() for t in fits)


def test_a_result_is_short() -> None:
    """Fails if the quality of a score fills a screen."""
    found = fastmem.roc(np.arange(40.0), np.arange(40) > 19)
    assert repr(found) == "Roc(AUC 1.000 [1.000, 1.000], 20 members, 20 non-members)"


def test_one_of_a_thousand() -> None:
    """Fails if the interval of the rate that the threshold really has is not the exact one."""
    scores, labels = drawn(1000, 1000, 1.0)
    low = fastmem.roc(scores, labels).tpr[0.001]
    assert low.fpr
    assert low.fpr.low == pytest.approx(0.0025e-2, rel=0.02)
    assert low.fpr.high == pytest.approx(0.56e-2, rel=0.01)


def test_what_cannot_be_told_is_said() -> None:
    """Fails if 0.1 % of 200 non-members gets a number."""
    scores, labels = drawn(1000, 200, 1.0)
    result = fastmem.roc(scores, labels)
    assert result.tpr[0.001].reason == (
        "cannot be told: 0.1 % of 200 non-members is less than one sequence"
    )
    plain = result.to_dict()["tpr"]
    assert plain["0.001"]["estimate"] is None
    assert plain["0.01"]["fpr"]["estimate"] == 0.01


def f1(scores: Any, labels: Any, threshold: float) -> float:
    """F1 of calling scores from the threshold up members, by its definition."""
    called = scores >= threshold
    hits = (called & (labels == 1)).sum()
    return float(2 * hits / (called.sum() + (labels == 1).sum())) if hits else 0.0


def test_f1_by_three_rules() -> None:
    """Fails if a rule is not its loop: calibrated on one half, the upper half, always."""
    scores, labels = drawn(60, 60, 1.0)
    places = np.unique(scores, return_inverse=True)[1]
    best1, best0 = (np.flatnonzero(labels == label)[::2] for label in (1, 0))
    test1, test0 = (np.flatnonzero(labels == label)[1::2] for label in (1, 0))
    best, test = np.append(best1, best0), np.append(test1, test0)
    chosen = max(scores[best], key=lambda t: (f1(scores[best], labels[best], t), t))
    halves = [np.bincount(places[h], minlength=120)[None] for h in (best1, test1, best0, test0)]
    (calibrated,) = module._f1_calibrated(*halves)
    assert calibrated == pytest.approx(f1(scores[test], labels[test], chosen))
    result = fastmem.roc(scores, labels).f1
    assert 0.6 < result["calibrated"].estimate < 0.8
    assert result["median"].estimate == pytest.approx(f1(scores, labels, float(np.median(scores))))
    assert result["always"].estimate == pytest.approx(f1(scores, labels, -np.inf)) == 2 / 3


def test_scores_without_signal() -> None:
    """Fails if equal scores are anything but chance by any rule, ties at the median included."""
    result = fastmem.roc(np.zeros(100), np.arange(100) % 2)
    assert result.auc.estimate == result.balanced_accuracy.estimate == 0.5
    assert result.f1["median"].estimate == 0.5
    assert result.f1["calibrated"].estimate == pytest.approx(2 / 3)


def test_unequal_sets_are_balanced_and_said() -> None:
    """Fails if F1 counts more members than non-members, or the draw is not said."""
    result = fastmem.roc(*drawn(900, 100, 0.0))
    assert result.balanced == "100 members and 100 non-members, a random 100 of 900 members"
    assert result.f1["calibrated"].estimate < 0.75  # 0.95 on the sets as they are
    assert fastmem.roc(*drawn(50, 50, 0.0)).balanced == "50 members and 50 non-members"


def test_order_and_increasing_functions_change_nothing() -> None:
    """Fails if ranks do not decide, or the place of a sequence matters to what needs no halves."""
    scores, labels = drawn(80, 120, 0.8, ties=4)
    result = fastmem.roc(scores, labels, fpr=(0.05,))
    assert fastmem.roc(np.exp(3 * scores), labels, fpr=(0.05,)) == result
    moved = fastmem.roc(scores[::-1], labels[::-1], fpr=(0.05,))
    for name in ("auc", "balanced_accuracy"):
        assert getattr(moved, name).estimate == getattr(result, name).estimate
    assert moved.tpr == result.tpr
    opposite = fastmem.roc(-scores, labels).auc.estimate
    assert opposite == pytest.approx(1 - result.auc.estimate)


def test_intervals_hold_the_truth() -> None:
    """Fails if the bootstrap of the AUC covers the truth of a normal shift too seldom."""
    truth = 0.7602499  # Φ(1 / √2)
    inside = 0
    for seed in range(60):
        interval = fastmem.roc(*drawn(60, 60, 1.0, seed=seed)).auc
        assert interval.low is not None
        assert interval.high is not None
        inside += interval.low <= truth <= interval.high
    assert 51 <= inside <= 60  # 57 of 60 are expected, 51 or fewer have a chance of 1 %


@pytest.mark.parametrize("count", [60, 61])  # 32-bit draws leave half a word behind
def test_the_same_seed_gives_the_same_intervals(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the bootstrap is not seeded, or its size of pieces changes the result."""
    scores, labels = drawn(count, 45, 0.5)
    found = fastmem.roc(scores, labels)
    for chunk in (1, 1000, 2**20):
        monkeypatch.setattr(module, "CHUNK", chunk)
        assert fastmem.roc(scores, labels) == found
    assert fastmem.roc(scores, labels).auc != fastmem.roc(scores, labels, seed=1).auc


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros(30), np.zeros(31), r"scores of shape \(30,\) and labels of shape \(31,\)"),
        (np.zeros(30), np.ones(30), "30 members and 0 non-members: give at least 20 of each"),
        (np.zeros(40), np.arange(40) < 19, "19 members and 21 non-members: give at least 20"),
        (np.zeros(40), np.arange(40) - 1, "labels must be 0 or 1, not -1"),
        (
            np.where(np.arange(40) == 7, np.nan, 0),
            np.arange(40) % 2,
            r"the score of sequence 7 is nan \(1 of 40\): score the sequence again",
        ),
    ],
)
def test_bad_input_is_one_line(scores: Any, labels: Any, message: str) -> None:
    """Fails if one class, too few sequences or nan get a result."""
    with pytest.raises(ValueError, match=message):
        fastmem.roc(scores, labels)
    with pytest.raises(ValueError, match="fpr must be rates between 0 and 1"):
        fastmem.roc(np.zeros(40), np.arange(40) % 2, fpr=(1,))
