"""Figures: what is drawn, read back from matplotlib, not how it looks."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastmem import plots
from fastmem.capacity import summarize


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
    """Fails if measured points are in another convention than the published ones."""
    figure = Figure()
    plots.capacity_against_parameters(figure, summarize(ROWS))
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[:2] == ["published, fp32", "published, bf16"]
    assert any(label.startswith("fit, fp32: ") for label in labels)
    drawn = np.concatenate([np.asarray(line.get_xydata()) for line in figure.axes[0].lines])
    assert [80.0, 82.5 * 4 / 3] in drawn.tolist()
    assert [80_352.0, 3.39e5] in drawn.tolist()


def test_training_has_a_line_a_finished_run() -> None:
    """Fails if a curve is missing, or a failed run has one."""
    figure = Figure()
    plots.memorized_against_steps(figure, ROWS)
    assert len(figure.axes[0].lines) == len(ROWS) - 1


def test_precisions_are_side_by_side(tmp_path: Path) -> None:
    """Fails if a precision is missing, has another's capacity, or hides the one beside it; or if a
    figure is drawn where there is nothing to compare."""
    others = [row(8, n, s, b, precision="bf16-true") for n, b in ((4, 40), (8, 60)) for s in (0, 1)]
    summary = summarize(ROWS + others)
    figure = Figure()
    plots.capacity_by_precision(figure, summary)
    axes = figure.axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["fp32", "bf16-true"]
    points = [np.asarray(box.lines[0].get_xydata()).tolist() for box in axes.containers]
    (full, other), ((half),) = points
    assert (full[1], other[1], half[1]) == (82.5 / 80, 170 / 160, 60 / 80)
    assert full[0] < half[0] < other[0]
    low, high = (caps.get_ydata()[0] for caps in axes.containers[0].lines[1])
    assert low == 82 / 80
    assert high == 83 / 80
    names = {path.stem for path in plots.draw(summary, ROWS + others, tmp_path)}
    assert names == {"memorized_bits", "capacity", "training", "precision"}


def test_widths_of_weights(tmp_path: Path) -> None:
    """Fails if a width is drawn at another place, or the weights as trained are not shown."""
    held = {8: 2.5, 4: 1.0, 2: -9.0}
    score = {
        "bits_per_parameter": {"strict": 2.7},
        "quantized": {str(b): {"bits_per_parameter": {"strict": v}} for b, v in held.items()},
    }
    figure = Figure()
    plots.memorized_against_width(figure, {"1 × 16": score})
    survives, full = figure.axes[0].lines
    assert np.asarray(survives.get_xydata()).tolist() == [[2, -9.0], [4, 1.0], [8, 2.5]]
    assert list(full.get_ydata()) == [2.7, 2.7]
    assert figure.axes[0].get_ylim()[0] == -1
    paths = plots.draw_widths({"1 × 16": score}, tmp_path)
    assert {path.name for path in paths} == {"quantization.png", "quantization.svg"}


def test_files_are_whole_and_the_same_twice(tmp_path: Path) -> None:
    """Fails if a figure is empty, or changes with the clock."""
    summary = summarize(ROWS)
    paths = plots.draw(summary, ROWS, tmp_path / "a")
    assert len(paths) == 6
    for path in paths:
        start = path.read_bytes()[:8]
        assert start == (b"\x89PNG\r\n\x1a\n" if path.suffix == ".png" else b"<?xml ve")
    again = plots.draw(summary, ROWS, tmp_path / "b")
    for one, other in zip(paths, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
