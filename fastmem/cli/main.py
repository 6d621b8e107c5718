"""The commands: fastmem capacity, train, score, report, generate, verify."""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeVar

import tyro

import fastmem
from fastmem.base.terminal import INTERRUPTED, interrupt, say
from fastmem.cli.data import Generate, Verify, run_generate, run_verify
from fastmem.cli.folder import Predict, Watch, run_predict, run_watch
from fastmem.cli.model import Score, Train, run_score, run_train
from fastmem.cli.sweep import Capacity, Report, capacity_defaults, run_capacity, run_report

Config = TypeVar("Config")

COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "capacity": (Capacity, run_capacity),
    "train": (Train, run_train),
    "score": (Score, run_score),
    "report": (Report, run_report),
    "predict": (Predict, run_predict),
    "watch": (Watch, run_watch),
    "generate": (Generate, run_generate),
    "verify": (Verify, run_verify),
}

USAGE = f"""usage: fastmem COMMAND [flags]

How much a language model memorizes, in bits ({fastmem.__version__}).

  capacity   train a sweep; print and draw capacity and bits per parameter
  train      train one model on one data set
  score      count the bits of a data set that a model holds
  report     make the table, capacity.json and figures again from a folder's rows
  watch      show a sweep while it runs
  predict    fit the scaling law to a folder's rows; the capacity of any shape
  generate   write a data set as files that other tools read
  verify     make a data set again from its manifest and compare its files with it

fastmem COMMAND --help explains each, with an example. To begin: fastmem capacity"""


def command() -> None:
    """The console script: main, in a process whose OpenMP threads soon sleep when they wait."""
    # Threads that spin make two runs on the same cores 40 times slower each (docs/results.md).
    # The setting is read when torch loads, so only a new process can have another.
    told = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if not told and sys.argv[1:2] in (["capacity"], ["train"]):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GOMP_SPINCOUNT": "1000"})
    main()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. Exits with 0, 1 if a run failed, 2 for bad input, 130 on Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    INTERRUPTED.clear()
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        sys.exit(_run(arguments))
    except KeyboardInterrupt:
        say("\nstopped: what is finished is kept, and the same command goes on from there")
        sys.exit(130)
    except (ValueError, OSError) as error:
        say(f"fastmem: {' '.join(str(error).split())}{_fix(error)}")
        sys.exit(2)
    finally:
        signal.signal(signal.SIGINT, before)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fastmem {fastmem.__version__}")
        return 0
    name, *flags = arguments
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}: use one of {', '.join(COMMANDS)}")
    kind, run = COMMANDS[name]
    default = capacity_defaults(flags) if kind is Capacity else None
    return run(_parse(kind, f"fastmem {name}", flags, default))


def _parse(kind: type[Config], prog: str, flags: list[str], default: Config | None) -> Config:
    """The flags as a config; what tyro draws as a box of error becomes one line."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            if default is None:
                return tyro.cli(kind, prog=prog, args=flags)
            return tyro.cli(kind, prog=prog, args=flags, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        # A title, then the error, a rule, and flags that may have been meant.
        lines = [line.strip(" │╭╮╰╯") for line in told.getvalue().splitlines()[1:]]
        parts = [list(part) for rule, part in groupby(lines, _is_rule) if not rule]
        error = " ".join(parts[0])
        hints = [line for part in parts[1:] for line in part if line.startswith("--")]
        meant = f"; perhaps {' or '.join(hints)}" if hints else ""
        raise ValueError(f"{error}{meant}; see {prog} --help") from None


def _is_rule(line: str) -> bool:
    return set(line) <= {"─", "-"}


def _fix(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ": what is finished is kept; free some space and give the same command again"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return ": give --out a folder"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return ": give --out a folder that can be written"
    return ""
