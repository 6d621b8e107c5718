"""The base class of all data sets, whether their tokens are computed or read from files.

N sequences (`count`), S tokens a sequence (`length`), V vocabulary (`vocab`).
"""

import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from fastmem.base.arguments import array_length, checked_device, threads_or_all

GENERATOR = "philox4x32-10/1"
"""The rule for tokens and orders, and its version; every description of a random set has it."""

Indices = int | np.integer[Any] | slice | Sequence[int] | NDArray[np.integer[Any]]
Rows = range | NDArray[np.uint64]
"""Checked indices of a set: a range if they are consecutive, else an array."""
Tokens = NDArray[np.integer[Any]]

_DTYPES: dict[torch.dtype, type[np.integer[Any]]] = {
    torch.uint16: np.uint16,
    torch.uint32: np.uint32,
    torch.int32: np.int32,
    torch.int64: np.int64,
}


class Sequences(ABC):
    """N sequences of S tokens below V, indexed like a list, computed or read on access.

        sequences[3]                 (S,)    uint16, or uint32 if V > 65536
        sequences[-1]                (S,)    the last, as in a list
        sequences[0:8]               (8, S)  any slice, also with a step
        sequences[np.array([5, 2])]  (2, S)  any integer dtype, order or repetition, not negative

    A subclass has a `kind` and writes tokens (`_fill`). It can also have an entropy
    (`_entropy_from`), repeated sequences (`_copies`) and tokens made on a GPU (`_on_gpu`).
    """

    count: int
    length: int
    vocab: int
    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type["Sequences"]]] = {}

    def __init_subclass__(cls, kind: str | None = None) -> None:
        if kind is not None:
            cls.kind = kind
            Sequences._kinds[kind] = cls

    def __len__(self) -> int:
        """N; OverflowError above sys.maxsize, where only `count` works."""
        return self.count

    def __iter__(self) -> Iterator[Tokens]:
        """The sequences in order, (S,) each. Slices are much faster."""
        return (self[index] for index in range(self.count))

    def __getitem__(self, indices: Indices) -> Tokens:
        """The tokens of one sequence (S,) or several (n, S), as `tokens` with its defaults."""
        return self.tokens(indices)

    def tokens(
        self, indices: Indices, dtype: DTypeLike | None = None, threads: int | None = None
    ) -> Tokens:
        """`sequences[indices]`, made directly in the dtype that a model takes.

        Args:
            indices: an int, a slice, or a 1-D list or array of ints, relative to the set.
            dtype: uint16 (V at most 65536), uint32, int32 or int64; None: uint16 if V is at most
                65536, else uint32.
            threads: at most this many; None: one per core. Small work uses one thread. The tokens
                do not depend on the threads.

        Returns:
            (S,) for an int, else (n, S).

        Raises:
            IndexError: an index is outside the set, or in an array below 0.
            ValueError: indices are not ints or not 1-D; another dtype; threads below 1.

        >>> from fastmem import UniformSequences
        >>> UniformSequences(count=10, length=4, vocab=50257).tokens([9, 0], np.int64)
        array([[45713, 33019,  8311, 46069],
               [20054, 44252, 36974, 30429]])
        """
        token_dtype = self._token_dtype(dtype)
        limit = threads_or_all(threads)
        rows = self._rows(indices)
        out = np.empty((len(rows), self.length), token_dtype)
        if len(out):
            self._fill(out, rows, limit)
        return out[0] if _is_int(indices) else out

    def to_torch(
        self,
        device: str | torch.device = "cpu",
        indices: Indices = slice(None),
        dtype: torch.dtype = torch.int64,
    ) -> Tensor:
        """`tokens(indices)` as a tensor, made on the device.

        On a CPU the tensor is the NumPy array, without a copy. On a GPU
        `fastmem.kernels.sequences` makes random tokens in the tensor itself: only the indices are
        copied, 8 bytes a sequence if they are a list, asynchronously from pinned memory.

        Args:
            device: of the tensor.
            indices: as for `tokens`; the whole set by default.
            dtype: uint16 (V at most 65536), uint32, int32, or int64, which an embedding takes.

        Returns:
            (S,) for an int, else (n, S).

        Raises:
            IndexError, ValueError: as `tokens`; ValueError also if the device is unavailable.

        >>> from fastmem import UniformSequences
        >>> UniformSequences(count=10, length=4, vocab=50257).to_torch(indices=[9, 0])
        tensor([[45713, 33019,  8311, 46069],
                [20054, 44252, 36974, 30429]])
        """
        place = checked_device(device, meta=True)
        if dtype not in _DTYPES:
            raise ValueError(
                f"dtype must be torch.uint16, uint32, int32 or int64, got {dtype}; "
                "an embedding takes int64 or int32"
            )
        if place.type != "cuda":
            return torch.from_numpy(self.tokens(indices, _DTYPES[dtype])).to(place)
        self._token_dtype(_DTYPES[dtype])
        tokens = self._on_gpu(self._rows(indices), dtype, place)
        return tokens[0] if _is_int(indices) else tokens

    @property
    def entropy_bits(self) -> float:
        """The entropy of the set, where a repeated sequence counts once; nan if unknown."""
        return self._entropy_from(0)

    @property
    def coded_entropy_bits(self) -> float:
        """The entropy of the tokens that a model codes: all after the first `context`."""
        return self._entropy_from(self.context)

    @property
    def context(self) -> int:
        """Tokens at the start of each sequence that are not coded: 1, which has no context."""
        return 1

    def copies(self, indices: Indices = slice(None)) -> NDArray[np.int64]:
        """The number of copies of each of these sequences that the set has by construction.

        Memorized bits count a sequence once: coded entropy minus Σ bits / copies.

        Returns:
            (n,), or () for an int.

        Raises:
            IndexError, ValueError: as `tokens`.

        >>> from fastmem import UniformSequences
        >>> UniformSequences(count=10, length=4, vocab=16).copies([7, 7])
        array([1, 1])
        """
        copies = self._copies(self._rows(indices))
        return copies.reshape(()) if _is_int(indices) else copies

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """The JSON values from which `from_description` makes the same set."""

    def held_out(self, count: int) -> "Sequences":
        """`count` other sequences of the same kind that are not in this set.

        Raises:
            ValueError: fewer than `count` other sequences exist.
        """
        raise ValueError(
            f"{type(self).__name__} knows only its own sequences: hold out a part of the set, or "
            "give another set"
        )

    @classmethod
    @abstractmethod
    def _described(cls, description: dict[str, Any]) -> "Sequences":
        """The set of a description of this class's kind; the description comes without "kind"."""

    def _set(self, **values: object) -> None:
        """Sets attributes of a frozen set."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @abstractmethod
    def _fill(self, out: Tokens, rows: Rows, threads: int) -> None:
        """Writes one or more rows to out: (n, S), C-contiguous, of an allowed dtype."""

    def _on_gpu(self, rows: Rows, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The rows as a tensor (n, S) on the device."""
        out = np.empty((len(rows), self.length), _DTYPES[dtype])
        if len(rows):
            self._fill(out, rows, threads_or_all(None))
        return sent(out, device)

    def _copies(self, rows: Rows) -> NDArray[np.int64]:
        return np.ones(len(rows), np.int64)

    def _entropy_from(self, position: int) -> float:
        """The entropy of tokens position, …, S - 1 of all sequences, given earlier tokens."""
        return math.nan

    def _repeats(self) -> bool:
        """True if copies can be above 1."""
        return False

    def _alike(self, count: int, length: int, seed: int) -> "Sequences":
        """Another set with the same distribution of tokens."""
        raise ValueError(
            f"the tokens of {type(self).__name__} have no known distribution; use a random set"
        )

    def _streams(self) -> list[tuple[int, int, int]]:
        """(seed, begin, end) of each range of random sequences that the set uses."""
        return []

    def _files(self) -> list[Path]:
        """The files that the tokens are read from."""
        parts = [part for part in vars(self).values() if isinstance(part, Sequences)]
        return [path for part in parts for path in part._files()]

    def _token_dtype(self, dtype: DTypeLike | None) -> np.dtype[np.integer[Any]]:
        if dtype is None:
            dtype = np.uint16 if self.vocab <= 65536 else np.uint32
        given: np.dtype[Any] = np.dtype(dtype)
        if given not in [np.dtype(allowed) for allowed in _DTYPES.values()]:
            raise ValueError(f"dtype must be uint16, uint32, int32 or int64, got {dtype!r}")
        if given == np.uint16 and self.vocab > 65536:
            raise ValueError(
                f"dtype uint16 holds a vocab of at most 65536, got {self.vocab}; use uint32"
            )
        return given

    def _rows(self, indices: Indices) -> Rows:
        if isinstance(indices, slice):
            try:
                return _as_rows(range(*indices.indices(self.count)))
            except TypeError as error:
                raise ValueError(f"{indices}: {error}; use ints") from None
        if _is_int(indices):
            index = int(indices)  # type: ignore[arg-type]
            if not -self.count <= index < self.count:
                raise IndexError(
                    f"index {index} is outside this set of {self.count} sequences; "
                    f"use {-self.count} to {self.count - 1}"
                )
            index %= self.count
            return range(index, index + 1)
        if isinstance(indices, range):
            ends = sorted((indices[0], indices[-1])) if indices else [0, 0]
            if ends[0] < 0 or ends[1] >= self.count:
                raise IndexError(
                    f"indices {indices[0]} to {indices[-1]} are outside this set of {self.count} "
                    f"sequences; in a range, use 0 to {self.count - 1}"
                )
            return _as_rows(indices)
        array = np.asarray(indices)
        if isinstance(indices, Sequence) and array.dtype.kind not in "iu":
            ints = all(_is_int(i) and 0 <= i < 2**64 for i in indices)
            array = np.array(indices, np.uint64) if ints else array  # not float64: [], [2**63, 0]
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise ValueError(
                "indices must be an int, a slice, or a 1-D list or array of ints, got shape "
                f"{array.shape} of {array.dtype}; use np.flatnonzero(mask) for a mask, "
                "indices.ravel() for more dimensions, indices.astype(np.int64) for whole floats"
            )
        if array.size and not (array.min() >= 0 and array.max() < self.count):
            raise IndexError(
                f"indices {array.min()} to {array.max()} are outside this set of {self.count} "
                f"sequences; in an array, use 0 to {self.count - 1}"
            )
        return np.ascontiguousarray(array, np.uint64)


def from_description(description: dict[str, Any]) -> Sequences:
    """The set that `Sequences.description` describes.

    Raises:
        ValueError: the kind or the version of the generator is unknown; a field is missing,
            unknown or outside its limits.

    >>> from fastmem import UniformSequences
    >>> sequences = UniformSequences(count=4096, length=64, vocab=2048, seed=1)
    >>> from_description(sequences.description()) == sequences
    True
    """
    kind = description.get("kind") if isinstance(description, dict) else description
    if not isinstance(kind, str) or kind not in Sequences._kinds:
        raise ValueError(
            f"kind must be one of {', '.join(sorted(Sequences._kinds))}, got {kind!r}: "
            "this is not a description of this version of fastmem"
        )
    fields = {name: value for name, value in description.items() if name != "kind"}
    try:
        return Sequences._kinds[kind]._described(fields)
    except RecursionError:
        raise ValueError("a set is made of too many sets: this is not a description") from None


def check_fields(kind: str, description: dict[str, Any], names: Sequence[str]) -> None:
    """ValueError unless the description has exactly these fields beside its kind."""
    missing, unknown = set(names) - description.keys(), description.keys() - set(names)
    for wrong, how in ((missing, "lacks"), (unknown, "has an unknown")):
        if wrong:
            raise ValueError(
                f"a description of kind {kind} {how} {', '.join(sorted(wrong))}; its fields are "
                f"kind, {', '.join(names)}"
            )


def generated(kind: str, description: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The values of these fields; ValueError if another version of the generator wrote them."""
    check_fields(kind, description, ("generator", *names))
    if description["generator"] != GENERATOR:
        raise ValueError(
            f"generator must be {GENERATOR}, got {description['generator']!r}: another version of "
            "fastmem makes these tokens"
        )
    return {name: description[name] for name in names}


def checked_set(name: str, value: object) -> None:
    """ValueError unless `value` is a set of sequences."""
    if not isinstance(value, Sequences):
        raise ValueError(
            f"{name} must be a set of sequences, got {reprlib.repr(value)}; use for example "
            "UniformSequences(…) or from_array(tokens)"
        )


def sent(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on the device; the copy to a GPU is asynchronous."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _is_int(indices: object) -> bool:
    return isinstance(indices, (int, np.integer)) and not isinstance(indices, bool)


def _as_rows(places: range) -> Rows:
    n = array_length(places)
    if n == 0:
        return range(0)
    if n == 1 or places.step == 1:
        return range(places.start, places.start + n)
    # Modulo 2**64, where a step down is a large step up.
    steps = np.arange(n, dtype=np.uint64) * np.uint64(places.step % 2**64)
    return steps + np.uint64(places.start)
