"""Parts of a bench, each in processes that end in time."""

import contextlib
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any

Row = dict[str, Any]


def run_beside(function: Callable[..., object], calls: list[tuple[Any, ...]], limit: float) -> None:
    """Calls in 14 processes. What has not ended within `limit` seconds is killed."""
    pool = ProcessPoolExecutor(14, multiprocessing.get_context("spawn"), initializer=os.setpgrp)
    tasks = [pool.submit(function, *call) for call in calls]
    wait(tasks, timeout=limit)
    for process in list(pool._processes.values()):
        end_group(process.pid)
    pool.shutdown(wait=False, cancel_futures=True)


def run_part(
    function: Callable[..., Iterable[Row]],
    arguments: tuple[Any, ...],
    limit: float,
    show: Callable[[Row], None],
) -> tuple[list[Row], Row]:
    """The rows that `function` yields in `limit` seconds, each shown at once, and how it ended."""
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    process = context.Process(target=tell, args=(told, function, arguments))
    begun = time.monotonic()
    process.start()
    rows, ended = [], "failed"
    while True:
        left = begun + limit - time.monotonic()
        if left <= 0:
            ended = "no time left"
            break
        try:
            row = told.get(timeout=min(left, 2))
        except queue.Empty:
            if process.is_alive():
                continue
            break
        if row is None:
            ended = "in time"
            break
        rows.append(row)
        show(row)
    if ended == "no time left":
        end_group(process.pid)
        process.kill()  # which may not have made its group
    process.join()
    return rows, {"ended": ended, "seconds": time.monotonic() - begun}


def tell(told: Any, function: Callable[..., Iterable[Row]], arguments: tuple[Any, ...]) -> None:
    os.setpgrp()
    for row in function(*arguments):
        told.put(row)
    told.put(None)


def end_group(pid: int | None) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
