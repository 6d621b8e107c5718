"""Files of checkpoints: of a process alone one file, of ranks a folder."""

import io
import shutil
from pathlib import Path
from typing import Any

import torch

from fastmem.base.storage import read_sealed, write_sealed


def shards_of(checkpoint: Path) -> Path:
    """The folder of sharded checkpoints beside the file of a process alone."""
    return checkpoint.with_suffix(".shards")


def delete_checkpoints(checkpoint: Path) -> None:
    """Deletes the checkpoints of a run, of a process alone and of ranks."""
    checkpoint.unlink(missing_ok=True)
    shutil.rmtree(shards_of(checkpoint), ignore_errors=True)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes the record of a run, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(record, buffer)
    write_sealed(path, buffer.getvalue())


def read_record(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The record of write_record; ValueError if the file is damaged."""
    record: dict[str, Any] = torch.load(io.BytesIO(read_sealed(path)), map_location=device)
    return record
