"""A grid of runs in a folder: one run is one row, written whole or not at all."""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import inf, log2
from pathlib import Path
from typing import Literal

import torch

from fastmem.arguments import check_axis, checked_device
from fastmem.bracket import Finished, next_runs
from fastmem.data import UniformSequences
from fastmem.engine import Precision, compute_in
from fastmem.groups import alike, group_size, needed_flops, out_of_memory, what_is_missing
from fastmem.member import Diverged, TrainResult
from fastmem.model import GPT, GPTConfig
from fastmem.parquet import pyarrow_parquet
from fastmem.recipe import DEFAULT_STEPS, TrainConfig, Until
from fastmem.rows import Run, make_row
from fastmem.score import check_fit, sequence_bits
from fastmem.speed import matmul_rate
from fastmem.storage import write_json
from fastmem.store import Row, load_rows, write_sequence_bits
from fastmem.train import train_many
from fastmem.watch import PLANNED, RUNNING

AXES = {
    **dict.fromkeys(("layers", "width", "heads", "counts", "seeds"), int),
    "loads": int | float,
    "precision": str,
}
"""The axes of the grid, and the type of their values."""
HEAD_WIDTH = 2
"""The default width of a head: narrow heads memorize more at equal parameters and steps, down to
this (see docs/results.md)."""


@dataclass(frozen=True)
class SweepConfig:
    """A capacity sweep: shapes × precisions × data set sizes × seeds."""

    layers: tuple[int, ...] = (1,)
    """Numbers of layers."""
    width: tuple[int, ...] = (16, 24, 32)
    """Widths; with several layers and widths, each of one with each of the other."""
    heads: tuple[int, ...] | None = None
    """Numbers of heads; by default as many as make each head 2 wide."""
    vocab: int = 128
    """Vocabulary V: tokens are uniform over it."""
    length: int = 16
    """Tokens a sequence, S."""
    counts: tuple[int, ...] | Literal["auto"] | None = None
    """Data set sizes in sequences, for every model; by default from loads. With auto the runs that
    are done decide, so that each model's capacity is bracketed in few of them."""
    loads: tuple[float, ...] = (0.75, 1.5, 3.4, 4.5, 6.0)
    """Data set sizes as bits of entropy per parameter, so that each model gets its own."""
    seeds: tuple[int, ...] = (0, 1)
    """Each seed is another data set, another initialization and another order."""
    precision: tuple[Precision, ...] = ("fp32",)
    """fp32, bf16-mixed (fp32 weights and optimizer, bf16 compute), bf16-true (all bf16),
    bf16-stochastic (bf16 weights and compute, updates in fp32 and rounded at random)."""
    steps: int | None = None
    """Budget of a run in optimizer steps; 4000 if neither epochs nor seconds is given."""
    epochs: float | None = None
    """Budget of a run in passes over its data set."""
    seconds: float | None = None
    """Budget of a run in seconds."""
    until: Until = "budget"
    """budget, or converged: each run until a doubling of its steps adds too little."""
    tolerance: float = 0.02
    """The share of the memorized bits that a doubling must add to go on."""
    lr: float | None = None
    """Peak learning rate; by default from the shape."""
    embedding_lr: float | None = None
    """That of the embeddings; by default from the shape, or of lr where that is given."""
    batch: int = 128
    """Sequences a step; the whole set where it is smaller."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, …"""
    out: Path = Path("capacity-laptop")
    """Folder of the results; started again, finished runs in it are skipped."""
    sequence_bits: bool = False
    """Also score held-out sequences, as many as are trained on, and write what each sequence costs
    to sequence_bits/; runs that are finished already are not scored again."""

    def train_config(self) -> TrainConfig:
        """What all runs of the sweep share."""
        names = ("steps", "epochs", "seconds", "until", "tolerance", "lr", "embedding_lr", "batch")
        given = {name: getattr(self, name) for name in names}
        if self.steps is self.epochs is self.seconds is None:
            given["steps"] = DEFAULT_STEPS
        return TrainConfig(**given)

    def runs(self, rows: Sequence[Row] = ()) -> list[Run]:
        """The runs of the grid, smallest models and data sets first, all checked.

        With counts "auto" they are those that these rows of the sweep call for next.
        """
        for name, kind in AXES.items():
            values = getattr(self, name)
            if (name, values) not in (("heads", None), ("counts", None), ("counts", "auto")):
                check_axis(name, values, kind)
        if not isinstance(self.out, Path) or not isinstance(self.sequence_bits, bool):
            raise ValueError(
                "out must be a pathlib.Path and sequence_bits True or False, not "
                f"{self.out!r} and {self.sequence_bits!r}"
            )
        shapes = [
            GPTConfig(layers, width, heads, self.vocab, self.length)
            for layers, width in product(self.layers, self.width)
            for heads in self.heads or (default_heads(width),)
        ]
        shapes.sort(key=lambda shape: shape.parameter_count)
        train_config = self.train_config()
        device = checked_device(self.device)
        runs = []
        for shape, precision in product(shapes, self.precision):
            compute_in(precision, device)
            for count, seed in self._sizes(shape, precision, rows):
                sequences = UniformSequences(count, self.length, self.vocab, seed)
                check_fit(shape, sequences)
                how = replace(train_config, precision=precision, seed=seed)
                runs.append(Run(shape, sequences, how))
        return runs

    def _sizes(
        self, shape: GPTConfig, precision: Precision, rows: Sequence[Row]
    ) -> list[tuple[int, int]]:
        """(count, seed) of the runs of one model."""
        if self.counts != "auto":
            counts = self.counts or self._counts(shape)
            return [(count, seed) for seed in self.seeds for count in counts]
        finished = [
            Finished(
                row["sequences"]["count"],
                row["seed"],
                row["memorized_bits"]["strict"],
                row["coded_entropy_bits"],
            )
            for row in rows
            if row["status"] == "done"
            and (row["model"], row["precision"]) == (asdict(shape), precision)
        ]
        self._check_entropy()
        coded = (self.length - 1) * log2(self.vocab)
        return next_runs(finished, shape.parameter_count, coded, self.seeds)

    def _check_entropy(self) -> None:
        if self.vocab == 1 or self.length == 1:
            raise ValueError(
                f"vocab {self.vocab}, length {self.length}: sequences without entropy have no "
                "size in bits; use at least 2 of both"
            )

    def _counts(self, shape: GPTConfig) -> list[int]:
        self._check_entropy()
        if not all(0 < load < inf for load in self.loads):
            raise ValueError(f"loads must be above 0 and finite, not {self.loads}")
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
    batch=2048,
    device="cuda",
    out=Path("capacity-paper"),
)
PRESETS = {"laptop": LAPTOP, "paper": PAPER}


def sweep(config: SweepConfig, progress: bool = True) -> Iterator[Row]:
    """Trains the runs of the grid that have no finished row in config.out.

    Runs that can be trained together (`fastmem.groups`) are, as many at a time as is fast and the
    memory holds; their rows are what each alone would give, to rounding.

    Args:
        config: the grid; axes may be widened later, what all runs share may not change.
        progress: shows a bar for the running run when standard error is a terminal.

    Yields:
        Each new row, after it is in rows/; its "status" is "done" or "failed".

    Raises:
        ValueError: a grid that cannot run, another study in the folder, or a damaged row.
        OSError: a folder that cannot be written.
    """
    config.runs()
    if config.sequence_bits:
        pyarrow_parquet()
    config.out.mkdir(parents=True, exist_ok=True)
    with _locked(config.out):
        rows = open_folder(config)
        ended = {row["key"] for row in rows if row["status"] == "done"}
        for key in ended:
            (config.out / "checkpoints" / f"{key}.pt").unlink(missing_ok=True)
        _announce(config)
        # What failed before is tried again, what fails now is not.
        while runs := [run for run in config.runs(rows) if run.key not in ended]:
            for kind in alike(runs):
                for row in _rows(config, kind, progress):
                    rows.append(row)
                    ended.add(row["key"])
                    yield row


def _rows(config: SweepConfig, runs: Sequence[Run], progress: bool) -> Iterator[Row]:
    """Those of runs that can be trained together, as many at a time as the memory holds."""
    device = checked_device(config.device)
    size, begin = group_size(runs, device), 0
    while begin < len(runs):
        group = runs[begin : begin + size]
        with _marked(config.out, group):
            saved = [_checkpoint(config.out, run) for run in group]
            done = _execute(group, device, saved, progress)
        if done is None:
            size = len(group) // 2
            continue
        begin += len(group)
        for run, (row, model) in zip(group, done, strict=True):
            if config.sequence_bits and model is not None:
                row["held_out_bits"] = _score_all(config.out, run, model)
            write_json(config.out / "rows" / f"{run.key}.json", row)
            if has_ended(row):
                _checkpoint(config.out, run).unlink(missing_ok=True)
            yield row


def has_ended(row: Row) -> bool:
    """Whether its checkpoint is of no use: a run that had no memory can go on from it."""
    return row["status"] == "done" or str(row["error"]).startswith("Diverged")


def _checkpoint(folder: Path, run: Run) -> Path:
    return folder / "checkpoints" / f"{run.key}.pt"


def _score_all(folder: Path, run: Run, model: GPT) -> float:
    """Writes the bits of members and of as many held-out sequences; the mean of the latter."""
    others = run.sequences.held_out(run.sequences.count)
    members, held_out = (
        sequence_bits(model, part, run.train.precision) for part in (run.sequences, others)
    )
    write_sequence_bits(folder, run.key, members, held_out)
    return float(held_out.mean())


def _announce(config: SweepConfig) -> None:
    """Says in the folder which runs there are to be, and that none is running yet."""
    for mark in (config.out / RUNNING).glob("*"):
        mark.unlink()
    if config.counts == "auto":
        (config.out / PLANNED).unlink(missing_ok=True)
        return
    work = {run.key: run.train.seconds or needed_flops(run) for run in config.runs()}
    write_json(config.out / PLANNED, {"work": work})


@contextmanager
def _marked(folder: Path, runs: Sequence[Run]) -> Iterator[None]:
    """Shows these as running, to who looks into the folder."""
    (folder / RUNNING).mkdir(exist_ok=True)
    marks = [folder / RUNNING / run.key for run in runs]
    for mark in marks:
        mark.touch()
    try:
        yield
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)


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
        # What an older version did not write was not there: it had the default.
        theirs = {**asdict(TrainConfig()), **row["model"], **row["train"]}
        for name, value in ours.items():
            if theirs[name] != value:
                flag = f", or the same --{name}" if hasattr(config, name) else ""
                raise ValueError(
                    f"{config.out} holds another sweep ({name} is {theirs[name]} there, "
                    f"{value} here): give another --out{flag}"
                )
    return rows


def execute(run: Run, device: str, checkpoint: Path, progress: bool) -> tuple[Row, GPT | None]:
    """Trains and scores one run; one that diverges or does not fit is a failed row, no model."""
    done = _execute([run], checked_device(device), [checkpoint], progress)
    assert done is not None  # only a group can be made smaller
    return done[0]


def _execute(
    runs: Sequence[Run], device: torch.device, checkpoints: Sequence[Path], progress: bool
) -> list[tuple[Row, GPT | None]] | None:
    """Trains and scores runs together; None if there is no memory for so many."""
    if device.type == "cuda":
        # Measured now, so that its large matrices are no part of a run's peak.
        matmul_rate(device, torch.float32 if runs[0].train.precision == "fp32" else torch.bfloat16)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    name = runs[0].key if len(runs) == 1 else f"{runs[0].key} and {len(runs) - 1} more"
    outcomes: Sequence[TrainResult | Diverged]
    try:
        models = [GPT(run.model, seed=run.train.seed, device=device) for run in runs]
        sets, configs = [run.sequences for run in runs], [run.train for run in runs]
        outcomes = train_many(models, sets, configs, checkpoints, progress and name)
    except (MemoryError, RuntimeError) as failure:
        if not out_of_memory(failure):
            raise
        if len(runs) > 1:
            return None
        reason = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
        return [(make_row(runs[0], device, f"{reason}; {what_is_missing(runs[0], device)}"), None)]
    done: list[tuple[Row, GPT | None]] = []
    for run, model, outcome in zip(runs, models, outcomes, strict=True):
        if isinstance(outcome, Diverged):
            done.append((make_row(run, device, f"Diverged: {outcome}"), None))
        else:
            done.append((make_row(run, device, outcome), model))
    return done


def default_heads(width: int) -> int:
    """As many heads as make each HEAD_WIDTH wide, or the next fewer that divide the width."""
    return next(h for h in range(max(1, width // HEAD_WIDTH), 0, -1) if width % h == 0)


def _two_digits(value: float) -> int:
    return max(1, int(float(f"{value:.2g}")))
