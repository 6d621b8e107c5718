"""The page of a study of membership: curves, histograms, the table of scores, and single cases."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastmem.base.stats import Floats
from fastmem.base.storage import Row, read_result, write_whole
from fastmem.memorization.roc import roc_points
from fastmem.models.scoring.folder import read_columns
from fastmem.report.figures import COLOURS, FAINT, GREY_LINE, Draw, legend, pictures
from fastmem.report.html import template
from fastmem.report.membership_study import CASES, PAGE, RESULT, TABLE
from fastmem.report.score_page import last_name, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BINS = 40
PANEL = 1.7
"""Inches of a panel's height, with its labels."""
STEPS = 80
"""Points of a curve for each factor of ten of the false positive rate."""
DRAWN = 6
"""Scores with a colour of their own in the curves; the rest are grey."""


def write_membership_page(folder: Path, text: bool = True) -> Path:
    """Writes membership.html from the files of a study; gives its path.

    Args:
        folder: with membership.json, membership.parquet and cases.json.
        text: False leaves out the text of the cases.

    Raises:
        ValueError: the folder holds no finished study.
    """
    if not (folder / RESULT).exists():
        raise ValueError(f"{folder} holds no finished study of membership: run fastmem membership")
    result = read_result(folder / RESULT, "scores", "blind", "notes")
    cases = read_result(folder / CASES, "members, rightly")
    page = render_membership_page(result, read_columns(folder / TABLE), cases, text)
    write_whole(folder / PAGE, page.encode(errors="replace"))
    return folder / PAGE


def render_membership_page(
    result: Row, columns: dict[str, NDArray[Any]], cases: Row, text: bool = True
) -> str:
    """The page as HTML, the same text for the same study.

    Args:
        result: the content of membership.json.
        columns: those of membership.parquet.
        cases: the content of cases.json.
        text: False leaves out the text of the cases.
    """
    names = sorted(result["scores"], key=lambda name: -result["scores"][name]["auc"]["estimate"])
    scores = {name: columns[name] for name in names}
    blind = max((one["auc"]["estimate"] for one in result["blind"].values()), default=None)
    return template("membership.html").render(
        result=result,
        model=last_name(result["model"]),
        best=result["scores"][result["best"]],
        names=names,
        blind=blind,
        facts=_facts(result),
        figures=_figures(result, scores, columns["is_member"]),
        cases=[(kind, [_case(one, text) for one in found]) for kind, found in cases.items()],
        with_text=text,
        reasons=sorted(
            {r["reason"] for one in result["scores"].values() for r in one["tpr"].values()} - {None}
        ),
        command=shlex.join(result["command"]),
    )


def _facts(result: Row) -> list[tuple[str, str]]:
    members, others = (f"{result[name]:,}" for name in ("members", "non_members"))
    facts = [("Members", members), ("Non-members", others), ("Tokens", f"{result['tokens']:,}")]
    facts.append(("Data", " and ".join(map(last_name, result["data"].values()))))
    if result["reference"]:
        facts.append(("Reference", last_name(result["reference"])))
    if result["references"]:
        facts.append(("References", ", ".join(map(last_name, result["references"]))))
    if shadows := result["shadows"]:
        text = f"{shadows['models']}, each {shadows['steps']:,} steps on half of the sequences"
        facts.append(("Shadow models", text))
    if told := result["expected"]:
        text = f"{told['auc']:.3f} from {told['memorized_bits_a_sequence']:.2f} bits a sequence"
        facts.append(("AUC that memorized bits predict", text))
    return facts


def _figures(
    result: Row, scores: dict[str, Floats], is_member: NDArray[np.bool_]
) -> list[tuple[str, str, list[str]]]:
    """Title, sentence and pictures of the curves and of the histograms."""
    best = result["best"]
    rate = result["scores"][best]["tpr"].get("0.01", {"estimate": None})
    sentence = (
        "Members found (true positives) against non-members taken for members (false positives), "
        "at every threshold. A score without signal follows the grey diagonal."
    )
    if rate["estimate"] is not None:
        sentence += (
            f" {best} finds {100 * rate['estimate']:.1f} % of the members at 1 % false positives."
        )
    curves = _curves(scores, is_member)
    spread = (
        f"Fractions of members and of non-members by their score. {best} separates them best; "
        "where the two overlap, no threshold tells them apart."
    )
    found: list[tuple[str, str, Draw]] = [
        ("ROC curves", sentence, curves),
        ("Scores", spread, _histograms(scores, is_member)),
    ]
    return [
        (title, text, pictures(draw, title.split()[0].lower(), text)) for title, text, draw in found
    ]


def _curves(scores: dict[str, Floats], is_member: NDArray[np.bool_]) -> Draw:
    """Draws the true against the false positive rate of each score, both logarithmic."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        counts = is_member.sum(), (~is_member).sum()
        low = [0.5 / count for count in counts]
        line = [max(low), 1.0]
        axes.plot(line, line, label="chance", **GREY_LINE)
        for place, (name, values) in reversed([*enumerate(scores.items())]):
            fpr, tpr = _thinned(*roc_points(values, is_member), low[1])
            shown = place < DRAWN
            axes.step(
                fpr,
                np.maximum(tpr, low[0]),
                where="post",
                color=COLOURS[place] if shown else FAINT,
                linewidth=1.8 if shown else 0.9,
                label=name if shown else "others" if place == DRAWN else None,
            )
        axes.set(xscale="log", yscale="log", xlim=(low[1], 1), ylim=(low[0], 1))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
            axis.set_minor_formatter(lambda value, _: "")
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
        handles, labels = axes.get_legend_handles_labels()
        of_label = dict(zip(labels, handles, strict=True))
        order = [*list(scores)[:DRAWN], "others", "chance"]
        legend(figure, [of_label[name] for name in order if name in of_label])

    return draw


def _thinned(fpr: Floats, tpr: Floats, least: float) -> tuple[Floats, Floats]:
    """The last point of each step of a log scale, so that a page does not grow with the data."""
    fpr = np.maximum(fpr, least)
    steps = np.round(STEPS * np.log10(fpr))
    last = np.append(np.flatnonzero(np.diff(steps)), len(fpr) - 1)
    keep = np.unique(np.r_[0, last])
    return fpr[keep], tpr[keep]


def _histograms(scores: dict[str, Floats], is_member: NDArray[np.bool_]) -> Draw:
    """Draws a panel a score: fractions of members and of non-members in equal bins."""

    def draw(figure: "Figure") -> None:
        width = figure.get_figwidth()
        columns = 1 if width < 5 else 3
        rows = -(-len(scores) // columns)
        height = PANEL * rows + 0.6
        figure.set_size_inches(width, height)
        figure.set_layout_engine("none")  # a layout of many panels takes seconds
        places = {"left": 0.5 / width, "right": 1 - 0.1 / width, "top": 1 - 0.3 / height}
        places |= {"bottom": 0.8 / height, "wspace": 0.35, "hspace": 0.55}
        panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw=places).ravel()
        for axes in panels[len(scores) :]:
            axes.remove()
        for axes, (name, values) in zip(panels, scores.items(), strict=False):
            edges = _edges(values)
            for side, colour, label in (
                (is_member, COLOURS[0], "members"),
                (~is_member, COLOURS[1], "non-members"),
            ):
                counts, _ = np.histogram(np.clip(values[side], edges[0], edges[-1]), edges)
                fractions = counts / side.sum()
                axes.stairs(fractions, edges, fill=True, color=colour, alpha=0.25, linewidth=0)
                axes.stairs(fractions, edges, color=colour, linewidth=1.4, label=label)
            axes.annotate(name, (0, 1), (0, 3), "axes fraction", "offset points")
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:g} %")
            axes.locator_params(nbins=4)
        handles = panels[0].get_legend_handles_labels()[0]
        figure.legend(handles=handles, loc="lower left", ncols=2)

    return draw


def _edges(values: Floats) -> Floats:
    """Bins from the 0.5 % to the 99.5 % quantile; the outer bins also hold the rest."""
    low, high = np.quantile(values, [0.005, 0.995])
    if not high > low:
        low, high = low - 0.5, high + 0.5
    bins = int(np.clip(np.sqrt(len(values)), 8, MOST_BINS))
    return np.linspace(low, high, bins + 1)


def _case(case: Row, text: bool) -> Row:
    return case | {"text": visible(case["text"]) if text else ""}
