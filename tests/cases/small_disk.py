"""Runs sweeps on a disk that is full, then read-only; tests/base/test_reliability.py starts it.

    unshare --mount python tests/cases/small_disk.py FOLDER

Mounts a disk of 512 KiB on FOLDER, visible to this process only, and prints the results as JSON.
"""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmem import SweepConfig, load_rows, sweep
from fastmem.base import storage
from fastmem.cli.main import main
from fastmem.data.files import parquet
from fastmem.training import group

PAGE = 4096
TINY = SweepConfig(
    width=(8,), vocab=16, length=4, counts=(4, 8), seeds=(0,), steps=4, sequence_bits=True
)
MORE = replace(TINY, counts=(4, 8, 16))
MODEL = ["--width", "8", "--vocab", "16", "--length", "4", "--steps", "4"]
FLAGS = [*MODEL, "--counts", "4", "8", "16", "--seeds", "0"]


def tried(config: SweepConfig) -> OSError | None:
    """Runs a sweep; returns the error that ended it."""
    try:
        list(sweep(config, progress=False))
    except OSError as error:
        return error
    return None


def message_of(error: OSError | None) -> tuple[int | None, str]:
    assert error is not None
    return error.errno, str(error)


def command(*arguments: object) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            return int(stop.code or 0), printed.getvalue()
    raise AssertionError("main returned")


def fill(ballast: Path, free: int = 0) -> None:
    """Fills the disk except for `free` bytes."""
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(b"\0" * PAGE)
    with ballast.open("r+b") as file:
        file.truncate(ballast.stat().st_size - free)


def full_then_free(disk: Path) -> Any:
    """Restarts a sweep until it succeeds, with one more free page each time."""
    ballast, config = disk / "ballast", replace(TINY, out=disk / "study")
    fill(ballast)
    failed: list[Any] = []
    whole: dict[str, Any] = {}
    while (error := tried(config)) is not None:
        failed.append(message_of(error))
        rows = load_rows(config.out) if config.out.is_dir() else []
        before, whole = whole, {row["key"]: row for row in rows}
        assert before.items() <= whole.items()
        assert not list(disk.rglob(".*.part"))
        ballast.open("r+b").truncate(ballast.stat().st_size - PAGE)
    fill(ballast)
    result = command("capacity", *FLAGS, "--out", config.out)
    ballast.unlink()
    return {"failed": failed, "command": result, "rows": load_rows(config.out)}


def full_at(disk: Path, part: str) -> Any:
    """Leaves one page less than the next file in folder `part` needs."""
    ballast, config = disk / "ballast", replace(TINY, out=disk / f"full-{part}")
    write = storage.write_whole

    def write_on_a_full_disk(path: Path, payload: bytes) -> None:
        if path.parent.name == part:
            fill(ballast, (len(payload) - 1) // PAGE * PAGE)
        write(path, payload)

    set_writer(write_on_a_full_disk)
    failed = message_of(tried(config))
    left = len(load_rows(config.out))
    set_writer(write)
    ballast.unlink()
    assert tried(config) is None
    return {"failed": failed, "left": left, "rows": load_rows(config.out)}


def set_writer(write: Callable[[Path, bytes], None]) -> None:
    storage.write_whole = parquet.write_whole = write


def read_only(disk: Path) -> Any:
    """The result of each command on a disk that became read-only."""
    study = disk / "study"
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    commands = {
        "capacity": command("capacity", *FLAGS, "--out", study),
        "new": command("capacity", *FLAGS, "--out", disk / "new"),
        "train": command("train", *MODEL, "--out", disk / "model"),
        "report": command("report", study),
        "watch": command("watch", study, "--once"),
        "plan": command("capacity", *FLAGS, "--plan", "--out", study),
    }
    assert before == {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert tried(replace(MORE, out=study)) is None
    return {"commands": commands, "rows": load_rows(study)}


if __name__ == "__main__":
    group.CHECKPOINT_SECONDS = 0.0  # type: ignore[attr-defined]
    sys.modules["fastmem.sweeps.plan"].plan.__defaults__ = (0.05, False)  # type: ignore[attr-defined]
    place = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], check=True)
    undisturbed = place.parent / "undisturbed"
    assert tried(replace(MORE, out=undisturbed)) is None
    found = {
        "full": full_then_free(place),
        "at": {part: full_at(place, part) for part in ("checkpoints", "sequence_bits", "rows")},
        "read_only": read_only(place),
        "undisturbed": load_rows(undisturbed),
    }
    print(json.dumps(found))
