"""Documents scored in chunks: parts that are finished one after another, from any place on.

B windows of a batch, T tokens of a window.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmem.base.ranks import active, gathered, rank_and_size
from fastmem.models.causal.lm import CausalLM
from fastmem.models.scoring.document_tokenizer import TokenizedDocument
from fastmem.models.scoring.windows import Window, checked_windows, scored_windows, windows_of

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
    "lossy",
)
_CHECKED_TOKENS = 1 << 20
DOCUMENT_TOKENS = 16
"""What an empty document adds to the size of a chunk."""


@dataclass(frozen=True)
class Cursor:
    """Where a chunk begins or ends."""

    document: int = 0
    window: int = 0
    """Windows of `document` already scored."""
    bits: float = 0.0
    """Bits of the windows already scored."""
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
    also: tuple[str, ...]


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
class _Cut:
    """The windows of a chunk."""

    begin: Cursor
    pieces: list[_Piece] = field(default_factory=list)
    size: int = 0
    end: Cursor = field(default_factory=Cursor)

    @property
    def coded(self) -> int:
        """The tokens that have bits."""
        return sum(piece.span.stop - piece.span.start for piece in self.pieces)


class _Edge(NamedTuple):
    """The last document of a chunk: its bits in the chunk."""

    last: float
    single: bool
    """True if the chunk has no other document."""
    ends: bool
    """True if the document ends with the chunk."""


def scored_chunks(
    lm: CausalLM,
    documents: Iterable[TokenizedDocument],
    settings: Settings,
    begin: Cursor,
    progress: Callable[[int, float, int], object],
) -> Iterator[tuple[int, Chunk | None]]:
    """Scores documents in chunks of about `chunk_tokens` tokens that the model reads.

    A long document takes several chunks. Chunks end at the same places wherever scoring begins, and
    on any number of ranks. Of `size` ranks each rank scores every `size`-th chunk.

    Args:
        documents: from number `begin.document` on.
        begin: the `end` of an earlier chunk.
        progress: called after each batch with the tokens that it scored, here and, as an estimate,
            on other ranks; the fraction of the data that is scored; the documents before the chunk.

    Yields:
        The number of the chunk from `begin` on, and the chunk of this rank; None in the last round
        for a rank that has none.

    Raises:
        ValueError: a token outside the vocabulary, or bits that are not finite; names the document.
    """
    checked_windows(settings.context, settings.stride)
    rank, size = rank_and_size()
    cut, number, bits = _cut(lm, documents, settings, begin), rank, begin.bits
    while True:
        own, coded, end = None, 0, None
        for index, chunk in enumerate(islice(cut, size)):
            own, coded, end = chunk if index == rank else own, coded + chunk.coded, chunk.end
        if end is None:
            return
        edge: _Edge | None = None
        if own is not None:
            shown = _of_all(progress, own.coded, coded, begin, end)
            columns, sums = _scored(lm, own, settings, shown)
            edge = _Edge(sums[-1], len(sums) == 1, own.pieces[-1].ends)
        lm.wait()
        edges, reasons = zip(*gathered((edge, lm.reason)), strict=True)
        lm.follow(reasons)
        carried = _carried(edges, bits)
        if own is None:
            yield number, None
        else:
            sums[0] += carried[rank]
            end_of_own = replace(own.end, bits=carried[rank + 1])
            yield number, Chunk(columns, _document_columns(own.pieces, sums), end_of_own)
        number, begin, bits = number + size, end, carried[-1]


def _carried(edges: Iterable[_Edge | None], bits: float) -> list[float]:
    """The bits of the document that is unfinished before each chunk, and after the last one."""
    carried = [bits]
    for edge in edges:
        if edge is None:
            carried.append(carried[-1])
        elif edge.ends:
            carried.append(0.0)
        else:
            carried.append(edge.last + carried[-1] if edge.single else edge.last)
    return carried


def _of_all(
    progress: Callable[[int, float, int], object], own: int, coded: int, begin: Cursor, end: Cursor
) -> Callable[[int], None]:
    """Progress of all ranks, of which one scores `own` of `coded` tokens, by this one's batches."""
    done = 0

    def show(tokens: int) -> None:
        nonlocal done
        if job := active():
            job.heed()
        before, done = done, done + tokens
        all_tokens = coded * done // own - coded * before // own
        progress(all_tokens, begin.read + (end.read - begin.read) * done / own, begin.document)

    return show


def _cut(
    lm: CausalLM, documents: Iterable[TokenizedDocument], settings: Settings, begin: Cursor
) -> Iterator[_Cut]:
    """The windows of all chunks; where chunks end depends on no bits."""
    chunk = _Cut(begin)
    cursor = begin
    for number, document in enumerate(documents, begin.document):
        check_vocab(lm, document)
        length = len(document.tokens)
        done = cursor.window if number == cursor.document else 0
        windows = islice(windows_of(number, length, settings.context, settings.stride), done, None)
        before = cursor.read
        while True:
            room, taken = settings.chunk_tokens - chunk.size, []
            while room > 0 and (window := next(windows, None)):
                taken.append(window)
                room -= window.inputs
            ends = length < 2 or taken[-1].end == length
            chunk.pieces.append(_Piece(number, document, taken, ends))
            chunk.size = settings.chunk_tokens - room + DOCUMENT_TOKENS
            if ends:
                cursor = Cursor(number + 1, read=document.read)
            else:
                done += len(taken)
                read = before + (document.read - before) * taken[-1].end / length
                cursor = Cursor(number, done, read=read)
            chunk.end = cursor
            if chunk.size >= settings.chunk_tokens:
                yield chunk
                chunk = _Cut(cursor)
            if ends:
                break
    if chunk.pieces:
        yield chunk


def _scored(
    lm: CausalLM, chunk: _Cut, settings: Settings, progress: Callable[[int], object]
) -> tuple[Columns, list[float]]:
    """The columns of the tokens of a chunk, and the bits of each of its pieces."""
    found = _statistics(lm, chunk.pieces, settings, progress)
    rows: dict[str, list[NDArray[Any]]] = {name: [] for name in ("document", "position", "token")}
    sums = []
    done = 0
    for piece in chunk.pieces:
        span, document = piece.span, piece.document
        places = np.arange(span.start, span.stop)
        bits = found["bits"][done : done + len(places)]
        done += len(places)
        _check_finite(bits, piece)
        rows["document"].append(np.full(len(places), piece.number))
        rows["position"].append(places - document.added)
        rows["token"].append(document.tokens[span])
        sums.append(float(bits.sum(dtype=np.float64)))
    columns: Columns = {
        name: np.concatenate(parts).astype(TOKEN_TYPES[name]) for name, parts in rows.items()
    }
    return columns | found, sums


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
            None if document.lossy is None else int(document.lossy),
        )
        for name, value in zip(DOCUMENT_COLUMNS, row, strict=True):
            columns[name].append(value)
    return columns


def _statistics(
    lm: CausalLM, pieces: Sequence[_Piece], settings: Settings, progress: Callable[[int], object]
) -> dict[str, NDArray[Any]]:
    """The statistics of all tokens, the pieces end to end, by their columns."""
    spans = [piece.span for piece in pieces]
    ends = np.cumsum([span.stop - span.start for span in spans])
    # Where token 0 of each piece's document would be.
    zeros = (ends - [span.stop for span in spans]).tolist()
    dtype = str(lm.dtype).removeprefix("torch.")
    found: dict[str, NDArray[Any]] = {
        name: np.zeros(ends[-1], bool if name == "is_greedy" else dtype)
        for name in ("bits", *(STATISTICS[word] for word in settings.also))
    }
    cut = [
        replace(window, document=index)
        for index, piece in enumerate(pieces)
        for window in piece.windows
    ]
    documents = [piece.document.tokens for piece in pieces]
    asked = dict.fromkeys(settings.also, True)
    for batch, arrays in scored_windows(lm, documents, cut, settings.batch_tokens, **asked):
        places = [
            slice(zeros[window.document] + window.first, zeros[window.document] + window.end)
            for window in batch
        ]
        for name, parts in arrays.items():
            for place, part in zip(places, parts, strict=True):
                found[name][place] = part
        progress(sum(window.end - window.first for window in batch))
    return found


def check_vocab(lm: CausalLM, document: TokenizedDocument) -> None:
    """ValueError for a token that the model cannot read, or that its logits lack."""
    tokens = document.tokens
    limit = min(lm.embeddings, lm.vocab) if len(tokens) > 1 else lm.embeddings
    if not len(tokens) or (tokens.min() >= 0 and tokens.max() < limit):
        return
    for begin in range(0, len(tokens), _CHECKED_TOKENS):
        part = tokens[begin : begin + _CHECKED_TOKENS]
        limits = np.full(len(part), limit)
        if not begin:
            limits[0] = lm.embeddings  # the first token is read, and not predicted
        wrong = (part < 0) | (part >= limits)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise ValueError(
                f"{document.source}: token {int(part[place])} at position "
                f"{begin + place - document.added} is outside the model's vocabulary of "
                f"{int(limits[place])}: the tokenizer, or the tokens, belong to another model"
            )


def _check_finite(bits: NDArray[Any], piece: _Piece) -> None:
    if not np.isfinite(bits).all():
        place = piece.span.start + int(np.argmin(np.isfinite(bits))) - piece.document.added
        raise ValueError(
            f"{piece.document.source}: the bits of the token at position {place} are not finite: "
            "the weights are not, or their precision is too low; try dtype float32"
        )
