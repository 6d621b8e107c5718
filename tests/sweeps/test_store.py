"""The folder of a sweep as tables: reading gives back all that was written."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import pyarrow.parquet
import pytest
from cases.sweep_rows import put, row

import fastmem
from fastmem import SweepConfig, load, load_rows
from fastmem.base.storage import read_json
from fastmem.sweeps.store import (
    COLUMNS,
    read_greedy_from,
    read_sequence_bits,
    write_curves,
    write_sequence_bits,
)

ROOT = Path(__file__).parents[2]
TINY = SweepConfig(width=(8,), vocab=16, length=4, counts=(4, 8), seeds=(0, 1), steps=12)


def failed(one: dict[str, Any]) -> dict[str, Any]:
    nothing = dict.fromkeys(("epochs", "steps", "seconds", "tokens_per_second"))
    none = {"strict": None, "published": None}
    lost = {"status": "failed", "error": "Diverged: far", "memorized_bits": none, "curve": []}
    return one | nothing | lost


def test_a_sweep_as_a_frame(tmp_path: Path) -> None:
    """Fails if a value of a real row has another name or type in the frame."""
    list(fastmem.sweep(replace(TINY, out=tmp_path), progress=False))
    frame, rows = load(tmp_path), load_rows(tmp_path)
    assert list(frame.columns) == [column.name for column in COLUMNS]
    assert {n: str(t) for n, t in frame.dtypes.items()} == {c.name: c.dtype for c in COLUMNS}
    assert frame.run.tolist() == [one["key"] for one in rows]
    assert frame["count"].tolist() == [4, 4, 8, 8]
    assert frame.strict_bits.tolist() == [one["memorized_bits"]["strict"] for one in rows]
    assert frame.published_bits.tolist() == [one["memorized_bits"]["published"] for one in rows]
    assert frame.steps.tolist() == frame.budget_steps.tolist() == [12] * 4
    assert frame.heads.tolist() == [4] * 4
    assert frame.lr.tolist() == [0.04] * 4
    assert frame.error.isna().all()


def test_failed_and_unknown(tmp_path: Path) -> None:
    """Fails if an unknown value becomes a number, or turns a column into objects."""
    put(tmp_path, row(), failed(row(seed=2**64 - 1)), row(count=16) | {"entropy_bits": None})
    frame = load(tmp_path).set_index("run")
    lost = frame.loc["1x8-h2-fp32-n8-seed18446744073709551615"]
    assert lost.seed == 2**64 - 1
    assert lost.error == "Diverged: far"
    assert np.isnan(lost.strict_bits)
    assert pandas.isna(lost.steps)
    assert np.isnan(frame.loc["1x8-h2-fp32-n16-seed0"].entropy_bits)
    assert frame.steps.dtype == "Int64"
    assert frame.strict_bits.sum() == 2 * 2.5 * row()["parameters"]


def test_an_empty_folder(tmp_path: Path) -> None:
    """Fails if a folder without rows is an error, or the empty frame lacks columns or types."""
    frame = load(tmp_path)
    assert len(frame) == 0
    assert {n: str(t) for n, t in frame.dtypes.items()} == {c.name: c.dtype for c in COLUMNS}
    with pytest.raises(ValueError, match="is not a directory: run `fastmem capacity --out"):
        load(tmp_path / "none")
    (tmp_path / "lock").touch()
    (tmp_path / "planned.json").touch()
    assert len(load(tmp_path)) == 0  # before its first run has ended
    (tmp_path / "lock").unlink()
    (tmp_path / "planned.json").rename(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"is not the folder of a sweep, and holds config\.json"):
        load(tmp_path)


def without(one: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in one.items() if key != name}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            row() | {"schema": 3},
            "has schema 3, this version reads 1 and 2: install a newer fastmem-lm",
        ),
        (row() | {"schema": 0}, "has schema 0, this version reads 1 and 2"),
        (without(row(), "schema"), "has schema None"),
        (without(row(), "parameters"), "lacks parameters: delete it and run again"),
        (without(row(), "curve"), "lacks curve"),
        (row() | {"model": {}}, r"lacks model\.layers"),
        (row() | {"model": 7}, r"lacks model\.layers"),
        (row() | {"parameters": 2.5}, "has 2.5 as parameters, not int64"),
        (row() | {"parameters": True}, "has True as parameters, not int64"),
        (row() | {"seconds": "3"}, "has '3' as seconds, not float64"),
        (row() | {"status": None}, "has None as status, not string"),
    ],
)
def test_invalid_rows(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    """Fails if an invalid row is read as a result, or its file is changed."""
    put(tmp_path, row(count=4), bad)
    path = tmp_path / "rows" / f"{bad['key']}.json"
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{path.name} {message}"):
        load(tmp_path)
    assert path.read_bytes() == before


def test_each_damaged_row_is_named(tmp_path: Path) -> None:
    """Fails if an altered row is read, or the error names only the first of several."""
    put(tmp_path, *(row(count=n) for n in range(1, 8)))
    paths = sorted((tmp_path / "rows").iterdir())
    for path in paths[:5]:
        path.write_text(path.read_text().replace('"peak_bytes": 1048576', '"peak_bytes": 1048577'))
    with pytest.raises(ValueError, match="was altered after it was written") as error:
        load_rows(tmp_path)
    assert [path.name in str(error.value) for path in paths] == [True] * 3 + [False] * 4
    assert "; and 2 more" in str(error.value)
    assert len(list((tmp_path / "rows").iterdir())) == 7


def test_a_whole_number_is_a_float(tmp_path: Path) -> None:
    """Fails if a JSON integer is refused as a float, or makes a column of integers."""
    put(tmp_path, row() | {"seconds": 3})
    assert load(tmp_path).seconds.dtype == np.float64


def test_rows_are_read_back_as_written(tmp_path: Path) -> None:
    """Fails if reading changes or drops a field, known or unknown."""
    one = row() | {"new_measure": {"of": [1, None]}}
    put(tmp_path, one)
    assert load_rows(tmp_path) == [one] == [read_json(tmp_path / "rows" / f"{one['key']}.json")]


def test_sequence_bits(tmp_path: Path) -> None:
    """Fails if bits lose a digit, members and held-out mix, or a type is not the documented
    type."""
    members, held_out = np.array([0.1, np.nextafter(1, 2)]), np.arange(6.0)[::2]
    write_sequence_bits(tmp_path, "a", members, held_out)
    table = pyarrow.parquet.read_table(tmp_path / "sequence_bits" / "a.parquet")
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert types == {"run": "string", "index": "int64", "bits": "double", "held_out": "bool"}
    assert table["run"].to_pylist() == ["a"] * 5
    assert table["index"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["bits"].to_pylist() == [*members, 0.0, 2.0, 4.0]
    assert table["held_out"].to_pylist() == [False, False, True, True, True]
    with pytest.raises(ValueError, match=r"one number a sequence, not of shape \(1, 2\)"):
        write_sequence_bits(tmp_path, "b", members[None], held_out)
    assert not (tmp_path / "sequence_bits" / "b.parquet").exists()


def test_greedy_from_is_a_column_that_may_lack(tmp_path: Path) -> None:
    """Fails if the prefixes of members and held-out sequences mix, or a file of a version without
    them is refused."""
    write_sequence_bits(tmp_path, "old", [1.0, 2.0], [3.0])
    write_sequence_bits(tmp_path, "new", [1.0, 2.0], [3.0], ([5, 7], [8]))
    assert read_greedy_from(tmp_path, "old") is None
    found = read_greedy_from(tmp_path, "new")
    assert found is not None
    assert [part.tolist() for part in found] == [[5, 7], [8]]
    for run in ("old", "new"):
        bits = read_sequence_bits(tmp_path, run)
        assert [part.tolist() for part in bits] == [[1.0, 2.0], [3.0]]


def test_curves(tmp_path: Path) -> None:
    """Fails if points lose their run, or unknown bits become a number."""
    unknown = row(count=4)
    unknown["curve"][0]["memorized_bits"] = None
    unknown["curve"][0] |= {"sampled": 7, "low": 1.0, "high": 2.0}
    path = write_curves(tmp_path, [row(), unknown, failed(row(seed=1))])
    table = pyarrow.parquet.read_table(path)
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert types == {
        "run": "string",
        "step": "int64",
        "seconds": "double",
        "memorized_bits": "double",
        "sampled": "int64",
        "low": "double",
        "high": "double",
    }
    assert table["run"].to_pylist() == [row()["key"]] * 2 + [unknown["key"]] * 2
    assert table["step"].to_pylist() == [9, 10, 9, 10]
    assert table["memorized_bits"].to_pylist()[2] is None
    assert table["sampled"].to_pylist() == [None, None, 7, None]
    assert table["high"].to_pylist() == [None, None, 2.0, None]


def test_the_documented_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the query of docs/store.md does not run on the files as written."""
    (query,) = re.findall(r"```sql\n(.*?)```", (ROOT / "docs/store.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    folder = Path("capacity-laptop")
    put(folder, row(), row(seed=1), row(width=12), failed(row(width=16)))
    for one, bits in ((row(), 1.0), (row(seed=1), 2.0), (row(width=12), 3.0)):
        write_sequence_bits(folder, one["key"], [bits, bits + 1], [10.0 + bits])
    P, Q = row()["parameters"], row(width=12)["parameters"]
    assert duckdb.sql(query).fetchall() == [(P, 8, 2.0, 11.5), (Q, 8, 3.5, 13.0)]


def test_the_documented_columns() -> None:
    """Fails if docs/store.md lacks a column of load, or documents one that load lacks."""
    (table,) = re.findall(r"\| column \|.*?\n\n", (ROOT / "docs/store.md").read_text(), re.S)
    cells = [line.split("|")[1:3] for line in table.splitlines()[2:] if line]
    documented = {}
    for names, types in cells:
        found = re.findall(r"`(\w+)`", names)
        dtypes = types.split(",") if "," in types else [types] * len(found)
        documented |= dict(zip(found, (t.strip() for t in dtypes), strict=True))
    assert documented == {column.name: column.dtype for column in COLUMNS}


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    """Fails if a missing extra gives a traceback, or `import fastmem` needs an extra."""
    program = (
        "import sys; sys.modules['pandas'] = sys.modules['pyarrow'] = None\n"
        "from pathlib import Path; import fastmem; from fastmem.sweeps.store import write_curves\n"
        "for call in (lambda: fastmem.load('.'), lambda: write_curves(Path('.'), [])):\n"
        "    try: call()\n"
        "    except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    pandas_line, parquet_line = done.stdout.splitlines()
    assert pandas_line.endswith("pip install 'fastmem-lm[pandas]'")
    assert parquet_line.endswith("pip install 'fastmem-lm[parquet]'")
