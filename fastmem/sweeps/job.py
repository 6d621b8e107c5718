"""A job: runs that one worker trains together, from seeds to rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastmem.base.arguments import checked_device
from fastmem.base.lock import is_stamped
from fastmem.base.ranks import Ranks, current, joined
from fastmem.base.stats import Floats
from fastmem.base.storage import Row
from fastmem.models.flops import matmul_rate
from fastmem.models.gpt import GPT
from fastmem.models.score import sequence_scores
from fastmem.models.sharded import Sharding, sharded_gpt
from fastmem.sweeps.groups import check_fits, memory_advice, out_of_memory
from fastmem.sweeps.rows import RunSpec, make_row
from fastmem.training.checkpoint import shards_of
from fastmem.training.group import Label
from fastmem.training.run_state import Diverged, TrainResult
from fastmem.training.trainer import train_many


@dataclass(frozen=True)
class Job:
    """What a worker receives, in this process or on another machine."""

    runs: tuple[RunSpec, ...]
    """Runs that can train together (`fastmem.sweeps.groups.group_compatible`)."""
    device: str
    folder: Path
    """The sweep's folder, absolute; checkpoints go there if the worker sees it."""
    stamp: str
    """Content of the folder's lock: another machine may have another folder of this name."""
    sequence_bits: bool = False
    """True to score each sequence of the data set, and as many held-out sequences."""

    @property
    def name(self) -> str:
        return job_name(self.runs)

    def checkpoints(self) -> list[Path | None]:
        """The checkpoint file of each run; None if this machine does not see the folder."""
        if not is_stamped(self.folder, self.stamp):
            return [None] * len(self.runs)
        return [checkpoint_of(self.folder, run.key) for run in self.runs]


def job_name(runs: Sequence[RunSpec]) -> str:
    """The key of the first run, and how many more there are."""
    more = len(runs) - 1
    return f"{runs[0].key} and {more} more" if more else runs[0].key


class RunResult(NamedTuple):
    """The row of a run that ended, and the bits of its sequences."""

    row: Row
    bits: tuple[Floats, Floats] | None = None
    """Bits of members and of held-out sequences, if the job scores them and the run is done."""
    greedy_from: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    """With the bits: the prefixes from which greedy decoding returns them."""


@dataclass(frozen=True)
class WorkerLost:
    """The outcome of a job whose worker died."""

    why: str


Outcome = list[RunResult] | WorkerLost | None
"""None if memory is too small for all runs of the job at once."""


def run_job(
    job: Job, progress: bool | Label = False, ranks: Ranks | None = None
) -> list[RunResult] | None:
    """Trains and scores the runs of a job; None if memory is too small for all at once, or if one
    must go on alone. With ranks all of them train its only run together."""
    device, checkpoints = checked_device(job.device), job.checkpoints()
    sharding = None
    if ranks is None and any(path and shards_of(path).exists() for path in checkpoints):
        if len(job.runs) > 1:
            return None
        with joined(job.device) as alone:  # goes on from a checkpoint of several ranks
            return run_job(job, progress, alone)
    if ranks is not None:
        device, sharding = ranks.device, Sharding()
        if not ranks.all(None not in checkpoints):
            checkpoints = [None]
    done = train_group(job.runs, device, checkpoints, progress, sharding)
    if done is None:
        return None
    return [
        RunResult(row, *_bits(run, model)) if job.sequence_bits and model else RunResult(row)
        for run, (row, model) in zip(job.runs, done, strict=True)
    ]


def run_alone(
    run: RunSpec,
    device: str | torch.device,
    checkpoint: Path,
    progress: bool,
    sharding: Sharding | None = None,
) -> tuple[Row, GPT | None]:
    """Trains and scores one run; a run that diverges or does not fit gives a failed row and no
    model. With a sharding all ranks of `joined` train it together."""
    done = train_group([run], checked_device(device), [checkpoint], progress, sharding)
    assert done is not None  # None would ask for a smaller group
    return done[0]


def checkpoint_of(folder: Path, key: str) -> Path:
    """The checkpoint file of a run."""
    return folder / "checkpoints" / f"{key}.pt"


def is_final(row: Row) -> bool:
    """True if the run need not resume: it is done or diverged. A run that lacked memory or lost its
    worker can resume from its checkpoint."""
    return row["status"] == "done" or str(row["error"]).startswith("Diverged")


def train_group(
    runs: Sequence[RunSpec],
    device: torch.device,
    checkpoints: Sequence[Path | None],
    progress: bool | Label,
    sharding: Sharding | None = None,
) -> list[tuple[Row, GPT | None]] | None:
    """Trains and scores runs together; None if memory is too small for several runs."""
    if device.type == "cuda":
        # Measured now, so that its large matrices do not count in the peak memory of a run.
        matmul_rate(device, torch.float32 if runs[0].train.precision == "fp32" else torch.bfloat16)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    outcomes: Sequence[TrainResult | Diverged]
    try:
        check_fits(runs, device, 1 if sharding is None else current().size)
        models = [_made(run, device, sharding) for run in runs]
        sets, configs = [run.sequences for run in runs], [run.train for run in runs]
        outcomes = train_many(models, sets, configs, checkpoints, progress)
    except (MemoryError, RuntimeError) as failure:
        if not out_of_memory(failure) or (sharding is not None and current().size > 1):
            raise  # other ranks may have memory: they are told
        if len(runs) > 1:
            return None
        return [(row_without_memory(runs[0], device, failure), None)]
    done: list[tuple[Row, GPT | None]] = []
    for run, model, outcome in zip(runs, models, outcomes, strict=True):
        if isinstance(outcome, Diverged):
            done.append((make_row(run, device, f"Diverged: {outcome}"), None))
        else:
            done.append((make_row(run, device, outcome), model))
    if sharding is not None:
        done = [(_of_ranks(row, sharding), model) for row, model in done]
    return done


def row_without_memory(run: RunSpec, device: torch.device, failure: BaseException) -> Row:
    """The failed row of a run that lacked memory."""
    reason = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
    return make_row(run, device, f"{reason}; {memory_advice(run, device)}")


def _made(run: RunSpec, device: torch.device, sharding: Sharding | None) -> GPT:
    if sharding is None:
        return GPT(run.model, seed=run.train.seed, device=device)
    return sharded_gpt(run.model, run.train.seed, run.train.precision, sharding)


def _of_ranks(row: Row, sharding: Sharding) -> Row:
    """The row of a run of all ranks: their number, and the largest peak memory of one."""
    size, speed = current().size, row["tokens_per_second"]
    return row | {
        "ranks": size,
        "mesh": {"shard": size},
        "sharding": asdict(sharding),
        "tokens_per_second_per_rank": speed and speed / size,
        "peak_bytes": max(current().gathered(row["peak_bytes"])),
    }


def _bits(
    run: RunSpec, model: GPT
) -> tuple[tuple[Floats, Floats], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Bits and `greedy_from` of each sequence of the data set, and of held-out sequences."""
    held_out = run.held_out
    if held_out is None:
        held_out = run.sequences.held_out(run.sequences.count)
    (members, starts), (others, other_starts) = (
        sequence_scores(model, each, run.train.precision) for each in (run.sequences, held_out)
    )
    return (members, others), (starts, other_starts)
