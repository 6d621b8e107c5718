"""The order and grouping of runs, and what follows from what became of them."""

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


def ended(runs: Sequence[RunSpec], bits: float = 2.5) -> list[RunResult]:
    return [
        RunResult(row(run.model.width, run.sequences.count, run.train.seed, bits=bits))
        for run in runs
    ]


def everything(scheduler: Scheduler, size: int = 1) -> list[tuple[str, ...]]:
    """The keys of all groups, each done before the next is taken."""
    taken = []
    while scheduler:
        runs = scheduler.next_batch(lambda runs: size)
        taken.append(tuple(run.key for run in runs))
        scheduler.complete(runs, ended(runs))
    return taken


def test_each_run_once_in_groups_of_a_kind() -> None:
    """Fails if a run is lost or doubled, kinds mix, or the order is not that of the grid."""
    groups = everything(Scheduler(lambda rows: GRID.runs(), [], False), size=3)
    assert groups == [tuple(run.key for run in kind) for kind in group_compatible(GRID.runs())]


def test_done_runs_are_left_out_and_failed_ones_not() -> None:
    """Fails if work is done twice, or a failure of an earlier sweep is for ever."""
    rows = [one.row for one in ended(GRID.runs()[:3])]
    rows[1] = rows[1] | {"status": "failed"}
    keys = {
        key
        for group in everything(Scheduler(lambda rows: GRID.runs(), rows, False))
        for key in group
    }
    assert keys == {run.key for run in GRID.runs()} - {rows[0]["key"], rows[2]["key"]}


def test_the_largest_come_first_where_workers_share() -> None:
    """Fails if the longest run begins last, when the others have nothing left to do."""
    runs = [run for (run,) in zip(GRID.runs(), strict=True)]
    (first, *_), *_, (last, *_) = everything(Scheduler(lambda rows: runs, [], True))
    assert "1x12" in first
    assert "1x8" in last


def test_a_run_that_ends_its_workers_takes_no_other_with_it() -> None:
    """Fails if runs that were beside it fail too, or go on in groups as large as before."""
    grid = replace(GRID, width=(8,), counts=(8,), seeds=(0, 1, 2, 3))
    scheduler = Scheduler(lambda rows: grid.runs(), [], False)
    for _ in range(MAX_ATTEMPTS - 1):
        first = scheduler.next_batch(lambda runs: 1)
        assert scheduler.complete(first, WorkerLost("its process 3 was killed")) == []
    together = scheduler.next_batch(len)
    assert len(together) == 4
    ((failed, _),) = scheduler.complete(together, WorkerLost("its process 4 was killed"))
    assert failed["key"] == first[0].key
    left = [scheduler.next_batch(len) for _ in range(2)]
    assert [len(runs) for runs in left] == [2, 1]
    assert scheduler.complete(left[0], ended(left[0]))
    assert scheduler.complete(left[1], ended(left[1]))
    assert not scheduler


def test_a_run_fails_after_some_lost_workers() -> None:
    """Fails if a run that ends its workers goes on for ever, or stops the others."""
    scheduler = Scheduler(lambda rows: GRID.runs(), [], False)
    first = scheduler.next_batch(lambda runs: 1)
    for _ in range(MAX_ATTEMPTS - 1):
        assert scheduler.complete(first, WorkerLost("its process 3 was killed")) == []
        assert scheduler.next_batch(lambda runs: 1) == first
    ((failed, bits),) = scheduler.complete(first, WorkerLost("its process 3 was killed"))
    assert (failed["key"], failed["status"], bits) == (first[0].key, "failed", None)
    assert failed["error"] == "Lost: 3 times, its process 3 was killed"
    assert len(everything(scheduler)) == len(GRID.runs()) - 1


def test_too_many_at_once() -> None:
    """Fails if a group that did not fit comes again as it was, or its runs are lost."""
    grid = replace(GRID, width=(8,), counts=(8,), seeds=tuple(range(7)))
    scheduler = Scheduler(lambda rows: grid.runs(), [], False)
    five = scheduler.next_batch(lambda runs: 5)
    assert scheduler.complete(five, None) == []
    sizes = [len(group) for group in everything(scheduler, size=5)]
    assert sizes == [2, 2, 2, 1]


@pytest.mark.parametrize("backwards", [False, True])
def test_the_runs_of_auto_do_not_depend_on_who_is_first(backwards: bool) -> None:
    """Fails if a model is asked for further runs before all of its last ones are done: with one
    seed of two there, another size may look best."""
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
