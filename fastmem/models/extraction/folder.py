"""The files of a folder of extraction: settings, parts, the table and the rates."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fastmem.base.storage import Row
from fastmem.data.files.parquet import write_table
from fastmem.models.extraction.measure import Columns, Cursor
from fastmem.models.scoring.folder import PARTS, PartsFolder, check_settings, read_columns

SETTINGS = "extraction-settings.json"
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


class ExtractionFolder(PartsFolder):
    """A folder of extraction, of one model on one or two data sets.

    Each chunk is one part file, whole or not there, whose metadata say where the next begins.
    """

    settings = SETTINGS
    files = (RATES, TABLE, PASSAGES, PAGE)
    kinds = tuple(f"{name}-*.parquet" for name in SETS)

    def check(self, settings: Row) -> bool:
        """True if these sequences are measured; False if not begun or not finished.

        Raises:
            ValueError: the folder has other files, or rates with other settings.
        """
        finished = (self.path / RATES).exists()
        begun = finished or self.begun()
        kind, results = "run of fastmem extract", "extraction rates"
        check_settings(self.path, SETTINGS, settings, begun, kind, results)
        return finished and (self.path / SETTINGS).exists()

    def begun(self) -> bool:
        return any(self.parts(name) for name in SETS)

    def add(self, name: str, number: int, columns: Columns, end: Cursor, state: Row) -> None:
        """Writes a chunk of the set `name` as its part `number`."""
        metadata = {_STATE: json.dumps({"cursor": end, **state}).encode()}
        table = _table(name, columns).replace_schema_metadata(metadata)
        write_table(self._part(name, number), table, compression="zstd")

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
        state = json.loads(self.opened(self._part(name, number - 1)).schema_arrow.metadata[_STATE])
        return Cursor(*state.pop("cursor")), state

    def merge(self) -> None:
        """Makes one table of the parts of all sets."""
        import pyarrow

        tables = [
            self.opened(self._part(name, number)).read().replace_schema_metadata(None)
            for name in SETS
            for number in range(self.parts(name))
        ]
        write_table(self.path / TABLE, pyarrow.concat_tables(tables), compression="zstd")

    def read(self) -> Columns:
        """The columns of all sequences; unknown numbers are NaN."""
        return read_columns(self.path / TABLE)


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
