"""What a sweep still has to do: which runs can begin, are given out, or must be tried again."""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence

import torch

from fastmem.base.storage import Row
from fastmem.sweeps.groups import group_key, needed_flops
from fastmem.sweeps.job import Outcome, RunResult, WorkerLost
from fastmem.sweeps.rows import RunSpec, make_row

MAX_ATTEMPTS = 3
"""A run that loses so many workers is a failed row: perhaps it is what ends them."""


class Scheduler:
    """Hands out the runs that can be trained together, and takes back what became of them.

    Runs may depend on rows (counts "auto"), and rows come back in any order. So a model is asked
    for its next runs only when none of its runs is to begin or given out: what is decided then is a
    function of its own rows, and the same runs are done, whoever does them and in whatever order.

    Args:
        ask: the runs that a sweep calls for where it has these rows; more of a model may follow.
        rows: those in the folder; of failed ones the runs are tried again. New ones are added.
        largest_first: so that workers side by side end at about the same time.
    """

    def __init__(
        self, ask: Callable[[Sequence[Row]], list[RunSpec]], rows: list[Row], largest_first: bool
    ) -> None:
        self._ask, self._rows, self._largest_first = ask, rows, largest_first
        self._ended = {row["key"] for row in rows if row["status"] == "done"}
        self._ready: dict[Hashable, deque[RunSpec]] = {}
        self._left: Counter[Hashable] = Counter()
        """Runs of each model that are to begin or given out."""
        self._most: dict[Hashable, int] = {}
        """How many of a kind may be given out together, where more had no memory or were lost."""
        self._tries: Counter[str] = Counter()
        self._refill()

    def __bool__(self) -> bool:
        """Whether anything is left."""
        return self._left.total() > 0

    def next_batch(self, size: Callable[[Sequence[RunSpec]], int]) -> tuple[RunSpec, ...]:
        """Runs of one kind, as many as `size` says of all that are to begin; none if none is."""
        if not self._ready:
            return ()
        kind, runs = next(iter(self._ready.items()))
        count = min(len(runs), size(runs), self._most.get(kind, len(runs)))
        taken = tuple(runs.popleft() for _ in range(count))
        if not runs:
            del self._ready[kind]
        return taken

    def complete(self, runs: Sequence[RunSpec], outcome: Outcome) -> list[RunResult]:
        """The rows that have come of these runs; what has no row yet can be taken again."""
        if outcome is None:
            self._most[group_key(runs[0])] = len(runs) // 2
            return self._again(runs)
        if isinstance(outcome, WorkerLost):
            self._tries.update(run.key for run in runs)
            often = [run for run in runs if self._tries[run.key] >= MAX_ATTEMPTS]
            if len(runs) > 1:  # fewer together, until the one that ends its workers is alone
                self._most[group_key(runs[0])] = len(runs) // 2
            if others := [run for run in runs if run not in often]:
                self._again(others)
            if not often:
                return []
            runs, why = often, f"Lost: {MAX_ATTEMPTS} times, {outcome.why}"
            outcome = [_lost(run, why) for run in runs]
        for run, ended in zip(runs, outcome, strict=True):
            self._rows.append(ended.row)
            self._ended.add(run.key)
            self._left[_model(run)] -= 1
        if not all(self._left[_model(run)] for run in runs):
            self._refill()
        return outcome

    def _refill(self) -> None:
        """Asks for the next runs of the models that have none left."""
        runs = [
            run
            for run in self._ask(self._rows)
            if run.key not in self._ended and not self._left[_model(run)]
        ]
        if self._largest_first:
            runs.sort(key=work_of, reverse=True)
        for run in runs:
            self._ready.setdefault(group_key(run), deque()).append(run)
        self._left.update(map(_model, runs))

    def _again(self, runs: Sequence[RunSpec]) -> list[RunResult]:
        kind = group_key(runs[0])
        queue = self._ready.pop(kind, deque())
        queue.extendleft(reversed(runs))
        self._ready = {kind: queue, **self._ready}
        return []


def work_of(run: RunSpec) -> float:
    """How long it takes, in a unit that the runs of one sweep share."""
    return run.train.seconds or needed_flops(run)


def _model(run: RunSpec) -> Hashable:
    """What decides on further runs alone: a line of the table."""
    return run.model, run.train.precision


def _lost(run: RunSpec, why: str) -> RunResult:
    # Nobody is left to say on which device it was.
    return RunResult(make_row(run, torch.device("cpu"), why))
