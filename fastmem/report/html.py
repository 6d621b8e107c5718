"""The report as one HTML page, which needs no other file."""

import base64
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from fastmem.base.storage import Row
from fastmem.base.terminal import duration
from fastmem.report.figures import pictures
from fastmem.report.reproduce import at_budget, budget, commands
from fastmem.report.section import Section
from fastmem.report.sections import (
    first_fit,
    interval,
    not_proportional,
    percent,
    sizes_at,
    unfinished,
    verdict,
)

if TYPE_CHECKING:
    from jinja2 import Template

SHOWN = 1000
"""Most rows in the table of runs, which keeps the page fast."""
PUBLISHED_STRICT = 3.58
"""Bits per parameter in arXiv 2505.24832: 3.64 in the published convention."""
ENVIRONMENT = ("version", "commit", "torch", "triton", "python", "device", "threads", "generator")


def render_page(summary: Row, rows: Sequence[Row], sections: Sequence[Section], name: str) -> str:
    """The report of a sweep as HTML, the same text for the same rows.

    Args:
        summary: the content of capacity.json.
        rows: the rows that summary was made from; at least one finished.
        sections: the figures, from `fastmem.report.sections.sections`.
        name: the name of the study, such as its folder.
    """
    order = list(summary["by_precision"])
    models = sorted(summary["models"], key=lambda model: order.index(model["precision"]))
    runs = [(model, run) for model in models for run in model["runs"]]
    return template("report.html").render(
        name=name,
        headline=_headline(summary),
        facts=_facts(summary, rows),
        sections=with_figures(sections),
        missing=[section for section in sections if not section.draw],
        models=models,
        runs=runs[:SHOWN],
        runs_in_all=len(runs),
        failed=[row for row in rows if row["status"] == "failed"],
        commands=commands(rows, name),
        environment=environment(rows),
        interval=interval,
        percent=percent,
    )


def with_figures(sections: Sequence[Section]) -> list[tuple[Section, list[str], str]]:
    """The sections that are drawn, each with its figures as SVG, wide and narrow, and its data as
    an address."""
    return [
        (
            section,
            pictures(section.draw, section.name, section.sentence),
            _data_uri(section.csv()),
        )
        for section in sections
        if section.draw
    ]


@cache
def template(name: str) -> "Template":
    """A template of the folder templates/, which escapes what it shows."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    def flags(text: str) -> Markup:
        """The text, with its flags as code, which no line break divides."""
        return Markup(re.sub(r"--[a-z][a-z-]*", r"<code>\g<0></code>", str(escape(text))))

    environment = Environment(
        loader=PackageLoader("fastmem.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["flags"] = flags
    return environment.get_template(f"{name}.jinja")


def _data_uri(text: str) -> str:
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.encode()).decode()


def _headline(summary: Row) -> dict[str, Any]:
    """Bits per parameter of the study, their places on a scale from 0, and the verdict."""
    precision, fit = first_fit(summary)
    strict = fit["strict"]
    trained, data, training = verdict(summary)
    top: float = max(4.0, PUBLISHED_STRICT * 1.1, 1.1 * (strict["high"] or strict["estimate"]))

    def at(value: float) -> float:
        return round(100 * max(0.0, value) / top, 2)

    sizes = len(sizes_at(summary, precision))
    return {
        "strict": strict,
        "published": fit["published"],
        "at": at_budget(summary["budget"]),
        "precision": precision,
        "fit": f"fit over {sizes} model sizes" if sizes > 1 else "one model size: no law",
        "slope": not_proportional(summary),
        "scale": {
            "estimate": at(strict["estimate"]),
            "low": None if strict["low"] is None else at(strict["low"]),
            "high": None if strict["high"] is None else at(strict["high"]),
            "published": at(PUBLISHED_STRICT),
            "ticks": [(value, at(value)) for value in range(int(top) + 1)],
        },
        "published_strict": PUBLISHED_STRICT,
        "saturated": summary["saturated"],
        "unfinished": unfinished(summary),
        "trained": trained,
        "data": data,
        "training": training,
    }


def _facts(summary: Row, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What was run, as pairs of a name and a value."""
    sizes = sorted({row["parameters"] for row in rows})
    failed = sum(row["status"] == "failed" for row in rows)
    seeds = len({row["seed"] for row in rows})
    first = rows[0]["model"]
    span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    return [
        ("Models", f"{len(summary['models'])}"),
        ("Parameters", span),
        ("Runs", (unfinished(summary) or f"{len(rows):,}") + f", {failed:,} failed" * bool(failed)),
        ("Seeds", f"{seeds}"),
        ("Precision", ", ".join(summary["by_precision"])),
        ("Data", f"random tokens, V = {first['vocab']:,}, S = {first['length']:,}"),
        ("Budget", budget(rows[0])),
        ("Compute", duration(summary["seconds"])),
    ]


def environment(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, int]]]]:
    """The values of each field of the environment, and of the seeds, with their numbers of runs."""
    found = []
    for name in ENVIRONMENT:
        values = Counter("none" if row.get(name) is None else str(row[name]) for row in rows)
        found.append((name, values.most_common()))
    seeds = sorted({row["seed"] for row in rows})
    text = ", ".join(map(str, seeds[:20])) + (f", … {seeds[-1]}" if len(seeds) > 20 else "")
    return [*found, ("seeds", [(text, len(rows))])]
