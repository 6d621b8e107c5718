"""Parquet through pyarrow, an optional dependency: a column `input_ids` of lists of int32.

n sequences of S tokens; a row group is a block.
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmem.data.files.formats import COLUMN
from fastmem.data.sequences import Tokens

_KEPT_GROUPS = 4
"""Row groups that a reader keeps decoded, about 8 MB each if fastmem wrote them."""


def pyarrow_parquet() -> ModuleType:
    """The module pyarrow.parquet; ValueError with the command that installs it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "Parquet needs pyarrow, which is not installed: pip install 'fastmem-lm[parquet]'"
        ) from None
    module: ModuleType = pyarrow.parquet
    return module


def write_groups(sink: Any, blocks: Iterable[Tokens]) -> None:
    """Writes blocks of tokens, (n, S) int32 each, as row groups to a file object."""
    parquet = pyarrow_parquet()
    import pyarrow

    schema = pyarrow.schema([(COLUMN, pyarrow.list_(pyarrow.int32()))])
    with parquet.ParquetWriter(sink, schema) as writer:
        for block in blocks:
            n, S = block.shape
            ends = np.arange(n + 1, dtype=np.int32) * np.int32(S)
            values = pyarrow.array(block.reshape(-1))
            lists = pyarrow.ListArray.from_arrays(pyarrow.array(ends), values)
            table = pyarrow.Table.from_arrays([lists], schema=schema)
            writer.write_table(table, row_group_size=max(1, n))


class ParquetRows:
    """The rows of a Parquet file as an array, read one row group at a time.

    `shape` is (count, S); `rows[begin:end]` and `rows[indices]` give (n, S) int64. A row group that
    cannot be read, or does not have lists of S integers, is a ValueError that names it.
    """

    def __init__(self, path: Path) -> None:
        parquet = pyarrow_parquet()
        self.path = path
        try:
            self._file = parquet.ParquetFile(path, memory_map=True)
        except Exception as error:  # of pyarrow: OSError or ValueError, depending on the damage
            raise ValueError(f"{path} is not a whole Parquet file: {error}") from None
        names = self._file.schema_arrow.names
        if COLUMN not in names:
            raise ValueError(f"{path} has columns {names}, none is {COLUMN!r}: rename one")
        self._meta = self._file.metadata
        groups = range(self._meta.num_row_groups)
        sizes = [self._meta.row_group(group).num_rows for group in groups]
        self._begins = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self._group = lru_cache(_KEPT_GROUPS)(self._read)
        S = self._read(0).shape[1] if self._meta.num_rows else 0
        self.shape = (int(self._begins[-1]), S)

    def __getitem__(self, places: slice | NDArray[np.int64]) -> Tokens:
        if isinstance(places, slice):
            places = np.arange(*places.indices(self.shape[0]), dtype=np.int64)
        out = np.empty((places.size, self.shape[1]), np.int64)
        groups = np.searchsorted(self._begins, places, "right") - 1
        for group in np.unique(groups):
            here = groups == group
            out[here] = self._group(int(group))[places[here] - self._begins[group]]
        return out

    def byte_offset(self, row: int) -> int:
        """The byte at which the row group of this row begins."""
        group = int(np.searchsorted(self._begins, row, "right")) - 1
        column = self._meta.row_group(group).column(self._column(group))
        places = (column.dictionary_page_offset, column.data_page_offset)
        return min(int(place) for place in places if place is not None)

    def _column(self, group: int) -> int:
        row_group = self._meta.row_group(group)
        paths = [row_group.column(i).path_in_schema for i in range(row_group.num_columns)]
        return next(i for i, path in enumerate(paths) if path.split(".")[0] == COLUMN)

    def _read(self, group: int) -> Tokens:
        where = f"{self.path}, row group {group}"
        n = self._meta.row_group(group).num_rows
        try:
            column = self._file.read_row_group(group, [COLUMN])[COLUMN].combine_chunks()
            nested = hasattr(column, "flatten")
            values = (column.flatten() if nested else column).to_numpy(zero_copy_only=False)
        except Exception as error:  # as above
            offset = self.byte_offset(int(self._begins[group]))
            raise ValueError(f"{where}, from byte {offset} on, cannot be read: {error}") from None
        if not nested or column.null_count or values.dtype.kind not in "iu":
            raise ValueError(f"{where} has {column.type}, not lists of integers without nulls")
        lengths = np.diff(column.offsets.to_numpy()) if hasattr(column, "offsets") else None
        S = values.size // n if n else 0
        if values.size != n * S or (lengths is not None and (lengths != S).any()):
            raise ValueError(
                f"{where} has sequences of different lengths: pack them to one length first"
            )
        if hasattr(self, "shape") and self.shape[1] != S:
            raise ValueError(
                f"{where} has sequences of {S} tokens, the first row group of {self.shape[1]}"
            )
        tokens: Tokens = values.reshape(n, S)
        return tokens
