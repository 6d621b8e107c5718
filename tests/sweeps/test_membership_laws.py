"""Laws of membership over folders: held out honestly, and predicted from the command line."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.study_rows import study_row, write_bits, write_rows

from fastmem.cli.main import main
from fastmem.memorization.membership_law import expected_membership
from fastmem.memorization.memorized_law import MemorizedLaw
from fastmem.sweeps import membership_laws
from fastmem.sweeps.membership import membership_rows
from fastmem.sweeps.membership_laws import compared, fitted, study_of

LAW = MemorizedLaw(2.6, 40.0, 0.5, 2.5, parameters=1000.0)
SIZES = {4: 300, 8: 1000, 12: 2000, 16: 4000}


def record(width: int, load: float) -> dict[str, Any]:
    """A run whose bits follow the law and whose F1 follows from its bits."""
    P = SIZES[width]
    N = max(2, round(P * load))
    bits = float(LAW.memorized(P, N, 1e5 / N, 105.0))
    f1 = float(expected_membership(bits)["f1"])
    return {
        "layers": 1, "width": width, "heads": 1, "precision": "fp32", "parameters": P, "count": N,
        "epochs": 1e5 / N, "memorized_bits_per_sequence": bits, "coded_bits_per_sequence": 105.0,
        "member_bits": 105 - bits, "held_out_bits": 105 + bits, "member_deviation": 1.0,
        "f1": {"estimate": f1},
    }  # fmt: skip


def records() -> list[dict[str, Any]]:
    return [record(width, load) for width in SIZES for load in np.geomspace(0.05, 2, 6)]


def test_the_left_out_model_is_not_fitted() -> None:
    """Fails if the runs of the left-out model move the fit that predicts them."""
    found = compared(study_of(records()))
    assert found["better"] == "budget"
    assert found["largest"]["budget"] < 1e-3 < found["largest"]["published"]
    assert found["left_out"] == 4000
    moved = records()
    for one in moved:
        if one["width"] == 16:
            one["f1"] = {"estimate": one["f1"]["estimate"] - 0.1}
            one["memorized_bits_per_sequence"] = 50.0
    largest = compared(study_of(moved))["largest"]
    assert largest["budget"] == pytest.approx(0.1, abs=1e-3)


def test_without_an_entropy_half_the_distance_counts() -> None:
    """Fails if text, whose entropy is unknown, has other bits than half the distance of members and
    held-out sequences, or no spread of difficulty."""
    text = records()
    for one in text:
        one["memorized_bits_per_sequence"] = None
        bits = (one["held_out_bits"] - one["member_bits"]) / 2
        one["member_deviation"] = np.sqrt(9.0 + 2 * bits / np.log(2))
    study = study_of(text)
    np.testing.assert_allclose(study.memorized, study_of(records()).memorized, rtol=1e-9)
    assert study.spread == pytest.approx(3.0)
    assert study_of(records()).spread == 0
    assert set(fitted(study)) == set(membership_laws.FORMS)


def test_too_few_runs_are_one_line() -> None:
    """Fails if two sizes of models give a law."""
    two = [one for one in records() if one["width"] < 12]
    with pytest.raises(ValueError, match="12 runs of 2 model sizes"):
        study_of(two)


@cache
def drawn(count: int, mean: float, nats: float) -> Any:
    return np.random.default_rng(count).normal(mean, np.sqrt(2 * nats) / np.log(2) + 1e-6, count)


def folder(path: Path, widths: tuple[int, ...]) -> Path:
    """A sweep of made-up runs, with bits that follow the law."""
    rows = []
    for width in widths:
        for load in (0.05, 0.1, 0.2, 0.5, 1.0):
            row = study_row(width, max(20, round(3 * 10 * width * load)), 0)
            P, N = row["parameters"], row["sequences"]["count"]
            entropy = row["coded_entropy_bits"] / N
            bits = float(LAW.memorized(P, N, 1e4 / N, entropy))
            row["epochs"], row["memorized_bits"]["strict"] = 1e4 / N, bits * N
            rows.append(row)
            nats = bits * np.log(2)
            members, others = (drawn(N, entropy + sign * bits, nats) for sign in (-1, 1))
            path.mkdir(exist_ok=True)
            write_bits(path, row["key"], members, others)
    return write_rows(path, rows)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if several folders are not one study, a prediction lacks an interval, an error takes
    more than a line, or the published models are missing."""

    def ran(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, words)))
        printed = capsys.readouterr()
        return int(f"{stop.value.code}"), printed.out, printed.err

    one, two = folder(tmp_path / "one", (8, 16)), folder(tmp_path / "two", (24,))
    assert len(membership_rows(one, [])) == 0
    code, text, _ = ran("predict", "--membership", one, two, "--layers", 1, "--width", 32,
                        "--count", 200, "--epochs", 50, "--json")  # fmt: skip
    assert code == 0
    found = json.loads(text)
    assert found["laws"]["runs"] == 15
    assert len(found["laws"]["sizes"]) == 3
    assert [model["observed"] for model in found["published_models"]] == [
        0.5461, 0.9585, 0.5344, 0.9798,
    ]  # fmt: skip
    prediction = found["prediction"]["budget"]
    assert prediction["low"] <= prediction["estimate"] <= prediction["high"]
    code, text, _ = ran("predict", "--membership", one, two)
    assert code == 0
    assert "predicts better" in text
    for words, message in (
        ((one, "--count", "5"), "--count is for --membership"),
        ((one, two), "2 folders without --membership"),
        ((one, "--membership"), "10 runs of 2 model sizes with stored bits, 5 without the"),
        ((one, two, "--membership", "--layers", 1, "--width", 8), "--count is missing"),
        ((one, two, "--membership", "--layers", 1, "--width", 8, "--count", 0),
         "--count must be from 1 to"),
        ((one, two, "--membership", "--layers", 1, "--width", 8, "--count", 9, "--epochs", 0),
         "--epochs must be above 0"),
    ):  # fmt: skip
        code, _, errors = ran("predict", *words)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert message in errors
