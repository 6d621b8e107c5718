"""Writes data sets as files in a format of the field, with a manifest that can make them again.

An unfinished file is called NAME.part, and a journal beside it records which bytes are good. The
manifest is written last, so a set with a manifest is whole.

N sequences, S tokens a sequence, V vocabulary, K shards.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from numpy.typing import ArrayLike
from tqdm import tqdm

from fastmem.base.arguments import integer, user_path
from fastmem.base.storage import write_json
from fastmem.data.array import ArraySequences, as_sequences
from fastmem.data.files.blocks import blocks, checked_workers, payload_chunks
from fastmem.data.files.formats import (
    checked_format,
    header,
    index_bytes,
    index_chunks,
    index_path,
    token_dtype,
)
from fastmem.data.files.journal import Journal, unfinished
from fastmem.data.files.manifest import SCHEMA, Manifest, Output, read_manifest
from fastmem.data.files.parquet import pyarrow_parquet, write_groups
from fastmem.data.files.part import Part, part_path, write_file
from fastmem.data.sequences import GENERATOR, Sequences, from_description

_MAX_ROW_BYTES = 1 << 30
_MAX_FILE_BYTES = 2**63 - 1
_MAX_SHARDS = 99999  # five digits in a name


def write(
    sequences: Sequences | ArrayLike,
    path: str | Path,
    format: str = "bin",
    shards: int = 1,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Writes a data set in a format of the field, block by block, and its manifest.

    After a kill, the same call with the same sequences, format and shards resumes at the last
    whole block (Parquet: the last whole shard, since its writer cannot resume inside a file), and
    the files end up with the same bytes.

        bin          nanoGPT: uint16, or uint32 if V > 65536, and nothing else
        llmc         llm.c: the same after a header of 256 int32
        megatron     Megatron-LM: uint16, or int32 if V >= 65500, and an .idx beside it
        npy          np.load(path, mmap_mode="r"): (N, S)
        parquet      a column input_ids of lists of int32; needs pyarrow
        safetensors  a tensor input_ids: (N, S)

    Args:
        sequences: the data set; `from_description` must be able to make it again. Or tokens as
            `from_array` takes them.
        path: of the files, with the format's suffix or without.
        format: one of the above.
        shards: K; if above 1, K files of nearly equal size, called path-00000-of-0000K.
        workers: threads that make blocks; None: one per core. Affects the speed alone.
        overwrite: replaces existing files.
        progress: shows a bar in GB/s if standard error is a terminal.

    Returns:
        The path of the manifest.

    Raises:
        ValueError: the arguments do not fit; files or an unfinished run of another data set exist;
            the call would replace its source; a sequence takes more than 1 GiB; the disk is too
            small; pyarrow is missing.
        OSError: the disk is full or cannot be written; afterwards the same call resumes.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> manifest = write(fastmem.UniformSequences(100, 8, 128), f"{folder.name}/train.bin")
        >>> manifest.name, Path(f"{folder.name}/train.bin").stat().st_size
        ('train.bin.json', 1600)
        >>> folder.cleanup()
    """
    sequences = as_sequences("sequences must be a set of sequences", sequences)
    shards = integer("shards", shards, 1, min(sequences.count, _MAX_SHARDS))
    output = Output.at(user_path(path), checked_format(format), shards)
    if output.stem.is_dir():
        raise ValueError(f"{output.stem} is a directory: give the path of a file")
    threads = checked_workers(workers)
    request = _request(sequences, output)
    total = _checked_total(output, sequences)
    output.stem.parent.mkdir(parents=True, exist_ok=True)
    with _journal(output, request, overwrite, sequences._files()) as journal:
        hidden = None if progress else True
        with tqdm(
            total=total, unit="B", unit_scale=True, desc=output.stem.name, disable=hidden
        ) as bar:
            parts = [
                _write_shard(output, sequences, shard, journal, threads, bar)
                for shard in range(output.shards)
            ]
        write_json(output.manifest, request | {"shards": parts})
    return output.manifest


def _write_shard(
    output: Output,
    sequences: Sequences,
    shard: int,
    journal: Journal,
    workers: int,
    bar: "tqdm[Any]",
) -> dict[str, Any]:
    path, rows = output.payload(shard), output.rows(shard, sequences.count)
    dtype = token_dtype(output.format, sequences.vocab)

    def write_payload(part: Part) -> None:
        if output.format == "parquet":
            write_groups(part, blocks(sequences, dtype, rows, workers))
        else:
            done = part.tell()
            part.write_blocks(payload_chunks(sequences, output.format, rows, workers, done))

    def write_index(part: Part) -> None:
        end = 0
        for chunk in index_chunks(len(rows), sequences.length, dtype):
            end += len(chunk)
            if end > part.tell():
                part.write_blocks([chunk])

    files = [write_file(path, write_payload, journal, bar)]
    if output.format == "megatron":
        files.append(write_file(index_path(path), write_index, journal, bar))
    return {"begin": rows.start, "end": rows.stop, "files": files}


@contextlib.contextmanager
def _journal(
    output: Output, request: Manifest, overwrite: bool, sources: Iterable[Path] = ()
) -> Iterator[Journal]:
    """The journal of this run or of the run that it resumes; refuses to destroy other files."""
    with output.journal.open("a+b") as file:
        _lock(file, output)
        try:
            theirs = unfinished(file, request, overwrite)
            _claim(output, request, theirs, overwrite, sources)
            if theirs != request:
                os.ftruncate(file.fileno(), 0)
            file.seek(0)
            journal = Journal(file, request)
            _check_payloads(output, journal, overwrite)
        except ValueError:
            if os.fstat(file.fileno()).st_size == 0:
                output.journal.unlink()
            raise
        yield journal
        output.journal.unlink()


def _lock(file: IO[bytes], output: Output) -> None:
    """Makes this process the only writer of these files until the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A writer that just ended has removed the file that is open here.
        if os.path.samestat(os.fstat(file.fileno()), output.journal.stat()):
            return
    except (BlockingIOError, FileNotFoundError):
        pass
    raise ValueError(f"another fastmem is writing {output.stem}: wait for it, or give another name")


def _claim(
    output: Output,
    request: Manifest,
    theirs: Manifest | None,
    overwrite: bool,
    sources: Iterable[Path],
) -> None:
    """Removes the files that the run replaces, except the journal, or refuses to."""
    whole = output.manifest.exists()
    replaced = _files_of(output, theirs)
    if not overwrite:
        there = [path for path in (output.manifest, *replaced) if path.exists()]
        if whole or (theirs is None and there):
            if theirs == request:  # killed between the manifest and the end of the journal
                output.journal.unlink()
            raise ValueError(f"{there[0]} exists already: give another name, or --overwrite")
        if theirs is not None and theirs != request:
            name = next(name for name in request if theirs[name] != request[name])
            raise ValueError(
                f"{output.journal} is of another unfinished run ({name} is {theirs[name]} there, "
                f"{request[name]} here): give the same {name}, another name, or --overwrite"
            )
        return
    read = {path.resolve() for path in sources} & {path.resolve() for path in replaced}
    if read:
        raise ValueError(f"{read.pop()} is a source of the data set: write to another name")
    if whole or theirs != request:
        # First the manifest, so that the set is not whole any more.
        for path in (output.manifest, *replaced):
            path.unlink(missing_ok=True)


def _files_of(output: Output, request: Manifest | None) -> list[Path]:
    """The files, finished or not, of this set, of an unfinished run and of the existing set."""
    sets = [output]
    if request is not None:
        sets.append(Output(output.stem, request["format"], request["shards"]))
    if output.manifest.exists():
        with contextlib.suppress(ValueError):  # a damaged manifest has no other names
            sets.append(read_manifest(output.manifest)[0])
    paths = dict.fromkeys(path for one in sets for path in one.files())
    return [name for path in paths for name in (path, part_path(path))]


def _check_payloads(output: Output, journal: Journal, overwrite: bool) -> None:
    """Refuses or removes finished files that the journal does not vouch for."""
    for path in output.files():
        if path.exists() and not journal.vouches(path.name, path):
            if not overwrite:
                raise ValueError(
                    f"{path} differs from the file that the unfinished run wrote: give another "
                    "name, or --overwrite"
                )
            path.unlink()


def _request(sequences: Sequences, output: Output) -> Manifest:
    """Everything that the bytes of the files depend on."""
    description = json.loads(json.dumps(sequences.description()))
    if not isinstance(sequences, ArraySequences):  # the file then has the only copy
        from_description(description)
    dtype = token_dtype(output.format, sequences.vocab)
    row = sequences.length * dtype.itemsize
    if row > _MAX_ROW_BYTES:
        raise ValueError(
            f"a sequence of {sequences.length} tokens takes {row} bytes, more than "
            f"{_MAX_ROW_BYTES}: make more and shorter sequences"
        )
    largest = _shard_bytes(output, sequences, output.shards - 1)
    if largest > _MAX_FILE_BYTES:
        raise ValueError(
            f"a file would take {largest} bytes, more than {_MAX_FILE_BYTES}: make fewer sequences"
        )
    rows = output.rows(output.shards - 1, sequences.count)  # the last shard is the largest
    header(output.format, len(rows), sequences.length, dtype)
    if output.format == "parquet":
        pyarrow_parquet()
    return {
        "schema": SCHEMA,
        "generator": GENERATOR,
        "format": output.format,
        "dtype": dtype.name,
        "count": sequences.count,
        "length": sequences.length,
        "vocab": sequences.vocab,
        "seed": description.get("seed"),
        "shards": output.shards,
        "sequences": description,
    }


def _checked_total(output: Output, sequences: Sequences) -> int:
    """The bytes of a set; ValueError above the size of the disk."""
    total = sum(_shard_bytes(output, sequences, shard) for shard in range(output.shards))
    folder = next(path for path in output.stem.absolute().parents if path.exists())
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a path in a directory")
    room = shutil.disk_usage(folder).total
    if output.format != "parquet" and total > room:
        raise ValueError(
            f"{output.stem} takes {total} bytes, and the disk has {room}: make fewer sequences, "
            "or write to another disk"
        )
    return total


def _shard_bytes(output: Output, sequences: Sequences, shard: int) -> int:
    """The bytes of a shard, about; of Parquet, before compression."""
    rows = len(output.rows(shard, sequences.count))
    index = index_bytes(rows) if output.format == "megatron" else 0
    return rows * sequences.length * token_dtype(output.format, sequences.vocab).itemsize + index
