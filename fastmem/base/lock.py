"""The lock of a folder, for one sweep at a time."""

import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fastmem.base.ranks import active, do_first

LOCK = "lock"
"""The lock of a sweep's folder; a model's has the hidden name OF_MODEL."""
OF_MODEL = ".lock"
SEEN_SECONDS = 10
"""How long a network file system may take to show a file of another node."""
_FLOCK = struct.Struct("hhqqi4x")
"""Linux's `struct flock`: type, whence, start, length (0: to the end of the file), process."""


@contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[str]:
    """Holds a folder's lock in this block or until the process dies: a flock, a mark for is_locked.

    The lock file names its owner. Workers compare its text, to know that they see the same folder.
    Text in an unlocked file is of a process that was killed.

    Yields:
        The text of the lock file.

    Raises:
        ValueError: another process has the lock; names the process, its machine and its start.
        OSError: the folder cannot be written.
    """
    # Not "w", which would empty the file of the process that has the lock.
    with (folder / name).open("ab+", buffering=0) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = _owner(lock.read())
            raise ValueError(
                f"another fastmem is at work in {folder}{owner}: wait for it, or give another --out"
            ) from None
        except OSError as error:
            why = f"{error.strerror}: this file system lacks locks, give another --out"
            raise OSError(error.errno, why, str(folder / name)) from None
        with suppress(OSError):  # on a file system with flock alone
            fcntl.fcntl(lock, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        stamp = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        lock.truncate(0)
        try:
            lock.write(stamp.encode())
            os.fsync(lock.fileno())  # workers on other machines read the text at once
        except OSError as error:  # which does not name the file
            raise OSError(error.errno, error.strerror, str(folder / name)) from None
        try:
            yield stamp
        finally:
            lock.truncate(0)


@contextmanager
def locked_once(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Makes a folder and holds its lock, on rank 0; all ranks must see the folder.

    Raises:
        ValueError: as in `locked`, or a rank does not see the folder; on all ranks.
        OSError: as in `locked`, on all ranks.
    """

    def take() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        return stack.enter_context(locked(folder, name))

    with ExitStack() as stack:
        stamp = do_first(take)
        if job := active():
            fix = "give --out on a file system that all nodes see"
            found = f"{folder.resolve()}" if _sees(folder, stamp, name) else "none"
            job.check_same({"folder": fix}, folder=found)
        yield


def _sees(folder: Path, stamp: str, name: str) -> bool:
    end = time.monotonic() + SEEN_SECONDS
    while not is_stamped(folder, stamp, name):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def is_locked(folder: Path) -> bool:
    """True if a process has the lock of the folder. Takes no lock, so it cannot refuse a sweep.

    F_OFD_GETLK (fcntl(2)) reports conflicting locks, over NFS also of other machines. It does not
    see a sweep of fastmem 0.1.0 on a local disk, which has a flock alone.
    """
    wanted = _FLOCK.pack(fcntl.F_RDLCK, 0, 0, 0, 0)
    try:
        with (folder / LOCK).open("rb") as lock:
            found = fcntl.fcntl(lock, fcntl.F_OFD_GETLK, wanted)
    except OSError:  # a folder without a lock file, or a file system with flock alone
        return False
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def is_stamped(folder: Path, stamp: str, name: str = LOCK) -> bool:
    """True if the lock file of the folder has this text."""
    try:
        return (folder / name).read_text() == stamp
    except OSError:
        return False


def _owner(stamp: bytes) -> str:
    try:
        owner = json.loads(stamp)
        return f" (process {owner['pid']} on {owner['host']} since {owner['since']})"
    except (ValueError, TypeError, KeyError):  # of an older version, or not written yet
        return ""
