"""Sequences that are read from files, which fastmem or another program wrote.

N sequences, S tokens a sequence, V vocabulary.
"""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastmem.base.arguments import integer, user_path
from fastmem.data.files.formats import COLUMN
from fastmem.data.files.manifest import (
    Manifest,
    find_files,
    find_manifest,
    find_shard,
    read_manifest,
)
from fastmem.data.files.shard import (
    MAX_VOCAB,
    Shard,
    fingerprint,
    open_foreign,
    open_shard,
    scanned,
)
from fastmem.data.sequences import Rows, Sequences, Tokens, check_fields, from_description

_OPTIONS = ("dtype", "column")


class TokenFile(Sequences, kind="file"):
    """Sequences that are read from files, memory-mapped except for Parquet.

    Opened by `TokenFile.open`. Further attributes: `path`, absolute; `files`, the paths that are
    read; `known`, the set that a manifest describes (None, and entropy nan, for a foreign file and
    a set converted from a foreign file); `dropped_tokens`, the length of the tails of foreign files
    that do not fill a sequence.

    Do not shorten or replace files while they are open: reading a mapped page that the file has
    lost ends the process with SIGBUS, which no program can catch as an error. A file that changed
    between `open` and unpickling or `from_description` is a ValueError, if its size differs or, of
    another program's file, one of 16 samples of its bytes.
    """

    def __init__(
        self,
        path: Path,
        shards: list[Shard] | None = None,
        vocab: int = 0,
        known: Sequences | None = None,
        dropped_tokens: int = 0,
        options: dict[str, str] | None = None,
    ) -> None:
        if shards is None:
            raise ValueError(f"TokenFile opens no file: use TokenFile.open({str(path)!r})")
        self.path, self.vocab, self.known = path, vocab, known
        self.dropped_tokens = dropped_tokens
        self._options = options or {}
        self._shards = shards
        sizes = [shard.tokens.shape[0] for shard in shards]
        self._begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.count, self.length = int(self._begins[-1]), shards[0].tokens.shape[1]
        self._fingerprint = fingerprint(self.files) if known is None else ""

    @classmethod
    def open(
        cls,
        path: str | Path,
        length: int | None = None,
        vocab: int | None = None,
        dtype: DTypeLike | None = None,
        column: str | None = None,
    ) -> "TokenFile":
        """Opens a data set that `fastmem.write` wrote, or files of tokens of another program.

        A set of fastmem is opened by the path of its manifest, of its directory or of its single
        file, or by the path that all its files begin with. Sizes are checked against the manifest;
        `fastmem.verify` checks the tokens. A single shard of several is opened as a foreign file.

        Foreign files are .bin (nanoGPT, llm.c or Megatron-LM), .npy, .safetensors or .parquet. Each
        is cut into consecutive sequences of `length` tokens; shorter tails are dropped with a
        warning. Megatron's documents are joined and cut in this way if `length` is given, and kept
        apart otherwise, where all must have the same length.

        Args:
            path: of a file; of a directory with files of one kind, or a pattern such as
                "train-*.npy", read in the order of their names; of Megatron's .bin or .idx, or the
                prefix of both.
            length: S; required for a foreign file without a length.
            vocab: V; None: the largest token of foreign files plus 1, found by reading them.
            dtype: of the tokens in a foreign .bin without header or index; None: uint32 if `vocab`
                is above 65536, else uint16.
            column: the name of the tokens' column in Parquet or of their tensor in safetensors;
                None: input_ids, or the only one with integers.

        Raises:
            ValueError: a file does not exist, is cut or altered, holds something else, or does not
                fit its name or its manifest; names the file and the byte.

        Example:
            >>> import tempfile
            >>> folder = tempfile.TemporaryDirectory()
            >>> np.arange(10, dtype=np.uint16).tofile(f"{folder.name}/mine.bin")
            >>> mine = TokenFile.open(f"{folder.name}/mine.bin", length=5)
            >>> mine.count, mine.vocab, mine[1], mine.entropy_bits
            (2, 10, array([5, 6, 7, 8, 9], dtype=uint16), nan)
            >>> folder.cleanup()
        """
        path = user_path(path).absolute()
        if length is not None:
            length = integer("length", length, 1, 2**63 - 1)
        if vocab is not None:
            vocab = integer("vocab", vocab, 1, MAX_VOCAB)
        options = _checked_options(dtype, column)
        call = {"length": length, "vocab": vocab, **options}
        manifest_path = find_manifest(path)
        if manifest_path is not None:
            output, manifest = read_manifest(manifest_path)
            # A converted set does not need its source, which may be gone.
            converted = manifest["sequences"].get("kind") in (cls.kind, "memory")
            known = None if converted else from_description(manifest["sequences"])
            _check_manifest(manifest_path, manifest, known, call)
            shards = [open_shard(output, manifest, shard) for shard in range(output.shards)]
            return cls(path, shards, manifest["vocab"], known)
        of_shard = find_shard(path)
        if of_shard is not None:
            output, manifest, shard = of_shard
            _check_manifest(output.manifest, manifest, None, call)
            return cls(path, [open_shard(output, manifest, shard, first=0)], manifest["vocab"])
        return cls._foreign(path, length, vocab, options)

    @classmethod
    def _foreign(
        cls, path: Path, length: int | None, vocab: int | None, options: dict[str, str]
    ) -> "TokenFile":
        shards: list[Shard] = []
        first = dropped = 0
        for file in find_files(path):
            shard, rest = open_foreign(file, first, length, vocab, **options)
            first, dropped = first + shard.tokens.shape[0], dropped + rest
            shards.append(shard)
        if dropped:
            warnings.warn(
                f"{path}: drops the last {dropped} tokens, which do not fill a sequence of "
                f"{shards[0].tokens.shape[1]}",
                stacklevel=3,
            )
        full = [shard for shard in shards if 0 not in shard.tokens.shape]
        if not full:
            raise ValueError(f"{path} lacks a sequence of {shards[0].tokens.shape[1]} tokens")
        for shard in full:
            if shard.tokens.shape[1] != full[0].tokens.shape[1]:
                raise ValueError(
                    f"{full[0].path} has sequences of {full[0].tokens.shape[1]} tokens, "
                    f"{shard.path} of {shard.tokens.shape[1]}: open each by itself, or give length"
                )
        if vocab is None:
            vocab = max(map(scanned, full))
        return cls(path, full, vocab, None, dropped, options)

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
        return hash((self.count, self.length, self.vocab))

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling a memory map would copy the tokens.
        description = self.description()
        return _reopened, (self.path, self.length, self.vocab, self._options, description)

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
        """The description of the set in the manifest; for foreign files path, shape and samples."""
        if self.known is not None:
            return self.known.description()
        shape = {"count": self.count, "length": self.length, "vocab": self.vocab}
        own = {"kind": self.kind, "path": str(self.path), **shape, **self._options}
        return own | {"fingerprint": self._fingerprint}

    @classmethod
    def _described(cls, description: dict[str, Any]) -> Sequences:
        names = ["path", "count", "length", "vocab"]
        # 0.1.0 wrote no fingerprint.
        names += description.keys() & {*_OPTIONS, "fingerprint"}
        check_fields(cls.kind, description, names)
        options = {name: value for name, value in description.items() if name in _OPTIONS}
        path, length, vocab = (description[name] for name in ("path", "length", "vocab"))
        return _reopened(path, length, vocab, options, {"kind": cls.kind, **description})

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
        self, out: Tokens, tokens: Tokens, shard: Shard, rows: int | NDArray[np.int64]
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


def _reopened(
    path: str | Path, length: int, vocab: int, options: dict[str, str], wanted: dict[str, Any]
) -> TokenFile:
    """The file as it was opened before; ValueError if its description differs from `wanted`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first opening has warned of the tail
        file = TokenFile.open(path, length, vocab, **options)
    found = file.description()
    for name in ("count", *wanted):
        if found.get(name) != wanted.get(name):
            what = f"{file.count} sequences" if name == "count" else f"{name} {found.get(name)}"
            raise ValueError(
                f"{file.path} has {what}, and its description {wanted.get(name)}: it is another "
                "file, or changed since it was opened"
            )
    return file


def _checked_options(dtype: DTypeLike | None, column: str | None) -> dict[str, str]:
    """The options that are given, as a description has them."""
    options = {}
    if dtype is not None:
        try:
            given: np.dtype[Any] = np.dtype(dtype)
        except (TypeError, ValueError, SyntaxError):
            given = np.dtype(object)
        if given.kind not in "iu":
            raise ValueError(f"dtype must be an integer type, got {dtype!r}; give uint16 or uint32")
        options["dtype"] = given.str
    if column is not None:
        if not isinstance(column, str):
            raise ValueError(f"column must be a name, got {column!r}; give for example 'input_ids'")
        options["column"] = column
    return options


def _check_manifest(
    path: Path, manifest: Manifest, known: Sequences | None, call: dict[str, Any]
) -> None:
    """ValueError unless the manifest, its set and the call give the same shape and type."""
    there = {name: manifest[name] for name in ("length", "vocab", "count")}
    ours = there if known is None else {name: getattr(known, name) for name in there}
    ours = ours | {"dtype": np.dtype(manifest["dtype"]).str, "column": COLUMN}
    for given, whose in ((there, "its manifest"), (call, "the call")):
        for name, value in given.items():
            if value not in (None, ours[name]):
                raise ValueError(
                    f"{path} describes a set with {name} {ours[name]}, and {whose} gives {value}: "
                    f"leave {name} out"
                )
