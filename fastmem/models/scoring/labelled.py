"""Members and non-members of a training set as one data set, which is scored in one pass."""

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from fastmem.data.content import Content
from fastmem.data.documents import Documents, open_documents
from fastmem.memorization.roc import MIN_SEQUENCES

SIDES = ("members", "non-members")
_NAMED = 3


@dataclass(frozen=True)
class Labelled:
    """Documents of members, then of non-members."""

    documents: Documents
    names: tuple[str, str]
    """The data of members and of non-members as the caller named them."""
    counts: tuple[int, int]
    overlap: int
    """Non-members that are members too."""

    @property
    def labels(self) -> NDArray[np.bool_]:  # (N,)
        """True for members."""
        return np.arange(sum(self.counts)) < self.counts[0]


def labelled_documents(
    members: Any, non_members: Any, *, allow_overlap: bool = False, **options: Any
) -> Labelled:
    """The documents of members and of non-members as one data set; reads each document once.

    Args:
        members, non_members: as `fastmem.data.documents.open_documents` takes them.
        allow_overlap: True keeps documents that are on both sides.
        options: of `open_documents`.

    Raises:
        ValueError: fewer than 20 documents on a side, documents on both sides, or as
            `open_documents`.

    Example:
        >>> found = labelled_documents([f"old {i}" for i in range(20)], ["new"] * 21)
        >>> found.counts, next(iter(found.documents)).source
        ((20, 21), 'members:0')
    """
    sides = [open_documents(data, **options) for data in (members, non_members)]
    found = [_with_side(documents, side) for documents, side in zip(sides, SIDES, strict=True)]
    members_read = [(_digest(one.content), one.source) for one in found[0]]
    places, counts, shared = dict(members_read), [len(members_read), 0], []
    for one in found[1]:
        counts[1] += 1
        if (there := places.get(_digest(one.content))) is not None:
            shared.append(f"{one.source} is {there}")
    if min(counts) < MIN_SEQUENCES:
        raise ValueError(
            f"{counts[0]} members and {counts[1]} non-members: give at least {MIN_SEQUENCES} of "
            "each (a .txt file is one document, a line of .jsonl another)"
        )
    if shared and not allow_overlap:
        more = f" and {len(shared) - _NAMED:,} more" if len(shared) > _NAMED else ""
        raise ValueError(
            f"{len(shared):,} of {counts[1]:,} non-members are members too "
            f"({', '.join(shared[:_NAMED])}{more}): leave them out, or give --allow-overlap"
        )
    both = Documents(
        f"{sides[0].name} and {sides[1].name}",
        found[0].parts + found[1].parts,
        xxhash.xxh3_64_hexdigest(json.dumps([one.identity for one in sides]).encode()),
        sides[0].skipped + sides[1].skipped,
    )
    return Labelled(both, (sides[0].name, sides[1].name), (counts[0], counts[1]), len(shared))


def contents_of(labelled: Labelled, numbers: Collection[int]) -> dict[int, str]:
    """The text of the documents with these numbers; tokens as decimal numbers, messages as JSON."""
    wanted = set(numbers)
    return {n: _text(one.content) for n, one in enumerate(labelled.documents) if n in wanted}


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    return " ".join(map(str, content)) if isinstance(content, np.ndarray) else json.dumps(content)


def _with_side(documents: Documents, side: str) -> Documents:
    """The documents with a source that begins with the side."""
    return replace(
        documents,
        parts=tuple(
            part._replace(name=f"{side}/{part.name}" if part.name else side)
            for part in documents.parts
        ),
    )


def _digest(content: Content) -> bytes:
    if isinstance(content, np.ndarray):
        return xxhash.xxh3_128_digest(content.astype("<i8").tobytes())
    return xxhash.xxh3_128_digest(json.dumps(content).encode())
