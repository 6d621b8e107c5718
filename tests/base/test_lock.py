"""The lock of a folder: one sweep at a time, and who it is."""

import os
import signal
import time
from pathlib import Path

import pytest

from fastmem.base.lock import LOCK, is_stamped, locked


def test_the_second_is_told_who_the_first_is(tmp_path: Path) -> None:
    """Fails if two get in, or the error does not name process, machine and start; or if looking
    takes the name from the file."""
    for _ in range(2):
        with locked(tmp_path) as stamp:
            for _ in range(2):
                told = rf"process {os.getpid()} on \S+ since 2\d+-.* UTC\): wait for it, or give"
                with pytest.raises(ValueError, match=told), locked(tmp_path):
                    pass
            assert is_stamped(tmp_path, stamp)
        assert not is_stamped(tmp_path, stamp)
    assert not is_stamped(tmp_path / "none", stamp)


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"pid": 3}'])
def test_a_lock_that_says_nothing(tmp_path: Path, text: str) -> None:
    """Fails if a file of another version is a traceback, or its lock is not respected."""
    import fcntl

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
    """Fails if what a killed process wrote keeps the next one out, or stays as its name."""
    child = os.fork()
    if not child:
        with locked(tmp_path):
            time.sleep(60)
    while not (tmp_path / LOCK).exists() or not (tmp_path / LOCK).read_text():
        time.sleep(0.01)
    with pytest.raises(ValueError, match=f"process {child} on"), locked(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert f'"pid": {child}' in (tmp_path / LOCK).read_text()
    with locked(tmp_path) as stamp:
        assert f'"pid": {os.getpid()}' in stamp
        assert (tmp_path / LOCK).read_text() == stamp
