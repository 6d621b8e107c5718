"""Text for a terminal: output that cannot fail, a line, a table, a duration; and Ctrl-C."""

import codecs
import io
import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, Self, TextIO, cast

from tqdm import tqdm

LINE_SECONDS = 30.0
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
def unfailing_output(muted: bool = False) -> Iterator[Output]:
    """Makes standard output and standard error an Output; yields the first.

    muted: drop both, as ranks other than the first do.
    """
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # Python has None for a stream that is closed
        out, err = (Output(nowhere if muted or not stream else stream) for stream in before)
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
    tqdm.write(_fitted(line, sys.stderr), file=sys.stderr)


def show(text: str) -> None:
    """Prints the result of a command."""
    print(_fitted(text, sys.stdout))


def _fitted(text: str, stream: TextIO) -> str:
    """The text with lines that a terminal would break in a word broken between words."""
    width = _width(stream)
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent="    ", break_on_hyphens=False)
        if len(line) > width
        else line
        for line in text.split("\n")
    )


class _Held(Output):
    """A stream whose text is held back; its encoding and colours stay."""

    held = ""

    def write(self, text: str) -> int:
        self.held += text
        return len(text)


@contextmanager
def wrapped_output() -> Iterator[None]:
    """Breaks lines wider than the terminal (80 columns where its width is unknown) between words.

    What is printed inside appears at the end. A command after `Example: ` is broken as in a shell.
    """
    held = _Held(sys.stdout)
    try:
        with redirect_stdout(cast(TextIO, held)):
            yield
    finally:
        width = shutil.get_terminal_size().columns
        for line in held.held.splitlines():
            print(_wrapped(line, width))


def _wrapped(line: str, width: int) -> str:
    if len(re.sub(r"\x1b\[[\d;]*m", "", line)) <= width:
        return line
    words = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    if not line.startswith("Example: "):
        return words.fill(line)
    words.width, words.subsequent_indent = width - 2, "    "
    return " \\\n".join(words.wrap(line))


def _width(stream: TextIO) -> int:
    """Columns of a terminal; enough for any line where the stream is not a terminal."""
    return shutil.get_terminal_size().columns if stream.isatty() else 10_000


class Lines:
    """A progress bar where none can be drawn, such as in a log: a line every LINE_SECONDS."""

    disable = False

    def __init__(self, desc: str | None, total: float | None, initial: float, unit: str) -> None:
        self._name, self._total, self._unit, self.n = desc or "progress", total, unit, initial
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        self.n += n

    def set_description_str(self, desc: str, refresh: bool = True) -> None:
        self._name = desc

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        if time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            total = "" if self._total is None else f"/{self._total:,.0f}"
            say(f"{self._name}: {self.n:,.0f}{total}{self._unit}, {text}")

    def close(self) -> None:
        """Says nothing more."""


def progress_bar(
    show: bool, total: float | None, bar_format: str, initial: float = 0, **options: Any
) -> Any:
    """A progress bar of tqdm on a terminal or in a notebook, as wide as the terminal; else Lines.

    Args:
        show: False draws nothing.
        total: the end; None if unknown.
        bar_format: as tqdm takes it.
        initial: the position.
        options: desc and unit, as tqdm takes them.
    """
    from tqdm.auto import tqdm as bar

    notebook = any(kind.__name__ == "tqdm_notebook" for kind in bar.__mro__)
    if show and not notebook and not sys.stderr.isatty():
        return Lines(options.get("desc"), total, initial, options.get("unit", ""))
    # A notebook draws the bar itself. In a terminal the text keeps its place.
    bar_format = (
        bar_format.replace("|{bar}|", "{bar}")
        if notebook
        else bar_format.replace("{bar}", "{bar:8}")
    )
    return bar(
        total=total,
        initial=initial,
        bar_format=bar_format,
        disable=not show,
        dynamic_ncols=True,
        leave=False,
        **options,
    )


def table(rows: Sequence[Sequence[str]], rule: bool = False) -> str:
    """Rows of cells, the head first, as text in columns; `rule` draws a line below the head.

    Where a terminal is too narrow for more than four columns, rows become columns, as many beside
    each other as fit.
    """
    width = _width(sys.stdout)
    if len(rows[0]) <= 4 or _needs(rows) <= width:
        return _grid(rows, rule, width)
    blocks = [[rows[0]]]
    for row in rows[1:]:
        if len(blocks[-1]) > 1 and _needs(list(zip(*blocks[-1], row, strict=True))) > width:
            blocks.append([rows[0]])
        blocks[-1].append(row)
    return "\n\n".join(_grid(list(zip(*block, strict=True)), rule, width) for block in blocks)


def _needs(rows: Sequence[Sequence[str]]) -> int:
    """Columns of a terminal that a table takes, with two between cells."""
    return sum(2 + max(map(len, cells)) for cells in zip(*rows, strict=True)) - 2


def _grid(rows: Sequence[Sequence[str]], rule: bool, width: int) -> str:
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table

    style = Box("    \n" * 2 + " -  \n" + "    \n" * 5)
    grid = Table(*rows[0], box=style, show_edge=False, padding=(0, 1, 0, 0), show_header=rule)
    for row in rows[rule:]:
        grid.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=width + 1, color_system=None, markup=False, highlight=False).print(grid)
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
