"""The figures of a text study, one function each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastmem.base.storage import Row
from fastmem.memorization.double_descent import DoubleDescent
from fastmem.report.courses import Curve, curve
from fastmem.report.figures import (
    COLOURS,
    GREY_LINE,
    MARKERS,
    MUTED,
    ModelStyle,
    by_shape,
    legend,
    log_ticks,
    model_handles,
    model_styles,
    with_errors,
)
from fastmem.report.text_runs import CODES, Z, curve_of, net_of_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N = "training sequences N"
DASHED, DOTTED = (0, (5, 2)), (0, (1.5, 1.5))
LINE: dict[str, Any] = {"color": MUTED, "linewidth": 0.8}
WIDE = 5
"""Inches from which two panels stand side by side."""
NARROW_PANEL = 3.4
"""Height of each of the panels that stand one below the other, with its part of the legend."""


def unintended_against_count(figure: "Figure", models: Sequence[Sequence[Row]]) -> None:
    """Draws net unintended memorization with intervals, and the sums behind it."""
    left, right = _panels(figure)
    for records, style in _styled(models):
        nets = net_of_sizes(records)
        _bars(left, [one["count"] for one in nets], *with_errors(nets), style)
        for name, dash in (("max", "solid"), ("held_out_max", DOTTED)):
            found = curve_of(records, f"reference_{name}_bits")
            right.plot(found.sizes, found.means, color=style.colour, linestyle=dash, linewidth=1.6)
    left.axhline(0, **LINE)
    _large(left, right)
    left.set_title("Unintended memorization, net of held-out sequences")
    _named(left, N, "bits, net")
    _named(right, N, "bits, gross")
    legend(figure, [*_handles(models), *_lines("members", "held-out sequences")])


def generalization_against_count(figure: "Figure", models: Sequence[Sequence[Row]]) -> None:
    """Draws generalization, and train and test loss, in bits a token."""
    left, right = _panels(figure)
    for records, style in _styled(models):
        _points(left, curve_of(records, "generalization_bits_per_token"), style)
        for name, dash in (("test", "solid"), ("held_out", DOTTED), ("train", DASHED)):
            found = curve_of(records, f"{name}_bits_per_token")
            right.plot(found.sizes, found.means, color=style.colour, linestyle=dash, linewidth=1.6)
    left.set_title("Generalization, and loss on test and training sequences")
    _named(left, N, "generalization, bits a token")
    _named(right, N, "loss, bits a token")
    legend(figure, [*_handles(models), *_lines("test", "held-out"), _line("train", DASHED)])


def loss_against_load(
    figure: "Figure",
    text: Sequence[Row],
    uniform: Sequence[Row],
    found: DoubleDescent,
    of_uniform: DoubleDescent | None,
) -> None:
    """Draws test loss over data / capacity: of text, and of uniform data if it was run."""
    panels = _panels(figure, 2 if uniform else 1)
    drawn = [(text, "reference_ratio", found), (uniform, "uniform_ratio", of_uniform)]
    for axes, (records, ratio, peak) in zip(panels, drawn, strict=False):
        for own, style in _styled(by_shape(records)):
            by_count = curve_of(own, "test_bits_per_token")
            x = curve_of(own, ratio).means
            faint: dict[str, Any] = {"markersize": 4, "alpha": 0.5, "markeredgewidth": 0}
            points = [(one[ratio], one["test_bits_per_token"]) for one in own]
            axes.plot(*zip(*points, strict=True), style.marker, color=style.colour, **faint)
            axes.plot(x, by_count.means, color=style.colour, linewidth=1.8)
        axes.axvline(1.0, **LINE)
        if peak and peak.peak_ratio and peak.peak_ratio.low and peak.peak_ratio.high:
            axes.axvspan(peak.peak_ratio.low, peak.peak_ratio.high, color=MUTED, alpha=0.15, lw=0)
    panels[0].set_title("Test loss against bits of the data over capacity")
    _named(panels[0], "text: bits of data / capacity", "test loss, bits a token")
    handles = _handles(by_shape(text))
    if uniform:
        floor = panels[1].axhline(uniform[0]["floor"], label="log2 V, the least", **GREY_LINE)
        _named(panels[1], "uniform data: entropy / capacity", "test loss, bits a token")
        handles.append(floor)
    legend(figure, handles)


def spread_over_sequences(figure: "Figure", records: Sequence[Row], width: float) -> None:
    """Draws distributions of saved bits, and the fraction of bits that sequences hold together."""
    left, right = _panels(figure)
    counts = sorted({record["count"] for record in records})
    handles = []
    for count, colour in zip(counts, COLOURS, strict=False):
        parts = {
            part: [one for one in records if one["part"] == part and one["count"] == count]
            for part in ("histogram", "held")
        }
        edges = [*(one["from"] for one in parts["histogram"]), parts["histogram"][-1]["to"]]
        for name, dash in (("members", "solid"), ("held_out", DOTTED)):
            fractions = [one[name] for one in parts["histogram"]]
            left.stairs(fractions, edges, color=colour, linestyle=dash, linewidth=1.6)
        x = [100 * one["to"] for one in parts["held"]]
        y = [100 * one["members"] for one in parts["held"]]
        handles += right.plot(x, y, color=colour, linewidth=1.8, label=f"N = {count:,}")
    left.set_xscale("asinh", linear_width=width)
    powers = [10.0**k for k in range(9) if 10.0**k > width]
    left.set_xticks([*(-power for power in powers), 0.0, *powers])
    left.xaxis.set_major_formatter(lambda bits, _: f"{bits:,.0f}")
    left.set_xlim(edges[0], edges[-1])
    right.axhline(90, **GREY_LINE)
    left.set_ylim(bottom=0)
    left.yaxis.set_major_formatter(lambda fraction, _: f"{fraction:.0%}")
    left.set_title("Bits saved on a sequence, and how many sequences hold them")
    left.set(xlabel="bits saved on a sequence", ylabel="sequences")
    right.set(xlabel="% of training sequences", ylabel="% of unintended bits")
    legend(figure, [*handles, *_lines("members", "held-out sequences")])


def bits_against_rarity(figure: "Figure", records: Sequence[Row]) -> None:
    """Draws unintended memorization of single sequences over their rarity, by script."""
    axes = figure.add_subplot()
    drawn = [record for record in records if record["rarity"] is not None]
    for label, colour, marker, own in (
        ("Latin script", COLOURS[0], "o", ("LATIN",)),
        ("no letters", COLOURS[1], "s", ("",)),
        ("another script", COLOURS[2], "D", None),
    ):
        points = [
            (one["rarity"], one["unintended_bits"])
            for one in drawn
            if (one["script"] in own if own else one["script"] not in ("LATIN", ""))
        ]
        if points:
            style: dict[str, Any] = {"markersize": 4, "alpha": 0.5, "markeredgewidth": 0}
            axes.plot(*zip(*points, strict=True), marker, color=colour, label=label, **style)
    axes.set(xlabel="TF-IDF rarity of a sequence", ylabel="unintended memorization (bits)")
    axes.set_title("Unintended memorization of single sequences against their rarity")
    legend(figure, axes.get_legend_handles_labels()[0])


def net_by_reference(figure: "Figure", codes: Sequence[Row], strengths: Sequence[Row]) -> None:
    """Draws net unintended memorization under each code, and under each reference model."""
    left, right = _panels(figure)
    handles = []
    for (code, name), colour, marker in zip(CODES.items(), COLOURS[3:], MARKERS[3:], strict=False):
        own = [record for record in codes if record["code"] == code]
        x, nets = [one["count"] for one in own], with_errors([_net(one) for one in own])
        _bars(left, x, *nets, ModelStyle(colour, marker, "solid"))
        handles += left.plot([], [], color=colour, marker=marker, label=f"by {name}")
    for records, style in _styled(by_shape(strengths)):
        own = sorted(records, key=lambda one: float(one["bits_per_byte"]))
        x, nets = [one["bits_per_byte"] for one in own], with_errors([_net(one) for one in own])
        _bars(right, x, *nets, style)
    left.axhline(0, **LINE)
    _large(left, right)
    left.set_title("Net unintended memorization by the reference")
    _named(left, N, "bits, net")
    right.set(xlabel="reference, bits a byte", ylabel="bits, net")
    legend(figure, [*handles, *_handles(by_shape(strengths))])


def bits_of_canaries(figure: "Figure", records: Sequence[Row], entropy: float) -> None:
    """Draws unintended memorization of canaries, planted and not, against their entropy."""
    axes = figure.add_subplot()
    for own, style in _styled(by_shape(records)):
        counts = [one["count"] for one in own]
        for name, dash in (("planted", "solid"), ("held_out", DOTTED)):
            values = [one[f"{name}_bits"] for one in own]
            found = curve(counts, values, [one[f"{name}_error"] for one in own])
            _points(axes, found, ModelStyle(style.colour, style.marker, dash))
    known = axes.axhline(entropy, label="entropy of a canary", **GREY_LINE)
    axes.axhline(0, **LINE)
    axes.set_title("Unintended memorization of canaries against their entropy")
    _named(axes, N, "bits of a canary")
    lines = _lines("planted", "never trained on")
    legend(figure, [*_handles(by_shape(records)), *lines, known])


def _net(record: Row) -> Row:
    return {"estimate": record["net"], "low": record["net_low"], "high": record["net_high"]}


def _bars(axes: "Axes", x: Sequence[float], y: Any, errors: Any, style: ModelStyle) -> None:
    """Draws values with their errors over x, in rising order, joined by a line."""
    axes.errorbar(
        x,
        y,
        errors,
        fmt=style.marker,
        linestyle=style.dash,
        color=style.colour,
        capsize=2,
        markersize=5,
        linewidth=1.6,
        elinewidth=1,
    )


def _panels(figure: "Figure", number: int = 2) -> Sequence["Axes"]:
    """Panels side by side, or one below the other on a narrow figure."""
    if figure.get_figwidth() > WIDE:
        return list(figure.subplots(1, number, squeeze=False)[0])
    figure.set_figheight(NARROW_PANEL * number)
    return list(figure.subplots(number, 1, squeeze=False)[:, 0])


def _named(axes: "Axes", x: str, y: str) -> None:
    log_ticks(axes.xaxis)
    axes.set(xlabel=x, ylabel=y)


def _large(*panels: "Axes") -> None:
    """Tick labels such as 20k."""
    from matplotlib.ticker import EngFormatter

    for axes in panels:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _points(axes: "Axes", found: Curve, style: ModelStyle) -> None:
    """Means with intervals of 95 %."""
    _bars(axes, found.sizes, found.means, Z * found.errors, style)


def _styled(models: Sequence[Sequence[Row]]) -> list[tuple[Sequence[Row], ModelStyle]]:
    styles = model_styles([records[0] for records in models])
    return list(zip(models, styles, strict=True))


def _handles(models: Sequence[Sequence[Row]]) -> list[Any]:
    return list(model_handles([records[0] for records in models]))


def _lines(solid: str, dotted: str) -> list[Any]:
    return [_line(solid, "solid"), _line(dotted, DOTTED)]


def _line(name: str, dash: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=MUTED, linestyle=dash, label=name)
