"""Equal sequences by hash, and nearly equal documents by MinHash.

M sequences, S tokens a sequence, D documents.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

_FACTOR = np.uint64(0x9FB21C651E98DF25)
_SHIFT = np.uint64(32)
_BLOCK_ROWS = 1 << 15  # their hashes stay in the second-level cache
_AT_ONCE = 1 << 19
"""Hashes that are sorted at once, about 30 MB."""
_PERMUTATIONS = 64
_WORDS = 5


def row_hashes(tokens: NDArray[Any]) -> NDArray[np.uint64]:
    """A 64-bit hash of each row (M, S): rows that differ collide with a probability of 2⁻⁶⁴.

    Each step, on 8 bytes of all rows, can be undone for given 8 bytes, so that rows differ on
    until a chance collision.
    """
    M, width = tokens.shape[0], tokens.shape[1] * tokens.itemsize
    in_bytes = np.ascontiguousarray(tokens).view(np.uint8).reshape(M, width)
    out = np.empty(M, np.uint64)
    for begin in range(0, M, _BLOCK_ROWS):
        block = in_bytes[begin : begin + _BLOCK_ROWS]
        if width % 8:
            block = np.pad(block, ((0, 0), (0, -width % 8)))
        words = np.ascontiguousarray(block.view(np.uint64).T)
        hashes = np.full(len(block), width, np.uint64)
        for word in words:
            hashes ^= word
            hashes *= _FACTOR
            hashes ^= hashes >> _SHIFT
        out[begin : begin + _BLOCK_ROWS] = (hashes * _FACTOR) ^ (hashes >> np.uint64(29))
    return out


def first_of_each(
    chunks: Iterable[tuple[int, NDArray[np.uint64]]], keep: NDArray[np.bool_], folder: Path
) -> None:
    """Sets keep (M,) to False for all but the first kept row of each hash.

    Args:
        chunks: gives (number of the first row, hashes of consecutive rows) of all rows, once.
        folder: for temporary files of 16 bytes a row, each with the rows of a range of hashes, so
            that memory holds one range.
    """
    ranges = -(-keep.size // _AT_ONCE)
    with ExitStack() as stack:
        files = [stack.enter_context(TemporaryFile(dir=folder)) for _ in range(ranges)]
        for begin, hashes in chunks:
            pairs = np.stack([hashes, np.arange(begin, begin + hashes.size, dtype=np.uint64)], 1)
            pairs = pairs[keep[begin : begin + hashes.size]]
            owners = ((pairs[:, 0] >> _SHIFT) * np.uint64(ranges) >> _SHIFT).astype(np.uint16)
            pairs = pairs[np.argsort(owners, kind="stable")]
            ends = np.cumsum(np.bincount(owners, minlength=ranges))
            for file, part in zip(files, np.split(pairs, ends[:-1]), strict=True):
                file.write(part.data)
        for file in files:
            file.seek(0)
            pairs = np.fromfile(file, np.uint64).reshape(-1, 2)
            _drop_repeats(pairs[:, 0], pairs[:, 1], keep)


def _drop_repeats(
    hashes: NDArray[np.uint64], rows: NDArray[np.uint64], keep: NDArray[np.bool_]
) -> None:
    keep[rows] = False
    order = np.argsort(hashes)
    hashes, rows = hashes[order], rows[order]
    begins = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
    if rows.size:
        keep[np.minimum.reduceat(rows, begins)] = True


class NearDuplicates:
    """Documents that resemble an earlier document, by MinHash over runs of five words."""

    def __init__(self, threshold: float) -> None:
        try:
            import datasketch
        except ImportError:
            raise ValueError(
                "near_duplicates needs datasketch, which is not installed: pip install "
                "'fastmem-lm[text]'"
            ) from None
        self._library, self._threshold = datasketch, threshold
        self._signatures: list[NDArray[np.uint64]] = []

    def add(self, texts: Sequence[str]) -> None:
        """Adds documents in the order of reading."""
        for text in texts:
            sketch = self._sketch()
            sketch.update_batch(list(_runs(text)))
            self._signatures.append(sketch.hashvalues)

    def found(self, order: NDArray[np.int64], hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of these documents, in this order, resemble one before them that stays.

        Equal documents, which have equal hashes, are left to the removal of equal sequences.
        """
        index = self._library.MinHashLSH(threshold=self._threshold, num_perm=_PERMUTATIONS)
        near = np.zeros(order.size, bool)
        kept: dict[int, Any] = {}
        for i, document in enumerate(order.tolist()):
            if i and hashes[i] == hashes[i - 1]:
                near[i] = near[i - 1]
                continue
            sketch = self._sketch(self._signatures[document])
            candidates = index.query(sketch)
            near[i] = any(sketch.jaccard(kept[one]) >= self._threshold for one in candidates)
            if not near[i]:
                index.insert(i, sketch)
                kept[i] = sketch
        return near

    def _sketch(self, values: NDArray[np.uint64] | None = None) -> Any:
        return self._library.MinHash(
            _PERMUTATIONS,
            hashfunc=xxhash.xxh32_intdigest,
            hashvalues=values,
            scheme="affine32",
        )


def _runs(text: str) -> Iterator[bytes]:
    words = text.split()
    for i in range(max(1, len(words) - _WORDS + 1)):
        yield " ".join(words[i : i + _WORDS]).encode("utf-8", "surrogatepass")
