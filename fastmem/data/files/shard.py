"""One file of tokens, which holds some or all of the sequences of a set.

N sequences, S tokens a sequence, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fastmem.data.files.formats import SUFFIXES, Dtype, Layout, read_layout, token_dtype
from fastmem.data.files.manifest import Manifest, Output
from fastmem.data.files.parquet import ParquetRows

MAX_VOCAB = 2**31
_SCAN_TOKENS = 1 << 22
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_MAX_EMPTY = 2**48  # NumPy refuses longer rows, also where an array has none
_INT32: Dtype = np.dtype("<i4")


@dataclass(frozen=True)
class Shard:
    """The sequences (n, S) of one file, and their place in the file and the set."""

    path: Path
    first: int
    """The number in the set of its first sequence."""
    tokens: Any
    """A memory map or ParquetRows; both give (m, S) for a slice or an array of m rows."""
    offset: int
    dtype: Dtype

    def place(self, row: int, position: int) -> str:
        """The file, byte, sequence and position of a token, for an error."""
        if isinstance(self.tokens, ParquetRows):
            where = f"in the row group from byte {self.tokens.byte_offset(row)} on"
        else:
            S = self.tokens.shape[1]
            where = f"byte {self.offset + (row * S + position) * self.dtype.itemsize}"
        return f"{self.path}, {where} (sequence {self.first + row}, position {position})"


def open_foreign(
    path: Path,
    first: int,
    length: int | None,
    vocab: int | None,
    dtype: str | None = None,
    column: str | None = None,
) -> tuple[Shard, int]:
    """The sequences of one file of another program, and the tokens of its tail."""
    if path.suffix == SUFFIXES["parquet"]:
        if dtype is not None:
            raise ValueError(f"{path} records its type of tokens, not {dtype}: leave dtype out")
        rows = ParquetRows(path, column)
        if rows.shape[0] and length not in (None, rows.shape[1]):
            raise ValueError(
                f"{path} has sequences of {rows.shape[1]} tokens, not {length}: leave length out"
            )
        return Shard(path, first, rows, 0, _INT32), 0
    layout = read_layout(path, vocab, None if dtype is None else np.dtype(dtype), column)
    S = layout.length if length is None else length
    if S is None and not layout.tokens:
        raise ValueError(f"{path} holds 0 tokens: give a file with sequences")
    if S is None:
        raise ValueError(f"{path} does not have the length of its sequences: give length")
    n, dropped = divmod(layout.tokens, S) if S else (0, 0)
    return _mapped(path, first, layout, n, S), dropped


def open_shard(output: Output, manifest: Manifest, shard: int, first: int | None = None) -> Shard:
    """One file of a set, with its size and header checked against the manifest."""
    rows = output.rows(shard, manifest["count"])
    first = rows.start if first is None else first
    for entry in manifest["shards"][shard]["files"]:
        path = output.stem.with_name(entry["name"])
        if not path.is_file():
            raise ValueError(
                f"{path} is missing, and {output.manifest} names it; generate it again"
            )
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(
                f"{path} has {size} bytes, {output.manifest} gives {entry['bytes']}: it differs "
                f"from byte {min(size, entry['bytes'])} on; generate it again"
            )
    path, S = output.payload(shard), manifest["length"]
    if output.format == "parquet":
        parquet_rows = ParquetRows(path)
        if parquet_rows.shape != (len(rows), S):
            raise ValueError(
                f"{path} has (sequences, tokens) {parquet_rows.shape}, and {output.manifest} gives "
                f"{(len(rows), S)}; generate it again"
            )
        return Shard(path, first, parquet_rows, 0, _INT32)
    dtype = token_dtype(output.format, manifest["vocab"]) if output.format == "bin" else None
    layout = read_layout(path, dtype=dtype)
    found = (layout.format, layout.dtype.name, layout.tokens, layout.length or S)
    wanted = (output.format, manifest["dtype"], len(rows) * S, S)
    if found != wanted:
        raise ValueError(
            f"{path} has (format, dtype, tokens, length) {found} in its header at byte 0, and "
            f"{output.manifest} gives {wanted}; generate it again"
        )
    return _mapped(path, first, layout, len(rows), S)


def _mapped(path: Path, first: int, layout: Layout, n: int, S: int) -> Shard:
    offset, dtype = layout.offset, layout.dtype
    if n and S:
        return Shard(path, first, np.memmap(path, dtype, "r", offset, (n, S)), offset, dtype)
    return Shard(path, first, np.empty((0, min(S, _MAX_EMPTY)), dtype), offset, dtype)


def scanned(shard: Shard) -> int:
    """The smallest vocabulary that contains all tokens of a file."""
    n, S = shard.tokens.shape
    step, largest = max(1, _SCAN_TOKENS // S), 0
    for begin in range(0, n, step):
        part = shard.tokens[begin : begin + step]
        largest = max(largest, int(part.max()))
        if part.min() < 0 or largest >= MAX_VOCAB:
            row, position = (int(i) for i in np.argwhere((part < 0) | (part >= MAX_VOCAB))[0])
            raise ValueError(
                f"{shard.place(begin + row, position)}: token {part[row, position]} is outside 0 "
                f"to {MAX_VOCAB - 1}, the tokens of any vocabulary"
            )
    return largest + 1


def fingerprint(files: list[Path]) -> str:
    """A hash of the sizes of files and of samples of their bytes."""
    digest = xxhash.xxh3_64()
    for path in files:
        size = path.stat().st_size
        digest.update(b"%d:" % size)
        with path.open("rb", buffering=0) as file:
            for place in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                file.seek(place)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
