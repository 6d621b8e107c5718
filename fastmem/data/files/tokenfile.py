"""Sequences that are read from files, which fastmem or another program wrote.

N sequences, S tokens a sequence, V vocabulary.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmem.base.arguments import integer
from fastmem.data.files.formats import SUFFIXES, Dtype, read_layout
from fastmem.data.files.manifest import Manifest, Output, find_manifest, read_manifest
from fastmem.data.files.parquet import ParquetRows
from fastmem.data.sequences import Rows, Sequences, Tokens, check_fields, from_description

_SCAN_TOKENS = 1 << 22
_MAX_VOCAB = 2**31
_INT32: Dtype = np.dtype("<i4")


@dataclass(frozen=True)
class _Shard:
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


class TokenFile(Sequences, kind="file"):
    """Sequences that are read from files, memory-mapped except for Parquet.

    Opened by `TokenFile.open`. Further attributes: `path` as it was given; `files`, the paths that
    are read; `known`, the set that a manifest describes (None, and entropy nan, for a foreign file
    and a set converted from a foreign file); `dropped_tokens`, the length of the tail of a foreign
    file that does not fill a sequence.
    """

    def __init__(
        self,
        path: Path,
        shards: list[_Shard],
        vocab: int,
        known: Sequences | None = None,
        dropped_tokens: int = 0,
    ) -> None:
        self.path, self.vocab, self.known = path, vocab, known
        self.dropped_tokens = dropped_tokens
        self._shards = shards
        sizes = [shard.tokens.shape[0] for shard in shards]
        self._begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.count, self.length = int(self._begins[-1]), shards[0].tokens.shape[1]

    @classmethod
    def open(
        cls, path: str | Path, length: int | None = None, vocab: int | None = None
    ) -> "TokenFile":
        """Opens a data set that `fastmem.write` wrote, or a file of tokens of another program.

        A set of fastmem is opened by the path of its manifest or of its single file, or by the path
        that all its files begin with. Sizes are checked against the manifest; `fastmem.verify`
        checks the tokens. A single shard of several is opened as a foreign file.

        A foreign .bin (nanoGPT, llm.c or Megatron-LM), .npy, .safetensors or .parquet file is cut
        into consecutive sequences of `length` tokens; a shorter tail is dropped with a warning.

        Args:
            path: of the file or files.
            length: S; required for a foreign file without a length.
            vocab: V; None: the largest token of a foreign file plus 1, found by reading the file.
                If above 65536, a .bin without header or index is uint32, else uint16.

        Raises:
            ValueError: a file does not exist, is cut or altered, or does not fit its name or its
                manifest; names the file and the byte.

        Example:
            >>> import tempfile
            >>> folder = tempfile.TemporaryDirectory()
            >>> np.arange(10, dtype=np.uint16).tofile(f"{folder.name}/mine.bin")
            >>> mine = TokenFile.open(f"{folder.name}/mine.bin", length=5)
            >>> mine.count, mine.vocab, mine[1], mine.entropy_bits
            (2, 10, array([5, 6, 7, 8, 9], dtype=uint16), nan)
            >>> folder.cleanup()
        """
        path = Path(path)
        manifest = find_manifest(path)
        if manifest is not None:
            return cls._of_manifest(path, manifest, length, vocab)
        if not path.is_file():
            endings = ", ".join(sorted(set(SUFFIXES.values())))
            raise ValueError(
                f"{path} is neither a file nor a data set with a manifest: give a path with one of "
                f"{endings}"
            )
        return cls._foreign(path, length, vocab)

    @classmethod
    def _of_manifest(
        cls, path: Path, manifest_path: Path, length: int | None, vocab: int | None
    ) -> "TokenFile":
        output, manifest = read_manifest(manifest_path)
        # A converted set does not need its source, which may be gone.
        converted = manifest["sequences"].get("kind") == cls.kind
        known = None if converted else from_description(manifest["sequences"])
        for name, given in (("length", length), ("vocab", vocab), ("count", None)):
            ours = manifest[name] if known is None else getattr(known, name)
            for other, whose in ((manifest[name], "its manifest"), (given, "the call")):
                if other not in (None, ours):
                    raise ValueError(
                        f"{manifest_path} describes a set with {name} {ours}, and {whose} gives "
                        f"{other}: leave {name} out"
                    )
        shards = [_open_shard(output, manifest, shard) for shard in range(output.shards)]
        return cls(path, shards, manifest["vocab"], known)

    @classmethod
    def _foreign(cls, path: Path, length: int | None, vocab: int | None) -> "TokenFile":
        if length is not None:
            length = integer("length", length, 1, 2**63 - 1)
        if vocab is not None:
            vocab = integer("vocab", vocab, 1, _MAX_VOCAB)
        dropped = 0
        if path.suffix == SUFFIXES["parquet"]:
            rows = ParquetRows(path)
            shard = _Shard(path, 0, rows, 0, _INT32)
            if length not in (None, rows.shape[1]):
                raise ValueError(
                    f"{path} has sequences of {rows.shape[1]} tokens, not {length}: "
                    "leave length out"
                )
        else:
            layout = read_layout(path, vocab)
            S = layout.length if length is None else length
            if S is None:
                raise ValueError(f"{path} does not have the length of its sequences: give length")
            n, dropped = divmod(layout.tokens, S) if S else (0, 0)
            if dropped:
                warnings.warn(
                    f"{path}: drops the last {dropped} tokens, which do not fill a sequence of {S}",
                    stacklevel=3,
                )
            tokens = _mapped(path, layout.offset, layout.dtype, n, S)
            shard = _Shard(path, 0, tokens, layout.offset, layout.dtype)
        if 0 in shard.tokens.shape:
            raise ValueError(f"{path} lacks a sequence of {shard.tokens.shape[1]} tokens")
        return cls(path, [shard], _scanned(shard) if vocab is None else vocab, None, dropped)

    @property
    def files(self) -> list[Path]:
        """The files that the tokens are read from."""
        return [shard.path for shard in self._shards]

    def _files(self) -> list[Path]:
        return self.files

    def __repr__(self) -> str:
        return (
            f"TokenFile({str(self.path)!r}, count={self.count}, length={self.length}, "
            f"vocab={self.vocab})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenFile) and self.description() == other.description()

    def __hash__(self) -> int:
        return hash((self.path, self.count, self.length, self.vocab))

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling a memory map would copy the tokens.
        return _reopened, (self.path, self.length, self.vocab)

    def held_out(self, count: int) -> Sequences:
        """`held_out` of the set that the manifest describes.

        Raises:
            ValueError: a foreign file, or a set without other sequences.
        """
        if self.known is None:
            raise ValueError(
                f"{self.path} is a foreign file without held-out sequences: open another file"
            )
        return self.known.held_out(count)

    def description(self) -> dict[str, Any]:
        """The description of the set in the manifest; for a foreign file its path and shape."""
        if self.known is not None:
            return self.known.description()
        shape = {"count": self.count, "length": self.length, "vocab": self.vocab}
        return {"kind": self.kind, "path": str(self.path.absolute()), **shape}

    @classmethod
    def _described(cls, description: dict[str, Any]) -> Sequences:
        check_fields(cls.kind, description, ("path", "count", "length", "vocab"))
        file = _reopened(*(description[name] for name in ("path", "length", "vocab")))
        if file.count != description["count"]:
            raise ValueError(
                f"{file.path} has {file.count} sequences, and its description "
                f"{description['count']}: it is another file"
            )
        return file

    def place(self, index: int, position: int) -> str:
        """The file, byte, sequence and position of a token, for an error."""
        owner = int(np.searchsorted(self._begins, index, "right")) - 1
        return self._shards[owner].place(index - int(self._begins[owner]), position)

    @property
    def context(self) -> int:
        return 1 if self.known is None else self.known.context

    def _fill(self, out: Tokens, rows: Rows, threads: int) -> None:
        if isinstance(rows, range):
            for shard in self._shards:
                begin = max(rows.start, shard.first)
                end = min(rows.stop, shard.first + shard.tokens.shape[0])
                if begin < end:
                    local = slice(begin - shard.first, end - shard.first)
                    here = out[begin - rows.start : end - rows.start]
                    self._take(here, shard.tokens[local], shard, local.start)
            return
        places = np.asarray(rows, np.int64)
        owners = np.searchsorted(self._begins, places, "right") - 1
        for i in np.unique(owners):
            here = owners == i
            local = places[here] - self._begins[i]
            part = np.empty((local.size, self.length), out.dtype)
            self._take(part, self._shards[i].tokens[local], self._shards[i], local)
            out[here] = part

    def _take(
        self, out: Tokens, tokens: Tokens, shard: _Shard, rows: int | NDArray[np.int64]
    ) -> None:
        """Copies tokens of one file to out; ValueError at the first outside the vocabulary."""
        wrong = tokens >= self.vocab
        if tokens.dtype.kind == "i":
            wrong |= tokens < 0
        if wrong.any():
            row, position = (int(i) for i in np.argwhere(wrong)[0])
            token = int(tokens[row, position])
            row = rows + row if isinstance(rows, int) else int(rows[row])
            raise ValueError(
                f"{shard.place(row, position)}: token {token} is outside the vocabulary of "
                f"{self.vocab}; the file is altered, or has a larger vocab"
            )
        np.copyto(out, tokens, casting="unsafe")

    def _copies(self, rows: Rows) -> NDArray[np.int64]:
        return super()._copies(rows) if self.known is None else self.known._copies(rows)

    def _repeats(self) -> bool:
        return self.known is not None and self.known._repeats()

    def _entropy_from(self, position: int) -> float:
        return math.nan if self.known is None else self.known._entropy_from(position)


def _reopened(path: str | Path, length: int, vocab: int) -> TokenFile:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first opening has warned of the tail
        return TokenFile.open(path, length, vocab)


def _open_shard(output: Output, manifest: Manifest, shard: int) -> _Shard:
    """One file of a set, with its size and header checked against the manifest."""
    rows = output.rows(shard, manifest["count"])
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
        return _Shard(path, rows.start, parquet_rows, 0, _INT32)
    layout = read_layout(path, manifest["vocab"])
    found = (layout.format, layout.dtype.name, layout.tokens, layout.length or S)
    wanted = (output.format, manifest["dtype"], len(rows) * S, S)
    if found != wanted:
        raise ValueError(
            f"{path} has (format, dtype, tokens, length) {found} in its header at byte 0, and "
            f"{output.manifest} gives {wanted}; generate it again"
        )
    tokens = _mapped(path, layout.offset, layout.dtype, len(rows), S)
    return _Shard(path, rows.start, tokens, layout.offset, layout.dtype)


def _mapped(path: Path, offset: int, dtype: Dtype, n: int, S: int) -> NDArray[Any]:
    if n == 0 or S == 0:
        return np.empty((n, S), dtype)
    return np.memmap(path, dtype, "r", offset, (n, S))


def _scanned(shard: _Shard) -> int:
    """The smallest vocabulary that contains all tokens of a file."""
    n, S = shard.tokens.shape
    step, largest = max(1, _SCAN_TOKENS // S), 0
    for begin in range(0, n, step):
        part = shard.tokens[begin : begin + step]
        largest = max(largest, int(part.max()))
        if part.min() < 0 or largest >= _MAX_VOCAB:
            row, position = (int(i) for i in np.argwhere((part < 0) | (part >= _MAX_VOCAB))[0])
            raise ValueError(
                f"{shard.place(begin + row, position)}: token {part[row, position]} is outside 0 "
                f"to {_MAX_VOCAB - 1}, the tokens of any vocabulary"
            )
    return largest + 1
