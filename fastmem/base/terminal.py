"""What the commands share: a line to the user, a table, and Ctrl-C."""

import sys
import threading
from collections.abc import Sequence

from tqdm import tqdm

INTERRUPTED = threading.Event()
"""Set by Ctrl-C. Python drops the exception where it falls into a finalizer; then a sweep stops
after the run that it is at."""


def say(line: str) -> None:
    """Writes a line to standard error, above the bar if there is one."""
    tqdm.write(line, file=sys.stderr)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def interrupt(signal_number: int, frame: object) -> None:
    """The handler of SIGINT."""
    INTERRUPTED.set()
    raise KeyboardInterrupt
