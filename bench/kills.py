"""Sweeps that are killed with SIGKILL at random moments, gone on with, and compared with one that
nobody disturbed.

    python bench/kills.py --driver 40 --worker 40 --ray 20 --json bench/results/kills.json

--driver kills the process that was started, which trains itself or has two workers or Ray; --worker
one of two worker processes; --ray the head (gcs_server), the raylet or a worker of a local Ray. A
sweep is started again until it ends, then its rows must be those of the undisturbed one to the
byte, but for times and peak memory, each there once and whole; after each kill the processes of the
sweep must be gone. Stops at the first difference. Counts are added to those in the JSON file.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastmem

VARY = ("seconds", "tokens_per_second", "flops_per_second", "mfu", "peak_bytes")
PROGRAM = """
import sys
from pathlib import Path
import fastmem
grid = fastmem.SweepConfig(
    width=(8, 12), heads=(2,), vocab=16, length=4, counts=(4, 8), steps=int(sys.argv[2]),
    out=Path(sys.argv[1]), **eval(sys.argv[3]))
rows = list(fastmem.sweep(grid, progress=False))
sys.exit(any(row["status"] == "failed" for row in rows))
"""
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "1000",
    "FASTMEM_CHECKPOINT_SECONDS": "0.2",
}
END_SECONDS = 120.0
"""In which a sweep ends, or its processes after a kill."""


@dataclass
class Tally:
    """What was killed, and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    sweeps: int = 0
    rows: int = 0
    restarts: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for victim in ("driver", "worker", "ray"):
        parser.add_argument(f"--{victim}", type=int, default=0, help="how many kills")
    parser.add_argument("--steps", type=int, default=1500, help="of each of the 8 runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    draw, tally = random.Random(options.seed), Tally()
    with tempfile.TemporaryDirectory() as name:
        whole = rows_of(finished(Path(name) / "whole", options.steps))
        wanted = {v: getattr(options, v) for v in ("driver", "worker", "ray")}
        for victim, kills in wanted.items():
            done = 0
            while done < kills:
                folder = Path(tempfile.mkdtemp(dir=name))
                done += disturbed(folder, options.steps, victim, kills - done, draw, tally)
                compare(folder, whole, tally)
                print(f"{victim}: {done} kills, {tally.rows} rows the same", flush=True)
    if options.json:
        add(options.json, tally)
    return 0


def disturbed(
    folder: Path, steps: int, victim: str, kills: int, draw: random.Random, tally: Tally
) -> int:
    """A sweep with at most so many kills, until it has ended; the number of kills."""
    done = 0
    while True:
        how: dict[str, Any] = {"workers": 2}
        if victim == "driver":
            how = draw.choice(({}, {"workers": 2}, {"workers": 2}, {"ray": "local"}))
        if victim == "ray":
            how = {"ray": "local"}
        process = start(folder, steps, how)
        ours: set[int] = set()
        while process.poll() is None and done < kills and began(folder, process):
            wait(draw.uniform(0, 6), process)
            family = descendants(process.pid)
            ours |= family.keys()
            target = choose(victim, process.pid, family, draw)
            if process.poll() is None and target is not None:
                pid, kind = target
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    done += 1
                    tally.kills[kind] += 1
                if kind != "worker" and kind != "Ray worker":
                    break
        code = process.wait(END_SECONDS)
        gone(ours | {process.pid})
        if code == 0:
            return done
        tally.restarts += 1
        if done >= kills:
            finished(folder, steps)
            return done


def choose(
    victim: str, driver: int, family: dict[int, str], draw: random.Random
) -> tuple[int, str] | None:
    """The process to kill, and what it is."""
    if victim == "driver":
        return driver, "driver"
    kinds = {"multiprocessing.spawn": "worker"}
    if victim == "ray":
        kinds = {"/gcs_server ": "Ray head", "/raylet ": "raylet", "ray::1x": "Ray worker"}
    wanted = draw.choice(list(kinds))
    there = sorted(pid for pid, command in family.items() if wanted in command)
    return (draw.choice(there), kinds[wanted]) if there else None


def start(folder: Path, steps: int, how: dict[str, Any]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", PROGRAM, str(folder), str(steps), repr(how)]
    with (folder.parent / "told.txt").open("ab") as told:
        return subprocess.Popen(command, stdout=told, stderr=told, env={**os.environ, **SETTINGS})


def finished(folder: Path, steps: int) -> Path:
    """The folder, its sweep gone on with until it has ended, by one process."""
    if start(folder, steps, {}).wait(END_SECONDS):
        raise AssertionError((folder.parent / "told.txt").read_text()[-2000:])
    return folder


def began(folder: Path, process: "subprocess.Popen[bytes]") -> bool:
    """Waits until the sweep has its lock; False if it has ended before."""
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            if json.loads((folder / "lock").read_text())["pid"] == process.pid:
                return True
        time.sleep(0.02)
    return False


def wait(seconds: float, process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def descendants(pid: int) -> dict[int, str]:
    """Of a process: each one's id and command line."""
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
    """Waits until none of them is there; a zombie, whose parent has not looked, is gone too."""
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
    """Each row of a folder as text, without what two runs of the same sweep differ in."""
    return {row["key"]: json.dumps(constant(row)) for row in fastmem.load_rows(folder)}


def constant(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: constant(v) for key, v in value.items() if key not in VARY}
    return [constant(v) for v in value] if isinstance(value, list) else value


def compare(folder: Path, whole: dict[str, str], tally: Tally) -> None:
    """AssertionError if a row is lost, doubled, torn or another."""
    found = rows_of(folder)
    if found != whole:
        differ = [key for key in whole | found if whole.get(key) != found.get(key)]
        raise AssertionError(f"{differ} of {folder} are not as in the undisturbed sweep")
    files = {path.name for path in (folder / "rows").iterdir() if not path.name.endswith(".part")}
    if files != {f"{key}.json" for key in whole} or any((folder / "running").iterdir()):
        raise AssertionError(f"{folder} holds {sorted(files)}")
    tally.sweeps += 1
    tally.rows += len(found)


def add(path: Path, tally: Tally) -> None:
    """Adds the counts to those in the file."""
    before = json.loads(path.read_text()) if path.exists() else {"kills": {}}
    counts = {n: before.get(n, 0) + getattr(tally, n) for n in ("sweeps", "rows", "restarts")}
    kills = dict(sorted((Counter(before["kills"]) + tally.kills).items()))
    path.write_text(json.dumps({"kills": kills, **counts}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
