"""The sections of members against held-out sequences, which need `--sequence-bits`."""

from collections.abc import Sequence
from pathlib import Path

from fastmem.base.storage import Row
from fastmem.data.files.parquet import pyarrow_parquet
from fastmem.memorization.membership import auc
from fastmem.report import held_out
from fastmem.report.section import ANEW, PERCENT, STORE_BITS, Section
from fastmem.sweeps.membership_laws import FORMS


def bits_section(rows: Sequence[Row], folder: Path) -> Section:
    name, title = "sequence_bits", "Members against held-out sequences"
    if not any((folder / name).glob("*.parquet")):
        return Section(name, title, ANEW, flags=STORE_BITS)
    try:
        pyarrow_parquet()
    except ValueError as problem:
        return Section(name, title, f"bits are stored but not shown: {problem}")
    samples = held_out.read_samples(rows, folder)
    if not samples:
        return Section(name, title, ANEW, flags=STORE_BITS)
    ends = [samples[0], *samples[1:][-1:]]
    costs = "; with ".join(
        f"N = {sample.row['sequences']['count']:,} a member costs {sample.members.mean():,.1f} "
        f"bits and a held-out sequence {sample.held_out.mean():,.1f} bits"
        for sample in ends
    )
    pairs = " and ".join(dict.fromkeys(f"{auc(s.members, s.held_out):.1%}" for s in ends))
    sentence = f"With {costs}. The member costs less in {pairs} of pairs."
    last = ends[-1]
    model = last.row["model"]
    return Section(
        name,
        title,
        sentence.replace("%", PERCENT),
        f"The model of {model['layers']} × {model['width']}, {last.row['parameters']:,} "
        f"parameters, at {last.row['precision']}, seed {last.row['seed']}; one panel for each data "
        "set size N.",
        lambda figure: held_out.bits_of_sequences(figure, samples),
        held_out.histogram(samples),
    )


def membership_section(summary: Row) -> Section:
    records = summary["membership"]
    by_load = sorted(records, key=lambda record: record["data_bits_per_parameter_bit"])
    ends = [by_load[0], *by_load[1:][-1:]]
    sentence = " ".join(
        f"With {record['data_bits_per_parameter_bit']:.2g} bits of data per bit of parameters "
        f"F1 is {record['f1']['estimate']:.1%} and the AUC {record['auc']['estimate']:.3f}."
        for record in ends
    )
    if all(record["extraction"] for record in ends):
        last = [record["extraction"][-1] for record in ends]
        sentence += (
            f" Greedy decoding after {last[0]['prefix']} tokens returns "
            + " and then ".join(f"{rate['train']['estimate']:.1%}" for rate in last)
            + f" of the training sequences, and {last[-1]['test']['estimate']:.1%} of the held-out "
            "sequences."
        )
    return Section(
        "membership",
        "Membership and extraction",
        sentence.replace("%", PERCENT),
        "A threshold on bits tells members from held-out sequences: AUC (solid) and F1 of the "
        "cheaper half (dashed), 0.5 without signal. Below, the rate of exact extraction of "
        "training sequences (solid) and held-out sequences (dotted) at the longest prefix.",
        lambda figure: held_out.membership_against_load(figure, records),
        held_out.membership_records(records),
        facts=_laws(summary.get("membership_law")),
    )


def _laws(laws: Row | None) -> list[tuple[str, str]]:
    """Errors of F1 of each law, in percentage points, on models left out of its fit."""
    if laws is None:
        return []
    facts = [
        (
            f"Law: {name}",
            f"{100 * laws['largest'][form]:.1f} points of F1 off at {laws['left_out']:,} "
            f"parameters, {100 * laws['each_size'][form]:.1f} at each size left out",
        )
        for form, name in FORMS.items()
    ]
    best = FORMS[laws["better"]]
    own = f"{100 * laws['from_own_bits']:.1f} points"
    return [*facts, ("Predicts better", best), ("From the measured bits of each run", own)]


def descent_section(summary: Row, rows: Sequence[Row]) -> Section:
    name, title = "double_descent", "Double descent"
    records = held_out.descent(summary, rows)
    if not records:
        return Section(name, title, ANEW, flags=STORE_BITS)
    worst = max(records, key=lambda record: record["held_out_bits"])
    beyond = max(records, key=lambda record: record["entropy_over_capacity"])
    sentence = (
        f"Held-out sequences cost most, {worst['held_out_bits']:,.0f} bits, where the entropy of "
        f"the data is {worst['entropy_over_capacity']:.1f} times the capacity of the model. At "
        f"{beyond['entropy_over_capacity']:.1f} times the capacity they cost "
        f"{beyond['held_out_bits']:,.0f} bits; a uniform code needs "
        f"{beyond['uniform_bits']:,.0f}."
    )
    return Section(
        name,
        title,
        sentence,
        "Random tokens cannot be predicted, so a held-out sequence costs at least the dashed line, "
        "the uniform code, on average; at the vertical line the data fill the model.",
        lambda figure: held_out.held_out_against_load(figure, records),
        records,
    )
