"""One folder, one study: its rows share vocabulary, length and hyperparameters."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fastmem.base.storage import Row
from fastmem.sweeps.config import SweepConfig
from fastmem.sweeps.store import load_rows
from fastmem.training.config import Hyperparameters

HYPERPARAMETERS = asdict(Hyperparameters())


def settings(row: Row) -> Row:
    """What the rows of a study share. A row that lacks a hyperparameter was trained at its default,
    since an earlier version wrote the row."""
    train = {name: row["train"].get(name, default) for name, default in HYPERPARAMETERS.items()}
    return {"vocab": row["model"]["vocab"], "length": row["model"]["length"], **train}


def read_study(config: SweepConfig) -> list[Row]:
    """The rows in config.out.

    Raises:
        ValueError: a damaged row, or a row of another study.
    """
    if not config.out.is_dir():
        return []
    rows, train = load_rows(config.out), config.train_config().hyperparameters()
    for row in rows:
        theirs = settings(row)
        for name, value in {"vocab": config.vocab, "length": config.length, **train}.items():
            if theirs[name] != value:
                raise ValueError(
                    f"{config.out} holds another sweep ({name} is {theirs[name]} there, "
                    f"{value} here): give another --out, or the same --{name.replace('_', '-')}"
                )
    return rows


def check_one_study(rows: Sequence[Row], folder: Path) -> None:
    """Refuses rows of two studies, whose capacities have different meanings.

    Raises:
        ValueError: the settings that differ, with both values and the first row of each value.
    """
    shared = [settings(row) for row in rows]
    differences = []
    for name in shared[0] if rows else ():
        values = [str(setting[name]) for setting in shared]
        if len(set(values)) > 1:
            counted = [
                f"{value} in {number} (first {rows[values.index(value)]['key']})"
                for value, number in Counter(values).most_common(2)
            ]
            differences.append(f"{name} is {' and '.join(counted)}")
    if differences:
        raise ValueError(
            f"{folder} holds rows of more than one study: {'; '.join(differences)}. Move the rows "
            "of each to a folder of its own"
        )
