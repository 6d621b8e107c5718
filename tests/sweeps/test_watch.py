"""The state of a sweep, read from its folder."""

import io
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cases.sweep_rows import TINY, command, put, row
from rich.console import Console

from fastmem import sweep
from fastmem.base.lock import locked
from fastmem.base.storage import write_json
from fastmem.report.sections import unfinished
from fastmem.sweeps.rows import report
from fastmem.sweeps.store import PLANNED
from fastmem.sweeps.watch import RUNNING, Watcher, progress_table


def test_a_sweep_at_work(tmp_path: Path) -> None:
    """Fails if a running sweep is not shown as running, or looking changes the sweep."""
    config = replace(TINY, out=tmp_path)
    watcher = Watcher(tmp_path)
    running = sweep(config, progress=False)
    for number in range(1, 4):
        next(running)
        seen = watcher.look()
        assert (seen.at_work, seen.planned, seen.done, seen.failed) == (True, 8, number, 0)
        assert seen.seconds_left is not None
    assert seen.best[0].runs == 3
    running.close()
    stopped = watcher.look()
    assert (stopped.at_work, stopped.running, stopped.seconds_left) == (False, (), None)
    assert len(list(sweep(config, progress=False))) == 5
    assert watcher.look().done == 8


def test_running_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the running run is not shown, or is still shown after its end."""
    seen = []

    def looked(*arguments: Any, **named: Any) -> Any:
        seen.append(Watcher(tmp_path).look().running)
        return trained(*arguments, **named)

    module = sys.modules["fastmem.sweeps.job"]
    trained = module.train_many  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "train_many", looked)
    rows = list(sweep(replace(TINY, out=tmp_path), progress=False))
    assert [key for running in seen for key, _ in running] == [one["key"] for one in rows]
    assert not list((tmp_path / RUNNING).iterdir())


def test_marks_of_a_killed_sweep(tmp_path: Path) -> None:
    """Fails if the runs of a killed sweep are shown as running, now or in the next sweep."""
    (tmp_path / RUNNING).mkdir()
    (tmp_path / RUNNING / "lost").touch()
    (tmp_path / "lock").touch()
    assert Watcher(tmp_path).look().running == ()
    running = sweep(replace(TINY, out=tmp_path), progress=False)
    next(running)
    assert Watcher(tmp_path).look().running == ()
    running.close()


@pytest.fixture(name="locked")
def locked_folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of a running sweep."""
    with locked(tmp_path):
        yield tmp_path


def test_time_left(locked: Path) -> None:
    """Fails if the time left is not the work left at the speed so far, where earlier rows count as
    done and not in the speed."""
    keys = [row(count=count)["key"] for count in (2, 4, 8, 16)]
    work = dict(zip(keys, (5.0, 1.0, 2.0, 6.0), strict=True))
    write_json(locked / PLANNED, {"work": work})
    os.utime(locked / PLANNED, (time.time() - 100,) * 2)
    put(locked, row(count=2), age=500)
    watcher = Watcher(locked)
    assert watcher.look().seconds_left is None
    put(locked, row(count=4), age=50)  # work 1 in 50 seconds; work 8 is left, 50 s ago
    assert watcher.look().seconds_left == pytest.approx(8 * 50 - 50, abs=2)
    put(locked, row(count=8) | {"status": "failed"})  # work 3 in 100 seconds; not tried again
    seen = watcher.look()
    assert seen.seconds_left == pytest.approx(200, abs=3)
    assert (seen.done, seen.failed, seen.planned) == (2, 1, 4)
    put(locked, row(count=16))
    assert watcher.look().seconds_left == 0.0


def test_a_failed_run_that_is_tried_again(locked: Path) -> None:
    """Fails if a run is shown as failed and running at once."""
    one = row() | {"status": "failed"}
    put(locked, one)
    assert Watcher(locked).look().failed == 1
    (locked / RUNNING).mkdir()
    (locked / RUNNING / one["key"]).touch()
    seen = Watcher(locked).look()
    assert seen.failed == 0
    assert [key for key, _ in seen.running] == [one["key"]]


def test_the_best_of_each_model(tmp_path: Path) -> None:
    """Fails if a single lucky run decides the best size, or models mix."""
    put(tmp_path, row(count=4, bits=3.0), row(count=4, bits=1.0, seed=1), row(count=8, bits=2.2))
    put(tmp_path, row(width=12, bits=1.5), row(precision="bf16-true", bits=1.0))
    found = [
        (best.name, best.precision, best.runs, best.count, best.bits_per_parameter.estimate)
        for best in Watcher(tmp_path).look().best
    ]
    assert found == [
        ("1 × 8, 2 heads", "bf16-true", 1, 8, 1.0),
        ("1 × 8, 2 heads", "fp32", 3, 8, pytest.approx(2.2)),
        ("1 × 12, 2 heads", "fp32", 1, 8, 1.5),
    ]


def test_runs_on_text_have_no_table(tmp_path: Path) -> None:
    """Fails if runs without memorized bits get the head of a table without rows."""
    for bits in (1.0, None):
        put(tmp_path, row() | {"memorized_bits": {"strict": bits, "published": bits}})
        console = Console(width=80, file=io.StringIO())
        console.print(progress_table(Watcher(tmp_path).look(), tmp_path))
        assert ("bits/parameter" in console.file.getvalue()) is (bits is not None)


def test_rows_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a look reads an unchanged row again, or does not read a rewritten row."""
    module, reads = sys.modules["fastmem.sweeps.watch"], []
    read = module.read_row  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "read_row", lambda path: reads.append(path.name) or read(path))
    put(tmp_path, row(count=4) | {"status": "failed"}, row(count=8), age=60)
    watcher = Watcher(tmp_path)
    watcher.look()
    put(tmp_path, row(count=4))
    assert watcher.look().done == 2
    assert len(reads) == 3


def test_watch_ends_with_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if `fastmem watch` without a running sweep does not end, or shows nothing."""
    put(tmp_path, row(seed=1))
    assert command("watch", tmp_path) == 0
    assert "no process is at work here" in " ".join(capsys.readouterr().out.split())
    for left, text in ((2, "2 runs left; no process is"), (0, "finished")):
        work = {row(seed=seed)["key"]: 1.0 for seed in range(1, 2 + left)}
        write_json(tmp_path / PLANNED, {"work": work})
        assert command("watch", tmp_path) == 0
        assert f"state {text}" in " ".join(capsys.readouterr().out.split())


def test_counts_auto(tmp_path: Path) -> None:
    """Fails if a search looks finished while it is not, or stopped when it is finished, or has a
    number of runs or a time left, which nobody knows."""
    config = replace(TINY, counts="auto", seeds=(0,), steps=60, out=tmp_path)
    needs = {2: "2 models need more", 1: "1 model needs more", 0: None}
    found = []
    while not found or found[-1]:
        running = sweep(config, progress=False)
        next(running)
        seen = Watcher(tmp_path).look()
        assert (seen.planned, seen.seconds_left) == (None, None)
        running.close()
        seen = Watcher(tmp_path).look()
        assert seen.left is not None
        found.append(seen.left)
        said = needs[seen.left]
        assert seen.state.startswith(f"{said} runs; no process" if said else "finished")
        assert unfinished(report(tmp_path)) == (
            f"{seen.done} runs so far, {said}" if said else None
        )
    assert found == sorted(found, reverse=True)
    assert {*found} == {2, 1, 0}


def test_watch_of_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a folder with other files is shown as a sweep without runs."""
    (tmp_path / "notes.txt").touch()
    assert command("watch", tmp_path) == 2
    assert "is not the folder of a sweep, and holds notes.txt" in capsys.readouterr().err


def test_watch_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if `fastmem watch` leaves out a number, counts a finished run that is not planned
    beside the planned ones, or a mistake gives a traceback."""
    put(tmp_path, row(count=4), row(count=8), row(count=16) | {"status": "failed"})
    write_json(tmp_path / PLANNED, {"work": {str(n): 1.0 for n in range(5)}})
    assert command("watch", tmp_path, "--once") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("done 2 of 7", "failed 1", "no process is at work here", "1 × 8, 2 heads", "2.50"):
        assert part in shown
    assert command("watch", tmp_path / "none", "--once") == 2
    assert "is not a directory: give the folder of a sweep" in capsys.readouterr().err
    assert command("watch", tmp_path, "--every", 0) == 2
    assert "every must be above 0" in capsys.readouterr().err


MODEL = ["--width", "8", "--vocab", "16", "--length", "4"]
GRID = [*MODEL, "--steps", "10", "--counts", "4", "8", "--seeds", "0"]
