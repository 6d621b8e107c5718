"""Commands that repeat rows, and checks of a folder of rows."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from cases.study_rows import S, V, study_row, study_rows

from fastmem.cli.capacity import Capacity, capacity_defaults
from fastmem.report.reproduce import budget, check_finished, commands
from fastmem.sweeps.config import LAPTOP, SweepConfig
from fastmem.sweeps.study import check_one_study

FOLDER = Path("here")


def keys(command: str) -> list[str]:
    """The keys of the runs that the command line would start."""
    words = shlex.split(command)
    assert words[:2] == ["fastmem", "capacity"]
    parsed = tyro.cli(Capacity, args=words[2:], default=capacity_defaults(words[2:]))
    assert parsed.sweep.out == FOLDER
    return [run.key for run in parsed.sweep.runs()]


def repeat(rows: list[dict[str, Any]]) -> list[str]:
    repeated = commands(rows, "here")
    made = [key for command in repeated for key in keys(command)]
    assert sorted(made) == sorted(row["key"] for row in rows)
    return repeated


def test_a_grid_is_one_command() -> None:
    """Fails if a full grid needs more than one command, or the command has other runs."""
    rows = [
        study_row(width, count, seed, precision, layers, lr=None)
        for width in (8, 16)
        for count in (4, 9)
        for seed in (0, 3)
        for precision in ("fp32", "bf16-mixed")
        for layers in (1, 2)
    ]
    (repeated,) = repeat(rows)
    assert f"--vocab {V} --length {S} --steps 100 --batch 8" in repeated
    assert "--width 8 16" in repeated
    assert "--lr" not in repeated


def test_the_laptop_preset_is_named_by_its_defaults() -> None:
    """Fails if data set sizes that follow from loads are listed shape by shape."""
    rows = [
        {
            "key": run.key,
            "model": vars(run.model),
            "sequences": {"count": run.sequences.count},
            "seed": run.train.seed,
            "precision": run.train.precision,
            "train": vars(run.train),
            "device": "cpu: a machine",
            "status": "done",
        }
        for run in SweepConfig().runs()
    ]
    assert len(rows) == 30
    assert repeat(rows) == ["fastmem capacity --device cpu --out here"]
    assert len(repeat(rows[:-1])) > 1


@pytest.mark.parametrize("seed", range(8))
def test_any_rows_are_made_again_each_once(seed: int) -> None:
    """Fails if rows that are not a grid, as counts="auto" gives, are lost or repeated twice."""
    rng = np.random.default_rng(seed)
    rows = {
        row["key"]: row
        for row in (
            study_row(
                int(rng.choice([8, 12, 16])),
                int(rng.choice([3, 5, 8, 13])),
                int(rng.integers(3)),
                str(rng.choice(["fp32", "bf16-mixed"])),
                int(rng.choice([1, 2])),
            )
            for _ in range(40)
        )
    }
    repeat(list(rows.values()))


def test_other_heads_and_budgets() -> None:
    """Fails if the command loses heads, epochs or a learning rate."""
    row = study_row(16, 5, steps=None, epochs=2.5, lr=0.003)
    row["model"]["heads"] = 2
    row["key"] = row["key"].replace("h8", "h2")
    (repeated,) = repeat([row])
    assert "--heads 2" in repeated
    assert "--epochs 2.5 --batch 8 --lr 0.003" in repeated
    assert "--sequence-bits" not in repeated
    (repeated,) = repeat([row | {"held_out_bits": 12.0}])
    assert "--sequence-bits" in repeated
    assert budget(row) == "2.5 epochs of up to 8 sequences, learning rate 0.003"


def test_until_converged() -> None:
    """Fails if the command or the budget in words loses --until or --tolerance."""
    row = study_row(16, 5)
    row["train"] |= {"until": "converged", "tolerance": 0.05}
    (repeated,) = repeat([row])
    assert "--until converged --tolerance 0.05" in repeated
    assert budget(row).startswith("until converged, at most 100 steps of up to 8 sequences")
    row["train"] |= {"until": "budget", "tolerance": 0.02}
    (repeated,) = repeat([row])
    assert "--until" not in repeated
    assert "--tolerance" not in repeated


def test_one_study() -> None:
    """Fails if rows of one study are refused, rows of two pass, or the error lacks a value."""
    rows = list(study_rows(precisions=("fp32", "bf16-mixed")))
    check_one_study(rows, FOLDER)
    other = study_row(24, 5, lr=0.01, steps=7)
    with pytest.raises(ValueError, match="more than one study") as error:
        check_one_study([*rows, other], FOLDER)
    text = str(error.value)
    assert f"lr is 0.04 in {len(rows)} (first {rows[0]['key']})" in text
    assert f"and 0.01 in 1 (first {other['key']})" in text
    assert "steps is 100 in" in text
    assert "batch" not in text


def test_finished() -> None:
    """Fails if a folder without a finished run has a report, or the error is left out."""
    lost = study_row(8, 5, error="Diverged: at step 3")
    check_finished([lost, study_row(8, 9)], FOLDER)
    with pytest.raises(ValueError, match="here holds no finished run, and 1 failed") as error:
        check_finished([lost], FOLDER)
    assert "Diverged: at step 3" in str(error.value)
    with pytest.raises(ValueError, match="and 0 failed: run `fastmem capacity --out here` first"):
        check_finished([], FOLDER)


def test_the_default_is_what_the_commands_leave_out() -> None:
    """Fails if the defaults of the command line differ from the laptop preset."""
    assert capacity_defaults([]).sweep == replace(LAPTOP, device="auto")
