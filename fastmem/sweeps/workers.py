"""Workers, which train jobs: this process, or processes beside it on this machine."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from math import ceil
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, Protocol, Self

import torch
from tqdm import tqdm

from fastmem.base.arguments import checked_device
from fastmem.base.openmp import default_spin
from fastmem.sweeps.groups import group_size
from fastmem.sweeps.job import Job, Outcome, WorkerLost, run_job
from fastmem.sweeps.rows import RunSpec

POLL_SECONDS = 1.0
"""The longest wait for a job, so that the display stays current."""
MAX_STARTS = 3
"""Processes in a row that die while starting, before a sweep gives up."""


class Workers(Protocol):
    """Trains jobs; as a context manager, starts the workers and ends them."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *failure: object) -> None:
        """Ends running jobs; their checkpoints stay."""

    @property
    def room(self) -> int:
        """How many more jobs can begin now."""

    def size(self, runs: Sequence[RunSpec]) -> int:
        """How many of these runs, which can train together, form one job."""

    def begin(self, job: Job) -> None:
        """Starts a job; requires room."""

    def wait(self) -> list[tuple[Job, Outcome]]:
        """Waits for a job to end, at most POLL_SECONDS; returns the jobs that have ended.

        Raises an error that ends the sweep, after which no run can go on."""


class InProcess:
    """This process, one job at a time.

    Args:
        device: where it trains.
        progress: shows the progress bar of the job.
    """

    label: Callable[[Job, float | None], str] = staticmethod(lambda job, _: job.name)
    """What the bar says, from the job and its seconds left."""

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
        return [(job, run_job(job, self._progress and partial(self.label, job)))]


class LocalProcesses:
    """Processes on this machine: one a GPU, or each with a part of the cores and threads.

    A killed process loses only its own job, which can be handed out again. All processes end with
    this process, however it ends.

    Args:
        count: how many processes; at most one a GPU.
        device: cpu, or cuda, where each process has its GPU.

    Raises:
        ValueError: more processes than GPUs.
    """

    def __init__(self, count: int, device: str) -> None:
        self._device = checked_device(device)
        devices = [device] * count
        if self._device.type == "cuda":
            index = self._device.index
            gpus = range(torch.cuda.device_count()) if index is None else [index]
            if count > len(gpus):
                raise ValueError(
                    f"{count} workers need {count} GPUs, {device} has {len(gpus)}: "
                    f"use --workers {len(gpus)}"
                )
            devices = [f"cuda:{gpu}" for gpu in gpus][:count]
        threads = max(1, torch.get_num_threads() // count)
        self._workers: Sequence[Worker] = [
            Process(name, threads, cores)
            for name, cores in zip(devices, core_sets(count), strict=True)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        # All at once, since a process that has loaded torch takes a second to end.
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.stop()

    @property
    def room(self) -> int:
        return sum(worker.job is None for worker in self._workers)

    def size(self, runs: Sequence[RunSpec]) -> int:
        # As many as fit, but no more than an equal part, so that no process is idle.
        return min(group_size(runs, self._device), ceil(len(runs) / len(self._workers)))

    def begin(self, job: Job) -> None:
        next(worker for worker in self._workers if worker.job is None).begin(job)

    def wait(self) -> list[tuple[Job, Outcome]]:
        busy = {worker.future: worker for worker in self._workers if worker.future is not None}
        done, _ = wait(busy, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        outcomes = []
        for future in done:
            try:
                outcomes.append(busy[future].take())
            except Exception:
                if not outcomes:
                    raise
                # The sweep first writes the rows of the other jobs; the next wait raises this.
        return outcomes


class Worker(Protocol):
    """Trains one job at a time."""

    job: Job | None
    future: Future[Any] | None
    """Done when the job has ended."""

    def begin(self, job: Job) -> None:
        """Starts a job, and whatever the worker needs for it."""

    def take(self) -> tuple[Job, Outcome]:
        """The ended job and its outcome."""

    def kill(self) -> None:
        """Ends the worker at any point of its work."""

    def stop(self) -> None:
        """Waits until the worker has ended."""


class Process:
    """One worker process and its job: a pool of one, so that its death loses no other job. `begin`
    starts the process, at first and after a loss."""

    def __init__(self, device: str, threads: int, cores: Sequence[int]) -> None:
        self._device, self._threads, self._cores = device, threads, cores
        self._pool: ProcessPoolExecutor | None = None
        self._false_starts = 0
        self.job: Job | None = None
        self.future: Future[Outcome] | None = None

    def begin(self, job: Job, train: Callable[[Job], Outcome] = run_job) -> None:
        pool = self._pool or self._start()
        task = replace(job, device=self._device)
        try:
            future = pool.submit(train, task)
        except BrokenProcessPool:  # the process died between two jobs
            self.stop()
            future = self._start().submit(train, task)
        self.job, self.future = job, future

    def take(self) -> tuple[Job, Outcome]:
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

    def kill(self) -> None:
        if self._pool is not None:
            self._leash.close()
            if self.future is not None and not self.future.done() and self._first.done():
                # A process that does not run cannot see the leash. It is at work, so the number is
                # its own still.
                with suppress(ProcessLookupError, BrokenProcessPool):
                    os.kill(self._first.result(), signal.SIGKILL)

    def stop(self) -> None:
        if self._pool is not None:
            self.kill()
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _start(self) -> ProcessPoolExecutor:
        context = get_context("spawn")
        child_end, self._leash = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            1, context, initializer=_prepare, initargs=(child_end, self._threads, self._cores)
        )
        with _inherited(self._threads):
            self._first = self._pool.submit(os.getpid)
        child_end.close()
        return self._pool

    def _lost(self) -> WorkerLost:
        started = self._first.done() and self._first.exception() is None
        self.stop()
        if started:
            self._false_starts = 0
            return WorkerLost(f"its process {self._first.result()} was killed or crashed")
        self._false_starts += 1
        if self._false_starts >= MAX_STARTS:
            raise OSError(f"{MAX_STARTS} worker processes in a row died while starting")
        return WorkerLost("its process died while starting")


def core_sets(count: int) -> list[list[int]]:
    """The cores of this process, divided among `count` workers, or shared if they are fewer."""
    if not hasattr(os, "sched_getaffinity"):
        return [[]] * count
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        return [[cores[k % len(cores)]] for k in range(count)]
    ends = [k * len(cores) // count for k in range(count + 1)]
    return [cores[ends[k] : ends[k + 1]] for k in range(count)]


@contextmanager
def _inherited(threads: int) -> Iterator[None]:
    """Sets what a process started inside this context inherits.

    - The number of threads, and how long they spin: OpenMP reads both once, when torch loads.
    - Ctrl-C blocked: a terminal sends it to all its processes, and only the driver handles it.
    - An empty main module: a worker needs none, and a script without a guard would run again.
    """
    settings = {"OMP_NUM_THREADS": str(threads), **default_spin()}
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
    """Initializes a worker process."""
    threading.Thread(target=_exit_with_parent, args=(leash,), daemon=True).start()
    if cores:
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    # tqdm would make a lock for all processes, of which Python reports a leak after a kill.
    tqdm.set_lock(threading.RLock())


def _exit_with_parent(leash: Connection) -> None:
    """Ends this process when the parent closes its end of the pipe, or dies."""
    leash.poll(None)
    os._exit(1)
