"""Draws docs/figures/attention.png from the JSON file of attention.py: figure.py FILE."""

import json
import sys
from pathlib import Path
from typing import Any

from fastmem.report.figures import COLOURS, GRID, legend, log_ticks, write_figure


def draw(figure: Any) -> None:
    axes, rows = figure.add_subplot(), json.loads(Path(sys.argv[1]).read_text())["rows"]
    peers = [row for row in rows if row["way"] == "torch"]
    for y, torch in enumerate(peers):
        alike = [r for r in rows if r["case"] == torch["case"] and r["way"] == "groups"]
        ours = sum(min(r.get(f"{p}_us", 1e9) for r in alike) for p in ("forward", "backward"))
        axes.plot([ours, torch["both_us"]], [y, y], color=GRID, lw=3, zorder=1)
        axes.plot(ours, y, "o", color=COLOURS[0], label=None if y else "groups")
        axes.plot(torch["both_us"], y, "s", color=COLOURS[1], label=None if y else "PyTorch")
        axes.text(torch["both_us"] * 1.2, y, f"{torch['both_us'] / ours:.1f} ×", va="center")
    axes.set_yticks(range(len(peers)), [row["case"] for row in peers])
    axes.set(ylim=(11.7, -0.7), xlim=(8, 8e4), xlabel="forward and backward, µs")
    axes.set_title("(B, T, heads, width)", x=-0.4)
    log_ticks(axes.xaxis)
    legend(figure, axes.get_legend_handles_labels()[0])


for path in write_figure(draw, Path(__file__).parents[2] / "docs/figures/attention"):
    if path.suffix != ".png":
        path.unlink()
