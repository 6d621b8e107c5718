"""The numbers of a text study that its exhibits share: records of runs, and the ranking of one run.

N members and N held-out sequences of a run, S tokens a sequence, V vocabulary.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmem.base.stats import Floats, Interval
from fastmem.base.storage import Row
from fastmem.memorization.rarity import rarity, rarity_correlation, scripts
from fastmem.memorization.unintended import unintended_bits
from fastmem.report.courses import Curve, curve
from fastmem.report.figures import shape_fields, with_errors
from fastmem.report.section import PERCENT
from fastmem.report.text_study import TextRun, TextStudy, shape_key

CODES = {
    "reference": "the reference model",
    "compressor": "the compressors",
    "uniform": "the uniform code",
}
LOSSES = ("train_bits_per_token", "held_out_bits_per_token", "test_bits_per_token")
SUMS = ("max", "mixture", "held_out_max", "held_out_mixture")
Z = 1.959964
"""Half an interval of 95 % in standard errors."""


@dataclass(frozen=True)
class Ranked:
    """The members of one run, ordered by unintended memorization (max code, reference model)."""

    run: TextRun
    order: NDArray[np.int64]
    """(N,) indices of members, the most memorized first."""
    bits: Floats
    """(N,) of member i."""
    rarity: Floats
    """(N,) TF-IDF of member i among the N members; nan without words."""
    texts: list[str]
    scripts: list[str]
    repeats: NDArray[np.bool_]
    """(N,) whether member i equals another member but for case and white space."""
    rho: Interval | None
    """Spearman's rho of rarity and bits among members with bits above 0."""
    above_zero: int
    """The number of these members, without those without words."""
    missing: str | None = None
    """Why rarity was not measured."""


def flat(text: Row) -> list[Row]:
    """One record a run of text.json: its shape, data set size and seed, its numbers by each code.

    Fields with "of_size" are of the mean over the seeds of its size.
    """
    records = []
    for model in text["models"]:
        sizes = {size["count"]: size["unintended_bits"] for size in model["sizes"]}
        for run in model["runs"]:
            record = shape_fields(model) | {name: run[name] for name in ("count", "seed", *LOSSES)}
            for code in CODES:
                own, of_size = run["unintended_bits"][code], sizes[run["count"]][code]
                record[f"{code}_entropy_bits"] = run["entropy_bits"][code]
                record |= {f"{code}_{name}_bits": own[name] for name in SUMS}
                record |= {f"{code}_net_{x}": y for x, y in own["net"].items()}
                record |= {f"{code}_net_of_size_{x}": y for x, y in of_size["net"].items()}
                record |= {f"{code}_net_test_{x}": y for x, y in own["net_test"].items()}
                record[f"{code}_generalization_bits"] = run["generalization_bits"][code]
            records.append(record)
    return records


def shape_name(record: Row) -> str:
    """Such as 1 × 16, or 1 × 16 in bf16-true."""
    precision = record.get("precision", "fp32")
    name = f"{record['layers']} × {record['width']}"
    return name if precision == "fp32" else f"{name} in {precision}"


def net_curve(records: Sequence[Row], code: str = "reference") -> Curve:
    """Net unintended memorization by data set size, of the runs of one shape."""
    names = ("estimate", "low", "high")
    values, bounds = with_errors([{x: one[f"{code}_net_{x}"] for x in names} for one in records])
    errors = bounds.sum(0) / (2 * Z)
    return curve([record["count"] for record in records], values, errors, power=0.5)


def curve_of(records: Sequence[Row], name: str) -> Curve:
    """A mean over sequences of the runs of one shape by data set size."""
    return curve([one["count"] for one in records], [one[name] for one in records], power=-0.5)


def loads(study: TextStudy) -> list[Row]:
    """Bits of the data over capacity, and test loss in bits a token: one record a run of text.

    The data are the text by a code, and the canaries by their entropy.
    """
    coded = study.corpus.train.length - 1
    records = []
    for run in study.runs:
        capacity = study.capacity_bits.get(run.shape, 0.0)
        if capacity > 0:
            planted = run.canaries[0].size * study.canary_bits
            entropies = {code: float(bits[0].sum()) + planted for code, bits in run.codes.items()}
            records.append(
                _load(run.row, "text", run.count, capacity)
                | {f"{code}_ratio": bits / capacity for code, bits in entropies.items()}
                | {"test_bits_per_token": float(run.test.mean()) / coded, "floor": None}
            )
    return records


def uniform_loads(study: TextStudy) -> list[Row]:
    """As `loads`, of uniform data, whose bits are known; "floor" is log2 V."""
    records = []
    for row in study.uniform:
        capacity = study.capacity_bits.get(shape_key(row), 0.0)
        if capacity <= 0 or row.get("held_out_bits") is None:
            continue
        V, S = row["model"]["vocab"], row["model"]["length"]
        records.append(
            _load(row, "uniform data", row["sequences"]["count"], capacity)
            | dict.fromkeys(f"{code}_ratio" for code in CODES)
            | {
                "uniform_ratio": row["coded_entropy_bits"] / capacity,
                "test_bits_per_token": row["held_out_bits"] / (S - 1),
                "floor": log2(V),
            }
        )
    return records


def _load(row: Row, data: str, count: int, capacity: float) -> Row:
    own = {"data": data, **shape_fields(row), "seed": row["seed"]}
    return own | {"count": count, "capacity_bits": capacity}


def net_of_sizes(records: Sequence[Row], code: str = "reference") -> list[Row]:
    """Of each data set size of one shape: count, estimate, low and high of the mean over seeds."""
    names = ("estimate", "low", "high")
    sizes = {one["count"]: {x: one[f"{code}_net_of_size_{x}"] for x in names} for one in records}
    return [{"count": count} | sizes[count] for count in sorted(sizes)]


def net_bits(run: TextRun) -> float:
    """Net unintended memorization by the max code and the reference model."""
    members, others = saved_bits(run)
    return float(members.sum() - run.count * others.mean())


def saved_bits(run: TextRun) -> tuple[Floats, Floats]:
    """Unintended bits of members and of held-out sequences by the max code and the reference."""
    members, held_out = run.codes["reference"]
    return unintended_bits(run.members, members), unintended_bits(run.held_out, held_out)


def best_runs(study: TextStudy) -> list[list[TextRun]]:
    """Of each model, smallest first, the runs at the size of most net unintended memorization."""
    models: dict[tuple[Any, ...], list[TextRun]] = {}
    for run in sorted(study.runs, key=lambda run: (run.parameters, run.seed)):
        models.setdefault((run.shape, run.row["precision"]), []).append(run)
    found = []
    for runs in models.values():
        net = curve([run.count for run in runs], [net_bits(run) for run in runs])
        found.append([run for run in runs if run.count == net.sizes[net.top]])
    return found


def ranked(study: TextStudy) -> Ranked:
    """Ranks the members of the largest model at its best size, its first seed."""
    run = best_runs(study)[-1][0]
    bits = unintended_bits(run.members, run.codes["reference"][0])
    texts, missing = study.texts(run), None
    try:
        rare = rarity(texts)
    except ValueError as problem:  # without scikit-learn
        rare, missing = np.full(len(texts), np.nan), str(problem)
    rho, above = rarity_correlation(rare, bits, run.member_documents)
    plain = [re.sub(r"\s+", " ", text).strip().casefold() for text in texts]
    times = Counter(plain)
    return Ranked(
        run=run,
        order=np.argsort(-bits, kind="stable"),
        bits=bits,
        rarity=rare,
        texts=texts,
        scripts=scripts(texts),
        repeats=np.array([times[one] > 1 for one in plain]),
        rho=rho,
        above_zero=above,
        missing=missing,
    )


def percents(text: str) -> str:
    """Text with a space that does not break before each %.

    Example:
        >>> percents("5 % of 10%") == "5\N{NO-BREAK SPACE}% of 10\N{NO-BREAK SPACE}%"
        True
    """
    return text.replace(" %", "%").replace("%", PERCENT)


def fraction_that_holds(bits: Floats) -> float | None:
    """The least fraction of sequences that together have 90 % of the bits; None if all are 0.

    Example:
        >>> fraction_that_holds(np.array([90.0, 5.0, 5.0, 0.0]))
        0.25
    """
    total = np.cumsum(np.sort(np.maximum(bits, 0.0))[::-1])
    if not total.size or total[-1] <= 0:
        return None
    return float((np.searchsorted(total, 0.9 * total[-1] * (1 - 1e-12)) + 1) / total.size)
