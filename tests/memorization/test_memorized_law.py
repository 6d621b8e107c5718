"""The law of memorized bits: values it must find, and models that no fit has seen."""

from typing import Any

import numpy as np
import pytest
from memorization.test_membership_law import RUNS, held_out_error

import fastmem
from fastmem.memorization import memorized_law as memorized_law_module
from fastmem.memorization.memorized_law import MemorizedLaw, memorized_law, predicted_f1

LAW = MemorizedLaw(2.6, 55.0, 0.4, 2.5, parameters=4000.0)
P = np.repeat([1000.0, 2000.0, 4000.0, 8000.0, 16000.0], 7)
N = P * np.tile(np.geomspace(0.02, 2, 7), 5)
E = 2e5 / N


def test_closed_forms() -> None:
    """Fails if bits pass the entropy or the capacity, or half is not learned at the epochs of a
    size."""
    at = 55 * (16000 / 4000) ** 0.4
    found = LAW.memorized(16000, [10.0, 1000.0, 1000.0], [1e9, 1e9, at], entropy=105.0)
    np.testing.assert_allclose(found, [105.0, 2.6 * 16, 2.6 * 8], rtol=1e-5)
    assert LAW.memorized(16000, 1000, 1.0, 105.0) < 0.01


def test_a_fit_finds_the_values() -> None:
    """Fails if the search ends elsewhere, or the unit of parameters leaks into a value."""
    bits = LAW.memorized(P, N, E, 105.0)
    found = memorized_law(P, N, E, bits, entropy=105.0)
    assert found.bits_per_parameter == pytest.approx(2.6, rel=1e-3)
    assert found.exponent == pytest.approx(0.4, abs=1e-3)
    assert found.sharpness == pytest.approx(2.5, rel=1e-3)
    at = found.epochs * (4000 / found.parameters) ** found.exponent
    assert at == pytest.approx(55, rel=1e-3)
    again = memorized_law(P[:21], N[:21], E[:21], bits[:21], entropy=105.0, start=found)
    np.testing.assert_allclose(again.memorized(P, N, E, 105.0), bits, rtol=1e-3)


def test_the_largest_trained_model_is_predicted_twice_as_well() -> None:
    """Fails if F1 of the largest of four trained models, which no fit has seen, is not at most half
    as far off as by the published form, refitted to the same runs."""
    parameters, sequences, memorized, _, f1 = np.array(RUNS).T
    epochs = 1200 * 128 / sequences
    kept = parameters < parameters.max()
    law = memorized_law(
        parameters[kept], sequences[kept], epochs[kept], memorized[kept], entropy=105.0
    )
    bits = law.memorized(parameters[~kept], sequences[~kept], epochs[~kept], 105.0)
    ours = np.abs(fastmem.expected_membership(bits)["f1"] - f1[~kept]).mean()
    published = held_out_error(parameters, sequences, f1, form="published")
    assert ours < 0.07 < published / 2


def test_intervals_hold_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the interval of one more model, whose bits scatter as those of the fit, rarely holds
    it, or leaves out the estimate."""
    monkeypatch.setattr(memorized_law_module, "REPLICATES", 60)
    rng, inside = np.random.default_rng(0), 0
    target = (32000.0, 16000.0, 12.5, 105.0)
    true = float(np.sqrt(LAW.memorized(*target)))
    for seed in range(10):
        noise = rng.normal(0, 0.15, len(P))
        roots = np.sqrt(LAW.memorized(P, N, E, 105.0)) + noise
        runs = [P, N, E, np.maximum(roots, 0) ** 2, np.full(len(P), 105.0)]
        ((bits, f1),) = predicted_f1(runs, P, [target], seed=seed)
        one = max(0.0, true + rng.normal(0, 0.15)) ** 2
        assert bits.low is not None
        assert bits.high is not None
        inside += bits.low <= one <= bits.high
        assert f1.low is not None
        assert f1.high is not None
        assert 0.5 <= f1.low <= f1.estimate <= f1.high <= 1
    assert 7 <= inside <= 10


def test_a_model_with_most_of_the_runs() -> None:
    """Fails if a draw of models with few runs is fitted."""
    few = np.concatenate([np.flatnonzero(1000.0 * 2**i == P)[:n] for i, n in enumerate((6, 1, 1))])
    runs = [x[few] for x in (P, N, E, LAW.memorized(P, N, E, 105.0), np.full(len(P), 105.0))]
    ((bits, _),) = predicted_f1(runs, P[few], [(32000.0, 16000.0, 12.5, 105.0)])
    assert bits.low is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": E[:-1]}, "give one of each for at least 4 runs"),
        (
            {"parameters": P[:3], "sequences": N[:3], "epochs": E[:3], "memorized": E[:3]},
            "at least 4",
        ),
        ({"sequences": -N}, "must be finite and above 0"),
        ({"memorized": np.full(len(P), np.nan)}, "memorized must be finite, not nan"),
        ({"entropy": 0.0}, "must be finite and above 0"),
    ],
)
def test_bad_input_is_one_line(change: dict[str, Any], message: str) -> None:
    """Fails if runs that have no law get one, or the error takes more than a line."""
    given: dict[str, Any] = {"parameters": P, "sequences": N, "epochs": E}
    given |= {"memorized": LAW.memorized(P, N, E, 105.0), "entropy": 105.0}
    with pytest.raises(ValueError, match=message) as error:
        memorized_law(**given | change)
    assert "\n" not in str(error.value)
