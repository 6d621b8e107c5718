"""Workers that train one model together: each a group of ranks, of which every rank has a part."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import torch
from torch._C._distributed_c10d import TCPStore

from fastmem.base.arguments import checked_device
from fastmem.base.rank_watch import RankLost
from fastmem.base.ranks import Stopped, joined
from fastmem.base.terminal import unfailing_output
from fastmem.sweeps.groups import out_of_memory
from fastmem.sweeps.job import Job, Outcome, RunResult, WorkerLost, row_without_memory, run_job
from fastmem.sweeps.rows import RunSpec
from fastmem.sweeps.workers import LocalProcesses, Process, core_sets

SETTLE_SECONDS = 1.0
"""After the first failure of a rank, the wait for a rank whose death caused it."""


class LocalRanks(LocalProcesses):
    """Groups of processes on this machine, each of which trains one model at a time, as ranks.

    A killed rank loses only the job of its group, which can be handed out again and goes on from
    its checkpoint. All processes end with this process, however it ends.

    Args:
        count: how many groups.
        ranks: processes of a group; with device cuda each has a GPU.
        device: cpu or cuda.

    Raises:
        ValueError: more ranks than GPUs, or the device is one GPU.
    """

    def __init__(self, count: int, ranks: int, device: str) -> None:
        self._device = checked_device(device)
        if self._device.type == "cuda":
            _check_gpus(count, ranks, device)
        threads = max(1, torch.get_num_threads() // (count * ranks))
        cores = core_sets(count * ranks)
        self._workers = [
            RankProcesses(
                [Process(device, threads, cores[first + rank]) for rank in range(ranks)], first
            )
            for first in range(0, count * ranks, ranks)
        ]

    def size(self, runs: Sequence[RunSpec]) -> int:
        return 1


class RankProcesses:
    """Processes that train one model together, a worker as `Process` is. If one of them is lost,
    all end, and `begin` starts all.

    Args:
        ranks: the processes.
        first: the number of the first of them on this machine, which is that of its GPU.
    """

    def __init__(self, ranks: Sequence[Process], first: int) -> None:
        self._ranks, self._first = ranks, first
        self._futures: list[Future[Outcome]] = []
        self._thread = ThreadPoolExecutor(1)
        self.job: Job | None = None
        self.future: Future[Future[Outcome]] | None = None

    def begin(self, job: Job) -> None:
        # This process outlives the ranks, and a free port that another program takes is no danger.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._futures = []
        for rank, process in enumerate(self._ranks):
            place = rank_environment(
                "127.0.0.1", self._store, rank, len(self._ranks), self._first + rank
            )
            process.begin(job, partial(run_rank, environment=place))
            assert process.future is not None
            self._futures.append(process.future)
        self.job, self.future = job, self._thread.submit(telling, self._futures, _is_killed)

    def take(self) -> tuple[Job, Outcome]:
        job, future = self.job, self.future
        assert job is not None
        assert future is not None
        told = future.result()
        process = self._ranks[self._futures.index(told)]
        outcome = process.take()[1] if _is_killed(told) else told.result()
        if isinstance(outcome, WorkerLost) or not all(one.done() for one in self._futures):
            self.stop()
        self._release()
        return job, outcome

    def kill(self) -> None:
        for process in self._ranks:
            process.kill()

    def stop(self) -> None:
        self.kill()
        for process in self._ranks:
            process.stop()
        self._release()

    def _release(self) -> None:
        for process in self._ranks:
            process.job = process.future = None
        self.job = self.future = None


def rank_environment(
    address: str, store: TCPStore, rank: int, size: int, local: int
) -> dict[str, str]:
    """The variables by which torchrun tells a process its rank, and where the ranks meet.

    Args:
        address: of the machine with the store, which none of the ranks holds.
        rank, size: this rank, and how many there are.
        local: the GPU of this rank on its machine.
    """
    return {
        "RANK": f"{rank}",
        "WORLD_SIZE": f"{size}",
        "LOCAL_RANK": f"{local}",
        "LOCAL_WORLD_SIZE": f"{size}",
        "MASTER_ADDR": address,
        "MASTER_PORT": f"{store.port}",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def run_rank(job: Job, environment: dict[str, str]) -> Outcome:
    """Trains the run of a job as one of its ranks, all of which return the same."""
    os.environ.update(environment)
    try:
        with unfailing_output(muted=True), joined(torch.device(job.device).type) as ranks:
            # The driver hears of these at once, and ends the other ranks.
            try:
                return run_job(job, ranks=ranks)
            except (ValueError, OSError) as error:
                failure = error
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                return [RunResult(row_without_memory(job.runs[0], ranks.device, error))]
        raise failure
    except (RankLost, Stopped) as error:
        return WorkerLost("a signal stopped it" if isinstance(error, Stopped) else f"{error}")
    finally:
        for name in environment:
            del os.environ[name]


def telling(
    ranks: Sequence[Future[Outcome]], is_killed: Callable[[Future[Outcome]], bool]
) -> Future[Outcome]:
    """Waits for the ranks of a job; returns the rank whose end is the outcome of the job: one that
    was killed, else the first that failed, else rank 0 once all are done."""
    left, limit = set(ranks), None
    failed: list[Future[Outcome]] = []
    while left:
        done, left = wait(left, limit, FIRST_COMPLETED)
        if not done:
            break
        if killed := next(filter(is_killed, done), None):
            return killed
        failed += [one for one in done if one.exception() or _is_failure(one.result())]
        limit = SETTLE_SECONDS if failed else None
    return failed[0] if failed else ranks[0]


def _is_failure(outcome: Outcome) -> bool:
    if isinstance(outcome, list):
        return any(result.row["status"] == "failed" for result in outcome)
    return True


def _check_gpus(count: int, ranks: int, device: str) -> None:
    if torch.device(device).index is not None:
        raise ValueError(
            f"--gpus-per-run {ranks} takes a GPU for each rank: give --device cuda, not {device}"
        )
    found = torch.cuda.device_count()
    if count * ranks > found:
        fits = max(1, found // ranks)
        fix = f"--workers {fits}" if ranks <= found else f"--gpus-per-run {found}"
        workers = f" and --workers {count}" if count > 1 else ""
        raise ValueError(
            f"--gpus-per-run {ranks}{workers} take {count * ranks} GPUs, this machine has {found}: "
            f"use {fix}"
        )


def _is_killed(rank: Future[Outcome]) -> bool:
    return isinstance(rank.exception(), BrokenProcessPool)
