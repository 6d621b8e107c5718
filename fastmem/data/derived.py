"""The base of sets that are made of another set, whose properties they have by default.

N sequences (`count`), S tokens a sequence (`length`), V vocabulary (`vocab`).
"""

from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastmem.data.sequences import (
    GENERATOR,
    Rows,
    Sequences,
    checked_set,
    from_description,
    generated,
)


@dataclass(frozen=True)
class DerivedSequences(Sequences):
    """A set made of `base`; its description lists the arguments of its constructor."""

    base: Sequences
    count: int = field(init=False, repr=False)
    length: int = field(init=False, repr=False)
    vocab: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        checked_set("base", self.base)
        self._set(count=self.base.count, length=self.base.length, vocab=self.base.vocab)

    @property
    def context(self) -> int:
        """Tokens at the start of each sequence of the base that are not coded."""
        return self.base.context

    def held_out(self, count: int) -> Sequences:
        """Held-out sequences of the base."""
        return self.base.held_out(count)

    def description(self) -> dict[str, Any]:
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        for name, value in values.items():
            if isinstance(value, Sequences):
                values[name] = value.description()
        return {"kind": self.kind, "generator": GENERATOR, **values}

    @classmethod
    def _described(cls, description: dict[str, Any]) -> Self:
        arguments = [one for one in fields(cls) if one.init]
        values = generated(cls.kind, description, [one.name for one in arguments])
        for one in arguments:
            if one.type is Sequences:
                values[one.name] = from_description(values[one.name])
        return cls(**values)

    def _copies(self, rows: Rows) -> NDArray[np.int64]:
        return self.base._copies(rows)

    def _repeats(self) -> bool:
        return self.base._repeats()

    def _entropy_from(self, position: int) -> float:
        return self.base._entropy_from(position)

    def _alike(self, count: int, length: int, seed: int) -> Sequences:
        return self.base._alike(count, length, seed)

    def _streams(self) -> list[tuple[int, int, int]]:
        return self.base._streams()
