"""The exhibits of a text study: each with its data, and sentences made from what was found."""

from collections.abc import Sequence

import numpy as np

from fastmem.base.stats import Floats, Interval
from fastmem.base.storage import Row
from fastmem.memorization.double_descent import DoubleDescent, double_descent
from fastmem.memorization.unintended import over_seeds, total_unintended
from fastmem.report import text_plots
from fastmem.report.courses import Course, Curve, course
from fastmem.report.figures import by_shape, shape_fields
from fastmem.report.section import Section
from fastmem.report.sections import interval
from fastmem.report.text_runs import (
    CODES,
    Ranked,
    best_runs,
    curve_of,
    flat,
    loads,
    net_curve,
    net_of_sizes,
    percents,
    ranked,
    shape_name,
    uniform_loads,
)
from fastmem.report.text_sequences import canaries, rare, spread
from fastmem.report.text_study import Strength, TextRun, TextStudy

STRENGTH_REPLICATES = 500
_NAMED = 4


def text_sections(
    study: TextStudy, text: Row, top: Ranked, show_text: bool = True
) -> list[Section]:
    """The sections of the page, in order.

    Args:
        study: the folder, with at least one finished run.
        text: the content of text.json.
        top: from `ranked(study)`.
        show_text: False leaves the text of sequences out of the data.
    """
    runs = flat(text)
    return [
        _unintended(runs),
        _generalization(runs, study.corpus.train.length - 1),
        _descent(study),
        spread(study, top.run),
        rare(top, show_text),
        _codes(study, runs),
        canaries(study, text),
    ]


def double_descent_of(study: TextStudy, code: str = "reference") -> DoubleDescent:
    """The peak of the test loss against the bits of the data by `code` over the capacity."""
    return _double_descent(loads(study), f"{code}_ratio")


def rarity_of(study: TextStudy) -> Row:
    """Spearman's rho of rarity and unintended memorization, and the number of its sequences.

    These are the members with unintended memorization above 0, in the run that `ranked` ranks.
    """
    top = ranked(study)
    return {"spearman": top.rho and top.rho.to_dict(), "sequences": top.above_zero}


def headline(models: Sequence[Sequence[Row]]) -> tuple[Row, str]:
    """The run with the most net unintended memorization, and what was found, in a sentence.

    Args:
        models: from `by_shape(flat(text))`.
    """
    runs = [run for model in models for run in model]
    best = max(runs, key=lambda run: float(run["reference_net_estimate"]))
    ways, below = _by_course(models)
    if not ways:
        return best, _courses(models)
    parts = [f"{_verb(way)} in {_of(len(some), len(models))}" for way, some in ways.items()]
    if below:
        parts.append(percents(f"is not above 0 beyond its 95 % interval in {len(below)}"))
    return best, (
        "Net of held-out sequences, unintended memorization of the training text "
        f"{_listed(parts)} as the data set grows."
    )


def _double_descent(records: Sequence[Row], ratio: str) -> DoubleDescent:
    return double_descent(
        [record[ratio] for record in records],
        [record["test_bits_per_token"] for record in records],
        [shape_name(record) for record in records],
        [record["count"] for record in records],
    )


def _unintended(runs: Sequence[Row]) -> Section:
    models = by_shape(runs)
    largest = [one for one in models[-1] if one["count"] == models[-1][-1]["count"]]
    gross, others = (
        np.mean([one[f"reference_{name}_bits"] for one in largest])
        for name in ("max", "held_out_max")
    )
    sentence = (
        f"{_courses(models)} Gross, {shape_name(largest[0])} at N = {largest[0]['count']:,} saves "
        f"{gross:,.0f} bits on its training sequences, and {others:,.0f} bits on as many sequences "
        "that it never saw."
    )
    return Section(
        "unintended",
        "Unintended memorization against data set size",
        sentence,
        percents(
            "Bits that a model saves over the reference model, by the max code. Net is of members "
            "minus as many held-out sequences, most of the same documents; bars are 95 % intervals "
            "by bootstrap over documents and seeds. Gross is the sum over members (solid) and over "
            "held-out sequences (dotted). The data also hold the mixture code, and net of "
            "sequences of other documents."
        ),
        lambda figure: text_plots.unintended_against_count(figure, models),
        [one for model in models for one in model],
    )


_WITH_N: dict[Course, str] = {
    "rises and falls": "rises and falls again with N for {}.",
    "rises": "rises with N without a fall for {}; larger data sets ({}) may show a fall.",
    "falls": "falls with N from the smallest on for {}; smaller data sets ({}) may show a rise.",
    "falls and rises": "falls and rises again with N for {}.",
    "flat": "does not change with N beyond its noise for {}.",
}


def _by_course(
    models: Sequence[Sequence[Row]],
) -> tuple[dict[Course, list[tuple[Row, Curve]]], list[str]]:
    """The curves of models by their course, the course of most models first; and the names of
    models whose net unintended memorization is nowhere above 0."""
    found: dict[Course, list[tuple[Row, Curve]]] = {way: [] for way in _WITH_N}
    below = []
    for model in models:
        net = net_curve(model)
        if net.above_zero():
            found[course(net)].append((model[0], net))
        else:
            below.append(shape_name(model[0]))
    ways = sorted(found, key=lambda way: -len(found[way]))
    return {way: found[way] for way in ways if found[way]}, below


def _courses(models: Sequence[Sequence[Row]]) -> str:
    """How the net unintended memorization of each model goes with N."""
    ways, below = _by_course(models)
    noise = percents("above 0 beyond its 95 % interval")
    if not ways:
        return f"Net of held-out sequences, unintended memorization is nowhere {noise}."
    texts = []
    for way, some in ways.items():
        counts = [count for _, net in some for count in net.sizes]
        low, high = min(counts), max(counts)
        flags = f"--counts {2 * high} {4 * high}"
        if way == "falls":
            flags = f"--counts {max(1, low // 4)} {max(1, low // 2)}"
        texts.append(_WITH_N[way].format(_listed([_most(*one) for one in some]), flags))
    found = f"Net of held-out sequences, unintended memorization {' It '.join(texts)}"
    return found + (f" It is nowhere {noise} for {_listed(below)}." if below else "")


def _most(first: Row, net: Curve) -> str:
    """Such as: 1 × 16 (900 bits, 0.91 a parameter, at N = 60; 100 at N = 20,000)."""
    most = float(net.means[net.top])
    text = f"{most:,.0f} bits, {most / first['parameters']:.2f} a parameter, at N = "
    text += f"{net.sizes[net.top]:,}"
    if net.top < len(net.sizes) - 1:
        text += f"; {net.means[-1]:,.0f} at N = {net.sizes[-1]:,}"
    return f"{shape_name(first)} ({text})"


def _of(some: int, models: int) -> str:
    """Such as 2 of 3 models."""
    if some < models:
        return f"{some} of {models} models"
    return {1: "the only model", 2: "both models"}.get(models, f"all {models} models")


def _listed(names: Sequence[str]) -> str:
    shown = [*names[:_NAMED], f"{len(names) - _NAMED} more models"][: len(names)]
    return " and ".join([*([", ".join(shown[:-1])] if shown[1:] else []), shown[-1]])


def _verb(way: Course) -> str:
    return "does not change beyond its noise" if way == "flat" else way


def _generalization(runs: Sequence[Row], coded: int) -> Section:
    models = [
        [
            one | {"generalization_bits_per_token": general / (one["count"] * coded)}
            for one in model
            for general in [one["reference_generalization_bits"]]
        ]
        for model in by_shape(runs)
    ]
    named = (
        ("generalization", "generalization_bits_per_token"),
        ("test loss", "test_bits_per_token"),
        ("train loss", "train_bits_per_token"),
    )
    largest = models[-1]
    parts = [f"{name} {_per_token(curve_of(largest, field))}" for name, field in named]
    sentence = f"In bits a token, of {shape_name(largest[0])}: {'; '.join(parts)}."
    if len(models) > 1:
        ways = [course(curve_of(model, named[0][1])) for model in models]
        same = sum(way == ways[-1] for way in ways)
        sentence += f" Generalization {_verb(ways[-1])} in {_of(same, len(models))}."
    if len({one["seed"] for one in runs}) == 1:
        sentence += " With one seed the noise is not known."
    return Section(
        "generalization",
        "Generalization against data set size",
        sentence,
        "Generalization is memorization minus unintended memorization of the members, by the max "
        "code and the reference model. The loss is of members (train), of held-out sequences, "
        "most of the same documents, and of other documents (test).",
        lambda figure: text_plots.generalization_against_count(figure, models),
        [one for model in models for one in model],
    )


def _per_token(found: Curve) -> str:
    ends = f"from {found.means[0]:.2f} at N = {found.sizes[0]:,}"
    last = f"{found.means[-1]:.2f} at N = {found.sizes[-1]:,}"
    way = course(found)
    if len(found.sizes) == 1:
        return f"is {last}"
    if way in ("rises", "falls"):
        return f"{way} {ends} to {last}"
    if way == "flat":
        return f"stays near {found.means.mean():.2f}"
    place = found.top if way == "rises and falls" else int(found.means.argmin())
    middle = f"{found.means[place]:.2f} at N = {found.sizes[place]:,}"
    first, then = ("rises", "falls") if way == "rises and falls" else ("falls", "rises")
    return f"{first} {ends} to {middle} and {then} to {last}"


def _descent(study: TextStudy) -> Section:
    records, uniform = loads(study), uniform_loads(study)
    found = double_descent_of(study)
    by_uniform = double_descent_of(study, "uniform")
    of_uniform = _double_descent(uniform, "uniform_ratio") if uniform else None
    facts = [
        ("Text, ratio by the reference model", _ratio(found.peak_ratio)),
        ("Text, ratio by the uniform code", _ratio(by_uniform.peak_ratio)),
        ("Uniform data", _ratio(of_uniform.peak_ratio) if of_uniform else "not run"),
        ("Capacity from", study.capacity_from),
    ]
    sentence = f"On text: {found.found[0].lower()}{found.found[1:]}"
    if found.peak_ratio and by_uniform.peak_ratio:
        sentence += (
            " By the bits of the uniform code the peak is at "
            f"{interval(by_uniform.peak_ratio.to_dict())}."
        )
    if of_uniform:
        told = of_uniform.found
        sentence += (
            f" On uniform data, where no model can do better than {uniform[0]['floor']:.2f} bits "
            f"a token: {told[0].lower()}{told[1:]}"
        )
    return Section(
        "double_descent",
        "Double descent",
        sentence,
        percents(
            "The ratio is the bits of the training text under the reference model and of its "
            "canaries, for uniform data the entropy, over the capacity of the model; at the "
            "vertical line the data fill the model. The band is the 95 % interval of the peak. "
            "The data hold the ratio by each code."
        ),
        (lambda figure: text_plots.loss_against_load(figure, records, uniform, found, of_uniform))
        if records
        else None,
        [*records, *uniform],
        facts=facts,
    )


def _ratio(value: Interval | None) -> str:
    return "no peak seen" if value is None else f"peak at {interval(value.to_dict())}"


def _codes(study: TextStudy, runs: Sequence[Row]) -> Section:
    largest = by_shape(runs)[-1]
    nets = {code: net_curve(largest, code) for code in CODES}
    by_reference = nets["reference"]
    place = by_reference.top
    told = ", ".join(
        f"{nets[code].means[place]:,.0f} bits by {name}" for code, name in CODES.items()
    )
    sentence = (
        f"The net unintended memorization of {shape_name(largest[0])} at N = "
        f"{by_reference.sizes[place]:,} is {told}. By the uniform code it is total "
        "memorization, net of held-out sequences."
    )
    strengths = _strengths(study)
    own = [one for one in strengths if shape_name(one) == shape_name(largest[0])]
    if len({one["reference"] for one in own}) > 1:
        weakest, strongest = own[0], own[-1]
        ends = (
            (weakest["net_high"], strongest["net_low"]),
            (strongest["net_high"], weakest["net_low"]),
        )
        apart = any(None not in pair and pair[0] < pair[1] for pair in ends)
        change = "more" if strongest["net"] > weakest["net"] else "less"
        sentence += (
            f" From the weakest reference ({weakest['reference']}, "
            f"{weakest['bits_per_byte']:.2f} bits a byte) to the strongest "
            f"({strongest['reference']}, {strongest['bits_per_byte']:.2f}) it goes from "
            f"{weakest['net']:,.0f} to {strongest['net']:,.0f} bits, "
            f"{f'{change} beyond' if apart else 'within'} the intervals."
        )
    else:
        sentence += " One reference strength was trained, so its influence is not measured."
    records = [
        _net_record(largest[0], size["count"], code, size)
        for code in CODES
        for size in net_of_sizes(largest, code)
    ]
    return Section(
        "reference",
        "How much depends on the reference",
        sentence,
        "Left, the largest model under the three codes; right, each model at the size of its most "
        "unintended memorization under each reference model. Bars are intervals.",
        lambda figure: text_plots.net_by_reference(figure, records, strengths),
        [*records, *strengths],
    )


def _net_record(run: Row, count: int, code: str, net: Row, strength: Strength | None = None) -> Row:
    """Net unintended memorization at one size, the mean over seeds."""
    return {
        **shape_fields(run),
        "count": count,
        "seed": None,
        "code": code,
        "reference": strength and strength.name,
        "bits_per_byte": strength and strength.bits_per_byte,
        "net": net["estimate"],
        "net_low": net["low"],
        "net_high": net["high"],
    }


def _strengths(study: TextStudy) -> list[Row]:
    """Net unintended memorization of each model at its best size under each reference model, the
    weakest reference first: the mean over seeds."""
    records = []
    for strength in study.strengths:
        for runs in best_runs(study):
            scored = [run for run in runs if run.seed in strength.codes]
            if not scored:
                continue
            net = over_seeds([_net_replicates(study, run, strength) for run in scored]).to_dict()
            first = scored[0]
            records.append(_net_record(first.row, first.count, "reference", net, strength))
    return records


def _net_replicates(study: TextStudy, run: TextRun, strength: Strength) -> Floats:
    members, others = strength.codes[run.seed]
    return total_unintended(
        run.members,
        members[: run.members.size],
        run.held_out,
        others[: run.held_out.size],
        study.uniform_bits,
        documents=run.member_documents,
        held_out_documents=run.held_out_documents,
        paired=True,
        replicates=STRENGTH_REPLICATES,
    ).replicates["net"]
