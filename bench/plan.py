"""The planned time of a sweep against its real time: python bench/plan.py

The laptop preset with fewer steps and seeds, each shape alone, then the whole.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import fastmem
from fastmem.sweeps.config import LAPTOP
from fastmem.sweeps.plan import CALIBRATION_SECONDS, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--calibration", type=float, default=CALIBRATION_SECONDS)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            LAPTOP, steps=options.steps, seeds=tuple(range(options.seeds)), out=Path(folder)
        )
        start = time.perf_counter()
        planned = plan(config, options.calibration)
        calibrated = time.perf_counter() - start
        spent = {line.model.width: 0.0 for line in planned.lines}
        start = before = time.perf_counter()
        for row in fastmem.sweep(config, progress=False):
            now = time.perf_counter()
            spent[row["model"]["width"]] += now - before
            before = now
        took = time.perf_counter() - start
    ratios = {line.model.width: spent[line.model.width] / line.seconds for line in planned.lines}
    for width, ratio in ratios.items():
        print(f"width {width}: took {spent[width]:.2f} s, {ratio:.2f} of the planned time")
    total = took / planned.seconds
    print(f"planned {planned.seconds:.1f} s in {calibrated:.1f} s, took {took:.1f} s: {total:.2f}")
    if options.json:
        numbers = {"planned": planned.seconds, "took": took, "by_width": ratios}
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
