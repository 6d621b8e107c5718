"""Files that are whole or not there, and say so when they were altered."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]
"""A JSON object, such as the row of a run."""

DIGEST_BYTES = hashlib.sha256().digest_size


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is at `path` when all of it is written; else `path` stays as it was.

    A temporary file beside it is written, synced and renamed over it, so that a reader, a crash
    or a full disk never shows a part.

    Raises:
        OSError: the disk is full, the folder cannot be written, and so on; it names path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for all tries: what a killed process left is overwritten by the next.
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):  # what follows from the error would hide it
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a write's own does not say to which file
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_whole(path: Path, payload: bytes) -> None:
    """Writes all of payload to path, or leaves path as it was; OSError as whole_file."""
    with whole_file(path) as file:
        file.write(payload)


def write_sealed(path: Path, payload: bytes) -> None:
    """Writes payload and its SHA-256 behind it, whole or not at all."""
    write_whole(path, payload + hashlib.sha256(payload).digest())


def read_sealed(path: Path) -> bytes:
    """The payload of write_sealed; ValueError if the file is not what was written."""
    sealed = path.read_bytes()
    payload, digest = sealed[:-DIGEST_BYTES], sealed[-DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError(f"{path} is damaged: delete it, and the run starts from its beginning")
    return payload


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes value as JSON with a checksum of itself under "checksum", whole or not at all."""
    text = json.dumps(value | {"checksum": _checksum(value)}, indent=1, allow_nan=False)
    write_whole(path, text.encode() + b"\n")


def write_document(path: Path, value: dict[str, Any]) -> None:
    """Writes value as readable JSON without a checksum, whole or not at all."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    # Bytes of a name that is not UTF-8 become the escapes of JSON, \udc80 and so on.
    write_whole(path, text.encode(errors="backslashreplace") + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """The value of write_json; ValueError that names the file if it was cut or altered."""
    try:
        value = json.loads(path.read_bytes())
        checksum, found = value.pop("checksum"), _checksum(value)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(
            f"{path} is not a whole file of fastmem: delete it and run again"
        ) from None
    if checksum != found:
        raise ValueError(f"{path} was altered after it was written: delete it and run again")
    return dict(value)


def read_result(path: Path, *fields: str) -> Row:
    """The JSON of a result without a checksum; ValueError unless it has these fields."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError, FileNotFoundError):
        value = None
    if not isinstance(value, dict) or not {*fields} <= value.keys():
        raise ValueError(
            f"{path} is missing, damaged or of another version: give the same command with "
            "--overwrite"
        )
    return value


def _checksum(value: dict[str, Any]) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def check_folder(
    folder: Path,
    own: Collection[str],
    kind: str,
    fix: str = "give another --out, or --overwrite to write there",
) -> None:
    """Refuses a folder with files, none of which is of this kind.

    Raises:
        ValueError: names the first files.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give --out a folder")
    names = sorted(p.name for p in folder.iterdir() if p.name[0] != ".") if folder.exists() else []
    if names and not {*names} & {*own}:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"{folder} is not the folder of a {kind}, and holds {', '.join(names[:3])}{more}: {fix}"
        )
