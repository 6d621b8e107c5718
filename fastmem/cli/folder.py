"""fastmem predict, fastmem watch: what a folder says of other models, and of its own sweep."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastmem.base.stats import Interval
from fastmem.base.storage import Row
from fastmem.base.terminal import table
from fastmem.memorization.capacity import summarize
from fastmem.memorization.scaling_law import PUBLISHED, Law, Prediction, fitted_rows, law_of_rows
from fastmem.models.engine import Precision
from fastmem.models.gpt import GPTConfig
from fastmem.sweeps.store import load_rows
from fastmem.sweeps.watch import Watcher, progress_table


@dataclass(frozen=True)
class Predict:
    """Fits the scaling law to the rows of a sweep, and predicts the capacity of any shape.

    Example: fastmem predict capacity-laptop --layers 48 --width 1600 --vocab 50257 --length 1024
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the sweep."""
    layers: int | None = None
    """Layers of the model to predict; the law alone without it."""
    width: int | None = None
    """Width of the model to predict."""
    vocab: int | None = None
    """Its vocabulary; by default that of the sweep."""
    length: int | None = None
    """Its longest sequence; by default that of the sweep."""
    precision: Precision | None = None
    """Precision of the runs to fit; by default fp32 where there are any."""


@dataclass(frozen=True)
class Watch:
    """Shows a sweep of another process while it works: runs done, running and failed, the best of
    each model so far, and the time left. It ends with the sweep; Ctrl-C ends it alone.

    Example: fastmem watch capacity-laptop
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the sweep."""
    once: bool = False
    """Show it once and end."""
    every: float = 2.0
    """Seconds between two looks."""


def run_watch(command: Watch) -> int:
    from rich.console import Console
    from rich.live import Live

    if not 0 < command.every < float("inf"):
        raise ValueError(f"every must be above 0 seconds, not {command.every}: give it 2")
    watcher, console = Watcher(command.folder), Console()
    progress = watcher.look()
    if command.once:
        console.print(progress_table(progress, command.folder))
        return 0
    with Live(
        progress_table(progress, command.folder), console=console, auto_refresh=False
    ) as live:
        while progress.at_work:
            time.sleep(command.every)
            progress = watcher.look()
            live.update(progress_table(progress, command.folder), refresh=True)
    return 0


def run_predict(command: Predict) -> int:
    rows = load_rows(command.folder)
    shape = _shape(command, rows)
    strict = law_of_rows(rows, command.precision)
    published = law_of_rows(rows, command.precision, "published")
    print("\n".join([*_law(strict, published), *_residuals(strict), *_beside(published)]))
    if warning := _unsaturated(rows, command.precision):
        print(f"\n{warning}")
    if shape:
        P, largest = shape.parameter_count, strict.residuals[-1].parameters
        print(
            f"\n{shape.layers} × {shape.width}, vocabulary {shape.vocab}, length {shape.length}: "
            f"{P:,} parameters, {P / largest:,.2g} times the largest model measured"
        )
        print("\n".join(_prediction(strict.predict(P), published.predict(P))))
    return 0


def _shape(command: Predict, rows: list[Row]) -> GPTConfig | None:
    if command.layers is None and command.width is None:
        return None
    if command.layers is None or command.width is None:
        missing = "width" if command.width is None else "layers"
        raise ValueError(f"a shape is layers and width: give --{missing} too")
    of_rows = rows[0]["model"] if rows else {"vocab": 1, "length": 1}
    vocab = of_rows["vocab"] if command.vocab is None else command.vocab
    length = of_rows["length"] if command.length is None else command.length
    # Heads divide the parameters among them and change nothing in their number.
    return GPTConfig(command.layers, command.width, 1, vocab, length)


def _law(strict: Law, published: Law) -> list[str]:
    names = {
        "slope": "bits per parameter, through the origin",
        "line_slope": "bits per parameter, with an intercept",
        "line_intercept": "the intercept, bits",
        "exponent": "log-log slope",
    }
    rows = [
        (text, _numbers(getattr(strict, name)), _numbers(getattr(published, name)))
        for name, text in names.items()
    ]
    sizes = [residual.parameters for residual in strict.residuals]
    head = f"{len(sizes)} models from {sizes[0]:,} to {sizes[-1]:,} parameters"
    return [table([(head, "strict", "published"), *rows])]


def _prediction(strict: Prediction, published: Prediction) -> list[str]:
    names = {"proportional": "capacity, line through the origin", "power": "capacity, power law"}
    rows = [
        (text, _numbers(getattr(strict, name)), _numbers(getattr(published, name)))
        for name, text in names.items()
    ]
    return [table([("bits, for one such model", "strict", "published"), *rows])]


def _unsaturated(rows: list[Row], precision: Precision | None) -> str | None:
    """What a law is worth whose models do not all show their capacity."""
    models = summarize(fitted_rows(rows, precision))["models"]
    held_back = sum(not model["saturated"] for model in models)
    if not held_back:
        return None
    return (
        f"warning: {held_back} of these {len(models)} models do not show a capacity yet, so the "
        "law is one of lower bounds; `fastmem report` says what to run"
    )


def _residuals(law: Law) -> list[str]:
    lines = [""]
    for axis, name in (("layers", "layers"), ("width", "width")):
        shares = law.mean_residuals(axis)  # type: ignore[arg-type]
        parts = ", ".join(f"{value}: {share:+.1%}" for value, share in shares.items())
        lines.append(f"capacity above the line through the origin, by {name}: {parts}")
    return lines


def _beside(law: Law) -> list[str]:
    """The published models beside what the law gives them, in their convention."""
    head = ("published", "parameters", "fp32 bits", "bf16 bits", "this law")
    rows = [
        (
            f"{p.layers} × {p.width}",
            f"{p.parameters:,}",
            f"{p.fp32_bits:.3g}",
            f"{p.bf16_bits:.3g}",
            _numbers(law.predict(p.parameters).proportional),
        )
        for p in PUBLISHED
    ]
    return ["", table([head, *rows])]


def _numbers(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.estimate:.3g}"
    return f"{interval.estimate:.3g} [{interval.low:.3g}, {interval.high:.3g}]"
