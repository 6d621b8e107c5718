"""Parquet through pyarrow, an optional dependency: a column `input_ids` of lists of int32.

n sequences of S tokens; a row group is a block.
"""

import io
import os
import tempfile
import warnings
import weakref
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmem.base.storage import write_whole
from fastmem.data.files.formats import COLUMN
from fastmem.data.sequences import Tokens

_KEPT_GROUPS = 4
"""Row groups that a reader in order keeps decoded, 4 MB each if fastmem wrote them."""
_TOLD_BYTES = 1 << 26


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


def write_table(path: Path, table: Any, **options: Any) -> None:
    """Writes an Arrow table as a Parquet file, whole or not at all; options of pyarrow."""
    buffer = io.BytesIO()
    options |= {"use_dictionary": dictionaries(table.schema)}
    pyarrow_parquet().write_table(table, buffer, **options)
    write_whole(path, buffer.getvalue())


def dictionaries(schema: Any) -> list[str]:
    """The columns to write with a dictionary: all except floats, whose values seldom repeat.

    A dictionary of the bits of tokens takes twice the time and a third more bytes.
    """
    import pyarrow

    return [one.name for one in schema if not pyarrow.types.is_floating(one.type)]


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

    `shape` is (count, S); `rows[begin:end]` and `rows[indices]` give (n, S) integers. A row group
    that cannot be read, or does not have lists of S integers, is a ValueError that names it.

    Rows in random order would decode most row groups for each batch. Each group is therefore
    decoded once into a scratch file, which has no name and ends with the process.
    """

    def __init__(self, path: Path, column: str | None = None) -> None:
        parquet = pyarrow_parquet()
        self.path = path
        try:
            self._file = parquet.ParquetFile(path, memory_map=True)
            schema = self._file.schema_arrow
            self._meta = self._file.metadata
            groups = range(self._meta.num_row_groups)
            sizes = [self._meta.row_group(group).num_rows for group in groups]
            if sum(sizes) != self._meta.num_rows or min(sizes, default=0) < 0:
                raise ValueError(f"row groups of {sizes} rows, not {self._meta.num_rows} together")
            leaves = [self._meta.schema.column(i).path for i in range(self._meta.num_columns)]
        except Exception as error:  # of pyarrow: OSError or ValueError, depending on the damage
            raise ValueError(f"{path} is not a whole Parquet file: {error}") from None
        tokens = [field.name for field in schema if holds_tokens(field.type)]
        only = tokens[0] if len(tokens) == 1 and COLUMN not in schema.names else COLUMN
        self._name = only if column is None else column
        if self._name not in schema.names:
            raise ValueError(
                f"{path} has columns {schema.names}, none is {self._name!r}: give column"
            )
        self._leaf = [f"{leaf}.".startswith(f"{self._name}.") for leaf in leaves].index(True)
        self._begins = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self._group = lru_cache(_KEPT_GROUPS)(self._read)
        self._rows: Tokens | None = None
        self._decoded = np.zeros(len(groups), bool)
        self.shape: tuple[int, int] = (0, 0)
        self._dtype: np.dtype[np.integer[Any]] = np.dtype(np.int64)
        first = next((group for group in groups if sizes[group]), None)
        if first is not None:
            block = self._group(first)
            self.shape, self._dtype = (int(self._begins[-1]), block.shape[1]), block.dtype

    def __getitem__(self, places: slice | NDArray[np.int64]) -> Tokens:
        in_order = isinstance(places, slice)
        if isinstance(places, slice):
            places = np.arange(*places.indices(self.shape[0]), dtype=np.int64)
        owners = np.searchsorted(self._begins, places, "right") - 1
        groups = np.unique(owners)
        random = not in_order and self._decoded.size > _KEPT_GROUPS
        if random and (rows := self._decode(groups)) is not None:
            return rows[places]
        out = np.empty((places.size, self.shape[1]), self._dtype)
        for group in groups:
            here = owners == group
            out[here] = self._group(int(group))[places[here] - self._begins[group]]
        return out

    def _decode(self, groups: NDArray[np.int64]) -> Tokens | None:  # (count, S)
        """The scratch file with these row groups decoded; None if the disk has no room for it."""
        row = self.shape[1] * self._dtype.itemsize
        try:
            if self._rows is None:
                self._rows = self._scratch_rows(self.shape[0] * row)
            for group in groups[~self._decoded[groups]]:
                view = self._read(int(group)).data.cast("B")
                place = int(self._begins[group]) * row
                while view:
                    n = os.pwrite(self._scratch.fileno(), view, place)
                    view, place = view[n:], place + n
                self._decoded[group] = True
        except OSError:
            return None
        return self._rows

    def _scratch_rows(self, size: int) -> Tokens:
        if size >= _TOLD_BYTES:
            warnings.warn(
                f"{self.path}: decodes each row group once into a scratch file of up to "
                f"{size / 2**30:.1f} GiB, for sequences in random order; an .npy file, which "
                "fastmem.write makes of it, needs none",
                stacklevel=2,
            )
        try:
            self._scratch = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115
        except OSError:  # a directory without permission
            self._scratch = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._scratch.close)
        self._scratch.truncate(size)
        return np.memmap(self._scratch, self._dtype, "r", shape=self.shape)

    def byte_offset(self, row: int) -> int:
        """The byte at which the row group of this row begins."""
        group = int(np.searchsorted(self._begins, row, "right")) - 1
        column = self._meta.row_group(group).column(self._leaf)
        places = (column.dictionary_page_offset, column.data_page_offset)
        return min(int(place) for place in places if place is not None)

    def _read(self, group: int) -> Tokens:
        where = f"{self.path}, row group {group}"
        n = self._meta.row_group(group).num_rows
        try:
            column = self._file.read_row_group(group, [self._name])[self._name].combine_chunks()
            nested = hasattr(column, "flatten")
            values = (column.flatten() if nested else column).to_numpy(zero_copy_only=False)
        except Exception as error:  # as above
            if "histogram" not in str(error):  # else byte_offset ends the process, in pyarrow
                where += f", from byte {self.byte_offset(int(self._begins[group]))} on,"
            raise ValueError(f"{where} cannot be read: {error}") from None
        if not nested or column.null_count or values.dtype.kind not in "iu":
            raise ValueError(f"{where} has {column.type}, not lists of integers without nulls")
        lengths = np.diff(column.offsets.to_numpy()) if hasattr(column, "offsets") else None
        S = values.size // n if n else 0
        if values.size != n * S or (lengths is not None and (lengths != S).any()):
            raise ValueError(
                f"{where} has sequences of different lengths: pack them to one length first"
            )
        if self.shape[0] and self.shape[1] != S:
            raise ValueError(
                f"{where} has sequences of {S} tokens, the first row group of {self.shape[1]}"
            )
        tokens: Tokens = values.reshape(n, S)
        return tokens


def holds_tokens(kind: Any) -> bool:
    """True for a type of lists of integers."""
    import pyarrow

    types = pyarrow.types
    nested = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(nested and types.is_integer(kind.value_type))
