"""Data sets as files: a payload in a format of the field, and a manifest that can make it again.

An unfinished file is called NAME.part, and a journal beside it says which of its bytes are good.
The manifest comes last, so what has one is whole.

N sequences, S tokens a sequence, V vocabulary, K shards.
"""

import contextlib
import fcntl
import json
import math
import mmap
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastmem.base.arguments import integer, threads_or_all
from fastmem.base.storage import write_json
from fastmem.data.files.formats import (
    Bytes,
    Dtype,
    Format,
    checked_format,
    header,
    index_bytes,
    index_chunks,
    index_path,
    token_dtype,
)
from fastmem.data.files.journal import (
    DIRECT_BYTES,
    Journal,
    Part,
    part_path,
    unfinished,
    write_file,
)
from fastmem.data.files.manifest import SCHEMA, Manifest, Output, read_manifest
from fastmem.data.files.parquet import pyarrow_parquet, write_groups
from fastmem.data.sequences import GENERATOR, Sequences, checked_set, from_description

BLOCK_BYTES = 4 << 20
"""What is generated at once, hashed, written and noted in the journal."""

_LONG_ROWS_BYTES = 64 << 20  # what blocks of a sequence that is longer than a block may take
_MAX_ROW_BYTES = 1 << 30
_MAX_FILE_BYTES = 2**63 - 1
_MAX_SHARDS = 99999  # five digits in a name

Item = TypeVar("Item")
Made = TypeVar("Made")


def write(
    sequences: Sequences,
    path: str | Path,
    format: str = "bin",
    shards: int = 1,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Writes a data set in a format of the field, a block at a time, and its manifest.

    A run that was killed goes on at its last whole block when it is called again with the same
    sequences, format and shards, and ends with the bytes of one that was not (Parquet: at its
    last whole shard, as its writer cannot stop half way).

        bin          nanoGPT: uint16, or uint32 if V > 65536, and nothing else
        llmc         llm.c: the same behind a header of 256 int32
        megatron     Megatron-LM: uint16, or int32 if V >= 65500, and an .idx beside it
        npy          np.load(path, mmap_mode="r"): (N, S)
        parquet      a column input_ids of lists of int32; needs pyarrow
        safetensors  a tensor input_ids: (N, S)

    Args:
        sequences: the data set; it must have a description that makes it again.
        path: of the files, with the format's suffix or without.
        format: one of the above.
        shards: K files of nearly equal size, called path-00000-of-0000K, if more than one.
        workers: blocks that are generated at once, None: one a core. Changes nothing but speed.
        overwrite: replaces what is there.
        progress: shows a bar in GB/s when standard error is a terminal.

    Returns:
        The path of the manifest.

    Raises:
        ValueError: arguments that do not fit, files that are there already, an unfinished run of
            another data set, a source that would be replaced, sequences of more than 1 GiB, more
            than the disk can hold, or no pyarrow.
        OSError: a disk that is full or cannot be written; the same call goes on afterwards.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> manifest = write(fastmem.UniformSequences(100, 8, 128), f"{folder.name}/train.bin")
        >>> manifest.name, np.fromfile(f"{folder.name}/train.bin", np.uint16).size
        ('train.bin.json', 800)
        >>> folder.cleanup()
    """
    checked_set("sequences", sequences)
    output = Output.at(path, checked_format(format), _checked_shards(shards, sequences))
    threads = checked_workers(workers)
    request = _request(sequences, output)
    _check_room(output, sequences)
    output.stem.parent.mkdir(parents=True, exist_ok=True)
    with _journal(output, request, overwrite, sequences._files()) as journal:
        total = sum(_shard_bytes(output, sequences, shard) for shard in range(output.shards))
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


def checked_workers(workers: int | None) -> int:
    """How many blocks to make at once; one a core for None."""
    return threads_or_all(None if workers is None else integer("workers", workers, 1, _MAX_SHARDS))


def payload_chunks(
    sequences: Sequences, format: Format, rows: range, workers: int, done: int = 0
) -> Iterator[Bytes]:
    """The bytes of a shard in any format but Parquet, from byte `done` on, in blocks.

    `done` is 0 or the end of a block.
    """
    dtype = token_dtype(format, sequences.vocab)
    start = header(format, len(rows), sequences.length, dtype)
    if done < len(start):
        yield np.frombuffer(start, np.uint8)
        done = len(start)
    begin = rows.start + (done - len(start)) // (sequences.length * dtype.itemsize)
    for block in blocks(sequences, dtype, range(begin, rows.stop), workers):
        yield block.reshape(-1).view(np.uint8)


def blocks(
    sequences: Sequences, dtype: Dtype, rows: range, workers: int
) -> Iterator[NDArray[np.integer[Any]]]:
    """The tokens of these sequences in order, (n, S) at a time, `workers` blocks made at once.

    A block is good until the next is asked for.
    """
    row = sequences.length * dtype.itemsize
    n = max(1, BLOCK_BYTES // row)
    if row > BLOCK_BYTES and 3 * row > _LONG_ROWS_BYTES:  # one after another in one memory
        alone = np.empty((1, sequences.length), dtype)
        for begin in rows:
            sequences._fill(alone, range(begin, begin + 1), threads=workers)
            yield alone
        return
    if row > BLOCK_BYTES:
        workers = min(workers, (_LONG_ROWS_BYTES // row - 1) // 2)
    # Whole pages, if they fit, and aligned to them.
    pages = DIRECT_BYTES // math.gcd(DIRECT_BYTES, row)
    n = n // pages * pages or n
    # Used in turn: fresh memory would cost more than the tokens that are written to it.
    n = min(n, len(rows))
    spare = [
        np.frombuffer(mmap.mmap(-1, n * row), dtype).reshape(n, sequences.length)
        for _ in range(2 * workers + 1 if n else 0)
    ]

    def make(begin: int) -> tuple[NDArray[np.integer[Any]], int]:
        memory, m = spare.pop(), min(n, rows.stop - begin)
        sequences._fill(memory[:m], range(begin, begin + m), threads=1)
        return memory, m

    for memory, m in _ahead(make, range(rows.start, rows.stop, max(1, n)), workers):
        yield memory[:m]
        spare.append(memory)


def _ahead(make: Callable[[Item], Made], items: Iterable[Item], workers: int) -> Iterator[Made]:
    """make(item) of each, in order, with `workers` at work and as many waiting to be taken."""
    pool = ThreadPoolExecutor(workers)
    waiting = deque[Any]()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


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
    """The journal of this run or of the one that it goes on; refuses to destroy anything else."""
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
    """Makes this process the only writer of these files until it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A writer that ended since has removed the file that was opened here.
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
    """Removes what the run replaces, or refuses; the journal stays."""
    whole = output.manifest.exists()
    replaced = _files_of(output, theirs)
    if not overwrite:
        there = [path for path in (output.manifest, *replaced) if path.exists()]
        if whole or (theirs is None and there):
            if theirs == request:  # killed between the manifest and the end of the journal
                output.journal.unlink()
            raise ValueError(f"{there[0]} is there already: give another name, or --overwrite")
        if theirs not in (None, request):
            assert theirs is not None
            name = next(name for name in request if theirs[name] != request[name])
            raise ValueError(
                f"{output.journal} is of another unfinished run ({name} is {theirs[name]} there, "
                f"{request[name]} here): give the same again, another name, or --overwrite"
            )
        return
    read = {path.resolve() for path in sources} & {path.resolve() for path in replaced}
    if read:
        raise ValueError(f"{read.pop()} is read from: give another name than that of the source")
    if whole or theirs != request:
        # First what says that the set is whole.
        for path in (output.manifest, *replaced):
            path.unlink(missing_ok=True)


def _files_of(output: Output, request: Manifest | None) -> list[Path]:
    """Every file of this set, of an unfinished run and of the set that is there, also unfinished;
    none that has another name."""
    sets = [output]
    if request is not None:
        sets.append(Output(output.stem, request["format"], request["shards"]))
    if output.manifest.exists():
        with contextlib.suppress(ValueError):  # of a damaged manifest only our names are known
            sets.append(read_manifest(output.manifest)[0])
    paths = dict.fromkeys(path for one in sets for path in one.files())
    return [name for path in paths for name in (path, part_path(path))]


def _check_payloads(output: Output, journal: Journal, overwrite: bool) -> None:
    """Refuses, or removes, files under their final names that the journal does not vouch for."""
    for path in output.files():
        if path.exists() and not journal.vouches(path.name, path):
            if not overwrite:
                raise ValueError(
                    f"{path} is not what the unfinished run wrote: give another name, or "
                    "--overwrite"
                )
            path.unlink()


def _checked_shards(shards: int, sequences: Sequences) -> int:
    return integer("shards", shards, 1, min(sequences.count, _MAX_SHARDS))


def _request(sequences: Sequences, output: Output) -> Manifest:
    """All that the bytes of the files depend on."""
    description = json.loads(json.dumps(sequences.description()))
    from_description(description)
    row = sequences.length * _dtype(output, sequences).itemsize
    if row > _MAX_ROW_BYTES:
        raise ValueError(
            f"a sequence of {sequences.length} tokens takes {row} bytes, at most {_MAX_ROW_BYTES} "
            "are written: make more and shorter sequences"
        )
    largest = _shard_bytes(output, sequences, output.shards - 1)
    if largest > _MAX_FILE_BYTES:
        raise ValueError(
            f"a file of {largest} bytes is too large, at most {_MAX_FILE_BYTES}: make fewer "
            "sequences"
        )
    if output.format == "parquet":
        pyarrow_parquet()
    else:
        for shard in range(output.shards):
            rows = len(output.rows(shard, sequences.count))
            header(output.format, rows, sequences.length, _dtype(output, sequences))
    return {
        "schema": SCHEMA,
        "generator": GENERATOR,
        "format": output.format,
        "dtype": _dtype(output, sequences).name,
        "count": sequences.count,
        "length": sequences.length,
        "vocab": sequences.vocab,
        "seed": description.get("seed"),
        "shards": output.shards,
        "sequences": description,
    }


def _check_room(output: Output, sequences: Sequences) -> None:
    """Refuses a set that the disk can never hold; one that others fill can still run full."""
    total = sum(_shard_bytes(output, sequences, shard) for shard in range(output.shards))
    folder = next(path for path in output.stem.absolute().parents if path.exists())
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a name in a folder")
    room = shutil.disk_usage(folder).total
    if output.format != "parquet" and total > room:
        raise ValueError(
            f"{output.stem} takes {total} bytes, and the disk has {room}: make fewer sequences, "
            "or write to another disk"
        )


def _dtype(output: Output, sequences: Sequences) -> Dtype:
    return token_dtype(output.format, sequences.vocab)


def _shard_bytes(output: Output, sequences: Sequences, shard: int) -> int:
    """About what a shard takes: of Parquet, before it is packed."""
    rows, dtype = len(output.rows(shard, sequences.count)), _dtype(output, sequences)
    index = index_bytes(rows) if output.format == "megatron" else 0
    return rows * sequences.length * dtype.itemsize + index
