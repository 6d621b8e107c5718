"""Documents in columns, one a row: Parquet, Arrow and data sets of datasets, through pyarrow."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from fastmem.data.files.formats import COLUMN
from fastmem.data.files.parquet import holds_tokens, pyarrow_parquet

Rows = Callable[[int], Iterator[tuple[str, Any, float]]]
"""Gives (label, content, fraction read) of the documents of a file from a number on."""

COLUMNAR = (".parquet", ".arrow")
TEXT_COLUMN = "text"
_BATCH_ROWS = 1024


def file_rows(path: Path, column: str | None) -> tuple[Rows, int | None]:
    """The rows of a Parquet or Arrow file, and their number if the file records it."""
    try:
        return (
            _parquet_rows(path, column) if path.suffix == ".parquet" else _arrow_rows(path, column)
        )
    except _arrow_errors() as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, _line(error), str(path)) from None
        raise ValueError(f"{path} is not a whole {path.suffix[1:]} file: {_line(error)}") from None


def _parquet_rows(path: Path, column: str | None) -> tuple[Rows, int]:
    with pyarrow_parquet().ParquetFile(path, memory_map=True) as file:  # else one stays open a file
        name, count = chosen_column(f"{path}", file.schema_arrow, column), file.metadata.num_rows
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]

    def rows(first: int) -> Iterator[tuple[str, Any, float]]:
        begin, groups = 0, list(range(len(sizes)))
        while groups and begin + sizes[groups[0]] <= first:
            begin += sizes[groups.pop(0)]
        with pyarrow_parquet().ParquetFile(path, memory_map=True) as file:
            batches = file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[name])
            columns = _columns(batches, name)
            yield from _numbered(path, columns, begin, first, lambda row: row / count)

    return rows, count


def _arrow_rows(path: Path, column: str | None) -> tuple[Rows, None]:
    import pyarrow

    def opened() -> tuple[Any, Any]:
        source = pyarrow.memory_map(str(path))
        begins_as_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if begins_as_file:
            file = pyarrow.ipc.open_file(source)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
            return file.schema, (batches, source)
        stream = pyarrow.ipc.open_stream(source)
        return stream.schema, (stream, source)

    schema, (_, source) = opened()
    source.close()
    name = chosen_column(f"{path}", schema, column)
    size = path.stat().st_size

    def rows(first: int) -> Iterator[tuple[str, Any, float]]:
        batches, source = opened()[1]
        with source:
            columns = _columns(batches, name)
            yield from _numbered(path, columns, 0, first, lambda _: source.tell() / size)

    return rows, None


def _columns(batches: Any, name: str) -> Iterator[Any]:
    return (batch.column(batch.schema.get_field_index(name)) for batch in batches)


def _numbered(
    path: Path, columns: Iterator[Any], begin: int, first: int, read: Callable[[int], float]
) -> Iterator[tuple[str, Any, float]]:
    """The values of columns from row `first` on; `begin` is the row of the first value."""
    try:
        for column in columns:
            skip = min(max(0, first - begin), len(column))
            for row, content in enumerate(contents(column.slice(skip)), begin + skip):
                if content is None:
                    raise ValueError(f"{path}, row {row}, is null: drop such rows first")
                yield f"{row}", content, min(1.0, read(row + 1))
            begin += len(column)
    except _arrow_errors() as error:
        raise ValueError(f"{path} cannot be read from row {begin} on: {_line(error)}") from None


def contents(column: Any) -> Iterator[Any]:
    """The values of a column: arrays of tokens, or what Python makes of other values; None for a
    null."""
    import pyarrow

    if not holds_tokens(column.type):
        yield from (value.as_py() for value in column)
        return
    if pyarrow.types.is_fixed_size_list(column.type):
        column = column.cast(pyarrow.list_(column.type.value_type))
    values, offsets = column.values, column.offsets.to_numpy()
    if values.null_count:  # the rows that have one are refused by name
        yield from (value.as_py() for value in column)
        return
    tokens = values.to_numpy()
    for i, (begin, end) in enumerate(pairwise(offsets)):
        yield None if column.null_count and not column[i].is_valid else tokens[begin:end]


def chosen_column(where: str, schema: Any, column: str | None) -> str:
    """The column with documents: `column`, else text, else input_ids, else the only possible one.

    Raises:
        ValueError: none, or several; names the columns.
    """
    fits = [field.name for field in schema if _is_text(field.type) or holds_tokens(field.type)]
    if column is not None:
        if column not in schema.names:
            raise ValueError(f"{where} lacks column {column!r} and has {schema.names}: give column")
        return column
    for name in (TEXT_COLUMN, COLUMN):
        if name in fits:
            return name
    if len(fits) != 1:
        raise ValueError(
            f"{where} has columns {schema.names}, and not one alone with text or tokens: give "
            "column"
        )
    return str(fits[0])


def _is_text(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def is_dataset(data: object) -> bool:
    """True for a data set of the library datasets."""
    return type(data).__module__.partition(".")[0] == "datasets" and hasattr(data, "with_format")


def load_named(name: str) -> Any:
    """The data set NAME[:CONFIG[:SPLIT]] of datasets, memory-mapped.

    Raises:
        ValueError: datasets is not installed or cannot load it; or the split must be given.
    """
    library = _datasets(name)
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        found = library.load_dataset(path, config or None, split=split or None)
    except Exception as error:  # of datasets, its hub and the network
        raise ValueError(
            f"{name} is neither a file nor a data set that datasets loads: {_line(error)}"
        ) from None
    if not isinstance(found, dict):
        return found
    if len(found) > 1:
        splits = ", ".join(f"{path}:{config}:{split}" for split in found)
        raise ValueError(f"{name} has several splits: give one of {splits}")
    return next(iter(found.values()))


def dataset_rows(name: str, data: Any, column: str | None) -> tuple[Rows, int]:
    """The rows of a data set of datasets, and their number."""
    if isinstance(data, dict) or not hasattr(data, "num_rows"):
        raise ValueError(f"{name} is a {type(data).__name__}: give one split that is not a stream")
    table, count = data.with_format("arrow"), int(data.num_rows)
    chosen = chosen_column(name, data.features.arrow_schema, column)

    def rows(first: int) -> Iterator[tuple[str, Any, float]]:
        left = table.select(range(first, count)).iter(_BATCH_ROWS)
        columns = (batch.column(chosen).combine_chunks() for batch in left)
        return _numbered(Path(name), columns, first, first, lambda row: row / count)

    return rows, count


def _datasets(name: str) -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{name} is neither a file nor a folder, and the name of a data set needs datasets, "
            "which is not installed: give a path, or pip install datasets"
        ) from None
    module: ModuleType = datasets
    return module


def _arrow_errors() -> tuple[type[Exception], ...]:
    pyarrow_parquet()
    import pyarrow

    return (pyarrow.ArrowException, OSError)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
