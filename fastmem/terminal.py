"""What the commands share: a line to the user, and Ctrl-C."""

import sys
import threading

from tqdm import tqdm

INTERRUPTED = threading.Event()
"""Set by Ctrl-C. Python drops the exception where it falls into a finalizer; then a sweep stops
after the run that it is at."""


def say(line: str) -> None:
    """Writes a line to standard error, above the bar if there is one."""
    tqdm.write(line, file=sys.stderr)


def interrupt(signal_number: int, frame: object) -> None:
    """The handler of SIGINT."""
    INTERRUPTED.set()
    raise KeyboardInterrupt
