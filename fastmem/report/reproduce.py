"""What the rows of a folder share, and the commands that make them again."""

import shlex
from collections import Counter
from collections.abc import Sequence
from math import log2
from pathlib import Path
from typing import Any

from fastmem.base.storage import Row
from fastmem.sweeps.config import PRESETS, SweepConfig, default_heads
from fastmem.training.config import DEFAULT_STEPS

AXES = ("layers", "width", "heads", "precision", "counts", "seeds")
Grid = dict[str, tuple[Any, ...]]
"""For each axis its values; the runs are their product."""


def check_finished(rows: Sequence[Row], folder: Path) -> None:
    """Refuses rows of which none finished: there is nothing to report.

    Raises:
        ValueError: how many rows there are, and the error of the first.
    """
    if not any(row["status"] == "done" for row in rows):
        first = f", the first with {rows[0]['error']}" if rows else ""
        raise ValueError(
            f"{folder} holds no finished run, and {len(rows)} failed{first}: "
            f"run `fastmem capacity --out {folder}` first, or again"
        )


def budget(row: Row) -> str:
    """How long each run trains, in words."""
    train = row["train"]
    unit = next(name for name in ("steps", "epochs", "seconds") if train[name] is not None)
    batch = train["batch"]
    rate = "by shape" if train["lr"] is None else f"{train['lr']:g}"
    if train.get("embedding_lr") is not None:
        rate += f", of the embeddings {train['embedding_lr']:g}"
    most = "until converged, at most " if train.get("until") == "converged" else ""
    return f"{most}{train[unit]:,} {unit} of up to {batch:,} sequences, learning rate {rate}"


def commands(rows: Sequence[Row], out: str) -> list[str]:
    """The commands that make these rows again in a folder, one for each part that is a grid.

    Parsed by the command line they give exactly the keys of the rows, in one command where the
    data set sizes are those of a preset's loads.
    """
    train, model = rows[0]["train"], rows[0]["model"]
    done = next((row for row in rows if row["status"] == "done"), rows[0])
    device = done["device"].partition(":")[0]
    shared = {
        "vocab": model["vocab"],
        "length": model["length"],
        **{name: train[name] for name in ("steps", "epochs", "seconds", "lr", "batch")},
        # A row of an earlier version has none, and was trained as is the default now.
        **{name: train[name] for name in ("until", "tolerance", "embedding_lr") if name in train},
        "device": device,
        "sequence_bits": any(row.get("held_out_bits") is not None for row in rows),
        "out": out,
    }
    by_loads = _by_loads(rows)
    grids = [by_loads] if by_loads else _grids(rows)
    return [_command({**grid, **shared}) for grid in grids]


def _runs(rows: Sequence[Row]) -> set[tuple[Any, ...]]:
    """The place of each row on the AXES; heads None where they follow from the width."""
    runs = set()
    for row in rows:
        model = row["model"]
        heads = None if model["heads"] == default_heads(model["width"]) else model["heads"]
        count, seed = row["sequences"]["count"], row["seed"]
        runs.add((model["layers"], model["width"], heads, row["precision"], count, seed))
    return runs


def _grids(rows: Sequence[Row]) -> list[Grid]:
    """Grids that together have each run once: axis after axis, what differs in it alone is one."""
    parts = [tuple((value,) for value in run) for run in sorted(_runs(rows), key=_by_size)]
    for name in ("seeds", "counts", "precision", "width", "layers", "heads"):
        axis = AXES.index(name)
        alike: dict[tuple[Any, ...], list[Any]] = {}
        for part in parts:
            alike.setdefault((*part[:axis], *part[axis + 1 :]), []).extend(part[axis])
        parts = [
            (*rest[:axis], tuple(_ordered(values)), *rest[axis:]) for rest, values in alike.items()
        ]
    return [dict(zip(AXES, part, strict=True)) for part in parts]


def _by_loads(rows: Sequence[Row]) -> Grid | None:
    """The one grid of a preset's loads that has exactly these runs, if there is one."""
    runs = _runs(rows)
    values = [_ordered({run[axis] for run in runs}) for axis in range(len(AXES))]
    grid = dict(zip(AXES, map(tuple, values), strict=True))
    del grid["counts"]
    train, model = rows[0]["train"], rows[0]["model"]
    coded = (model["length"] - 1) * log2(model["vocab"])
    if not coded or grid["heads"] != (None,):
        return None
    grid["heads"] = ()
    for preset in PRESETS.values():
        config = SweepConfig(
            layers=grid["layers"],
            width=grid["width"],
            seeds=grid["seeds"][:1],
            vocab=model["vocab"],
            length=model["length"],
            loads=preset.loads,
            **{name: train[name] for name in ("steps", "epochs", "seconds", "lr", "batch")},
        )
        of_loads = {
            (run.model.layers, run.model.width, None, precision, run.sequences.count, seed)
            for run in config.runs()
            for precision in grid["precision"]
            for seed in grid["seeds"]
        }
        if of_loads == runs:
            return {**grid, "loads": preset.loads}
    return None


def _command(values: dict[str, Any]) -> str:
    """Flags for what is not the default of the laptop preset."""
    default = PRESETS["laptop"]
    words = ["fastmem", "capacity"]
    for name, value in values.items():
        several = isinstance(value, tuple)
        told = value if several else (value,)
        if None in told or not told:
            continue
        if value != getattr(default, name) and not (name == "steps" and value == DEFAULT_STEPS):
            words += [f"--{name.replace('_', '-')}", *map(str, told if value is not True else ())]
    return shlex.join(words)


def _by_size(run: tuple[Any, ...]) -> tuple[Any, ...]:
    layers, width, heads, *rest = run
    return (layers, width, heads or 0, *rest)


def _ordered(values: Any) -> list[Any]:
    return sorted(set(values), key=lambda value: (isinstance(value, str), value is None, value))
