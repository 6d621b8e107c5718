"""Prepares text as data sets: reads, tokenizes, cuts, splits by document, removes duplicates.

D documents, M sequences before duplicates are removed, S tokens a sequence, V vocabulary.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from fastmem.base.arguments import MAX_WORD, integer, number, user_path
from fastmem.base.lock import LOCK, locked
from fastmem.base.storage import check_folder, whole_file, write_json
from fastmem.data.documents import Documents, open_documents, standard_library
from fastmem.data.duplicates import NearDuplicates, first_of_each, row_hashes
from fastmem.data.files.blocks import ahead
from fastmem.data.text import (
    DOCUMENTS,
    MANIFEST,
    SCHEMA,
    SOURCES,
    SPLITS,
    TextCorpus,
    read_text_manifest,
)
from fastmem.data.tokenizers import (
    Cut,
    Tokenizer,
    check_vocab,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer as trained,
)

_BATCH_BYTES = 1 << 20
"""Text that is tokenized at once. Memory holds four batches; more is not faster."""
_CHUNK_BYTES, _NAMED = 8 << 20, 1000


def prepare_text(
    data: Any = None,
    folder: str | Path | None = None,
    *,
    length: int = 64,
    tokenizer: Any = "bytes",
    train_tokenizer: int | None = None,
    vocab: int | None = None,
    fractions: tuple[float, float, float] = (0.4, 0.3, 0.3),
    seed: int = 0,
    near_duplicates: float | None = None,
    field: str | None = None,
    column: str | None = None,
    errors: str = "strict",
    overwrite: bool = False,
    progress: bool = False,
) -> TextCorpus:
    """Prepares text as sequences of S tokens in a folder, once.

    Each document is tokenized by itself and cut into sequences; its last tokens that do not fill a
    sequence are dropped. A hash of its text, keyed with `seed`, puts a document into a split, so
    that neither other documents nor names of files matter. Of equal sequences the first is kept, in
    the order train, test, reference, and by hash of the document within a split.

    The folder holds train.npy, test.npy and reference.npy, (N, S) each. It appears when it is
    whole. A later call with the same arguments opens it; with a folder of other text or other
    settings it is an error. Memory holds a few batches, 24 bytes a document and 1 a sequence.

    Args:
        data: as `open_documents` takes it: .txt, .jsonl, Parquet, a folder, the name of a data set
            of datasets, or a list of texts. None: the sources of Python's standard library without
            its tests.
        folder: to prepare into; None: one in the user's cache, named by a hash of the arguments.
        length: S, from 2.
        tokenizer: "bytes"; a tokenizer.json of tokenizers; a folder of transformers; or a
            tokenizer of either library.
        train_tokenizer: trains a byte-level BPE of this many tokens on the reference split,
            instead of `tokenizer`.
        vocab: V, such as a model's padded vocabulary; None: that of the tokenizer.
        fractions: of documents in train, test and reference; they add up to 1.
        seed: of the splits, from 0 to 2**64 - 1.
        near_duplicates: also removes documents whose estimated Jaccard similarity to an earlier
            document, over runs of five words, is at least this, in (0, 1); needs datasketch.
        field, column, errors: as in `open_documents`. Documents with a NUL are left out as binary.
        overwrite: replaces a folder of other text or settings.
        progress: shows a bar if standard error is a terminal.

    Raises:
        ValueError: an argument is outside its limits; the data cannot be read as text, or is too
            small; a token is outside V; the folder holds something else, or another process has it.
        OSError: the disk is full.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> texts = [f"{i} is the number of this text." for i in range(50)]
        >>> corpus = prepare_text(texts, f"{folder.name}/corpus", length=16)
        >>> corpus.counts["documents"], corpus.counts["exact_duplicates"]
        (50, 0)
        >>> folder.cleanup()

    Source: arXiv 2505.24832, section 4; Lee et al., "Deduplicating Training Data Makes Language
    Models Better", ACL 2022; Broder, "On the Resemblance of Documents", 1997 (MinHash).
    """
    if length == 1:
        raise ValueError("length is 1: only tokens after the first are coded; use 2 or more")
    if near_duplicates is not None and not 0 < number("near_duplicates", near_duplicates) < 1:
        raise ValueError(f"near_duplicates must be above 0 and below 1, got {near_duplicates}")
    if train_tokenizer is not None and tokenizer != "bytes":
        raise ValueError(f"train_tokenizer makes a tokenizer: leave out tokenizer {tokenizer}")
    given = load_tokenizer(tokenizer)
    options: dict[str, Any] = {"field": field, "column": column, "errors": errors}
    data = standard_library() if data is None else data
    documents = open_documents(data, without=folder, only_text=True, **options)
    request = {
        "schema": SCHEMA,
        "data": documents.identity,
        "length": integer("length", length, 2, 2**20),
        "tokenizer": given.identity if train_tokenizer is None else f"bpe {train_tokenizer}",
        "vocab": None if vocab is None else integer("vocab", vocab, 2, 2**31),
        "fractions": _checked_fractions(fractions),
        "seed": integer("seed", seed, 0, MAX_WORD),
        "near_duplicates": near_duplicates,
        **options,
    }
    place = _cache(request) if folder is None else user_path(folder).absolute()
    if found := _opened(place, request, overwrite):
        return found
    part = place.with_name(f".{place.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    bar = tqdm(unit="B", unit_scale=True, desc="text", disable=None if progress else True)
    with bar, locked(part):
        for left in part.iterdir():  # by a killed run
            if left.name != LOCK:
                left.unlink()
        try:
            # Another process may have prepared it just now.
            if _opened(place, request, overwrite) is None:
                new = _Preparation(part, documents, request, bar).write(given, train_tokenizer)
                _replace(place, part, new, documents.name, overwrite)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return TextCorpus.open(place)


def _opened(folder: Path, request: dict[str, Any], overwrite: bool) -> TextCorpus | None:
    """The corpus of a folder if it was prepared from the same data; None if it must be prepared."""
    check_folder(folder, {MANIFEST}, "prepared corpus", "give another folder")
    if not (folder / MANIFEST).exists():
        if folder.is_dir() and (left := sorted(path.name for path in folder.iterdir())):
            raise ValueError(f"{folder} holds {left[0]}: remove it, or give another folder")
        return None
    old = read_text_manifest(folder)["request"]
    wrong = [name for name in request if name != "data" and old.get(name) != request[name]]
    if wrong and not overwrite:
        raise ValueError(
            f"{folder} was prepared with {wrong[0]} {old.get(wrong[0])}, not {request[wrong[0]]}: "
            "give another folder, or overwrite"
        )
    return TextCorpus.open(folder) if old == request else None


def _replace(place: Path, part: Path, new: dict[str, Any], name: str, overwrite: bool) -> None:
    """Puts a finished folder in its place, over the same text alone unless told to overwrite."""
    if (place / MANIFEST).exists():
        if read_text_manifest(place)["hash"] != new["hash"] and not overwrite:
            raise ValueError(
                f"{place} was prepared from other text: {name} has changed since; give another "
                "folder, or overwrite"
            )
        shutil.rmtree(place)  # the same text, perhaps under other names
    (part / LOCK).unlink()
    part.rename(place)


class _Text(NamedTuple):
    """A document of text."""

    name: str
    text: str
    raw: bytes


class _Preparation:
    """One run: reads documents in their order, then writes sequences in the order of hashes."""

    def __init__(
        self, folder: Path, documents: Documents, request: dict[str, Any], bar: "tqdm[Any]"
    ) -> None:
        self.folder, self.documents, self.request, self.bar = folder, documents, request, bar
        self.length, self.seed = request["length"], request["seed"]
        shares = np.cumsum(request["fractions"])[:-1]
        self.limits = np.array([int(share * 2**64) for share in shares], np.uint64)
        threshold = request["near_duplicates"]
        self.near = None if threshold is None else NearDuplicates(threshold)

    def write(self, tokenizer: Tokenizer, train: int | None) -> dict[str, Any]:
        """Writes the files and last the manifest, which it returns."""
        if train is not None:
            last = int(self.limits[-1])
            texts = (one.text for one in self._texts() if self._hash(one.raw) >= last)
            tokenizer = trained(texts, train)
        V = self.request["vocab"] or tokenizer.vocab
        self.dtype = np.dtype("u1" if V <= 256 else "<u2" if V <= 65536 else "<u4")
        raw = self.folder / "raw.part"
        written = self._read(tokenizer, V, raw)
        table, splits = self._split(_Table(raw, self.dtype, self.length, *written))
        raw.unlink()
        save_tokenizer(self.folder, tokenizer)
        content = {"schema": SCHEMA, "length": self.length, "vocab": V, "seed": self.seed}
        content |= {"splits": splits, "documents": table, "tokenizer": tokenizer.identity}
        sequences = {split: splits[split]["sequences"] for split in SPLITS}
        self.counts |= {"sequences": sum(sequences.values()), "splits": sequences}
        others = {"request": self.request, "counts": self.counts, "skipped": self.skipped}
        digest = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
        manifest = content | others | {"hash": digest}
        write_json(self.folder / MANIFEST, manifest)
        return manifest

    def _texts(self) -> Iterator[_Text]:
        """The documents of text; counts them and the others."""
        names = ("documents", "bytes", "tokens", "dropped_tokens", "blank", "binary")
        self.counts: dict[str, Any] = dict.fromkeys(names, 0)
        self.skipped = list(self.documents.skipped[:_NAMED])
        for source, content, _ in self.documents:
            if not isinstance(content, str):
                raise ValueError(
                    f"{source} of {self.documents.name} holds tokens or messages: give text"
                )
            why = "binary" if "\0" in content else "blank" if not content.strip() else "documents"
            self.counts[why] += 1
            if why == "documents":
                raw = content.encode("utf-8", "surrogatepass")
                self.counts["bytes"] += len(raw)
                yield _Text(source, content, raw)
            elif len(self.skipped) < _NAMED:
                self.skipped.append(source)

    def _batches(self) -> Iterator[list[_Text]]:
        batch, size = [], 0
        for one in self._texts():
            batch.append(one)
            size += len(one.raw)
            if size >= _BATCH_BYTES:
                self.bar.update(size)
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _hash(self, raw: bytes) -> int:
        return xxhash.xxh3_64_intdigest(raw, self.seed)

    def _read(self, tokenizer: Tokenizer, vocab: int, path: Path) -> NDArray[np.uint64]:
        """Writes all sequences in the order of reading.

        Returns:
            Of each document its hash, number of sequences, and place in the file of names: (3, D).
        """

        def cut(batch: list[_Text]) -> tuple[list[_Text], Cut]:
            texts, raw = [one.text for one in batch], [one.raw for one in batch]
            return batch, tokenizer.cut(texts, raw, self.length)

        columns, end = [np.empty((3, 0), np.uint64)], 0
        with path.open("wb") as raw_file, (self.folder / SOURCES).open("wb") as names_file:
            for batch, (tokens, rows, sizes) in ahead(cut, self._batches(), workers=1):
                names = [one.name for one in batch]
                check_vocab(tokens, vocab, rows, names)
                raw_file.write(tokens.astype(self.dtype, copy=False).data)
                lines = [" ".join(f"{name}".split("\n")).encode(errors="replace") for name in names]
                places = end + np.cumsum([0, *(len(line) + 1 for line in lines)])
                end = int(places[-1])
                names_file.write(b"".join(line + b"\n" for line in lines))
                hashes = np.array([self._hash(one.raw) for one in batch], np.uint64)
                columns.append(np.stack([hashes, rows.astype("u8"), places[:-1].astype("u8")]))
                self.counts["tokens"] += int(sizes.sum())
                self.counts["dropped_tokens"] += int((sizes - rows * self.length).sum())
                if self.near is not None:
                    self.near.add([one.text for one in batch])
        written = np.concatenate(columns, 1)
        self._check_size(int(written[1].sum()))
        return written

    def _check_size(self, rows: int) -> None:
        D, name, why = self.counts["documents"], self.documents.name, ""
        if D == 0:
            why = f"{name} holds {'white space' if self.counts['blank'] else 'no text'}: give text"
        elif len(SPLITS) > D:
            why = f"{name} has {D} of the 3 documents that 3 splits need: give more files or lines"
        elif rows == 0:
            why = f"none of {D:,} documents of {name} has {self.length} tokens: give less length"
        if why:
            raise ValueError(why)

    def _split(self, table: "_Table") -> tuple[str, dict[str, dict[str, Any]]]:
        """Writes the splits without duplicates, and their documents; returns their hashes."""
        keep = np.ones(int(table.ends[-1]), bool)
        self.counts["near_duplicates"] = 0
        if self.near is not None:
            near = self.near.found(table.order, table.hashes)
            keep = np.repeat(~near, table.rows)
            self.counts["near_duplicates"] = int(near.sum())
        before = int(keep.sum())
        hashes = ((begin, row_hashes(rows)) for begin, rows in table.chunks(range(keep.size)))
        first_of_each(hashes, keep, self.folder)
        kept = np.add.reduceat(keep, table.ends - table.rows, dtype=np.int64)
        self.counts["exact_duplicates"] = before - int(kept.sum())
        there = kept > 0
        hashes_there = table.hashes[there].view(np.int64)
        documents = np.stack([np.cumsum(kept[there]), table.places[there], hashes_there], 1)
        with whole_file(self.folder / DOCUMENTS) as file:
            np.save(file, documents)
        ends = [0, *np.searchsorted(table.hashes, self.limits).tolist(), len(kept)]
        splits: dict[str, dict[str, Any]] = {}
        for split, begin, end in zip(SPLITS, ends, ends[1:], strict=False):
            n = int(kept[begin:end].sum())
            if n == 0:
                raise ValueError(
                    f"split {split} is empty: {end - begin} of {len(kept)} documents with "
                    f"{self.length} tokens fall there, and hold 0 new sequences; give more "
                    "documents, another seed or other fractions"
                )
            first, last = (int(table.ends[i - 1]) if i else 0 for i in (begin, end))
            digest = self._write_split(split, n, range(first, last), table, keep)
            splits[split] = {"sequences": n, "xxh3": digest}
        return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(documents[:, 0]).data), splits

    def _write_split(
        self, split: str, n: int, places: range, table: "_Table", keep: NDArray[np.bool_]
    ) -> str:
        """Writes the kept sequences among these places; returns their hash."""
        digest = xxhash.xxh3_128()
        shape = {"descr": self.dtype.str, "fortran_order": False, "shape": (n, self.length)}
        with whole_file(self.folder / f"{split}.npy") as file:
            np.lib.format.write_array_header_1_0(file, shape)
            for _, tokens in table.chunks(places, keep):
                digest.update(tokens.data)
                file.write(tokens.data)
        return digest.hexdigest()


class _Table:
    """Documents with sequences in the order of their hashes: where their sequences were written."""

    def __init__(
        self, path: Path, dtype: "np.dtype[Any]", length: int, *columns: NDArray[np.uint64]
    ) -> None:
        hashes, rows = columns[0], columns[1].astype(np.int64)
        self.order = np.flatnonzero(rows)
        self.order = self.order[np.argsort(hashes[self.order], kind="stable")]
        self.hashes, self.rows = hashes[self.order], rows[self.order]
        self.begins = (np.cumsum(rows) - rows)[self.order]
        self.places = columns[2].astype(np.int64)[self.order]
        self.ends = np.cumsum(self.rows)
        self._path, self._dtype, self._length = path, dtype, length

    def chunks(
        self, places: range, keep: NDArray[np.bool_] | None = None
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """Gives (first place, sequences) of these places, or those kept, some at a time."""
        width = self._length * self._dtype.itemsize
        step = max(1, _CHUNK_BYTES // width)
        # A memory map would keep whole folios of the file, megabytes for each document.
        with self._path.open("rb", buffering=0) as file:
            for begin in range(places.start, places.stop, step):
                end = min(begin + step, places.stop)
                tokens = np.empty((end - begin, self._length), self._dtype)
                view, at = tokens.data.cast("B"), 0
                for first, n in self._runs(begin, end):
                    os.preadv(file.fileno(), [view[at : at + n * width]], first * width)
                    at += n * width
                yield begin, tokens if keep is None else tokens[keep[begin:end]]

    def _runs(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Where the sequences at these places were written: (first, number) of each document."""
        first = int(np.searchsorted(self.ends, begin, "right"))
        last = int(np.searchsorted(self.ends, end, "left")) + 1
        ends, starts = self.ends[first:last], self.ends[first:last] - self.rows[first:last]
        low = np.maximum(starts, begin)
        n = np.minimum(ends, end) - low
        written = self.begins[first:last] + low - starts
        return zip(written.tolist(), n.tolist(), strict=True)


def _checked_fractions(fractions: Any) -> list[float]:
    values = [number("fractions", one) for one in fractions]
    if len(values) != len(SPLITS) or not min(values) > 0 or not abs(sum(values) - 1) <= 1e-9:
        raise ValueError(f"fractions must be 3 numbers above 0 with the sum 1, got {fractions}")
    return values


def _cache(request: dict[str, Any]) -> Path:
    """The folder in the user's cache for this request."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = xxhash.xxh3_64_hexdigest(json.dumps(request, sort_keys=True).encode())
    return root / "fastmem" / "text" / name
