"""Chooses a command, parses its flags, exits with its code."""

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
import tyro

import fastmem
from fastmem import _core
from fastmem.base.ranks import Stopped, is_first, launched
from fastmem.base.terminal import (
    INTERRUPTED,
    interrupt,
    say,
    table,
    unfailing_output,
    wrapped_output,
)
from fastmem.cli.capacity import Capacity, capacity_defaults, run_capacity
from fastmem.cli.dataset import Structure
from fastmem.cli.extract import Extract, run_extract
from fastmem.cli.flags import REGISTRY
from fastmem.cli.generate import Generate, run_generate
from fastmem.cli.membership import Membership, run_membership
from fastmem.cli.predict import Predict, run_predict
from fastmem.cli.report import Report, run_report
from fastmem.cli.score import Score, StructuredScore, default_device, run_score
from fastmem.cli.text import Text, run_text, text_defaults
from fastmem.cli.train import Train, run_train
from fastmem.cli.verify import Verify, run_verify
from fastmem.cli.watch import Watch, run_watch
from fastmem.sweeps.rows import environment
from fastmem.training.group import checkpoint_seconds


@dataclass(frozen=True)
class Completion:
    """Prints the script with which a shell completes commands and flags.

    Example: fastmem completion bash > ~/.local/share/bash-completion/completions/fastmem
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    """bash (make the folder of the example first), zsh (a file _fastmem in a folder of fpath) or
    fish (~/.config/fish/completions/fastmem.fish)."""


def run_completion(command: Completion) -> int:
    kinds: dict[str, Callable[..., Any]] = {name: kind for name, (kind, _) in COMMANDS.items()}
    # tyro says that it prefers to write a file, which a redirection does.
    flags = ["--tyro-print-completion", command.shell]
    with contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(kinds, prog="fastmem", args=flags, registry=REGISTRY)
    return 0


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "capacity": (Capacity, run_capacity),
    "text": (Text, run_text),
    "train": (Train, run_train),
    "score": (Score, run_score),
    "extract": (Extract, run_extract),
    "membership": (Membership, run_membership),
    "report": (Report, run_report),
    "predict": (Predict, run_predict),
    "watch": (Watch, run_watch),
    "generate": (Generate, run_generate),
    "verify": (Verify, run_verify),
    "completion": (Completion, run_completion),
}

OF_RANKS = ("train", "score")
"""Commands that torchrun may start."""

STRUCTURE_FLAGS = {f"--{one.name.replace('_', '-')}" for one in fields(Structure)} | {
    "--repeat-share"
}
POSITIONAL = {"model", "data", "documents", "folder", "folders", "path", "shell"}
"""Settings that are named by a position, and not by a flag."""
STOPS = (signal.SIGINT, signal.SIGTERM)

USAGE = f"""usage: fastmem COMMAND [flags]

How much a language model memorizes, in bits ({fastmem.__version__}).

  capacity    train a sweep; print and draw capacity and bits per parameter
  text        measure what models memorize of real text, and what they learn
  train       train one model on one data set
  score       count the bits of documents, or of a memorized data set
  extract     measure what a model gives back of its training sequences
  membership  tell members of the training set from non-members
  report      write the page of a folder again, with its table and figures
  watch       show a sweep while it runs
  predict     fit the scaling law to a sweep; predict the capacity of any shape
  generate    write a data set as files that other tools read
  verify      compare the files of a data set with its manifest
  completion  print the completion of bash, zsh or fish

fastmem COMMAND --help explains each, with an example.
To begin: fastmem capacity"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. Exits with 0, 1 if a run failed, 2 for bad input, 130 on Ctrl-C and 143 on
    SIGTERM."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    INTERRUPTED.clear()
    before = {number: signal.signal(number, interrupt) for number in STOPS}
    try:
        if not is_first() and os.environ.get("LOCAL_RANK") == "0":
            _check_flags(arguments)
        with unfailing_output(muted=not is_first()) as output:
            code = _exit_code(arguments)
            output.flush()
            if output.error and not code:
                say(f"fastmem: standard output could not be written: {output.error.strerror}")
                code = 2
        sys.exit(code)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_flags(arguments: list[str]) -> None:
    """Exits with 2 and the error of wrong flags, once a node: the rank that speaks does not have
    the error if this node was started with other flags."""
    with unfailing_output(), contextlib.suppress(IndexError, KeyError):
        try:
            parse(arguments[0], arguments[1:])
        except ValueError as error:
            say(f"fastmem: {_as_typed(_text(error), arguments[0])}")
            sys.exit(2)
        except KeyboardInterrupt as stop:
            sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))


def _exit_code(arguments: list[str]) -> int:
    """Runs one command; says why it ended early."""
    try:
        return _run(arguments)
    except KeyboardInterrupt as stop:
        resumes = "it resumes without --overwrite"
        resumes = resumes if "--overwrite" in arguments else "the same command resumes"
        kept = "finished work"
        if arguments[0] == "train":
            kept = f"the work up to the last checkpoint, of every {checkpoint_seconds():g} seconds,"
        kept = "all work" if isinstance(stop, Stopped) else kept
        say(f"\nstopped: {kept} is kept, and {resumes}")
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except (ValueError, OSError) as error:
        say(f"fastmem: {_as_typed(_text(error), arguments[0])}{_fix(error)}")
        return 2


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        found = environment(torch.device(default_device()))
        build = found["commit"] or "an installed package"
        cells = [("build", f"{build}, {Path(_core.__file__).name}")]
        cells += [(name, f"{found[name]}") for name in ("torch", "triton", "python", "device")]
        print(f"fastmem {fastmem.__version__}\n{table(cells)}")
        return 0
    name, *flags = arguments
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}: use one of {', '.join(COMMANDS)}")
    if launched() and name not in OF_RANKS:
        instead = ", and give --gpus-per-run" if name == "capacity" else ""
        raise ValueError(f"fastmem {name} is one process: leave torchrun out{instead}")
    return COMMANDS[name][1](parse(name, flags))


def parse(name: str, flags: list[str]) -> Any:
    """The config of a command from its flags.

    Raises:
        ValueError: values contradict each other.
        SystemExit: the flags ask for help, or one is wrong; tyro has printed the help, or the error
            with the help of this flag.
    """
    kind, named = COMMANDS[name][0], {flag.partition("=")[0] for flag in flags}
    if kind is Score and named & STRUCTURE_FLAGS:
        kind = StructuredScore
    default: Any = tyro.MISSING_NONPROP
    if kind in (Capacity, Text):
        if {"--counts", "--loads"} <= named:
            raise ValueError("--counts and --loads both give sizes: leave one out")
        default = capacity_defaults(flags) if kind is Capacity else text_defaults(flags)
    with wrapped_output():  # tyro breaks no line of a description
        return tyro.cli(
            kind, prog=f"fastmem {name}", args=flags, default=default, registry=REGISTRY
        )


def _flags(kind: type[Any]) -> dict[str, str]:
    """The flag of each field of a command, and of a value of a field that has several."""
    found: dict[str, str] = {}
    for name, of in get_type_hints(kind).items():
        nested = isinstance(of, type) and is_dataclass(of)
        found |= _flags(of) if nested else {name: f"--{name.replace('_', '-')}"}
    return {name.removesuffix("s"): flag for name, flag in found.items()} | found


def _as_typed(text: str, command: str) -> str:
    """An error with the names of fields as the flags that a user types."""
    flags = _flags(COMMANDS[command][0]) if command in COMMANDS else {}
    names = "|".join(flags)
    options = "|".join(name for name in flags if name not in POSITIONAL)
    text = re.sub(r"\[Errno \d+\] ", "", text)
    text = re.sub(r"\['(--[^]]*)'\]", lambda m: m[1].replace("', '", " "), text)
    text = text.replace("steps, epochs and seconds", "--steps, --epochs and --seconds")
    if "overwrite" in flags:
        text = text.replace("delete it, or give another file", "give another --out, or --overwrite")
    text = re.sub(r"\{('[^{}]*)\}", lambda m: re.sub(r"'(\w+)':", r"--\1", m[1]), text)
    text = re.sub(r"not \(([^()]*?),?\)", lambda m: f"not {m[1].replace(',', '') or 'none'}", text)
    pattern = (
        rf"(?<![\w.'/-])({names})(?=(?:, {names})? (?:must|needs)\b| is \d)|(?<=give )({names})\b"
        rf"|(?:^|(?<=try )|(?<=by )|(?<=, ))({names})(?= \d)"
        rf"|(?<=\()({options})(?= is [^()]* there, )|(?<=the same )({options})\b"
    )
    return re.sub(pattern, lambda m: flags[m[0]], text) if flags else text


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _fix(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ": finished work is kept; free some space and give the same command again"
    if isinstance(error, IsADirectoryError):
        return ": give --out a file"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return ": give --out a folder"
    name = getattr(error, "filename", None) or ""
    if os.path.exists(name) and not os.access(name, os.R_OK, effective_ids=True):
        return ": give a file that can be read"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return ": give --out a folder that can be written"
    return ""
