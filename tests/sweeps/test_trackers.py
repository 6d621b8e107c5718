"""Rows sent to TensorBoard, Weights & Biases and Trackio."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cases.sweep_rows import command, row

from fastmem import load_rows
from fastmem.sweeps.trackers import open_tracker

MODEL = ["--width", "8", "--vocab", "16", "--length", "4"]
GRID = [*MODEL, "--steps", "10", "--counts", "4", "8", "--seeds", "0"]


def test_tensorboard(tmp_path: Path) -> None:
    """Fails if a point of a curve is not in TensorBoard's files, or has another value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert command("capacity", *GRID, "--out", tmp_path / "s", "--log", "tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "s" / "tensorboard"))
    events.Reload()
    for one in load_rows(tmp_path / "s"):
        found = events.Scalars(f"memorized_bits/{one['key']}")
        assert [point.step for point in found] == [point["step"] for point in one["curve"]]
        assert found[-1].value == pytest.approx(one["memorized_bits"]["strict"], rel=1e-6)


def fake_library(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Installs a library that records its calls."""
    calls: list[tuple[str, Any]] = []
    library = ModuleType(name)
    for function in ("init", "log", "finish"):
        note = lambda *a, _name=function, **k: calls.append((_name, (*a, *k.items())))  # noqa: E731
        setattr(library, function, note)
    monkeypatch.setitem(sys.modules, name, library)
    return calls


def test_unsent_rows_are_sent_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a row written before a kill is never sent, a sent row is sent again, or a failed row
    counts as sent, although its run may still finish."""
    calls = fake_library("wandb", monkeypatch)
    monkeypatch.setattr("fastmem.cli.capacity.write_report", lambda *_: 0)  # its figures take long

    def sent() -> list[str]:
        names = [dict(call)["name"] for function, call in calls if function == "init"]
        calls.clear()
        return names

    assert command("capacity", *GRID, "--out", tmp_path) == 0
    assert sent() == []
    more = [*GRID[:-3], "16", "--seeds", "0"]  # count 4 is done, count 16 is new
    keys = [row(count=n)["key"].replace("h2", "h4") for n in (4, 8, 16)]
    assert command("capacity", *more, "--out", tmp_path, "--log", "wandb") == 0
    assert sorted(sent()) == sorted(keys)
    assert command("capacity", *more, "--out", tmp_path, "--log", "wandb") == 0
    assert sent() == []
    (tmp_path / "sent" / "wandb" / keys[1]).unlink()
    assert command("capacity", *more, "--out", tmp_path, "--log", "wandb") == 0
    assert sent() == [keys[1]]
    tracker = open_tracker("wandb", tmp_path / "other")
    tracker.add(row() | {"status": "failed", "error": "lost", "curve": []})
    tracker.close([row(), row(count=2) | {"status": "failed"}])
    assert sent() == [row()["key"]] * 2


def test_a_missing_library_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a folder is created, or a run trained, before the error of a missing library."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert command("capacity", *GRID, "--out", tmp_path / "s", "--log", "wandb") == 2
    assert "pip install 'fastmem-lm[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a row is not sent in the library's three calls: init, log and finish."""
    calls = fake_library(name, monkeypatch)
    tracker = open_tracker(name, tmp_path / "study")
    one = row()
    tracker.add(one)
    tracker.close()
    assert [call for call, _ in calls] == ["init", "log", "log", "finish"]
    init = dict(calls[0][1])
    assert (init["project"], init["group"], init["name"]) == ("fastmem", "study", one["key"])
    assert init["config"]["parameters"] == one["parameters"]
    metrics, step = calls[2][1]
    assert step == ("step", 10)
    assert metrics == {"memorized_bits": one["memorized_bits"]["strict"], "bits_per_parameter": 2.5}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("paper", "unknown tracker 'paper': use one of tensorboard, wandb, trackio"),
        ("wandb", r"--log wandb needs wandb.*pip install 'fastmem-lm\[wandb\]'"),
        ("tensorboard", r"pip install 'fastmem-lm\[tensorboard\]'"),
    ],
)
def test_unavailable_trackers(
    tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if an unknown name or a missing library is not an error with its fix."""
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=message):
        open_tracker(name, tmp_path)


def test_an_unknown_tracker_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if training starts before the tracker is checked."""
    assert command("capacity", *GRID, "--out", tmp_path / "s", "--log", "paper") == 2
    assert "paper" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
