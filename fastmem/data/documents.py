"""Documents of any length: texts, tokens or messages, read as a stream from files or memory."""

import json
import os
import reprlib
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from glob import glob, has_magic
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from torch import Tensor

from fastmem.base.arguments import user_path
from fastmem.data.columns import COLUMNAR, Rows, dataset_rows, file_rows, is_dataset, load_named
from fastmem.data.content import Content, content_of, lines, whole_text
from fastmem.data.files.formats import SUFFIXES, read_layout
from fastmem.data.files.manifest import find_manifest
from fastmem.data.files.shard import fingerprint
from fastmem.data.files.tokenfile import TokenFile
from fastmem.data.sequences import Sequences as SequenceSet, Tokens

TEXT, LINES = ".txt", ".jsonl"
TOKEN_FILES = {*SUFFIXES.values()} - {*COLUMNAR}
ERRORS = ("strict", "replace", "ignore", "backslashreplace")
"""Python's names of how invalid UTF-8 is decoded."""
_NAMED = 3
_BEGINNING_BYTES = 4096
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_BLOCK_TOKENS = 1 << 20


class Document(NamedTuple):
    """A document and its place in the data."""

    source: str
    """The file's name, and after a colon the line (from 1) or row (from 0) in it."""
    content: Content
    read: float
    """Fraction of the data read up to the end of this document."""


class Part(NamedTuple):
    """A file, or data in memory, with zero or more documents."""

    name: str
    size: float
    """Its weight in `Document.read`, such as its bytes."""
    rows: Rows
    """Gives (label, content, fraction of this part that is read) from a document on; from its first
    document on if `documents` is None."""
    documents: int | None
    """Documents in it, None if unknown without reading them."""


@dataclass(frozen=True)
class Documents:
    """Documents in a fixed order. They can be read again, and from any of them on.

    Made by `open_documents`. Memory holds one document, or one block of a Parquet file.
    """

    name: str
    """The data as the caller named it."""
    parts: tuple[Part, ...]
    identity: str
    """Changes if the data does: a hash of sizes and samples of files, or of data in memory."""
    skipped: tuple[str, ...] = ()
    """Other files of the folder, which are not read."""

    @property
    def count(self) -> int | None:
        """The number of documents, None if unknown without reading them."""
        counts = [part.documents for part in self.parts]
        return None if None in counts else sum(count or 0 for count in counts)

    def __iter__(self) -> Iterator[Document]:
        return self.after(0)

    def after(self, first: int) -> Iterator[Document]:
        """The documents from number `first` on."""
        total = sum(part.size for part in self.parts) or 1.0
        begins = accumulate((part.size for part in self.parts), initial=0.0)
        for part, begin in zip(self.parts, begins, strict=False):
            known = part.documents is not None
            if part.documents is not None and part.documents <= first:
                first -= part.documents
                continue
            passed = first if known else 0  # where a line begins is known when it is reached
            for label, content, fraction in part.rows(passed):
                passed += 1
                if passed > first:
                    source = ":".join(filter(None, (part.name, label)))
                    yield Document(source, content, (begin + part.size * fraction) / total)
            first = max(0, first - passed)

    def skipped_in_words(self) -> str:
        """One line about the files that are not read; empty if all are."""
        if not self.skipped:
            return ""
        more = f" and {len(self.skipped) - _NAMED:,} more" if len(self.skipped) > _NAMED else ""
        files = "1 file" if len(self.skipped) == 1 else f"{len(self.skipped):,} files"
        return f"{self.name}: skips {files}, {', '.join(self.skipped[:_NAMED])}{more}"


def open_documents(
    data: Any,
    *,
    field: str | None = None,
    column: str | None = None,
    errors: str = "strict",
    length: int | None = None,
    vocab: int | None = None,
    dtype: str | None = None,
    without: str | Path | None = None,
    only_text: bool = False,
) -> Documents:
    """Documents of a file, a folder, a data set by name, or memory, without reading them all.

    | data | documents |
    |---|---|
    | .txt | the whole file is one document |
    | .jsonl | one a line: the field `text`, or `field`: a text, tokens, or messages |
    | .parquet, .arrow | one a row: the column `text`, else `input_ids`, else the only one |
    | .bin, .npy, .safetensors | token files, one a sequence, as `TokenFile` cuts them |
    | a folder | the files in it and in its folders, sorted by name; hidden files are left out |
    | a pattern, such as 'part-*.jsonl' | the files that it matches, sorted by name |
    | NAME:CONFIG:SPLIT | of `datasets.load_dataset`; CONFIG and SPLIT may be left out |
    | in memory | lists of texts, of token lists or of messages, arrays and tensors of tokens,
      `Sequences`, `Documents`, a data set of `datasets` |

    A file of tokens without a length of its sequences is one document, unless `length` cuts it.

    Args:
        data: one of these.
        field: the field of .jsonl.
        column: the column, or the tensor of safetensors.
        errors: how invalid UTF-8 is decoded, and halves of surrogate pairs: "strict" (an error with
            the place), "replace", "ignore" or "backslashreplace", as in `bytes.decode`.
        length, vocab, dtype: of token files, as in `TokenFile.open`.
        without: a folder whose files are not documents, such as the results folder, which may lie
            in the folder of the data.
        only_text: skip the token files of a folder, which are named as other files are.

    Raises:
        ValueError: the data does not exist or is of another kind; a missing field or column; text
            that is not UTF-8. Some are raised while documents are read; all name the place.

    Example:
        >>> [document.content for document in open_documents(["one", "two"])]
        ['one', 'two']
    """
    if errors not in ERRORS:
        raise ValueError(f"errors must be one of {', '.join(ERRORS)}, got {errors!r}")
    options: dict[str, Any] = {"field": field, "column": column, "errors": errors}
    shape = {"length": length, "vocab": vocab, "dtype": dtype}
    if isinstance(data, Documents):
        return data
    if isinstance(data, SequenceSet):
        description = json.dumps(data.description())
        return Documents(data.kind, (_sequence_part("", lambda: data),), _hash(description))
    if is_dataset(data):
        return _of_dataset("datasets", data, column)
    if not isinstance(data, str | Path):
        return _of_memory(data, errors)
    if not str(data):
        raise ValueError("data is an empty name: give a file, a folder, or . for this folder")
    path = user_path(data)
    is_set = find_manifest(path.absolute()) is not None
    if path.is_dir() and not is_set:
        found = sorted(one for one in path.rglob("*") if one.is_file())
        if without is not None:
            root, left = path.resolve(), user_path(without).resolve()
            found = [
                one for one in found if not (root / one.relative_to(path)).is_relative_to(left)
            ]
        return _of_files(str(data), path, found, options, shape, only_text)
    if not path.exists() and (found := sorted(Path(one) for one in glob(str(path)))):
        root = next(folder for folder in path.parents if not has_magic(str(folder)))
        return _of_files(str(data), root, found, options, shape, only_text)
    if path.suffix in TOKEN_FILES or is_set:
        part, files = _token_part(path, _in_utf8(path.name), column, shape)
        return Documents(str(data), (part,), fingerprint(files))
    if path.is_file():
        part = _file_part(path, _in_utf8(path.name), **options)
        return Documents(str(data), (part,), fingerprint([path]))
    if path.exists():
        raise ValueError(
            f"{data} is neither a file nor a folder: write its content to a file first"
        )
    if (isinstance(data, Path) and path.suffix) or _looks_like_a_path(str(data)):
        raise ValueError(f"{data} does not exist: give a file, a folder or the name of a data set")
    return _of_dataset(str(data), load_named(str(data)), column)


def _of_dataset(name: str, data: Any, column: str | None) -> Documents:
    rows, count = dataset_rows(name, data, column)
    part = Part("", 1.0, _checked(rows, name), count)
    return Documents(name, (part,), str(getattr(data, "_fingerprint", "")))


def _looks_like_a_path(name: str) -> bool:
    known = Path(name).suffix in {TEXT, LINES, *COLUMNAR, *TOKEN_FILES}
    return known or name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\n" in name


def _of_files(
    name: str,
    folder: Path,
    found: list[Path],
    options: dict[str, Any],
    shape: dict[str, Any],
    only_text: bool,
) -> Documents:
    """The documents of files below a folder."""
    names = {path: _in_utf8(str(path.relative_to(folder))) for path in found}
    shown = [path for path in found if not any(n[0] == "." for n in names[path].split("/"))]
    known = {TEXT, LINES, *COLUMNAR, *(() if only_text else TOKEN_FILES)}
    whole = [path for path in shown if not _is_beside(path)]
    is_read = {path: path.suffix in known and not _is_binary(path) for path in whole}
    files = [path for path in whole if is_read[path]]
    skipped = tuple(names[path] for path in whole if not is_read[path])
    if not files:
        raise ValueError(f"{name} holds no file of {', '.join(sorted(known))}: give another DATA")
    parts, read = [], []
    for path in files:
        if path.suffix in TOKEN_FILES:
            part, more = _token_part(path, names[path], None, shape)
        else:
            part, more = _file_part(path, names[path], **options), [path]
        parts.append(part)
        read += more
    # Files that are not read, such as .DS_Store, may come and go.
    identity = _hash(json.dumps([*(names[path] for path in files), fingerprint(read)]))
    return Documents(name, tuple(parts), identity, skipped)


def _is_beside(path: Path) -> bool:
    """True for the index, the manifest or the canaries of a token file."""
    return path.name.endswith((".idx", ".canaries.npy", *(f"{end}.json" for end in TOKEN_FILES)))


def _is_binary(path: Path) -> bool:
    """True for a file that is called text and begins with bytes that no text has."""
    if path.suffix not in (TEXT, LINES):
        return False
    with path.open("rb") as file:
        return b"\0" in file.read(_BEGINNING_BYTES)


def _hash(text: str) -> str:
    return str(xxhash.xxh3_64_hexdigest(text.encode(errors="surrogatepass")))


def _file_part(path: Path, name: str, field: str | None, column: str | None, errors: str) -> Part:
    """The documents of one file of text, lines or columns."""
    size = float(path.stat().st_size)
    if path.suffix == TEXT:
        return Part(name, size, lambda _: iter([("", whole_text(path, errors), 1.0)]), 1)
    if path.suffix == LINES:
        return Part(name, size, lambda _: lines(path, field or "text", errors), None)
    if path.suffix in COLUMNAR:
        rows, count = file_rows(path, column)
        return Part(name, size, _checked(rows, f"{path}"), count)
    known = ", ".join(sorted({TEXT, LINES, *COLUMNAR, *TOKEN_FILES}))
    raise ValueError(f"{path} has the suffix {path.suffix!r}: fastmem reads {known}")


def _checked(rows: Rows, where: str) -> Rows:
    """Rows of a column, each as a document."""

    def checked(first: int) -> Iterator[tuple[str, Content, float]]:
        for label, value, fraction in rows(first):
            content = (
                value if isinstance(value, str) else content_of(value, f"{where}, row {label},")
            )
            yield label, content, fraction

    return checked


def _in_utf8(name: str) -> str:
    """The name of a file, in which backslashes spell bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _token_part(
    path: Path, name: str, column: str | None, shape: dict[str, Any]
) -> tuple[Part, list[Path]]:
    """The sequences of a token file; a file without their length is one document."""
    absolute = path.absolute()
    known = shape["length"] is not None or find_manifest(absolute) or not path.is_file()
    if not known and path.suffix in TOKEN_FILES:
        dtype = None if shape["dtype"] is None else np.dtype(shape["dtype"])
        layout = read_layout(path, shape["vocab"], dtype, column)
        if layout.length is None:
            n, offset, kind = layout.tokens, layout.offset, layout.dtype

            def whole(_: int) -> Iterator[tuple[str, Tokens, float]]:
                yield "", np.memmap(path, kind, "r", offset, (n,)) if n else np.empty(0, kind), 1.0

            return Part(name, float(path.stat().st_size), whole, 1), [path]

    def opened() -> TokenFile:
        return TokenFile.open(path, column=column, **shape)

    return _sequence_part(name, opened), opened().files


def _sequence_part(name: str, opened: Callable[[], SequenceSet]) -> Part:
    """The sequences of a set, which is open only while they are read: a folder may have more files
    than a process may open."""
    sequences = opened()
    n, S = sequences.count, sequences.length
    step = max(1, _BLOCK_TOKENS // S)
    del sequences

    def rows(first: int) -> Iterator[tuple[str, Tokens, float]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they came when the set was opened first
            sequences = opened()
        for begin in range(first, n, step):
            for row, tokens in enumerate(sequences[begin : begin + step], begin):
                yield f"{row}", tokens, (row + 1) / n

    return Part(name, float(n * S), rows, n)


def _of_memory(data: Any, errors: str) -> Documents:
    """The documents of a list, an array or a tensor; one row of integers is one document."""
    if isinstance(data, Tensor):
        data = data.detach().cpu().numpy()
    if isinstance(data, np.ndarray) and data.ndim == 1 and data.dtype.kind in "iu":
        data = data[None]
    if isinstance(data, Mapping | bytes) or not hasattr(data, "__len__"):
        raise ValueError(
            f"data must be a path, a list of documents or an array of tokens, got "
            f"{reprlib.repr(data)} ({type(data).__name__}); use for example list(texts)"
        )
    whole = list(data)
    if whole and all(isinstance(one, int | np.integer) for one in whole):
        whole = [np.asarray(whole)]
    found = [content_of(content, f"document {i}", errors) for i, content in enumerate(whole)]
    digest = xxhash.xxh3_64()
    for one in found:
        digest.update(b"%d:" % len(one))
        in_json = "" if isinstance(one, np.ndarray) else json.dumps(one)
        digest.update(in_json.encode() or np.asarray(one, "<i8").tobytes())
    total = len(found)

    def rows(first: int) -> Iterator[tuple[str, Content, float]]:
        return ((f"{i}", found[i], (i + 1) / total) for i in range(first, total))

    return Documents("memory", (Part("", 1.0, rows, total),), digest.hexdigest())


def standard_library() -> Documents:
    """The sources of the running interpreter's standard library, without its tests."""
    root, paths = Path(sysconfig.get_path("stdlib")), []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    paths.sort()
    parts = tuple(
        Part(str(path.relative_to(root)), float(path.stat().st_size), partial(_source, path), 1)
        for path in paths
    )
    return Documents("the standard library", parts, fingerprint(paths))


def _source(path: Path, first: int) -> Iterator[tuple[str, str, float]]:
    yield "", path.read_text("utf-8", "replace"), 1.0
