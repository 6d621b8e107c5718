"""Rows of a sweep sent to a tracker that others keep: TensorBoard, Weights & Biases, Trackio."""

from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from fastmem.store import Row

SinkName = Literal["tensorboard", "wandb", "trackio"]


class Sink(Protocol):
    """Where rows go beside their files."""

    def add(self, row: Row) -> None:
        """Sends the curve and the result of a run that ended."""

    def close(self) -> None:
        """Waits until all is sent."""


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
    names = get_args(SinkName)
    if name not in names:
        raise ValueError(f"no sink {name!r}: use one of {', '.join(names)}")
    try:
        if name == "tensorboard":
            writer = import_module("torch.utils.tensorboard").SummaryWriter
            return _TensorBoard(writer(folder / "tensorboard"))
        return _Tracker(import_module(name), folder)
    except ImportError:
        raise ValueError(
            f"--log {name} needs {name}, which is not installed: pip install 'fastmem-lm[{name}]'"
        ) from None


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def add(self, row: Row) -> None:
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

    def add(self, row: Row) -> None:
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
