"""The files of a folder of scores: settings, parts, tables and the summary."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from fastmem.base.lock import LOCK, SEEN_SECONDS
from fastmem.base.storage import (
    Row,
    check_folder,
    read_json,
    whole_file,
    write_json,
)
from fastmem.data.files.parquet import dictionaries, pyarrow_parquet, write_table
from fastmem.models.scoring.chunks import (
    DOCUMENT_COLUMNS,
    STATISTICS,
    TOKEN_TYPES,
    Chunk,
    Columns,
    Cursor,
)
from fastmem.models.scoring.passages import Passages

SETTINGS, PARTS, SUMMARY = "settings.json", "parts", "summary.json"
TOKENS, DOCUMENTS, PASSAGES, PAGE = (
    "tokens.parquet",
    "documents.parquet",
    "passages.json",
    "score.html",
)
SUMMED = ("tokens", "coded_tokens", "bytes", "bits", "zlib_bits", "lossy")
"""Columns of documents whose sums the summary has."""
WINDOWED = "windowed_documents"
"""The sum of documents that are longer than the context."""
UNKNOWN = ("bytes", "zlib_bits", "lossy")
"""Sums that are None if a document has no text."""
_STATE = b"fastmem"
_COMPRESSION = "zstd"


class PartsFolder(ABC):
    """A folder of results that are measured in parts, and merged at the end."""

    settings: ClassVar[str]
    """The file of the settings."""
    files: ClassVar[tuple[str, ...]]
    """The other files at the end."""
    kinds: ClassVar[tuple[str, ...]]
    """Patterns of the part files."""

    def __init__(self, path: Path) -> None:
        pyarrow_parquet()
        self.path = path

    @abstractmethod
    def begun(self) -> bool:
        """True if a part exists."""

    def begin(self, settings: Row) -> None:
        """Writes the settings unless a part exists."""
        if not self.begun():
            write_json(self.path / self.settings, settings)

    def delete(self) -> None:
        """Deletes the files of results, and no others; nothing in a folder without results."""
        if not (self.path / self.settings).exists():
            return
        for name in self.files:
            (self.path / name).unlink(missing_ok=True)
        self.delete_parts()
        (self.path / self.settings).unlink()  # last: without it the other files are nobody's

    def delete_parts(self) -> None:
        """Deletes the part files."""
        folder = self.path / PARTS
        for path in [path for kind in self.kinds for path in folder.glob(kind)]:
            path.unlink()
        with suppress(OSError):  # files that are not ours, or a folder that is not there
            folder.rmdir()

    def opened(self, path: Path) -> Any:
        """A part as pyarrow's ParquetFile; ValueError if it is damaged."""
        try:
            return pyarrow_parquet().ParquetFile(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): begin again with --overwrite") from None


class ScoreFolder(PartsFolder):
    """A folder of scores, of one model on one data set.

    Each chunk is two part files, whole or not there: the documents that end in the chunk, then its
    tokens, whose metadata say where the next chunk begins.
    """

    settings = SETTINGS
    files = (SUMMARY, TOKENS, DOCUMENTS, PASSAGES, PAGE)
    kinds = ("*.tokens.parquet", "*.documents.parquet")

    def check(self, settings: Row) -> bool:
        """True if the scores with these settings are finished; False if not begun or not finished.

        Raises:
            ValueError: the folder has other files, or scores with other settings.
        """
        finished = (self.path / SUMMARY).exists()
        check_settings(self.path, SETTINGS, settings, self.begun() or finished, "score", "scores")
        return finished

    def begun(self) -> bool:
        return bool(self.parts())

    def add(self, number: int, chunk: Chunk, state: Row) -> None:
        """Writes a chunk as part `number`."""
        self._write(number, "documents", documents_table(chunk.documents))
        end = {**asdict(chunk.end), **state}
        metadata = {_STATE: json.dumps(end).encode()}
        self._write(number, "tokens", tokens_table(chunk.tokens).replace_schema_metadata(metadata))

    def _write(self, number: int, kind: str, table: Any) -> None:
        write_table(self._part(number, kind), table, compression=_COMPRESSION)

    def _part(self, number: int, kind: str) -> Path:
        return self.path / PARTS / f"{number:06d}.{kind}.parquet"

    def parts(self) -> int:
        """The number of parts."""
        number = 0
        while self._part(number, "tokens").exists():
            number += 1
        return number

    def expect(self, parts: int) -> None:
        """Waits until the parts of other ranks are seen, which a network file system delays."""
        end = time.monotonic() + SEEN_SECONDS
        while (found := self.parts()) < parts:
            if time.monotonic() > end:
                raise ValueError(
                    f"{self.path} shows {found} of {parts} parts: give --out on a file system that "
                    "all nodes see"
                )
            time.sleep(0.2)

    def resume(self) -> tuple[int, Cursor, Row]:
        """The number of parts, where the last one ends, and what was written with it. Deletes the
        parts of other ranks that a killed run left after a missing part."""
        number = self.parts()
        for path in (self.path / PARTS).glob("*.parquet"):
            if path.name[:6].isdigit() and int(path.name[:6]) >= number:
                path.unlink()
        if not number:
            return 0, Cursor(), {}
        schema = self.opened(self._part(number - 1, "tokens")).schema_arrow
        state = json.loads(schema.metadata[_STATE])
        cursor = {name: state.pop(name) for name in asdict(Cursor())}
        return number, Cursor(**cursor), state

    def merge(self, passages: Passages, also: Sequence[str], context: int | None) -> Row:
        """Makes one table of the parts, row group by row group; gives the sums of its documents."""
        sums: Row = dict.fromkeys(("documents", *SUMMED, WINDOWED), 0)
        nulls = dict.fromkeys(UNKNOWN, 0)

        def see(tokens: Any) -> None:
            names = ("document", "position", "token", "bits")
            passages.add(*(tokens[name].to_numpy() for name in names))

        def add(documents: Any) -> None:
            passages.name(documents["document"].to_numpy(), documents["source"])
            sums["documents"] += documents.num_rows
            for name in SUMMED:
                sums[name] += np.nansum(documents[name].to_numpy()).item()
            sums[WINDOWED] += windowed(documents["coded_tokens"].to_numpy(), context)
            for name in UNKNOWN:
                nulls[name] += documents[name].null_count

        columns = ("document", "position", "token", "bits", *(STATISTICS[word] for word in also))
        self._merge(TOKENS, "tokens", tokens_table(dict.fromkeys(columns, ())), see)
        passages.finish()
        self._merge(DOCUMENTS, "documents", documents_table({}), add)
        return sums | {name: None for name in UNKNOWN if nulls[name] or not sums["documents"]}

    def _merge(self, name: str, kind: str, empty: Any, each: Callable[[Any], None]) -> None:
        count, write = self.parts(), pyarrow_parquet().ParquetWriter
        schema = empty.schema
        if count:
            schema = self.opened(self._part(0, kind)).schema_arrow.remove_metadata()
        options = {"compression": _COMPRESSION, "use_dictionary": dictionaries(schema)}
        with whole_file(self.path / name) as file, write(file, schema, **options) as writer:
            for number in range(count):
                table = self.opened(self._part(number, kind)).read().replace_schema_metadata(None)
                if table.num_rows:
                    writer.write_table(table, row_group_size=table.num_rows)
                each(table)


def check_settings(
    path: Path, name: str, settings: Row, begun: bool, kind: str, results: str
) -> None:
    """Refuses a folder with other files, or with results of other settings.

    Args:
        path: the folder.
        name: the file of the settings in it.
        settings: the name and the identity of each setting.
        begun: whether the folder has results; without any, nothing is mixed.
        kind, results: what the folder is of, and what it has, such as "score" and "scores".

    Raises:
        ValueError: names the first file, or the first setting that differs.
    """
    own = (name,)
    names = {p.name for p in path.iterdir()} if path.is_dir() else set()
    if names and names <= {LOCK, f".{name}.part"}:
        own = (LOCK,)  # of a process that was killed before it wrote the settings
    check_folder(path, own, kind)
    if not begun or not (path / name).exists():
        return
    theirs, ours = read_json(path / name), json.loads(json.dumps(settings))
    for setting, (what, value) in ours.items():
        there = theirs.get(setting, [None, None])
        if there[1] != value:
            differs = f"{setting} is {there[0]} there, {what} here"
            if there[0] == what:
                differs = f"{setting} {what} is not what it was"
            raise ValueError(
                f"{path} holds other {results} ({differs}): "
                f"give another --out, the same {setting}, or --overwrite"
            )


def windowed(coded: ArrayLike, context: int | None) -> int:
    """The number of documents that have more coded tokens than the model reads at once."""
    return 0 if context is None else int((np.asarray(coded) > context).sum())


def tokens_table(columns: Columns) -> Any:
    """The columns of tokens as an Arrow table."""
    import pyarrow

    columns = {name: columns[name] for name in TOKEN_TYPES if name in columns}
    return pyarrow.table({
        name: values if isinstance(values, np.ndarray) else np.asarray(values, TOKEN_TYPES[name])
        for name, values in columns.items()
    })  # fmt: skip


def documents_table(columns: Columns) -> Any:
    """The columns of documents as an Arrow table; unknown values are null."""
    import pyarrow

    types = {
        "source": pyarrow.string(),
        "bits": pyarrow.float64(),
        "bits_per_byte": pyarrow.float64(),
    }
    return pyarrow.table({
        name: pyarrow.array(columns.get(name, ()), types.get(name, pyarrow.int64()))
        for name in DOCUMENT_COLUMNS
    })  # fmt: skip


def read_columns(path: Path, names: Sequence[str] | None = None) -> Columns:
    """The columns of a Parquet file, all or those with these names, as NumPy arrays; an unknown
    number is NaN."""
    table = pyarrow_parquet().read_table(path, columns=names)
    return {name: table[name].to_numpy() for name in table.column_names}
