"""fastmem predict: fit the scaling law, and predict the capacity of a shape."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastmem.base.storage import Row
from fastmem.base.terminal import show, table
from fastmem.cli.predict_membership import predict_membership
from fastmem.memorization.capacity import summarize
from fastmem.memorization.scaling_law import PUBLISHED, Law, Prediction, fitted_rows, law_of_rows
from fastmem.models.engine import Precision
from fastmem.models.gpt import GPTConfig
from fastmem.report.reproduce import at_budget, check_finished
from fastmem.report.sections import interval, verdict
from fastmem.sweeps.store import load_rows

FITS = {
    "slope": "bits per parameter, through the origin",
    "line_slope": "bits per parameter, with an intercept",
    "line_intercept": "the intercept, bits",
    "exponent": "log-log slope, 1 if proportional",
}
PREDICTIONS = {"proportional": "capacity, line through the origin", "power": "capacity, power law"}
DIGITS = ".3g"


@dataclass(frozen=True)
class Predict:
    """Fits the scaling law to the rows of a sweep, and predicts the capacity of a shape; with
    `--membership` fits laws of membership to sweeps with --sequence-bits, and predicts F1.

    Example: fastmem predict capacity-laptop --layers 48 --width 1600 --vocab 50257 --length 1024
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER ...")]
    """Folder of the sweep; with --membership one or more."""
    membership: bool = False
    """Predict the F1 of telling members from non-members by their bits."""
    layers: int | None = None
    """Layers of the model to predict; without a shape only the law is printed."""
    width: int | None = None
    """Width of the model to predict."""
    vocab: int | None = None
    """Vocabulary of the model to predict; by default as in the sweep."""
    length: int | None = None
    """Longest sequence of the model to predict; by default as in the sweep."""
    precision: Precision | None = None
    """Precision of the runs to fit; by default fp32 if a run has it."""
    count: int | None = None
    """Sequences N of the data set, with --membership."""
    epochs: float | None = None
    """Epochs of the training, with --membership; by default the budget of the sweep."""
    json: bool = False
    """Print all numbers as JSON, for programs, with --membership."""


def run_predict(command: Predict) -> int:
    if not command.folders:
        raise ValueError("FOLDER is missing: give the folder of a sweep")
    folder = command.folders[0]
    rows = load_rows(folder)
    check_finished(rows, folder)
    shape = _shape(command, rows)
    if command.membership:
        predict_membership(command.folders, shape, command.count, command.epochs, command.json)
        return 0
    for name in ("count", "epochs", "json"):
        if getattr(command, name) != getattr(Predict, name):
            raise ValueError(f"--{name} is for --membership: leave it out, or give both")
    if len(command.folders) > 1:
        raise ValueError(f"{len(command.folders)} folders without --membership: give one")
    strict = law_of_rows(rows, command.precision)
    published = law_of_rows(rows, command.precision, "published")
    sizes = [residual.parameters for residual in strict.residuals]
    head = f"{len(sizes)} models from {sizes[0]:,} to {sizes[-1]:,} parameters"
    show("\n".join([_both(head, FITS, strict, published), *_residuals(strict)]))
    show(f"\n{_published_models(published)}")
    show("\n" + "\n".join(_verdict(rows, command.precision)))
    if shape:
        P = shape.parameter_count
        show(
            f"\n{shape.layers} × {shape.width}, vocabulary {shape.vocab}, length {shape.length}: "
            f"{P:,} parameters, {P / sizes[-1]:,.2g} times the largest model measured"
        )
        head = "bits, for one such model"
        show(_both(head, PREDICTIONS, strict.predict(P), published.predict(P)))
    return 0


def _shape(command: Predict, rows: list[Row]) -> GPTConfig | None:
    if command.layers is None and command.width is None:
        return None
    if command.layers is None or command.width is None:
        missing = "width" if command.width is None else "layers"
        raise ValueError(f"a shape is --layers and --width: give --{missing} too")
    of_rows = rows[0]["model"]
    vocab = of_rows["vocab"] if command.vocab is None else command.vocab
    length = of_rows["length"] if command.length is None else command.length
    # The number of heads does not change the number of parameters.
    return GPTConfig(command.layers, command.width, 1, vocab, length)


def _both(
    head: str, names: dict[str, str], strict: Law | Prediction, published: Law | Prediction
) -> str:
    """A table of the named intervals in both conventions."""
    rows = [
        (text, *(interval(getattr(found, name).to_dict(), DIGITS) for found in (strict, published)))
        for name, text in names.items()
    ]
    return table([(head, "strict", "published"), *rows])


def _verdict(rows: list[Row], precision: Precision | None) -> list[str]:
    """The budget of the law, what more training would add, and a warning if models would memorize
    more data."""
    summary = summarize(fitted_rows(rows, precision))
    models = summary["models"]
    lines = [f"capacities are {at_budget(summary['budget'])}: {verdict(summary)[2]}"]
    if unsaturated := sum(not model["saturated"] for model in models):
        do = "does" if unsaturated == 1 else "do"
        lines.append(
            f"warning: {unsaturated} of these {len(models)} models {do} not show a plateau yet, so "
            "the law is a fit to lower bounds; `fastmem report` says what to run"
        )
    return lines


def _residuals(law: Law) -> list[str]:
    lines = [""]
    for axis in ("layers", "width"):
        fractions = law.mean_residuals(axis)
        parts = ", ".join(f"{value}: {fraction:+.1%}" for value, fraction in fractions.items())
        lines.append(f"capacity above the line through the origin, by {axis}: {parts}")
    return lines


def _published_models(law: Law) -> str:
    """A table of published models, their capacities, and the predictions of the law."""
    head = ("published", "parameters", "fp32 bits", "bf16 bits", "this law")
    rows = [
        (
            f"{p.layers} × {p.width}",
            f"{p.parameters:,}",
            f"{p.fp32_bits:{DIGITS}}",
            f"{p.bf16_bits:{DIGITS}}",
            interval(law.predict(p.parameters).proportional.to_dict(), DIGITS),
        )
        for p in PUBLISHED
    ]
    return table([head, *rows])
