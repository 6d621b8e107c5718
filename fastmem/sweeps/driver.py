"""The loop of a sweep: runs go to workers as jobs, rows come back into the folder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from fastmem.base.lock import locked
from fastmem.base.storage import Row, check_folder, write_json
from fastmem.base.terminal import say
from fastmem.data.files.parquet import pyarrow_parquet
from fastmem.sweeps.config import SweepConfig
from fastmem.sweeps.display import Display
from fastmem.sweeps.job import Job, RunResult, WorkerLost, checkpoint_of, is_final
from fastmem.sweeps.ranked import LocalRanks
from fastmem.sweeps.ray import RayCluster
from fastmem.sweeps.scheduler import Scheduler, work_of
from fastmem.sweeps.store import PLANNED, SWEEP, write_sequence_bits
from fastmem.sweeps.study import corpus_of, delete_runs, read_study
from fastmem.sweeps.watch import RUNNING
from fastmem.sweeps.workers import InProcess, LocalProcesses, Workers
from fastmem.training.checkpoint import delete_checkpoints


def sweep(config: SweepConfig, progress: bool = True) -> Iterator[Row]:
    """Trains the runs of the grid that have no finished row in config.out.

    Runs that can be trained together (`fastmem.sweeps.groups`) are, as many at a time as is fast
    and fits into memory; each row is what its run alone would give, to rounding. Only this process
    writes rows; workers train. On CPUs the runs and the bytes of their rows do not depend on the
    workers, at the same number of threads, except for times, peak memory and order; on GPUs, where
    workers group runs differently, they are the same to rounding. Exhaust or close this iterator:
    workers go on while it is open.

    Args:
        config: the grid; a later call may widen its axes, and may not change what all runs share.
        progress: shows a bar when standard error is a terminal: of the running run, or of all runs
            if several run at once.

    Yields:
        Each new row, once it is in rows/; its "status" is "done" or "failed".

    Raises:
        ValueError: the grid is invalid, or its device is unavailable; the folder holds another
            study, other files or a damaged row, or another sweep is at work in it.
        OSError: the folder cannot be written.
        ConnectionError: Ray's cluster is lost. Ray then ends this process after some time, even if
            the error is caught: run a sweep on Ray in a separate process.
    """
    with Sweep(config, progress) as running:
        yield from running


class Sweep:
    """A sweep, prepared once: its runs, its workers, and, inside `with`, its folder.

    `with` locks the folder and reads its rows; iteration trains the runs that are left and yields
    their rows. Arguments and errors are those of `sweep`.
    """

    rows: list[Row]
    """Rows in the folder; new rows are added."""

    def __init__(self, config: SweepConfig, progress: bool = True) -> None:
        self.config, self._progress = config, progress
        self.runs = config.runs()
        """Runs of the grid; with counts="auto" the first run of each model."""
        self._workers = make_workers(config, progress)
        if config.sequence_bits:
            pyarrow_parquet()

    def __enter__(self) -> Self:
        out = self.config.out
        if not self.config.overwrite:
            check_folder(out, (*SWEEP, *self.config.own), "sweep")
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._stamp = stack.enter_context(locked(out))
            if self.config.overwrite:
                delete_runs(out)
            self.rows = read_study(self.config)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self._exit.close()

    @property
    def automatic(self) -> bool:
        """True if the runs of a model follow from its finished runs."""
        return self.config.counts == "auto"

    def count(self, status: str) -> int:
        """How many runs of the grid have a row of this status."""
        keys = {run.key for run in self.runs}
        rows = (row for row in self.rows if self.automatic or row["key"] in keys)
        return sum(row["status"] == status for row in rows)

    def __iter__(self) -> Iterator[Row]:
        out, device, workers = self.config.out, self.config.device, self._workers
        needed = self.config.runs if self.automatic else lambda _: self.runs
        scheduler = Scheduler(needed, self.rows, largest_first=not isinstance(workers, InProcess))
        for row in self.rows:
            if row["status"] == "done":
                delete_checkpoints(checkpoint_of(out, row["key"]))
        work = self._announce()
        if not scheduler:
            return
        display = Display(work, self.rows, self._progress and not isinstance(workers, InProcess))
        if isinstance(workers, InProcess):
            workers.label = display.label
        with _marks(out) as running, workers, display:
            while scheduler:
                while workers.room > 0 and (runs := scheduler.next_batch(workers.size)):
                    job = Job(
                        runs,
                        device,
                        out.resolve(),
                        self._stamp,
                        self.config.sequence_bits,
                    )
                    for run in runs:
                        (running / run.key).touch()
                    display.begin(job)
                    workers.begin(job)
                display.draw()
                new: list[Row] = []
                for job, outcome in workers.wait():
                    for run in job.runs:
                        (running / run.key).unlink(missing_ok=True)
                    display.end(job)
                    results = scheduler.complete(job.runs, outcome)
                    if isinstance(outcome, WorkerLost) and not results and self._progress:
                        say(f"{job.name} is tried again, from its checkpoint: {outcome.why}")
                    for result in results:
                        new.append(_write(out, result))
                        display.add(new[-1])
                if self.automatic:
                    self._announce()
                yield from new  # once all are written: a caller may stop at any of them

    def _announce(self) -> dict[str, float]:
        """Writes planned.json; returns the work of each planned run, nothing if more may follow."""
        runs = self.config.runs(self.rows) if self.automatic else self.runs
        work = {run.key: work_of(run) for run in runs}
        write_json(self.config.out / PLANNED, {"work": work, "search": self.automatic})
        return {} if self.automatic else work


def make_workers(config: SweepConfig, progress: bool = True) -> Workers:
    """The workers of a sweep, not started; ValueError if they are unavailable."""
    ranks = config.gpus_per_run
    if config.ray is None:
        if ranks > 1:
            return LocalRanks(config.workers, ranks, config.device)
        if config.workers == 1:
            return InProcess(config.device, progress)
        return LocalProcesses(config.workers, config.device)
    if config.workers > 1:
        raise ValueError(
            f"--workers {config.workers} and --ray {config.ray}: Ray counts its own workers; leave "
            "one of the two out"
        )
    return RayCluster(config.ray, config.device, config.ray_cpus, config.ray_gpus, ranks)


def _write(folder: Path, result: RunResult) -> Row:
    row, key = result.row, result.row["key"]
    if result.bits is not None:
        members, held_out = result.bits
        write_sequence_bits(folder, key, members, held_out, result.greedy_from)
        if corpus_of(row) is None:  # held-out text is of three kinds, whose mean says nothing
            row["held_out_bits"] = float(held_out.mean())
    write_json(folder / "rows" / f"{key}.json", row)
    if is_final(row):
        delete_checkpoints(checkpoint_of(folder, key))
    return row


@contextmanager
def _marks(out: Path) -> Iterator[Path]:
    """The folder running/, empty before and after; it has a file for each run in training."""
    folder = out / RUNNING
    folder.mkdir(exist_ok=True)
    try:
        for mark in folder.iterdir():
            mark.unlink()
        yield folder
    finally:
        for mark in folder.iterdir():
            mark.unlink()
