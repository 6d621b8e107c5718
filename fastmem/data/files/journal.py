"""Files written in blocks, that a killed run goes on with.

NAME.part is a file in the making. The journal has a line for each block that is in it, with the
hash of all bytes up to there, and a line for each file that is whole.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from tqdm import tqdm

from fastmem.data.files.formats import Bytes

DIRECT_BYTES = 4096
"""What address, place and size must be whole multiples of to be written past the page cache."""

_READ_BYTES = 4 << 20
_ENTRY = {"name": str, "bytes": int, "xxh3": str, "whole": bool}


class Journal:
    """What an unfinished run has done: its request, then a line a block and a line a file."""

    def __init__(self, file: IO[bytes], request: dict[str, Any]) -> None:
        self._file = file
        self.ends: dict[str, list[tuple[int, str]]] = {}
        self.whole: dict[str, dict[str, Any]] = {}
        good = 0
        for line in file.read().splitlines(keepends=True):
            # A crash may leave half a line, or zeros where the machine itself stopped.
            entry = _parsed(line)
            if not (self._take(entry) if good else entry == request):
                break
            good += len(line)
        os.ftruncate(file.fileno(), good)
        file.seek(good)
        if good == 0:
            self._append(request)

    def note(self, name: str, end: int, digest: str, whole: bool = False) -> dict[str, Any]:
        """Says that the first `end` bytes of a file are written, and their hash."""
        entry = {"name": name, "bytes": end, "xxh3": digest, "whole": whole}
        self._append(entry)
        return entry

    def vouches(self, name: str, path: Path) -> bool:
        """Whether the file `name` was finished, and is what lies at path."""
        known = self.whole.get(name)
        if known is None or path.stat().st_size != known["bytes"]:
            return False
        with path.open("rb") as file:
            digest: str = hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
        return bool(digest == known["xxh3"])

    def _take(self, entry: Any) -> bool:
        """Takes a line up; False if it is none of `note`."""
        if not isinstance(entry, dict) or {n: type(v) for n, v in entry.items()} != _ENTRY:
            return False
        if entry["whole"]:
            self.whole[entry["name"]] = entry
            return True
        ends = self.ends.setdefault(entry["name"], [])
        # A file that goes on from an earlier place shows an end that is not after the last.
        while ends and ends[-1][0] >= entry["bytes"]:
            ends.pop()
        ends.append((entry["bytes"], entry["xxh3"]))
        return True

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(_line(entry))
        self._file.flush()
        if entry.get("whole"):  # before the file has the name that only this line vouches for
            os.fsync(self._file.fileno())


def unfinished(file: IO[bytes], request: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The request of the run that a journal is of; None for an empty one.

    Raises:
        ValueError: a file that is no journal, unless it may be overwritten.
    """
    file.seek(0)
    line = file.readline()
    if not line:
        return None
    theirs = _parsed(line)
    if isinstance(theirs, dict) and theirs.keys() == request.keys():
        return theirs
    if _line(request).startswith(line):  # killed before its first line was whole
        return request
    if overwrite:
        return None
    raise ValueError(f"{file.name} is no journal of fastmem: give another name, or --overwrite")


def part_path(path: Path) -> Path:
    """What a file is called in the making."""
    return path.with_name(f"{path.name}.part")


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    """What a whole line says; None if it is none."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def write_file(
    path: Path, write_all: Callable[["Part"], None], journal: Journal, bar: "tqdm[Any]"
) -> dict[str, Any]:
    """Writes or finishes one file; its name, size and hash."""
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
    """A file in the making, from the last place on that the journal vouches for.

    The hash of what is there already is made by reading it: a hash cannot be stored half way, and
    reading also shows blocks that a crash of the machine took back.
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
        return str(self._hash.hexdigest())

    def write_blocks(self, chunks: Iterable[Bytes]) -> None:
        """Writes chunks that can be made again, and notes each."""
        for chunk in chunks:
            self.write(chunk.data)
            self._journal.note(self._name, self._bytes, self.digest)

    def write(self, data: Any) -> None:
        """Appends bytes. This and what follows is what a writer of Parquet expects of a file."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        while view.nbytes:  # the system may take it in parts
            n = self._written(view)
            self._bytes += n
            self._bar.update(n)
            view = view[n:]

    def _written(self, view: memoryview) -> int:
        """Writes what the system takes of it: past its cache where all is aligned to pages.

        The cache is memory that this set would fill and nobody read, and filling it takes longer
        than the disk does.
        """
        address = np.frombuffer(view, np.uint8).ctypes.data
        aligned = not (address | self._bytes | view.nbytes) % DIRECT_BYTES
        self._set_direct(aligned and self._may_be_direct)
        try:
            return os.write(self._fd, view)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
        self._may_be_direct = False  # a disk of larger sectors
        self._set_direct(False)
        return os.write(self._fd, view)

    def _set_direct(self, direct: bool) -> None:
        if direct == self._direct:
            return
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags ^ os.O_DIRECT)
            self._direct = direct
        except OSError:  # not every file system has it
            self._may_be_direct = False

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
