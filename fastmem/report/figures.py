"""Figures as files, and as SVG in a page, which sets their colours."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from fastmem.base.storage import Row, write_whole

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colours, distinct for readers of any colour vision; models take them in order.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Colours of viridis for classes of model size, when there are more models than colours.
RAMP = ("#26AD81", "#1F948C", "#297B8E", "#33628D", "#404588", "#482576", "#440154")
MARKERS = "osD^vP*"
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))
INK, MUTED, FAINT = "#1C1E21", "#777777", "#999999"
AXIS, GRID = "#BFC3C8", "#E6E6E6"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": AXIS,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": AXIS,
    "ytick.color": AXIS,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.dpi": 150,
    "svg.hashsalt": "fastmem",
}
SIZE = (7.2, 4.6)
SIZES_IN_PAGE = {"wide": (7.2, 4.4), "narrow": (3.8, 4.6)}
"""Inches; narrow is for phones, on which the text of wide is too small to read."""
# CSS variables for the colours of a figure: the dark scheme of the page has other values.
VARIABLES = {
    **{colour.lower(): f"--c{i}" for i, colour in enumerate(COLOURS, 1)},
    **{colour.lower(): f"--r{i}" for i, colour in enumerate(RAMP, 1)},
    INK.lower(): "--ink",
    MUTED.lower(): "--muted",
    FAINT.lower(): "--muted",
    AXIS.lower(): "--axis",
    GRID.lower(): "--grid",
}

GREY_LINE: dict[str, Any] = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (4, 3))}
"""The style of a known value, such as an entropy."""
Draw = Callable[["Figure"], None]
"""A function that draws into an empty figure."""


class ModelStyle(NamedTuple):
    """How every figure draws a model: colour and marker by shape, dash by precision."""

    colour: str
    marker: str
    dash: Any


@contextmanager
def figure_style() -> Iterator[None]:
    """Sets matplotlib to the style of the figures; not thread-safe, as its settings are global."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def write_figure(draw: Draw, path: Path) -> list[Path]:
    """Writes path.png, path.svg and path.pdf, the same bytes for the same content."""
    from matplotlib.figure import Figure

    paths = []
    with figure_style():
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure)
        for ending, date in (("png", None), ("svg", "Date"), ("pdf", "CreationDate")):
            buffer = io.BytesIO()
            # Without the date the same rows give the same file.
            figure.savefig(buffer, format=ending, metadata={date: None} if date else None)
            figure.set_layout_engine("none")  # Layout is slow, and once is enough.
            paths.append(path.with_name(f"{path.name}.{ending}"))
            write_whole(paths[-1], buffer.getvalue())
    return paths


def pictures(draw: Draw, name: str, label: str, height: float | None = None) -> list[str]:
    """A figure for a page, wide and narrow, of which the page shows one; as `inline_svg`."""
    return [inline_svg(draw, name, form, label, height) for form in SIZES_IN_PAGE]


def inline_svg(draw: Draw, name: str, form: str, label: str, height: float | None = None) -> str:
    """A figure as an <svg> element for a page: no title, real text, colours as CSS variables.

    Args:
        draw: draws the figure.
        name: a prefix that makes ids unique in the page.
        form: "wide" or "narrow".
        label: a description for screen readers.
        height: inches; None: the height of most figures.
    """
    from matplotlib.figure import Figure

    with figure_style():
        import matplotlib

        matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 10.5})
        width, usual = SIZES_IN_PAGE[form]
        figure = Figure(figsize=(width, height or usual), layout="constrained")
        draw(figure)
        for axes in figure.axes:
            axes.set_title("")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    _adapt_to_page(root, f"{name}-{form}")
    for size in ("width", "height"):
        del root.attrib[size]
    root.attrib.update({"class": form, "role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _adapt_to_page(root: ElementTree.Element, prefix: str) -> None:
    """Removes style sheets, metadata and unused ids; renames the other ids and the colours."""
    values = [v for node in root.iter() for key, v in node.attrib.items() if key != "id"]
    used = set(re.findall(r"#([\w-]+)", " ".join(values)))
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        for child in list(node):
            if child.tag.endswith(("style", "metadata")):
                node.remove(child)
        for key in list(node.attrib):
            value = node.attrib.pop(key)
            key = key.rpartition("}")[2]
            if key == "id" and value not in used:
                continue
            if key == "id":
                value = f"{prefix}-{value}"
            elif key in ("href", "clip-path"):
                value = value.replace("#", f"#{prefix}-")
            elif key == "style":
                value = _page_style(value)
            elif key in ("d", "transform", "x", "y", "width", "height", "points"):
                value = re.sub(r"-?\d+\.\d+", _one_decimal, value)
            node.attrib[key] = value
        node.text, node.tail = ((text and text.strip()) or None for text in (node.text, node.tail))


def _page_style(value: str) -> str:
    for colour in set(re.findall(r"#[0-9a-fA-F]{6}", value)):
        if variable := VARIABLES.get(colour.lower()):
            value = value.replace(colour, f"var({variable})")
    # The page sets the font family.
    value = re.sub(r"font: (?:\d+ )?([\d.]+px)[^;]*", r"font-size: \1", value)
    return re.sub(r"font-family: [^;]*;? ?", "", value)


def _one_decimal(found: re.Match[str]) -> str:
    return f"{float(found[0]):.1f}".removesuffix(".0")


def log_axes(figure: "Figure", y: bool = True) -> "Axes":
    """New axes, logarithmic in x or in both, with tick labels such as 500, 2k, 1M."""
    axes = figure.add_subplot()
    log_ticks(axes.xaxis)
    if y:
        log_ticks(axes.yaxis)
    return axes


def log_ticks(axis: Any) -> None:
    """Makes an axis logarithmic; more decades have fewer labels in each."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    class Labels(LogLocator):
        def tick_values(self, vmin: float, vmax: float) -> Any:
            decades = math.log10(vmax / vmin)
            self.set_params(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,))
            return super().tick_values(vmin, vmax)

    axis._set_axes_scale("log")
    axis.set_major_locator(Labels(numticks=12))
    large = EngFormatter(sep="")
    axis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1 else large(value))
    axis.set_minor_locator(NullLocator())


def legend(figure: "Figure", handles: Sequence["Artist"]) -> None:
    """Draws a legend below the axes, in one column on a narrow figure."""
    if handles:
        columns = 1 if figure.get_figwidth() < 5 else 2
        figure.legend(handles=handles, loc="outside lower left", ncols=columns)


def with_errors(intervals: Sequence[Row]) -> tuple[Any, Any]:
    """(M,) estimates and (2, M) distances to both bounds, 0 without a bound."""
    values = np.array([interval["estimate"] for interval in intervals])
    low = np.array([i["estimate"] if i["low"] is None else i["low"] for i in intervals])
    high = np.array([i["estimate"] if i["high"] is None else i["high"] for i in intervals])
    return values, np.maximum(0, [values - low, high - values])


def model_styles(models: Sequence[Row]) -> list[ModelStyle]:
    """The style of each model (a dict with layers, width, heads, parameters and precision)."""
    shapes = _shapes(models)
    precisions = _precisions(models)
    styles = []
    for model in models:
        place, which = shapes.index(shape_of(model)), precisions.index(model["precision"])
        if len(shapes) <= len(COLOURS):
            colour, marker = COLOURS[place], MARKERS[place]
        else:
            colour, marker = RAMP[place * len(RAMP) // len(shapes)], "o"
        styles.append(ModelStyle(colour, marker, DASHES[which % len(DASHES)]))
    return styles


def model_handles(models: Sequence[Row]) -> list["Line2D"]:
    """Legend handles for `model_styles`: shapes, or classes of size if there are many shapes."""
    from matplotlib.lines import Line2D

    shapes = _shapes(models)
    by_style: dict[ModelStyle, list[Row]] = {}
    for model, style in zip(models, model_styles(models), strict=True):
        by_style.setdefault(style._replace(dash="solid"), []).append(model)
    handles = []
    for style, alike in by_style.items():
        label = shape_label(alike[0])
        if len(shapes) > len(COLOURS):
            sizes = sorted(model["parameters"] for model in alike)
            label = f"{sizes[0]:,} to {sizes[-1]:,} parameters"
        handles.append(Line2D([], [], color=style.colour, marker=style.marker, label=label))
    precisions = _precisions(models)
    if len(precisions) > 1:
        handles += [
            Line2D([], [], color=MUTED, linestyle=dash, label=precision)
            for precision, dash in zip(precisions, DASHES, strict=False)
        ]
    return handles


def shape_label(model: Row) -> str:
    """A shape in words, such as 1 × 8, 4 heads, 1,000 parameters."""
    heads = "1 head" if model["heads"] == 1 else f"{model['heads']} heads"
    return f"{model['layers']} × {model['width']}, {heads}, {model['parameters']:,} parameters"


def shape_of(model: Row) -> tuple[int, ...]:
    """The shape of a model; models of one shape have one colour. Shapes sort by parameters."""
    return tuple(model[name] for name in ("parameters", "layers", "width", "heads"))


def shape_fields(row: Row) -> Row:
    """Shape, parameters and precision of a row of a sweep, or of the record of a model."""
    values = row | row.get("model", {})
    return {name: values[name] for name in ("layers", "width", "heads", "parameters", "precision")}


def by_shape(records: Sequence[Row]) -> list[list[Row]]:
    """The records of each shape and precision by count and seed, the smallest shape first."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for record in sorted(records, key=lambda one: (one["count"], one["seed"] or 0)):
        found.setdefault((*shape_of(record), record["precision"]), []).append(record)
    return [found[key] for key in sorted(found)]


def _shapes(models: Sequence[Row]) -> list[tuple[int, ...]]:
    return sorted({shape_of(model) for model in models})


def _precisions(models: Sequence[Row]) -> list[str]:
    return sorted({model["precision"] for model in models}, reverse=True)  # fp32 first
