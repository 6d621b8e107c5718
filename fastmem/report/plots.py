"""The figures of a report, one function each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmem.base.storage import Row
from fastmem.memorization.capacity import best_rows
from fastmem.memorization.scaling_law import PUBLISHED
from fastmem.report.figures import (
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    MUTED,
    legend,
    log_axes,
    model_handles,
    model_styles,
    shape_of,
    with_errors,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 1000
"""Up to this many runs have a point each; more are drawn only as means over seeds."""
SIDE_POINTS = 7
"""Distance on paper between the points of one model at two precisions, in typographic points."""
LINES = 150
"""Up to this many runs all have a training curve; of more, the best run of each model has."""


def measured(summary: Row, precision: str | None = None) -> list[Row]:
    """The models with a finished run, at one precision or at all."""
    return [
        model
        for model in summary["models"]
        if model["capacity_bits"]["strict"] and precision in (None, model["precision"])
    ]


def memorized_against_count(figure: "Figure", summary: Row) -> None:
    """Draws memorized bits over data set size: the entropy, and the plateau of each model."""
    from matplotlib.lines import Line2D

    axes = log_axes(figure)
    models = measured(summary)
    diagonal: dict[int, float] = {}
    few = sum(len(model["runs"]) for model in models) <= POINTS
    for model, style in zip(models, model_styles(models), strict=True):
        done = [run for run in model["runs"] if run["status"] == "done"]
        S = model["length"]
        diagonal |= {run["count"]: run["entropy_bits"] * (S - 1) / S for run in done}
        counts = np.array([run["count"] for run in done])
        bits = np.array([run["memorized_bits"]["strict"] for run in done])
        sizes = np.unique(counts)
        means = [bits[counts == size].mean() for size in sizes]
        if few:
            faint: dict[str, Any] = {"markersize": 5, "alpha": 0.5, "markeredgewidth": 0}
            axes.plot(counts, bits, style.marker, color=style.colour, **faint)
        axes.plot(sizes, means, color=style.colour, linewidth=2, linestyle=style.dash)
    if diagonal:
        line = sorted(diagonal.items())
        grey: dict[str, Any] = {"color": MUTED, "linewidth": 1.2, "label": "entropy of the data"}
        axes.plot(*zip(*line, strict=True), **grey)
        legend(figure, [*model_handles(models), Line2D([], [], **grey)])
    axes.set(xlabel="data set size (sequences)", ylabel="memorized bits")
    axes.set_title("Memorized bits follow the entropy of the data, then stop at capacity")
    _plateaus(figure, axes, models)
    _say_if_empty(axes)


def _plateaus(figure: "Figure", axes: "Axes", models: Sequence[Row]) -> None:
    """Draws a dashed line at the capacity of each shape, labelled with its bits per parameter.

    A shape with several precisions has the line of fp32, or of the last by name. If there are
    more shapes than colours, no lines are drawn.
    """
    shapes: dict[tuple[int, ...], tuple[Row, str]] = {}
    styled = zip(models, model_styles(models), strict=True)
    for model, style in sorted(styled, key=lambda pair: pair[0]["precision"]):
        if _level(model) > 0:
            shapes[shape_of(model)] = (model, style.colour)
    if len(shapes) > len(COLOURS):
        return
    unit = " bits per parameter" if figure.get_figwidth() > 5 else ""
    low, high = np.log(axes.get_ylim())
    above = -1.0
    for model, colour in sorted(shapes.values(), key=lambda pair: _level(pair[0])):
        axes.axhline(_level(model), color=colour, linewidth=1, linestyle=(0, (4, 4)), alpha=0.7)
        # Keep the labels of close levels apart.
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


def capacity_against_parameters(figure: "Figure", summary: Row) -> None:
    """Draws capacity over parameters, the fit through the origin, and the published models.

    A single model size does not get a fit.
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
        models = measured(summary, precision)
        if not models:
            continue
        P = np.array([model["parameters"] for model in models], dtype=float)
        bits, errors = with_errors([model["capacity_bits"]["published"] for model in models])
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
    """Draws memorized bits per parameter over optimizer steps, one line a run of `curves`."""
    axes = log_axes(figure, y=False)
    drawn = [row["model"] | row for row in curves(rows)]
    for row, style in zip(drawn, model_styles(drawn), strict=True):
        axes.plot(
            [point["step"] for point in row["curve"]],
            [point["memorized_bits"] / row["parameters"] for point in row["curve"]],
            color=style.colour,
            linestyle=style.dash,
            linewidth=1.3,
            alpha=0.75,
        )
    axes.set_ylim(bottom=0)
    axes.set(xlabel="optimizer steps", ylabel="memorized bits per parameter")
    axes.set_title("Training, one line a run: larger data sets end higher, until capacity")
    legend(figure, model_handles(drawn))
    _say_if_empty(axes)


def curves(rows: Sequence[Row]) -> list[Row]:
    """The runs whose training curves are drawn, the smallest models first.

    Up to LINES finished runs are all drawn; of more runs, the best run of each model, and of more
    models than LINES, LINES models spread evenly over their sizes.
    """

    def order(row: Row) -> tuple[Any, ...]:
        return row["parameters"], row["precision"], row["sequences"]["count"]

    done = sorted((row for row in rows if row["status"] == "done"), key=order)
    if len(done) <= LINES:
        return done
    best = sorted(best_rows(done), key=order)
    places = np.linspace(0, len(best) - 1, min(LINES, len(best))).round().astype(int)
    return [best[place] for place in places]


def precision_against_parameters(figure: "Figure", summary: Row) -> None:
    """Draws bits per parameter of each model, and the fit of each precision."""
    from matplotlib.transforms import ScaledTranslation

    axes = log_axes(figure, y=False)
    fits = {name: fit for name, fit in summary["by_precision"].items() if fit}
    for place, precision in enumerate(fits):
        models = measured(summary, precision)
        P = np.array([model["parameters"] for model in models])
        ratios, errors = with_errors([model["bits_per_parameter"]["strict"] for model in models])
        colour, marker = COLOURS[place], MARKERS[place]
        bars = axes.errorbar(P, ratios, errors, fmt=marker, color=colour, capsize=2, markersize=6)
        # Points move on paper, not on the axis, so that the intervals of one model stay apart.
        aside = SIDE_POINTS / 72 * (place - (len(fits) - 1) / 2)
        for artist in bars.get_children():
            moved = ScaledTranslation(aside, 0, figure.dpi_scale_trans)
            artist.set_transform(artist.get_transform() + moved)
    # After all points, since axes without points have no width for a line.
    for colour, (precision, fit) in zip(COLOURS, fits.items(), strict=False):
        level = fit["strict"]["estimate"]
        label = f"{precision}: {level:.2f} over all models"
        axes.axhline(level, color=colour, linewidth=1.2, label=label)
    axes.set(xlabel="parameters", ylabel="bits per parameter (strict)")
    axes.set_title("Bits per parameter, by precision")
    legend(figure, axes.get_legend_handles_labels()[0])


def _say_if_empty(axes: "Axes") -> None:
    if not axes.lines:
        axes.text(0.5, 0.5, "no finished run", transform=axes.transAxes, ha="center")
