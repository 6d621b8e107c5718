"""The C++ core (csrc/): checked once here, run without the GIL, written into the caller's arrays.

Arrays are C-contiguous, aligned, writeable where written, in native byte order, and exactly of the
dtype that is stated; they are never copied or converted. `threads` (at least 1) is the most that
are used; results never depend on it. An array or a value that is off raises ValueError before
anything is written; an argument that is no array, or no integer of its width, raises TypeError.

N sequences, S tokens a sequence, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10: four 32-bit words from a counter of four and a key of two."""

def fill_range(
    out: NDArray[np.integer[Any]],  # (N, S) uint16 (V at most 65536), uint32, int32 or int64
    *,
    seed: int,  # 64 bits
    vocab: int,  # V, 1 to 2**31
    begin: int,  # begin + N at most 2**64
    threads: int,
) -> None:
    """Writes the tokens of sequences begin, ..., begin + N - 1."""

def fill_indices(
    out: NDArray[np.integer[Any]],  # (N, S), as above
    indices: NDArray[np.uint64],  # (N,), apart from out in memory
    *,
    seed: int,
    vocab: int,
    threads: int,
) -> None:
    """Writes the tokens of the sequences in `indices`, in that order."""

def permutation(
    out: NDArray[np.uint64],  # (n,)
    *,
    seed: int,  # 64 bits
    epoch: int,  # 64 bits
    last: int,  # the count less one, so that a count of 2**64 fits in 64 bits
    begin: int,  # begin + n at most last + 1
    threads: int,
) -> None:
    """Writes places begin, ..., begin + n - 1 of the random order of 0, ..., last."""
