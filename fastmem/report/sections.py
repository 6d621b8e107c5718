"""The sections of a report: each figure with its data and a sentence that says what it shows."""

from collections.abc import Sequence
from pathlib import Path

from fastmem.base.storage import Row
from fastmem.memorization.capacity import LATE_GAIN, LITTLE, best_rows, late_gain
from fastmem.memorization.scaling_law import PUBLISHED
from fastmem.report import plots
from fastmem.report.figures import COLOURS, shape_fields, shape_of
from fastmem.report.held_out_sections import bits_section, descent_section, membership_section
from fastmem.report.plots import measured
from fastmem.report.reproduce import at_budget
from fastmem.report.section import PERCENT, Section


def sections(summary: Row, rows: Sequence[Row], folder: Path) -> list[Section]:
    """All sections of the report, in order.

    Args:
        summary: the content of capacity.json.
        rows: the rows that summary was made from; at least one finished.
        folder: the folder of the sweep, which may have sequence_bits/.
    """
    return [
        _memorized(summary),
        _capacity(summary),
        _training(summary, rows),
        _precision(summary),
        bits_section(rows, folder),
        *([membership_section(summary)] if summary.get("membership") else []),
        descent_section(summary, rows),
    ]


def interval(value: Row | None, form: str = ",.2f") -> str:
    """An estimate with its interval as text, such as 3.60 [3.52, 3.68]."""
    if value is None:
        return "none"
    if value["low"] is None:
        return f"{value['estimate']:{form}}"
    return f"{value['estimate']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def percent(value: Row) -> str:
    """A fraction with its interval as text, such as 8 % [4 %, 15 %]."""
    text = f"{value['estimate']:.0%} [{value['low']:.0%}, {value['high']:.0%}]"
    return text.replace("%", PERCENT)


def verdict(summary: Row) -> tuple[bool, str, str]:
    """Whether the models show what they can hold; what more data would add; what more training
    would add."""
    models, at = summary["models"], at_budget(summary["budget"])
    open_models = sum(not model["saturated"] for model in models)
    data = f"more data adds nothing {at}"
    if open_models:
        do = "does" if open_models == 1 else "do"
        which = f"{open_models} of {len(models)} models" if len(models) > 1 else "the model"
        data = f"{which} {do} not show a plateau {at}"
    gains = [model["more_training"] for model in models if model["more_training"]]
    if not gains:
        how = "--until converged measures it"
        if summary["budget"]["until"] == "converged":
            how = "it takes three stages, so a larger budget"
        late = max(model["late_gain"] or 0.0 for model in models)
        if late > LATE_GAIN:
            how = f"the last tenth of the budget added {late:.1%}; {how}".replace("%", PERCENT)
        return False, data, f"what more training would add is not measured: {how}"
    most = max(gains, key=lambda gain: float(gain["estimate"]))
    upto = "up to about" if len(models) > 1 else "about"
    training = f"more training would add {upto} {percent(most)}"
    if len(gains) < len(models):
        training += f", and is not measured for {len(models) - len(gains)} of {len(models)} models"
    trained = len(gains) == len(models) and most["estimate"] <= LITTLE
    return summary["saturated"] and trained and not unfinished(summary), data, training


def unfinished(summary: Row) -> str | None:
    """How much of the sweep is done, such as 3 of 20 runs; None if all is."""
    runs = summary.get("runs", {})
    if searched := runs.get("searched"):
        need = "1 model needs" if searched == 1 else f"{searched:,} models need"
        return f"{runs['done']:,} runs so far, {need} more"
    done, planned = runs.get("done", 0), runs.get("planned") or 0
    return f"{done:,} of {planned:,} runs" if done < planned else None


def not_proportional(summary: Row) -> str | None:
    """The log-log slope, if its interval leaves out 1; None if capacity may be proportional."""
    law = summary["law"]["strict"]
    slope = law and law["exponent"]
    if not slope or slope["low"] is None or round(slope["low"], 2) <= 1 <= round(slope["high"], 2):
        return None
    return f"log-log slope {interval(slope)}: capacity is not proportional to parameters"


def sizes_at(summary: Row, precision: str) -> list[int]:
    """The sizes of the models with a finished run at a precision."""
    return sorted({model["parameters"] for model in measured(summary, precision)})


def first_fit(summary: Row) -> tuple[str, Row]:
    """The precision of the headline, the first with a finished run, and its fit."""
    return next((name, fit) for name, fit in summary["by_precision"].items() if fit)


def _memorized(summary: Row) -> Section:
    models = measured(summary)
    full = [model for model in models if model["saturated"]]
    at = at_budget(summary["budget"])
    if full:
        largest = max(full, key=lambda model: (model["parameters"], model["precision"] == "fp32"))
        bits = largest["capacity_bits"]["strict"]["estimate"]
        ratio = largest["bits_per_parameter"]["strict"]["estimate"]
        stops = f"stops at {bits:,.0f} bits, {ratio:.2f} per parameter"
        size = f"with {largest['parameters']:,} parameters,"
        whole = "memorizes its whole data set until the model is full"
        if len(full) < len(models):
            sentence = (
                f"{len(full)} of {len(models)} models show a plateau {at}: the largest of them, "
                f"{size} {stops}. The bits of the others are a lower bound."
            )
        elif len(models) == 1:
            sentence = f"The model {whole}: it {stops}, and more data adds nothing {at}."
        else:
            sentence = (
                f"Each model {whole}: the largest, {size} {stops}, and more data adds nothing {at}."
            )
    else:
        sentence = (
            "No model shows a plateau yet, for the reasons in the table: the memorized bits are "
            "a lower bound."
        )
    lines = "Lines are means over seeds"
    if len({shape_of(model) for model in models}) <= len(COLOURS):
        lines += "; dashed lines are capacities, with their bits per parameter at the right"
    data = [
        shape_fields(model)
        | {name: run[name] for name in ("count", "seed", "entropy_bits")}
        | {f"{c}_bits": run["memorized_bits"][c] for c in ("strict", "published")}
        for model in models
        for run in model["runs"]
        if run["status"] == "done"
    ]
    return Section(
        "memorized_bits",
        "Memorized bits against data set size",
        sentence,
        f"On the grey diagonal a model has memorized its whole data set. {lines}.",
        lambda figure: plots.memorized_against_count(figure, summary),
        data,
    )


def _capacity(summary: Row) -> Section:
    models = measured(summary)
    precision, fit = first_fit(summary)
    facts: list[tuple[str, str]] = []
    sizes = sizes_at(summary, precision)
    if len(sizes) < 2:
        sentence = (
            f"There is no law yet: all models have {sizes[0]:,} parameters, and a law of capacity "
            "against parameters needs two or more sizes. Widen the sweep with --width or --layers."
        )
    else:
        facts = _law(summary["law"])
        published = [b / m.parameters for m in PUBLISHED for b in (m.fp32_bits, m.bf16_bits)]
        low, high = min(published), max(published)
        sentence = (
            f"From {sizes[0]:,} to {sizes[-1]:,} parameters capacity grows by "
            f"{interval(fit['published'])} bits per parameter in the published convention; the "
            f"published models, trained for a million steps, store {low:.1f} to {high:.1f}."
        )
        if slope := not_proportional(summary):
            sentence += f" By the {slope}."
    gains = ("estimate", "low", "high")
    data = [
        shape_fields(model)
        | {
            f"{convention}_{name}": value
            for convention in ("strict", "published")
            for name, value in model["capacity_bits"][convention].items()
        }
        | {"saturated": model["saturated"]}
        | {f"more_training_{n}": (model["more_training"] or {}).get(n) for n in gains}
        for model in models
    ]
    return Section(
        "capacity",
        "Capacity against parameters",
        sentence,
        "Lines go through the origin; bars and bands are 95 % intervals; grey points are the "
        "models of arXiv 2505.24832.",
        lambda figure: plots.capacity_against_parameters(figure, summary),
        data,
        facts=facts,
    )


def _law(found: Row) -> list[tuple[str, str]]:
    """The three fits, and mean residuals of the first fit by depth and by width."""
    law = found["strict"]
    if law is None:
        return [("No law", found["why_not"])]
    facts = [
        ("Through the origin, strict", f"{interval(law['slope'])} bits per parameter"),
        (
            "With an intercept",
            f"{interval(law['line_slope'])} bits per parameter and "
            f"{interval(law['line_intercept'], ',.0f')} bits",
        ),
        ("Log-log slope", f"{interval(law['exponent'])}; 1 means proportional"),
    ]
    for axis, unit, fractions in (
        ("depth", "layers", law["by_layers"]),
        ("width", "wide", law["by_width"]),
    ):
        if len(fractions) > 1:
            parts = [f"{fraction:+.1%} at {value} {unit}" for value, fraction in fractions.items()]
            if len(parts) > 8:
                parts = [*parts[:4], "…", *parts[-3:]]
            facts.append((f"Above the first line, by {axis}", ", ".join(parts)))
    return [(name, value.replace("%", PERCENT)) for name, value in facts]


def _training(summary: Row, rows: Sequence[Row]) -> Section:
    drawn = plots.curves(rows)
    best = best_rows(row for row in rows if row["status"] == "done")
    gain = f"{max(late_gain(row['curve']) for row in best):.1%}".replace("%", PERCENT)
    sentence = (
        "Memorized bits rise through training: in the last tenth of its budget, where the learning "
        f"rate falls to zero, the best run of each model gained at most {gain}. This says little "
        f"about longer runs: {verdict(summary)[2]}."
    )
    finished = sum(row["status"] == "done" for row in rows)
    drawn_of = "" if len(drawn) == finished else f" {len(drawn)} of {finished:,} runs are drawn."
    data = [
        shape_fields(row)
        | {"count": row["sequences"]["count"], "seed": row["seed"], "step": point["step"]}
        | {"strict_bits": point["memorized_bits"]}
        for row in drawn
        for point in row["curve"]
    ]
    return Section(
        "training",
        "Training curves",
        sentence,
        "One line a run, scored on its data set, or on a fixed sample of a large one, and on all "
        "of it at the end. The learning rate decays "
        f"to zero, so every run ends flat, and a longer run ends higher.{drawn_of}",
        lambda figure: plots.memorized_against_steps(figure, rows),
        data,
    )


def _precision(summary: Row) -> Section:
    fits = {name: fit["strict"] for name, fit in summary["by_precision"].items() if fit}
    title = "Precision"
    if len(fits) < 2:
        (only,) = fits
        other = "fp32" if only != "fp32" else "bf16-mixed"
        return Section("precision", title, "", flags=f"--precision {only} {other}")
    (first, base), *others = fits.items()
    data = [
        shape_fields(model) | model["bits_per_parameter"]["strict"] for model in measured(summary)
    ]
    return Section(
        "precision",
        title,
        f"{'. '.join(_compared(name, fit, first, base) for name, fit in others)}.",
        "One point a model with its 95 % interval. A line is the fit over all models of a "
        "precision; compare lines only if they have the same models.",
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
