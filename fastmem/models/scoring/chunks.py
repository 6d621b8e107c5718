"""Documents scored in chunks: parts that are finished one after another, from any place on.

B windows of a batch, T tokens of a window.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmem.models.causal.lm import CausalLM
from fastmem.models.scoring.document_tokenizer import TokenizedDocument
from fastmem.models.scoring.windows import Window, batches, window_tensors, windows

Columns = dict[str, Any]
"""Arrays or lists of one length by the names of their columns."""

STATISTICS = {
    "entropy": "entropy_bits",
    "variance": "variance",
    "greedy": "is_greedy",
    "lse": "lse_bits",
}
"""Columns of tokens by the word that asks for them."""
TOKEN_TYPES = {
    "document": np.int64,
    "position": np.int64,
    "token": np.int32,
    "bits": np.float32,
    "entropy_bits": np.float32,
    "variance": np.float32,
    "is_greedy": np.bool_,
    "lse_bits": np.float32,
}
DOCUMENT_COLUMNS = (
    "document",
    "source",
    "tokens",
    "coded_tokens",
    "bytes",
    "bits",
    "bits_per_byte",
    "zlib_bits",
)
_DOCUMENT_TOKENS = 16
"""What an empty document adds to the size of a chunk."""


@dataclass(frozen=True)
class Cursor:
    """Where a chunk begins or ends."""

    document: int = 0
    window: int = 0
    """The windows of this document that are scored."""
    bits: float = 0.0
    """The bits of these windows."""
    read: float = 0.0
    """The fraction of the data that is scored."""


@dataclass(frozen=True)
class Chunk:
    """The scores of some windows, and of the documents that end with them."""

    tokens: Columns
    documents: Columns
    end: Cursor


@dataclass(frozen=True)
class Settings:
    """How tokens are scored."""

    batch_tokens: int
    chunk_tokens: int
    context: int | None
    stride: int | None
    also: tuple[str, ...] = ()


@dataclass
class _Piece:
    """Consecutive windows of one document."""

    number: int
    document: TokenizedDocument
    windows: list[Window]
    ends: bool

    @property
    def span(self) -> slice:
        """The tokens that have bits."""
        return slice(self.windows[0].first, self.windows[-1].end) if self.windows else slice(0, 0)


@dataclass
class _Open:
    """A chunk that is being filled."""

    begin: Cursor
    pieces: list[_Piece] = field(default_factory=list)
    size: int = 0


def scored_chunks(
    lm: CausalLM,
    documents: Iterable[TokenizedDocument],
    settings: Settings,
    begin: Cursor = Cursor(),
    progress: Callable[[int, float, int], object] = lambda *_: None,
) -> Iterator[Chunk]:
    """Scores documents in chunks of about `chunk_tokens` tokens that the model reads.

    A long document takes several chunks. Chunks end at the same places wherever scoring begins.

    Args:
        documents: from number `begin.document` on.
        begin: the `end` of an earlier chunk.
        progress: called after each batch with the tokens that it scored, the fraction of the data
            that is scored, and the documents before the chunk.

    Raises:
        ValueError: a token outside the vocabulary, or bits that are not finite; names the document.
    """
    chunk = _Open(begin)
    cursor = begin
    for number, document in enumerate(documents, begin.document):
        cut = windows([len(document.tokens)], settings.context, settings.stride)
        done = cursor.window if number == cursor.document else 0
        before = cursor.read
        while True:
            room = settings.chunk_tokens - chunk.size
            end = done
            while end < len(cut) and room > 0:
                room -= cut[end].inputs
                end += 1
            ends = end == len(cut)
            chunk.pieces.append(_Piece(number, document, cut[done:end], ends))
            chunk.size = settings.chunk_tokens - room + _DOCUMENT_TOKENS
            read = document.read if ends else before + (document.read - before) * end / len(cut)
            cursor = Cursor(number + 1 if ends else number, 0 if ends else end, 0.0, read)
            if chunk.size >= settings.chunk_tokens:
                yield (scored := _scored(lm, chunk, cursor, settings, progress))
                cursor = scored.end
                chunk = _Open(cursor)
            if ends:
                break
            done = end
    if chunk.pieces:
        yield _scored(lm, chunk, cursor, settings, progress)


def _scored(
    lm: CausalLM,
    chunk: _Open,
    end: Cursor,
    settings: Settings,
    progress: Callable[[int, float, int], object],
) -> Chunk:
    pieces = chunk.pieces
    found = _statistics(lm, chunk, end, settings, progress)
    rows: dict[str, list[NDArray[Any]]] = {name: [] for name in ("document", "position", "token")}
    sums = []
    for piece, bits in zip(pieces, found["bits"], strict=True):
        span, document = piece.span, piece.document
        places = np.arange(span.start, span.stop)
        rows["document"].append(np.full(len(places), piece.number))
        rows["position"].append(places - document.added)
        rows["token"].append(document.tokens[span])
        sums.append(float(bits.sum(dtype=np.float64)))
    sums[0] += chunk.begin.bits
    columns: Columns = {
        name: np.concatenate(parts).astype(TOKEN_TYPES[name])
        for name, parts in {**rows, **found}.items()
    }
    if not pieces[-1].ends:
        end = replace(end, bits=sums[-1])
    return Chunk(columns, _document_columns(pieces, sums), end)


def _document_columns(pieces: Sequence[_Piece], sums: Sequence[float]) -> Columns:
    """The columns of the documents that end in a chunk."""
    columns: Columns = {name: [] for name in DOCUMENT_COLUMNS}
    for piece, bits in zip(pieces, sums, strict=True):
        if not piece.ends:
            continue
        document = piece.document
        per_byte = None if document.bytes is None else bits / max(1, document.bytes)
        row = (
            piece.number,
            document.source,
            len(document.tokens) - document.added,
            document.coded,
            document.bytes,
            bits,
            per_byte,
            document.zlib_bits,
        )
        for name, value in zip(DOCUMENT_COLUMNS, row, strict=True):
            columns[name].append(value)
    return columns


def _statistics(
    lm: CausalLM,
    chunk: _Open,
    end: Cursor,
    settings: Settings,
    progress: Callable[[int, float, int], object],
) -> dict[str, list[NDArray[Any]]]:
    """The statistics of the tokens of each piece, by their columns."""
    pieces = chunk.pieces
    names = ["bits", *(STATISTICS[word] for word in settings.also)]
    spans = [piece.span for piece in pieces]
    found: dict[str, list[NDArray[Any]]] = {
        name: [np.zeros(span.stop - span.start, TOKEN_TYPES[name]) for span in spans]
        for name in names
    }
    cut = [
        replace(window, document=index)
        for index, piece in enumerate(pieces)
        for window in piece.windows
    ]
    for window in cut:
        _check_vocab(lm, pieces[window.document], window)
    total, done = sum(window.end - window.first for window in cut), 0
    asked: dict[str, Any] = {
        "is_greedy" if word == "greedy" else word: True for word in settings.also
    }
    documents = [piece.document.tokens for piece in pieces]
    for batch in batches(cut, settings.batch_tokens):
        stats = lm.token_stats(*window_tensors(documents, batch), **asked)
        arrays = {name: getattr(stats, name).cpu().numpy() for name in names}
        for row, window in enumerate(batch):
            scored = slice(window.first - 1 - window.begin, window.inputs)
            begin = spans[window.document].start
            for name, array in arrays.items():
                part = found[name][window.document]
                part[window.first - begin : window.end - begin] = array[row, scored]
        tokens = sum(window.end - window.first for window in batch)
        done += tokens
        read = chunk.begin.read + (end.read - chunk.begin.read) * done / total
        progress(tokens, read, chunk.begin.document)
    for bits, piece in zip(found["bits"], pieces, strict=True):
        _check_finite(bits, piece)
    return found


def _check_vocab(lm: CausalLM, piece: _Piece, window: Window) -> None:
    tokens = piece.document.tokens[window.begin : window.end]
    wrong = (tokens < 0) | (tokens >= lm.vocab)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise ValueError(
            f"{piece.document.source}: token {int(tokens[place])} at position "
            f"{window.begin + place - piece.document.added} is outside the model's vocabulary of "
            f"{lm.vocab}: the tokenizer, or the tokens, belong to another model"
        )


def _check_finite(bits: NDArray[Any], piece: _Piece) -> None:
    if not np.isfinite(bits).all():
        place = piece.span.start + int(np.argmin(np.isfinite(bits))) - piece.document.added
        raise ValueError(
            f"{piece.document.source}: the bits of the token at position {place} are not finite: "
            "the weights are not, or their precision is too low; try dtype float32"
        )
