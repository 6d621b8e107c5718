"""Exhibits of single sequences: how bits are spread, what is memorized most, canaries."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fastmem.base.stats import Floats
from fastmem.base.storage import Row
from fastmem.memorization.unintended import unintended_bits
from fastmem.report import text_plots
from fastmem.report.figures import shape_fields
from fastmem.report.section import ANEW, Section
from fastmem.report.sections import interval
from fastmem.report.text_runs import Ranked, fraction_that_holds, percents, saved_bits, shape_name
from fastmem.report.text_study import TextRun, TextStudy

SHOWN = 20
"""Sequences in the table of the most memorized."""
POINTS = 1000
"""Most sequences in the figure of rarity."""
BINS = 40


def spread(study: TextStudy, best: TextRun) -> Section:
    """The distribution of memorized bits over sequences, and how many sequences hold them.

    Args:
        study: the folder.
        best: a run; the runs of its model with the smallest and the largest data set are shown too.
    """
    runs = {run.count: run for run in reversed(study.runs) if run.shape == best.shape}
    runs[best.count] = best
    drawn = [runs[count] for count in sorted({min(runs), best.count, max(runs)})]
    pairs = [(run, *saved_bits(run)) for run in drawn]
    shares = [
        ", ".join(_share(run.count, bits[which]) for run, *bits in pairs) for which in range(2)
    ]
    sentence = (
        f"{shares[0]} of the training sequences of {shape_name(best.row['model'])} hold 90 % of "
        f"its unintended bits; of the held-out sequences {shares[1]} do."
    )
    width = study.uniform_bits / 16
    records = _spread_records(pairs, width)
    return Section(
        "sequences",
        "How the bits are spread over sequences",
        percents(sentence[0].upper() + sentence[1:]),
        f"Bits that the model saves on a sequence over the reference model, seed {best.seed}, not "
        "clipped at 0, on an axis that is logarithmic far from 0; and the fraction of unintended "
        "bits (max code) that the most memorized sequences hold together.",
        lambda figure: text_plots.spread_over_sequences(figure, records, width),
        records,
    )


def _share(count: int, bits: Floats) -> str:
    share = fraction_that_holds(bits)
    return f"{'none' if share is None else f'{share:.0%}'} (N = {count:,})"


def _spread_records(pairs: Sequence[tuple[TextRun, Floats, Floats]], width: float) -> list[Row]:
    """Part "histogram": fractions of sequences with saved bits in [from, to). Part "held": the
    fraction of unintended bits in the `to` most memorized sequences.

    The bins are equally wide up to about `width` bits, and grow in proportion beyond.
    """
    saved = {
        run.count: [
            r - t for t, r in zip((run.members, run.held_out), run.codes["reference"], strict=True)
        ]
        for run, *_ in pairs
    }
    every = np.concatenate([one for both in saved.values() for one in both])
    low, high = np.arcsinh(np.quantile(every, [0.001, 0.999]) / width)
    edges = width * np.sinh(np.linspace(low, max(high, low + 1e-6), BINS + 1))
    records = []
    for run, *both in pairs:
        inside = [np.clip(bits, edges[0], edges[-1]) for bits in saved[run.count]]
        bins = [np.histogram(bits, edges)[0] / bits.size for bits in inside]
        for begin, end, ours, theirs in zip(edges[:-1], edges[1:], *bins, strict=True):
            records.append(_part("histogram", run.count, begin, end, ours, theirs))
        for percent in range(101):
            ours, theirs = (_held(bits, percent / 100) for bits in both)
            records.append(_part("held", run.count, 0.0, percent / 100, ours, theirs))
    return records


def _part(part: str, count: int, begin: float, end: float, ours: float, theirs: float) -> Row:
    values = {"from": begin, "to": end, "members": ours, "held_out": theirs}
    return {"part": part, "count": count} | {name: float(x) for name, x in values.items()}


def _held(bits: Floats, fraction: float) -> float:
    """The fraction of the bits in the given fraction of sequences with most; 0 without bits."""
    total = bits.sum()
    first = np.sort(bits)[::-1][: round(fraction * bits.size)]
    return float(first.sum() / total) if total > 0 else 0.0


def rare(top: Ranked, show_text: bool) -> Section:
    """Rarity of words against memorized bits, in what was memorized most.

    Args:
        top: the ranked members of a run.
        show_text: False leaves their text out of the data.
    """
    run, rho, title = top.run, top.rho, "What is memorized most"
    if top.missing:
        return Section("rarity", title, top.missing)
    of = f"{shape_name(run.row['model'])} at N = {run.count:,}"
    if rho is None:
        sentence = (
            f"{top.above_zero:,} sequences of {of} have unintended memorization above 0, too few, "
            "or too much alike, for a correlation with rarity."
        )
    else:
        sentence = (
            f"Of the {top.above_zero:,} training sequences of {of} with unintended memorization "
            f"above 0, memorized bits and TF-IDF rarity have Spearman's rho "
            f"{interval(rho.to_dict())}: {_way(rho.low, rho.high)}."
        )
    records = _rare_records(top, show_text)
    drawn = sum(record["rarity"] is not None for record in records)
    return Section(
        "rarity",
        title,
        f"{sentence} {_counted(top)}",
        f"A point is a training sequence with unintended memorization above 0, {drawn:,} of "
        f"{top.above_zero:,} that have words; TF-IDF rarity is the mean over words of their "
        "inverse document frequency among the training sequences.",
        (lambda figure: text_plots.bits_against_rarity(figure, records)) if drawn else None,
        records,
    )


def most_memorized(top: Ranked, study: TextStudy, show_text: bool) -> list[Row]:
    """The most memorized sequences for a table; without text also without names of sources."""
    order = [int(i) for i in top.order[:SHOWN] if top.bits[i] > 0]
    documents = top.run.member_documents[order]
    sources = study.corpus.train.sources(documents) if show_text else [None] * len(order)
    return [
        _sequence(top, i, show_text) | {"source": source}
        for i, source in zip(order, sources, strict=True)
    ]


def _way(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "of one document, so without an interval"
    if low > 0:
        return "sequences with rarer words are memorized more"
    if high < 0:
        return "sequences with rarer words are memorized less"
    return "no correlation beyond the interval"


def _counted(top: Ranked) -> str:
    """Scripts and repeats among the most memorized and among all sequences."""
    most = [int(i) for i in top.order[:SHOWN] if top.bits[i] > 0]
    if not most:
        return "No sequence has unintended memorization above 0."
    ours = Counter(top.scripts[i] or "without letters" for i in most)
    all_of = Counter(script or "without letters" for script in top.scripts)
    told = ", ".join(
        f"{name.capitalize()} {n} ({all_of[name] / len(top.scripts):.1%} of all sequences)"
        for name, n in ours.most_common(6)
    )
    repeats, in_all = int(top.repeats[most].sum()), float(top.repeats.mean())
    return percents(
        f"By the script of most letters the {len(most)} most memorized are {told}; {repeats} "
        f"equal another training sequence but for case and white space (of all {in_all:.1%}; exact "
        "duplicates were removed before)."
    )


def _rare_records(top: Ranked, show_text: bool) -> list[Row]:
    """The first sequences, and others spread evenly over the order, that are above 0."""
    above = top.order[: int((top.bits > 0).sum())]
    if above.size > POINTS:
        rest = np.linspace(SHOWN, above.size - 1, POINTS - SHOWN).round().astype(int)
        above = above[np.unique([*range(SHOWN), *rest])]
    return [_sequence(top, int(i), show_text) for i in above]


def _sequence(top: Ranked, i: int, show_text: bool) -> Row:
    rarity = float(top.rarity[i])
    record: Row = {
        "sequence": i,
        "document": int(top.run.member_documents[i]),
        "unintended_bits": float(top.bits[i]),
        "rarity": None if np.isnan(rarity) else rarity,
        "script": top.scripts[i],
        "repeats": bool(top.repeats[i]),
    }
    return record | {"text": top.texts[i]} if show_text else record


def canaries(study: TextStudy, text: Row) -> Section:
    """Uniform sequences that were planted in the text, against their known entropy, and others that
    were never trained on, against 0."""
    title = "Canaries: the measurement against known bits"
    found = text.get("canaries")
    records = _canary_records(study)
    if not found or not records:
        return Section("canaries", title, ANEW, flags="--canaries 64")
    planted, others = found["planted"], found["held_out"]
    bits, never = planted["unintended_bits"], others["unintended_bits"]
    zero = "which holds 0" if _holds(never, 0.0) else "which does not hold 0"
    sizes = " and ".join(f"{count:,}" for count in found["counts"])
    sentence = (
        f"The {planted['count']:,} canaries that were planted in the smallest data sets (N = "
        f"{sizes}) hold {planted['entropy_bits']:,.0f} bits; measured are "
        f"{interval(bits, ',.0f')} bits of unintended memorization, "
        f"{bits['estimate'] / planted['entropy_bits']:.1%}. Of as many that were never trained on "
        f"it measures {interval(never, ',.0f')}, {zero}."
    )
    return Section(
        "canaries",
        title,
        percents(sentence),
        "Mean unintended memorization of a canary against its entropy, the uniform code, after "
        "each run: planted in the training text (solid) and never trained on (dotted).",
        lambda figure: text_plots.bits_of_canaries(figure, records, study.canary_bits),
        records,
    )


def _holds(value: Row, what: float) -> bool:
    low = value["estimate"] if value["low"] is None else value["low"]
    high = value["estimate"] if value["high"] is None else value["high"]
    return bool(low <= what <= high)


def _canary_records(study: TextStudy) -> list[Row]:
    """Mean unintended memorization of planted and of other canaries, with standard errors."""
    records = []
    for run in study.runs:
        if not run.canaries[0].size:
            continue
        record = shape_fields(run.row) | {"count": run.count, "seed": run.seed}
        for name, bits in zip(("planted", "held_out"), run.canaries, strict=True):
            saved = unintended_bits(bits, np.full(bits.size, study.canary_bits))
            error = saved.std(ddof=1) / np.sqrt(bits.size) if bits.size > 1 else 0.0
            record |= {f"{name}_bits": float(saved.mean()), f"{name}_error": float(error)}
        records.append(record)
    return records
