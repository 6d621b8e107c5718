"""fastmem capacity, fastmem report: a sweep, and its table and figures."""

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastmem.base.storage import Row, write_whole
from fastmem.base.terminal import INTERRUPTED, say, table
from fastmem.report.figures import write_figure
from fastmem.report.html import page
from fastmem.report.reproduce import check_finished, check_one_study
from fastmem.report.sections import exhibits
from fastmem.sweeps.driver import PRESETS, SweepConfig, open_folder, open_workers, sweep
from fastmem.sweeps.plan import plan
from fastmem.sweeps.rows import report
from fastmem.sweeps.store import load_rows, without_bits, write_curves
from fastmem.sweeps.trackers import SinkName, check_sink, open_sink

Flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Capacity:
    """Measures how many bits a parameter stores: trains a grid of models on uniformly random
    sequences and finds the plateau of memorized bits. Writes rows/*.json, capacity.json and
    figures/ to --out; started again, it goes on where it was.

    Example: fastmem capacity --width 16 32 --seeds 0 1 2 --steps 2000 --out capacity-mine
    """

    preset: Literal["laptop", "paper"] = "laptop"
    """Where the defaults come from: laptop (a CPU, minutes) or paper (the published grid: GPUs)."""
    plan: bool = False
    """Only say what the sweep would cost: runs, tokens, FLOPs, memory, and the time on this device
    after ten seconds of real steps; nothing is written."""
    log: SinkName | None = None
    """Also send each row to TensorBoard (files in --out), wandb or trackio."""
    sweep: Annotated[SweepConfig, Flat] = PRESETS["laptop"]


@dataclass(frozen=True)
class Report:
    """Makes report.html, a page that opens from disk without a network, the figures as PNG, SVG and
    PDF, capacity.json and the table from the rows of a sweep.

    Example: fastmem report capacity-laptop
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the sweep."""


def run_capacity(command: Capacity) -> int:
    config = command.sweep
    if command.plan:
        print(plan(config).text())
        return 0
    config.runs()  # what cannot run leaves no folder
    open_workers(config)
    if command.log:
        check_sink(command.log)
    rows = open_folder(config)
    status = {row["key"]: row["status"] for row in rows}
    runs = config.runs(rows)
    keys = {run.key for run in runs} if config.counts != "auto" else status.keys()
    done = sum(status.get(key) == "done" for key in keys)
    failed = sum(status.get(key) == "failed" for key in keys)
    total = "" if config.counts == "auto" else f"/{len(runs)}"
    say(f"{total[1:] or 'as many'} runs in {config.out}{'' if total else ' as the plateaus need'}")
    if rows:
        say(f"{done} done and skipped, {failed} failed and tried again")
    if config.sequence_bits and (unscored := without_bits(config.out, rows)):
        say(unscored)
    sink = command.log and open_sink(command.log, config.out)
    for number, row in enumerate(sweep(config), done + 1):
        say(f"[{number}{total}] {row_line(row)}")
        if sink:
            sink.add(row)
        if INTERRUPTED.is_set():
            raise KeyboardInterrupt
    if sink:
        sink.close(load_rows(config.out))
    return _finish(config.out, load_rows(config.out))


def run_report(command: Report) -> int:
    rows = load_rows(command.folder)
    check_finished(rows, command.folder)
    return _finish(command.folder, rows)


def capacity_defaults(flags: list[str]) -> Capacity:
    """The preset that the flags name, which the other flags change."""
    names = [b for a, b in pairwise(flags) if a == "--preset"]
    names += [flag.partition("=")[2] for flag in flags if flag.startswith("--preset=")]
    name = names[-1] if names and names[-1] in PRESETS else "laptop"
    config = PRESETS[name]
    if any(flag.startswith(("--epochs", "--seconds")) for flag in flags):
        config = replace(config, steps=None)
    return Capacity(name, sweep=config)  # type: ignore[arg-type]


def _finish(folder: Path, rows: list[Row]) -> int:
    """The page, the figures, capacity.json and the table from the rows in a folder."""
    check_one_study(rows, folder)
    summary = report(folder, rows)
    write_whole(folder / "capacity.json", json.dumps(summary, indent=1).encode() + b"\n")
    if find_spec("pyarrow"):
        write_curves(folder, rows)
    print(_table(summary))
    written = f"{folder}/capacity.json"
    if any(row["status"] == "done" for row in rows):
        shown = exhibits(summary, rows, folder)
        for exhibit in shown:
            if exhibit.fill:
                write_figure(exhibit.fill, folder / "figures" / exhibit.name)
        text = page(summary, rows, shown, folder.resolve().name)
        write_whole(folder / "report.html", text.encode())
        written = f"{folder}/report.html, figures in {folder}/figures/"
    print(f"\n{written}")
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed:
        print(row_line(row))
    return 1 if failed else 0


def _table(summary: Row) -> str:
    head = ("model", "heads", "parameters", "precision", "capacity", "bits/parameter strict")
    rows = [(*head, "published", "verdict")]
    for model in summary["models"]:
        per, capacity = model["bits_per_parameter"], model["capacity_bits"]["strict"]
        rows.append(
            (
                f"{model['layers']} × {model['width']}",
                f"{model['heads']}",
                f"{model['parameters']:,}",
                model["precision"],
                f"{capacity['estimate']:,.0f} bits" if capacity else "none",
                _interval(per["strict"]),
                _interval(per["published"]),
                "saturated" if model["saturated"] else "not saturated",
            )
        )
    lines = [table(rows, rule=True)]
    for model in summary["models"]:
        if not model["saturated"]:
            heads = f"{model['heads']} head{'s' * (model['heads'] > 1)}"
            lines.append(
                f"{model['layers']} × {model['width']}, {heads}, "
                f"{model['precision']}: {model['why_not']}"
            )
    for precision, fit in summary["by_precision"].items():
        if fit:
            lines.append(
                f"\nbits per parameter, {precision}: {_interval(fit['strict'])} strict, "
                f"{_interval(fit['published'])} in the published convention"
            )
    return "\n".join(lines)


def _interval(interval: dict[str, float | None] | None) -> str:
    if interval is None:
        return "none"
    if interval["low"] is None:
        return f"{interval['estimate']:.2f}"
    return f"{interval['estimate']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def row_line(row: Row) -> str:
    """A run in a line."""
    if row["status"] == "failed":
        return f"{row['key']}  failed: {row['error']}"
    time = f"{row['epochs']:,.0f} epochs, {row['seconds']:.1f} s"
    if row["train"].get("until") == "converged":
        time += ", converged" if row["stopped_by"] == "converged" else ", budget spent"
    if row["entropy_bits"] is None:
        code = f"{row['code_bits']:,.0f} bits, {row['bits_per_token']:.3f} per token"
        return f"{row['key']}  code length {code}, {time}"
    bits = row["memorized_bits"]
    return (
        f"{row['key']}  {bits['strict']:,.0f} bits, "
        f"{bits['published'] / row['entropy_bits']:.1%} of the entropy, "
        f"{bits['strict'] / row['parameters']:.2f} per parameter, "
        f"{time}"
    )
