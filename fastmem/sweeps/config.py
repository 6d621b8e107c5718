"""The grid of a sweep: which models train on which data sets."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import inf, log2
from pathlib import Path
from typing import ClassVar, Literal

from fastmem.base.arguments import check_axis, checked_device, integer, number, user_path
from fastmem.base.storage import Row
from fastmem.data.sequences import Sequences
from fastmem.data.uniform import UniformSequences
from fastmem.memorization.size_search import Finished, next_runs
from fastmem.models.engine import Precision, compute_in
from fastmem.models.gpt import GPTConfig
from fastmem.models.score import check_fit
from fastmem.sweeps.rows import RunSpec
from fastmem.training.config import DEFAULT_STEPS, Hyperparameters, TrainConfig

AXES = {
    **dict.fromkeys(("layers", "width", "heads", "counts", "seeds"), int),
    "loads": int | float,
    "precision": str,
}
"""Axes of the grid and the type of their values."""
HEAD_WIDTH = 2
"""Default width of a head. At equal parameters and steps narrower heads memorize more, down to this
width (docs/lab.md)."""


@dataclass(frozen=True)
class SweepConfig(Hyperparameters):
    """A capacity sweep: shapes × precisions × data set sizes × seeds."""

    layers: tuple[int, ...] = (1,)
    """Numbers of layers."""
    width: tuple[int, ...] = (16, 24, 32)
    """Widths; the grid has each number of layers with each width."""
    heads: tuple[int, ...] | None = None
    """Numbers of heads; by default as many as make each head 2 wide."""
    vocab: int = 128
    """Vocabulary V: tokens are uniform over V."""
    length: int = 16
    """Tokens a sequence, S."""
    counts: tuple[int, ...] | Literal["auto"] | None = None
    """Data set sizes in sequences, for every model; by default from --loads. With auto the finished
    runs of a model decide its next size, so that few runs bracket its capacity."""
    loads: tuple[float, ...] = (0.75, 1.5, 3.4, 4.5, 6.0)
    """Data set sizes in bits of entropy per parameter: each model gets sizes that fit it."""
    seeds: tuple[int, ...] = (0, 1)
    """Each seed is another data set, another initialization and another order."""
    precision: tuple[Precision, ...] = ("fp32",)
    """fp32, bf16-mixed (fp32 weights and optimizer, bf16 compute), bf16-true (all bf16),
    bf16-stochastic (bf16 weights and compute, fp32 updates with stochastic rounding)."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, …; in the command also auto, a GPU where there is one."""
    workers: int = 1
    """Processes that train side by side on this machine: one a GPU, or each with a part of the
    cores."""
    gpus_per_run: int = 1
    """GPUs that train one model together, each with a part of it; with --device cpu processes.
    For models that do not fit one GPU (docs/large.md)."""
    ray: str | None = None
    """Train on Ray (pip install 'fastmem-lm[ray]'): local, auto, or HOST:PORT of a cluster."""
    ray_cpus: int = 1
    """Cores, and threads, of a Ray task."""
    ray_gpus: float = 0.25
    """GPUs of a Ray task, at most 1, with --device cuda."""
    out: Path = Path("capacity-laptop")
    """Folder of the results; the same command skips the runs that are finished there."""
    overwrite: bool = False
    """Delete the runs in --out and train all again; also take a folder of other files, which
    stay."""
    sequence_bits: bool = False
    """Also score as many held-out sequences as the data set has, and write the bits of each
    sequence to sequence_bits/; finished runs are not scored again."""

    own: ClassVar[tuple[str, ...]] = ()
    """Files that such a folder has beside those of every sweep."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            object.__setattr__(self, "out", user_path(self.out))
        except ValueError as error:
            raise ValueError(f"out: {error}") from None

    def train_config(self, precision: Precision = "fp32", seed: int = 0) -> TrainConfig:
        """How the runs of one precision and seed train."""
        shared = self.hyperparameters()
        if self.steps is self.epochs is self.seconds is None:
            shared["steps"] = DEFAULT_STEPS
        return TrainConfig(**shared, precision=precision, seed=seed)

    def runs(self, rows: Sequence[Row] = ()) -> list[RunSpec]:
        """The runs of the grid, smallest models and data sets first.

        With counts="auto", the runs that each model needs next after its runs in `rows`.

        Raises:
            ValueError: the grid is invalid, or its device is unavailable.
        """
        self._check()
        # Ray assigns the devices of its nodes: this machine need not have them.
        device = checked_device(self.device if self.ray is None else "cpu")
        runs = []
        for shape, precision in product(self.shapes(), self.precision):
            compute_in(precision, device)
            for count, seed in self._sizes(shape, precision, rows):
                sequences, held_out = self._data(count, seed)
                check_fit(shape, sequences)
                train = self.train_config(precision, seed)
                self._check_ranks(train.step_batch(sequences.count), sequences.count)
                runs.append(RunSpec(shape, sequences, train, held_out))
        return runs

    def shapes(self) -> list[GPTConfig]:
        """The models of the grid, smallest first."""
        shapes = [
            GPTConfig(layers, width, heads, self.vocab, self.length)
            for layers, width in product(self.layers, self.width)
            for heads in self.heads or (default_heads(width),)
        ]
        return sorted(shapes, key=lambda shape: shape.parameter_count)

    def corpus_hash(self) -> str | None:
        """The hash of the corpus that all rows of the study share; None for uniform data."""
        return None

    def _data(self, count: int, seed: int) -> tuple[Sequences, Sequences | None]:
        """The data set of a run, and its held-out sequences; None: those of the data set."""
        return UniformSequences(count, self.length, self.vocab, seed), None

    def _bits(self) -> float:
        """The bits of a sequence, in which loads count."""
        return (self.length - 1) * log2(self.vocab)

    def _check(self) -> None:
        for name, kind in AXES.items():
            values = getattr(self, name)
            optional = values is None and name in ("heads", "counts")
            automatic = name == "counts" and isinstance(values, str) and values == "auto"
            if not optional and not automatic:
                check_axis(name, values, kind)
        integer("workers", self.workers, 1, 4096)
        integer("gpus_per_run", self.gpus_per_run, 1, 4096)
        integer("ray_cpus", self.ray_cpus, 1, 4096)
        if not 0 < number("ray_gpus", self.ray_gpus) <= 1:
            raise ValueError(
                f"a task has a part of one GPU: ray_gpus must be in (0, 1], not {self.ray_gpus}"
            )
        for name, one in (
            ("device", str),
            ("overwrite", bool),
            ("sequence_bits", bool),
            ("ray", str | None),
        ):
            if not isinstance(getattr(self, name), one):
                wanted = getattr(one, "__name__", one)
                raise ValueError(f"{name} must be of type {wanted}, not {getattr(self, name)!r}")

    def _check_ranks(self, batch: int, count: int) -> None:
        """ValueError if the ranks of a run cannot share its batch."""
        if batch % self.gpus_per_run:
            near = max(self.gpus_per_run, batch // self.gpus_per_run * self.gpus_per_run)
            raise ValueError(
                f"batch {batch}, of {count} sequences, is not divisible by {self.gpus_per_run} "
                f"ranks: try batch {near}, or data sets of a multiple of {self.gpus_per_run} "
                "sequences"
            )

    def _shared(self, count: int) -> int:
        """The next size above that the ranks of a run can share, if it is a batch by itself."""
        unit = self.gpus_per_run if count < self.batch else 1
        return -(-count // unit) * unit

    def _sizes(
        self, shape: GPTConfig, precision: Precision, rows: Sequence[Row]
    ) -> list[tuple[int, int]]:
        """(count, seed) of the runs of one model."""
        if self.counts is not None and self.counts != "auto":
            return [(count, seed) for seed in self.seeds for count in self.counts]
        if self.vocab == 1 or self.length == 1:
            raise ValueError(
                f"vocab {self.vocab}, length {self.length}: sequences without entropy have no "
                "size in bits; use at least 2 of both"
            )
        coded = self._bits()
        if self.counts == "auto":
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
            found = next_runs(finished, shape.parameter_count, coded, self.seeds)
            trained = {(run.count, run.seed) for run in finished}
            shared = [(self._shared(count), seed) for count, seed in found]
            return [size for size in shared if size not in trained]
        if not all(0 < load < inf for load in self.loads):
            raise ValueError(f"loads must be above 0 and finite, not {self.loads}")
        sizes = {_two_digits(load * shape.parameter_count / coded) for load in self.loads}
        return [(count, seed) for seed in self.seeds for count in sorted(sizes)]


LAPTOP = SweepConfig()
# The paper states shapes, V, S, steps, batch and the number of seeds, and does not state the
# learning rate, the heads, the data set sizes and the kind of bf16.
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


def default_heads(width: int) -> int:
    """As many heads as make each HEAD_WIDTH wide, or the next fewer that divide the width."""
    return next(h for h in range(max(1, width // HEAD_WIDTH), 0, -1) if width % h == 0)


def _two_digits(value: float) -> int:
    return max(1, int(float(f"{value:.2g}")))
