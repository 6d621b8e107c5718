"""Rows of a sweep sent to TensorBoard, Weights & Biases or Trackio."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from fastmem.base.storage import Row

TrackerName = Literal["tensorboard", "wandb", "trackio"]
SENT = "sent"
"""A folder with an empty file for each row that a tracker has."""


class _Backend(Protocol):
    def send(self, row: Row) -> None:
        """Sends the curve and the result of a run."""

    def close(self) -> None:
        """Waits until everything is sent."""


class Tracker:
    """Sends rows to one tracker; the file SENT/NAME/RUN in the sweep's folder marks a sent row."""

    def __init__(self, backend: _Backend, marks: Path) -> None:
        self._backend, self._marks = backend, marks

    def add(self, row: Row) -> None:
        """Sends a row, and marks it if done: a failed run is tried again."""
        self._backend.send(row)
        if row["status"] == "done":
            self._marks.mkdir(parents=True, exist_ok=True)
            (self._marks / row["key"]).touch()

    def close(self, rows: Sequence[Row] = ()) -> None:
        """Sends the finished rows without a mark, and waits until everything is sent.

        A row lacks its mark if its sweep was killed before sending it, or ran without a tracker. A
        sweep killed between sending and marking sends the row twice.
        """
        for row in rows:
            if row["status"] == "done" and not (self._marks / row["key"]).exists():
                self.add(row)
        self._backend.close()


def open_tracker(name: str, folder: Path) -> Tracker:
    """A tracker for the rows of the sweep in folder.

    TensorBoard's files go to folder/tensorboard; Weights & Biases and Trackio have a project
    "fastmem" with one run for each row.

    Raises:
        ValueError: an unknown name, or a package that is not installed.

    Example:
        >>> open_tracker("paper", Path("capacity-laptop"))
        Traceback (most recent call last):
        ValueError: unknown tracker 'paper': use one of tensorboard, wandb, trackio
    """
    library = check_tracker(name)
    backend: _Backend = _Wandb(library, folder)
    if name == "tensorboard":
        backend = _TensorBoard(library.SummaryWriter(folder / "tensorboard"))
    return Tracker(backend, folder / SENT / name)


def check_tracker(name: str) -> Any:
    """The library of a tracker; ValueError as `open_tracker`, but creates nothing."""
    names = get_args(TrackerName)
    if name not in names:
        raise ValueError(f"unknown tracker {name!r}: use one of {', '.join(names)}")
    try:
        return import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError:
        raise ValueError(
            f"--log {name} needs {name}, which is not installed: pip install 'fastmem-lm[{name}]'"
        ) from None


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def send(self, row: Row) -> None:
        for step, metrics in _points(row):
            for name, value in metrics.items():
                self._writer.add_scalar(f"{name}/{row['key']}", value, step)
        if row["error"]:
            self._writer.add_text("failed", f"{row['key']}: {row['error']}")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """wandb, or trackio, which has the same three functions."""

    def __init__(self, library: Any, folder: Path) -> None:
        self._library, self._group = library, folder.name

    def send(self, row: Row) -> None:
        config = {name: value for name, value in row.items() if name != "curve"}
        self._library.init(project="fastmem", name=row["key"], group=self._group, config=config)
        for step, metrics in _points(row):
            self._library.log(metrics, step=step)
        self._library.finish()

    def close(self) -> None:
        """Does nothing, since `send` finishes each run."""


def _points(row: Row) -> list[tuple[int, dict[str, float]]]:
    """Step and metrics of the points of the curve whose bits are known."""
    points = []
    for point in row["curve"]:
        bits = point["memorized_bits"]
        if bits is not None:
            per = bits / row["parameters"]
            points.append((point["step"], {"memorized_bits": bits, "bits_per_parameter": per}))
    return points
