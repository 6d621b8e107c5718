"""fastmem generate: write a data set as files."""

import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from fastmem.base.storage import write_whole
from fastmem.base.terminal import say
from fastmem.cli.dataset import Flat, Structure, make_data
from fastmem.data.files.formats import Format
from fastmem.data.files.manifest import read_manifest
from fastmem.data.files.writer import write
from fastmem.data.repetition import CanarySequences
from fastmem.data.sequences import Sequences
from fastmem.data.structure import PrefixedSequences


@dataclass(frozen=True)
class Generate:
    """Writes a data set as files that other tools read, with a manifest from which it can be made
    again. After a kill, Ctrl-C or a full disk, the same command resumes at the last whole block.

    Example: fastmem generate --count 1_000_000 --length 64 --vocab 2048 --format npy --out train
    """

    count: int
    """Distinct sequences, without canaries."""
    length: int
    """Tokens a sequence, S."""
    vocab: int
    """Vocabulary V."""
    seed: int = 0
    """Seed of the tokens."""
    format: Format = "bin"
    """bin (nanoGPT), llmc (llm.c), megatron (.bin and .idx), npy, parquet (a column input_ids) or
    safetensors (a tensor input_ids)."""
    out: Path = Path("sequences")
    """Name of the files, with or without the suffix of the format."""
    shards: int = 1
    """Number of files, named OUT-00000-of-00004.bin and so on."""
    workers: int | None = None
    """Blocks to generate at once; by default one per core."""
    overwrite: bool = False
    """Replace existing files."""
    structure: Annotated[Structure, Flat] = field(default_factory=Structure)


def run_generate(command: Generate) -> int:
    sequences = make_data(
        command.count, command.length, command.vocab, command.seed, command.structure
    )
    start = time.perf_counter()
    manifest = write(
        sequences,
        command.out,
        command.format,
        command.shards,
        command.workers,
        command.overwrite,
        progress=True,
    )
    seconds = time.perf_counter() - start
    files = [file for shard in read_manifest(manifest)[1]["shards"] for file in shard["files"]]
    size = sum(file["bytes"] for file in files)
    say(
        f"{sequences.count:,} sequences, {tqdm.format_sizeof(size, 'B')} in {seconds:.1f} s "
        f"({tqdm.format_sizeof(size / seconds, 'B')}/s): {files[0]['name']}"
        + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    )
    _save_canary_rows(sequences, manifest.with_suffix(".canaries.npy"))
    print(manifest)
    return 0


def _save_canary_rows(sequences: Sequences, path: Path) -> None:
    """Writes the rows of each canary, (R, times); removes an old file if there are no canaries."""
    inner = sequences.base if isinstance(sequences, PrefixedSequences) else sequences
    if not isinstance(inner, CanarySequences):
        path.unlink(missing_ok=True)
        return
    buffer = io.BytesIO()
    np.save(buffer, inner.places)
    write_whole(path, buffer.getvalue())
    say(f"rows of the canaries, one canary a line: {path.name}")
