"""A grid of runs in a folder: one run is one row, written whole or not at all."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import inf, log2
from pathlib import Path
from typing import Literal

from fastmem.base.arguments import check_axis, checked_device, integer, number
from fastmem.base.lock import locked
from fastmem.base.storage import Row, write_json
from fastmem.data.files.parquet import pyarrow_parquet
from fastmem.data.uniform import UniformSequences
from fastmem.memorization.size_search import Finished, next_runs
from fastmem.models.engine import Precision, compute_in
from fastmem.models.gpt import GPTConfig
from fastmem.models.score import check_fit
from fastmem.sweeps.display import Display
from fastmem.sweeps.job import Job, RunResult, checkpoint_of, has_ended
from fastmem.sweeps.ray import RayCluster
from fastmem.sweeps.rows import RunSpec
from fastmem.sweeps.scheduler import Scheduler, work_of
from fastmem.sweeps.store import load_rows, write_sequence_bits
from fastmem.sweeps.watch import PLANNED, RUNNING
from fastmem.sweeps.workers import InProcess, LocalProcesses, Workers
from fastmem.training.config import DEFAULT_STEPS, TrainConfig, Until

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
    workers: int = 1
    """Processes on this machine that train side by side: one a GPU, or each with its part of the
    cores."""
    ray: str | None = None
    """Train on Ray (pip install 'fastmem-lm[ray]'): local, auto, or HOST:PORT of a cluster."""
    ray_cpus: int = 1
    """Cores, and threads, of a Ray task."""
    ray_gpus: float = 0.25
    """The part of a GPU that a Ray task has, with --device cuda."""
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

    def runs(self, rows: Sequence[Row] = ()) -> list[RunSpec]:
        """The runs of the grid, smallest models and data sets first, all checked.

        With counts "auto" they are those that these rows of the sweep call for next.
        """
        for name, kind in AXES.items():
            values = getattr(self, name)
            absent = values is None and name in ("heads", "counts")
            if not absent and not (
                name == "counts" and isinstance(values, str) and values == "auto"
            ):
                check_axis(name, values, kind)
        integer("workers", self.workers, 1, 4096)
        integer("ray_cpus", self.ray_cpus, 1, 4096)
        if not 0 < number("ray_gpus", self.ray_gpus) <= 1:
            raise ValueError(
                f"a task has a part of one GPU: ray_gpus must be in (0, 1], not {self.ray_gpus}"
            )
        for name, one in (("out", Path), ("sequence_bits", bool), ("ray", str | None)):
            if not isinstance(getattr(self, name), one):
                wanted = getattr(one, "__name__", one)
                raise ValueError(f"{name} must be of type {wanted}, not {getattr(self, name)!r}")
        shapes = [
            GPTConfig(layers, width, heads, self.vocab, self.length)
            for layers, width in product(self.layers, self.width)
            for heads in self.heads or (default_heads(width),)
        ]
        shapes.sort(key=lambda shape: shape.parameter_count)
        train_config = self.train_config()
        # Where Ray gives out devices, none of them need be here.
        device = checked_device(self.device if self.ray is None else "cpu")
        runs = []
        for shape, precision in product(shapes, self.precision):
            compute_in(precision, device)
            for count, seed in self._sizes(shape, precision, rows):
                sequences = UniformSequences(count, self.length, self.vocab, seed)
                check_fit(shape, sequences)
                how = replace(train_config, precision=precision, seed=seed)
                runs.append(RunSpec(shape, sequences, how))
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

    Runs that can be trained together (`sweeps.groups`) are, as many at a time as is fast and the
    memory holds; their rows are what each alone would give, to rounding. This process alone writes
    rows; others, if there are to be, train. Whoever does, on CPUs the runs and the bytes of their
    rows are the same at the same number of threads, but for times and peak memory, and their order;
    on GPUs, where others are grouped, the same to rounding. Where others train, exhaust or close
    this iterator: while it is open they go on.

    Args:
        config: the grid; axes may be widened later, what all runs share may not change.
        progress: shows a bar when standard error is a terminal: of the running run, or of all runs
            if several run at once.

    Yields:
        Each new row, after it is in rows/; its "status" is "done" or "failed".

    Raises:
        ValueError: a grid that cannot run, or not there; another study, or another sweep at work in
            the folder; a damaged row.
        OSError: a folder that cannot be written.
        ConnectionError: Ray's cluster is lost. Some time after that Ray ends this process, also if
            the error is caught: give a sweep on Ray a process of its own.
    """
    config.runs()
    workers = open_workers(config, progress)
    if config.sequence_bits:
        pyarrow_parquet()
    config.out.mkdir(parents=True, exist_ok=True)
    with locked(config.out) as stamp:
        rows = open_folder(config)
        alone = isinstance(workers, InProcess)
        scheduler = Scheduler(config.runs, rows, largest_first=not alone)
        for row in rows:
            if row["status"] == "done":
                checkpoint_of(config.out, row["key"]).unlink(missing_ok=True)
        work = _announce(config)
        if not scheduler:
            return
        display = Display(work, rows, show=progress and not alone)
        with _marks(config.out) as marks, workers, display:
            while scheduler:
                while workers.room > 0 and (runs := scheduler.next_batch(workers.size)):
                    folder = config.out.resolve()
                    job = Job(runs, config.device, folder, stamp, config.sequence_bits)
                    marks.begin(job)
                    display.begin(job)
                    workers.begin(job)
                display.draw()
                new: list[Row] = []
                for job, outcome in workers.wait():
                    marks.end(job)
                    display.end(job)
                    for ended in scheduler.complete(job.runs, outcome):
                        new.append(_write(config.out, ended))
                        display.add(new[-1])
                yield from new  # after all are written: who reads them may stop at any


def open_workers(config: SweepConfig, progress: bool = True) -> Workers:
    """Those who are to train, none of them started yet; ValueError where they cannot be had."""
    if config.ray is None:
        if config.workers == 1:
            return InProcess(config.device, progress)
        return LocalProcesses(config.workers, config.device)
    if config.workers > 1:
        raise ValueError(
            f"--workers {config.workers} and --ray {config.ray}: Ray counts its own workers; leave "
            "one of the two out"
        )
    return RayCluster(config.ray, config.device, config.ray_cpus, config.ray_gpus)


def _write(folder: Path, ended: RunResult) -> Row:
    row, key = ended.row, ended.row["key"]
    if ended.bits is not None:
        members, held_out = ended.bits
        write_sequence_bits(folder, key, members, held_out)
        row["held_out_bits"] = float(held_out.mean())
    write_json(folder / "rows" / f"{key}.json", row)
    if has_ended(row):
        checkpoint_of(folder, key).unlink(missing_ok=True)
    return row


def _announce(config: SweepConfig) -> dict[str, float]:
    """Says in the folder which runs there are to be, and the work of each, if that is known."""
    if config.counts == "auto":
        (config.out / PLANNED).unlink(missing_ok=True)
        return {}
    work = {run.key: work_of(run) for run in config.runs()}
    write_json(config.out / PLANNED, {"work": work})
    return work


class _Marks:
    """Shows what is running to who looks into the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, job: Job) -> None:
        for run in job.runs:
            (self._folder / run.key).touch()

    def end(self, job: Job) -> None:
        for run in job.runs:
            (self._folder / run.key).unlink(missing_ok=True)


@contextmanager
def _marks(out: Path) -> Iterator[_Marks]:
    """The folder of marks, empty before and after."""
    folder = out / RUNNING
    folder.mkdir(exist_ok=True)
    try:
        for mark in folder.iterdir():
            mark.unlink()
        yield _Marks(folder)
    finally:
        for mark in folder.iterdir():
            mark.unlink()


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


def default_heads(width: int) -> int:
    """As many heads as make each HEAD_WIDTH wide, or the next fewer that divide the width."""
    return next(h for h in range(max(1, width // HEAD_WIDTH), 0, -1) if width % h == 0)


def _two_digits(value: float) -> int:
    return max(1, int(float(f"{value:.2g}")))
