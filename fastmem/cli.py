"""The commands: fastmem capacity, train, score, report."""

import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import tyro
from tqdm import tqdm

import fastmem
from fastmem import plots
from fastmem.arguments import checked_device
from fastmem.data import UniformSequences
from fastmem.memorization import Memorized, memorized_bits
from fastmem.model import GPT, GPTConfig
from fastmem.score import Precision, check_fit, sequence_bits
from fastmem.stats import Floats
from fastmem.storage import read_json, write_json, write_whole
from fastmem.sweep import (
    PRESETS,
    Row,
    Run,
    SweepConfig,
    default_heads,
    execute,
    load_rows,
    open_folder,
    report,
    sweep,
)
from fastmem.train import TrainConfig

Flat = tyro.conf.arg(name="")
Config = TypeVar("Config")


@dataclass(frozen=True)
class Capacity:
    """Measures how many bits a parameter stores: trains a grid of models on uniformly random
    sequences and finds the plateau of memorized bits. Writes rows/*.json, capacity.json and
    figures/ to --out; started again, it goes on where it was.

    Example: fastmem capacity --width 16 32 --seeds 0 1 2 --steps 2000 --out capacity-mine
    """

    preset: Literal["laptop", "paper"] = "laptop"
    """Where the defaults come from: laptop (a CPU, minutes) or paper (the published grid: GPUs)."""
    sweep: Annotated[SweepConfig, Flat] = PRESETS["laptop"]


@dataclass(frozen=True)
class Train:
    """Trains one model to memorize one data set. Writes a folder that transformers loads, with
    run.json (the curve and the memorized bits) beside it; a killed run goes on.

    Example: fastmem train --width 32 --vocab 2048 --length 64 --count 512 --epochs 200
    """

    layers: int = 1
    """Layers."""
    width: int = 32
    """Width."""
    heads: int | None = None
    """Heads; by default as many as make each 4 wide."""
    vocab: int = 128
    """Vocabulary V: tokens are uniform over it."""
    length: int = 16
    """Tokens a sequence, S."""
    count: int = 400
    """Sequences in the data set."""
    data_seed: int = 0
    """Of the tokens; --seed is of the initialization and the order."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, …"""
    out: Path = Path("model")
    """Folder of the model."""
    train: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Score:
    """Counts the bits of a data set that a model holds. Without flags the data set is the one
    that `fastmem train` trained the model on.

    Example: fastmem score model --held-out 1000
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a model that fastmem or transformers wrote (GPT-2)."""
    count: int | None = None
    """Sequences in the data set."""
    vocab: int | None = None
    """Vocabulary."""
    length: int | None = None
    """Tokens a sequence."""
    data_seed: int | None = None
    """Of the tokens."""
    held_out: int | None = None
    """Score this many sequences that follow the data set instead of the set itself."""
    precision: Precision | None = None
    """fp32, bf16-mixed or bf16-true; by default that of the training, else fp32."""
    device: str = "cpu"
    """Where to compute."""
    out: Path | None = None
    """A .npy file for the bits of each sequence (float64)."""


@dataclass(frozen=True)
class Report:
    """Makes capacity.json, the figures and the table again from the rows of a sweep.

    Example: fastmem report capacity-laptop
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the sweep."""


def run_capacity(command: Capacity) -> int:
    config = command.sweep
    total = len(config.runs())
    before = {row["key"]: row["status"] for row in open_folder(config)}
    keys = [run.key for run in config.runs()]
    done = sum(before.get(key) == "done" for key in keys)
    failed = sum(before.get(key) == "failed" for key in keys)
    _say(f"{total} runs in {config.out}")
    if before:
        _say(f"{done} done and skipped, {failed} failed and tried again")
    number = done
    for row in sweep(config):
        number += 1
        _say(f"[{number}/{total}] {_row_line(row)}")
        if INTERRUPTED.is_set():
            raise KeyboardInterrupt
    return _finish(config.out)


def run_train(command: Train) -> int:
    shape = GPTConfig(
        command.layers,
        command.width,
        default_heads(command.width) if command.heads is None else command.heads,
        command.vocab,
        command.length,
    )
    sequences = UniformSequences(command.count, command.length, command.vocab, command.data_seed)
    checked_device(command.device)
    run = Run(shape, sequences, command.train)
    result_path = command.out / "run.json"
    if result_path.exists():
        raise ValueError(f"{command.out} holds a finished run: give another --out")
    check_fit(shape, sequences)
    command.out.mkdir(parents=True, exist_ok=True)
    checkpoint = command.out / "checkpoint.pt"
    row, model = execute(run, command.device, checkpoint, progress=True)
    if model is not None:
        model.to_hf(command.out)
        write_json(result_path, row)
    checkpoint.unlink(missing_ok=True)
    _say(_row_line(row))
    return 0 if model is not None else 1


def run_score(command: Score) -> int:
    if not command.model.is_dir():
        raise ValueError(f"{command.model} is no folder: give that of a model")
    row: Row = {"sequences": {}, "precision": "fp32"}
    if (command.model / "run.json").exists():
        row = read_json(command.model / "run.json")
    given = {
        "count": command.count,
        "length": command.length,
        "vocab": command.vocab,
        "seed": command.data_seed,
    }
    numbers = {n: row["sequences"][n] for n in (*given, "start") if n in row["sequences"]}
    wanted = {**numbers, **{n: v for n, v in given.items() if v is not None}}
    missing = [f"--{n}" for n in ("count", "length", "vocab") if n not in wanted]
    if missing:
        raise ValueError(f"{command.model} has no run.json: say which data set with {missing}")
    sequences = UniformSequences(**wanted)
    if command.held_out is not None:
        sequences = sequences.held_out(command.held_out)
    model = GPT.from_hf(command.model, command.device)
    bits = sequence_bits(model, sequences, command.precision or row["precision"], progress=True)
    if command.out is not None:
        buffer = io.BytesIO()
        np.save(buffer, bits)
        write_whole(command.out, buffer.getvalue())
    memorized = memorized_bits(bits, sequences)
    print(json.dumps(_score_line(memorized, bits, sequences, model), indent=1))
    return 0


def run_report(command: Report) -> int:
    return _finish(command.folder)


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "capacity": (Capacity, run_capacity),
    "train": (Train, run_train),
    "score": (Score, run_score),
    "report": (Report, run_report),
}

USAGE = f"""usage: fastmem COMMAND [flags]

How much a language model memorizes, in bits ({fastmem.__version__}).

  capacity   train a sweep; print and draw capacity and bits per parameter
  train      train one model on one data set
  score      count the bits of a data set that a model holds
  report     make the table, capacity.json and figures again from a folder's rows

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
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        sys.exit(_run(arguments))
    except KeyboardInterrupt:
        _say("\nstopped: what is finished is kept, and the same command goes on from there")
        sys.exit(130)
    except (ValueError, OSError) as error:
        _say(f"fastmem: {' '.join(str(error).split())}{_fix(error)}")
        sys.exit(2)
    finally:
        signal.signal(signal.SIGINT, before)


INTERRUPTED = threading.Event()
"""Set by Ctrl-C. Python drops the exception where it falls into a finalizer; then a sweep stops
after the run that it is at."""


def _interrupt(signal_number: int, frame: object) -> None:
    INTERRUPTED.set()
    raise KeyboardInterrupt


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
    default = _capacity_defaults(flags) if kind is Capacity else None
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


def _capacity_defaults(flags: list[str]) -> Capacity:
    names = [b for a, b in pairwise(flags) if a == "--preset"]
    names += [flag.partition("=")[2] for flag in flags if flag.startswith("--preset=")]
    name = names[-1] if names and names[-1] in PRESETS else "laptop"
    config = PRESETS[name]
    if any(flag.startswith(("--epochs", "--seconds")) for flag in flags):
        config = replace(config, steps=None)
    return Capacity(name, config)  # type: ignore[arg-type]


def _fix(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ": what is finished is kept; free some space and give the same command again"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return ": give --out a folder"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return ": give --out a folder that can be written"
    return ""


def _finish(folder: Path) -> int:
    """capacity.json, the figures and the table from the rows in a folder."""
    summary = report(folder)
    write_whole(folder / "capacity.json", json.dumps(summary, indent=1).encode() + b"\n")
    rows = load_rows(folder)
    plots.draw(summary, rows, folder / "figures")
    print(_table(summary))
    print(f"\n{folder}/capacity.json, figures in {folder}/figures/")
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed:
        print(_row_line(row))
    return 1 if failed else 0


def _table(summary: Row) -> str:
    head = ("model", "heads", "parameters", "precision", "capacity", "bits/parameter strict")
    lines = [(*head, "published", "verdict")]
    for model in summary["models"]:
        per, capacity = model["bits_per_parameter"], model["capacity_bits"]["strict"]
        lines.append(
            (
                f"{model['layers']} × {model['width']}",
                f"{model['heads']}",
                f"{model['parameters']:,}",
                model["precision"],
                f"{capacity['estimate']:,.0f} bits" if capacity else "none",
                _interval(per["strict"]),
                _interval(per["published"]),
                "saturated" if model["saturated"] else "not saturated",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.ljust(w) for cell, w in zip(x, widths, strict=True)) for x in lines]
    table.insert(1, "  ".join("-" * width for width in widths))
    for model in summary["models"]:
        if not model["saturated"]:
            table.append(
                f"{model['layers']} × {model['width']}, {model['heads']} heads, "
                f"{model['precision']}: {model['why_not']}"
            )
    for precision, fit in summary["by_precision"].items():
        if fit:
            table.append(
                f"\nbits per parameter, {precision}: {_interval(fit['strict'])} strict, "
                f"{_interval(fit['published'])} in the published convention"
            )
    return "\n".join(line.rstrip() for line in table)


def _interval(interval: dict[str, float | None] | None) -> str:
    if interval is None:
        return "none"
    if interval["low"] is None:
        return f"{interval['estimate']:.2f}"
    return f"{interval['estimate']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def _row_line(row: Row) -> str:
    if row["status"] == "failed":
        return f"{row['key']}  failed: {row['error']}"
    bits = row["memorized_bits"]
    return (
        f"{row['key']}  {bits['strict']:,.0f} bits, "
        f"{bits['published'] / row['entropy_bits']:.1%} of the entropy, "
        f"{bits['strict'] / row['parameters']:.2f} per parameter, "
        f"{row['epochs']:,.0f} epochs, {row['seconds']:.1f} s"
    )


def _score_line(memorized: Memorized, bits: Floats, sequences: UniformSequences, model: GPT) -> Row:
    return {
        "sequences": asdict(sequences),
        "entropy_bits": memorized.entropy_bits,
        "memorized_bits": {"strict": memorized.strict, "published": memorized.published},
        "share": memorized.share,
        "bits_per_parameter": {
            "strict": memorized.strict / model.parameter_count,
            "published": memorized.published / model.parameter_count,
        },
        "bits_per_token": float(bits.mean()) / (sequences.length - 1),
    }


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
