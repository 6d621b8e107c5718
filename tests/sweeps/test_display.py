"""The progress bar of several workers."""

import io
import sys
import time
from pathlib import Path

import pytest
from cases.sweep_rows import row

from fastmem import SweepConfig
from fastmem.sweeps.display import Display
from fastmem.sweeps.job import Job

RUNS = SweepConfig(width=(8,), vocab=16, length=4, counts=(4, 8, 16), seeds=(0,), heads=(2,)).runs()
WORK = {run.key: work for run, work in zip(RUNS, (1.0, 2.0, 4.0), strict=True)}


def job(place: int) -> Job:
    return Job((RUNS[place],), "cpu", Path("s"), "stamp")


def test_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a running run is not shown, an ended run is, or the time left is not the work left
    at the speed so far."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    with Display(WORK, [], show=False) as display:
        display.begin(job(0))
        display.begin(job(1))
        now[0] += 30
        keys = [run.key for run in RUNS]
        assert display.line() == f"2 at work, longest {keys[0]} 30 s"
        display.end(job(0))
        display.add(row(count=4))
        display.begin(job(2))
        assert display.line() == f"03:00 left, 2 at work, longest {keys[1]} 30 s"
        assert display.label(job(2), None) == f"2/3, 03:00 left, {keys[2]}"


def test_the_time_left_of_a_sweep_moves_with_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the label of a running job keeps the time of its start, or the rest of the sweep is
    not at the speed so far."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    with Display(WORK, [], show=False) as display:
        key = RUNS[0].key
        display.begin(job(0))
        assert display.label(job(0), None) == f"1/3, {key}"
        now[0] += 10  # 20 s for a work of 1, and 6 more to do
        assert display.label(job(0), 10.0) == f"1/3, 02:10 left, {key}"
        now[0] += 5
        assert display.label(job(0), 5.0) == f"1/3, 02:05 left, {key}"
        now[0] += 5
        display.end(job(0))
        display.add(row(count=4))
        display.begin(job(1))
        now[0] += 10  # 60 s for a work of 3, and 4 more to do
        assert display.label(job(1), 30.0) == f"2/3, 01:50 left, {RUNS[1].key}"
    with Display({}, [], show=False) as display:  # counts "auto": the coming runs are unknown
        assert display.label(job(1), 30.0) == f"1, {RUNS[1].key}"


@pytest.mark.parametrize(("work", "line"), [(WORK, "| 2/3 runs, "), ({}, "1 runs")])
def test_the_bar(monkeypatch: pytest.MonkeyPatch, work: dict[str, float], line: str) -> None:
    """Fails if the bar does not count earlier runs, shows a total for a sweep of unknown length, or
    is drawn without a terminal."""
    for is_terminal in (True, False):
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda answer=is_terminal: answer)
        monkeypatch.setattr(sys, "stderr", screen)
        with Display(work, [row(count=4)], show=True) as display:
            display.begin(job(1))
            display.draw()
            display.end(job(1))
            display.add(row(count=8))
            display.draw()
        assert (line in screen.getvalue()) is is_terminal
        assert (RUNS[1].key in screen.getvalue()) is is_terminal


def test_a_log_gets_a_line_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a log has no progress, or a line a second."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Display(WORK, [row(count=4)], show=True) as display:
        display.begin(job(1))
        for _ in range(65):
            now[0] += 1
            display.draw()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("sweep: 1/3 runs, 1 at work, longest ")
