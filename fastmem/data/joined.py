"""Two sets one after the other, such as text and canaries.

N sequences (`count`), S tokens a sequence (`length`), V vocabulary (`vocab`).
"""

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastmem.data.repetition import overlap
from fastmem.data.sequences import (
    Rows,
    Sequences,
    Tokens,
    check_fields,
    checked_set,
    from_description,
)


@dataclass(frozen=True)
class JoinedSequences(Sequences, kind="joined"):
    """The sequences of one set, then those of another.

    Args:
        first: any set without a prefix.
        second: another such set of the same length, with a vocabulary inside that of the first.

    Raises:
        ValueError: the sets do not fit, or share random sequences.

    Example:
        >>> from fastmem import UniformSequences
        >>> text = UniformSequences(count=6, length=4, vocab=16)
        >>> canaries = UniformSequences(count=2, length=4, vocab=16, seed=1)
        >>> planted = JoinedSequences(text, canaries)
        >>> planted.count, bool((planted[6:] == canaries[:]).all())
        (8, True)
        >>> planted.held_out(5) == JoinedSequences(text.held_out(3), canaries.held_out(2))
        True
    """

    first: Sequences
    second: Sequences
    count: int = field(init=False, repr=False)
    length: int = field(init=False, repr=False)
    vocab: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        first, second = self.first, self.second
        checked_set("first", first)
        checked_set("second", second)
        if first.length != second.length or max(first.context, second.context) > 1:
            raise ValueError(
                f"two sets that are joined must have one length and no prefix, got lengths "
                f"{first.length} and {second.length}, prefixes of {first.context} and "
                f"{second.context} tokens"
            )
        if second.vocab > first.vocab:
            raise ValueError(
                f"second has a vocabulary of {second.vocab}, and first of {first.vocab}: make it "
                "smaller"
            )
        if overlap(first, second):
            raise ValueError("two sets that are joined share sequences: give one another seed")
        self._set(count=first.count + second.count, length=first.length, vocab=first.vocab)

    def held_out(self, count: int) -> "JoinedSequences":
        """Held-out sequences of the first set, then as many of the second set as it has itself.

        Raises:
            ValueError: `count` leaves none for the first set; either set has too few.
        """
        second = self.second.count
        if count <= second:
            raise ValueError(
                f"count must be above the {second} sequences of the second set, got {count}"
            )
        return JoinedSequences(self.first.held_out(count - second), self.second.held_out(second))

    def description(self) -> dict[str, Any]:
        parts = {"first": self.first.description(), "second": self.second.description()}
        return {"kind": self.kind, "count": self.count, **parts}

    @classmethod
    def _described(cls, description: dict[str, Any]) -> Self:
        check_fields(cls.kind, description, ("count", "first", "second"))
        made = cls(*(from_description(description[name]) for name in ("first", "second")))
        if made.count != description["count"]:
            raise ValueError(
                f"a description of {description['count']} sequences has parts of {made.count}"
            )
        return made

    def _fill(self, out: Tokens, rows: Rows, threads: int) -> None:
        for part, where, places in self._parts(rows):
            if len(where):
                out[where] = part.tokens(places, out.dtype, threads)

    def _parts(self, rows: Rows) -> list[tuple[Sequences, NDArray[np.int64], NDArray[np.uint64]]]:
        """Of both sets: which of the rows are its sequences, and their indices in the set."""
        given = np.arange(rows.start, rows.stop) if isinstance(rows, range) else rows
        places = given.astype(np.uint64)
        border = np.uint64(self.first.count)
        late = places >= border
        return [
            (self.first, np.flatnonzero(~late), places[~late]),
            (self.second, np.flatnonzero(late), places[late] - border),
        ]

    def _copies(self, rows: Rows) -> NDArray[np.int64]:
        out = np.empty(len(rows), np.int64)
        for part, where, places in self._parts(rows):
            out[where] = part._copies(places)
        return out

    def _repeats(self) -> bool:
        return self.first._repeats() or self.second._repeats()

    def _entropy_from(self, position: int) -> float:
        return self.first._entropy_from(position) + self.second._entropy_from(position)

    def _streams(self) -> list[tuple[int, int, int]]:
        return [*self.first._streams(), *self.second._streams()]
