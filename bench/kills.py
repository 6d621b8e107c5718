"""Kills sweeps with SIGKILL at random moments, resumes them, and compares their rows with the rows
of an undisturbed sweep.

    python bench/kills.py --driver 40 --worker 40 --ray 20 --json bench/results/kills.json

--driver kills the main process, which trains itself or has two workers or Ray; --worker kills one
of two worker processes; --ray kills the head (gcs_server), the raylet or a worker of a local Ray. A
sweep is resumed until it ends. Then its rows must equal those of the undisturbed sweep to the byte,
except for times and peak memory, each once and whole. After each attempt all processes of the sweep
must have ended. Stops at the first difference. Kills are added to those in the JSON file.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import fastmem
from fastmem.training import group

VARY = ("seconds", "tokens_per_second", "flops_per_second", "mfu", "peak_bytes")
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "1000",
    "FASTMEM_CHECKPOINT_SECONDS": "0.2",
}
KINDS = {
    "driver": {"": "driver"},
    "worker": {"multiprocessing.spawn": "worker"},
    "ray": {"/gcs_server ": "Ray head", "/raylet ": "raylet", "ray::1x": "Ray worker"},
}
"""For each flag: a part of the victim's command line, and its name."""
EACH = 6
"""The most kills in one sweep, since a worker needs some seconds to restart."""
END_SECONDS = 120.0
"""Time for a sweep to end, or for its processes to end after a kill."""


@dataclass
class Tally:
    """Counts of kills, and of the sweeps and rows compared."""

    kills: Counter[str] = field(default_factory=Counter)
    sweeps: int = 0
    rows: int = 0
    restarts: int = 0

    @staticmethod
    def read(path: Path | None) -> "Tally":
        if path is None or not path.exists():
            return Tally()
        found = json.loads(path.read_text())
        return Tally(**{**found, "kills": Counter(found["kills"])})

    def write(self, path: Path | None) -> None:
        if path is not None:
            path.write_text(json.dumps(vars(self), indent=1, sort_keys=True) + "\n")

    def of(self, victim: str) -> int:
        return sum(self.kills[kind] for kind in KINDS[victim].values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for victim in KINDS:
        parser.add_argument(f"--{victim}", type=int, default=0, help="how many kills")
    parser.add_argument("--steps", type=int, default=800, help="steps of each of the 8 runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time limit")
    parser.add_argument("--json", type=Path, help="file of counts; its kills are not repeated")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    draw, tally = random.Random(options.seed), Tally.read(options.json)
    with tempfile.TemporaryDirectory() as name:
        whole = rows_of(finished(Path(name) / "whole", options.steps))
        for victim in KINDS:
            while (left := min(EACH, getattr(options, victim) - tally.of(victim))) > 0:
                if time.monotonic() > end:
                    return 0
                folder = Path(tempfile.mkdtemp(dir=name))
                disturbed(folder, options.steps, victim, left, draw, tally)
                compare(folder, whole, tally)
                tally.write(options.json)
                print(f"{victim}: {tally.of(victim)} kills, {tally.rows} rows the same", flush=True)
    return 0


def disturbed(
    folder: Path, steps: int, victim: str, kills: int, draw: random.Random, tally: Tally
) -> None:
    """Runs a sweep to its end, with at most `kills` kills on the way."""
    done = 0
    while True:
        how: dict[str, Any] = {"workers": 2}
        if victim == "driver":
            how = draw.choice(({}, {"workers": 2}, {"workers": 2}, {"ray": "local"}))
        if victim == "ray":
            how = {"ray": "local"}
        process = start(folder, steps, how)
        ours: set[int] = set()
        while done < kills and began(folder, process, victim == "ray"):
            process.join(draw.uniform(0, 6))
            family = descendants(process.pid)
            ours |= family.keys()
            target = choose(victim, process.pid, family, draw)
            if process.is_alive() and target is not None:
                pid, kind = target
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    done += 1
                    tally.kills[kind] += 1
                if "worker" not in kind:
                    break
        code = end(process)
        gone(ours)
        if code == 0:
            return
        tally.restarts += 1


def choose(
    victim: str, driver: int, family: dict[int, str], draw: random.Random
) -> tuple[int, str] | None:
    """The id of the process to kill, and its name."""
    wanted, kind = draw.choice(list(KINDS[victim].items()))
    if victim == "driver":
        return driver, kind
    candidates = sorted(pid for pid, command in family.items() if wanted in command)
    return (draw.choice(candidates), kind) if candidates else None


def start(folder: Path, steps: int, how: dict[str, Any]) -> BaseProcess:
    """Starts a driver: a fork of this process, which has loaded torch and started no threads."""
    process = get_context("fork").Process(target=drive, args=(folder, steps, how))
    process.start()
    return process


def drive(folder: Path, steps: int, how: dict[str, Any]) -> None:
    """The main function of a driver; exits with 1 if a run failed."""
    with (folder.parent / "output.txt").open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.environ.update(SETTINGS)  # for workers, which load torch again
    torch.set_num_threads(1)
    group.CHECKPOINT_SECONDS = float(SETTINGS["FASTMEM_CHECKPOINT_SECONDS"])
    grid = fastmem.SweepConfig(width=(8, 12), heads=(2,), vocab=16, length=4, counts=(4, 8))
    config = replace(grid, steps=steps, out=folder, **how)
    rows = list(fastmem.sweep(config, progress=False))
    sys.exit(any(row["status"] == "failed" for row in rows))


def end(process: BaseProcess) -> int:
    """The exit code of a driver that ended or was killed."""
    process.join(END_SECONDS)
    if process.exitcode is None:
        raise AssertionError(f"the driver {process.pid} does not end")
    return process.exitcode


def finished(folder: Path, steps: int) -> Path:
    """Runs a sweep to its end in one process; returns its folder."""
    if end(start(folder, steps, {})):
        raise AssertionError((folder.parent / "output.txt").read_text()[-2000:])
    return folder


def began(folder: Path, process: BaseProcess, is_training: bool) -> bool:
    """Waits until the sweep holds its lock, or trains; False if it ends before."""
    while process.is_alive():
        with contextlib.suppress(OSError, ValueError):
            is_locked = json.loads((folder / "lock").read_text())["pid"] == process.pid
            if is_locked and (not is_training or any((folder / "running").iterdir())):
                return True
        time.sleep(0.02)
    return False


def descendants(pid: int) -> dict[int, str]:
    """Ids and command lines of the descendants of a process."""
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(stat[1])
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                commands[int(entry.name)] = command.decode(errors="replace")
    return {child: commands[child] for child in below(pid, parents)}


def below(pid: int, parents: dict[int, int]) -> Iterator[int]:
    for child, parent in parents.items():
        if parent == pid:
            yield child
            yield from below(child, parents)


def gone(processes: set[int]) -> None:
    """Waits until all processes have ended; a zombie counts as ended."""
    limit = time.monotonic() + END_SECONDS
    while left := [pid for pid in processes if alive(pid)]:
        if time.monotonic() > limit:
            raise AssertionError(f"processes {left} outlived their driver")
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rows_of(folder: Path) -> dict[str, str]:
    """Each row of a folder as text, without the fields that differ between equal sweeps."""
    return {row["key"]: json.dumps(constant(row)) for row in fastmem.load_rows(folder)}


def constant(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: constant(v) for key, v in value.items() if key not in VARY}
    return [constant(v) for v in value] if isinstance(value, list) else value


def compare(folder: Path, whole: dict[str, str], tally: Tally) -> None:
    """AssertionError if a row is lost, doubled, torn or different."""
    found = rows_of(folder)
    if found != whole:
        differ = [key for key in whole | found if whole.get(key) != found.get(key)]
        raise AssertionError(f"{differ} of {folder} differ from the undisturbed sweep")
    files = {path.name for path in (folder / "rows").iterdir() if not path.name.endswith(".part")}
    if files != {f"{key}.json" for key in whole} or any((folder / "running").iterdir()):
        raise AssertionError(f"{folder} holds {sorted(files)}")
    tally.sweeps += 1
    tally.rows += len(found)


if __name__ == "__main__":
    sys.exit(main())
