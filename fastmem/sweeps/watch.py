"""The state of a sweep, read from its folder, also while another process trains it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastmem.base.arguments import user_path
from fastmem.base.lock import is_locked
from fastmem.base.stats import Interval
from fastmem.base.storage import Row, check_folder
from fastmem.base.terminal import duration
from fastmem.memorization.capacity import by_count, by_model, capacity_bits, counts_and_bits
from fastmem.sweeps.store import PLANNED, SWEEP, models_of, planned_work, read_row

if TYPE_CHECKING:
    from rich.console import RenderableType

RUNNING = "running"
"""A folder with an empty file for each running run, written at its start."""


@dataclass(frozen=True)
class Best:
    """The best mean over seeds that a model has reached."""

    name: str
    parameters: int
    precision: str
    runs: int
    count: int
    """The data set size with the best mean."""
    bits_per_parameter: Interval
    """Strict."""


@dataclass(frozen=True)
class Progress:
    """The state of a sweep."""

    at_work: bool
    """True if a process holds the folder's lock."""
    planned: int | None
    """Runs that the last sweep planned; None if unknown."""
    left: int | None
    """Planned runs that are not done, with counts="auto" models that need more; None if unknown."""
    done: int
    failed: int
    running: tuple[tuple[str, float], ...]
    """Key and seconds since the start of each running run."""
    best: tuple[Best, ...]
    seconds_left: float | None
    """None if the speed is unknown, or no process is at work."""

    @property
    def state(self) -> str:
        """What a sweep without a process is, and how it goes on."""
        stopped = "no process is at work here; the same command resumes"
        if self.left is None:
            return stopped
        many = self.left > 1
        left = f"{self.left} run{'s' * many} left"
        if self.planned is None:
            left = f"{self.left} model{'s need' if many else ' needs'} more runs"
        return f"{left}; {stopped}" if self.left else "finished"


class Watcher:
    """Reads the state of one folder repeatedly, and each row once.

    Example:
        >>> import tempfile
        >>> Watcher(tempfile.mkdtemp()).look().done
        0
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = user_path(folder)
        self._rows: dict[Path, tuple[int, Row]] = {}

    def look(self) -> Progress:
        """The state now; ValueError if the folder does not exist or a row is damaged."""
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a directory: give the folder of a sweep")
        check_folder(self.folder, SWEEP, "sweep", "give the folder of a sweep")
        written = self._read()
        rows = [row for _, row in written]
        done = {row["key"] for row in rows if row["status"] == "done"}
        failed = {row["key"] for row in rows if row["status"] == "failed"}
        at_work = is_locked(self.folder)
        plan = self._plan()
        running = self._running() if at_work else ()
        failed -= {key for key, _ in running}
        work, search, started = plan or ({}, True, 0.0)
        left = work.keys() - done
        return Progress(
            at_work=at_work,
            planned=None if search else len(done | work.keys()),
            left=(models_of(left) if search else len(left)) if plan else None,
            done=len(done),
            failed=len(failed),
            running=running,
            best=_best(rows),
            seconds_left=None if search or not at_work else seconds_left(work, started, written),
        )

    def _read(self) -> list[tuple[float, Row]]:
        """Each row, and when it was written."""
        rows = {}
        for path in sorted((self.folder / "rows").glob("*.json")):
            stamp = path.stat().st_mtime_ns
            known = self._rows.get(path)
            rows[path] = known if known and known[0] == stamp else (stamp, read_row(path))
        self._rows = rows
        return [(stamp / 1e9, row) for stamp, row in rows.values()]

    def _plan(self) -> tuple[dict[str, float], bool, float] | None:
        path = self.folder / PLANNED
        if not path.exists():
            return None
        return *planned_work(self.folder), path.stat().st_mtime

    def _running(self) -> tuple[tuple[str, float], ...]:
        now, found = time.time(), []
        for path in sorted((self.folder / RUNNING).glob("*")):
            try:
                found.append((path.name, max(0.0, now - path.stat().st_mtime)))
            except FileNotFoundError:  # the run ended after glob
                continue
        return tuple(found)


def progress_table(progress: Progress, folder: Path) -> "RenderableType":
    """The state as a table of rich."""
    from rich.console import Group
    from rich.table import Table

    head = Table(box=None, show_header=False, pad_edge=False)
    planned = "" if progress.planned is None else f" of {progress.planned}"
    head.add_row("done", f"{progress.done}{planned}")
    head.add_row("failed", f"{progress.failed}")
    for key, seconds in progress.running:
        head.add_row("running", f"{key}, {seconds:,.0f} s")
    left = progress.seconds_left
    if progress.at_work:
        head.add_row("time left", "not known yet" if left is None else f"about {duration(left)}")
    else:
        head.add_row("state", progress.state)
    if not progress.best:  # of text, whose memorized bits its page has
        return Group(str(folder), "", head)
    models = Table(title=str(folder), title_justify="left", box=None, pad_edge=False)
    for name in ("model", "parameters", "precision", "runs", "best at", "bits/parameter strict"):
        models.add_column(name)
    for best in progress.best:
        per = best.bits_per_parameter
        interval = "" if per.low is None else f" [{per.low:.2f}, {per.high:.2f}]"
        size = f"{best.count:,} sequences"
        cells = (best.name, f"{best.parameters:,}", best.precision, f"{best.runs}", size)
        models.add_row(*cells, f"{per.estimate:.2f}{interval}")
    return Group(models, "", head)


def _best(rows: Sequence[Row]) -> tuple[Best, ...]:
    found = []
    for runs in by_model(row for row in rows if row["memorized_bits"]["strict"] is not None):
        counts, bits = counts_and_bits(runs, "strict")
        sizes = by_count(counts, bits)
        first = runs[0]
        found.append(
            Best(
                name="{layers} × {width}, {heads} heads".format(**first["model"]),
                parameters=first["parameters"],
                precision=first["precision"],
                runs=len(runs),
                count=max(sizes, key=lambda count: sizes[count].mean()),
                bits_per_parameter=capacity_bits(counts, bits) / first["parameters"],
            )
        )
    return tuple(sorted(found, key=lambda best: (best.parameters, best.precision, best.name)))


def seconds_left(
    work: dict[str, float], started: float, written: Sequence[tuple[float, Row]]
) -> float | None:
    """Time left at the speed of all rows since the sweep started; None if unknown. `work` has the
    work of each planned run by key; `written` has the time at which each row was written."""
    fresh = [(when, row["key"]) for when, row in written if when >= started]
    ended = {row["key"] for _, row in written if row["status"] == "done"} | {k for _, k in fresh}
    left = sum(cost for key, cost in work.items() if key not in ended)
    if not left:
        return 0.0 if work else None
    spent = sum(work.get(key, 0.0) for _, key in fresh)
    if not spent:
        return None
    last = max(when for when, _ in fresh)
    if last <= started:
        return None
    return max(0.0, left * (last - started) / spent - (time.time() - last))
