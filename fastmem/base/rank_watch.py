"""The watch of a rank: a thread that ends it when another rank has failed."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from fastmem.base.terminal import say

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

GRACE_SECONDS = 20.0
"""How long a rank that was asked to stop is silent; torchrun kills it after 30 seconds."""
TELL_SECONDS = 3.0
"""How long a rank that failed waits for rank 0 to say why."""
_POLL_SECONDS = 0.5
_FAILURE = "fastmem/failure"


class RankLost(ConnectionError):
    """Another rank died, or does not answer."""


class Watch(threading.Thread):
    """Ends this rank when another rank has failed: a thread, since a collective cannot be
    interrupted. The first failure of the job stands in the store that the ranks share."""

    def __init__(self, store: "Store", rank: int) -> None:
        super().__init__(daemon=True, name="fastmem ranks")
        # A wait of the first client would block this thread.
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._rank = rank
        self.progress: Callable[[], int] = lambda: 0
        """Grows while this rank is at work."""
        self._closed = threading.Event()
        self._signals, write = socket.socketpair()
        for end in (self._signals, write):
            end.setblocking(False)
        self._write = write
        # Seen by this thread while the main thread waits for the GPU, where no handler runs.
        self._before: int | None = None
        with suppress(ValueError):  # not the main thread
            self._before = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        self.start()

    def fail(self, error: BaseException) -> None:
        """Tells the other ranks why this rank ends; turns a lost connection into RankLost."""
        self._closed.set()
        if isinstance(error, KeyboardInterrupt):
            return
        lost = isinstance(error, RuntimeError) and _is_connection(error)
        if lost and (why := self._failure(wait=3.0)):
            raise RankLost(why) from None
        if lost:
            raise RankLost(
                f"another rank was lost ({first_line(error)}): the same command goes on from the "
                "last checkpoint"
            ) from None
        known = isinstance(error, (ValueError, OSError))
        text = f"{error}" if known else f"{type(error).__name__}: {first_line(error)}"
        whose = "" if isinstance(error, RankLost) else f"rank {self._rank}: "
        failure = {"rank": self._rank, "text": f"{whose}{text}"}
        with suppress(RuntimeError):
            self._store.compare_set(_FAILURE, "", json.dumps(failure))
        if self._rank != 0:  # torchrun ends all ranks when the first has ended
            with suppress(KeyboardInterrupt):
                time.sleep(TELL_SECONDS)

    def close(self) -> None:
        self._closed.set()
        self.join(2 * _POLL_SECONDS)
        if self._before is not None:
            signal.set_wakeup_fd(self._before)
        self._signals.close()
        self._write.close()

    def run(self) -> None:
        asked, progress = 0.0, 0
        while not self._closed.wait(_POLL_SECONDS):
            # A rank that found the same error says so itself.
            if (why := self._failure()) and not self._closed.wait(1.0):
                self._say(why)
                os._exit(2)
            with suppress(OSError):
                if self._signals.recv(64):
                    asked = asked or time.monotonic()
            done = self.progress()
            if done != progress:  # at work: it stops by itself
                progress, asked = done, asked and time.monotonic()
            if asked and time.monotonic() - asked > GRACE_SECONDS:
                asked = 0.0
                self._say(
                    "asked to stop, and waits for another rank or the end of a step; if it is "
                    "killed, the same command goes on from the last checkpoint"
                )

    def _failure(self, wait: float = 0.0) -> str | None:
        """The failure of another rank, for which it waits some seconds."""
        end = time.monotonic() + wait
        while True:
            with suppress(RuntimeError):  # the store is gone with its rank
                if self._store.check([_FAILURE]):
                    found = json.loads(self._store.get(_FAILURE))
                    return None if found["rank"] == self._rank else str(found["text"])
            if time.monotonic() >= end:
                return None
            time.sleep(0.1)

    def _say(self, why: str) -> None:
        if self._rank == 0:
            say(f"fastmem: {why}")
            sys.stderr.flush()


def _is_connection(error: RuntimeError) -> bool:
    """True for an error of a collective whose other end is gone or silent."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return any(word in text for word in ("gloo", "NCCL", "Connection", "Timed out", "c10d"))


def first_line(error: BaseException) -> str:
    """The first line of an error, without the place in C++ that raised it."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[/\S*:\d+\] ", "", line).split(". ")[0][:200]
