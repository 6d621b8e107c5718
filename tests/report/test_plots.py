"""The artists that each figure draws, read back from matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fastmem.memorization.capacity import summarize
from fastmem.report import plots
from fastmem.report.figures import MARKERS, write_figure


def row(
    width: int, count: int, seed: int, bits: float, status: str = "done", precision: str = "fp32"
) -> dict[str, Any]:
    model = {"layers": 1, "width": width, "heads": 2, "vocab": 16, "length": 4}
    done = status == "done"
    return {
        "status": status,
        "error": None if done else "lost",
        "model": model,
        "parameters": width * 10,
        "precision": precision,
        "seed": seed,
        "sequences": {"count": count},
        "entropy_bits": count * 16.0,
        "memorized_bits": {"strict": bits, "published": bits * 4 / 3} if done else {},
        "curve": [{"step": s, "memorized_bits": bits * s / 4} for s in (1, 2, 4)] if done else [],
        "epochs": 1.0,
        "steps": 4,
        "seconds": 1.0,
        "tokens_per_second": 1.0,
    }


ROWS = [
    *(row(8, n, s, b + s) for n, b in ((4, 45), (8, 80), (16, 82)) for s in (0, 1)),
    *(row(16, n, 0, b) for n, b in ((4, 48), (8, 95), (16, 170))),
    row(16, 32, 0, 0.0, "failed"),
]


def test_memorized_bits_has_diagonal_plateaus_and_every_run() -> None:
    """Fails if a run is not drawn, or the diagonal is not the entropy of the coded tokens."""
    figure = Figure()
    plots.memorized_against_count(figure, summarize(ROWS))
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    diagonal = np.asarray(lines["entropy of the data"])
    assert diagonal.tolist() == [[4, 48], [8, 96], [16, 192]]
    drawn = np.concatenate([np.asarray(line.get_xydata()) for line in figure.axes[0].lines])
    for r in ROWS[:-1]:
        assert [r["sequences"]["count"], r["memorized_bits"]["strict"]] in drawn.tolist()
    levels = [line.get_ydata() for line in figure.axes[0].lines]
    assert any(list(y) == [82.5, 82.5] for y in levels)
    assert (figure.axes[0].get_xscale(), figure.axes[0].get_yscale()) == ("log", "log")


def test_capacity_has_the_fit_and_the_published_points() -> None:
    """Fails if measured and published points are in different conventions."""
    figure = Figure()
    plots.capacity_against_parameters(figure, summarize(ROWS))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["published, fp32", "published, bf16"]
    assert any(label.startswith("fit, fp32: ") for label in labels)
    drawn = np.concatenate([np.asarray(line.get_xydata()) for line in figure.axes[0].lines])
    assert [80.0, 82.5 * 4 / 3] in drawn.tolist()
    assert [80_352.0, 3.39e5] in drawn.tolist()


def test_training_has_a_line_a_finished_run() -> None:
    """Fails if a finished run lacks a curve, or a failed run has a curve."""
    figure = Figure()
    plots.memorized_against_steps(figure, ROWS)
    assert len(figure.axes[0].lines) == len(ROWS) - 1


def test_the_level_of_a_shape_is_that_of_fp32() -> None:
    """Fails if the label of a capacity is of another precision than fp32."""
    halves = [r | {"precision": "bf16-mixed"} for r in ROWS[:6]]
    for r in halves:
        r["memorized_bits"] = {name: bits / 2 for name, bits in r["memorized_bits"].items()}
    figure = Figure(figsize=(4, 4))
    plots.memorized_against_count(figure, summarize([*ROWS[:6], *halves]))
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.03"]


def test_one_size_of_model_has_no_fit() -> None:
    """Fails if one model size has a fit."""
    figure = Figure()
    plots.capacity_against_parameters(figure, summarize(ROWS[:6]))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "measured, fp32" in labels
    assert not [label for label in labels if label.startswith("fit")]


def test_precision_has_each_model_and_the_fits() -> None:
    """Fails if a point is not the ratio of its model, or a line not the fit of its precision."""
    figure = Figure()
    halves = [r | {"precision": "bf16-mixed"} for r in ROWS]
    for r in halves[:-1]:
        r["memorized_bits"] = {name: bits / 2 for name, bits in r["memorized_bits"].items()}
    summary = summarize([*ROWS, *halves])
    plots.precision_against_parameters(figure, summary)
    drawn = [np.asarray(line.get_ydata()) for line in figure.axes[0].lines]
    ratios = [y[0] for y in drawn if len(y) == 2 and y[0] == y[1]]
    fits = [summary["by_precision"][p]["strict"]["estimate"] for p in ("fp32", "bf16-mixed")]
    assert fits[1] == fits[0] / 2
    assert [r for r in ratios if r in fits] == fits
    points = np.concatenate([y for y in drawn if len(y) == 2])
    assert {82.5 / 80, 41.25 / 80, 170 / 160, 85 / 160} <= set(points.tolist())


@pytest.mark.filterwarnings("error")
def test_precision_of_one_model(tmp_path: Path) -> None:
    """Fails if matplotlib warns when each precision has one point."""
    names = ("fp32", "bf16-mixed", "bf16-true")
    rows = [row(8, n, 0, 8.0 * n, precision=p) for p in names for n in (4, 8)]
    summary = summarize([row | {"parameters": 1528} for row in rows])
    assert len(summary["models"]) == 3
    write_figure(lambda f: plots.precision_against_parameters(f, summary), tmp_path / "precision")


def test_precisions_are_apart_on_paper_and_not_on_the_axis() -> None:
    """Fails if a point moves on the axis, or the points of one model at two precisions overlap."""
    rows = [row(8, n, 0, 8.0 * n, precision=p) for p in ("fp32", "bf16-mixed") for n in (4, 8)]
    figure = Figure()
    plots.precision_against_parameters(figure, summarize(rows))
    (axes,) = figure.axes
    points = [line for line in axes.lines if line.get_marker() in MARKERS[:2]]
    assert [line.get_xdata().tolist() for line in points] == [[80], [80]]  # type: ignore[union-attr]
    places = [line.get_transform().transform(line.get_xydata())[0, 0] for line in points]
    at = axes.transData.transform((80, 0))[0]
    half = plots.SIDE_POINTS / 72 * figure.dpi / 2
    assert places == pytest.approx([at - half, at + half])


def test_of_many_runs_the_best_of_each_model_are_drawn() -> None:
    """Fails if curves of many runs are not those of the best run of each model."""
    many = [row(8 * w, n, 0, b) for w in range(1, 61) for n, b in ((4, 9), (8, 12), (16, 11))]
    assert plots.curves(many[:150]) == sorted(
        many[:150], key=lambda r: (r["parameters"], r["sequences"]["count"])
    )
    assert [r["sequences"]["count"] for r in plots.curves(many)] == [8] * 60
    wide = [row(8 * w, n, 0, 9) for w in range(1, 302) for n in (4, 8)]
    sizes = [r["parameters"] for r in plots.curves(wide)]
    assert len(set(sizes)) == plots.LINES
    assert (sizes[0], sizes[-1]) == (80, 301 * 80)
