"""The order and grouping of runs, and what follows from their outcomes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from cases.sweep_rows import row

from fastmem import SweepConfig
from fastmem.sweeps.groups import group_compatible
from fastmem.sweeps.job import RunResult, WorkerLost
from fastmem.sweeps.rows import RunSpec
from fastmem.sweeps.scheduler import MAX_ATTEMPTS, Scheduler

GRID = SweepConfig(width=(8, 12), vocab=16, length=4, counts=(4, 8), seeds=(0, 1), heads=(2,))


def results(runs: Sequence[RunSpec], bits: float = 2.5) -> list[RunResult]:
    return [
        RunResult(row(run.model.width, run.sequences.count, run.train.seed, bits=bits))
        for run in runs
    ]


def everything(scheduler: Scheduler, size: int = 1) -> list[tuple[str, ...]]:
    """The keys of all batches, each completed before the next."""
    batches = []
    while scheduler:
        runs = scheduler.next_batch(lambda runs: size)
        batches.append(tuple(run.key for run in runs))
        scheduler.complete(runs, results(runs))
    return batches


def test_each_run_once_with_compatible_runs() -> None:
    """Fails if a run is lost or doubled, a batch mixes groups, or the order is not the grid's."""
    groups = everything(Scheduler(lambda rows: GRID.runs(), [], False), size=3)
    assert groups == [tuple(run.key for run in group) for group in group_compatible(GRID.runs())]


def test_done_runs_are_left_out_and_failed_runs_are_not() -> None:
    """Fails if a done run is trained again, or a failed run of an earlier sweep is not."""
    rows = [result.row for result in results(GRID.runs()[:3])]
    rows[1] = rows[1] | {"status": "failed"}
    keys = {
        key
        for group in everything(Scheduler(lambda rows: GRID.runs(), rows, False))
        for key in group
    }
    assert keys == {run.key for run in GRID.runs()} - {rows[0]["key"], rows[2]["key"]}


def test_the_largest_come_first_where_workers_share() -> None:
    """Fails if the longest run starts last, when the other workers are idle."""
    (first, *_), *_, (last, *_) = everything(Scheduler(lambda rows: GRID.runs(), [], True))
    assert "1x12" in first
    assert "1x8" in last


def test_a_run_that_kills_its_workers_fails_alone() -> None:
    """Fails if runs of the same batch fail too, or come again in batches as large as before."""
    grid = replace(GRID, width=(8,), counts=(8,), seeds=(0, 1, 2, 3))
    scheduler = Scheduler(lambda rows: grid.runs(), [], False)
    for _ in range(MAX_ATTEMPTS - 1):
        first = scheduler.next_batch(lambda runs: 1)
        assert scheduler.complete(first, WorkerLost("its process 3 was killed")) == []
    together = scheduler.next_batch(len)
    assert len(together) == 4
    ((failed, *_),) = scheduler.complete(together, WorkerLost("its process 4 was killed"))
    assert failed["key"] == first[0].key
    left = [scheduler.next_batch(len) for _ in range(2)]
    assert [len(runs) for runs in left] == [2, 1]
    assert scheduler.complete(left[0], results(left[0]))
    assert scheduler.complete(left[1], results(left[1]))
    assert not scheduler


def test_a_run_fails_after_some_lost_workers() -> None:
    """Fails if a run that kills its workers is tried for ever, or stops the other runs."""
    scheduler = Scheduler(lambda rows: GRID.runs(), [], False)
    first = scheduler.next_batch(lambda runs: 1)
    for _ in range(MAX_ATTEMPTS - 1):
        assert scheduler.complete(first, WorkerLost("its process 3 was killed")) == []
        assert scheduler.next_batch(lambda runs: 1) == first
    ((failed, bits, _),) = scheduler.complete(first, WorkerLost("its process 3 was killed"))
    assert (failed["key"], failed["status"], bits) == (first[0].key, "failed", None)
    assert failed["error"] == "Lost: 3 times, its process 3 was killed"
    assert len(everything(scheduler)) == len(GRID.runs()) - 1


def test_a_batch_too_large_for_the_memory() -> None:
    """Fails if the batch comes again as large as it was, or its runs are lost."""
    grid = replace(GRID, width=(8,), counts=(8,), seeds=tuple(range(7)))
    scheduler = Scheduler(lambda rows: grid.runs(), [], False)
    five = scheduler.next_batch(lambda runs: 5)
    assert scheduler.complete(five, None) == []
    sizes = [len(group) for group in everything(scheduler, size=5)]
    assert sizes == [2, 2, 2, 1]


@pytest.mark.parametrize("backwards", [False, True])
def test_the_runs_of_auto_do_not_depend_on_who_is_first(backwards: bool) -> None:
    """Fails if a model gets further runs before all its earlier runs are done: with one of two
    seeds done, another size may look best."""
    config = replace(GRID, counts="auto", seeds=(0, 1, 2, 3))

    def memorized(run: RunSpec) -> float:
        most = 0.3 * run.model.parameter_count * (1 + 0.05 * run.train.seed)
        return min(0.99 * run.sequences.coded_entropy_bits, most)

    def outcome(run: RunSpec) -> RunResult:
        one: dict[str, Any] = row(run.model.width, run.sequences.count, run.train.seed)
        one["memorized_bits"] = {"strict": memorized(run), "published": 0.0}
        return RunResult(one)

    def done(at_once: int) -> set[str]:
        scheduler, running, keys = Scheduler(config.runs, [], at_once > 1), [], set()
        while scheduler:
            while len(running) < at_once and (runs := scheduler.next_batch(lambda runs: 1)):
                running.append(runs)
            runs = running.pop(-1 if backwards else 0)
            keys |= {run.key for run in runs}
            scheduler.complete(runs, [outcome(run) for run in runs])
        return keys

    assert done(1) == done(2) == done(5)
    assert len(done(1)) > 2 * 4
