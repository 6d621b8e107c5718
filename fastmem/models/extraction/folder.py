"""The files of a folder of extraction: settings, parts, the table and the rates."""

import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastmem.base.storage import Row, write_json, write_whole
from fastmem.data.files.parquet import pyarrow_parquet
from fastmem.models.extraction.measure import Columns, Cursor
from fastmem.models.scoring.folder import check_settings, read_columns

SETTINGS, PARTS = "extraction-settings.json", "parts"
TABLE, RATES, PASSAGES, PAGE = (
    "sequences.parquet",
    "extraction.json",
    "passages.json",
    "extraction.html",
)
SETS = ("train", "test")
_STATE = b"fastmem"
_WHOLE = ("greedy_from", "longest_run", "matched_")
"""Beginnings of the columns of whole numbers."""


class ExtractionFolder:
    """A folder of extraction, of one model on one or two data sets.

    Each chunk is one part file, whole or not there, whose metadata say where the next begins.
    """

    def __init__(self, path: Path) -> None:
        pyarrow_parquet()
        self.path = path

    def check(self, settings: Row) -> bool:
        """True if these sequences are measured; False if not begun or not finished.

        Raises:
            ValueError: the folder has other files, or rates with other settings.
        """
        finished = (self.path / RATES).exists()
        begun = finished or any(self.parts(name) for name in SETS)
        kind, results = "run of fastmem extract", "extraction rates"
        check_settings(self.path, SETTINGS, settings, begun, kind, results)
        return finished and (self.path / SETTINGS).exists()

    def begin(self, settings: Row) -> None:
        """Writes the settings unless a part exists."""
        if not any(self.parts(name) for name in SETS):
            write_json(self.path / SETTINGS, settings)

    def delete(self) -> None:
        """Deletes the files of extraction, and no others; nothing in a folder without them."""
        if not (self.path / SETTINGS).exists():
            return
        for name in (RATES, TABLE, PASSAGES, PAGE):
            (self.path / name).unlink(missing_ok=True)
        self.delete_parts()
        (self.path / SETTINGS).unlink()  # last: without it the other files are nobody's

    def delete_parts(self) -> None:
        for name in SETS:
            for path in (self.path / PARTS).glob(f"{name}-*.parquet"):
                path.unlink()
        with suppress(OSError):  # files that are not ours, or a folder that is not there
            (self.path / PARTS).rmdir()

    def add(self, name: str, number: int, columns: Columns, end: Cursor, state: Row) -> None:
        """Writes a chunk of the set `name` as its part `number`."""
        metadata = {_STATE: json.dumps({"cursor": end, **state}).encode()}
        table = _table(name, columns).replace_schema_metadata(metadata)
        buffer = io.BytesIO()
        pyarrow_parquet().write_table(table, buffer, compression="zstd")
        write_whole(self._part(name, number), buffer.getvalue())

    def _part(self, name: str, number: int) -> Path:
        return self.path / PARTS / f"{name}-{number:06d}.parquet"

    def parts(self, name: str) -> int:
        """The number of parts of a set."""
        number = 0
        while self._part(name, number).exists():
            number += 1
        return number

    def end(self, name: str) -> tuple[Cursor, Row]:
        """Where the last part of a set ends, and what was written with it."""
        number = self.parts(name)
        if not number:
            return Cursor(), {}
        state = json.loads(self._opened(name, number - 1).schema_arrow.metadata[_STATE])
        return Cursor(*state.pop("cursor")), state

    def _opened(self, name: str, number: int) -> Any:
        path = self._part(name, number)
        try:
            return pyarrow_parquet().ParquetFile(path)
        except (OSError, ValueError) as error:
            fix = "measure again with --overwrite"
            raise ValueError(f"{path} is damaged ({error}): {fix}") from None

    def merge(self) -> None:
        """Makes one table of the parts of all sets."""
        import pyarrow

        tables = [
            self._opened(name, number).read().replace_schema_metadata(None)
            for name in SETS
            for number in range(self.parts(name))
        ]
        buffer = io.BytesIO()
        pyarrow_parquet().write_table(pyarrow.concat_tables(tables), buffer, compression="zstd")
        write_whole(self.path / TABLE, buffer.getvalue())

    def read(self) -> Columns:
        """The columns of all sequences; unknown numbers are NaN."""
        return read_columns(self.path / TABLE)


def write_document(path: Path, value: Row) -> None:
    """Writes JSON, whole or not at all."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    write_whole(path, text.encode(errors="replace") + b"\n")


def _table(name: str, columns: Columns) -> Any:
    """The columns of a chunk as an Arrow table; unknown numbers are null."""
    import pyarrow

    found = {"set": pyarrow.array([name] * len(columns["document"]), pyarrow.string())}
    for column, values in columns.items():
        if column == "source":
            found[column] = pyarrow.array(values, pyarrow.string())
        elif column.startswith(_WHOLE):
            known = ~np.isnan(values)
            whole = np.where(known, values, 0).astype(np.int64)
            found[column] = pyarrow.array(whole, mask=~known)
        else:
            found[column] = pyarrow.array(values, from_pandas=True)
    return pyarrow.table(found)
