"""Membership and extraction of the runs of a sweep, from the bits that it stored."""

from collections.abc import Sequence
from importlib.util import find_spec
from math import log2
from pathlib import Path

from fastmem.base.stats import clopper_pearson
from fastmem.base.storage import Row
from fastmem.memorization.bits_threshold import threshold_quality
from fastmem.sweeps.store import has_sequence_bits, read_greedy_from, read_sequence_bits

WEIGHT_BITS = {"fp32": 32, "bf16-mixed": 32, "bf16-true": 16, "bf16-stochastic": 16}
"""Bits of a stored weight by precision."""


def prefixes_of(length: int) -> list[int]:
    """An eighth, a quarter and a half of the tokens of a sequence: 8, 16 and 32 of 64.

    >>> prefixes_of(64), prefixes_of(4)
    ([8, 16, 32], [1, 2])
    """
    return sorted({max(1, length // part) for part in (8, 4, 2)} - {length})


def membership_rows(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """One record for each finished run with stored bits, as `membership` in capacity.json.

    Empty where pyarrow is not installed, or the sweep stored no bits.

    Raises:
        ValueError: a file does not hold sequence bits.
    """
    if not find_spec("pyarrow"):
        return []
    stored = (row for row in rows if row["status"] == "done")
    return [_record(folder, row) for row in stored if has_sequence_bits(folder, row["key"])]


def _record(folder: Path, row: Row) -> Row:
    # A text sweep adds canaries behind its text, and other documents behind the held-out half.
    text = row["sequences"].get("first", row["sequences"])
    count, model = text["count"], row["model"]
    members, held_out = (part[:count] for part in read_sequence_bits(folder, row["key"]))
    uniform = count * (model["length"] - 1) * log2(model["vocab"])
    strict = row["memorized_bits"]["strict"]
    data = uniform if row["coded_entropy_bits"] is None else row["coded_entropy_bits"]
    quality = threshold_quality(members, held_out)
    starts = read_greedy_from(folder, row["key"])
    extraction = None
    if starts is not None:
        extraction = [
            {"prefix": prefix}
            | {
                name: clopper_pearson(int((of[:count] <= prefix).sum()), len(of[:count])).to_dict()
                for name, of in zip(("train", "test"), starts, strict=True)
            }
            for prefix in prefixes_of(model["length"])
        ]
    return {
        "run": row["key"],
        **{name: model[name] for name in ("layers", "width", "heads")},
        "parameters": row["parameters"],
        "precision": row["precision"],
        "count": count,
        "seed": row["seed"],
        "data_bits_per_parameter_bit": data / row["parameters"] / WEIGHT_BITS[row["precision"]],
        "coded_bits_per_sequence": data / count,
        "memorized_bits_per_sequence": None if strict is None else strict / count,
        "epochs": row["epochs"],
        "member_bits": float(members.mean()),
        "held_out_bits": float(held_out.mean()),
        "member_deviation": float(members.std()),
        **{name: value and value.to_dict() for name, value in quality.items()},
        "extraction": extraction,
    }
