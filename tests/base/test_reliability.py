"""The folder of a sweep on full or read-only disks, with clocks that jump, and with damage."""

import ctypes
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cases.sweep_rows import constant

from fastmem import GPT, GPTConfig, SweepConfig, TrainConfig, load, load_rows, sweep
from fastmem.base.storage import read_json, write_json, write_sealed, write_whole
from fastmem.cli.main import main
from fastmem.sweeps.store import write_curves, write_sequence_bits
from fastmem.sweeps.watch import Watcher

SCRIPT = Path(__file__).parents[1] / "cases" / "small_disk.py"
TINY = SweepConfig(width=(8, 12), vocab=16, length=4, counts=(4, 8), seeds=(0,), steps=12)
MODEL = ["--width", "8", "12", "--vocab", "16", "--length", "4", "--steps", "12"]
FLAGS = [*MODEL, "--counts", "4", "8", "--seeds", "0"]


def finish(out: Path, config: SweepConfig = TINY) -> list[dict[str, Any]]:
    list(sweep(replace(config, out=out), progress=False))
    return load_rows(out)


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ONE = {"key": "a", "curve": [{"step": 1, "seconds": 0.5, "memorized_bits": 2.0}]}
WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.bin": lambda path: write_whole(path, b"new"),
    "a.pt": lambda path: write_sealed(path, b"new"),
    "a.json": lambda path: write_json(path, {"new": 1}),
    "sequence_bits/a.parquet": lambda path: write_sequence_bits(path.parents[1], "a", [1.0], [2.0]),
    "curves/curves.parquet": lambda path: write_curves(path.parents[1], [ONE]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path: Path, name: str) -> None:
    """Fails if a write without space replaces the old file, leaves a part, or does not name the
    file. The part is a link to /dev/full, which is always full."""
    path = tmp_path / name
    WRITERS[name](path)
    path.write_bytes(b"old")
    part = path.with_name(f".{path.name}.part")
    part.symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'") as error:
        WRITERS[name](path)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    WRITERS[name](path)
    assert path.read_bytes() != b"old"


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results of tests/cases/small_disk.py."""
    folder = tmp_path_factory.mktemp("disk") / "mounted"
    folder.mkdir()
    # A user who cannot mount may be root, and mount, in a new user namespace.
    for flags in (["--mount"], ["--mount", "--user", "--map-root-user"]):
        there = ["unshare", *flags]
        probe = [*there, "mount", "-t", "tmpfs", "tmpfs", folder]
        if (
            shutil.which("unshare")
            and subprocess.run(probe, stderr=subprocess.DEVNULL).returncode == 0
        ):
            break
    else:
        pytest.skip("this system lets no process mount a disk of its own")
    run = [*there, sys.executable, SCRIPT, folder]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True, env=one_thread)
    return json.loads(done.stdout)


def rows_of(part: Any, small_disk: Any) -> tuple[Any, Any]:
    """The rows of a folder, and the same rows of the undisturbed sweep."""
    keys = [row["key"] for row in part["rows"]]
    right = [row for row in small_disk["undisturbed"] if row["key"] in keys]
    return constant(part["rows"]), constant(right)


def test_a_sweep_on_a_disk_that_is_full(small_disk: Any) -> None:
    """Fails if a sweep that restarts with one more page each time loses or changes a row, or does
    not name the file and the error in one line."""
    full = small_disk["full"]
    assert len(full["failed"]) >= 5
    for number, message in full["failed"]:
        assert number == errno.ENOSPC
        assert message.startswith("[Errno 28] No space left on device: '/")
    assert {message.split("/")[-2] for _, message in full["failed"]} == {"study", "checkpoints"}
    code, printed = full["command"]
    assert code == 2
    line = printed.splitlines()[-1]
    assert line.startswith("fastmem: /")
    assert line.endswith(
        ": No space left on device: finished work is kept; free some space and give the same "
        "command again"
    )
    found, right = rows_of(full, small_disk)
    assert len(found) == 2
    assert found == right


@pytest.mark.parametrize("part", ["checkpoints", "sequence_bits", "rows"])
def test_a_disk_that_fills_while_a_file_is_written(small_disk: Any, part: str) -> None:
    """Fails if a half-written file counts, or the next start does not resume."""
    full = small_disk["at"][part]
    number, message = full["failed"]
    assert number == errno.ENOSPC
    assert f"/{part}/1x8-h4-fp32-n4-seed0." in message
    assert full["left"] == 0
    found, right = rows_of(full, small_disk)
    assert len(found) == 2
    assert found == right


def test_a_disk_that_became_read_only(small_disk: Any) -> None:
    """Fails if a command that writes prints more than a line, or a command that reads fails."""
    results = small_disk["read_only"]["commands"]
    for name, at in (
        ("capacity", "study/lock"),
        ("new", "new"),
        ("train", "model"),
        ("report", "study/capacity.json"),
    ):
        code, printed = results[name]
        assert code == 2
        line = printed.splitlines()[-1]
        assert line.startswith("fastmem: /")
        assert line.endswith(
            f"/{at}: Read-only file system: give --out a folder that can be written"
        )
    assert results["watch"][0] == results["plan"][0] == 0
    found, right = rows_of(small_disk["read_only"], small_disk)
    assert len(found) == 3
    assert found == right


CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2


@contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Makes file permissions apply to this thread, also if it runs as root."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: low words, high words
    assert libc.capget(header, data) == 0
    effective = data[0]
    data[0] = effective & ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = effective
        assert libc.capset(header, data) == 0


@pytest.mark.parametrize("place", [".", "rows", "checkpoints", "running"])
def test_a_folder_that_may_not_be_written(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a start without permission changes a file or shows a traceback, or the next start
    does not resume."""
    out = tmp_path / "s"
    undisturbed = finish(tmp_path / "undisturbed")
    running = sweep(replace(TINY, out=out), progress=False)
    next(running)
    running.close()
    before = files(out)
    capsys.readouterr()
    (out / place).chmod(0o555)
    with bound_by_permissions():
        assert command("capacity", *FLAGS, "--out", out) == 2
        assert load(out).status.tolist() == ["done"]
        assert Watcher(out).look().done == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"fastmem: {out}/")
    assert line.endswith(": Permission denied: give --out a folder that can be written")
    kept = files(out)
    assert {path: kept[path] for path in before if path.name != "planned.json"} == {
        path: data for path, data in before.items() if path.name != "planned.json"
    }
    (out / place).chmod(0o755)
    assert constant(finish(out)) == constant(undisturbed)


def test_a_file_that_may_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if an input without permission is taken for an --out."""
    GPT(GPTConfig(1, 8, 2, vocab=256, length=16)).to_hf(tmp_path / "model")
    text = tmp_path / "a.txt"
    text.write_text("a text")
    text.chmod(0)
    with bound_by_permissions():
        assert command("score", tmp_path / "model", text, "--out", tmp_path / "out") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"fastmem: {text}: Permission denied: give a file that can be read"


def shifted(clock: Callable[[], float]) -> Callable[[], float]:
    """A clock that goes back a day at every second reading, and forward a year at every fifth."""
    looks = [0]

    def now() -> float:
        looks[0] += 1
        return clock() - 86400 * (looks[0] // 2) + 31_536_000 * (looks[0] // 5)

    return now


@pytest.mark.parametrize("set_to", [0.0, 1e9, 4e9])
def test_clocks_that_jump(tmp_path: Path, set_to: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a row, a checkpoint or the end of a run depends on the time of day: the files of a
    stopped sweep are from 1970, 2001 or 2096, and the clock jumps after its restart."""
    undisturbed = finish(tmp_path / "undisturbed")
    out = tmp_path / "s"
    running = sweep(replace(TINY, out=out), progress=False)
    next(running)
    running.close()
    for path in (out, *out.rglob("*")):
        os.utime(path, (set_to, set_to))
    monkeypatch.setattr(time, "time", shifted(time.time))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * time.time()))
    running = sweep(replace(TINY, out=out), progress=False)
    watcher = Watcher(out)
    for done, row in enumerate(running, 2):
        assert 0 < row["seconds"] < 60
        for path in out.rglob("*"):
            os.utime(path, (set_to, set_to))
        seen = watcher.look()
        assert (seen.at_work, seen.done, seen.failed) == (True, done, 0)
        assert seen.seconds_left is None or 0 <= seen.seconds_left < math.inf
        assert all(0 <= seconds < math.inf for _, seconds in seen.running)
    assert constant(load_rows(out)) == constant(undisturbed)


def test_a_budget_of_seconds_uses_a_monotonic_clock(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fails if a run in seconds never ends, or ends at once, when the time of day jumps."""
    monkeypatch.setattr(time, "time", lambda: 0.0)
    config = replace(TINY, width=(8,), counts=(4,), steps=None, seconds=0.2)
    (row,) = finish(tmp_path, config)
    assert 0.2 <= row["seconds"] < 60
    assert row["stopped_by"] == "budget"
    assert TrainConfig(**row["train"]).seconds == 0.2


def newer(path: Path) -> None:
    write_json(path, read_json(path) | {"schema": 3})


def edited(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace('"status": "done"', '"status": "failed"'))
    assert path.read_text() != text


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "newer": (newer, "has schema 3, this version reads 1 and 2: install a newer fastmem-lm"),
    "edited": (edited, "was altered after it was written: delete it and run again"),
    "copied": (
        lambda path: shutil.copy(path.with_name("1x8-h4-fp32-n4-seed0.json"), path),
        "is the row of 1x8-h4-fp32-n4-seed0: give it that name, or delete it",
    ),
    "cut": (
        lambda path: path.write_bytes(path.read_bytes()[:700]),
        "is not a whole file of fastmem: delete it and run again",
    ),
    "emptied": (lambda path: path.write_bytes(b""), "is not a whole file of fastmem"),
    "zeros": (lambda path: path.write_bytes(b"\0" * 4096), "is not a whole file of fastmem"),
    "not finite": (
        lambda path: path.write_text('{"bits": NaN, "checksum": ""}'),
        "is not a whole file of fastmem",
    ),
    "deep": (lambda path: path.write_text("[" * 200_000), "is not a whole file of fastmem"),
    "binary": (lambda path: path.write_bytes(bytes(range(256))), "is not a whole file of fastmem"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_rows_are_named_by_each_command(
    whole: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a command takes a damaged row for a result, changes a file of the folder, or prints
    anything but one line with the row and the fix."""
    folder = tmp_path / "s"
    shutil.copytree(whole, folder)
    harm, message = DAMAGE[damage]
    path = folder / "rows" / "1x8-h4-fp32-n8-seed0.json"
    harm(path)
    before = files(folder)
    for words in (
        ["capacity", *FLAGS, "--out", folder],
        ["capacity", *FLAGS, "--plan", "--out", folder],
        ["report", folder],
        ["predict", folder],
        ["watch", folder, "--once"],
    ):
        assert command(*words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"fastmem: {path} {message}"), words
    with pytest.raises(ValueError, match=path.name):
        load(folder)
    assert files(folder) == before
    path.unlink()
    assert constant(finish(folder)) == constant(load_rows(whole))
