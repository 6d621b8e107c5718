"""Members against held-out sequences: closed forms, and damaged files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from cases.study_rows import counts, study_row, study_rows, write_bits
from matplotlib.figure import Figure

from fastmem.memorization.capacity import summarize
from fastmem.report import held_out

ROWS = list(study_rows())


def test_uniform_bits() -> None:
    """Fails if the first token is counted."""
    assert held_out.uniform_bits(ROWS[0]) == 3 * 4.0


def test_runs_that_are_shown(tmp_path: Path) -> None:
    """Fails if the samples are not of the largest model, at the smallest, the best memorized and
    the largest data set size, or include a failed run."""
    failed = study_row(24, 99, error="lost")
    rows = [*ROWS, failed]
    for row in rows:
        write_bits(tmp_path, row["key"], [1.0, 2.0], [row["sequences"]["count"], 12.0])
    samples = held_out.read_samples(rows, tmp_path)
    sizes = counts(16)
    shown = [(s.row["model"]["width"], s.row["sequences"]["count"], s.row["seed"]) for s in samples]
    # The runs from the fourth size on tie: the first of them is the best.
    assert shown == [(16, sizes[0], 0), (16, sizes[3], 0), (16, sizes[4], 0)]
    assert samples[0].members.tolist() == [1.0, 2.0]
    assert samples[0].held_out.tolist() == [sizes[0], 12.0]
    assert held_out.read_samples(ROWS, tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": [1.0, np.nan, 3.0]}, "2 finite of 3, 1 held out"),
        ({"held_out": [False] * 3}, "3 finite of 3, 0 held out"),
        ({"held_out": [True] * 3}, "3 finite of 3, 3 held out"),
    ],
)
def test_invalid_bits(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    """Fails if a distribution without members, held-out sequences or numbers is drawn."""
    write_bits(tmp_path, ROWS[0]["key"], [1.0, 2.0], [3.0], **changed)
    with pytest.raises(ValueError, match=message):
        held_out.read_samples(ROWS, tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    """Fails if a torn file, or a file without the columns, gives a traceback of pyarrow."""
    path = write_bits(tmp_path, ROWS[0]["key"], [1.0], [3.0])
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.drop_columns(["held_out"]), path)
    with pytest.raises(ValueError, match="lacks the columns bits and held_out"):
        held_out.read_samples(ROWS, tmp_path)
    path.write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match="delete the file, and its row in rows/ too"):
        held_out.read_samples(ROWS, tmp_path)


def test_histogram_has_every_sequence_once() -> None:
    """Fails if fractions do not sum to 1, or the fraction of a bin does not match its sequences."""
    rng = np.random.default_rng(1)
    samples = [
        held_out.Sample(row, rng.normal(m, 1, 70), rng.normal(12, 2, 50))
        for row, m in ((ROWS[0], 2), (ROWS[1], 6))
    ]
    records = held_out.histogram(samples)
    for sample in samples:
        of_run = [r for r in records if r["run"] == sample.row["key"]]
        assert len(of_run) == held_out.BINS
        for name in ("share_of_members", "share_of_held_out"):
            assert sum(r[name] for r in of_run) == pytest.approx(1)
        r = of_run[20]
        inside = (sample.held_out >= r["bits_from"]) & (sample.held_out < r["bits_to"])
        assert r["share_of_held_out"] == pytest.approx(inside.mean())
    figure = Figure()
    held_out.bits_of_sequences(figure, samples)
    assert len(figure.axes) == 2
    assert figure.axes[0].lines[0].get_xdata() == [12.0, 12.0]


def test_descent_is_entropy_over_capacity() -> None:
    """Fails if a ratio uses the capacity of another model, or a run lacks held-out bits."""
    rows = [row | {"held_out_bits": 12.0 + i} for i, row in enumerate(ROWS)]
    rows[3]["held_out_bits"] = None
    del rows[4]["held_out_bits"]
    rows.append(study_row(16, 7, error="lost"))
    summary = summarize(rows)
    records = held_out.descent(summary, rows)
    assert [r["held_out_bits"] for r in records] == [
        12.0 + i for i in range(len(ROWS)) if i not in (3, 4)
    ]
    capacities = {
        m["parameters"]: m["capacity_bits"]["strict"]["estimate"] for m in summary["models"]
    }
    for r in records:
        coded = r["count"] * 3 * 4.0
        assert r["entropy_over_capacity"] == pytest.approx(coded / capacities[r["parameters"]])
        assert r["uniform_bits"] == 12.0
    figure = Figure()
    held_out.held_out_against_load(figure, records)
    drawn = np.concatenate([np.asarray(line.get_xydata()) for line in figure.axes[0].lines])
    for r in records:
        assert [r["entropy_over_capacity"], r["held_out_bits"]] in drawn.tolist()
    assert held_out.descent(summary, ROWS) == []
