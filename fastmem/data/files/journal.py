"""The journal of an unfinished run: its request, then the blocks and files that it has written.

A line for each written block has the hash of all bytes of its file up to the end of the block, and
a line for each finished file the hash of the file.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

import xxhash

_ENTRY = {"name": str, "bytes": int, "xxh3": str, "whole": bool}


class Journal:
    """The journal of `request` in an open file; cuts the file at the first line that is invalid."""

    def __init__(self, file: IO[bytes], request: dict[str, Any]) -> None:
        self._file = file
        self.ends: dict[str, list[tuple[int, str]]] = {}
        self.whole: dict[str, dict[str, Any]] = {}
        good = 0
        for line in file.read().splitlines(keepends=True):
            # A killed process may leave half a line, a crash of the machine zeros.
            entry = _parsed(line)
            if not (self._take(entry) if good else entry == request):
                break
            good += len(line)
        os.ftruncate(file.fileno(), good)
        file.seek(good)
        if good == 0:
            self._append(request)

    def note(self, name: str, end: int, digest: str, whole: bool = False) -> dict[str, Any]:
        """Records that the first `end` bytes of a file are written, with their hash."""
        entry = {"name": name, "bytes": end, "xxh3": digest, "whole": whole}
        self._append(entry)
        return entry

    def vouches(self, name: str, path: Path) -> bool:
        """True if the file `name` was finished, and path has the same bytes."""
        known = self.whole.get(name)
        if known is None or path.stat().st_size != known["bytes"]:
            return False
        with path.open("rb") as file:
            digest: str = hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
        return bool(digest == known["xxh3"])

    def _take(self, entry: Any) -> bool:
        """Takes up an entry; False if `note` did not write it."""
        if not isinstance(entry, dict) or {n: type(v) for n, v in entry.items()} != _ENTRY:
            return False
        if entry["whole"]:
            self.whole[entry["name"]] = entry
            return True
        ends = self.ends.setdefault(entry["name"], [])
        # A run that resumed at an earlier byte notes an end that is not after the last end.
        while ends and ends[-1][0] >= entry["bytes"]:
            ends.pop()
        ends.append((entry["bytes"], entry["xxh3"]))
        return True

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(_line(entry))
        self._file.flush()
        if entry.get("whole"):  # on disk before the file gets the name that this line vouches for
            os.fsync(self._file.fileno())


def unfinished(file: IO[bytes], request: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The request of the run that wrote a journal; None for an empty journal.

    Raises:
        ValueError: the file is not a journal, and `overwrite` is False.
    """
    file.seek(0)
    line = file.readline()
    if not line:
        return None
    theirs = _parsed(line)
    if isinstance(theirs, dict) and theirs.keys() == request.keys():
        return theirs
    if _line(request).startswith(line):  # killed before its first line was complete
        return request
    if overwrite:
        return None
    raise ValueError(f"{file.name} is not a journal of fastmem: give another name, or --overwrite")


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    """The value of a line; None if the line is cut or not JSON."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
