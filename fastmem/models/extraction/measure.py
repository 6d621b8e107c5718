"""Measures how much of sequences a model returns, a chunk at a time.

n sequences of a chunk, T coded tokens of a sequence, P tokens of a prefix.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastmem.memorization.extraction import (
    edit_distance,
    greedy_from,
    longest_match,
    suffix_bits,
)
from fastmem.models.causal.lm import CausalLM
from fastmem.models.causal.sampling import Way, sampling_bits
from fastmem.models.causal.through_logits import IGNORED
from fastmem.models.extraction.decode import greedy_tokens
from fastmem.models.scoring.chunks import DOCUMENT_TOKENS, check_vocab
from fastmem.models.scoring.document_tokenizer import TokenizedDocument
from fastmem.models.scoring.windows import batches, window_tensors, windows

Columns = dict[str, Any]
"""Arrays or lists of one length by the names of their columns; NaN is unknown."""
PLAIN = Way(1.0)


@dataclass(frozen=True)
class Plan:
    """The settings of a measurement."""

    prefixes: tuple[int, ...]
    suffix: int | None
    """Tokens after the longest prefix; None: all."""
    ways: tuple[Way, ...]
    decode: bool
    stride: int | None
    """Tokens between the windows of a document; None: each document is one sequence."""
    batch_tokens: int
    chunk_tokens: int

    @property
    def longest(self) -> int | None:
        """The most tokens of a sequence."""
        return None if self.suffix is None else max(self.prefixes) + self.suffix


class Excerpt(NamedTuple):
    """Tokens of which a suffix may come out: a document, or a window of it."""

    document: int
    start: int
    """Place of the first token in the document."""
    source: str
    tokens: NDArray[np.integer[Any]]
    """What the model reads: a BOS if one is added, then the prefix and the suffix."""
    added: int


class Cursor(NamedTuple):
    """Where a chunk begins or ends."""

    document: int = 0
    window: int = 0
    """Sequences of `document` already measured."""
    read: float = 0.0
    """The fraction of the data that is measured."""


def sequences_of(
    lm: CausalLM, number: int, document: TokenizedDocument, plan: Plan
) -> Iterator[Excerpt]:
    """The sequences of one document; ValueError if the model cannot read one at once."""
    check_vocab(lm, document)
    added, tokens = document.added, document.tokens
    size = len(tokens) - added if plan.longest is None else plan.longest
    if lm.positions is not None and min(size + added, len(tokens)) - 1 > lm.positions:
        raise ValueError(
            f"{document.source} has {size:,} tokens, and the model reads {lm.positions:,} at once: "
            f"give --suffix N with the longest prefix + N up to {lm.positions + 1 - added:,}"
        )
    last = 0 if plan.stride is None else len(tokens) - added - size
    for start in range(0, last + 1, plan.stride or 1):
        own = tokens[added + start : added + start + size]
        whole = np.concatenate([tokens[:added], own]) if start else tokens[: added + size]
        yield Excerpt(number, start, document.source, whole, added)


def measured_chunks(
    lm: CausalLM,
    documents: Iterable[TokenizedDocument],
    plan: Plan,
    begin: Cursor,
    progress: Callable[[int, float, int], object],
) -> Iterator[tuple[Columns, Cursor]]:
    """Measures sequences in chunks of about `plan.chunk_tokens` tokens.

    Args:
        documents: from number `begin.document` on.
        begin: the end of an earlier chunk.
        progress: called after each batch with its tokens, the fraction of the data that is
            measured, and the documents before the chunk.

    Yields:
        The columns of a chunk, and where it ends. Chunks end at the same places wherever they
        begin.

    Raises:
        ValueError: a sequence that the model cannot read at once, a token outside the vocabulary,
            or bits that are not finite; names the document.
    """
    chunk: list[Excerpt] = []
    size, first, cursor = 0, begin, begin
    for number, document in enumerate(documents, begin.document):
        done = begin.window if number == begin.document else 0
        before, own = cursor.read, len(document.tokens)
        for one in islice(sequences_of(lm, number, document, plan), done, None):
            chunk.append(one)
            size += len(one.tokens) + DOCUMENT_TOKENS
            done += 1
            read = before + (document.read - before) * min(1.0, (one.start + 1) / max(1, own))
            cursor = Cursor(number, done, read)
            if size >= plan.chunk_tokens:
                yield _measured(lm, chunk, plan, first, cursor, progress), cursor
                chunk, size, first = [], 0, cursor
        cursor = Cursor(number + 1, 0, document.read)
    if chunk or cursor != first:
        yield _measured(lm, chunk, plan, first, cursor, progress), cursor


def _measured(
    lm: CausalLM,
    chunk: Sequence[Excerpt],
    plan: Plan,
    begin: Cursor,
    end: Cursor,
    progress: Callable[[int, float, int], object],
) -> Columns:
    """The columns of a chunk; a sequence without a token after a prefix has NaN there."""
    sizes = np.array([len(one.tokens) - one.added for one in chunk], np.int64)
    columns: Columns = {
        "document": np.array([one.document for one in chunk], np.int64),
        "start": np.array([one.start for one in chunk], np.int64),
        "source": [one.source for one in chunk],
        "tokens": sizes,
        "greedy_from": np.full(len(chunk), np.nan),
        "longest_run": np.full(len(chunk), np.nan),
    }
    for prefix in plan.prefixes:
        names = [f"matched_{prefix}", f"bits_{prefix}"]
        names += [f"bits_{prefix}_{way.name}" for way in plan.ways if way != PLAIN]
        names += [f"distance_{prefix}"] * plan.decode
        columns |= {name: np.full(len(chunk), np.nan) for name in names}
    long = [row for row, size in enumerate(sizes) if size > min(plan.prefixes)]
    passed = _teacher_forced(lm, [chunk[row] for row in long], plan, begin, end, progress)
    if long:
        columns["longest_run"][long] = longest_match(passed["is_greedy"])
        added = np.array([chunk[row].added for row in long])
        columns["greedy_from"][long] = greedy_from(passed["is_greedy"]) - added
    for prefix in plan.prefixes:
        fits = [(place, row) for place, row in enumerate(long) if sizes[row] > prefix]
        for name, values in passed.items() if fits else ():
            suffixes = [values[place][prefix + chunk[row].added - 1 :] for place, row in fits]
            greedy = name == "is_greedy"
            column = f"matched_{prefix}" if greedy else name.replace("bits", f"bits_{prefix}", 1)
            found = longest_match(suffixes, 1) if greedy else suffix_bits(suffixes, 1)
            columns[column][[row for _, row in fits]] = found
    if plan.decode:
        _decode(lm, chunk, plan, columns)
    return columns


def _teacher_forced(
    lm: CausalLM,
    chunk: Sequence[Excerpt],
    plan: Plan,
    begin: Cursor,
    end: Cursor,
    progress: Callable[[int, float, int], object],
) -> dict[str, list[NDArray[Any]]]:
    """is_greedy, bits and bits_WAY of the coded tokens of each sequence."""
    further = [way for way in plan.ways if way != PLAIN]
    names = ["is_greedy", "bits", *(f"bits_{way.name}" for way in further)]
    found: dict[str, list[Any]] = {name: [None] * len(chunk) for name in names}
    tokens = [one.tokens for one in chunk]
    cut = windows([len(each) for each in tokens])
    total, done = max(1, sum(map(len, tokens))), 0
    for batch in batches(cut, plan.batch_tokens):
        inputs, targets = window_tensors(tokens, batch)
        stats = lm.token_stats(inputs, targets, greedy=True)
        assert stats.is_greedy is not None
        values = [stats.is_greedy, stats.bits]
        if further:
            suffixes = targets.clone()
            for row, window in enumerate(batch):
                suffixes[row, : chunk[window.document].added + min(plan.prefixes) - 1] = IGNORED
            values += sampling_bits(lm, inputs, suffixes, further)
        for name, tensor in zip(names, values, strict=True):
            for row, window in zip(tensor.cpu().numpy(), batch, strict=True):
                found[name][window.document] = row[: window.inputs]
        for window in batch:
            if not np.isfinite(found["bits"][window.document]).all():
                raise ValueError(
                    f"{chunk[window.document].source}: its bits are not finite: the weights are "
                    "not, or their precision is too low; try dtype float32"
                )
        area = sum(window.inputs + 1 for window in batch)
        done += area
        progress(area, begin.read + (end.read - begin.read) * done / total, begin.document)
    return found


def _decode(lm: CausalLM, chunk: Sequence[Excerpt], plan: Plan, columns: Columns) -> None:
    """Fills the distances of what greedy decoding really returns, sequences of one length at a
    time."""
    for prefix in plan.prefixes:
        groups: dict[tuple[int, int], list[int]] = {}
        for row, one in enumerate(chunk):
            if len(one.tokens) - one.added > prefix:
                groups.setdefault((one.added + prefix, len(one.tokens)), []).append(row)
        for (begin, length), rows in groups.items():
            size = max(1, plan.batch_tokens // length)
            for part in (rows[i : i + size] for i in range(0, len(rows), size)):
                tokens = torch.from_numpy(np.stack([chunk[row].tokens for row in part]))
                decoded = greedy_tokens(lm, tokens[:, :begin].long(), length - begin)
                columns[f"distance_{prefix}"][part] = edit_distance(
                    decoded.cpu().numpy(), tokens[:, begin:].numpy()
                )
