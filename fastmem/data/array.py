"""Tokens in memory as a data set: NumPy arrays, tensors, lists, and columns of other libraries.

N sequences, S tokens a sequence, V vocabulary.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from fastmem.base.arguments import integer
from fastmem.data.sequences import Rows, Sequences, Tokens

_MAX_VOCAB = 2**31


class ArraySequences(Sequences, kind="memory"):
    """Sequences in memory, made by `from_array`. The entropy is unknown: nan."""

    def __init__(self, tokens: Tokens, vocab: int) -> None:
        self.count, self.length = tokens.shape
        self.vocab = vocab
        self._tokens = tokens.astype(self._token_dtype(None), order="C")  # a copy
        self._xxh3 = xxhash.xxh3_64_hexdigest(self._tokens.data)

    def __repr__(self) -> str:
        return f"ArraySequences(count={self.count}, length={self.length}, vocab={self.vocab})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArraySequences) and self.description() == other.description()

    def __hash__(self) -> int:
        return hash(self._xxh3)

    def description(self) -> dict[str, Any]:
        """Shape and hash; only `from_array` makes the set again."""
        shape = {"count": self.count, "length": self.length, "vocab": self.vocab}
        return {"kind": self.kind, **shape, "xxh3": self._xxh3}

    @classmethod
    def _described(cls, description: dict[str, Any]) -> Sequences:
        raise ValueError(
            f"tokens in memory have only a hash, {description.get('xxh3')}, as their description: "
            "give them again with fastmem.from_array, or write them with fastmem.write and open "
            "the file"
        )

    def _fill(self, out: Tokens, rows: Rows, threads: int) -> None:
        places = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        np.copyto(out, self._tokens[places], casting="unsafe")


def from_array(tokens: Any, vocab: int | None = None) -> Sequences:
    """Tokens in memory as a data set, of unknown entropy.

    `train`, `sequence_bits`, `write` and `SequenceStream` also take the tokens themselves.

    Args:
        tokens: (N, S) integers: an array, a tensor on any device, a list of lists, a column of
            datasets, pandas or pyarrow. They are copied.
        vocab: V; None: the largest token plus 1.

    Raises:
        ValueError: rows of different lengths, no rows, not integers, or a token outside V; names
            the sequence.

    >>> sequences = from_array([[3, 1, 4, 1], [5, 9, 2, 6]])
    >>> sequences, sequences[1], sequences.entropy_bits
    (ArraySequences(count=2, length=4, vocab=10), array([5, 9, 2, 6], dtype=uint16), nan)
    """
    if isinstance(tokens, Sequences):
        raise ValueError(f"{type(tokens).__name__} is a data set already: use it as it is")
    limit = _MAX_VOCAB if vocab is None else integer("vocab", vocab, 1, _MAX_VOCAB)
    try:
        array = _stacked(tokens)
        what = f"{array.dtype} of shape {array.shape}"
        is_set = array.dtype.kind in "iu" and array.ndim == 2 and array.size
    except (TypeError, RuntimeError) as error:  # of NumPy and torch: not an array
        what, is_set = f"{reprlib.repr(tokens)} ({error})", False
    if not is_set:
        raise ValueError(
            f"tokens must be integers of shape (sequences, tokens), got {what}; use for example "
            "tokens.astype(np.int64), tokens.reshape(-1, length), dataset['input_ids'], or "
            "TokenFile.open(path) for a file"
        )
    if array.min() < 0 or array.max() >= limit:
        row, position = (int(i) for i in np.argwhere((array < 0) | (array >= limit))[0])
        raise ValueError(
            f"token {array[row, position]} of sequence {row}, position {position}, is outside 0 to "
            f"{limit - 1}; give a larger vocab, or tokens without padding"
        )
    return ArraySequences(array, int(array.max()) + 1 if vocab is None else limit)


def as_sequences(rule: str, value: Any) -> Sequences:
    """`value` if it is a data set, else `from_array(value)`.

    Raises:
        ValueError: begins with `rule`, such as "sequences must be a set of sequences".
    """
    if isinstance(value, Sequences):
        return value
    try:
        return from_array(value)
    except ValueError as error:
        what = f"{reprlib.repr(value)} ({type(value).__name__})"
        raise ValueError(f"{rule}, not {what}, or tokens in memory: {error}") from None


def _stacked(tokens: Any) -> NDArray[Any]:
    """The tokens as one array; ValueError if rows have different lengths."""
    if isinstance(tokens, Tensor):
        tokens = tokens.detach().cpu()
    if isinstance(tokens, (str, bytes, Mapping, np.ma.MaskedArray)):
        raise TypeError("not rows of tokens")
    if hasattr(tokens, "__array__"):
        array: NDArray[Any] = np.asarray(tokens)
        if array.dtype != object:
            return array
        tokens = array
    rows = [np.asarray(row) for row in tokens]
    for i, row in enumerate(rows):
        if row.shape != rows[0].shape:
            raise ValueError(
                f"sequence {i} has shape {row.shape}, and sequence 0 {rows[0].shape}: cut or pack "
                "them to one length"
            )
    return np.stack(rows) if rows else np.empty((0, 0), np.int64)
