"""What a sweep will cost: sums known by hand, and nothing written."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmem import SweepConfig, sweep
from fastmem.base.storage import write_json
from fastmem.cli.main import main
from fastmem.models.flops import flops_per_token, matmul_rate
from fastmem.models.sharded import Sharding
from fastmem.sweeps.config import PAPER
from fastmem.sweeps.groups import needed_flops, scored_tokens
from fastmem.sweeps.plan import Speed, duration, plan
from fastmem.training.memory import planned_peak

TINY = SweepConfig(width=(8, 12), vocab=16, length=4, counts=(4, 300), seeds=(0, 1), steps=50)
MARKS = 15
"""How many of 50 steps the 18 marks of a curve fall on: 1, 2, 4, 5, 7, 10, 13, 15, 20, … 50."""
HUGE = SweepConfig(
    layers=(48,), width=(1600,), vocab=50257, length=1024, loads=(2.0,), seeds=(0,), steps=10
)


def test_workers_are_a_note(tmp_path: Path) -> None:
    """Fails if the time of one process is shown as the time of several, or a plan needs Ray."""
    config, note = replace(TINY, out=tmp_path / "s"), "the time is for one process alone"
    for changed in (replace(config, workers=2), replace(config, ray="nowhere:1")):
        assert any(note in line for line in plan(changed, seconds=0.05).notes)
    assert not any(note in line for line in plan(config, seconds=0.05).notes)


def test_the_memory_of_ranks(tmp_path: Path) -> None:
    """Fails if the memory is that of a process alone, or of a smaller run, or is not noted."""
    grid = replace(TINY, width=(8,), counts=(64, 8), gpus_per_run=2, out=tmp_path / "s")
    found = plan(grid, seconds=0.1)
    (line,) = found.lines
    (run, *_) = grid.runs()
    peak = planned_peak(run.model, run.train, Sharding(), 2, 64, run.sequences.length, "cpu")
    assert line.bytes == peak.total
    assert "ranks divide it" in found.text()
    assert plan(replace(grid, counts="auto"), seconds=0.1).lines[0].bytes > 0


def test_sums_of_a_small_sweep(tmp_path: Path) -> None:
    """Fails if a run, a step or a score is not counted; the sums come from the config by hand."""
    out = tmp_path / "new"
    found = plan(replace(TINY, out=out), seconds=2.0)
    assert [(line.runs, line.done, line.model.width) for line in found.lines] == [
        (4, 0, 8),
        (4, 0, 12),
    ]
    # Two seeds, each with 4 and with 128 sequences a step; each mark scores 304 a seed.
    tokens = 2 * 50 * (4 + 128) * 4
    scored = 2 * MARKS * 304 * 4
    for line in found.lines:
        assert line.tokens == tokens
        expected = (tokens + scored / 3) * flops_per_token(line.model)
        assert line.flops == pytest.approx(expected)
        assert line.measured
        assert line.seconds > 0
        assert line.bytes > 16 * line.model.parameter_count
    assert not found.notes
    assert not out.exists()


def test_scores_are_counted_as_they_are_made(tmp_path: Path) -> None:
    """Fails if training scores its data set at other marks, or more often, than the plan counts."""
    runs = TINY.runs()
    config = replace(TINY, out=tmp_path, width=(8,), seeds=(0,), counts=(4,))
    for steps in (3, 50):
        out = tmp_path / str(steps)
        (row,) = sweep(replace(config, steps=steps, out=out), progress=False)
        run = replace(runs[0], train=replace(runs[0].train, steps=steps))
        assert len(row["curve"]) * 4 * 4 == scored_tokens(run)


def test_what_is_done_costs_nothing(tmp_path: Path) -> None:
    """Fails if finished runs are planned again, or count in the cost."""
    config = replace(TINY, out=tmp_path, width=(8,))
    whole = plan(config, seconds=0.05)
    running = sweep(config, progress=False)
    first = next(running)
    running.close()
    rest = plan(config, seconds=0.05)
    assert (rest.lines[0].runs, rest.lines[0].done) == (3, 1)
    (run,) = [run for run in config.runs() if run.key == first["key"]]
    assert whole.flops - rest.flops == pytest.approx(needed_flops(run))
    list(sweep(config, progress=False))
    done = plan(config, seconds=0.05)
    assert (done.lines[0].runs, done.lines[0].done, done.seconds, done.flops) == (0, 4, 0, 0)
    assert not done.notes


def test_a_plan_of_automatic_counts(tmp_path: Path) -> None:
    """Fails if only the first run of a model is planned, or finished runs are planned again."""
    config = replace(TINY, counts="auto", out=tmp_path, width=(8,))
    found = plan(config, seconds=0.05)
    assert (found.lines[0].runs, found.lines[0].done) == (4, 0)
    assert "a capacity of 2.7 bits per parameter" in found.notes[0]
    running = sweep(config, progress=False)
    next(running)
    running.close()
    assert plan(config, seconds=0.05).lines[0].done == 1


def test_failed_runs_are_left_and_a_group_takes_the_memory_of_its_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fails if a failed run counts as done, or the memory of a group is the memory of one run."""
    module = sys.modules["fastmem.sweeps.plan"]
    speed = Speed(1000.0, 4000.0, init_seconds=2.0, measured=True)
    monkeypatch.setattr(module, "_calibrate", lambda kinds, *_: [speed] * len(kinds))
    config = replace(TINY, width=(8,), out=tmp_path)
    running = sweep(config, progress=False)
    row = next(running)
    running.close()
    write_json(tmp_path / "rows" / f"{row['key']}.json", row | {"status": "failed", "error": "x"})
    alone = plan(config).lines[0]
    assert (alone.runs, alone.done) == (4, 0)
    monkeypatch.setattr(module, "group_size", lambda *_: 2)
    assert plan(config).lines[0].bytes == 2 * alone.bytes


def test_time_is_tokens_by_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if the time is not training + scoring + initializing + writing at measured speeds."""
    module = sys.modules["fastmem.sweeps.plan"]
    speed = Speed(1000.0, 4000.0, init_seconds=2.0, measured=True)
    monkeypatch.setattr(module, "_calibrate", lambda kinds, *_: [speed] * len(kinds))
    config = replace(TINY, width=(8,), out=tmp_path / "new")
    tokens, scored = 2 * 50 * (4 + 128) * 4, 2 * MARKS * 304 * 4
    expected = tokens / 1000 + scored / 4000 + 4 * (2.0 + 0.02)
    assert plan(config).seconds == pytest.approx(expected)
    timed = plan(replace(config, steps=None, seconds=30.0))
    assert timed.seconds == pytest.approx(4 * (30 + 2.02))
    marks = 18 * 4 / 4000  # seconds of scoring, for each sequence
    left = sum(2 * (30 - marks * count) for count in (4, 300))
    assert timed.lines[0].tokens == pytest.approx(1000 * left)


def test_a_grid_of_billions_on_a_laptop(tmp_path: Path) -> None:
    """Fails if a step of 1.5 billion parameters is tried, or its time is not scaled by FLOPs."""
    found = plan(replace(HUGE, out=tmp_path / "new"), seconds=0.5)
    (line,) = found.lines
    assert line.model.parameter_count == 1_557_611_200
    assert not line.measured
    assert "at the full matmul rate, so at least these" in found.notes[0]
    assert line.seconds == pytest.approx(line.flops / matmul_rate(), rel=0.01)
    assert "~" in found.text()


def test_large_models_follow_the_largest_that_was_measured(tmp_path: Path) -> None:
    """Fails if a group too slow to measure is planned at a speed that no group has reached."""
    config = replace(TINY, layers=(1, 48), width=(16, 1600), heads=(2,), counts=(300,), seeds=(0,))
    found = plan(replace(config, out=tmp_path / "new"), seconds=2.0)
    measured = [line for line in found.lines if line.measured]
    scaled = [line for line in found.lines if not line.measured]
    assert measured
    assert scaled
    largest = max(measured, key=lambda line: flops_per_token(line.model))
    found_rate, expected = (line.seconds / line.flops for line in (scaled[-1], largest))
    # The measured line also has the time to initialize models and write rows.
    assert found_rate == pytest.approx(expected, rel=0.5)
    assert "scaled by FLOPs from the largest group that was measured" in found.notes[0]


def test_an_unavailable_device(tmp_path: Path) -> None:
    """Fails if the published grid cannot be planned without its GPU, or does not say so."""
    paper = replace(
        PAPER, layers=(1,), width=(32,), device="cuda:77", seeds=(0,), out=tmp_path / "new"
    )
    found = plan(paper, seconds=0.2)
    assert found.notes[0] == "cuda:77 is unavailable: the times are of this CPU"
    assert found.lines[0].tokens == 7 * 10**6 * 64 * 2048 - 64 * 10**6 * sum(
        2048 - run.train.step_batch(run.sequences.count)
        for run in replace(paper, device="cpu").runs()
        if run.train.precision == "fp32"
    )


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if --plan trains, writes, or accepts an invalid grid."""
    assert plan.__defaults__ == (10.0, False)
    monkeypatch.setattr(plan, "__defaults__", (0.2, False))
    model = ["--width", "8", "--vocab", "16", "--length", "4"]
    flags = [*model, "--steps", "10", "--counts", "4", "8", "--seeds", "0"]
    out = tmp_path / "new"
    with pytest.raises(SystemExit) as stop:
        main(["capacity", "--plan", *flags, "--out", str(out)])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "2 runs to do, 0 done" in printed
    assert "1 × 8" in printed
    assert not out.exists()
    with pytest.raises(SystemExit) as stop:
        main(["capacity", "--plan", *flags, "--out", str(out), "--heads", "3"])
    assert stop.value.code == 2


def test_a_step_that_has_no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if a failed allocation ends the plan, or a group that did not fit is not scaled;
    without memory for the matmul rate, the plan must be an error that says so."""
    module = sys.modules["fastmem.sweeps.plan"]
    measured = module._measured  # type: ignore[attr-defined]

    def full(group: Any, *rest: Any) -> Any:
        if group[0].model.width == 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return measured(group, *rest)

    monkeypatch.setattr(module, "_measured", full)
    config = replace(TINY, counts=(300,), out=tmp_path / "new")
    found = plan(config, seconds=1.0)
    assert [line.measured for line in found.lines] == [True, False]
    assert "scaled by FLOPs from the largest group that was measured" in found.notes[0]

    def none(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(module, "matmul_rate", none)
    with pytest.raises(ValueError, match=r"no memory to measure how fast cpu is .*: free some, or"):
        plan(config, seconds=1.0)

    def other(*_: Any) -> Any:
        raise RuntimeError("another")

    monkeypatch.setattr(module, "matmul_rate", other)
    with pytest.raises(RuntimeError, match="another"):
        plan(config, seconds=1.0)


def test_until_converged_is_a_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if the numbers of runs that may stop early are not shown as upper limits."""
    speed = Speed(1000.0, 4000.0, init_seconds=2.0, measured=True)
    module = sys.modules["fastmem.sweeps.plan"]
    monkeypatch.setattr(module, "_calibrate", lambda kinds, *_: [speed] * len(kinds))
    config = replace(TINY, out=tmp_path / "new")
    text = plan(config).text()
    assert "0 done: 1.06e+05 tokens" in text
    assert ", about " in text
    text = plan(replace(config, until="converged")).text()
    assert "0 done: at most 1.06e+05 tokens" in text
    assert ", at most about " in text
    assert text.endswith("a run that converges before its budget is spent takes less")


def test_bad_input() -> None:
    """Fails if a calibration of 0 or infinite seconds gives numbers."""
    for seconds in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the calibration needs some seconds"):
            plan(TINY, seconds=seconds)
    for other in ("x", True, None):
        with pytest.raises(ValueError, match="seconds must be a number, got"):
            plan(TINY, seconds=other)  # type: ignore[arg-type]
    assert duration(59.6) == "60 s"
