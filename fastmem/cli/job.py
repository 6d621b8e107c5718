"""What the ranks of one command must share: a folder, the code, the data."""

import hashlib
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import fastmem
from fastmem.base.lock import OF_MODEL, locked_once
from fastmem.base.ranks import Ranks, do_first
from fastmem.base.storage import check_folder
from fastmem.data.sequences import Sequences
from fastmem.training.group import checkpoint_seconds

FIXES = {
    "code": "install the same version on every node",
    "torch": "install the same version on every node",
    "command": "start every node with the same command and FASTMEM_CHECKPOINT_SECONDS",
    "data": "give every node the same files",
    "device": "give --device cpu, or a GPU to every rank",
}


@contextmanager
def one_folder(out: Path, overwrite: bool, own: Collection[str]) -> Iterator[None]:
    """Makes the folder of a model and holds its lock, on rank 0; other ranks must see the folder.

    Raises:
        ValueError: a folder of other files, another command at work in it, or a rank that does not
            see it.
    """
    if not overwrite:
        do_first(lambda: check_folder(out, own, "model"))
    with locked_once(out, OF_MODEL):
        yield


def check_same(job: Ranks, sequences: Sequences | None = None) -> None:
    """ValueError on all ranks, unless all have the same code, command and data."""
    data = [] if sequences is None else [repr(sequences.description()).encode(), *_some(sequences)]
    job.check_same(
        FIXES,
        code=_hash(*(path.read_bytes() for path in _sources())),
        torch=torch.__version__,
        command=_lines(sys.argv[1:]),
        data=_hash(*data),
        device=job.device.type,
    )


def _lines(arguments: list[str]) -> str:
    """A line for each flag with its values, and one for FASTMEM_CHECKPOINT_SECONDS."""
    flags = sorted(set(re.split(r" (?=--)", " ".join(arguments))))
    return "\n".join([*flags, f"FASTMEM_CHECKPOINT_SECONDS={checkpoint_seconds():g}"])


def _sources() -> list[Path]:
    return sorted(Path(fastmem.__file__).parent.rglob("*.py"))


def _some(sequences: Sequences) -> list[bytes]:
    """The first and the last sequence: a description names files, which may differ."""
    places = np.array([0, sequences.count - 1], np.uint64)
    return [sequences.tokens(places, np.int64).tobytes()]


def _hash(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:12]
