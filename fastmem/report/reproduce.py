"""The commands that repeat the runs of a folder, and the budget of a run in words."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastmem.base.storage import Row, check_folder
from fastmem.sweeps.config import PRESETS, SweepConfig, default_heads
from fastmem.sweeps.store import SWEEP
from fastmem.sweeps.study import settings
from fastmem.training.config import DEFAULT_STEPS

AXES = ("layers", "width", "heads", "precision", "counts", "seeds")
Grid = dict[str, tuple[Any, ...]]
"""Values of each axis; the runs are their product."""


def check_finished(rows: Sequence[Row], folder: Path) -> None:
    """Raises ValueError with the first error if no run finished."""
    if not any(row["status"] == "done" for row in rows):
        check_folder(folder, SWEEP, "sweep", "give the folder of a sweep")
        first = f", the first with {rows[0]['error']}" if rows else ""
        raise ValueError(
            f"{folder} holds no finished run, and {len(rows)} failed{first}: "
            f"run `fastmem capacity --out {folder}` first, or again"
        )


def budget(row: Row) -> str:
    """The budget, batch and learning rate of a run in words."""
    train = row["train"]
    unit = next(name for name in ("steps", "epochs", "seconds") if train[name] is not None)
    batch = train["batch"]
    rate = "by shape" if train["lr"] is None else f"{train['lr']:g}"
    if train.get("embedding_lr") is not None:
        rate += f", of the embeddings {train['embedding_lr']:g}"
    most = "until converged, at most " if train.get("until") == "converged" else ""
    return f"{most}{train[unit]:,} {unit} of up to {batch:,} sequences, learning rate {rate}"


def at_budget(train: Row) -> str:
    """The budget behind a number, such as "at 4,000 steps"."""
    unit = next(name for name in ("steps", "epochs", "seconds") if train[name] is not None)
    where = "within" if train.get("until") == "converged" else "at"
    return f"{where} {train[unit]:,} {unit}"


def commands(rows: Sequence[Row], out: str) -> list[str]:
    """The commands that repeat these rows in a folder: together they have each run once.

    One command is enough for a full grid, or for data set sizes that follow from a preset's loads.
    """
    done = next((row for row in rows if row["status"] == "done"), rows[0])
    shared = {
        **settings(rows[0]),
        "device": done["device"].partition(":")[0],
        "sequence_bits": any(row.get("held_out_bits") is not None for row in rows),
        "out": out,
    }
    by_loads = _by_loads(rows)
    grids = [by_loads] if by_loads else _grids(rows)
    return [_command({**grid, **shared}) for grid in grids]


def _runs(rows: Sequence[Row]) -> set[tuple[Any, ...]]:
    """The value of each row on each axis; heads are None if they follow from the width."""
    runs = set()
    for row in rows:
        model = row["model"]
        heads = None if model["heads"] == default_heads(model["width"]) else model["heads"]
        count, seed = row["sequences"]["count"], row["seed"]
        runs.add((model["layers"], model["width"], heads, row["precision"], count, seed))
    return runs


def _grids(rows: Sequence[Row]) -> list[Grid]:
    """Grids that together have each run once: parts that differ in one axis merge, axis by axis."""
    parts = [tuple((value,) for value in run) for run in sorted(_runs(rows), key=_by_size)]
    for name in ("seeds", "counts", "precision", "width", "layers", "heads"):
        axis = AXES.index(name)
        merged: dict[tuple[Any, ...], list[Any]] = {}
        for part in parts:
            merged.setdefault((*part[:axis], *part[axis + 1 :]), []).extend(part[axis])
        parts = [(*rest[:axis], _ordered(values), *rest[axis:]) for rest, values in merged.items()]
    return [dict(zip(AXES, part, strict=True)) for part in parts]


def _by_loads(rows: Sequence[Row]) -> Grid | None:
    """The grid of the rows if their data set sizes follow from the loads of a preset."""
    shared = settings(rows[0])
    if min(shared["vocab"], shared["length"]) < 2:  # no entropy, so no loads
        return None
    values = dict(zip(AXES, zip(*_runs(rows), strict=True), strict=True))
    axes: Grid = {
        name: _ordered(values[name]) for name in ("layers", "width", "precision", "seeds")
    }
    for preset in PRESETS.values():
        grid = axes | {"loads": preset.loads}
        if {run.key for run in SweepConfig(**shared | grid).runs()} == {row["key"] for row in rows}:
            return grid
    return None


def _command(values: dict[str, Any]) -> str:
    """A command with flags for the values that differ from the laptop preset."""
    default = PRESETS["laptop"]
    words = ["fastmem", "capacity"]
    for name, value in values.items():
        given = value if isinstance(value, tuple) else (value,)
        if None in given:
            continue
        # The command takes a GPU where there is one, unless it names the device.
        differs = value != getattr(default, name) or name == "device"
        if differs and not (name == "steps" and value == DEFAULT_STEPS):
            words += [f"--{name.replace('_', '-')}", *map(str, given if value is not True else ())]
    return shlex.join(words)


def _by_size(run: tuple[Any, ...]) -> tuple[Any, ...]:
    layers, width, heads, *rest = run
    return (layers, width, heads or 0, *rest)


def _ordered(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(sorted(set(values), key=lambda value: (value is None, value)))
