"""Figures of members against held-out sequences: bits of each sequence, and double descent.

S tokens a sequence, V vocabulary. Bits are of the S - 1 coded tokens (strict).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmem.base.stats import Floats
from fastmem.base.storage import Row
from fastmem.memorization.capacity import best_rows, model_key
from fastmem.report.figures import (
    COLOURS,
    GREY_LINE,
    MUTED,
    ModelStyle,
    by_shape,
    legend,
    log_axes,
    log_ticks,
    model_handles,
    model_styles,
    shape_fields,
)
from fastmem.sweeps.store import read_sequence_bits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 48
UNIFORM = GREY_LINE | {"label": "every token equally likely"}


@dataclass(frozen=True)
class Sample:
    """Bits of each sequence after one run."""

    row: Row
    members: Floats
    """(N,) bits of the training sequences."""
    held_out: Floats
    """(M,) bits of held-out sequences of the same distribution."""


def uniform_bits(row: Row) -> float:
    """Bits of a sequence if all tokens are equally likely: (S - 1) · log2 V."""
    return float((row["model"]["length"] - 1) * log2(row["model"]["vocab"]))


def read_samples(rows: Sequence[Row], folder: Path) -> list[Sample]:
    """Up to three runs of the largest model with sequence_bits/: the runs with the smallest data
    set, the most memorized bits, and the largest data set.

    Raises:
        ValueError: pyarrow is not installed, or a file does not hold sequence bits.
    """
    stored = {path.stem for path in (folder / "sequence_bits").glob("*.parquet")}
    scored = [row for row in rows if row["status"] == "done" and row["key"] in stored]
    if not scored:
        return []
    largest = max(scored, key=lambda row: (row["parameters"], row["precision"] == "fp32"))
    runs = [row for row in scored if model_key(row) == model_key(largest)]
    (best,) = best_rows(runs)
    runs.sort(key=lambda row: -row["seed"])  # so that by_count keeps the smallest seed
    by_count = {row["sequences"]["count"]: row for row in runs}
    counts = {min(by_count), best["sequences"]["count"], max(by_count)}
    return [
        Sample(by_count[count], *read_sequence_bits(folder, by_count[count]["key"]))
        for count in sorted(counts)
    ]


def histogram(samples: Sequence[Sample]) -> list[Row]:
    """Fractions of members and of held-out sequences in each of 48 equal bins."""
    all_bits = np.concatenate([np.r_[s.members, s.held_out] for s in samples])
    edges = np.linspace(min(0.0, all_bits.min()), all_bits.max(), BINS + 1)
    records = []
    for sample in samples:
        fractions = [
            np.histogram(bits, edges)[0] / len(bits) for bits in (sample.members, sample.held_out)
        ]
        for low, high, member, other in zip(edges[:-1], edges[1:], *fractions, strict=True):
            records.append(
                {
                    "run": sample.row["key"],
                    "count": sample.row["sequences"]["count"],
                    "bits_from": float(low),
                    "bits_to": float(high),
                    "share_of_members": float(member),
                    "share_of_held_out": float(other),
                }
            )
    return records


def bits_of_sequences(figure: "Figure", samples: Sequence[Sample]) -> None:
    """Draws the distributions of bits per sequence, one panel a data set size."""
    records = histogram(samples)
    panels = figure.subplots(len(samples), sharex=True, squeeze=False)[:, 0]
    for axes, sample in zip(panels, samples, strict=True):
        bins = [record for record in records if record["run"] == sample.row["key"]]
        edges = [*(record["bits_from"] for record in bins), bins[-1]["bits_to"]]
        for name, colour, label in (
            ("share_of_members", COLOURS[0], "members"),
            ("share_of_held_out", COLOURS[1], "held-out sequences"),
        ):
            fractions = [record[name] for record in bins]
            axes.stairs(fractions, edges, fill=True, color=colour, alpha=0.25, linewidth=0)
            axes.stairs(fractions, edges, color=colour, linewidth=1.6, label=label)
        axes.axvline(uniform_bits(sample.row), **UNIFORM)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda fraction, _: f"{fraction:.0%}")
        text = f"N = {sample.row['sequences']['count']:,}"
        axes.annotate(
            text, (1, 1), (-6, -4), "axes fraction", "offset points", va="top", ha="right"
        )
    panels[-1].set_xlabel("bits of a sequence, without its first token")
    panels[0].set_title("Bits of a sequence: fractions of members and of held-out sequences")
    legend(figure, panels[0].get_legend_handles_labels()[0])


def descent(summary: Row, rows: Sequence[Row]) -> list[Row]:
    """Mean bits of a held-out sequence against entropy / capacity, for each run that scored them.

    The capacity is of the model at the precision of the run: at 1 the data fill the model.
    """
    names = rows[0]["model"]
    capacities = {
        model_key(model | {"model": {name: model[name] for name in names}}): (
            model["capacity_bits"]["published"]
        )
        for model in summary["models"]
    }
    records = []
    for row in rows:
        capacity = capacities[model_key(row)]
        scored = row["status"] == "done" and row.get("held_out_bits") is not None
        if not scored or not capacity or capacity["estimate"] <= 0:
            continue
        records.append(
            {
                **shape_fields(row),
                "count": row["sequences"]["count"],
                "seed": row["seed"],
                "entropy_over_capacity": row["entropy_bits"] / capacity["estimate"],
                "held_out_bits": row["held_out_bits"],
                "uniform_bits": uniform_bits(row),
            }
        )
    return records


def held_out_against_load(figure: "Figure", records: Sequence[Row]) -> None:
    """Draws mean bits of a held-out sequence over entropy / capacity: double descent."""
    from matplotlib.lines import Line2D

    axes = log_axes(figure, y=False)
    models = by_shape(records)
    firsts = [of_model[0] for of_model in models]
    for of_model, style in zip(models, model_styles(firsts), strict=True):
        x = [record["entropy_over_capacity"] for record in of_model]
        _points_and_means(axes, x, [record["held_out_bits"] for record in of_model], style)
    axes.axhline(records[0]["uniform_bits"], **UNIFORM)
    axes.axvline(1.0, color=MUTED, linewidth=0.8)
    axes.set(xlabel="entropy of the data / capacity", ylabel="bits of a held-out sequence")
    axes.set_title("Bits of a held-out sequence against entropy over capacity")
    legend(figure, [*model_handles(firsts), Line2D([], [], **UNIFORM)])


def membership_records(records: Sequence[Row]) -> list[Row]:
    """The records of `membership` in capacity.json without nested values, for CSV."""
    flat = []
    for record in records:
        row = {
            name: value["estimate"] if isinstance(value, dict) else value
            for name, value in record.items()
            if name != "extraction"
        }
        for rate in record["extraction"] or ():
            for of in ("train", "test"):
                row[f"extracted_{rate['prefix']}_{of}"] = rate[of]["estimate"]
        flat.append(row)
    return flat


def membership_against_load(figure: "Figure", records: Sequence[Row]) -> None:
    """Draws AUC and F1, and rates of extraction, over bits of data per bit of parameters."""
    extracted = any(record["extraction"] for record in records)
    panels = figure.subplots(1 + extracted, sharex=True, squeeze=False)[:, 0]
    models = by_shape(records)
    firsts = [of_model[0] for of_model in models]
    for of_model, style in zip(models, model_styles(firsts), strict=True):
        x = [record["data_bits_per_parameter_bit"] for record in of_model]
        for name, dash in (("auc", "-"), ("f1", (0, (4, 2)))):
            y = [record[name]["estimate"] for record in of_model]
            _points_and_means(panels[0], x, y, style._replace(dash=dash))
        rated = [place for place, record in enumerate(of_model) if record["extraction"]]
        for of, dash in (("train", "-"), ("test", (0, (1, 2)))):
            y = [100 * of_model[place]["extraction"][-1][of]["estimate"] for place in rated]
            _points_and_means(panels[-1], [x[at] for at in rated], y, style._replace(dash=dash))
    panels[0].axhline(0.5, color=MUTED, linewidth=0.8)
    panels[0].set_ylabel("AUC, F1")
    if extracted:
        panels[-1].set_ylabel("% extracted")
    log_ticks(panels[-1].xaxis)
    panels[-1].set_xlabel("bits of data / bits of parameters")
    panels[0].set_title("Membership and extraction against bits of data")
    legend(figure, model_handles(firsts))


def _points_and_means(
    axes: "Axes", x: Sequence[float], y: Sequence[float], style: ModelStyle
) -> None:
    """Draws the runs of a model, and a line through their means over seeds."""
    faint: dict[str, Any] = {"markersize": 5, "alpha": 0.5, "markeredgewidth": 0}
    axes.plot(x, y, style.marker, color=style.colour, **faint)
    sizes = sorted(set(x))
    means = [np.mean([b for a, b in zip(x, y, strict=True) if a == size]) for size in sizes]
    axes.plot(sizes, means, color=style.colour, linestyle=style.dash, linewidth=1.8)
