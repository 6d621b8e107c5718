"""Which runs of a sweep are queued, handed out, or tried again."""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence

import torch

from fastmem.base.storage import Row
from fastmem.sweeps.groups import group_key, model_key, needed_flops
from fastmem.sweeps.job import Outcome, RunResult, WorkerLost
from fastmem.sweeps.rows import RunSpec, make_row

MAX_ATTEMPTS = 3
"""A run that loses this many workers becomes a failed row, since it may be what kills them."""


class Scheduler:
    """Hands out runs that can train together, and takes back their outcomes.

    Runs may depend on rows (counts "auto"), and rows arrive in any order. So a model gets its next
    runs only when none of its runs is queued or handed out: they then depend on the rows of this
    model alone, and a sweep trains the same runs with any number of workers.

    Args:
        needed: returns the runs of the sweep, given its rows; a model may need more later.
        rows: the rows in the folder; runs with a failed row are tried again, new rows are added.
        largest_first: starts large runs first, so that parallel workers end at similar times.
    """

    def __init__(
        self, needed: Callable[[Sequence[Row]], list[RunSpec]], rows: list[Row], largest_first: bool
    ) -> None:
        self._needed, self._rows, self._largest_first = needed, rows, largest_first
        self._completed = {row["key"] for row in rows if row["status"] == "done"}
        self._queues: dict[Hashable, deque[RunSpec]] = {}
        """Queued runs by group key."""
        self._open: Counter[Hashable] = Counter()
        """How many runs of each model are queued or handed out."""
        self._limits: dict[Hashable, int] = {}
        """The largest batch of a group key, once a batch had too little memory or was lost."""
        self._losses: Counter[str] = Counter()
        """How many workers each run has lost."""
        self._refill()

    def __bool__(self) -> bool:
        """True while runs are queued or handed out."""
        return self._open.total() > 0

    def next_batch(self, size: Callable[[Sequence[RunSpec]], int]) -> tuple[RunSpec, ...]:
        """Pops up to `size(runs)` queued runs that can train together."""
        if not self._queues:
            return ()
        key, runs = next(iter(self._queues.items()))
        count = min(len(runs), size(runs), self._limits.get(key, len(runs)))
        batch = tuple(runs.popleft() for _ in range(count))
        if not runs:
            del self._queues[key]
        return batch

    def complete(self, runs: Sequence[RunSpec], outcome: Outcome) -> list[RunResult]:
        """Takes the outcome of a batch; returns its results, and queues its other runs again."""
        if outcome is None:
            self._limits[group_key(runs[0])] = len(runs) // 2
            self._requeue(runs)
            return []
        if isinstance(outcome, WorkerLost):
            runs, outcome = self._retry(runs, outcome.why)
        for run, result in zip(runs, outcome, strict=True):
            self._rows.append(result.row)
            self._completed.add(run.key)
            self._open[model_key(run)] -= 1
        if not all(self._open[model_key(run)] for run in runs):
            self._refill()
        return outcome

    def _refill(self) -> None:
        """Queues the next runs of the models that have none open."""
        runs = [
            run
            for run in self._needed(self._rows)
            if run.key not in self._completed and not self._open[model_key(run)]
        ]
        if self._largest_first:
            runs.sort(key=work_of, reverse=True)
        for run in runs:
            self._queues.setdefault(group_key(run), deque()).append(run)
        self._open.update(map(model_key, runs))

    def _retry(self, runs: Sequence[RunSpec], why: str) -> tuple[list[RunSpec], list[RunResult]]:
        """Queues the runs of a lost batch again; returns those that have lost too many workers."""
        self._losses.update(run.key for run in runs)
        failed = [run for run in runs if self._losses[run.key] >= MAX_ATTEMPTS]
        if len(runs) > 1:  # halved until the run that kills its workers is alone
            self._limits[group_key(runs[0])] = len(runs) // 2
        self._requeue([run for run in runs if run not in failed])
        error = f"Lost: {MAX_ATTEMPTS} times, {why}"
        # The device is unknown: its worker is dead.
        return failed, [RunResult(make_row(run, torch.device("cpu"), error)) for run in failed]

    def _requeue(self, runs: Sequence[RunSpec]) -> None:
        if runs:
            key = group_key(runs[0])
            queue = self._queues.pop(key, deque())
            queue.extendleft(reversed(runs))
            self._queues = {key: queue, **self._queues}


def work_of(run: RunSpec) -> float:
    """How long a run takes, in a unit that the runs of one sweep share."""
    return run.train.seconds or needed_flops(run)
