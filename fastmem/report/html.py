"""The report: one HTML page that needs nothing beside it."""

import base64
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from fastmem.base.storage import Row
from fastmem.report.figures import inline_svg
from fastmem.report.reproduce import budget, commands
from fastmem.report.sections import Exhibit, first_fit, interval, sizes_at

if TYPE_CHECKING:
    from jinja2 import Template

SHOWN = 1000
"""A longer table of runs would make the page slow; the data of the first figure has all."""
PUBLISHED_STRICT = 3.58
"""Bits per parameter of the line that arXiv 2505.24832 fits: 3.64 in its own convention."""
ENVIRONMENT = ("version", "commit", "torch", "triton", "python", "device", "threads", "generator")


def page(summary: Row, rows: Sequence[Row], shown: Sequence[Exhibit], name: str) -> str:
    """The report of a sweep as HTML, the same text for the same rows.

    Args:
        summary: the content of capacity.json.
        rows: the rows that it was made from; at least one finished.
        shown: the figures, from `fastmem.report.sections.exhibits`.
        name: what the study is called, such as its folder.
    """
    sections = [
        {
            "exhibit": exhibit,
            "figures": [
                inline_svg(exhibit.fill, exhibit.name, form, exhibit.sentence)
                for form in ("wide", "narrow")
                if exhibit.fill
            ],
            "data": _data_uri(exhibit.csv()) if exhibit.data else None,
        }
        for exhibit in shown
    ]
    order = list(summary["by_precision"])
    models = sorted(summary["models"], key=lambda model: order.index(model["precision"]))
    runs = [(model, run) for model in models for run in model["runs"]]
    return _template().render(
        name=name,
        summary=summary,
        headline=_headline(summary),
        facts=_facts(summary, rows),
        sections=sections,
        models=models,
        runs=runs[:SHOWN],
        runs_in_all=len(runs),
        failed=[row for row in rows if row["status"] == "failed"],
        commands=commands(rows, name),
        environment=_environment(rows),
        interval=interval,
    )


@cache
def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fastmem.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _data_uri(text: str) -> str:
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.encode()).decode()


def _headline(summary: Row) -> dict[str, Any]:
    """The number of the study, its place on a scale from 0, and the verdict."""
    precision, fit = first_fit(summary)
    strict = fit["strict"]
    open_ = [model for model in summary["models"] if not model["saturated"]]
    top: float = max(4.0, PUBLISHED_STRICT * 1.1, 1.1 * (strict["high"] or strict["estimate"]))

    def at(value: float) -> float:
        return round(100 * max(0.0, value) / top, 2)

    sizes = sizes_at(summary, precision)
    many = len(sizes) > 1
    return {
        "strict": strict,
        "precision": precision,
        "fit": f"fit over {len(sizes)} sizes of model" if many else "one size of model: no law",
        "scale": {
            "estimate": at(strict["estimate"]),
            "low": None if strict["low"] is None else at(strict["low"]),
            "high": None if strict["high"] is None else at(strict["high"]),
            "published": at(PUBLISHED_STRICT),
            "ticks": [(value, at(value)) for value in range(int(top) + 1)],
        },
        "published_strict": PUBLISHED_STRICT,
        "saturated": summary["saturated"],
        "open": len(open_),
        "models": len(summary["models"]),
    }


def _facts(summary: Row, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What was run, in pairs of a name and a value."""
    sizes = sorted({row["parameters"] for row in rows})
    failed = sum(row["status"] == "failed" for row in rows)
    seeds = len({row["seed"] for row in rows})
    first = rows[0]["model"]
    span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    return [
        ("Models", f"{len(summary['models'])}"),
        ("Parameters", span),
        ("Runs", f"{len(rows):,}" + (f", {failed:,} failed" if failed else "")),
        ("Seeds", f"{seeds}"),
        ("Precision", ", ".join(summary["by_precision"])),
        ("Data", f"random tokens, V = {first['vocab']:,}, S = {first['length']:,}"),
        ("Budget", budget(rows[0])),
        ("Compute", _time(summary["seconds"])),
    ]


def _environment(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Each thing that a result depends on beside its config, with the runs that had each value."""
    found = []
    for name in ENVIRONMENT:
        values = Counter("none" if row.get(name) is None else str(row[name]) for row in rows)
        found.append((name, values.most_common()))
    seeds = sorted({row["seed"] for row in rows})
    told = ", ".join(map(str, seeds[:20])) + (f", … {seeds[-1]}" if len(seeds) > 20 else "")
    return [*found, ("seeds", [(told, len(rows))])]


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"
