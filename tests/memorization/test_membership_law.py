"""The membership law: closed forms, simulated bits, runs of small models, the published table."""

from typing import Any

import numpy as np
import pytest

import fastmem
from fastmem.memorization.membership import auc
from fastmem.memorization.membership_law import (
    PUBLISHED,
    MembershipLaw,
    membership_law,
)

# Parameters, sequences, memorized bits a sequence (strict), AUC and F1 of the median rule: one
# layer of width 8, 12, 16 and 24 (V = 128, S = 16, 105 bits a sequence, 1200 steps of 128).
RUNS = [
    (2040, 430, 12.48, 0.999, 0.981),
    (2040, 780, 6.39, 0.983, 0.932),
    (2040, 1600, 2.61, 0.912, 0.827),
    (2040, 3100, 0.93, 0.779, 0.699),
    (2040, 6200, 0.28, 0.669, 0.621),
    (3636, 760, 11.98, 0.998, 0.976),
    (3636, 1400, 5.90, 0.979, 0.926),
    (3636, 2800, 1.84, 0.869, 0.784),
    (3636, 5500, 0.51, 0.724, 0.661),
    (3636, 11000, 0.09, 0.596, 0.568),
    (5616, 1200, 11.15, 0.998, 0.976),
    (5616, 2100, 5.54, 0.974, 0.920),
    (5616, 4300, 1.10, 0.801, 0.725),
    (5616, 8600, 0.08, 0.597, 0.566),
    (10728, 2200, 5.93, 0.972, 0.910),
    (10728, 4100, 0.95, 0.789, 0.716),
    (10728, 8200, 0.21, 0.645, 0.600),
]


def held_out_error(P: Any, N: Any, f1: Any, **settings: Any) -> float:
    """Mean error of F1 of the largest models, by the law fitted to all smaller models."""
    largest = np.equal(P, P.max())
    law = membership_law(P[~largest], N[~largest], f1[~largest], entropy=105.0, **settings)
    return float(np.abs(law.f1(P[largest], N[largest]) - f1[largest]).mean())


def test_closed_forms() -> None:
    """Fails if D nats do not give Φ(√D) and Φ(√(D / 2)), or nothing memorized is not chance."""
    ln2 = np.log(2)
    found = fastmem.expected_membership([0.0, -3.0, 1 / ln2, 8 / ln2], fpr=(0.5,))
    np.testing.assert_allclose(found["auc"], [0.5, 0.5, 0.841345, 0.997661], atol=1e-6)
    np.testing.assert_allclose(found["f1"], [0.5, 0.5, 0.760250, 0.977250], atol=1e-6)
    np.testing.assert_allclose(found["tpr_0.5"], [0.5, 0.5, 0.921350, 0.999968], atol=1e-6)


def test_it_is_what_roc_finds_on_such_bits() -> None:
    """Fails if a rate is not that of normal bits ∓D with the variance 2 D + spread²."""
    rng = np.random.default_rng(0)
    memorized, spread, count = 8.0, 5.0, 200_000
    nats = memorized * np.log(2)
    deviation = np.sqrt(2 * nats + (spread * np.log(2)) ** 2)
    members, others = (rng.normal(mean, deviation, count) for mean in (-nats, nats))
    expected = fastmem.expected_membership(memorized, spread=spread)
    threshold = np.quantile(others, 0.01)
    assert expected["f1"] == pytest.approx((members < 0).mean(), abs=0.005)
    assert expected["tpr_0.01"] == pytest.approx((members < threshold).mean(), abs=0.005)
    area = auc(members, others)
    assert expected["auc"] == pytest.approx(area, abs=0.005)


def test_memorized_bits_give_f1_of_trained_models_without_a_fit() -> None:
    """Fails if the theory misses measured F1 or AUC by a percentage point on average."""
    _, _, memorized, area, f1 = np.array(RUNS).T
    expected = fastmem.expected_membership(memorized)
    assert np.abs(expected["f1"] - f1).mean() < 0.006
    assert np.abs(expected["auc"] - area).mean() < 0.006


def test_memorized_bits_of_the_largest_model_beat_the_published_form() -> None:
    """Fails unless they miss its F1 by at most half of what the form refitted to the others does.

    They are measured on its members; what would be memorized of N sequences is another question.
    """
    P, N, memorized, _, f1 = np.array(RUNS).T
    published = held_out_error(P, N, f1, form="published")
    largest = P > 10_000
    theory = np.abs(fastmem.expected_membership(memorized[largest])["f1"] - f1[largest]).mean()
    assert theory < published / 2


def test_the_published_predictions() -> None:
    """Fails if the published form is not that of the table in arXiv 2505.24832."""
    law = MembershipLaw("published", PUBLISHED, entropy=704.0)
    sizes = [1_556_075_200, 1_556_075_200, 123_702_528, 123_702_528]
    counts = [170_654_583, 18_851_574, 13_566_442, 1_498_634]
    np.testing.assert_allclose(law.f1(sizes, counts), [0.55, 0.95, 0.55, 0.95], atol=0.005)


def test_memorized_bits_end_at_the_entropy() -> None:
    """Fails if the theory at N / P is not that of min(entropy, bits per parameter · P / N) bits."""
    law = MembershipLaw("theory", (3.0, 9.0), entropy=20.0)
    found = law.f1([100, 100, 100], [5, 15, 100])
    expected = fastmem.expected_membership([20.0, 20.0, 3.0], spread=9.0)["f1"]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_held_out_models_are_not_fitted() -> None:
    """Fails if the largest model takes part in the fit that is judged on it."""
    P, N = np.array([1000.0, 1000.0, 2000.0]), np.array([200.0, 400.0, 800.0])
    f1 = MembershipLaw("theory", (2.0, 0.0), entropy=105.0).f1(P, N)
    moved = f1 - [0, 0, 0.1]
    assert held_out_error(P, N, moved) == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize("values", [(3.6, 0.0), (2.0, 12.0), (1.0, 40.0)])
def test_a_fit_finds_the_values(values: tuple[float, float]) -> None:
    """Fails if the least squares of the theory do not end at the values of exact data."""
    P = np.repeat([1000.0, 4000.0], 8)
    N = P * np.tile(np.geomspace(0.02, 2, 8), 2)
    law = MembershipLaw("theory", values, entropy=105.0)
    found = membership_law(P, N, law.f1(P, N), entropy=105.0, uniform=values[1] == 0)
    np.testing.assert_allclose(found.values, values, rtol=1e-4)
    error = held_out_error(P, N, law.f1(P, N), uniform=values[1] == 0)
    assert error < 1e-4


def test_a_fit_of_the_published_form_finds_the_values() -> None:
    """Fails if the least squares of the published form do not end at the values of exact data."""
    P = np.full(12, 1000.0)
    N = P * np.geomspace(0.005, 0.12, 12)
    law = MembershipLaw("published", PUBLISHED, entropy=704.0)
    found = membership_law(P, N, law.f1(P, N), entropy=704.0, form="published")
    np.testing.assert_allclose(found.values, PUBLISHED, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "ours"}, r"form must be one of \('theory', 'published'\), not 'ours'"),
        ({"f1": [0.5]}, r"of shapes \(2,\), \(2,\) and \(1,\): give one of each for at least 1"),
        ({"form": "published"}, "give one of each for at least 3 runs"),
        ({"sequences": [0, 5]}, "sequences must be finite and above 0, not 0"),
        ({"entropy": np.nan}, "must be finite and above 0"),
    ],
)
def test_bad_input_is_one_line(change: dict[str, Any], message: str) -> None:
    """Fails if runs that have no law get one."""
    runs = {"parameters": [10, 20], "sequences": [5, 5], "f1": [0.9, 0.9], "entropy": 9.0}
    with pytest.raises(ValueError, match=message):
        membership_law(**{**runs, **change})
    for spread in (-1, np.inf, np.nan):
        with pytest.raises(ValueError, match=f"spread must be finite bits from 0 up, not {spread}"):
            fastmem.expected_membership(1.0, spread=spread)
    with pytest.raises(ValueError, match="memorized must be finite bits, not inf"):
        fastmem.expected_membership(np.inf)
    with pytest.raises(ValueError, match=r"fpr must be rates between 0 and 1, not \(0\.1, 1\)"):
        fastmem.expected_membership(1.0, fpr=(0.1, 1))
