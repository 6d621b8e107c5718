"""A sweep seen from beside it, and its rows in trackers."""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cases.sweep_rows import row

from fastmem import SweepConfig, sweep
from fastmem.base.lock import locked
from fastmem.base.storage import write_json
from fastmem.cli.main import main
from fastmem.sweeps.trackers import open_sink
from fastmem.sweeps.watch import PLANNED, RUNNING, Watcher

TINY = SweepConfig(width=(8, 12), vocab=16, length=4, counts=(4, 8), seeds=(0, 1), steps=12)


def put(folder: Path, *rows: dict[str, Any], age: float = 0.0) -> None:
    for one in rows:
        path = folder / "rows" / f"{one['key']}.json"
        write_json(path, one)
        os.utime(path, (time.time() - age,) * 2)


def test_a_sweep_at_work(tmp_path: Path) -> None:
    """Fails if a running sweep is not seen as one, or a look disturbs it or its rows."""
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
    """Fails if the run that is being trained is not told, or stays when it has ended."""
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
    """Fails if what a killed sweep was training is shown as running, or is there in the next."""
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
    """A folder that a process works in, which began 100 seconds ago."""
    with locked(tmp_path):
        yield tmp_path


def test_time_left(locked: Path) -> None:
    """Fails if the time left is not that of the work left at the speed so far: rows from before
    the sweep began say nothing of its speed, but are done."""
    keys = [row(count=count)["key"] for count in (2, 4, 8, 16)]
    work = dict(zip(keys, (5.0, 1.0, 2.0, 6.0), strict=True))
    write_json(locked / PLANNED, {"work": work})
    os.utime(locked / PLANNED, (time.time() - 100,) * 2)
    put(locked, row(count=2), age=500)
    watcher = Watcher(locked)
    assert watcher.look().seconds_left is None
    put(locked, row(count=4), age=50)  # 1 of work in 50 seconds; 8 are left, 50 seconds went by
    assert watcher.look().seconds_left == pytest.approx(8 * 50 - 50, abs=2)
    put(locked, row(count=8) | {"status": "failed"})  # 3 in 100 seconds, and it will not be again
    seen = watcher.look()
    assert seen.seconds_left == pytest.approx(200, abs=3)
    assert (seen.done, seen.failed, seen.planned) == (2, 1, 4)
    put(locked, row(count=16))
    assert watcher.look().seconds_left == 0.0


def test_a_failed_run_that_is_tried_again(locked: Path) -> None:
    """Fails if a run is told as failed and as running at once."""
    one = row() | {"status": "failed"}
    put(locked, one)
    assert Watcher(locked).look().failed == 1
    (locked / RUNNING).mkdir()
    (locked / RUNNING / one["key"]).touch()
    seen = Watcher(locked).look()
    assert seen.failed == 0
    assert [key for key, _ in seen.running] == [one["key"]]


def test_the_best_of_each_model(tmp_path: Path) -> None:
    """Fails if a single lucky run is taken for the best size, or models mix."""
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


def test_rows_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if each look reads all rows again, or a row that was written again is not."""
    module, reads = sys.modules["fastmem.sweeps.watch"], []
    read = module.read_row  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "read_row", lambda path: reads.append(path.name) or read(path))
    put(tmp_path, row(count=4) | {"status": "failed"}, row(count=8), age=60)
    watcher = Watcher(tmp_path)
    watcher.look()
    put(tmp_path, row(count=4))
    assert watcher.look().done == 2
    assert len(reads) == 3


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_watch_ends_with_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if it goes on for ever where nobody is at work, or shows nothing then."""
    put(tmp_path, row(seed=1))
    assert command("watch", tmp_path) == 0
    assert "no process is at work here" in capsys.readouterr().out


def test_watch_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the command leaves out a number that it has, or a mistake is a traceback."""
    put(tmp_path, row(count=4), row(count=8), row(count=16) | {"status": "failed"})
    write_json(tmp_path / PLANNED, {"work": {str(n): 1.0 for n in range(7)}})
    assert command("watch", tmp_path, "--once") == 0
    told = " ".join(capsys.readouterr().out.split())
    for part in ("done 2 of 7", "failed 1", "no process is at work here", "1 × 8, 2 heads", "2.50"):
        assert part in told
    assert command("watch", tmp_path / "none", "--once") == 2
    assert "is no folder: give that of a sweep" in capsys.readouterr().err
    assert command("watch", tmp_path, "--every", 0) == 2
    assert "every must be above 0" in capsys.readouterr().err


MODEL = ["--width", "8", "--vocab", "16", "--length", "4"]
GRID = [*MODEL, "--steps", "10", "--counts", "4", "8", "--seeds", "0"]


def test_tensorboard(tmp_path: Path) -> None:
    """Fails if a point of a curve is not in TensorBoard's files, or has another value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert command("capacity", *GRID, "--out", tmp_path / "s", "--log", "tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "s" / "tensorboard"))
    events.Reload()
    from fastmem import load_rows

    for one in load_rows(tmp_path / "s"):
        found = events.Scalars(f"memorized_bits/{one['key']}")
        assert [point.step for point in found] == [point["step"] for point in one["curve"]]
        assert found[-1].value == pytest.approx(one["memorized_bits"]["strict"], rel=1e-6)


def tracker(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A library of this name that notes what is called."""
    calls: list[tuple[str, Any]] = []
    library = ModuleType(name)
    for function in ("init", "log", "finish"):
        note = lambda *a, _name=function, **k: calls.append((_name, (*a, *k.items())))  # noqa: E731
        setattr(library, function, note)
    monkeypatch.setitem(sys.modules, name, library)
    return calls


def test_rows_that_were_written_and_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a row of a run that was killed before it was sent is never sent, a row that was is
    sent again, or a failed one is taken for sent, whose run may still finish."""
    calls = tracker("wandb", monkeypatch)
    monkeypatch.setattr("fastmem.cli.capacity.write_report", lambda *_: 0)  # its figures take long

    def sent() -> list[str]:
        names = [dict(call)["name"] for function, call in calls if function == "init"]
        calls.clear()
        return names

    assert command("capacity", *GRID, "--out", tmp_path) == 0
    assert sent() == []
    more = [*GRID[:-3], "16", "--seeds", "0"]  # counts 4 and 16: one is there, one is new
    keys = [row(count=n)["key"].replace("h2", "h4") for n in (4, 8, 16)]
    assert command("capacity", *more, "--out", tmp_path, "--log", "wandb") == 0
    assert sorted(sent()) == sorted(keys)
    assert command("capacity", *more, "--out", tmp_path, "--log", "wandb") == 0
    assert sent() == []
    (tmp_path / "sent" / "wandb" / keys[1]).unlink()
    assert command("capacity", *more, "--out", tmp_path, "--log", "wandb") == 0
    assert sent() == [keys[1]]
    sink = open_sink("wandb", tmp_path / "other")
    sink.add(row() | {"status": "failed", "error": "lost", "curve": []})
    sink.close([row(), row(count=2) | {"status": "failed"}])
    assert sent() == [row()["key"]] * 2


def test_a_tracker_that_is_not_there_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a folder is made, or a run trained, before a missing library is named."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert command("capacity", *GRID, "--out", tmp_path / "s", "--log", "wandb") == 2
    assert "pip install 'fastmem-lm[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run is not begun, filled and finished in the library's own three calls."""
    calls = tracker(name, monkeypatch)
    sink = open_sink(name, tmp_path / "study")
    one = row()
    sink.add(one)
    sink.close()
    assert [call for call, _ in calls] == ["init", "log", "log", "finish"]
    begun = dict(calls[0][1])
    assert (begun["project"], begun["group"], begun["name"]) == ("fastmem", "study", one["key"])
    assert begun["config"]["parameters"] == one["parameters"]
    metrics, step = calls[2][1]
    assert step == ("step", 10)
    assert metrics == {"memorized_bits": one["memorized_bits"]["strict"], "bits_per_parameter": 2.5}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("paper", "no sink 'paper': use one of tensorboard, wandb, trackio"),
        ("wandb", r"--log wandb needs wandb.*pip install 'fastmem-lm\[wandb\]'"),
        ("tensorboard", r"pip install 'fastmem-lm\[tensorboard\]'"),
    ],
)
def test_sinks_that_are_not_there(
    tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a user sees a traceback, or is not told what to install."""
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=message):
        open_sink(name, tmp_path)


def test_an_unknown_sink_begins_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if training begins before the sink is known to be there."""
    assert command("capacity", *GRID, "--out", tmp_path / "s", "--log", "paper") == 2
    assert "paper" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
