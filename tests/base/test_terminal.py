"""What a terminal of 80 columns, a notebook and a log show of a command."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tqdm.auto
import tqdm.notebook
from cases.study_rows import study_rows, write_rows
from cases.train_cases import SET, SHAPE

from fastmem import GPT, SweepConfig, TrainConfig, TrainResult, train
from fastmem.base.terminal import progress_bar, say, show, table
from fastmem.cli.main import main
from fastmem.models.flops import matmul_rate
from fastmem.sweeps.display import Display
from fastmem.sweeps.job import Job
from fastmem.training import group as groups


class Screen:
    """A terminal of 80 columns, and all that was written to it."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self._written = b""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            self._written += os.read(self._master, 1 << 16)

    def text(self) -> str:
        self.stream.write("\0")
        self.stream.flush()
        while not self._written.endswith(b"\0"):
            time.sleep(0.001)
        return self._written.decode().replace("\0", "")

    def lines(self) -> list[str]:
        """Each line that was on the screen, also where another was drawn over it."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text())
        return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Sends all output from here on to a terminal."""
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen.stream)
    monkeypatch.setattr(sys, "stderr", screen.stream)
    monkeypatch.setenv("COLUMNS", "80")
    return screen


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_nothing_wraps_in_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a row, a bar, the table or the plan is wider than a terminal, or a bar does not say
    how much is memorized and when the sweep ends."""
    screen = terminal(monkeypatch)
    monkeypatch.setattr(groups, "DISPLAY_SECONDS", -1.0)
    grid = ["--width", 8, 12, "--length", 8, "--steps", 60, "--counts", 12, 900, "--seeds", 0, 1]
    assert run("capacity", *grid, "--out", tmp_path / "s") == 0
    assert run("capacity", *grid, "--out", tmp_path / "t", "--plan") == 0
    found = screen.lines()
    assert [line for line in found if len(line) > 80] == []
    (row,) = [line for line in found if line.startswith("[8/8]")]
    assert "/parameter, " in row
    bars = [line for line in found if line.startswith("5/8, ")]
    assert all(line.startswith("5/8, 00:") for line in bars)
    assert any("bits/parameter" in line for line in bars)
    assert any(line.startswith("timing training steps") for line in found)
    assert any(line.startswith("bits/parameter strict  ") for line in found)


def test_nothing_wraps_beside_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the bar of several workers is wider than a terminal, or loses the time left."""
    screen = terminal(monkeypatch)
    config = SweepConfig(
        layers=(12,), width=(1024,), precision=("bf16-stochastic",), counts=(1_000_000, 2_000_000)
    )
    runs = config.runs()
    written = {"key": runs[0].key, "status": "done"}
    with Display({run.key: 1.0 for run in runs}, [], show=True) as display:
        display.begin(Job((runs[1],), "cpu", Path("s"), ""))
        time.sleep(0.01)
        display.add(written)
        display.draw()
    assert [line for line in screen.lines() if len(line) > 80] == []
    assert "| 1/4 runs, 00:00 left, 1 at work, longest 12x1024" in screen.text()


def test_nothing_wraps_in_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if the table of many models is wider than a terminal, or lacks a model or a value."""
    screen = terminal(monkeypatch)
    rows = list(study_rows())
    folder = write_rows(tmp_path / "s", rows)
    assert run("report", folder) in (0, 1)
    assert run("predict", folder, "--layers", 1, "--width", 9) == 0
    paths = (str(tmp_path), "report.html")
    assert [n for n in screen.lines() if len(n) > 80 and not any(p in n for p in paths)] == []
    shown = screen.text()
    assert shown.count("more data") >= 1
    for row in rows:
        assert "{layers} × {width}".format(**row["model"]) in shown


def test_a_train_bar_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the bar of a single run is wider than a terminal, or lacks the time left."""
    screen = terminal(monkeypatch)
    monkeypatch.setattr(groups, "DISPLAY_SECONDS", -1.0)
    train(GPT(SHAPE), SET, TrainConfig(steps=30))
    found = screen.lines()
    assert [line for line in found if len(line) > 80] == []
    assert any("| 25/30 steps, 00:00 left, " in line for line in found)
    assert any(" bits/parameter, " in line for line in found)


def test_a_log_is_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a program that reads a log or a pipe gets parts of lines."""
    text = "a word " * 40
    say(text)
    show(text)
    rows = [["name"] * 30, ["value"] * 30]
    show(table(rows))
    out, err = capsys.readouterr()
    assert [len(line) for line in err.splitlines()] == [280]
    assert [len(line.split()) for line in out.splitlines()] == [80, 30, 30]


def test_lines_break_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a long line is broken in a word, or a short one is changed."""
    screen = terminal(monkeypatch)
    say("key  " + "word-by-word " * 9)
    show("  as  it is")
    found = screen.lines()
    assert found[0].endswith("word-by-word")
    assert found[1].startswith("    word-by-word")
    assert found[2] == "  as  it is"


def test_a_log_of_training_gets_a_line_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a log of a run has no progress, or a line a step."""
    matmul_rate()  # times products once, by the true clock
    now = [1000.0]
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: now[0])
    take = groups.Step.take
    monkeypatch.setattr(groups.Step, "take", lambda *a: now.append(now.pop() + 1.0) or take(*a))
    train(GPT(SHAPE), SET, TrainConfig(steps=100), progress="model")
    found = capsys.readouterr().err.splitlines()
    assert len(found) == 3
    assert found[0].startswith("model: 30/100 steps, 01:10 left, ")
    assert found[2].startswith("model: 90/100 steps, 00:10 left, ")


def test_a_notebook_shows_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a notebook, whose standard error is not a terminal, gets lines, or a bar made of
    characters inside of its own."""
    left, bar, right = (
        SimpleNamespace(value="", bar_style="", style=SimpleNamespace(bar_color=""))
        for _ in range(3)
    )
    container = SimpleNamespace(children=(left, bar, right), close=lambda: None)
    container.layout = SimpleNamespace()
    notebook = tqdm.notebook.tqdm_notebook
    monkeypatch.setattr(notebook, "status_printer", staticmethod(lambda *_: container))
    monkeypatch.setattr(tqdm.notebook, "display", lambda _: None, raising=False)
    monkeypatch.setattr(tqdm.auto, "tqdm", notebook)
    monkeypatch.setattr(groups, "DISPLAY_SECONDS", -1.0)
    train(GPT(SHAPE), SET, TrainConfig(steps=10), progress="model")
    space = "\u2007"
    assert left.value == f"model{space}"
    assert right.value.replace(space, " ").startswith(" 10/10 steps, 00:00 left, ")
    assert "█" not in left.value + right.value
    assert bar.value == 10
    assert capsys.readouterr().err == ""
    with progress_bar(False, 3, "{bar}") as hidden:
        assert hidden.disable


def test_a_result_is_short() -> None:
    """Fails if the result of a cell fills a notebook with points of a curve."""
    result: Any = train(GPT(SHAPE), SET, TrainConfig(steps=100), progress=False)
    assert isinstance(result, TrainResult)
    text = repr(result)
    assert len(text) < 100
    assert f"TrainResult({result.memorized_bits:,.0f} bits memorized, 100 steps, " in text
    assert "16 points in curve" in text
    tokens: Any = train(GPT(SHAPE), SET[:], TrainConfig(steps=2), progress=False)
    assert repr(tokens).startswith("TrainResult(unknown bits memorized, 2 steps, ")
