"""What a report shows: each figure with its data and the one sentence that says what it shows."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmem.base.storage import Row
from fastmem.data.files.parquet import pyarrow_parquet
from fastmem.memorization.capacity import LATE_GAIN, late_gain
from fastmem.memorization.scaling_law import PUBLISHED
from fastmem.report import held_out, plots
from fastmem.report.figures import COLOURS, Fill, shape_of

PERCENT = "\N{NO-BREAK SPACE}%"


@dataclass(frozen=True)
class Exhibit:
    """A section of the report; without `fill` there is no figure and the sentence says why."""

    name: str
    """Of its files, and of its place in the page."""
    title: str
    sentence: str
    how: str = ""
    """How to read the figure."""
    fill: Fill | None = None
    data: Sequence[Row] = ()
    """The numbers in the figure, in records that have the same fields."""
    flags: str = ""
    """What the sweep must be run with for there to be a figure."""
    facts: Sequence[tuple[str, str]] = ()
    """Numbers beside the figure, each with its name."""

    def csv(self) -> str:
        """The data as text, a record a line, numbers as they are."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.data[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.data)
        return text.getvalue()


def exhibits(summary: Row, rows: Sequence[Row], folder: Path) -> list[Exhibit]:
    """All sections of the report, in order.

    Args:
        summary: the content of capacity.json.
        rows: the rows that it was made from; at least one finished.
        folder: where sequence_bits/ is, if anywhere.
    """
    return [
        _memorized(summary),
        _capacity(summary),
        _training(summary, rows),
        _precision(summary),
        _bits(rows, folder),
        _descent(summary, rows),
    ]


def interval(value: Row | None, form: str = ",.2f") -> str:
    """An estimate with its interval as text, such as 3.60 [3.52, 3.68]."""
    if value is None:
        return "none"
    if value["low"] is None:
        return f"{value['estimate']:{form}}"
    return f"{value['estimate']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def sizes_at(summary: Row, precision: str) -> list[int]:
    """The sizes of the models of which a run finished at a precision."""
    models = (model for model in measured(summary) if model["precision"] == precision)
    return sorted({model["parameters"] for model in models})


def measured(summary: Row) -> list[Row]:
    """The models of which a run finished."""
    return [model for model in summary["models"] if model["capacity_bits"]["strict"]]


def first_fit(summary: Row) -> tuple[str, Row]:
    """The precision that the headline is of, and its fit: the first of which a run finished."""
    return next((name, fit) for name, fit in summary["by_precision"].items() if fit)


def _memorized(summary: Row) -> Exhibit:
    models = measured(summary)
    full = [model for model in models if model["saturated"]]
    if full:
        largest = max(full, key=lambda model: (model["parameters"], model["precision"] == "fp32"))
        bits = largest["capacity_bits"]["strict"]["estimate"]
        ratio = largest["bits_per_parameter"]["strict"]["estimate"]
        stops = f"stops at {bits:,.0f} bits, {ratio:.2f} a parameter"
        size = f"of {largest['parameters']:,} parameters,"
        whole = "stores its data whole until it is full"
        if len(full) < len(models):
            sentence = (
                f"{len(full)} of {len(models)} models show their capacity: the largest of these, "
                f"{size} {stops}. What the others hold is a lower bound."
            )
        elif len(models) == 1:
            sentence = f"The model {whole}: it {stops}, and more data adds nothing."
        else:
            sentence = (
                f"Each model {whole}: the largest, {size} {stops}, and more data adds nothing."
            )
    else:
        sentence = (
            "No model shows its capacity yet, for the reasons in the table: what is memorized so "
            "far is a lower bound."
        )
    lines = "Lines are means over seeds"
    if len({shape_of(model) for model in models}) <= len(COLOURS):
        lines += ", dashed levels capacities, numbers at the right bits per parameter"
    data = [
        _shape(model)
        | {name: run[name] for name in ("count", "seed", "entropy_bits")}
        | {f"{c}_bits": run["memorized_bits"][c] for c in ("strict", "published")}
        for model in models
        for run in model["runs"]
        if run["status"] == "done"
    ]
    return Exhibit(
        "memorized_bits",
        "Memorized bits against data set size",
        sentence,
        f"On the grey diagonal a model knows all there is to know of its data. {lines}.",
        lambda figure: plots.memorized_against_count(figure, summary),
        data,
    )


def _capacity(summary: Row) -> Exhibit:
    models = measured(summary)
    precision, fit = first_fit(summary)
    facts: list[tuple[str, str]] = []
    sizes = sizes_at(summary, precision)
    if len(sizes) < 2:
        sentence = (
            f"There is no law yet: all models have {sizes[0]:,} parameters, and a law of capacity "
            "against parameters needs two sizes or more: widen the sweep with --width or --layers."
        )
    else:
        facts = _law(summary["law"])
        published = [b / m.parameters for m in PUBLISHED for b in (m.fp32_bits, m.bf16_bits)]
        low, high = min(published), max(published)
        sentence = (
            f"From {sizes[0]:,} to {sizes[-1]:,} parameters capacity grows by "
            f"{interval(fit['published'])} bits a parameter in the published convention, where "
            f"the published models, trained for a million steps, hold {low:.1f} to {high:.1f}."
        )
    data = [
        _shape(model)
        | {
            f"{convention}_{name}": value
            for convention in ("strict", "published")
            for name, value in model["capacity_bits"][convention].items()
        }
        | {"saturated": model["saturated"]}
        for model in models
    ]
    return Exhibit(
        "capacity",
        "Capacity against parameters",
        sentence,
        "Lines go through the origin; bars and bands are 95 % intervals, grey points the models "
        "of arXiv 2505.24832.",
        lambda figure: plots.capacity_against_parameters(figure, summary),
        data,
        facts=facts,
    )


def _law(found: Row) -> list[tuple[str, str]]:
    """The three fits, and what models hold beside the first by their depth and their width."""
    law = found["strict"]
    if law is None:
        return [("No law", found["why_not"])]
    facts = [
        ("Through the origin, strict", f"{interval(law['slope'])} bits a parameter"),
        (
            "With an intercept",
            f"{interval(law['line_slope'])} bits a parameter and "
            f"{interval(law['line_intercept'], ',.0f')} bits",
        ),
        ("Log-log slope", f"{interval(law['exponent'])}, 1 where capacity is proportional"),
    ]
    for of, unit, shares in (
        ("depth", "layers", law["by_layers"]),
        ("width", "wide", law["by_width"]),
    ):
        if len(shares) > 1:
            told = [f"{share:+.1%} at {value} {unit}" for value, share in shares.items()]
            facts.append((f"Above the first line, by {of}", ", ".join(_some(told))))
    return [(name, value.replace("%", PERCENT)) for name, value in facts]


def _some(told: list[str]) -> list[str]:
    """The first and the last of a long list."""
    return told if len(told) <= 8 else [*told[:4], "…", *told[-3:]]


def _training(summary: Row, rows: Sequence[Row]) -> Exhibit:
    drawn = plots.curves(rows)
    best: dict[tuple[Any, ...], Row] = {}
    for row in (row for row in rows if row["status"] == "done"):
        model = (*row["model"].values(), row["precision"])
        if row["memorized_bits"]["strict"] >= best.get(model, row)["memorized_bits"]["strict"]:
            best[model] = row
    gain = max(late_gain(row["curve"]) for row in best.values())
    end = "are flat at its end" if gain <= LATE_GAIN else "still rise at its end"
    sentence = (
        f"Memorized bits rise through training and {end}: in the last tenth of their budget the "
        f"best runs gained {gain:.1%} at most."
    ).replace("%", PERCENT)
    finished = sum(row["status"] == "done" for row in rows)
    less = "" if len(drawn) == finished else f" {len(drawn)} of {finished:,} runs are drawn."
    data = [
        _shape(row | row["model"])
        | {"count": row["sequences"]["count"], "seed": row["seed"], "step": point["step"]}
        | {"strict_bits": point["memorized_bits"]}
        for row in drawn
        for point in row["curve"]
    ]
    return Exhibit(
        "training",
        "Training curves",
        sentence,
        "One line a run, scored on its whole data set along the way. The learning rate decays to "
        f"zero, so every run ends flat; a longer one ends higher.{less}",
        lambda figure: plots.memorized_against_steps(figure, rows),
        data,
    )


def _precision(summary: Row) -> Exhibit:
    fits = {name: fit["strict"] for name, fit in summary["by_precision"].items() if fit}
    title = "Precision"
    if len(fits) < 2:
        (only,) = fits
        other = "fp32" if only != "fp32" else "bf16-mixed"
        sentence = (
            f"All finished runs are at {only}: there is nothing to compare. Run the same sweep "
            "with another precision too:"
        )
        return Exhibit("precision", title, sentence, flags=f"--precision {only} {other}")
    (first, base), *others = fits.items()
    told = [_compared(name, fit, first, base) for name, fit in others]
    data = [_shape(model) | model["bits_per_parameter"]["strict"] for model in measured(summary)]
    return Exhibit(
        "precision",
        title,
        f"{'. '.join(told)}.",
        "One point a model with its 95 % interval; a level is the fit over all models of a "
        "precision, and levels compare only where the models are the same.",
        lambda figure: plots.precision_against_parameters(figure, summary),
        data,
    )


def _compared(name: str, fit: Row, first: str, base: Row) -> str:
    if base["estimate"] <= 0:
        return f"A parameter stores nothing at {first} and {fit['estimate']:.2f} bits at {name}"
    change = fit["estimate"] / base["estimate"] - 1
    more = "more" if change > 0 else "less"
    text = (
        f"At {name} a parameter stores {fit['estimate']:.2f} bits, {abs(change):.1%} {more} than "
        f"the {base['estimate']:.2f} at {first}"
    ).replace("%", PERCENT)
    if None in (fit["low"], base["low"]):
        return text
    apart = fit["low"] > base["high"] or fit["high"] < base["low"]
    return f"{text}, {'beyond' if apart else 'within'} the 95 % intervals"


def _bits(rows: Sequence[Row], folder: Path) -> Exhibit:
    name, title = "sequence_bits", "Members against held-out sequences"
    if not any((folder / name).glob("*.parquet")):
        return Exhibit(name, title, NO_BITS, flags=STORE_BITS)
    try:
        pyarrow_parquet()
    except ValueError as problem:
        return Exhibit(
            name, title, f"The bits of each sequence are there and not shown: {problem}."
        )
    samples = held_out.read_samples(rows, folder)
    if not samples:
        return Exhibit(name, title, NO_BITS, flags=STORE_BITS)
    first, last = samples[0], samples[-1]
    sentence = (
        f"With {first.row['sequences']['count']:,} sequences to learn a member costs "
        f"{first.members.mean():,.1f} bits and a held-out sequence {first.held_out.mean():,.1f}"
    )
    if len(samples) > 1:
        sentence += (
            f"; with {last.row['sequences']['count']:,} they cost {last.members.mean():,.1f} and "
            f"{last.held_out.mean():,.1f}"
        )
    shares = dict.fromkeys(f"{sample.auc:.1%}" for sample in (first, last))
    pairs = " and ".join(shares)
    sentence += f", so that the member is the cheaper one in {pairs} of pairs."
    model = last.row["model"]
    return Exhibit(
        name,
        title,
        sentence.replace("%", PERCENT),
        f"The model of {model['layers']} × {model['width']}, {last.row['parameters']:,} "
        f"parameters, at {last.row['precision']}, seed {last.row['seed']}; one panel a data set "
        "size N.",
        lambda figure: held_out.bits_of_sequences(figure, samples),
        held_out.histogram(samples),
    )


def _descent(summary: Row, rows: Sequence[Row]) -> Exhibit:
    name, title = "double_descent", "Double descent"
    records = held_out.descent(summary, rows)
    if not records:
        return Exhibit(name, title, NO_HELD_OUT, flags=STORE_BITS)
    worst = max(records, key=lambda record: record["held_out_bits"])
    beyond = max(records, key=lambda record: record["entropy_over_capacity"])
    sentence = (
        f"Held-out sequences cost most, {worst['held_out_bits']:,.0f} bits, where the data hold "
        f"{worst['entropy_over_capacity']:.1f} times the model's capacity; with "
        f"{beyond['entropy_over_capacity']:.1f} times it is {beyond['held_out_bits']:,.0f}, "
        f"against {beyond['uniform_bits']:,.0f} for a model that knows nothing."
    )
    return Exhibit(
        name,
        title,
        sentence,
        "Nothing of random tokens can be known beforehand, so the dashed level is the best that "
        "there is; the vertical line is where the data fill the model.",
        lambda figure: held_out.held_out_against_load(figure, records),
        records,
    )


NO_BITS = "No run has stored the bits of each sequence. Run the same sweep in a new folder with"
STORE_BITS = "--sequence-bits"
NO_HELD_OUT = "No run has scored held-out sequences. Run the same sweep in a new folder with"


def _shape(row: Row) -> Row:
    names = ("layers", "width", "heads", "parameters", "precision")
    return {name: row[name] for name in names}
