"""A figure in each form it is needed: files, and SVG that takes its colours from the page."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from fastmem.base.storage import Row, write_whole

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colours, told apart by readers of any colour vision; models take them in order.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Of viridis, for more models than there are colours: small to large in so many classes.
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
"""In inches; the narrow one is for phones, where the wide one's text could not be read."""
# The page's names for the colours of a figure: it has others in the dark.
VARIABLES = {
    **{colour.lower(): f"--c{i}" for i, colour in enumerate(COLOURS, 1)},
    **{colour.lower(): f"--r{i}" for i, colour in enumerate(RAMP, 1)},
    INK.lower(): "--ink",
    MUTED.lower(): "--muted",
    FAINT.lower(): "--muted",
    AXIS.lower(): "--axis",
    GRID.lower(): "--grid",
}

Fill = Callable[["Figure"], None]
"""Draws into an empty figure."""


class Look(NamedTuple):
    """How a model is drawn everywhere: its shape has the colour, its precision the rest."""

    colour: str
    marker: str
    dash: Any


@contextmanager
def style() -> Iterator[None]:
    """matplotlib in the style of the figures; not thread-safe, as matplotlib's settings are."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def write_figure(fill: Fill, path: Path) -> list[Path]:
    """Writes path.png, path.svg and path.pdf, the same bytes for the same content."""
    from matplotlib.figure import Figure

    paths = []
    with style():
        figure = Figure(figsize=SIZE, layout="constrained")
        fill(figure)
        for ending, date in (("png", None), ("svg", "Date"), ("pdf", "CreationDate")):
            buffer = io.BytesIO()
            # Without the date the same rows give the same file.
            figure.savefig(buffer, format=ending, metadata={date: None} if date else None)
            figure.set_layout_engine("none")  # What is laid out once stays so, and this is slow.
            paths.append(path.with_name(f"{path.name}.{ending}"))
            write_whole(paths[-1], buffer.getvalue())
    return paths


def inline_svg(fill: Fill, name: str, form: str, label: str) -> str:
    """A figure as an <svg> element for a page: no title, real text, colours as CSS variables.

    Args:
        fill: draws it.
        name: a prefix for ids, which must be unique in the page.
        form: "wide" or "narrow".
        label: what it shows, for those who do not see it.
    """
    from matplotlib.figure import Figure

    with style():
        import matplotlib

        matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 10.5})
        figure = Figure(figsize=SIZES_IN_PAGE[form], layout="constrained")
        fill(figure)
        for axes in figure.axes:
            axes.set_title("")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    _for_a_page(root, f"{name}-{form}")
    for size in ("width", "height"):
        del root.attrib[size]
    root.attrib.update({"class": form, "role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _for_a_page(root: ElementTree.Element, prefix: str) -> None:
    """Removes what would leak into the page or reach out of it, and renames ids and colours."""
    used = set(
        re.findall(
            r"#([\w-]+)",
            " ".join(
                value for node in root.iter() for key, value in node.attrib.items() if key != "id"
            ),
        )
    )
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        if node.tag == "defs":
            for child in [c for c in node if c.tag.endswith("style")]:
                node.remove(child)
        for child in [c for c in node if c.tag.endswith("metadata")]:
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
                value = _style(value)
            elif key in ("d", "transform", "x", "y", "width", "height", "points"):
                value = re.sub(r"-?\d+\.\d+", _rounded, value)
            node.attrib[key] = value
        node.text, node.tail = ((text and text.strip()) or None for text in (node.text, node.tail))


def _style(value: str) -> str:
    value = re.sub(
        r"#[0-9a-fA-F]{6}",
        lambda found: (
            f"var({VARIABLES[found[0].lower()]})" if found[0].lower() in VARIABLES else found[0]
        ),
        value,
    )
    # The page has the family.
    value = re.sub(r"font: (?:\d+ )?([\d.]+px)[^;]*", r"font-size: \1", value)
    return re.sub(r"font-family: [^;]*;? ?", "", value)


def _rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):.1f}".removesuffix(".0")


def log_axes(figure: "Figure", x: bool = True, y: bool = True) -> "Axes":
    """Axes that are logarithmic in x, y or both, with ticks as numbers: 500, 2k, 1M."""
    axes = figure.add_subplot()
    for axis, is_log in ((axes.xaxis, x), (axes.yaxis, y)):
        if is_log:
            log_ticks(axis)
    return axes


def log_ticks(axis: Any) -> None:
    """Makes an axis logarithmic, with the fewer labels the more decades it has."""
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
    """A legend below the axes, where it covers no data; in one column on a narrow figure."""
    if handles:
        columns = 1 if figure.get_figwidth() < 5 else 2
        figure.legend(handles=handles, loc="outside lower left", ncols=columns)


def looks(models: Sequence[Row]) -> list[Look]:
    """The look of each model (a dict with layers, width, heads, parameters and precision)."""
    shapes = _shapes(models)
    precisions = _precisions(models)
    found = []
    for model in models:
        place, which = shapes.index(shape_of(model)), precisions.index(model["precision"])
        if len(shapes) <= len(COLOURS):
            colour, marker = COLOURS[place], MARKERS[place]
        else:
            colour, marker = RAMP[place * len(RAMP) // len(shapes)], "o"
        found.append(Look(colour, marker, DASHES[which % len(DASHES)]))
    return found


def key(models: Sequence[Row]) -> list["Line2D"]:
    """The legend of `looks`: shapes, or classes of their sizes where they are many."""
    from matplotlib.lines import Line2D

    shapes = _shapes(models)
    named: dict[Look, list[Row]] = {}
    for model, look in zip(models, looks(models), strict=True):
        named.setdefault(look._replace(dash="solid"), []).append(model)
    handles = []
    for look, members in named.items():
        label = shape_label(members[0])
        if len(shapes) > len(COLOURS):
            sizes = sorted(model["parameters"] for model in members)
            label = f"{sizes[0]:,} to {sizes[-1]:,} parameters"
        handles.append(Line2D([], [], color=look.colour, marker=look.marker, label=label))
    precisions = _precisions(models)
    if len(precisions) > 1:
        handles += [
            Line2D([], [], color=MUTED, linestyle=dash, label=precision)
            for precision, dash in zip(precisions, DASHES, strict=False)
        ]
    return handles


def shape_label(model: Row) -> str:
    """A shape in words."""
    heads = "1 head" if model["heads"] == 1 else f"{model['heads']} heads"
    return f"{model['layers']} × {model['width']}, {heads}, {model['parameters']:,} parameters"


def shape_of(model: Row) -> tuple[int, ...]:
    """What models of one colour share; the smallest has the smallest."""
    return tuple(model[name] for name in ("parameters", "layers", "width", "heads"))


def _shapes(models: Sequence[Row]) -> list[tuple[int, ...]]:
    return sorted({shape_of(model) for model in models})


def _precisions(models: Sequence[Row]) -> list[str]:
    return sorted({model["precision"] for model in models}, reverse=True)  # fp32 first
