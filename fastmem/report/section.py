"""A section of the report, and how numbers with percent look in it."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from fastmem.base.storage import Row
from fastmem.report.figures import Draw

PERCENT = "\N{NO-BREAK SPACE}%"
STORE_BITS = "--sequence-bits"
ANEW = "in a new folder, "


@dataclass(frozen=True)
class Section:
    """A section of the report. Without `draw` it is not measured, and the sentence says why."""

    name: str
    """Name of the figure files, and id in the page."""
    title: str
    sentence: str
    how: str = ""
    """How to read the figure."""
    draw: Draw | None = None
    data: Sequence[Row] = ()
    """The numbers in the figure; a field that a record lacks is empty."""
    flags: str = ""
    """The flags with which a sweep gives this figure."""
    facts: Sequence[tuple[str, str]] = ()
    """Pairs of a name and a number, shown below the figure."""

    def csv(self) -> str:
        """The data as CSV, one record a line, numbers in full."""
        text = io.StringIO()
        fields = dict.fromkeys(field for record in self.data for field in record)
        writer = csv.DictWriter(text, list(fields), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.data)
        return text.getvalue()
