"""One run of scores: documents to tokens to chunks, with progress, into memory or a folder."""

import math
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastmem.base.ranks import do_first, gathered, rank_and_size
from fastmem.base.storage import Row, write_document
from fastmem.base.terminal import progress_bar, say
from fastmem.data.documents import Documents
from fastmem.models.causal.lm import CausalLM
from fastmem.models.causal.load import Loaded
from fastmem.models.scoring.chunks import (
    DOCUMENT_COLUMNS,
    STATISTICS,
    TOKEN_TYPES,
    Chunk,
    Columns,
    Cursor,
    Settings,
    scored_chunks,
)
from fastmem.models.scoring.document_tokenizer import DocumentTokenizer
from fastmem.models.scoring.folder import (
    PASSAGES,
    SUMMARY,
    SUMMED,
    UNKNOWN,
    WINDOWED,
    ScoreFolder,
    windowed,
)
from fastmem.models.scoring.passages import Passages

SCHEMA = 1
PACKAGES = ("torch", "transformers", "tokenizers")


class Run:
    """Scores documents under one model. `further` are settings for the summary alone."""

    def __init__(
        self,
        loaded: Loaded,
        documents: Documents,
        tokenize: DocumentTokenizer,
        settings: Settings,
        progress: bool,
        further: Row,
    ) -> None:
        self.loaded, self.documents, self.tokenize = loaded, documents, tokenize
        self.settings, self.progress, self.further = settings, progress, further

    def in_memory(
        self, identity: Row, tokens: bool
    ) -> tuple[Row, dict[str, NDArray[Any]], dict[str, NDArray[Any]] | None]:
        """The summary and the columns of all documents; those of tokens only if asked for."""
        rows: Columns = {name: [] for name in DOCUMENT_COLUMNS}
        names = ["document", "position", "token", "bits"]
        names += [STATISTICS[word] for word in self.settings.also]
        parts: dict[str, list[NDArray[Any]]] = {
            name: [np.empty(0, TOKEN_TYPES[name])] for name in names
        }
        last: Row = {}
        for _, own, last in self._chunks(Cursor(), {}):  # noqa: B007
            found = None if own is None else (own.documents, own.tokens if tokens else {})
            for documents, columns in filter(None, gathered(found)):
                for name, values in documents.items():
                    rows[name] += values
                for name, values in columns.items():
                    parts[name].append(values)
        sums: Row = {"documents": len(rows["document"])}
        for name in SUMMED:
            lacks = name in UNKNOWN and (None in rows[name] or not rows[name])
            sums[name] = None if lacks else sum(rows[name])
        sums[WINDOWED] = windowed(rows["coded_tokens"], self.settings.context)
        arrays = {name: _column(name, values) for name, values in rows.items()}
        whole = {name: np.concatenate(part) for name, part in parts.items()} if tokens else None
        return self._summary(sums, identity, last), arrays, whole

    def in_folder(self, folder: ScoreFolder, identity: Row) -> None:
        """Scores what the folder lacks, and finishes it."""
        parts, cursor, before = do_first(folder.resume)
        state = before
        if parts and self.progress:
            say(f"{cursor.document:,} documents are scored and skipped")
        end = parts
        for number, chunk, state in self._chunks(cursor, before):
            if chunk is not None:
                folder.add(parts + number, chunk, state)
                end = parts + number + 1
        end = max(gathered(end))
        do_first(lambda: self._finish(folder, identity, state, end))

    def _finish(self, folder: ScoreFolder, identity: Row, state: Row, parts: int) -> None:
        folder.expect(parts)
        passages = Passages()
        sums = folder.merge(passages, self.settings.also, self.settings.context)
        tokenizer = self.loaded.tokenizer
        decode = None if tokenizer is None else lambda ids: str(tokenizer.decode(ids))
        write_document(folder.path / PASSAGES, passages.to_json(decode))
        write_document(folder.path / SUMMARY, self._summary(sums, identity, state))
        folder.delete_parts()

    def _chunks(self, begin: Cursor, state: Row) -> Iterator[tuple[int, Chunk | None, Row]]:
        """As `scored_chunks`, each with what the summary needs of the run up to there."""
        if self.progress:
            self._say()
        documents = self.tokenize(self.documents.after(begin.document))
        lm, before = self.loaded.lm, state.get("seconds", 0.0)
        with Progress(self.progress, self.documents.count, begin) as shown:
            for number, chunk in scored_chunks(lm, documents, self.settings, begin, shown.update):
                if lm.through == "logits" and state.get("through") != "logits" and self.progress:
                    say(f"{lm.reason}")
                state = how_measured(lm, state, before + time.monotonic() - shown.began)
                yield number, chunk, state
                if chunk is not None:
                    shown.reach(chunk.end.document)

    def _say(self) -> None:
        if skipped := self.documents.skipped_in_words():
            say(skipped)
        if self.tokenize.bos["is"] == "EOS":
            say(f"no BOS: {self.tokenize.bos['text']}, the tokenizer's EOS, begins each document")

    def _summary(self, sums: Row, identity: Row, state: Row) -> Row:
        seconds = state.get("seconds", 0.0)
        return {
            "schema": SCHEMA,
            "model": identity["model"][0],
            "data": identity["data"][0],
            **sums,
            "bits_per_token": _ratio(sums["bits"], sums["coded_tokens"]),
            "bits_per_byte": _ratio(sums["bits"], sums["bytes"]),
            "zlib_bits_per_byte": _ratio(sums["zlib_bits"], sums["bytes"]),
            "bos": self.tokenize.bos,
            **described(self.loaded.lm, state),
            "context": self.settings.context,
            "stride": self.settings.stride or self.settings.context,
            "skipped_files": len(self.documents.skipped),
            "seconds": seconds,
            "tokens_per_second": _ratio(sums["coded_tokens"], seconds),
            "ranks": rank_and_size()[1],
            "settings": {name: value[0] for name, value in identity.items()} | self.further,
        }


class Progress:
    """A bar with documents, tokens a second and the time left; a line every 30 s in a log."""

    def __init__(
        self, show: bool, documents: int | None, begin: Cursor, name: str = "score"
    ) -> None:
        self.began, self._begin, self._tokens = time.monotonic(), begin, 0
        form = "{l_bar}{bar}| {n:,}/{total:,} documents{postfix}"
        self._bar = progress_bar(
            show,
            documents or None,
            form if documents else "{desc}: {n:,} documents{postfix}",
            initial=begin.document,
            desc=name,
            unit=" documents",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._bar.close()

    def reach(self, documents: int) -> None:
        """After a chunk: the documents up to its end."""
        self._bar.n = documents

    def update(self, tokens: int, read: float, documents: int) -> None:
        """After a batch: its tokens, the fraction of the data scored, the documents before it."""
        self._tokens += tokens
        seconds = time.monotonic() - self.began
        words = f"{self._tokens:,} tokens, {self._tokens / max(seconds, 1e-9):,.0f} a second"
        if read > self._begin.read:
            left = seconds * max(0.0, 1 - read) / (read - self._begin.read)
            words += f", {tqdm.format_interval(left)} left"
        self._bar.n = documents
        self._bar.set_postfix_str(words)


def how_measured(lm: CausalLM, state: Row, seconds: float) -> Row:
    """What a summary needs of the chunks up to here, from the state after the chunk before."""
    through = "logits" if "logits" in (state.get("through"), lm.through) else "hidden"
    return {"through": through, "reason": lm.reason or state.get("reason"), "seconds": seconds}


def described(lm: CausalLM, state: Row) -> Row:
    """The model and how it measured, for a summary."""
    return {
        "through": state.get("through", "hidden"),
        "reason": state.get("reason"),
        "parameters": lm.parameters,
        "dtype": str(next(lm.model.parameters()).dtype).removeprefix("torch."),
        "device": str(lm.device),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of fastmem, Python, and the packages that make the bits."""
    found = {"fastmem": metadata.version("fastmem-lm"), "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _ratio(value: float, by: float | None) -> float | None:
    """value / by; 0 bits of 0 tokens or bytes are 0 bits each; None if `by` is unknown."""
    return None if by is None else value / by if by else 0.0


def _column(name: str, values: list[Any]) -> NDArray[Any]:
    if name == "source":
        return np.asarray(values, object)
    whole = name not in ("bits", "bits_per_byte") and None not in values
    known = [math.nan if value is None else value for value in values]
    return np.asarray(known, np.int64 if whole else np.float64)
