"""Made-up rows of a study, with every field that a sweep writes, for the tests of the report.

A model of P parameters memorizes 3 P bits, or its data set if that is smaller; seed k adds k bits.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from fastmem.base.storage import write_json
from fastmem.models.gpt import GPTConfig
from fastmem.report.html import render_page
from fastmem.report.sections import sections
from fastmem.sweeps.config import default_heads
from fastmem.sweeps.rows import report as summary_of

Row = dict[str, Any]

V, S = 16, 4
ENVIRONMENT = {
    "device": "cpu: a machine",
    "threads": 1,
    "version": "0.1.0",
    "commit": "c0ffee",
    "torch": "2.13.0",
    "triton": None,
    "python": "3.11.7",
}


def study_row(
    width: int,
    count: int,
    seed: int = 0,
    precision: str = "fp32",
    layers: int = 1,
    error: str | None = None,
    **changed: Any,
) -> Row:
    """A row; `changed` replaces fields of the row, or of its "train"."""
    heads = default_heads(width)
    P = GPTConfig(layers, width, heads, V, S).parameter_count
    coded, entropy = count * (S - 1) * log2(V), count * S * log2(V)
    capacity = P * (3.0 if precision == "fp32" else 2.5)
    bits = min(coded, capacity) + seed
    train = {"steps": 100, "epochs": None, "seconds": None, "batch": 8, "lr": 0.04, "warmup": 0.02}
    train |= {"precision": precision, "seed": seed}
    train |= {name: changed.pop(name) for name in list(changed) if name in train}
    steps = (1, 2, 5, 10, 20, 50, 90, 100)
    done = error is None
    return {
        "schema": 1,
        "key": f"{layers}x{width}-h{heads}-{precision}-n{count}-seed{seed}",
        "status": "done" if done else "failed",
        "error": error,
        "model": {"layers": layers, "width": width, "heads": heads, "vocab": V, "length": S},
        "parameters": P,
        "precision": precision,
        "seed": seed,
        "sequences": {"kind": "uniform", "count": count, "length": S, "vocab": V, "seed": seed},
        "generator": "philox4x32-10/1",
        "train": train,
        "peak_rates": {"lr": train["lr"], "embedding_lr": train["lr"]},
        "entropy_bits": entropy,
        "coded_entropy_bits": coded,
        "memorized_bits": {
            "strict": bits if done else None,
            "published": bits * S / (S - 1) if done else None,
        },
        "epochs": 100 * 8 / count if done else None,
        "steps": 100 if done else None,
        "seconds": 1.5 if done else None,
        "tokens_per_second": 1000.0 if done else None,
        "curve": [
            {"step": step, "seconds": step / 100, "memorized_bits": bits * min(1, step / 90)}
            for step in steps * done
        ],
        "peak_bytes": 1_000_000,
        **ENVIRONMENT,
    } | changed


def counts(width: int, layers: int = 1) -> list[int]:
    """Five data set sizes that bracket the capacity of a shape."""
    P = GPTConfig(layers, width, 1, V, S).parameter_count
    return [int(load * P / ((S - 1) * log2(V))) for load in (0.75, 1.5, 2.5, 6.0, 12.0)]


def study_rows(
    widths: Sequence[int] = (8, 16),
    seeds: Sequence[int] = (0, 1),
    precisions: Sequence[str] = ("fp32",),
    layers: Sequence[int] = (1,),
) -> Iterator[Row]:
    """The rows of a grid."""
    for depth in layers:
        for width in widths:
            for precision in precisions:
                for seed in seeds:
                    for count in counts(width, depth):
                        yield study_row(width, count, seed, precision, depth)


def write_rows(folder: Path, rows: Sequence[Row]) -> Path:
    """Writes the rows as a sweep does; returns the folder."""
    for row in rows:
        write_json(folder / "rows" / f"{row['key']}.json", row)
    return folder


def write_bits(folder: Path, run: str, members: Any, others: Any, **changed: Any) -> Path:
    """Writes sequence_bits/RUN.parquet as a sweep does; returns its path."""
    total = len(members) + len(others)
    columns = {
        "run": [run] * total,
        "index": np.arange(total),
        "bits": np.r_[members, others].astype(np.float64),
        "held_out": np.arange(total) >= len(members),
    }
    path = folder / "sequence_bits" / f"{run}.parquet"
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns | changed), path)
    return path


def report(rows: list[dict[str, Any]], folder: Path = Path("nowhere"), name: str = "study") -> str:
    summary = summary_of(folder, rows)
    return render_page(summary, rows, sections(summary, rows, folder), name)


@cache
def full(folder: Path) -> str:
    """A report with all figures."""
    rows = list(study_rows(precisions=("fp32", "bf16-mixed")))
    rows = [row | {"held_out_bits": 13.0} for row in rows]
    for row in rows:
        write_bits(folder, row["key"], [1.0, 2.0, 3.0], [12.0, 13.0])
    return report([*rows, study_row(16, 9, error="Diverged: <lr> & more")], folder)
