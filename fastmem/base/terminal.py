"""Text for a terminal: a line beside a progress bar, a table, a duration; and Ctrl-C."""

import io
import sys
import threading
from collections.abc import Sequence

from tqdm import tqdm

INTERRUPTED = threading.Event()
"""Set by Ctrl-C. Python drops a KeyboardInterrupt that falls into a finalizer; a sweep then stops
after the run in progress."""


def say(line: str) -> None:
    """Writes a line to standard error, above the progress bar if one is shown."""
    tqdm.write(line, file=sys.stderr)


def table(rows: Sequence[Sequence[str]], rule: bool = False) -> str:
    """Rows of cells, the head first, as text in columns; `rule` draws a line below the head."""
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table

    style = Box("    \n" * 2 + " -  \n" + "    \n" * 5)
    grid = Table(*rows[0], box=style, show_edge=False, padding=(0, 1, 0, 0), show_header=rule)
    for row in rows[rule:]:
        grid.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=10_000, color_system=None, markup=False, highlight=False).print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def duration(seconds: float) -> str:
    """Seconds in the unit that a reader thinks in.

    Example:
        >>> [duration(s) for s in (0.5, 90.0, 7200.0, 864_000.0, 1e10)]
        ['0.5 s', '1.5 min', '2.0 h', '10 days', '317 years']
    """
    for size, unit in ((365.25 * 86400, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size or (unit == "min" and seconds >= size):
            number = seconds / size
            return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def interrupt(signal_number: int, frame: object) -> None:
    """The handler of SIGINT."""
    INTERRUPTED.set()
    raise KeyboardInterrupt
