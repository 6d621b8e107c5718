"""Heads at equal parameters: do narrow heads memorize more, or do they only learn sooner?

    python bench/heads.py heads-runs          # hours on two cores; resumes after a stop

Trains each shape with each number of heads in stages of doubled steps until converged. Prints bits
per parameter at the stages and extrapolated to endless training, and draws docs/figures/heads.png.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastmem import SweepConfig, load_rows, sweep
from fastmem.base.storage import Row
from fastmem.report.figures import COLOURS, MARKERS, legend, write_figure

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "heads"
TO_CONVERGENCE = SweepConfig(until="converged", steps=32000, loads=(4.0,))
STUDIES = {
    "1x16": replace(TO_CONVERGENCE, width=(16,), heads=(1, 2, 4, 8), seeds=(0, 1, 2)),
    "2x16": replace(TO_CONVERGENCE, layers=(2,), width=(16,), heads=(1, 2, 4, 8)),
    "1x32": replace(TO_CONVERGENCE, width=(32,), heads=(1, 4, 16)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=TO_CONVERGENCE.steps)
    parser.add_argument("--shapes", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--figure", type=Path, default=FIGURE)
    given = parser.parse_args(arguments)
    found: dict[str, dict[int, list[Row]]] = {}
    for name in given.shapes:
        study = replace(STUDIES[name], steps=given.steps, out=given.folder / f"heads-{name}")
        list(sweep(study))
        by_heads: dict[int, list[Row]] = {}
        for row in load_rows(study.out):
            by_heads.setdefault(row["model"]["heads"], []).append(row)
        found[name] = dict(sorted(by_heads.items()))
        print("\n".join(report(name, found[name])), flush=True)
    for path in write_figure(lambda figure: draw(figure, found), given.figure):
        if path.suffix != ".png":
            path.unlink()
    return 0


def report(name: str, by_heads: dict[int, list[Row]]) -> list[str]:
    """A line for each number of heads: the mean over seeds at each stage that all reached, the
    least, mean and greatest at the end, and the hull of the extrapolated intervals."""
    lines = []
    for heads, rows in by_heads.items():
        _, bits = stages(rows)
        last = [row["memorized_bits"]["strict"] / row["parameters"] for row in rows]
        text = f"{name}, {heads} heads: {' '.join(f'{b:.2f}' for b in bits)}; at the end "
        text += f"{min(last):.2f} {np.mean(last):.2f} {max(last):.2f}"
        endless = [row["extrapolated_bits"] for row in rows if row["extrapolated_bits"]]
        if endless:
            low = min(e["low"] for e in endless) / rows[0]["parameters"]
            high = max(e["high"] for e in endless) / rows[0]["parameters"]
            text += f"; endless {low:.2f} to {high:.2f}"
        lines.append(text)
    return lines


def stages(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    """Steps and mean bits per parameter of the stages that all runs finished."""
    together = list(zip(*(row["stages"] for row in rows), strict=False))
    steps = [stage[0]["step"] for stage in together]
    P = rows[0]["parameters"]
    return steps, [float(np.mean([s["memorized_bits"] for s in stage])) / P for stage in together]


def draw(figure: Any, found: dict[str, dict[int, list[Row]]]) -> None:
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    heads = sorted({number for by_heads in found.values() for number in by_heads})
    for one, (name, by_heads) in zip(axes, found.items(), strict=True):
        for number, rows in by_heads.items():
            steps, bits = stages(rows)
            place = heads.index(number)
            one.plot(steps, bits, color=COLOURS[place], marker=MARKERS[place], markersize=4)
        one.set_xscale("log", base=2)
        one.set(title=name.replace("x", " × "), xlabel="optimizer steps")
    axes[0].set_ylabel("memorized bits per parameter")
    handles = [
        axes[0].plot([], [], color=COLOURS[k], marker=MARKERS[k], label=f"{number} heads")[0]
        for k, number in enumerate(heads)
    ]
    legend(figure, handles)


if __name__ == "__main__":
    sys.exit(main())
