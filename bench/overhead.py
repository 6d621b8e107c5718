"""The overhead of a sweep over its training, and the speedup by a second worker.

    python bench/overhead.py --json bench/results/overhead.json
    python bench/overhead.py --scaling 1 2 --json bench/results/scaling.json

The first command trains short runs (one thread, 50 steps) as a sweep in this process, with two
workers and through a local Ray, and in a plain loop of `train` without rows, files and workers.
Overhead per run is the time between the first and the last row times the number of workers, divided
by the number of runs, minus the time per run of the loop; the time to start workers is separate.
The second command times a sweep of single-threaded runs with one worker and with two, including
their start, each in a new process that has loaded torch; times are added to the JSON file. Medians
of --repeats.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fastmem

WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "this process": (1, {}),
    "two workers": (2, {"workers": 2}),
    "Ray": (0, {"ray": "local"}),
}
BARS = {"this process": 0.020, "two workers": 0.020, "Ray": 0.100}
"""Goals, in seconds a run."""
SCALING_BAR = 1.8
PROGRAM = """
import sys, time
from pathlib import Path
import fastmem
grid = fastmem.SweepConfig(
    width=(16,), counts=tuple(range(50, 50 + int(sys.argv[2]))), seeds=(0,), steps=int(sys.argv[3]),
    workers=int(sys.argv[4]), out=Path(sys.argv[1]))
start = time.perf_counter()
rows = list(fastmem.sweep(grid, progress=False))
seconds = time.perf_counter() - start
assert all(row["status"] == "done" for row in rows)
print(seconds, sum(row["seconds"] for row in rows))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scaling", nargs="+", choices=("1", "2"), help="numbers of workers")
    parser.add_argument("--runs", type=int, help="default 60, with --scaling 24")
    parser.add_argument("--steps", type=int, help="steps a run; default 50, with --scaling 3500")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        runs = options.runs or (24 if options.scaling else 60)
        steps = options.steps or (3500 if options.scaling else 50)
        if options.scaling:
            tries: dict[str, list[list[float]]] = {"1": [], "2": []}
            if options.json and options.json.exists():
                tries = json.loads(options.json.read_text())["tries"]
            for workers in options.scaling * options.repeats:
                tries[workers].append(sweep_seconds(Path(name), runs, steps, workers))
            found = scaling(tries)
        else:
            found = overhead(Path(name), runs, steps, options.repeats, options.ways)
    found |= {"runs": runs, "steps": steps, "cpu": cpu(), "cores": len(os.sched_getaffinity(0))}
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def overhead(
    folder: Path, runs: int, steps: int, repeats: int, names: Sequence[str]
) -> dict[str, Any]:
    """Overhead in milliseconds a run."""
    counts = tuple(range(20, 20 + runs))
    grid = fastmem.SweepConfig(width=(8,), counts=counts, seeds=(0,), steps=steps)
    plain = [bare(grid) for _ in range(repeats)]
    ways = {}
    for name in names:
        slots, how = WAYS[name]
        tries, started = [], []
        for k in range(repeats if slots else 1):
            config = replace(grid, out=folder / f"{name}{k}", **how)
            begun = time.perf_counter()
            times = [time.perf_counter() for _ in fastmem.sweep(config, progress=False)]
            started.append(times[0] - begun)
            side_by_side = slots or len(os.sched_getaffinity(0))
            each = side_by_side * (times[-1] - times[0]) / (len(times) - 1)
            tries.append(1000 * (each - median(plain)))
        ways[name] = {
            "overhead_ms": median(tries),
            "tries_ms": tries,
            "bar_ms": 1000 * BARS[name],
            "first_row_after_s": median(started),
        }
    return {"bare_ms": 1000 * median(plain), "ways": ways}


def bare(grid: fastmem.SweepConfig) -> float:
    """Seconds a run in a plain loop, without the first run, which loads and measures once."""
    times = []
    for run in grid.runs():
        model = fastmem.GPT(run.model, seed=run.train.seed)
        fastmem.train(model, run.sequences, run.train, progress=False)
        times.append(time.perf_counter())
    return (times[-1] - times[0]) / (len(times) - 1)


def sweep_seconds(folder: Path, runs: int, steps: int, workers: str) -> list[float]:
    """Seconds of a whole sweep in a new process, and the sum of the seconds in its rows."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
    out = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, "-c", PROGRAM, out, str(runs), str(steps), workers]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return [float(seconds) for seconds in done.stdout.split()]


def scaling(tries: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Median time with one worker divided by median time with two, once both are measured: for
    whole sweeps, and for their runs alone, which shows what two busy cores give of twice one
    core."""
    found: dict[str, Any] = {"tries": tries, "bar": SCALING_BAR}
    if all(tries.values()):
        one, two = (
            [median(values) for values in zip(*tries[workers], strict=True)] for workers in "12"
        )
        found |= {"speedup": one[0] / two[0], "speedup_of_runs": 2 * one[1] / two[1]}
    return found


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
