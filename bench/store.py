"""The time to open a folder of many runs: python bench/store.py [--runs 5000]

Trains one small sweep and copies its rows under new seeds and keys.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastmem
from fastmem.base.storage import write_json
from fastmem.memorization.scaling_law import law_of_rows
from fastmem.sweeps.store import write_curves

REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder, options.runs)
        rows = fastmem.load_rows(folder)
        assert len(fastmem.load(folder)) == len(rows) == options.runs
        tasks: dict[str, Callable[[], Any]] = {
            "load_rows": lambda: fastmem.load_rows(folder),
            "load": lambda: fastmem.load(folder),
            "law_of_rows": lambda: law_of_rows(rows),
            "write_curves": lambda: write_curves(folder, rows),
        }
        seconds = {name: median_seconds(task) for name, task in tasks.items()}
    for name, value in seconds.items():
        print(f"{name:12}  {options.runs:,} runs  {value:.3f} s")
    if options.json:
        options.json.write_text(json.dumps({"runs": options.runs, "seconds": seconds}, indent=1))


def fill(folder: Path, runs: int) -> None:
    """Writes rows of runs with 10 widths, 4 data set sizes and enough seeds."""
    with tempfile.TemporaryDirectory() as small:
        grid = fastmem.SweepConfig(
            width=tuple(range(4, 44, 4)), counts=(50, 100, 200, 400), seeds=(0,), steps=50
        )
        trained = list(fastmem.sweep(replace(grid, out=Path(small)), progress=False))
    for number in range(runs):
        seed, which = divmod(number, len(trained))
        row = trained[which] | {"seed": seed, "key": f"{number:06}"}
        write_json(folder / "rows" / f"{number:06}.json", row)


def median_seconds(task: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return sorted(times)[REPEATS // 2]


if __name__ == "__main__":
    main()
