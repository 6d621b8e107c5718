"""The ranks of one job: the processes that torchrun starts, or this process alone."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from fastmem.base.arguments import checked_device
from fastmem.base.rank_watch import RankLost, Watch, first_line
from fastmem.base.terminal import INTERRUPTED

if TYPE_CHECKING:  # a PyTorch without distributed has none
    from torch._C._distributed_c10d import Store

COLLECTIVE_SECONDS = os.environ.get("FASTMEM_COLLECTIVE_SECONDS", "300")
"""The longest wait of a rank for the other ranks."""
CONNECT_SECONDS = 60
"""The longest wait for the first contact between ranks."""
_WORK_SECONDS = 0.02
T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """A signal asked a rank to stop; raised on all ranks between the same two steps."""

    def __str__(self) -> str:
        return f"signal {self.args[0]} stopped all ranks: a call with a checkpoint goes on from it"


def launched() -> bool:
    """True in a process that torchrun started, or another launcher that sets the same variables."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def is_first() -> bool:
    """True in rank 0, and in a process without ranks."""
    return not launched() or os.environ["RANK"] == "0"


def rank_and_size() -> tuple[int, int]:
    """This rank and the number of ranks; 0 and 1 outside of `joined`."""
    return (0, 1) if _current is None else (_current.rank, _current.size)


def gathered(value: T) -> list[T]:
    """The value of each rank; of this process alone outside of `joined`."""
    return [value] if _current is None else _current.gathered(value)


def do_first(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, for all ranks; its error is raised on all ranks."""
    return work() if _current is None else _current.do_first(work)


class Ranks:
    """The ranks of this job, from the side of one of them."""

    def __init__(self, device: str, store: "Store", rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.device = _own_device(device)
        if self.device.type == "cpu":
            _give_back_memory()
        backend = "gloo" if self.device.type == "cpu" else f"cpu:gloo,{self.device.type}:nccl"
        limit = _seconds(COLLECTIVE_SECONDS)
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
            # A group of its own, so that no collective of a model waits behind a message.
            self._control = dist.new_group(backend="gloo", timeout=limit)
            self.checkpoints = dist.new_group(backend="gloo", timeout=limit)
            """The group of ranks for checkpoints, which are written beside training."""
        except RuntimeError as error:
            raise _unreached(error) from None
        self._store, self._works = store, 0
        self._signal: int = 0
        self.progress = 0
        """Grows while this rank is at work, by which a watch sees that the rank is not stuck."""

    def clock(self) -> float:
        """time.perf_counter() of rank 0, so that all ranks decide alike what is due.

        Raises:
            Stopped: on all ranks, if a signal asked one of them to stop.
        """
        self.progress += 1
        if self.size == 1:
            now, stop = time.perf_counter(), self._signal
        else:
            mine = [time.perf_counter() if self.rank == 0 else 0.0, float(self._signal)]
            both = torch.tensor(mine, dtype=torch.float64)
            dist.all_reduce(both, dist.ReduceOp.MAX, self._control)
            now, stop = float(both[0]), int(both[1])
        if stop:
            self._signal = 0
            raise Stopped(stop)
        return now

    def heed(self) -> None:
        """Raises Stopped, on this rank alone, if a signal asked it to stop."""
        self.progress += 1
        if self._signal:
            raise Stopped(self._signal)

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of an array over the ranks."""
        if self.size > 1:
            dist.all_reduce(torch.from_numpy(values), group=self._control)
        return values

    def all(self, value: bool) -> bool:
        """True if the value is true on all ranks."""
        return bool(self.sum(np.array([float(not value)]))[0] == 0)

    def first(self, value: Any) -> Any:
        """The value of rank 0."""
        values = [value]
        dist.broadcast_object_list(values, 0, self._control)
        return values[0]

    def gathered(self, value: T) -> list[T]:
        """The value of each rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self._control)
        return values

    def check_same(self, fixes: dict[str, str], **seen: str) -> None:
        """ValueError on all ranks, unless all ranks see the same; `fixes` by name.

        The error has the lines that differ.
        """
        found = self.gathered(seen)
        for rank, theirs in enumerate(found):
            for name, ours in found[0].items():
                if theirs[name] != ours:
                    there, here = theirs[name].splitlines(), ours.splitlines()
                    other = ", ".join(line for line in there if line not in here) or "nothing more"
                    own = ", ".join(line for line in here if line not in there) or "nothing more"
                    raise ValueError(
                        f"rank {rank} differs from rank 0 in its {name} ({other} there, {own} on "
                        f"rank 0): {fixes[name]}"
                    )

    def do_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, for all ranks; its error is raised on all ranks."""
        outcome: tuple[Any, Exception | None] = None, None
        self._works += 1
        done = f"fastmem/work/{self._works}"
        if self.rank == 0:
            try:
                outcome = work(), None
            except (ValueError, OSError) as error:
                outcome = None, error
            self._store.set(done, "")
        while not self._store.check([done]):  # the work may take longer than a collective may
            self.progress += 1
            time.sleep(_WORK_SECONDS)
        value: T
        value, failed = self.first(outcome)
        if failed is not None:
            raise failed
        return value

    def stop(self, number: int, frame: object) -> None:
        """The handler of a signal: the next `clock` raises Stopped on all ranks."""
        INTERRUPTED.set()
        if self._signal and not launched():  # no step is near; torchrun passes one Ctrl-C on twice
            raise Stopped(number)
        self._signal = number


_current: Ranks | None = None


def active() -> Ranks | None:
    """The ranks that this process has joined, if it has."""
    return _current


def current() -> Ranks:
    """The ranks that this process has joined; ValueError outside of `joined`."""
    if _current is None:
        raise ValueError("this process has no ranks: do it inside `with fastmem.joined():`")
    return _current


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """Joins the ranks of this job, those of torchrun or this process alone, and leaves them.

    Inside, SIGTERM and Ctrl-C stop all ranks between two steps, an error of one rank ends all of
    them with one line on rank 0, and no collective waits longer than FASTMEM_COLLECTIVE_SECONDS
    (300). A rank on a GPU takes the GPU of its local rank.

    Args:
        device: auto (a GPU where there is one), cpu or cuda.

    Raises:
        ValueError: a rank has no GPU of its own, or this process has joined already.
        RankLost: another rank died or does not answer.

    Example:
        >>> with joined("cpu") as ranks:
        ...     ranks.rank, ranks.size
        (0, 1)
    """
    global _current
    if _current is not None or (dist.is_available() and dist.is_initialized()):
        raise ValueError("this process has joined its ranks already: call joined() once")
    rank = int(os.environ["RANK"]) if launched() else 0
    try:
        store, rank, size = _rendezvous()
    except RankLost as error:
        if rank != 0:  # rank 0 cannot be told
            print(f"fastmem: {error}", file=sys.__stderr__)
        raise
    watch = Watch(store, rank) if size > 1 else None
    handlers: dict[int, Any] = {}
    try:
        job = _current = Ranks(device, store, rank, size)
        if watch:
            watch.progress = lambda: job.progress
        if threading.current_thread() is threading.main_thread():
            for one in (signal.SIGINT, signal.SIGTERM):
                handlers[one] = signal.signal(one, job.stop)
        yield job
    except BaseException as error:
        if watch:
            watch.fail(error)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _current = None
        if watch:
            watch.close()
        if dist.is_initialized():
            with suppress(RuntimeError):
                dist.destroy_process_group()


class _Imagined(Ranks):
    def __init__(self, size: int) -> None:
        self.rank, self.size, self.device = 0, size, torch.device("cpu")


@contextmanager
def imagined(size: int) -> Iterator[Ranks]:
    """Ranks that do not exist, of which this process is the first, for plans with fake tensors:
    PyTorch's "fake" backend, whose collectives return at once.

    Raises:
        ValueError: this process has joined its ranks already.

    Example:
        >>> with imagined(8) as ranks:
        ...     ranks.rank, ranks.size
        (0, 8)
    """
    global _current
    if _current is not None or dist.is_initialized():
        raise ValueError("this process has joined its ranks already: plan before")
    dist.init_process_group("fake", rank=0, world_size=size)
    try:
        _current = _Imagined(size)
        yield _current
    finally:
        _current = None
        dist.destroy_process_group()


def _rendezvous() -> "tuple[Store, int, int]":
    if not dist.is_available():
        raise ValueError("this PyTorch lacks torch.distributed: install one from pytorch.org")
    from torch._C._distributed_c10d import HashStore, PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if not launched():
        return HashStore(), 0, 1
    limit = _seconds(str(CONNECT_SECONDS))
    try:
        store, rank, size = next(rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        # The agent of torchrun keeps the store, with the addresses of ranks that it started before.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"fastmem/{attempt}", store), rank, size
    except (RuntimeError, ValueError) as error:
        raise _unreached(error) from None


def _unreached(error: Exception) -> RankLost:
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return RankLost(
        f"rank {rank} of {size} does not reach the others by {address} ({first_line(error)}): "
        "check --rdzv-endpoint, and the network between the nodes"
    )


def _give_back_memory() -> None:
    """Makes glibc return freed buffers of 4 MiB and more to the system, as it does by default until
    it has freed one: kept buffers of gathered layers add a fifth to the memory of a 1.5B model."""
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 4 << 20)  # M_MMAP_THRESHOLD


def _own_device(device: str) -> torch.device:
    """The device of this rank."""
    local = int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        return checked_device(device)  # which says what is wrong
    if place.type != "cuda":
        return checked_device(place)
    found = torch.cuda.device_count()
    index = local if place.index is None else place.index
    if launched() and place.index is not None:
        raise ValueError(f"each rank takes its own GPU: give --device cuda, not {device}")
    if index >= found:
        fix = f"--nproc-per-node {found}" if found else "--device cpu"
        raise ValueError(
            f"rank {os.environ.get('RANK', 0)} needs GPU {index} of {socket.gethostname()}, which "
            f"has {found}: give {fix}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _seconds(text: str) -> Any:
    from datetime import timedelta

    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 < seconds <= 1e9:
        raise ValueError(
            f"FASTMEM_COLLECTIVE_SECONDS must be above 0, at most 1e9, not {text!r}: try 300"
        )
    return timedelta(seconds=seconds)
