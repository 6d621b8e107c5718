"""Rows of a sweep sent to a tracker that others keep: TensorBoard, Weights & Biases, Trackio."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from fastmem.base.storage import Row

SinkName = Literal["tensorboard", "wandb", "trackio"]
SENT = "sent"
"""A folder with an empty file for each row that a sink has."""


class Tracker(Protocol):
    """What others keep, and rows go to."""

    def send(self, row: Row) -> None:
        """Sends the curve and the result of a run that ended."""

    def close(self) -> None:
        """Waits until all is sent."""


class Sink:
    """Where rows go beside their files; SENT/NAME/RUN in the folder marks each that was sent."""

    def __init__(self, tracker: Tracker, marks: Path) -> None:
        self._tracker, self._marks = tracker, marks

    def add(self, row: Row) -> None:
        """Sends a row; a failed one without a mark, since its run is tried again."""
        self._tracker.send(row)
        if row["status"] == "done":
            self._marks.mkdir(parents=True, exist_ok=True)
            (self._marks / row["key"]).touch()

    def close(self, rows: Sequence[Row] = ()) -> None:
        """Sends those finished rows that were never sent, and waits until all is.

        Such a row is of a run that was killed after it was written, or that had no sink. What was
        killed between sending and marking is sent twice.
        """
        for row in rows:
            if row["status"] == "done" and not (self._marks / row["key"]).exists():
                self.add(row)
        self._tracker.close()


def open_sink(name: str, folder: Path) -> Sink:
    """A sink for the rows of the sweep in folder.

    TensorBoard's files go to folder/tensorboard; the others have a project "fastmem", with a run of
    theirs for each of ours.

    Raises:
        ValueError: an unknown name, or a package that is not installed.

    Example:
        >>> open_sink("paper", Path("capacity-laptop"))
        Traceback (most recent call last):
        ValueError: no sink 'paper': use one of tensorboard, wandb, trackio
    """
    library = check_sink(name)
    tracker: Tracker = _Tracker(library, folder)
    if name == "tensorboard":
        tracker = _TensorBoard(library.SummaryWriter(folder / "tensorboard"))
    return Sink(tracker, folder / SENT / name)


def check_sink(name: str) -> Any:
    """The library of a sink; raises what `open_sink` raises, and makes nothing."""
    names = get_args(SinkName)
    if name not in names:
        raise ValueError(f"no sink {name!r}: use one of {', '.join(names)}")
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


class _Tracker:
    """wandb, and trackio, which has the same three functions."""

    def __init__(self, library: Any, folder: Path) -> None:
        self._library, self._group = library, folder.name

    def send(self, row: Row) -> None:
        config = {name: value for name, value in row.items() if name != "curve"}
        self._library.init(project="fastmem", name=row["key"], group=self._group, config=config)
        for step, metrics in _points(row):
            self._library.log(metrics, step=step)
        self._library.finish()

    def close(self) -> None:
        """Each run was finished when it was sent."""


def _points(row: Row) -> list[tuple[int, dict[str, float]]]:
    """What is known at each point of the curve, by step."""
    points = []
    for point in row["curve"]:
        bits = point["memorized_bits"]
        if bits is not None:
            per = bits / row["parameters"]
            points.append((point["step"], {"memorized_bits": bits, "bits_per_parameter": per}))
    return points
