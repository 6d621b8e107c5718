"""The console script, also as python -m fastmem."""

import os
import signal
import sys

from fastmem.base.openmp import default_spin


def command() -> None:
    """Runs main, with OpenMP threads that sleep soon when they wait."""
    os.environ.update(default_spin())
    try:
        from fastmem.cli.main import main
    except KeyboardInterrupt:  # in the seconds in which torch loads
        sys.exit(128 + signal.SIGINT)
    main()


if __name__ == "__main__":
    command()
