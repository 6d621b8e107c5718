"""The folder of a sweep as tables: checked rows, sequence_bits/ and curves/.

docs/store.md documents every column, and a query on the files.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmem.base.arguments import user_path
from fastmem.base.stats import Floats
from fastmem.base.storage import Row, check_folder, read_json
from fastmem.data.files.parquet import pyarrow_parquet, write_table

if TYPE_CHECKING:
    import pandas

SCHEMA = 2
PLANNED = "planned.json"
"""The runs that a sweep plans and the work of each; written when the sweep starts."""
STUDY = "text-study.json"
"""Where the codes of a text sweep are; a folder with it is a text sweep."""
SWEEP = ("rows", PLANNED, "lock", "checkpoints", "running", "sequence_bits", "sent", STUDY)
"""Files of a sweep: a folder with any of them is such a folder."""
MAX_NAMED = 3
"""How many damaged rows an error names; it counts the rest."""
DELETE_BITS = "delete the file, and its row in rows/ too if the run is to be trained again for it"


class Column(NamedTuple):
    """A column of `load`, and the path of its value in a row."""

    name: str
    path: str
    dtype: str
    may_be_null: bool = False
    """True for a value that a failed run, or a data set of unknown entropy, lacks."""
    may_lack: bool = False
    """True for a field that only some runs write."""


COLUMNS = (
    Column("run", "key", "string"),
    Column("status", "status", "string"),
    Column("error", "error", "string", may_be_null=True),
    Column("layers", "model.layers", "int64"),
    Column("width", "model.width", "int64"),
    Column("heads", "model.heads", "int64"),
    Column("vocab", "model.vocab", "int64"),
    Column("length", "model.length", "int64"),
    Column("parameters", "parameters", "int64"),
    Column("precision", "precision", "string"),
    Column("seed", "seed", "uint64"),
    Column("count", "sequences.count", "int64"),
    Column("entropy_bits", "entropy_bits", "float64", may_be_null=True),
    Column("coded_entropy_bits", "coded_entropy_bits", "float64", may_be_null=True),
    Column("strict_bits", "memorized_bits.strict", "float64", may_be_null=True),
    Column("published_bits", "memorized_bits.published", "float64", may_be_null=True),
    Column("held_out_bits", "held_out_bits", "float64", may_be_null=True, may_lack=True),
    Column("epochs", "epochs", "float64", may_be_null=True),
    Column("steps", "steps", "Int64", may_be_null=True),
    Column("seconds", "seconds", "float64", may_be_null=True),
    Column("tokens_per_second", "tokens_per_second", "float64", may_be_null=True),
    Column("flops_per_second", "flops_per_second", "float64", may_be_null=True, may_lack=True),
    Column("mfu", "mfu", "float64", may_be_null=True, may_lack=True),
    Column("stopped_by", "stopped_by", "string", may_be_null=True, may_lack=True),
    Column("peak_bytes", "peak_bytes", "int64"),
    Column("batch", "train.batch", "int64"),
    Column("lr", "peak_rates.lr", "float64", may_be_null=True, may_lack=True),
    Column("embedding_lr", "peak_rates.embedding_lr", "float64", may_be_null=True, may_lack=True),
    Column("budget_steps", "train.steps", "Int64", may_be_null=True),
    Column("budget_epochs", "train.epochs", "float64", may_be_null=True),
    Column("budget_seconds", "train.seconds", "float64", may_be_null=True),
    Column("device", "device", "string"),
    Column("threads", "threads", "int64"),
    Column("version", "version", "string", may_be_null=True),
    Column("commit", "commit", "string", may_be_null=True),
    Column("torch", "torch", "string"),
    Column("python", "python", "string"),
)
_PATHS = [(column, column.path.split(".")) for column in COLUMNS]
_TYPES = {"string": (str,), "float64": (float, int)}  # a whole float is an int in JSON
_ABSENT = object()


def load(folder: str | Path) -> "pandas.DataFrame":
    """The runs of a sweep as a pandas DataFrame, one row a run, sorted by name.

    Computes `pandas.DataFrame` of `load_rows(folder)` with nested values under flat names and with
    fixed types; docs/store.md lists them. Unknown values are NA or NaN. The folder is not changed.

    Raises:
        ValueError: pandas is not installed; the folder does not exist; or a row is damaged, altered
            or of a newer version.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> grid = fastmem.SweepConfig(width=(8,), vocab=16, length=4, counts=(4, 8), steps=10,
        ...                            out=Path(folder))
        >>> rows = list(fastmem.sweep(grid, progress=False))
        >>> runs = load(folder)
        >>> runs.groupby("count").strict_bits.count().to_dict()  # two seeds of each size
        {4: 2, 8: 2}
    """
    try:
        import pandas
    except ImportError:
        raise ValueError(
            "a DataFrame needs pandas, which is not installed: pip install 'fastmem-lm[pandas]'"
        ) from None
    rows = load_rows(folder)
    if not rows:
        check_folder(user_path(folder), SWEEP, "sweep", "give the folder of a sweep")
    columns = {}
    for column, path in _PATHS:
        values = [_at(row, path) for row in rows]
        if column.may_be_null:
            values = [None if value is _ABSENT else value for value in values]
        columns[column.name] = pandas.Series(values, dtype=column.dtype)
    return pandas.DataFrame(columns)


def load_rows(folder: str | Path) -> list[Row]:
    """The rows of a sweep, sorted by name, each checked against its checksum. Changes no file.

    Raises:
        ValueError: the folder does not exist; or rows are damaged, altered, without a field or of a
            newer version, each with the fix.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a directory: run `fastmem capacity --out {folder}` first"
        )
    rows, problems = [], []
    for path in sorted((folder / "rows").glob("*.json")):
        try:
            rows.append(read_row(path))
        except ValueError as problem:
            problems.append(str(problem))
    if problems:
        more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise ValueError("; ".join(problems[:MAX_NAMED]) + more)
    return rows


def read_row(path: Path) -> Row:
    """One row, checked as in `load_rows`."""
    return _checked(read_json(path), path)


def planned_work(folder: Path) -> tuple[dict[str, float], bool]:
    """The work of each run that the last sweep planned, by key, empty if unknown; and True if they
    are only the next runs of each model, since counts are "auto"."""
    path = folder / PLANNED
    plan = read_json(path) if path.exists() else {"work": {}}
    return dict(plan["work"]), plan.get("search", False)


def models_of(keys: Iterable[str]) -> int:
    """How many models have a run among these keys."""
    return len({key.rsplit("-", 2)[0] for key in keys})


def write_sequence_bits(
    folder: Path,
    run: str,
    members: ArrayLike,
    held_out: ArrayLike,
    greedy_from: tuple[ArrayLike, ArrayLike] | None = None,
) -> None:
    """Writes sequence_bits/RUN.parquet: the bits of each member, then of each held-out sequence.

    Args:
        folder: the folder of the sweep.
        run: the key of the run.
        members: (N,) bits of the sequences in the training set, indices 0 to N - 1.
        held_out: (M,) bits of the next sequences of the same data set, indices from N on.
        greedy_from: `fastmem.greedy_from` of both, a further column.

    Raises:
        ValueError: pyarrow is not installed, or the bits are not 1-d arrays.
    """
    parts = [np.asarray(part, dtype=np.float64) for part in (members, held_out)]
    for part in parts:
        if part.ndim != 1:
            raise ValueError(f"bits must be one number a sequence, not of shape {part.shape}")
    total = sum(map(len, parts))
    columns = {
        "run": [run] * total,
        "index": np.arange(total, dtype=np.int64),
        "bits": np.concatenate(parts),
        "held_out": np.arange(total) >= len(parts[0]),
    }
    types = {"run": "string", "index": "int64", "bits": "float64", "held_out": "bool_"}
    if greedy_from is not None:
        columns["greedy_from"] = np.concatenate([np.asarray(part) for part in greedy_from])
        types["greedy_from"] = "int64"
    _write_table(_bits_path(folder, run), columns, types)


def read_sequence_bits(folder: Path, run: str) -> tuple[Floats, Floats]:
    """The bits of members and of held-out sequences in sequence_bits/RUN.parquet.

    Raises:
        ValueError: pyarrow is not installed, or the file does not hold sequence bits.
    """
    path = _bits_path(folder, run)
    parquet = pyarrow_parquet()
    try:
        table = parquet.read_table(path, columns=["bits", "held_out"])
        bits = table["bits"].to_numpy().astype(np.float64)
        held_out = table["held_out"].to_numpy().astype(bool)
    except (OSError, KeyError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"{path} lacks the columns bits and held_out ({why}): {DELETE_BITS}"
        ) from None
    if not np.isfinite(bits).all() or held_out.all() or not held_out.any():
        raise ValueError(
            f"{path} must have finite bits of members and of held-out sequences, and has "
            f"{np.isfinite(bits).sum()} finite of {len(bits)}, {held_out.sum()} held out: "
            f"{DELETE_BITS}"
        )
    return bits[~held_out], bits[held_out]


def has_sequence_bits(folder: Path, run: str) -> bool:
    """True if the bits of the sequences of a run are stored."""
    return _bits_path(folder, run).exists()


def read_greedy_from(folder: Path, run: str) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """`fastmem.greedy_from` of members and of held-out sequences; None in a file of a version that
    did not write it."""
    path = _bits_path(folder, run)
    parquet = pyarrow_parquet()
    if "greedy_from" not in parquet.read_schema(path).names:
        return None
    table = parquet.read_table(path, columns=["greedy_from", "held_out"])
    held_out = table["held_out"].to_numpy().astype(bool)
    starts = table["greedy_from"].to_numpy()
    return starts[~held_out], starts[held_out]


def without_bits(folder: Path, rows: Iterable[Row]) -> str | None:
    """How many finished runs lack sequence bits, and how to get them; None if all have them."""
    count = sum(
        row["status"] == "done" and not has_sequence_bits(folder, row["key"]) for row in rows
    )
    if not count:
        return None
    having = f"{count} finished runs have" if count > 1 else "1 finished run has"
    return (
        f"{having} no sequence bits, and models are not kept to score them: give another --out, "
        f"or delete their rows in {folder / 'rows'} to train them again"
    )


def write_curves(folder: Path, rows: Iterable[Row]) -> Path:
    """Writes the training curves of all rows to curves/curves.parquet, replacing the file.

    Raises:
        ValueError: pyarrow is not installed.
    """
    points = [(row["key"], point) for row in rows for point in row["curve"]]
    columns: dict[str, Any] = {"run": [key for key, _ in points]}
    types = {"run": "string", "step": "int64", "seconds": "float64", "memorized_bits": "float64"}
    types |= {"sampled": "int64", "low": "float64", "high": "float64"}
    for name in list(types)[1:]:
        columns[name] = [point.get(name) for _, point in points]
    path = folder / "curves" / "curves.parquet"
    _write_table(path, columns, types)
    return path


def _bits_path(folder: Path, run: str) -> Path:
    return folder / "sequence_bits" / f"{run}.parquet"


def _write_table(path: Path, columns: dict[str, Any], types: dict[str, str]) -> None:
    pyarrow_parquet()
    import pyarrow

    schema = pyarrow.schema([(name, getattr(pyarrow, types[name])()) for name in columns])
    write_table(path, pyarrow.table(columns, schema=schema))


def _checked(row: Row, path: Path) -> Row:
    """The row; ValueError unless it has each field of the schema, with its type."""
    schema = row.get("schema")
    if schema not in (1, SCHEMA):
        newer = isinstance(schema, int) and schema > SCHEMA
        fix = "install a newer fastmem-lm" if newer else "give another folder"
        raise ValueError(f"{path} has schema {schema}, this version reads 1 and {SCHEMA}: {fix}")
    for column, names in _PATHS:
        value = _at(row, names)
        if (value is _ABSENT and column.may_lack) or (value is None and column.may_be_null):
            continue
        if value is _ABSENT:
            raise ValueError(f"{path} lacks {column.path}: delete it and run again")
        if isinstance(value, bool) or not isinstance(value, _TYPES.get(column.dtype, (int,))):
            raise ValueError(
                f"{path} has {value!r} as {column.path}, not {column.dtype}: delete it and run "
                "again"
            )
    if not isinstance(row.get("curve"), list):
        raise ValueError(f"{path} lacks curve: delete it and run again")
    if row["key"] != path.stem:  # a copy would count as another run
        raise ValueError(f"{path} is the row of {row['key']}: give it that name, or delete it")
    return row


def _at(row: Row, names: Sequence[str]) -> Any:
    value: Any = row
    for name in names:
        value = value.get(name, _ABSENT) if isinstance(value, dict) else _ABSENT
    return value
