"""Writes past the page cache, if the disk allows them."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

import fastmem
from fastmem.data.files import blocks
from fastmem.data.files.part import DIRECT_BYTES


class Disk:
    """os.write and fcntl.fcntl of a file system that restricts O_DIRECT."""

    def __init__(self, refuses: bool, invalid: bool, most: int | None) -> None:
        self.refuses, self.invalid, self.most = refuses, invalid, most
        self.direct, self.asked = False, 0
        self.real_write = os.write

    def fcntl(self, fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_GETFL:
            return os.O_DIRECT * self.direct
        assert command == fcntl.F_SETFL
        self.asked += 1
        if self.refuses:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        self.direct = bool(flags & os.O_DIRECT)
        return 0

    def write(self, fd: int, data: Any) -> int:
        if self.direct and self.invalid:
            raise OSError(errno.EINVAL, "a disk of larger sectors")
        if self.direct:
            assert len(data) % DIRECT_BYTES == 0
            assert os.fstat(fd).st_size % DIRECT_BYTES == 0
        return self.real_write(fd, data[: self.most] if self.direct else data)


@pytest.mark.parametrize(
    ("refuses", "invalid", "most", "asked"),
    [
        (False, False, None, 1),
        (True, False, None, 1),  # asked once and not again
        (False, True, None, 2),  # on and off
        (False, False, 4096, 1),  # after a part of whole pages, writes stay direct
        (False, False, 5000, 8),  # after another part, not before the next whole page
    ],
)
def test_disks_without_direct_writes(
    refuses: bool,
    invalid: bool,
    most: int | None,
    asked: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if a file system that refuses O_DIRECT, a direct write or a part of a write costs a
    token, or is asked again and again."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 14)
    sequences = fastmem.UniformSequences(count=2048, length=16, vocab=2048)
    disk = Disk(refuses, invalid, most)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", disk.write)
        patch.setattr(fcntl, "fcntl", disk.fcntl)
        fastmem.write(sequences, tmp_path / "train")
    assert (tmp_path / "train.bin").read_bytes() == sequences[:].tobytes()
    assert disk.asked == asked
