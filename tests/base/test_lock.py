"""The lock of a folder: one sweep at a time, and who it is."""

import errno
import fcntl
import os
import signal
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest

from fastmem.base.lock import LOCK, is_locked, is_stamped, locked


def test_the_error_names_the_owner_of_the_lock(tmp_path: Path) -> None:
    """Fails if two processes get in, or the error does not name process, machine and start; or if
    a refused process empties the file."""
    for _ in range(2):
        with locked(tmp_path) as stamp:
            for _ in range(2):
                owner = rf"process {os.getpid()} on \S+ since 2\d+-.* UTC\): wait for it, or give"
                with pytest.raises(ValueError, match=owner), locked(tmp_path):
                    pass
            assert is_stamped(tmp_path, stamp)
        assert not is_stamped(tmp_path, stamp)
    assert not is_stamped(tmp_path / "none", stamp)


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"pid": 3}'])
def test_a_lock_of_another_version(tmp_path: Path, text: str) -> None:
    """Fails if its file is a traceback, or its lock, the flock of 0.1.0, is not respected."""
    with (tmp_path / LOCK).open("w") as lock:
        lock.write(text)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (
            pytest.raises(ValueError, match=rf"at work in {tmp_path}: wait"),
            locked(tmp_path),
        ):
            pass


def test_a_stale_lock(tmp_path: Path) -> None:
    """Fails if the text of a killed process keeps the next process out or stays, or if the killed
    process counts as at work."""
    child = os.fork()
    if not child:
        with locked(tmp_path):
            time.sleep(60)
    while not (tmp_path / LOCK).exists() or not (tmp_path / LOCK).read_text():
        time.sleep(0.01)
    assert is_locked(tmp_path)
    with pytest.raises(ValueError, match=f"process {child} on"), locked(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert f'"pid": {child}' in (tmp_path / LOCK).read_text()
    assert not is_locked(tmp_path)
    with locked(tmp_path) as stamp:
        assert f'"pid": {os.getpid()}' in stamp
        assert (tmp_path / LOCK).read_text() == stamp


def test_a_look_at_the_lock(tmp_path: Path) -> None:
    """Fails if a lock is not seen, is seen where nobody has it, or a look creates the file."""
    assert not is_locked(tmp_path)
    assert not is_locked(tmp_path / "none")
    assert not list(tmp_path.iterdir())
    for _ in range(2):
        with locked(tmp_path):
            assert is_locked(tmp_path)
            (tmp_path / LOCK).read_bytes()  # closing it must not release the lock
            assert is_locked(tmp_path)
            with (tmp_path / LOCK).open("a") as old, pytest.raises(BlockingIOError):
                fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as fastmem 0.1.0 enters
        assert not is_locked(tmp_path)


def test_a_look_refuses_nobody(tmp_path: Path) -> None:
    """Fails if a sweep that begins is refused while another process looks at the folder."""
    end = time.monotonic() + 1

    def look(_: int) -> int:
        seen = 0
        while time.monotonic() < end:
            seen += is_locked(tmp_path)
        return seen

    with ThreadPool(2) as pool:
        looks = pool.map_async(look, range(2))
        while not looks.ready():
            with locked(tmp_path):
                pass
        assert sum(looks.get()) > 0


def test_a_file_system_with_flock_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a sweep cannot begin there, or a look is an error."""

    def refused(*_: Any) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(fcntl, "fcntl", refused)
    with locked(tmp_path):
        assert not is_locked(tmp_path)
        with pytest.raises(ValueError, match="another fastmem"), locked(tmp_path):
            pass
