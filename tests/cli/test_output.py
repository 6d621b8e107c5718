"""Output that cannot be written ends no run: other encodings, closed pipes, full disks."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases.study_rows import study_rows, write_rows

from fastmem.cli import report as report_command
from fastmem.cli.main import COMMANDS, main

TINY = ["--width", "8", "--vocab", "16", "--length", "4", "--steps", "10"]
GRID = [*TINY, "--counts", "4", "8", "--seeds", "0"]
FASTMEM = [sys.executable, "-m", "fastmem"]


def printed(encoding: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Exit code and output of a command whose streams have an encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", streams[0])
        patched.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
    texts = [stream.buffer.getvalue() for stream in streams]  # type: ignore[attr-defined]
    return int(stop.value.code or 0), b"".join(texts).decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_every_command_in_every_encoding(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a command or its help ends with an error where its characters cannot be printed, or
    a sweep then lacks its report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report_command, "write_figure", lambda *_: None)  # its files take long
    for command in COMMANDS:
        assert printed(encoding, monkeypatch, command, "--help")[0] == 0
    for line in (
        ["capacity", *GRID, "--out", "sweep-\u20ac\udce9"],  # neither is in any of the encodings
        ["capacity", *GRID, "--out", "sweep-\u20ac\udce9", "--plan"],
        ["report", "sweep-\u20ac\udce9"],
        ["watch", "sweep-\u20ac\udce9"],
        ["train", *TINY, "--count", "5", "--out", "model"],
        ["score", "model"],
        ["predict", write_rows(Path("made-up"), list(study_rows())), "--layers", "1", "--width=9"],
        ["generate", "--count", "9", "--length", "4", "--vocab", "16", "--out", "data"],
        ["verify", "data"],
    ):
        code, text = printed(encoding, monkeypatch, *line)
        assert code == 0, (line, text)
        if encoding == "ascii":
            assert "1 x 8" in text or line[0] in ("train", "score", "predict", "generate", "verify")
    assert (tmp_path / "sweep-\u20ac\udce9" / "report.html").exists()
    assert printed(encoding, monkeypatch, "score", "\u20ac")[0] == 2


def test_a_log_on_a_full_disk(tmp_path: Path) -> None:
    """Fails if a sweep ends because nobody can read what it says, or hides that its results could
    not be printed."""
    out = tmp_path / "s"
    with open("/dev/full", "w") as full:
        assert (
            subprocess.run([*FASTMEM, "capacity", *GRID, "--out", out], stderr=full).returncode == 0
        )
        child = subprocess.run(
            [*FASTMEM, "report", out], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert child.returncode == 2
    assert (
        child.stderr == "fastmem: standard output could not be written: No space left on device\n"
    )
    assert (out / "report.html").exists()


def test_a_reader_that_went_away(tmp_path: Path) -> None:
    """Fails if a sweep ends with the pipe that its output went to."""
    out = tmp_path / "s"
    readable, writable = os.pipe()
    os.close(readable)
    command = [*FASTMEM, "capacity", *GRID, "--out", str(out)]
    assert subprocess.run(command, stdout=writable, stderr=writable).returncode == 0
    os.close(writable)
    assert (out / "report.html").exists()


def test_sigterm_is_ctrl_c(tmp_path: Path) -> None:
    """Fails if a terminated sweep leaves part of a row, a traceback or its marks."""
    out = tmp_path / "s"
    grid = [*GRID[:-1], *map(str, range(90)), "--out", str(out)]
    command = [*FASTMEM, "capacity", *grid]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        while len(list((out / "rows").glob("*.json"))) < 3:
            assert child.poll() is None
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGTERM)
        output = child.communicate()[1]
    assert child.returncode == 143
    assert "finished work is kept" in output
    assert "Traceback" not in output
    assert not list((out / "running").iterdir())
