"""Rows of a sweep as figures."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmem.stats import Floats
from fastmem.storage import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

# Okabe and Ito's colours, told apart by readers of any colour vision; models take them in order.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vP*"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.dpi": 150,
    "svg.hashsalt": "fastmem",
}

PUBLISHED = (
    # layers, width, parameters, capacity in bits at fp32 and at bf16
    (1, 32, 80_352, 3.39e5, 3.16e5),
    (1, 64, 185_280, 7.27e5, 6.93e5),
    (1, 128, 468_864, 1.71e6, 1.69e6),
    (2, 32, 93_056, 3.87e5, 3.31e5),
    (2, 128, 667_136, 2.66e6, 2.60e6),
    (2, 256, 2_120_704, 8.49e6, 7.76e6),
    (4, 64, 335_232, 1.34e6, 1.14e6),
    (4, 256, 3_700_224, 1.36e7, 1.30e7),
    (8, 32, 169_280, 5.12e5, 4.85e5),
    (8, 256, 6_859_264, 2.71e7, 2.51e7),
)
"""Capacities that arXiv 2505.24832 prints, in its own convention."""


def draw(summary: dict[str, Any], rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes each figure of a sweep as PNG and SVG and returns the paths.

    Args:
        summary: the content of capacity.json.
        rows: the rows that it was made from.
        folder: where the figures go.
    """
    figures: dict[str, Callable[[Figure], None]] = {
        "memorized_bits": lambda figure: memorized_against_count(figure, summary),
        "capacity": lambda figure: capacity_against_parameters(figure, summary),
        "training": lambda figure: memorized_against_steps(figure, rows),
    }
    if len(summary["by_precision"]) > 1:
        figures["precision"] = lambda figure: capacity_by_precision(figure, summary)
    return _written(figures, folder)


def draw_widths(scores: Mapping[str, Row], folder: Path) -> list[Path]:
    """Writes the figure of `fastmem score --quantize` and returns its paths.

    Args:
        scores: what the command printed for each model, under the name that the legend gives it.
        folder: where the figure goes.
    """
    return _written(
        {"quantization": lambda figure: memorized_against_width(figure, scores)}, folder
    )


def _written(figures: Mapping[str, Callable[["Figure"], None]], folder: Path) -> list[Path]:
    import matplotlib
    from matplotlib.figure import Figure

    paths = []
    with matplotlib.rc_context(STYLE):
        for name, fill in figures.items():
            figure = Figure(figsize=(7.2, 4.6), layout="constrained")
            fill(figure)
            for ending in ("png", "svg"):
                path = folder / f"{name}.{ending}"
                # Without the date the same rows give the same file.
                metadata = {"Date": None} if ending == "svg" else None
                buffer = io.BytesIO()
                figure.savefig(buffer, format=ending, metadata=metadata)
                write_whole(path, buffer.getvalue())
                paths.append(path)
    return paths


def memorized_against_count(figure: "Figure", summary: dict[str, Any]) -> None:
    """Memorized bits over data set size: the entropy diagonal, then each model's plateau."""
    axes = _log_log(figure)
    diagonal: dict[int, float] = {}
    for model, colour, marker in _styled(summary["models"]):
        done = [run for run in model["runs"] if run["status"] == "done"]
        if not done:
            continue
        S = model["length"]
        diagonal |= {run["count"]: run["entropy_bits"] * (S - 1) / S for run in done}
        counts = np.array([run["count"] for run in done])
        bits = np.array([run["memorized_bits"]["strict"] for run in done])
        sizes = np.unique(counts)
        means = [bits[counts == size].mean() for size in sizes]
        axes.plot(counts, bits, marker, color=colour, markersize=5, alpha=0.45, markeredgewidth=0)
        axes.plot(sizes, means, color=colour, linewidth=2, label=_label(model))
        plateau = model["capacity_bits"]["strict"]["estimate"]
        axes.axhline(plateau, color=colour, linewidth=1, linestyle=(0, (4, 4)), alpha=0.7)
        axes.annotate(
            f"{model['bits_per_parameter']['strict']['estimate']:.2f} bits/parameter",
            (1.0, plateau),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            color=colour,
            fontsize=9.5,
        )
    if diagonal:
        line = sorted(diagonal.items())
        axes.plot(
            *zip(*line, strict=True), color="#777777", linewidth=1.2, label="entropy of the data"
        )
    axes.set(xlabel="data set size (sequences)", ylabel="memorized bits")
    axes.set_title("Memorized bits follow the entropy of the data, then stop at capacity")
    _legend(axes)


def capacity_against_parameters(figure: "Figure", summary: dict[str, Any]) -> None:
    """Capacity over parameters with the fit through the origin, and the published points."""
    axes = _log_log(figure)
    for column, name, fill in ((3, "fp32", "full"), (4, "bf16", "none")):
        axes.plot(
            [row[2] for row in PUBLISHED],
            [row[column] for row in PUBLISHED],
            "o",
            color="#999999",
            fillstyle=fill,
            markersize=5,
            label=f"published, {name}",
        )
    parameters = np.array([row[2] for row in PUBLISHED], dtype=float)
    for (precision, fit), colour, marker in zip(
        summary["by_precision"].items(), COLOURS, MARKERS, strict=False
    ):
        models = [
            model
            for model in summary["models"]
            if model["precision"] == precision and model["capacity_bits"]["published"]
        ]
        if not models:
            continue
        P = np.array([model["parameters"] for model in models], dtype=float)
        bits, errors = _with_errors([m["capacity_bits"]["published"] for m in models])
        axes.errorbar(
            P, bits, errors, fmt=marker, color=colour, capsize=3, label=f"measured, {precision}"
        )
        slope = fit["published"]
        ends = np.array([min(P.min(), parameters.min()), max(P.max(), parameters.max())])
        label = f"fit, {precision}: {slope['estimate']:.2f} bits per parameter"
        axes.plot(ends, slope["estimate"] * ends, color=colour, linewidth=1.2, label=label)
        if slope["low"] is not None:
            axes.fill_between(
                ends, slope["low"] * ends, slope["high"] * ends, color=colour, alpha=0.15
            )
    axes.set(xlabel="parameters", ylabel="capacity (bits, published convention)")
    axes.set_title("Capacity grows with parameters")
    _legend(axes)


def memorized_against_steps(figure: "Figure", rows: Sequence[Row]) -> None:
    """Memorized bits per parameter over optimizer steps: one line a run."""
    axes = figure.add_subplot()
    axes.set_xscale("log")
    done = [row for row in rows if row["status"] == "done"]
    done.sort(key=lambda row: (row["parameters"], row["precision"], row["sequences"]["count"]))
    labels = list(dict.fromkeys(_label(row["model"] | row) for row in done))
    for row in done:
        label = _label(row["model"] | row)
        place = labels.index(label)
        axes.plot(
            [point["step"] for point in row["curve"]],
            [point["memorized_bits"] / row["parameters"] for point in row["curve"]],
            color=COLOURS[place % len(COLOURS)],
            linewidth=1.3,
            alpha=0.7,
            label=label
            if row is next(r for r in done if _label(r["model"] | r) == label)
            else None,
        )
    axes.set_ylim(bottom=0)
    axes.set(xlabel="optimizer steps", ylabel="memorized bits per parameter")
    axes.set_title("Training, one line a run: larger data sets end higher, until capacity")
    _legend(axes)


def capacity_by_precision(figure: "Figure", summary: dict[str, Any]) -> None:
    """Capacity per parameter of each model, its precisions side by side, with intervals."""
    axes = figure.add_subplot()
    names = ("layers", "width", "heads")
    measured = [model for model in summary["models"] if model["bits_per_parameter"]["strict"]]
    shapes = list(dict.fromkeys(tuple(model[n] for n in names) for model in measured))
    precisions = list(summary["by_precision"])
    for place, precision in enumerate(precisions):
        models = [model for model in measured if model["precision"] == precision]
        x = [shapes.index(tuple(model[n] for n in names)) for model in models]
        aside = (place - (len(precisions) - 1) / 2) * 0.5 / len(precisions)
        bits, errors = _with_errors([model["bits_per_parameter"]["strict"] for model in models])
        axes.errorbar(
            np.array(x) + aside,
            bits,
            errors,
            fmt=MARKERS[place % len(MARKERS)],
            color=COLOURS[place % len(COLOURS)],
            capsize=3,
            label=precision,
        )
    labels = [f"{layers} × {width}\n{heads} heads" for layers, width, heads in shapes]
    axes.set_xticks(range(len(shapes)), labels)
    axes.set_xlim(-0.6, max(len(shapes) - 0.4, 0.6))
    axes.set(ylabel="capacity (strict bits per parameter)")
    axes.set_title("Capacity by precision, the same runs")
    _legend(axes)


def memorized_against_width(figure: "Figure", scores: Mapping[str, Row]) -> None:
    """Memorized bits per parameter over bits a weight; dashed, those of the weights as trained.

    Below -1 nothing is drawn: what costs more than an untrained model's code holds nothing.
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
    axes.set_ylim(-1, 1.5 * max([1.0, *trained]))  # the legend above
    axes.set(xlabel="bits a weight", ylabel="memorized bits per parameter")
    axes.set_title("What survives when each weight is rounded to a few bits")
    _legend(axes)


def _with_errors(intervals: Sequence[dict[str, Any]]) -> tuple[Floats, Floats]:
    """Estimates, and how far below and above them the bounds are; 0 where there are none."""
    bits = np.array([interval["estimate"] for interval in intervals])
    low = np.array([i["estimate"] if i["low"] is None else i["low"] for i in intervals])
    high = np.array([i["estimate"] if i["high"] is None else i["high"] for i in intervals])
    return bits, np.maximum(0, [bits - low, high - bits])


def _log_log(figure: "Figure") -> "Axes":
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log")
    return axes


def _legend(axes: "Axes") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left")
    else:
        axes.text(0.5, 0.5, "no finished run", transform=axes.transAxes, ha="center")


def _styled(models: Sequence[Row]) -> list[tuple[Row, str, str]]:
    return [
        (model, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        for i, model in enumerate(models)
    ]


def _label(model: Row) -> str:
    return (
        f"{model['layers']} × {model['width']}, {model['heads']} heads, "
        f"{model['parameters']:,} parameters, {model['precision']}"
    )
