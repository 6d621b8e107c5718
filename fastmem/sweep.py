"""A grid of runs in a folder: one run is one row, written whole or not at all."""

import fcntl
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import metadata
from itertools import product
from math import isnan, log2, nan
from pathlib import Path
from typing import Any

import torch

from fastmem.arguments import checked_device
from fastmem.capacity import summarize
from fastmem.data import UniformSequences
from fastmem.memorization import published_bits
from fastmem.model import GPT, GPTConfig
from fastmem.score import Precision, check_fit, compute_in
from fastmem.sequences import GENERATOR, Sequences
from fastmem.storage import read_json, write_json
from fastmem.train import DEFAULT_STEPS, Diverged, Point, TrainConfig, TrainResult, train

SCHEMA = 1
HEAD_WIDTH = 4
"""The default width of a head: narrow heads memorize more at equal parameters and steps (see
docs/results.md), and narrower than this they cost more time than they bring."""

Row = dict[str, Any]


@dataclass(frozen=True)
class SweepConfig:
    """A capacity sweep: shapes × precisions × data set sizes × seeds."""

    layers: tuple[int, ...] = (1,)
    """Numbers of layers."""
    width: tuple[int, ...] = (16, 24, 32)
    """Widths; with several layers and widths, each of one with each of the other."""
    heads: tuple[int, ...] | None = None
    """Numbers of heads; by default as many as make each head 4 wide."""
    vocab: int = 128
    """Vocabulary V: tokens are uniform over it."""
    length: int = 16
    """Tokens a sequence, S."""
    counts: tuple[int, ...] | None = None
    """Data set sizes in sequences, for every model; by default from loads."""
    loads: tuple[float, ...] = (0.75, 1.5, 3.0, 4.0, 6.0)
    """Data set sizes as bits of entropy per parameter, so that each model gets its own."""
    seeds: tuple[int, ...] = (0, 1)
    """Each seed is another data set, another initialization and another order."""
    precision: tuple[Precision, ...] = ("fp32",)
    """fp32, bf16-mixed (fp32 weights and optimizer, bf16 compute), bf16-true (all bf16)."""
    steps: int | None = None
    """Budget of a run in optimizer steps; 1000 if neither epochs nor seconds is given."""
    epochs: float | None = None
    """Budget of a run in passes over its data set."""
    seconds: float | None = None
    """Budget of a run in seconds."""
    lr: float = 0.04
    """Peak learning rate: wider models need less."""
    batch: int = 128
    """Sequences a step; the whole set where it is smaller."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, …"""
    out: Path = Path("capacity-laptop")
    """Folder of the results; started again, finished runs in it are skipped."""

    def train_config(self) -> TrainConfig:
        """What all runs of the sweep share."""
        names = ("steps", "epochs", "seconds", "lr", "batch")
        given = {name: getattr(self, name) for name in names}
        if not any((self.steps, self.epochs, self.seconds)):
            given["steps"] = DEFAULT_STEPS if self.steps is None else self.steps
        return TrainConfig(**given)

    def runs(self) -> list["Run"]:
        """The runs of the grid, smallest models and data sets first, all checked."""
        for name in ("layers", "width", "heads", "counts", "loads", "seeds", "precision"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) != len(values)):
                raise ValueError(f"{name} needs one or more different values, not {values}")
        shapes = [
            GPTConfig(layers, width, heads, self.vocab, self.length)
            for layers, width in product(self.layers, self.width)
            for heads in self.heads or (default_heads(width),)
        ]
        shapes.sort(key=lambda shape: shape.parameter_count)
        train_config = self.train_config()
        device = checked_device(self.device)
        runs = []
        for shape, precision, seed in product(shapes, self.precision, self.seeds):
            compute_in(precision, device)
            for count in self.counts or self._counts(shape):
                sequences = UniformSequences(count, self.length, self.vocab, seed)
                check_fit(shape, sequences)
                how = replace(train_config, precision=precision, seed=seed)
                runs.append(Run(shape, sequences, how))
        return runs

    def _counts(self, shape: GPTConfig) -> list[int]:
        if self.vocab == 1 or self.length == 1:
            raise ValueError(
                f"vocab {self.vocab}, length {self.length}: sequences without entropy have no "
                "size in bits; use at least 2 of both"
            )
        if min(self.loads) <= 0:
            raise ValueError(f"loads must be above 0, not {min(self.loads)}")
        coded = (self.length - 1) * log2(self.vocab)
        sizes = {_two_digits(load * shape.parameter_count / coded) for load in self.loads}
        return sorted(sizes)

    def settings(self) -> Row:
        """What a folder's rows must share: all that is no axis of the grid."""
        shared = asdict(self.train_config())
        del shared["precision"], shared["seed"]
        return {"vocab": self.vocab, "length": self.length, **shared}


LAPTOP = SweepConfig()
# Shapes, V, S, steps, batch and the number of seeds are the paper's; it states neither learning
# rate nor heads nor data set sizes, nor which of the two bf16 it means.
PAPER = SweepConfig(
    layers=(1, 2, 4, 8),
    width=(32, 64, 128, 256),
    vocab=2048,
    length=64,
    loads=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0),
    seeds=(0, 1, 2, 3, 4),
    precision=("fp32", "bf16-mixed"),
    steps=1_000_000,
    lr=0.003,
    batch=2048,
    device="cuda",
    out=Path("capacity-paper"),
)
PRESETS = {"laptop": LAPTOP, "paper": PAPER}


@dataclass(frozen=True)
class Run:
    """One model on one data set: a row of the sweep."""

    model: GPTConfig
    sequences: Sequences
    train: TrainConfig

    @property
    def key(self) -> str:
        """Its name in the folder: every axis of the grid."""
        m, n = self.model, self.sequences.count
        return f"{m.layers}x{m.width}-h{m.heads}-{self.train.precision}-n{n}-seed{self.train.seed}"


def sweep(config: SweepConfig, progress: bool = True) -> Iterator[Row]:
    """Trains the runs of the grid that have no finished row in config.out, one after another.

    Args:
        config: the grid; axes may be widened later, what all runs share may not change.
        progress: shows a bar for the running run when standard error is a terminal.

    Yields:
        Each new row, after it is in rows/; its "status" is "done" or "failed".

    Raises:
        ValueError: a grid that cannot run, another study in the folder, or a damaged row.
        OSError: a folder that cannot be written.
    """
    runs = config.runs()
    config.out.mkdir(parents=True, exist_ok=True)
    with _locked(config.out):
        finished = {row["key"] for row in open_folder(config) if row["status"] == "done"}
        for run in runs:
            saved = config.out / "checkpoints" / f"{run.key}.pt"
            if run.key not in finished:
                row, _ = execute(run, config.device, saved, progress)
                write_json(config.out / "rows" / f"{run.key}.json", row)
                yield row
            saved.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other sweeps out of the folder; the lock ends with the process, however it ends."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another fastmem is at work in {folder}: give another --out"
            ) from None
        yield


def open_folder(config: SweepConfig) -> list[Row]:
    """Makes config.out, or reads the rows that are in it; refuses those of another study."""
    config.out.mkdir(parents=True, exist_ok=True)
    rows, ours = load_rows(config.out), config.settings()
    for row in rows:
        theirs = {**row["model"], **row["train"]}
        for name, value in ours.items():
            if theirs[name] != value:
                raise ValueError(
                    f"{config.out} holds another sweep ({name} is {theirs[name]} there, "
                    f"{value} here): give another --out, or the same --{name}"
                )
    return rows


def load_rows(folder: Path) -> list[Row]:
    """The rows of a sweep, in the order of their names.

    Raises:
        ValueError: no folder, no row, a damaged row, or a row of a later version.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: run `fastmem capacity --out {folder}` first")
    rows = []
    for path in sorted((folder / "rows").glob("*.json")):
        row = read_json(path)
        if row.get("schema") != SCHEMA:
            raise ValueError(f"{path} has schema {row.get('schema')}, this version reads {SCHEMA}")
        rows.append(row)
    return rows


def execute(run: Run, device: str, checkpoint: Path, progress: bool) -> tuple[Row, GPT | None]:
    """Trains and scores one run; one that diverges or does not fit is a failed row, no model."""
    place = checked_device(device)
    model: GPT | None = None
    result: TrainResult | None = None
    error = None
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    try:
        model = GPT(run.model, seed=run.train.seed, device=place)
        result = train(model, run.sequences, run.train, checkpoint, progress and run.key)
    except (Diverged, MemoryError, RuntimeError) as failure:
        # On a CPU torch has no type of its own for memory that is not there.
        fits = isinstance(failure, Diverged) or "allocate memory" in str(failure)
        if not (fits or isinstance(failure, MemoryError | torch.OutOfMemoryError)):
            raise
        error = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
        model = None
    strict = result.memorized_bits if result else nan
    published = published_bits(strict, run.sequences)
    row = {
        "schema": SCHEMA,
        "key": run.key,
        "status": "failed" if error else "done",
        "error": error,
        "model": asdict(run.model),
        "parameters": run.model.parameter_count,
        "precision": run.train.precision,
        "seed": run.train.seed,
        "sequences": run.sequences.description(),
        "generator": GENERATOR,
        "train": asdict(run.train),
        "entropy_bits": _known(run.sequences.entropy_bits),
        "coded_entropy_bits": _known(run.sequences.coded_entropy_bits),
        "memorized_bits": {"strict": _known(strict), "published": _known(published)},
        "epochs": result and result.epochs,
        "steps": result and result.steps,
        "seconds": result and result.seconds,
        "tokens_per_second": result and result.tokens_per_second,
        "curve": [_point(point) for point in result.curve] if result else [],
        "peak_bytes": _peak_bytes(place),
        **environment(place),
    }
    return row, model


def report(folder: Path, rows: list[Row] | None = None) -> dict[str, Any]:
    """The content of capacity.json from the rows in the folder; ValueError if there is none."""
    rows = load_rows(folder) if rows is None else rows
    if not rows:
        raise ValueError(f"{folder} holds no row yet: run `fastmem capacity --out {folder}` first")
    here = {name: rows[-1][name] for name in ("version", "commit", "torch", "device")}
    seconds = sum(row["seconds"] or 0.0 for row in rows)
    return {**summarize(rows), **here, "seconds": seconds}


def default_heads(width: int) -> int:
    """As many heads as make each HEAD_WIDTH wide, or the next fewer that divide the width."""
    return next(h for h in range(max(1, width // HEAD_WIDTH), 0, -1) if width % h == 0)


def environment(device: torch.device) -> Row:
    """What a result depends on beside its config."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "version": _version("fastmem-lm"),
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": sys.version.split()[0],
    }


@cache
def _commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--exclude=*",
        "--abbrev=40",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _point(point: Point) -> Row:
    return asdict(point) | {"memorized_bits": _known(point.memorized_bits)}


def _known(bits: float) -> float | None:
    """JSON has no nan: what is not known is null there."""
    return None if isnan(bits) else bits


def _two_digits(value: float) -> int:
    return max(1, int(float(f"{value:.2g}")))
