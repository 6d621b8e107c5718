"""fastmem generate, fastmem verify: data sets as files; and the flags that choose a data set."""

import io
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from fastmem.base.storage import write_whole
from fastmem.base.terminal import say
from fastmem.data.files.formats import Format
from fastmem.data.files.manifest import read_manifest
from fastmem.data.files.tokenfile import TokenFile
from fastmem.data.files.verify import verify
from fastmem.data.files.writer import write
from fastmem.data.repetition import CanarySequences, repeated
from fastmem.data.sequences import Sequences
from fastmem.data.structure import PrefixedSequences, WeightedSequences
from fastmem.data.uniform import RandomSequences, UniformSequences
from fastmem.data.weights import zipf

_CANARIES = 2**63
"""The number of the first canary: far behind the set and what is held out."""


@dataclass(frozen=True)
class Structure:
    """What a data set has beside independent uniform tokens."""

    zipf: float | None = None
    """Exponent of Zipf's law, by which tokens are drawn; by default they are uniform."""
    repeat_share: float = 0.0
    """Share of the --count sequences that stand in the set several times; the rest once."""
    repeat_times: int = 2
    """How many times they do."""
    canaries: int = 0
    """Other random sequences to insert at random places, beside the --count; generate writes the
    places to OUT.bin.canaries.npy, a row for each."""
    canary_times: int = 1
    """How many times each is inserted."""
    prefix: int = 0
    """Tokens at the start that all sequences share."""


@dataclass(frozen=True)
class Generate:
    """Writes a data set as files that other tools read, and a manifest that can make it again.
    Killed, stopped or out of space, the same command goes on at the last whole block.

    Example: fastmem generate --count 1_000_000 --length 64 --vocab 2048 --format npy --out train
    """

    count: int
    """Different sequences, without canaries."""
    length: int
    """Tokens a sequence, S."""
    vocab: int
    """Vocabulary V."""
    seed: int = 0
    """Of the tokens."""
    format: Format = "bin"
    """bin (nanoGPT), llmc (llm.c), megatron (.bin and .idx), npy, parquet (a column input_ids) or
    safetensors (a tensor input_ids)."""
    out: Path = Path("sequences")
    """Name of the files, with the format's suffix or without."""
    shards: int = 1
    """Files to divide the set into, called OUT-00000-of-00004.bin and so on."""
    workers: int | None = None
    """Blocks that are generated at once; by default one a core."""
    overwrite: bool = False
    """Replace what is there."""
    structure: Annotated[Structure, tyro.conf.arg(name="")] = field(default_factory=Structure)


@dataclass(frozen=True)
class Verify:
    """Makes a data set again from its manifest and compares its files with it; names the first
    sequence that differs, with its file and byte.

    Example: fastmem verify train --sample 1000
    """

    path: Annotated[Path, tyro.conf.Positional]
    """Of the set, as generate was given it, or its manifest."""
    sample: int | None = None
    """Compare this many sequences, drawn at random, in place of every byte."""
    workers: int | None = None
    """Blocks that are generated at once; by default one a core."""


def run_generate(command: Generate) -> int:
    sequences = made(command.count, command.length, command.vocab, command.seed, command.structure)
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
        f"{sequences.count:,} sequences, {size / 1e9:.3g} GB in {seconds:.1f} s "
        f"({size / 1e9 / seconds:.2f} GB/s): {files[0]['name']}"
        + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    )
    _save_places(sequences, manifest.with_suffix(".canaries.npy"))
    print(manifest)
    return 0


def _save_places(sequences: Sequences, path: Path) -> None:
    """Where the canaries stand, (R, times); no file for a set without."""
    inner = sequences.base if isinstance(sequences, PrefixedSequences) else sequences
    if not isinstance(inner, CanarySequences):
        path.unlink(missing_ok=True)
        return
    buffer = io.BytesIO()
    np.save(buffer, inner.places)
    write_whole(path, buffer.getvalue())
    say(f"the places of the canaries, a row for each: {path.name}")


def run_verify(command: Verify) -> int:
    count = verify(command.path, command.sample, command.workers, progress=True)
    print(f"{count:,} sequences of {command.path} are as its manifest says")
    return 0


def made(count: int, length: int, vocab: int, seed: int, structure: Structure) -> Sequences:
    """The set that the flags describe."""
    for name, value, needed in (
        ("repeat_times", structure.repeat_times, "repeat_share"),
        ("canary_times", structure.canary_times, "canaries"),
    ):
        if value != getattr(Structure, name) and not getattr(structure, needed):
            flag, other = (f"--{word.replace('_', '-')}" for word in (name, needed))
            raise ValueError(f"{flag} {value} does nothing without {other}: give both or neither")

    def random(count: int, start: int) -> RandomSequences:
        if structure.zipf is None:
            return UniformSequences(count, length, vocab, seed, start)
        return WeightedSequences(count, length, zipf(vocab, structure.zipf), seed, start)

    sequences: Sequences = random(count, 0)
    if structure.repeat_share:
        sequences = repeated(sequences, structure.repeat_share, structure.repeat_times, seed)
    if structure.canaries:
        canaries = random(structure.canaries, _CANARIES)
        sequences = CanarySequences(sequences, canaries, structure.canary_times, seed)
    if structure.prefix:
        sequences = PrefixedSequences(sequences, structure.prefix, seed)
    return sequences


def opened(path: Path, length: int | None, vocab: int | None) -> TokenFile:
    """The file as sequences; what is dropped of it is a line to the user."""
    with _warnings_said():
        return TokenFile.open(path, length, vocab)


@contextmanager
def _warnings_said() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        say(str(warning.message))
