"""A figure as files, and as SVG in a page."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from fastmem.report.figures import (
    COLOURS,
    INK,
    MUTED,
    RAMP,
    VARIABLES,
    inline_svg,
    log_axes,
    model_handles,
    model_styles,
    write_figure,
)

CSS = (Path(__file__).parents[2] / "fastmem" / "report" / "templates" / "report.css").read_text()


def model(width: int, precision: str = "fp32") -> dict[str, Any]:
    shape = {"layers": 1, "width": width, "heads": 2, "parameters": width * 1000}
    return shape | {"precision": precision}


def draw(figure: Figure) -> None:
    axes = log_axes(figure)
    axes.plot([1, 10, 1000], [3, 5, 8], "o", color=COLOURS[0], label="bits < 1 & more")
    axes.fill_between([1, 10], [3, 4], [5, 6], color=COLOURS[1], alpha=0.2)
    axes.axhline(4, color=MUTED)
    axes.set_title("a title")
    axes.set(xlabel="size", ylabel="bits")
    axes.legend()


def test_files_are_whole_and_the_same_twice(tmp_path: Path) -> None:
    """Fails if a file is empty, or changes with the clock."""
    paths = write_figure(draw, tmp_path / "one")
    starts = [b"\x89PNG\r\n\x1a\n", b"<?xml ve", b"%PDF-1.4"]
    assert [path.name for path in paths] == ["one.png", "one.svg", "one.pdf"]
    assert [path.read_bytes()[:8] for path in paths] == starts
    for path, again in zip(paths, write_figure(draw, tmp_path / "two"), strict=True):
        assert path.read_bytes() == again.read_bytes(), path.name


@pytest.mark.parametrize("form", ["wide", "narrow"])
def test_in_a_page_nothing_leaks(form: str) -> None:
    """Fails if an id lacks the prefix, a reference lacks a target, a colour is not a variable, or
    the SVG keeps a style sheet, a title, metadata or an address."""
    text = inline_svg(draw, "name", form, 'what it "shows"')
    root = ElementTree.fromstring(text)
    ids = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
    assert ids
    assert len(set(ids)) == len(ids)
    assert all(name.startswith(f"name-{form}-") for name in ids)
    references = re.findall(r"#([^\")]+)", text)
    assert set(references) == set(ids)
    assert "http" not in text
    assert not {node.tag for node in root.iter()} & {"style", "metadata", "title"}
    assert root.attrib["aria-label"] == 'what it "shows"'
    words = {node.text for node in root.iter("text")}
    assert {"size", "bits", "bits < 1 & more"} <= words
    assert "a title" not in words
    painted = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", text))
    assert painted <= {"none", *(f"var({name})" for name in VARIABLES.values())}
    assert "var(--c1)" in painted
    assert "font-family" not in text


def test_each_colour_has_a_variable_in_light_and_in_dark() -> None:
    """Fails if a colour of the figures lacks a value in the light or the dark scheme."""
    for colour in (*COLOURS, *RAMP, INK, MUTED):
        assert CSS.count(f"{VARIABLES[colour.lower()]}: #") == 2, colour


def test_shapes_have_colours_and_precisions_dashes() -> None:
    """Fails if one shape has two colours, or two precisions look the same."""
    models = [model(8), model(8, "bf16-mixed"), model(16), model(16, "bf16-mixed")]
    found = model_styles(models)
    assert [style.colour for style in found] == [COLOURS[0]] * 2 + [COLOURS[1]] * 2
    assert found[0].dash == found[2].dash == "solid" != found[1].dash == found[3].dash
    labels = [handle.get_label() for handle in model_handles(models)]
    assert labels[0] == "1 × 8, 2 heads, 8,000 parameters"
    assert labels[2:] == ["fp32", "bf16-mixed"]


def test_many_shapes_have_classes_of_size() -> None:
    """Fails if many models are not coloured by size, or the legend leaves a model out."""
    models = [model(8 * k) for k in range(1, 22)]
    found = [style.colour for style in model_styles(models)]
    assert found == [colour for colour in RAMP for _ in range(3)]
    labels = [handle.get_label() for handle in model_handles(models)]
    assert labels[0] == "8,000 to 24,000 parameters"
    assert labels[-1] == "152,000 to 168,000 parameters"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((10, 50), ["10", "20", "50"]),
        ((0.2, 2), ["0.2", "0.5", "1", "2"]),
        ((1e3, 5e5), ["1k", "3k", "10k", "30k", "100k", "300k"]),
        ((1e3, 1e8), ["1k", "10k", "100k", "1M", "10M", "100M"]),
    ],
)
def test_logarithmic_labels_are_few_and_plain(
    values: tuple[float, float], labels: list[str]
) -> None:
    """Fails if an axis of less than a decade lacks labels, or labels of many decades overlap."""
    figure = Figure()
    axes = log_axes(figure)
    axes.set_xlim(*values)
    shown = [axes.xaxis.get_major_formatter()(tick) for tick in axes.get_xticks()]
    assert [label for label in shown if label in labels] == labels
    inside = [tick for tick in axes.get_xticks() if values[0] <= tick <= values[1]]
    assert len(inside) == len(labels)
