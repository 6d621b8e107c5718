"""NAME.part: a file that is being written, in blocks, and that another run can finish."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from tqdm import tqdm

from fastmem.data.files.formats import Bytes
from fastmem.data.files.journal import Journal

DIRECT_BYTES = 4096
"""Writes past the page cache need addresses, offsets and sizes that are multiples of this."""

_READ_BYTES = 4 << 20


def part_path(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(f"{path.name}.part")


def write_file(
    path: Path, write_all: Callable[["Part"], None], journal: Journal, bar: "tqdm[Any]"
) -> dict[str, Any]:
    """Writes or finishes one file; returns its name, size and hash."""
    known, part = journal.whole.get(path.name), part_path(path)
    if known is not None and part.exists() and journal.vouches(path.name, part):
        part.replace(path)
    if known is not None and path.exists():
        bar.update(known["bytes"])
    else:
        with part.open("a+b") as file:
            made = Part(file, path.name, journal, bar)
            write_all(made)
            os.fsync(file.fileno())
            known = journal.note(path.name, made.tell(), made.digest, whole=True)
        part.replace(path)
    return {name: known[name] for name in ("name", "bytes", "xxh3")}


class Part:
    """An unfinished file, from the last byte on that the journal vouches for.

    A hash cannot be stored half way, so the existing bytes are read and hashed again. This also
    finds blocks that were lost in a crash of the machine.
    """

    def __init__(self, file: IO[bytes], name: str, journal: Journal, bar: "tqdm[Any]") -> None:
        self._fd, self._name, self._journal, self._bar = file.fileno(), name, journal, bar
        self._hash, self._bytes = xxhash.xxh3_64(), 0
        self._direct, self._may_be_direct = False, hasattr(os, "O_DIRECT")
        self.closed = False
        for end, digest in journal.ends.get(name, []):
            trial, place = self._hash.copy(), self._bytes
            while block := os.pread(self._fd, max(0, min(end - place, _READ_BYTES)), place):
                trial.update(block)
                place += len(block)
            if place != end or trial.hexdigest() != digest:
                break
            self._hash, self._bytes = trial, end
        os.ftruncate(self._fd, self._bytes)
        self._bar.update(self._bytes)

    @property
    def digest(self) -> str:
        """The hash of all bytes so far."""
        return str(self._hash.hexdigest())

    def write_blocks(self, chunks: Iterable[Bytes]) -> None:
        """Writes chunks that can be made again, and notes each chunk."""
        for chunk in chunks:
            self.write(chunk.data)
            self._journal.note(self._name, self._bytes, self.digest)

    def write(self, data: Any) -> None:
        """Appends bytes. pyarrow calls this method and the next three, as of any file."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        while view.nbytes:  # os.write may write a part only
            n = self._written(view)
            self._bytes += n
            self._bar.update(n)
            view = view[n:]

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def _written(self, view: memoryview) -> int:
        """Writes some bytes and returns their number; past the page cache if aligned to pages.

        The set would fill the cache with pages that nobody reads, and filling the cache takes
        longer than the disk.
        """
        address = np.frombuffer(view, np.uint8).ctypes.data
        aligned = not (address | self._bytes | view.nbytes) % DIRECT_BYTES
        self._set_direct(aligned and self._may_be_direct)
        try:
            return os.write(self._fd, view)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
        self._may_be_direct = False  # a disk with larger sectors
        self._set_direct(False)
        return os.write(self._fd, view)

    def _set_direct(self, direct: bool) -> None:
        if direct == self._direct:
            return
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags ^ os.O_DIRECT)
            self._direct = direct
        except OSError:  # a file system without O_DIRECT
            self._may_be_direct = False
