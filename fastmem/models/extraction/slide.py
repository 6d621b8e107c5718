"""Windows all along documents: the longest verbatim run, and the bits of each place.

n windows of a document, P tokens of a prefix.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmem.base.stats import Floats
from fastmem.base.storage import Row
from fastmem.models.extraction.measure import Columns

LISTED = 20
"""Documents with the longest runs that extraction.json names."""
MAX_BINS = 400
"""Most places of a heat map."""
Indices = NDArray[np.int64]


def verbatim_run(starts: ArrayLike, prefix: int, matched: ArrayLike) -> tuple[int, int]:
    """The longest run of a document that comes out verbatim: its first token, and its tokens.

    Greedy decoding after the prefix of a window returns `matched` tokens. A later window goes on
    from there if its own suffix begins inside what is out already, since its prefix is then known
    text: the first prefix, or what came out. So a run is the union of suffixes that touch.

    Args:
        starts: (n,) first token of each window, rising.
        prefix: P.
        matched: (n,) tokens of each window before the first error.

    Returns:
        Place of the first token that comes out, and the number of tokens; (0, 0) if none does.

    Example:
        >>> verbatim_run([0, 10, 20, 30], prefix=5, matched=[10, 4, 0, 12])
        (5, 14)
    """
    begins = np.asarray(starts, np.int64) + prefix
    best, first, end = (0, 0), -1, -1
    for begin, count in zip(begins.tolist(), np.asarray(matched, np.int64).tolist(), strict=True):
        if not count:
            continue
        if begin > end:
            first = begin
        end = max(end, begin + count)
        if end - first > best[1]:
            best = first, end - first
    return best


def least_bits(starts: Indices, prefix: int, suffix: int, bits: Floats, size: int) -> Floats:
    """(size,) the fewest bits of a suffix that holds each token of a document; inf where none does.

    Computes, for the token at t, the least `bits[i]` with 0 <= t - starts[i] - prefix < suffix.

    Example:
        >>> least_bits(np.array([0, 2]), 1, 3, np.array([5.0, 4.0]), 7)
        array([inf,  5.,  5.,  4.,  4.,  4., inf])
    """
    found = np.full(size, np.inf)
    for place in range(suffix):  # a window adds one token to each of these
        at = starts + prefix + place
        found[at] = np.minimum(found[at], bits)
    return found


def slide_of(columns: Columns, prefix: int, suffix: int, stride: int) -> Row:
    """`slide` of extraction.json: the longest verbatim runs, at the longest prefix."""
    runs: list[Row] = []
    for name, document, rows in by_document(columns):
        start, tokens = verbatim_run(
            columns["start"][rows], prefix, columns[f"matched_{prefix}"][rows]
        )
        source = str(columns["source"][rows[0]])
        of = {"set": name, "document": document, "source": source, "windows": len(rows)}
        runs.append({**of, "start": start, "tokens": tokens})
    runs.sort(key=lambda run: -run["tokens"])
    return {"prefix": prefix, "suffix": suffix, "stride": stride, "longest_runs": runs[:LISTED]}


def by_document(columns: Columns) -> list[tuple[str, int, Indices]]:
    """Set, document and rows of the windows of each document, in their order."""
    changes = np.flatnonzero(
        (columns["set"][1:] != columns["set"][:-1]) | (np.diff(columns["document"]) != 0)
    )
    parts: list[Any] = np.split(np.arange(len(columns["set"])), changes + 1)
    return [
        (str(columns["set"][rows[0]]), int(columns["document"][rows[0]]), rows)
        for rows in parts
        if len(rows)
    ]


def heat(bits: Floats) -> Row:
    """The fewest bits in up to MAX_BINS equal parts of a document; None where no suffix reaches."""
    size = max(1, -(-len(bits) // MAX_BINS))
    padded = np.pad(bits, (0, -len(bits) % size), constant_values=np.inf)
    least = padded.reshape(-1, size).min(1)
    return {"tokens_each": size, "bits": in_json(least)}


def in_json(bits: Floats) -> list[float | None]:
    """Bits to three digits; None for inf."""
    return [round(value, 3) if np.isfinite(value) else None for value in bits.tolist()]
