"""What rows share, and the commands that make them again."""

import shlex
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
    """The runs that a command makes, as the command line reads it."""
    words = shlex.split(command)
    assert words[:2] == ["fastmem", "capacity"]
    parsed = tyro.cli(Capacity, args=words[2:], default=capacity_defaults(words[2:]))
    assert parsed.sweep.out == FOLDER
    return [run.key for run in parsed.sweep.runs()]


def made_again(rows: list[dict[str, Any]]) -> list[str]:
    told = commands(rows, "here")
    made = [key for command in told for key in keys(command)]
    assert sorted(made) == sorted(row["key"] for row in rows)
    return told


def test_a_grid_is_one_command() -> None:
    """Fails if a whole grid needs more than one command, or the command makes other runs."""
    rows = [
        study_row(width, count, seed, precision, layers, lr=None)
        for width in (8, 16)
        for count in (4, 9)
        for seed in (0, 3)
        for precision in ("fp32", "bf16-mixed")
        for layers in (1, 2)
    ]
    (told,) = made_again(rows)
    assert f"--vocab {V} --length {S} --steps 100 --batch 8" in told
    assert "--width 8 16" in told
    assert "--lr" not in told


def test_the_laptop_preset_is_named_by_its_defaults() -> None:
    """Fails if data set sizes that the loads give are listed shape by shape."""
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
    assert made_again(rows) == ["fastmem capacity --out here"]
    assert len(made_again(rows[:-1])) > 1


@pytest.mark.parametrize("seed", range(8))
def test_any_rows_are_made_again_each_once(seed: int) -> None:
    """Fails if rows that are no grid, as adaptive sizes leave them, are lost or made twice."""
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
    made_again(list(rows.values()))


def test_other_heads_and_budgets() -> None:
    """Fails if heads that are not the default, epochs or a learning rate get lost."""
    row = study_row(16, 5, steps=None, epochs=2.5, lr=0.003)
    row["model"]["heads"] = 2
    row["key"] = row["key"].replace("h8", "h2")
    (told,) = made_again([row])
    assert "--heads 2" in told
    assert "--epochs 2.5 --lr 0.003" in told
    assert "--sequence-bits" not in told
    (told,) = made_again([row | {"held_out_bits": 12.0}])
    assert "--sequence-bits" in told
    assert budget(row) == "2.5 epochs of up to 8 sequences, learning rate 0.003"


def test_until_converged_is_told() -> None:
    """Fails if the command makes runs that spend a whole budget, or the page says that they did."""
    row = study_row(16, 5)
    row["train"] |= {"until": "converged", "tolerance": 0.05}
    (told,) = made_again([row])
    assert "--until converged --tolerance 0.05" in told
    assert budget(row).startswith("until converged, at most 100 steps of up to 8 sequences")
    row["train"] |= {"until": "budget", "tolerance": 0.02}
    (told,) = made_again([row])
    assert "--until" not in told
    assert "--tolerance" not in told


def test_one_study() -> None:
    """Fails if rows of one study are refused, or two studies pass or are not named."""
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
    """Fails if a folder in which no run finished has a report, or the error is not told."""
    lost = study_row(8, 5, error="Diverged: at step 3")
    check_finished([lost, study_row(8, 9)], FOLDER)
    with pytest.raises(ValueError, match="here holds no finished run, and 1 failed") as error:
        check_finished([lost], FOLDER)
    assert "Diverged: at step 3" in str(error.value)
    with pytest.raises(ValueError, match="and 0 failed: run `fastmem capacity --out here` first"):
        check_finished([], FOLDER)


def test_the_default_is_what_the_commands_leave_out() -> None:
    """Fails if the defaults of the command line are no longer those of the laptop preset."""
    assert capacity_defaults([]).sweep == LAPTOP
