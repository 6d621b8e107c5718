"""A job: runs that are trained together, as one worker does them, from seeds to rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastmem.base.arguments import checked_device
from fastmem.base.lock import is_stamped
from fastmem.base.storage import Row
from fastmem.models.flops import matmul_rate
from fastmem.models.gpt import GPT
from fastmem.models.score import sequence_bits
from fastmem.sweeps.groups import check_fits, out_of_memory, what_is_missing
from fastmem.sweeps.rows import RunSpec, make_row
from fastmem.training.run_state import Diverged, TrainResult
from fastmem.training.trainer import train_many


@dataclass(frozen=True)
class Job:
    """What a worker is told, in this process or on another machine."""

    runs: tuple[RunSpec, ...]
    """Of one kind (`fastmem.sweeps.groups.group_compatible`)."""
    device: str
    folder: Path
    """Of the sweep, absolute; checkpoints go there if the worker sees it."""
    stamp: str
    """What its lock says: a folder of that name on another machine may be another."""
    sequence_bits: bool = False
    """Whether to score each sequence, and as many held-out ones."""

    @property
    def name(self) -> str:
        more = len(self.runs) - 1
        return f"{self.runs[0].key} and {more} more" if more else self.runs[0].key

    def checkpoints(self) -> list[Path | None]:
        """A file for each run; None where the folder is not seen from here."""
        if not is_stamped(self.folder, self.stamp):
            return [None] * len(self.runs)
        return [checkpoint_of(self.folder, run.key) for run in self.runs]


class RunResult(NamedTuple):
    """A run at its end."""

    row: Row
    bits: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    """Of members and of held-out sequences, if they were asked for and the run is done."""


@dataclass(frozen=True)
class WorkerLost:
    """What became of a job whose worker is gone."""

    why: str


Outcome = list[RunResult] | WorkerLost | None
"""None where there was no memory for so many runs at once."""


def run_job(job: Job, progress: bool = False) -> list[RunResult] | None:
    """Trains and scores the runs of a job; None if there is no memory for so many at once."""
    device = checked_device(job.device)
    done = _execute(job.runs, device, job.checkpoints(), progress and job.name)
    if done is None:
        return None
    return [
        RunResult(row, _bits(run, model) if job.sequence_bits and model is not None else None)
        for run, (row, model) in zip(job.runs, done, strict=True)
    ]


def execute(run: RunSpec, device: str, checkpoint: Path, progress: bool) -> tuple[Row, GPT | None]:
    """Trains and scores one run; one that diverges or does not fit is a failed row, no model."""
    done = _execute([run], checked_device(device), [checkpoint], progress and run.key)
    assert done is not None  # only a group can be made smaller
    return done[0]


def checkpoint_of(folder: Path, key: str) -> Path:
    """Where a run of a sweep saves itself."""
    return folder / "checkpoints" / f"{key}.pt"


def has_ended(row: Row) -> bool:
    """Whether its checkpoint is of no use: a run that had no memory, or lost its worker, can go on
    from it."""
    return row["status"] == "done" or str(row["error"]).startswith("Diverged")


def _execute(
    runs: Sequence[RunSpec],
    device: torch.device,
    checkpoints: Sequence[Path | None],
    progress: bool | str,
) -> list[tuple[Row, GPT | None]] | None:
    """Trains and scores runs together; None if there is no memory for so many."""
    if device.type == "cuda":
        # Measured now, so that its large matrices are no part of a run's peak.
        matmul_rate(device, torch.float32 if runs[0].train.precision == "fp32" else torch.bfloat16)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    outcomes: Sequence[TrainResult | Diverged]
    try:
        check_fits(runs, device)
        models = [GPT(run.model, seed=run.train.seed, device=device) for run in runs]
        sets, configs = [run.sequences for run in runs], [run.train for run in runs]
        outcomes = train_many(models, sets, configs, checkpoints, progress)
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


def _bits(run: RunSpec, model: GPT) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each sequence of its set costs under the trained model, and as many held-out ones."""
    others = run.sequences.held_out(run.sequences.count)
    members = sequence_bits(model, run.sequences, run.train.precision)
    return members, sequence_bits(model, others, run.train.precision)
