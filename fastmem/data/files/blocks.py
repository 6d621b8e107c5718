"""The tokens of a set and the bytes of its files, made block by block on several threads.

N sequences, S tokens a sequence.
"""

import math
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from fastmem.base.arguments import integer, threads_or_all
from fastmem.data.files.formats import Bytes, Dtype, Format, header, token_dtype
from fastmem.data.files.part import DIRECT_BYTES
from fastmem.data.sequences import Sequences, Tokens

BLOCK_BYTES = 4 << 20
"""The size of a block, which is made, hashed, written and noted in the journal at once."""

_LONG_ROWS_BYTES = 64 << 20  # the memory of all blocks, if a sequence is longer than a block

_MAX_WORKERS = 99999

Item = TypeVar("Item")
Made = TypeVar("Made")


def checked_workers(workers: int | None) -> int:
    """`workers`, checked; None becomes one per core."""
    return threads_or_all(None if workers is None else integer("workers", workers, 1, _MAX_WORKERS))


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


def blocks(sequences: Sequences, dtype: Dtype, rows: range, workers: int) -> Iterator[Tokens]:
    """The tokens of these sequences in order, (n, S) at a time; `workers` threads make them.

    A block is valid until the next block is requested.
    """
    row = sequences.length * dtype.itemsize
    n = max(1, BLOCK_BYTES // row)
    if row > BLOCK_BYTES and 3 * row > _LONG_ROWS_BYTES:  # one sequence at a time
        alone = np.empty((1, sequences.length), dtype)
        for begin in rows:
            sequences._fill(alone, range(begin, begin + 1), threads=workers)
            yield alone
        return
    if row > BLOCK_BYTES:
        workers = min(workers, (_LONG_ROWS_BYTES // row - 1) // 2)
    # Whole pages if possible, in memory that is aligned to pages.
    pages = DIRECT_BYTES // math.gcd(DIRECT_BYTES, row)
    n = n // pages * pages or n
    # Memory is used again: new memory costs more time than the tokens in it.
    n = min(n, len(rows))
    spare = [
        np.frombuffer(mmap.mmap(-1, n * row), dtype).reshape(n, sequences.length)
        for _ in range(2 * workers + 1 if n else 0)
    ]

    def make(begin: int) -> tuple[Tokens, int]:
        memory, m = spare.pop(), min(n, rows.stop - begin)
        sequences._fill(memory[:m], range(begin, begin + m), threads=1)
        return memory, m

    for memory, m in ahead(make, range(rows.start, rows.stop, max(1, n)), workers):
        yield memory[:m]
        spare.append(memory)


def ahead(make: Callable[[Item], Made], items: Iterable[Item], workers: int) -> Iterator[Made]:
    """make(item) of each item, in order; up to 2 · workers results are made ahead of their use."""
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
