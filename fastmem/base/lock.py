"""One sweep at a time in a folder: a lock that says who has it."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Keeps others out of the folder; the lock ends with the process, however it ends.

    What the file says of its owner is for people and for workers, which compare it to know that
    they see the same folder: a file that nobody holds is of a process that was killed.

    Yields:
        What the lock file says.

    Raises:
        ValueError: another has the lock; names its process, machine and start.
        OSError: a folder that cannot be written.
    """
    # Not "w", which would empty the file of the one that has it.
    with (folder / LOCK).open("ab+", buffering=0) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = _owner(lock.read())
            raise ValueError(
                f"another fastmem is at work in {folder}{owner}: wait for it, or give another --out"
            ) from None
        except OSError as error:
            why = f"{error.strerror}: this file system has no locks, give another --out"
            raise OSError(error.errno, why, str(folder / LOCK)) from None
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        stamp = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        lock.truncate(0)
        try:
            lock.write(stamp.encode())
            os.fsync(lock.fileno())  # or workers on other machines see it too late
        except OSError as error:  # it does not say to which file
            raise OSError(error.errno, error.strerror, str(folder / LOCK)) from None
        try:
            yield stamp
        finally:
            lock.truncate(0)


def is_stamped(folder: Path, stamp: str) -> bool:
    """Whether the folder seen here is the one whose lock says this."""
    try:
        return (folder / LOCK).read_text() == stamp
    except OSError:
        return False


def _owner(stamp: bytes) -> str:
    try:
        owner = json.loads(stamp)
        return f" (process {owner['pid']} on {owner['host']} since {owner['since']})"
    except (ValueError, TypeError, KeyError):  # of an older version, or not written yet
        return ""
