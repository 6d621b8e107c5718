"""A progress line for several workers: runs done, runs at work, time left."""

import time
from collections.abc import Mapping
from typing import Self

from tqdm import tqdm

from fastmem.base.storage import Row
from fastmem.sweeps.job import Job
from fastmem.sweeps.watch import seconds_left


class Display:
    """A progress bar for several jobs at once, if standard error is a terminal.

    Args:
        work: work of each planned run by key, in any unit; empty if the coming runs are unknown.
        rows: the rows in the folder.
        show: False draws nothing.
    """

    def __init__(self, work: Mapping[str, float], rows: list[Row], show: bool) -> None:
        self._work, self._started = dict(work), time.time()
        self._written = [(0.0, row) for row in rows]
        self._running: dict[str, float] = {}
        self._bar = tqdm(
            total=len(work) or None,
            initial=sum(row["key"] in work for row in rows if row["status"] == "done"),
            disable=None if show else True,
            bar_format="{l_bar}{bar}| {n}/{total} runs{postfix}" if work else "{n} runs{postfix}",
            leave=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._bar.close()

    def begin(self, job: Job) -> None:
        self._running[job.name] = time.time()

    def end(self, job: Job) -> None:
        del self._running[job.name]

    def add(self, row: Row) -> None:
        self._written.append((time.time(), row))
        self._bar.update()

    def draw(self) -> None:
        """Draws the bar with its line."""
        if self._bar.disable:
            return
        self._bar.set_postfix_str(self.line(), refresh=True)

    def line(self) -> str:
        """The text behind the bar: time left, and seconds of each running job."""
        left = seconds_left(self._work, self._started, self._written)
        now = time.time()
        running = [f"{name} {now - begun:.0f} s" for name, begun in self._running.items()]
        parts = [] if left is None else [f"{tqdm.format_interval(left)} left"]
        return ", ".join([*parts, f"{len(running)} at work: {', '.join(running)}"])
