"""Rows of a sweep as figures."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmem.base.storage import Row
from fastmem.memorization.scaling_law import PUBLISHED
from fastmem.report.figures import (
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    MUTED,
    key,
    legend,
    log_axes,
    looks,
    shape_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 1000
"""More runs than these are drawn as means over seeds, without a point each."""
SIDE_POINTS = 7
"""Between the points of one model at two precisions, in points of type: nothing on the axis."""
LINES = 150
"""More runs than these are drawn as training curves of the runs at capacity only."""


def memorized_against_count(figure: "Figure", summary: dict[str, Any]) -> None:
    """Memorized bits over data set size: the entropy diagonal, then each model's plateau."""
    from matplotlib.lines import Line2D

    axes = log_axes(figure)
    models = _with_capacity(summary)
    diagonal: dict[int, float] = {}
    few = sum(len(model["runs"]) for model in models) <= POINTS
    for model, look in zip(models, looks(models), strict=True):
        done = [run for run in model["runs"] if run["status"] == "done"]
        S = model["length"]
        diagonal |= {run["count"]: run["entropy_bits"] * (S - 1) / S for run in done}
        counts = np.array([run["count"] for run in done])
        bits = np.array([run["memorized_bits"]["strict"] for run in done])
        sizes = np.unique(counts)
        means = [bits[counts == size].mean() for size in sizes]
        if few:
            faint: dict[str, Any] = {"markersize": 5, "alpha": 0.5, "markeredgewidth": 0}
            axes.plot(counts, bits, look.marker, color=look.colour, **faint)
        axes.plot(sizes, means, color=look.colour, linewidth=2, linestyle=look.dash)
    if diagonal:
        line = sorted(diagonal.items())
        style: dict[str, Any] = {"color": MUTED, "linewidth": 1.2, "label": "entropy of the data"}
        axes.plot(*zip(*line, strict=True), **style)
        legend(figure, [*key(models), Line2D([], [], **style)])
    axes.set(xlabel="data set size (sequences)", ylabel="memorized bits")
    axes.set_title("Memorized bits follow the entropy of the data, then stop at capacity")
    _plateaus(figure, axes, models)
    _say_if_empty(axes)


def _plateaus(figure: "Figure", axes: "Axes", models: Sequence[Row]) -> None:
    """A dashed level at each shape's capacity, with its bits per parameter at the right.

    Of many precisions the first is drawn; of more shapes than colours, none.
    """
    shapes: dict[tuple[int, ...], tuple[Row, str]] = {}
    styled = zip(models, looks(models), strict=True)
    for model, look in sorted(
        styled, key=lambda x: x[0]["precision"]
    ):  # fp32 comes last, and stays
        if _level(model) > 0:
            shapes[shape_of(model)] = (model, look.colour)
    if len(shapes) > len(COLOURS):
        return
    unit = " bits per parameter" if figure.get_figwidth() > 5 else ""
    low, high = np.log(axes.get_ylim())
    above = -1.0
    for model, colour in sorted(shapes.values(), key=lambda x: _level(x[0])):
        axes.axhline(_level(model), color=colour, linewidth=1, linestyle=(0, (4, 4)), alpha=0.7)
        # Labels of levels that are close would cover each other.
        above = max((np.log(_level(model)) - low) / (high - low), above + 0.06)
        axes.annotate(
            f"{model['bits_per_parameter']['strict']['estimate']:.2f}{unit}",
            (1.0, above),
            (5, 0),
            "axes fraction",
            "offset points",
            va="center",
            fontsize="small",
            color=INK,
        )


def _level(model: Row) -> float:
    return float(model["capacity_bits"]["strict"]["estimate"])


def capacity_against_parameters(figure: "Figure", summary: dict[str, Any]) -> None:
    """Capacity over parameters with the fit through the origin, and the published points.

    Models of a single size have no fit: one point gives no law.
    """
    axes = log_axes(figure)
    for column, name, fill in (("fp32_bits", "fp32", "full"), ("bf16_bits", "bf16", "none")):
        axes.plot(
            [row.parameters for row in PUBLISHED],
            [getattr(row, column) for row in PUBLISHED],
            "o",
            color=FAINT,
            fillstyle=fill,
            markersize=5,
            label=f"published, {name}",
        )
    published = [row.parameters for row in PUBLISHED]
    for place, (precision, fit) in enumerate(summary["by_precision"].items()):
        colour, marker = COLOURS[place], MARKERS[place]
        models = [model for model in _with_capacity(summary) if model["precision"] == precision]
        if not models:
            continue
        P = np.array([model["parameters"] for model in models], dtype=float)
        bits, errors = _with_errors([model["capacity_bits"]["published"] for model in models])
        label = f"measured, {precision}"
        axes.errorbar(
            P,
            bits,
            errors,
            fmt=marker,
            color=colour,
            capsize=2,
            markersize=7 - place,
            zorder=3 + place,
            label=label,
        )
        if len(set(P)) < 2:
            continue
        slope = fit["published"]
        ends = np.array([min(P.min(), *published), max(P.max(), *published)])
        label = f"fit, {precision}: {slope['estimate']:.2f} bits per parameter"
        axes.plot(ends, slope["estimate"] * ends, color=colour, linewidth=1.2, label=label)
        if slope["low"] is not None:
            axes.fill_between(
                ends, slope["low"] * ends, slope["high"] * ends, color=colour, alpha=0.15
            )
    axes.set(xlabel="parameters", ylabel="capacity (bits, published convention)")
    axes.set_title("Capacity grows with parameters")
    legend(figure, axes.get_legend_handles_labels()[0])


def memorized_against_steps(figure: "Figure", rows: Sequence[Row]) -> None:
    """Memorized bits per parameter over optimizer steps: one line a run of `curves`."""
    axes = log_axes(figure, y=False)
    drawn = [row["model"] | row for row in curves(rows)]
    for row, look in zip(drawn, looks(drawn), strict=True):
        axes.plot(
            [point["step"] for point in row["curve"]],
            [point["memorized_bits"] / row["parameters"] for point in row["curve"]],
            color=look.colour,
            linestyle=look.dash,
            linewidth=1.3,
            alpha=0.75,
        )
    axes.set_ylim(bottom=0)
    axes.set(xlabel="optimizer steps", ylabel="memorized bits per parameter")
    axes.set_title("Training, one line a run: larger data sets end higher, until capacity")
    legend(figure, key(drawn))
    _say_if_empty(axes)


def curves(rows: Sequence[Row]) -> list[Row]:
    """The runs whose training curve is drawn: all that finished, the smallest models first.

    Of more than LINES runs only the best of each model; of more models than that, so many of
    them, spread evenly over their sizes.
    """
    done = [row for row in rows if row["status"] == "done"]
    done.sort(key=lambda row: (row["parameters"], row["precision"], row["sequences"]["count"]))
    if len(done) <= LINES:
        return done
    best: dict[tuple[Any, ...], Row] = {}
    for row in done:
        model = (*row["model"].values(), row["precision"])
        held = best.setdefault(model, row)
        if row["memorized_bits"]["strict"] > held["memorized_bits"]["strict"]:
            best[model] = row
    chosen = list(best.values())
    places = np.linspace(0, len(chosen) - 1, min(LINES, len(chosen))).round().astype(int)
    return [chosen[place] for place in places]


def precision_against_parameters(figure: "Figure", summary: dict[str, Any]) -> None:
    """Bits per parameter of each model at each precision, and the fit of each precision."""
    from matplotlib.transforms import ScaledTranslation

    axes = log_axes(figure, y=False)
    fits = {name: fit for name, fit in summary["by_precision"].items() if fit}
    for place, precision in enumerate(fits):
        models = [model for model in _with_capacity(summary) if model["precision"] == precision]
        P = np.array([model["parameters"] for model in models])
        ratios, errors = _with_errors([model["bits_per_parameter"]["strict"] for model in models])
        colour, marker = COLOURS[place], MARKERS[place]
        bars = axes.errorbar(P, ratios, errors, fmt=marker, color=colour, capsize=2, markersize=6)
        # Side by side on the paper alone, or intervals of one model would cover each other.
        aside = SIDE_POINTS / 72 * (place - (len(fits) - 1) / 2)
        for artist in bars.get_children():
            moved = ScaledTranslation(aside, 0, figure.dpi_scale_trans)
            artist.set_transform(artist.get_transform() + moved)
    # After all points: a line across axes of one point is across no width.
    for colour, (precision, fit) in zip(COLOURS, fits.items(), strict=False):
        level = fit["strict"]["estimate"]
        label = f"{precision}: {level:.2f} over all models"
        axes.axhline(level, color=colour, linewidth=1.2, label=label)
    axes.set(xlabel="parameters", ylabel="bits per parameter (strict)")
    axes.set_title("Bits per parameter, by precision")
    legend(figure, axes.get_legend_handles_labels()[0])


def memorized_against_width(figure: "Figure", scores: Mapping[str, Row]) -> None:
    """Memorized bits per parameter over bits a weight; dashed, those of the weights as trained.

    Below -1 nothing is drawn: what costs more than an untrained model's code holds nothing.

    Args:
        scores: what `fastmem score --quantize` printed for each model, under the name that the
            legend gives it.
    """
    axes = figure.add_subplot()
    for (name, score), colour, marker in zip(
        scores.items(), COLOURS * len(scores), MARKERS * len(scores), strict=False
    ):
        widths = sorted(int(width) for width in score["quantized"])
        held = [score["quantized"][str(width)]["bits_per_parameter"]["strict"] for width in widths]
        axes.plot(widths, held, marker=marker, color=colour, linewidth=2, markersize=5, label=name)
        full = score["bits_per_parameter"]["strict"]
        axes.axhline(full, color=colour, linewidth=1, linestyle=(0, (4, 4)), alpha=0.7)
    trained = [score["bits_per_parameter"]["strict"] for score in scores.values()]
    axes.set_ylim(-1, 1.1 * max([1.0, *trained]))
    axes.set(xlabel="bits a weight", ylabel="memorized bits per parameter")
    axes.set_title("What survives when each weight is rounded to a few bits")
    legend(figure, axes.get_legend_handles_labels()[0])


def _with_errors(intervals: Sequence[Row]) -> tuple[Any, Any]:
    """(M,) estimates and (2, M) distances to both bounds, 0 where there is none."""
    bits = np.array([interval["estimate"] for interval in intervals])
    low = np.array([i["estimate"] if i["low"] is None else i["low"] for i in intervals])
    high = np.array([i["estimate"] if i["high"] is None else i["high"] for i in intervals])
    return bits, np.maximum(0, [bits - low, high - bits])


def _with_capacity(summary: dict[str, Any]) -> list[Row]:
    """The models of which a run finished."""
    return [model for model in summary["models"] if model["capacity_bits"]["strict"]]


def _say_if_empty(axes: "Axes") -> None:
    if not axes.lines:
        axes.text(0.5, 0.5, "no finished run", transform=axes.transAxes, ha="center")
