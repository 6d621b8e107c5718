"""The most and least surprising passages of scored documents, and the distribution of bits."""

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmem.base.storage import Row

LENGTH = 48
"""Tokens of a passage."""
KEPT = 8
"""Passages that are kept at each end."""
BIN_BITS, BINS = 0.25, 120
"""Width and number of the bins of bits a token; the last bin holds all that is above."""


class Passages:
    """Finds passages while tokens pass by, in the order of documents and positions.

    A passage is `LENGTH` tokens of a document: its tokens from 0, from `LENGTH` and so on. The rest
    of a document is one if it is at least half as long, or all of the document. Of passages with
    the same tokens the first counts. Memory does not grow with the data.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        """Tokens by their bits."""
        self._rest: tuple[NDArray[Any], ...] = ()
        self._most: list[tuple[float, int, Row]] = []
        self._least: list[tuple[float, int, Row]] = []
        self._order = count(0, -1)  # of equal means the first is kept

    def add(self, *columns: NDArray[Any]) -> None:
        """The next documents, positions, tokens and bits, (n,) each."""
        bits = columns[3]
        bins = np.clip(bits / BIN_BITS, 0, BINS - 1).astype(np.int64)
        self.counts += np.bincount(bins, minlength=BINS)
        if self._rest:
            columns = tuple(map(np.concatenate, zip(self._rest, columns, strict=True)))
        begins = self._begins(*columns[:2])
        self._judge(begins, *columns)
        last = int(begins[-1]) if len(begins) else 0
        self._rest = tuple(column[last:] for column in columns)

    @staticmethod
    def _begins(documents: NDArray[Any], positions: NDArray[Any]) -> NDArray[np.int64]:
        """Where passages begin, also those that are too short."""
        parts = positions // LENGTH
        changes = (np.diff(documents) != 0) | (np.diff(parts) != 0)
        return np.flatnonzero(np.concatenate([[len(documents) > 0], changes]))

    def _judge(
        self,
        begins: NDArray[np.int64],
        documents: NDArray[Any],
        positions: NDArray[Any],
        tokens: NDArray[Any],
        bits: NDArray[Any],
    ) -> None:
        """Keeps the best of the passages that are whole: all but the last, which may go on."""
        if len(begins) < 2:
            return
        sizes = np.diff(begins)
        means = np.add.reduceat(bits.astype(np.float64), begins)[:-1] / sizes
        alone = positions[begins[:-1]] < LENGTH
        alone &= documents[begins[:-1]] != documents[begins[1:]]
        fits = np.flatnonzero((sizes >= LENGTH // 2) | alone)
        for kept, sign in ((self._most, 1.0), (self._least, -1.0)):
            order = fits[np.argsort(-sign * means[fits], kind="stable")]
            # Same passages are left out below, so more than KEPT are looked at.
            for place in order:
                if len(kept) == KEPT and sign * means[place] <= kept[0][0]:
                    break
                span = slice(int(begins[place]), int(begins[place] + sizes[place]))
                self._keep(kept, sign * float(means[place]), {
                    "document": int(documents[span][0]),
                    "position": int(positions[span][0]),
                    "tokens": tokens[span].tolist(),
                    "bits": [round(float(value), 3) for value in bits[span]],
                })  # fmt: skip

    def _keep(self, kept: list[tuple[float, int, Row]], score: float, passage: Row) -> None:
        if any(other["tokens"] == passage["tokens"] for _, _, other in kept):
            return
        heapq.heappush(kept, (score, next(self._order), passage))
        if len(kept) > KEPT:
            heapq.heappop(kept)

    def finish(self) -> None:
        """The passage at the end of the data is whole."""
        if self._rest and len(self._rest[0]):
            documents, positions, tokens, bits = self._rest
            after = (np.append(documents, -1), np.append(positions, 0), np.append(tokens, 0))
            self._judge(np.asarray([0, len(tokens)]), *after, np.append(bits, 0))
        self._rest = ()

    def name(self, documents: NDArray[Any], sources: Any) -> None:
        """Gives the passages of these documents, (n,) in rising order, their sources."""
        for _, _, passage in (*self._most, *self._least):
            place = int(np.searchsorted(documents, passage["document"]))
            if place < len(documents) and documents[place] == passage["document"]:
                passage["source"] = str(sources[place])

    def to_json(self, decode: Callable[[list[int]], str] | None) -> Row:
        """Passages, the most and the least surprising first, and the counts of tokens by bits.

        A passage of little data that is at both ends is among the most surprising ones.

        Args:
            decode: the text of tokens; None if there is no tokenizer, and then no text.
        """
        found: Row = {"bin_bits": BIN_BITS, "token_counts": self.counts.tolist()}
        shown: list[Row] = []
        for name, kept in (("most", self._most), ("least", self._least)):
            ordered = [passage for _, _, passage in sorted(kept, reverse=True)]
            ordered = [passage for passage in ordered if passage not in shown]
            shown += ordered
            texts = [pieces(passage["tokens"], decode) if decode else None for passage in ordered]
            found[name] = [
                passage | {"texts": text} for passage, text in zip(ordered, texts, strict=True)
            ]
        return found


def pieces(tokens: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text that each token adds; a character of several tokens comes with the last of them.

    >>> pieces([104, 195, 169], lambda tokens: bytes(tokens).decode("utf-8", "replace"))
    ['h', '', 'é']
    """
    found, before = [], ""
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[:end])
        whole = text.rstrip("\ufffd") if end < len(tokens) else text
        whole = whole if whole.startswith(before) else text
        found.append(whole[len(before) :])
        before = whole
    return found
