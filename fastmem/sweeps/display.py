"""A progress line for several workers: runs done, runs at work, time left."""

import time
from collections.abc import Mapping
from typing import Self

from tqdm import tqdm

from fastmem.base.storage import Row
from fastmem.base.terminal import progress_bar
from fastmem.sweeps.job import Job
from fastmem.sweeps.watch import seconds_left


class Display:
    """A progress bar for several jobs at once; a line every 30 seconds without a terminal.

    Args:
        work: work of each planned run by key, in any unit; empty if the coming runs are unknown.
        rows: the rows in the folder.
        show: False draws nothing.
    """

    def __init__(self, work: Mapping[str, float], rows: list[Row], show: bool) -> None:
        self._work, self._started = dict(work), time.time()
        self._written = [(0.0, row) for row in rows]
        self._running: dict[str, float] = {}
        self._bar = progress_bar(
            show,
            total=len(work) or None,
            initial=sum(row["key"] in work for row in rows if row["status"] == "done"),
            desc="sweep",
            unit=" runs",
            bar_format="{percentage:.0f}%|{bar}| {n}/{total} runs{postfix}"
            if work
            else "{n} runs{postfix}",
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
        """The text behind the bar: time left, running jobs, and the longest of them."""
        now, parts = time.time(), self._left()
        if self._running:
            name, begun = min(self._running.items(), key=lambda job: job[1])
            parts.append(f"{len(self._running)} at work, longest {name} {now - begun:.0f} s")
        return ", ".join(parts)

    def label(self, job: Job, left: float | None) -> str:
        """What the bar of a job says of the whole sweep, such as 3/20, 05:10 left, from the
        seconds that are left of the job."""
        done = sum(row["status"] == "done" for _, row in self._written)
        total = f"/{len(self._work)}" if self._work else ""
        texts = self._left() if left is None else self._left_with(job, left)
        return ", ".join([f"{done + 1}{total}", *texts, job.name])

    def _left(self) -> list[str]:
        left = seconds_left(self._work, self._started, self._written)
        return [] if left is None else [f"{tqdm.format_interval(left)} left"]

    def _left_with(self, job: Job, left: float) -> list[str]:
        """The time left with a job that has `left` seconds left, and goes as fast as the sweep."""
        ours = {run.key for run in job.runs}
        if not ours <= self._work.keys():
            return []
        fresh = {row["key"] for when, row in self._written if when >= self._started}
        done = {row["key"] for _, row in self._written if row["status"] == "done"}
        rest = sum(self._work[key] for key in self._work.keys() - done - fresh - ours)
        spent = sum(self._work.get(key, 0.0) for key in fresh | ours)
        left += rest * (time.time() - self._started + left) / spent
        return [f"{tqdm.format_interval(left)} left"]
