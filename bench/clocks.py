"""What something takes on a GPU: its kernels alone, and the call with all its Python."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Times(NamedTuple):
    """Seconds; kernels None where there is no GPU."""

    kernels: float | None
    call: float


def once(run: Callable[[], Any], graph: bool = True) -> Times:
    begun = time.perf_counter()
    run()
    synchronize()
    return Times(None, time.perf_counter() - begun)


def timed(run: Callable[[], Any], graph: bool = True) -> Times:
    once(run)
    guess = once(run).call
    count = max(1, min(200, int(0.1 / guess)))
    calls = []
    for _ in range(3):
        begun = time.perf_counter()
        for _ in range(count):
            run()
        synchronize()
        calls.append((time.perf_counter() - begun) / count)
    return Times((replayed if graph else profiled)(run, guess), statistics.median(calls))


def replayed(run: Callable[[], Any], guess: float) -> float:
    """The median of seven (long: three) replays of some runs as one CUDA graph."""
    count = max(1, min(50, int(0.01 / guess)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            run()
    graph.replay()
    times = []
    for _ in range(7 if guess < 0.2 else 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        synchronize()
        times.append(begin.elapsed_time(end) / count / 1e3)
    return statistics.median(times)


def profiled(run: Callable[[], Any], guess: float) -> float:
    """The sum of its kernels' times."""
    count = max(1, min(5, int(0.05 / guess)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            run()
        synchronize()
    return sum(e.self_device_time_total for e in profile.key_averages()) / count / 1e6


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
