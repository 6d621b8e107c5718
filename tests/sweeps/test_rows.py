"""Rows of runs, and their summary in capacity.json."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from cases.sweep_rows import TINY, finish

from fastmem import GPTConfig, UniformSequences, from_description, load_rows
from fastmem.sweeps.job import run_alone
from fastmem.sweeps.rows import report


def test_a_row_says_which_sequences(tmp_path: Path) -> None:
    """Fails if a row does not determine its data set, or older fields are renamed."""
    run = TINY.runs()[0]
    row, _ = run_alone(run, "cpu", tmp_path / "c", progress=False)
    assert from_description(row["sequences"]) == run.sequences
    assert {"count", "length", "vocab", "seed", "start"} <= row["sequences"].keys()


def test_unknown_entropy_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if unknown entropy is written as NaN, which JSON cannot hold, or as a number."""
    monkeypatch.setattr(UniformSequences, "_entropy_from", lambda *_: math.nan)
    row, _ = run_alone(TINY.runs()[0], "cpu", tmp_path / "c", progress=False)
    json.dumps(row, allow_nan=False)
    assert row["status"] == "done"
    assert row["entropy_bits"] is None
    assert row["coded_entropy_bits"] is None
    assert row["memorized_bits"] == {"strict": None, "published": None}
    assert {point["memorized_bits"] for point in row["curve"]} == {None}


def test_rows_hold_result_config_and_environment(tmp_path: Path) -> None:
    """Fails if a row leaves out its config, result or environment."""
    rows = finish(replace(TINY, out=tmp_path))
    assert sorted(row["key"] for row in load_rows(tmp_path)) == sorted(r["key"] for r in rows)
    row = rows[0]
    assert row["status"] == "done"
    assert row["parameters"] == GPTConfig(**row["model"]).parameter_count
    assert row["memorized_bits"]["published"] == row["memorized_bits"]["strict"] * 4 / 3
    assert row["steps"] == 12
    measured = ("seconds", "tokens_per_second", "flops_per_second", "mfu", "peak_bytes")
    for name in ("version", "torch", "device", "threads", "generator", *measured):
        assert row[name], name
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_summary(tmp_path: Path) -> None:
    """Fails if capacity.json lacks a documented field."""
    finish(replace(TINY, out=tmp_path))
    summary = report(tmp_path)
    assert {"strict", "published"} == summary["bits_per_parameter"].keys()
    assert {"version", "commit", "torch", "device", "seconds"} <= summary.keys()
    model = summary["models"][1]
    assert (model["width"], model["heads"], model["vocab"], model["length"]) == (12, 2, 16, 4)
    assert model["saturated"] is (model["why_not"] is None)
    assert {"estimate", "low", "high"} == model["capacity_bits"]["strict"].keys()
    strict = model["bits_per_parameter"]["strict"]["estimate"]
    assert strict == model["capacity_bits"]["strict"]["estimate"] / model["parameters"]
    run = model["runs"][0]
    assert {"count", "seed", "status", "entropy_bits", "memorized_bits", "epochs", "steps"} <= (
        run.keys()
    )
    assert summary["seconds"] == pytest.approx(sum(r["seconds"] for r in load_rows(tmp_path)))
