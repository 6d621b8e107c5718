"""Time of a step loop by phase, and a trace of a few steps.

A loop names its phases, which costs almost nothing outside a `profiled` block:

    with phase("step"):
        with phase("data"):
            ...
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastmem.models.flops import synchronize

WARMUP, TRACED = 10, 20
"""Steps before the trace, and steps in it."""

_running: "Profile | None" = None


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Counts the time of this block as `name`, inside a `profiled` block.

    Phases nest; the time of an inner phase does not count for the outer phase. The phase "step" is
    one step of the loop.
    """
    if _running is None:
        yield
        return
    with _running._timed(name):
        yield


@contextmanager
def profiled(trace: Path, device: torch.device) -> Iterator["Profile"]:
    """Times all phases in the block, and writes a trace of steps 11 to 30.

    On a GPU each phase ends with a synchronization, so that work counts for the phase that
    launched it; the loop is then slower.

    Args:
        trace: file of the Chrome trace (chrome://tracing, ui.perfetto.dev); not written if the
            loop ends in the first 10 steps.
        device: device of the work.

    Raises:
        ValueError: inside another `profiled` block.

    Example:
        >>> import tempfile
        >>> with (
        ...     tempfile.TemporaryDirectory() as folder,
        ...     profiled(Path(folder) / "trace.json", torch.device("cpu")) as profile,
        ... ):
        ...     for _ in range(3):
        ...         with phase("step"), phase("data"):
        ...             time.sleep(0.01)
        >>> profile.steps, profile.seconds["data"] > profile.seconds["step"]
        (3, True)
    """
    global _running
    if _running is not None:
        raise ValueError("a profiled block is already open: close it before another")
    profile = _running = Profile(trace, device)
    try:
        with profile._trace:
            yield profile
    finally:
        _running = None


class Profile:
    """Result of `profiled`: `steps`, and `seconds` of each phase without its inner phases."""

    def __init__(self, trace: Path, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.steps = 0
        self._inside = [0.0]  # for each open phase: seconds of its inner phases
        self._trace = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=WARMUP - 1, warmup=1, active=TRACED, repeat=1),
            on_trace_ready=lambda made: made.export_chrome_trace(str(trace)),
            acc_events=True,
        )

    def table(self) -> str:
        """A line for each phase in the order of first use; "rest" is the step without phases."""
        named = {**self.seconds}
        named["rest"] = named.pop("step", 0.0)
        total = sum(named.values()) or 1.0
        width = max(len(name) for name in named)
        lines = [
            f"{name:{width}}  {s / total:6.1%}  {s:8.2f} s  {1e3 * s / max(1, self.steps):8.3f} ms"
            for name, s in named.items()
        ]
        return "\n".join([f"where the time went, {self.steps} steps (last column: a step)", *lines])

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            with torch.profiler.record_function(name):
                yield
                synchronize(self.device)
        finally:
            seconds = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds - self._inside.pop()
            self._inside[-1] += seconds
        if name == "step":
            self.steps += 1
            self._trace.step()
