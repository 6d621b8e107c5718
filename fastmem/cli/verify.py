"""fastmem verify: compare a data set with its manifest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastmem.data.files.verify import verify


@dataclass(frozen=True)
class Verify:
    """Generates a data set again from its manifest and compares its files with the result. Names
    the first sequence that differs, with its file and byte.

    Example: fastmem verify train --sample 1000
    """

    path: Annotated[Path, tyro.conf.Positional]
    """The --out of generate, or the manifest."""
    sample: int | None = None
    """Compare this many random sequences instead of every byte."""
    workers: int | None = None
    """Blocks to generate at once; by default one per core."""


def run_verify(command: Verify) -> int:
    count = verify(command.path, command.sample, command.workers, progress=True)
    print(f"{count:,} sequences of {command.path} match its manifest")
    return 0
