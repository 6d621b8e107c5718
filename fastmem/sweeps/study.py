"""One folder, one study: its rows share vocabulary, length and hyperparameters."""

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from fastmem.base.storage import Row
from fastmem.sweeps.config import SweepConfig
from fastmem.sweeps.store import STUDY, load_rows
from fastmem.training.config import Hyperparameters

MODEL = ("run.json", "checkpoint.pt", "checkpoint.shards", "trace.json")
"""Files of a trained model: a folder with any of them is such a folder."""
OF_RUNS = ("rows/*", "checkpoints/*", "sequence_bits/*", "sent/*/*", "running/*")
KEY = re.compile(r"\d+x\d+-h\d+-[\w-]+-n\d+-seed\d+")
HYPERPARAMETERS = asdict(Hyperparameters())


def settings(row: Row) -> Row:
    """What the rows of a study share. A row that lacks a hyperparameter was trained at its default,
    since an earlier version wrote the row."""
    train = {name: row["train"].get(name, default) for name, default in HYPERPARAMETERS.items()}
    return {"vocab": row["model"]["vocab"], "length": row["model"]["length"], **train}


def corpus_of(row: Row) -> str | None:
    """The hash of the corpus that a row was trained on; None for uniform data."""
    text = row["sequences"].get("first", row["sequences"])  # beside canaries
    return str(text["hash"]) if text.get("kind") == "text" else None


def delete_runs(folder: Path) -> None:
    """Deletes the files of all runs in the folder, capacity.json and report.html; no others."""
    found = chain.from_iterable(folder.glob(pattern) for pattern in OF_RUNS)
    paths = [path for path in found if KEY.fullmatch(path.stem)]
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("capacity.json", "report.html") if paths else ():
        (folder / name).unlink(missing_ok=True)


def read_study(config: SweepConfig) -> list[Row]:
    """The rows in config.out; none with config.overwrite.

    Raises:
        ValueError: a damaged row, or a row of another study.
    """
    if config.overwrite or not config.out.is_dir():
        return []
    rows, train = load_rows(config.out), config.train_config().hyperparameters()
    ours = config.corpus_hash()
    if ours is None and (config.out / STUDY).exists():
        raise ValueError(f"{config.out} is the folder of a text sweep: give another --out")
    for row in rows:
        if (was := corpus_of(row)) != ours:
            both = (
                f"a corpus of hash {one}" if one else "uniform sequences" for one in (was, ours)
            )
            raise ValueError(
                f"{config.out} holds runs on {next(both)}, and this sweep is on {next(both)}: give "
                "another --out, or --overwrite"
            )
        theirs = settings(row)
        for name, value in {"vocab": config.vocab, "length": config.length, **train}.items():
            if theirs[name] != value:
                raise ValueError(
                    f"{config.out} holds another sweep ({name} is {theirs[name]} there, "
                    f"{value} here): give another --out, the same "
                    f"--{name.replace('_', '-')}, or --overwrite"
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
