"""Where jobs are done: in this process, or in others beside it on this machine."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Protocol, Self

import torch
from tqdm import tqdm

from fastmem.base.arguments import checked_device, integer
from fastmem.sweeps.groups import group_size
from fastmem.sweeps.job import Job, Outcome, RunResult, WorkerLost, run_job
from fastmem.sweeps.rows import RunSpec

POLL_SECONDS = 1.0
"""A wait ends after so long with nothing, so that a display can go on."""
MAX_STARTS = 3
"""Processes in a row that end before they begin: another would too."""
SPIN_COUNT = "1000"
"""How long OpenMP's threads spin while they wait (docs/lab.md)."""


class Workers(Protocol):
    """Those who do jobs; as a context, they are there inside of it and gone outside."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *failure: object) -> None:
        """Ends what is still being done; what it has saved stays."""

    @property
    def room(self) -> int:
        """How many more jobs can begin now."""

    def size(self, runs: Sequence[RunSpec]) -> int:
        """How many of these runs, which are alike, are to be one job."""

    def begin(self, job: Job) -> None:
        """Starts a job; there is room."""

    def wait(self) -> list[tuple[Job, Outcome]]:
        """The jobs that have ended, at least one or after POLL_SECONDS perhaps none. An error that
        is no matter of one run is raised."""


class InProcess:
    """This process, one job at a time."""

    def __init__(self, device: str, progress: bool) -> None:
        self._device, self._progress = checked_device(device), progress
        self._job: Job | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._job = None

    @property
    def room(self) -> int:
        return 1 if self._job is None else 0

    def size(self, runs: Sequence[RunSpec]) -> int:
        return group_size(runs, self._device)

    def begin(self, job: Job) -> None:
        self._job = job

    def wait(self) -> list[tuple[Job, Outcome]]:
        job, self._job = self._job, None
        assert job is not None
        return [(job, run_job(job, self._progress))]


class LocalProcesses:
    """Processes on this machine: one a GPU, or each with its part of the cores and threads.

    A process that is killed costs its own job, which can be given out again; the others go on.
    They end with this process, however it ends.

    Args:
        count: at most one for each GPU.
        device: cpu; or cuda, of which each process has one.

    Raises:
        ValueError: more processes than GPUs.
    """

    def __init__(self, count: int, device: str) -> None:
        integer("workers", count, 1, 4096)
        place = checked_device(device)
        devices = [device] * count
        if place.type == "cuda":
            there = [place.index] if place.index is not None else range(torch.cuda.device_count())
            if count > len(there):
                raise ValueError(
                    f"{count} workers need {count} GPUs, {device} has {len(there)}: "
                    f"use --workers {len(there)}"
                )
            devices = [f"cuda:{index}" for index in there][:count]
        threads = max(1, torch.get_num_threads() // count)
        self._workers = [
            Process(name, threads, cores)
            for name, cores in zip(devices, core_sets(count), strict=True)
        ]
        self._device = place

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        # Also those that have nothing to do: a process that has loaded torch takes a second to end.
        for worker in self._workers:
            worker.let_go()
        for worker in self._workers:
            worker.stop()

    @property
    def room(self) -> int:
        return sum(worker.job is None for worker in self._workers)

    def size(self, runs: Sequence[RunSpec]) -> int:
        # What one process holds, but something for each of the others too.
        return min(group_size(runs, self._device), ceil(len(runs) / len(self._workers)))

    def begin(self, job: Job) -> None:
        next(worker for worker in self._workers if worker.job is None).begin(job)

    def wait(self) -> list[tuple[Job, Outcome]]:
        busy = {worker.future: worker for worker in self._workers if worker.future is not None}
        done, _ = wait(busy, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        ended = []
        for future in done:
            try:
                ended.append(busy[future].take())
            except Exception:
                if not ended:
                    raise
                # The others' rows are written first; the next wait raises it.
        return ended


class Process:
    """One process and the job that it does. It is started when it is needed, and again when it is
    lost; a pool of one, so that a death is that of its own job and of no other."""

    def __init__(self, device: str, threads: int, cores: Sequence[int]) -> None:
        self._device, self._threads, self._cores = device, threads, cores
        self._pool: ProcessPoolExecutor | None = None
        self._false_starts = 0
        self.job: Job | None = None
        self.future: Future[list[RunResult] | None] | None = None

    def begin(self, job: Job) -> None:
        pool = self._pool or self._start()
        task = replace(job, device=self._device)
        try:
            future = pool.submit(run_job, task)
        except BrokenProcessPool:  # killed while it had nothing to do
            self.stop()
            future = self._start().submit(run_job, task)
        self.job, self.future = job, future

    def take(self) -> tuple[Job, Outcome]:
        """The job, which has ended, and its outcome."""
        job, future = self.job, self.future
        assert job is not None
        assert future is not None
        outcome: Outcome
        try:
            outcome = future.result()
            self._false_starts = 0
        except BrokenProcessPool:
            outcome = self._lost()
        self.job = self.future = None
        return job, outcome

    def let_go(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._pool is not None:
            self._leash.close()

    def stop(self) -> None:
        """Waits until the process has ended."""
        if self._pool is not None:
            self.let_go()
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _start(self) -> ProcessPoolExecutor:
        context = get_context("spawn")
        theirs, self._leash = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            1, context, initializer=_prepare, initargs=(theirs, self._threads, self._cores)
        )
        with _inherited(self._threads):
            self._first = self._pool.submit(os.getpid)
        theirs.close()
        return self._pool

    def _lost(self) -> WorkerLost:
        began = self._first.done() and self._first.exception() is None
        self.stop()
        if began:
            self._false_starts = 0
            return WorkerLost(f"its process {self._first.result()} was killed or crashed")
        self._false_starts += 1
        if self._false_starts >= MAX_STARTS:
            raise OSError(f"{MAX_STARTS} worker processes ended before they began")
        return WorkerLost("its process ended before it began")


def core_sets(count: int) -> list[list[int]]:
    """The cores of this process divided among so many; shared where there are fewer."""
    if not hasattr(os, "sched_getaffinity"):
        return [[]] * count
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        return [[cores[k % len(cores)]] for k in range(count)]
    ends = [k * len(cores) // count for k in range(count + 1)]
    return [cores[ends[k] : ends[k + 1]] for k in range(count)]


@contextmanager
def _inherited(threads: int) -> Iterator[None]:
    """What a process that is started now has from this one.

    - The number of threads, and how long they spin: OpenMP reads both once, when torch loads.
    - Ctrl-C blocked: it goes to all processes of a terminal, and only the driver answers it.
    - No main program: the process needs none, and a script without a guard would run again.
    """
    settings = {"OMP_NUM_THREADS": str(threads)}
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        settings["GOMP_SPINCOUNT"] = SPIN_COUNT
    before = {name: os.environ.get(name) for name in settings}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _prepare(leash: Connection, threads: int, cores: Sequence[int]) -> None:
    """The first that a worker process does."""
    threading.Thread(target=_end_with, args=(leash,), daemon=True).start()
    if cores:
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    # Else tqdm makes one for all processes, and Python tells of the leak when this one is killed.
    tqdm.set_lock(threading.RLock())


def _end_with(leash: Connection) -> None:
    """Ends this process when the other end of the pipe is closed, or its holder is gone."""
    leash.poll(None)
    os._exit(1)
