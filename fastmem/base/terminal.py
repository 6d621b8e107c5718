"""Text for a terminal: output that cannot fail, a line, a table, a duration; and Ctrl-C."""

import codecs
import io
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from tqdm import tqdm

INTERRUPTED = threading.Event()
"""Set by Ctrl-C. Python drops a KeyboardInterrupt that falls into a finalizer; a sweep then stops
after the run in progress."""


_PLAIN = {"×": "x", "\N{MINUS SIGN}": "-", "–": "-", "…": "...", "·": ","}
"""Characters of the output in ASCII; others become a question mark."""


class Output:
    """A stream whose writes never fail, since output must not end a run.

    Characters that the encoding of the stream lacks are replaced. After an error, such as of a
    closed pipe or a full disk, the rest of the output is dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        """The error of the stream, except for a reader that closed its pipe."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        self._do(self._stream.write, text.encode(encoding, "fastmem.plain").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, action: Any, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.error = error
            # What the stream still holds goes nowhere, and Python's last flush succeeds.
            with suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def unfailing_output() -> Iterator[Output]:
    """Makes standard output and standard error an Output; yields the first."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # Python has None for a stream that is closed
        out, err = (Output(stream or nowhere) for stream in before)
        sys.stdout, sys.stderr = out, err
        try:
            yield out
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before


def _plain(error: UnicodeError) -> tuple[str, int]:
    """The error handler of a codec: replaces characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error("fastmem.plain", _plain)


def say(line: str) -> None:
    """Writes a line to standard error, above the progress bar if one is shown."""
    tqdm.write(line, file=sys.stderr)


def table(rows: Sequence[Sequence[str]], rule: bool = False) -> str:
    """Rows of cells as text, each column as wide as its widest cell.

    Args:
        rows: the first is the head of the table.
        rule: draws a line below the head.

    Example:
        >>> print(table([("model", "bits"), ("1 × 32", "9")], rule=True))
        model   bits
        ------- -----
        1 × 32  9
    """
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
    """The handler of SIGINT and SIGTERM."""
    INTERRUPTED.set()
    raise KeyboardInterrupt(signal_number)
