"""Checks that the files of a data set are the files that its manifest describes.

N sequences, S tokens a sequence.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from fastmem.base.arguments import integer, user_path
from fastmem.data.files.blocks import blocks, checked_workers, payload_chunks
from fastmem.data.files.formats import Bytes, header, index_chunks, index_path, token_dtype
from fastmem.data.files.manifest import Manifest, Output, find_manifest, read_manifest
from fastmem.data.files.tokenfile import TokenFile
from fastmem.data.order import permutation
from fastmem.data.sequences import Sequences, Tokens

_READ_BYTES = 4 << 20


def verify(
    path: str | Path, sample: int | None = None, workers: int | None = None, progress: bool = False
) -> int:
    """Makes a data set again from its manifest and compares its files byte by byte.

    Args:
        path: of the set, as for `TokenFile.open`.
        sample: compares this many sequences, drawn without repetition and the same in every call,
            and checks headers and sizes, but not hashes. None: compares every byte.
        workers: threads that make blocks; None: one per core.
        progress: shows a bar if standard error is a terminal.

    Returns:
        The number of sequences that were compared.

    Raises:
        ValueError: the first difference, with its sequence, file, byte and position; or a manifest
            is missing.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> _ = fastmem.write(fastmem.UniformSequences(100, 8, 128), f"{folder.name}/train")
        >>> verify(f"{folder.name}/train"), verify(f"{folder.name}/train", sample=10)
        (100, 10)
        >>> folder.cleanup()
    """
    manifest_path = find_manifest(user_path(path).absolute())
    if manifest_path is None:
        raise ValueError(
            f"{path} has no manifest beside it: only sets that fastmem wrote can be verified"
        )
    threads = checked_workers(workers)
    file = TokenFile.open(manifest_path)
    if sample is not None:
        sample = integer("sample", sample, 1, 2**63 - 1)
        if file.known is None:
            raise ValueError(
                f"{manifest_path} describes a converted file, which only its hash can check: leave "
                "sample out"
            )
        return _compare_sample(file, file.known, min(sample, file.count))
    output, manifest = read_manifest(manifest_path)
    total = sum(entry["bytes"] for part in manifest["shards"] for entry in part["files"])
    hidden = None if progress else True
    with tqdm(total=total, unit="B", unit_scale=True, desc=output.stem.name, disable=hidden) as bar:
        for shard in range(output.shards):
            _compare_shard(output, manifest, shard, file, threads, bar)
    return file.count


def _compare_sample(file: TokenFile, known: Sequences, n: int) -> int:
    rows = np.sort(permutation(0, 0, file.count, 0, n))
    step = max(1, _READ_BYTES // (8 * file.length))
    for begin in range(0, n, step):
        places = rows[begin : begin + step]
        _compare_tokens(file, places, file.tokens(places), known.tokens(places))
    return n


def _compare_shard(
    output: Output, manifest: Manifest, shard: int, file: TokenFile, workers: int, bar: "tqdm[Any]"
) -> None:
    path, rows = output.payload(shard), output.rows(shard, file.count)
    dtype, S = token_dtype(output.format, file.vocab), file.length
    entries = manifest["shards"][shard]["files"]
    if file.known is None:  # converted from a file, so only the hash can check it
        for name, entry in zip(output.shard_files(shard), entries, strict=True):
            _compare_bytes(name, _chunks_of(name), entry, bar)
        return
    if output.format == "parquet":
        begin = rows.start
        for block in blocks(file.known, dtype, rows, workers):
            end = begin + len(block)
            there = file.tokens(slice(begin, end), dtype)
            _compare_tokens(file, np.arange(begin, end), there, block)
            begin = end
        _compare_bytes(path, _chunks_of(path), entries[0], bar)
        return
    chunks = payload_chunks(file.known, output.format, rows, workers)
    wrong = _compare_bytes(path, chunks, entries[0], bar)
    if wrong is not None:
        before = len(header(output.format, len(rows), S, dtype))
        if wrong < before:
            raise ValueError(f"{path}, byte {wrong}: the header differs; generate it again")
        row, rest = divmod(wrong - before, S * dtype.itemsize)
        raise _difference(file, rows.start + row, rest // dtype.itemsize)
    if output.format == "megatron":
        index = index_path(path)
        wrong = _compare_bytes(index, index_chunks(len(rows), S, dtype), entries[1], bar)
        if wrong is not None:
            raise ValueError(f"{index}, byte {wrong}: the index differs; generate it again")


def _compare_bytes(
    path: Path, chunks: Iterable[Bytes], entry: dict[str, Any], bar: "tqdm[Any]"
) -> int | None:
    """The first byte of a file that differs from the chunks; ValueError if only the hash does."""
    digest, offset = xxhash.xxh3_64(), 0
    memory = np.empty(0, np.uint8)
    with path.open("rb") as file:
        for wanted in chunks:
            if memory.size < wanted.size:
                memory = np.empty(wanted.size, np.uint8)
            there = memory[: file.readinto(memory[: wanted.size].data)]
            n = there.size
            if not np.array_equal(there, wanted):
                differ = there != wanted[:n]
                return offset + (int(differ.argmax()) if differ.any() else n)
            digest.update(there.data)
            offset += n
            bar.update(n)
    if digest.hexdigest() != entry["xxh3"]:
        raise ValueError(
            f"{path} has the hash {digest.hexdigest()}, its manifest gives {entry['xxh3']}: one of "
            "the two was altered; generate it again"
        )
    return None


def _chunks_of(path: Path) -> Iterator[Bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            yield np.frombuffer(chunk, np.uint8)


def _compare_tokens(
    file: TokenFile,
    places: NDArray[np.integer[Any]],  # (n,)
    there: Tokens,  # (n, S)
    wanted: Tokens,  # (n, S)
) -> None:
    if not np.array_equal(there, wanted):
        row, position = (int(i) for i in np.argwhere(there != wanted)[0])
        raise _difference(file, int(places[row]), position)


def _difference(file: TokenFile, index: int, position: int) -> ValueError:
    assert file.known is not None
    wanted = file.known[index][position]
    return ValueError(
        f"{file.place(index, position)}: the token there is not {wanted}; generate it again"
    )
