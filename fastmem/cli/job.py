"""What the ranks of one command must share: a folder, the code, the data."""

import hashlib
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

import fastmem
from fastmem.base.lock import OF_MODEL, is_stamped, locked
from fastmem.base.ranks import Ranks, active
from fastmem.base.storage import check_folder
from fastmem.data.sequences import Sequences

FIXES = {
    "code": "install the same version on every node",
    "torch": "install the same version on every node",
    "command": "start every node with the same command",
    "data": "give every node the same files",
    "folder": "give --out on a file system that all nodes see",
    "device": "give --device cpu, or a GPU to every rank",
}
SEEN_SECONDS = 10
"""How long a network file system may take to show a file of another node."""


@contextmanager
def one_folder(out: Path, overwrite: bool, own: Collection[str]) -> Iterator[None]:
    """Makes the folder of a model and holds its lock, on rank 0; other ranks must see the folder.

    Raises:
        ValueError: a folder of other files, another command at work in it, or a rank that does not
            see it.
    """
    job = active()

    def take() -> str:
        if not overwrite:
            check_folder(out, own, "model")
        out.mkdir(parents=True, exist_ok=True)
        return stack.enter_context(locked(out, OF_MODEL))

    with ExitStack() as stack:
        if job is None:
            take()
        else:
            stamp = job.do_first(take)
            job.check_same(FIXES, folder=f"{out.resolve()}" if _sees(out, stamp) else "none")
        yield


def check_same(job: Ranks, sequences: Sequences, out: Path) -> None:
    """ValueError on all ranks, unless all have the same code, command and data."""
    job.check_same(
        FIXES,
        code=_hash(*(path.read_bytes() for path in _sources())),
        torch=torch.__version__,
        command=_hash(repr(sys.argv[1:]).encode()),
        data=_hash(repr(sequences.description()).encode(), *_some(sequences)),
        device=job.device.type,
    )


def _sees(out: Path, stamp: str) -> bool:
    end = time.monotonic() + SEEN_SECONDS
    while not is_stamped(out, stamp, OF_MODEL):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


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
