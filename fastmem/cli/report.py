"""fastmem report: the table, capacity.json, figures and page of a sweep."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

from fastmem.base.storage import Row, write_whole
from fastmem.base.terminal import duration, show, table
from fastmem.cli.text import write_text_report
from fastmem.models.causal.load import RUN
from fastmem.models.extraction.folder import SETTINGS as EXTRACTION
from fastmem.models.scoring.folder import SETTINGS
from fastmem.report.extraction_page import write_extraction_page
from fastmem.report.figures import write_figure
from fastmem.report.html import render_page
from fastmem.report.membership_page import write_membership_page
from fastmem.report.membership_study import RESULT, TARGET
from fastmem.report.reproduce import at_budget, check_finished
from fastmem.report.score_page import write_score_page
from fastmem.report.sections import (
    interval,
    not_proportional,
    percent,
    sections,
    unfinished,
    verdict,
)
from fastmem.sweeps.rows import report
from fastmem.sweeps.store import STUDY, load_rows, write_curves
from fastmem.sweeps.study import check_one_study
from fastmem.sweeps.text_config import CORPUS

PAGES: dict[str, Callable[..., Path]] = {
    SETTINGS: write_score_page,
    EXTRACTION: write_extraction_page,
    RESULT: write_membership_page,
}
"""Who writes the page of a folder, by a file of the folder."""
UNFINISHED = {CORPUS: "text", TARGET: "membership"}
"""The command of a folder without a page, by a folder in it."""


@dataclass(frozen=True)
class Report:
    """Writes the report of a sweep from its rows: report.html, which opens offline, the figures as
    PNG, SVG and PDF, and capacity.json. Prints the table of models. Of a folder of fastmem text,
    score, extract or membership, writes its page.

    Example: fastmem report capacity-laptop
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the sweep, of scores, of extraction or of a study of text or membership."""
    text: bool = True
    """Show text of the documents in the page."""


def run_report(command: Report) -> int:
    if (command.folder / STUDY).exists():
        write_text_report(command.folder, command.text)
        return 0
    for file, write in PAGES.items():
        if (command.folder / file).exists():
            print(write(command.folder, text=command.text))
            return 0
    for part, name in UNFINISHED.items():
        if (command.folder / part).exists():
            raise ValueError(
                f"{command.folder} is not finished: give the same fastmem {name} command again"
            )
    if (command.folder / RUN).exists():
        raise ValueError(
            f"{command.folder} is a model of fastmem train, and its run is {RUN} there: a report "
            f"is of a sweep or of scores, such as those of `fastmem score {command.folder}`"
        )
    rows = load_rows(command.folder)
    check_finished(rows, command.folder)
    return write_report(command.folder, rows)


def write_report(folder: Path, rows: list[Row]) -> int:
    """Writes capacity.json, the figures and report.html, and prints the table.

    Returns:
        The exit code: 1 if a run failed, else 0.
    """
    check_one_study(rows, folder)
    summary = report(folder, rows)
    write_whole(folder / "capacity.json", json.dumps(summary, indent=1).encode() + b"\n")
    if find_spec("pyarrow"):
        write_curves(folder, rows)
    written = f"{folder}/capacity.json"
    if any(row["status"] == "done" for row in rows):
        shown = sections(summary, rows, folder)
        for section in shown:
            if section.draw:
                write_figure(section.draw, folder / "figures" / section.name)
        text = render_page(summary, rows, shown, folder.resolve().name)
        # A folder name that is not UTF-8 has no bytes in it.
        write_whole(folder / "report.html", text.encode(errors="replace"))
        written = f"{folder}/report.html, figures in {folder}/figures/"
    show(f"{_table(summary)}\n\n{written}")
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed:
        show(row_line(row))
    return 1 if failed else 0


def row_line(row: Row) -> str:
    """One line that sums up a run."""
    if row["status"] == "failed":
        return f"{row['key']}  failed: {row['error']}"
    time = duration(row["seconds"])
    if row["train"].get("until") == "converged" and row["stopped_by"] == "converged":
        time += ", converged"
    if row["entropy_bits"] is None:
        code = f"{row['code_bits']:,.0f} bits, {row['bits_per_token']:.3f} per token"
        return f"{row['key']}  code length {code}, {time}"
    bits = row["memorized_bits"]
    part = bits["published"] / row["entropy_bits"]  # the same in both conventions
    per = bits["strict"] / row["parameters"]
    return f"{row['key']}  {bits['strict']:,.0f} bits ({part:.1%}), {per:.2f}/parameter, {time}"


def _table(summary: Row) -> str:
    head = ("model", "heads", "parameters", "precision", "capacity", "bits/parameter strict")
    part = unfinished(summary)
    rows = [(*head, "published", "more data", "more training")]
    reasons = []
    for model in summary["models"]:
        per, capacity = model["bits_per_parameter"], model["capacity_bits"]["strict"]
        name = f"{model['layers']} × {model['width']}"
        rows.append(
            (
                name,
                f"{model['heads']}",
                f"{model['parameters']:,}",
                model["precision"],
                f"{capacity['estimate']:,.0f} bits" if capacity else "none",
                interval(per["strict"]),
                interval(per["published"]),
                "adds nothing" if model["saturated"] else "lower bound",
                f"+{percent(gain)}" if (gain := model["more_training"]) else "not measured",
            )
        )
        # Of an unfinished sweep, the other runs may be what the reason asks for.
        if not model["saturated"] and not (part and capacity):
            heads = f"{model['heads']} head{'s' * (model['heads'] > 1)}"
            reasons.append(f"{name}, {heads}, {model['precision']}: {model['why_not']}")
    _, data, training = verdict(summary)
    at = at_budget(summary["budget"])
    fits = [
        f"\nbits per parameter {at}, {precision}: {interval(fit['strict'])} strict, "
        f"{interval(fit['published'])} in the published convention"
        for precision, fit in summary["by_precision"].items()
        if fit
    ]
    fits += [slope] if (slope := not_proportional(summary)) else []
    verdicts = [f"verdict: {data}; {training}"]
    if part:
        verdicts.append(f"unfinished, {part}: the same fastmem capacity command goes on")
    return "\n".join([table(rows, rule=True), *reasons, *fits, *verdicts])
