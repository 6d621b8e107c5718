"""Real text as a data set: sequences of a prepared corpus, read from memory-mapped files.

`fastmem.data.corpus` prepares a folder. N sequences, S tokens a sequence, V vocabulary.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmem.base.arguments import MAX_WORD, integer, user_path
from fastmem.base.storage import read_json
from fastmem.data.order import permutation
from fastmem.data.sequences import Indices, Rows, Sequences, Tokens, check_fields, from_description
from fastmem.data.tokenizers import Tokenizer, saved_tokenizer

SCHEMA = 1
SPLITS = ("train", "test", "reference")
MANIFEST, DOCUMENTS, SOURCES = "manifest.json", "documents.npy", "sources.txt"

_SAMPLE_EPOCH = 2**64 - 2
"""The epoch whose order chooses samples. No training reaches it, and no canaries use it."""


class TextSequences(Sequences, kind="text"):
    """Sequences of one split of a corpus that `prepare_text` prepared. The entropy is unknown: nan.

    A split is in the order of its documents' hashes, and a document's sequences are consecutive. A
    sample is a random subset; a smaller sample with the same seed is its beginning.

    Args:
        folder: of the prepared corpus.
        split: "train", "test" or "reference".
        count: N, at most the sequences of the split; None: all of them.
        seed: of a sample of N sequences, from 0 to 2**64 - 1; None: the first N of the split.
        start: the first sequence, in the order of the sample or of the split.

    Raises:
        ValueError: the folder does not hold a prepared corpus; an argument is outside its limits.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> texts = [f"{i} is the number of this text." for i in range(100)]
        >>> corpus = fastmem.prepare_text(texts, f"{folder.name}/corpus", length=8)
        >>> train = corpus.train.sample(10, seed=0)
        >>> train.count, train.vocab, train[0].dtype, len(train.texts())
        (10, 256, dtype('uint16'), 10)
        >>> train == fastmem.from_description(train.description())
        True
        >>> folder.cleanup()
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        count: int | None = None,
        seed: int | None = None,
        start: int = 0,
    ) -> None:
        self.folder = user_path(folder).absolute()
        self._manifest = read_text_manifest(self.folder)
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.split, self.hash = split, str(self._manifest["hash"])
        self.split_seed = int(self._manifest["seed"])
        self.length, self.vocab = int(self._manifest["length"]), int(self._manifest["vocab"])
        there = int(self._manifest["splits"][split]["sequences"])
        file = self.folder / f"{split}.npy"
        try:
            self._tokens = np.load(file, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file} is damaged ({error}): prepare the text again") from None
        if self._tokens.shape != (there, self.length):
            raise ValueError(
                f"{file} has shape {self._tokens.shape}, its manifest {(there, self.length)}: "
                "prepare the text again"
            )
        self.start = integer("start", start, 0, there - 1)
        if isinstance(count, (int, np.integer)) and start + count > there:
            raise ValueError(
                f"split {split} of {self.folder} has {there:,} sequences, fewer than "
                f"{start + count:,}: ask for fewer, or give more text"
            )
        self.count = there - start if count is None else integer("count", count, 1, there)
        self.seed = None if seed is None else integer("seed", seed, 0, MAX_WORD)

    def __repr__(self) -> str:
        seed = "" if self.seed is None else f", seed={self.seed}"
        start = f", start={self.start}" if self.start else ""
        own = f"{str(self.folder)!r}, {self.split!r}, count={self.count}{seed}{start}"
        return f"TextSequences({own})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextSequences) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        return from_description, (self.description(),)  # without the tokens

    def _key(self) -> tuple[object, ...]:
        return self.hash, self.split, self.count, self.seed, self.start

    @property
    def uniform_bits(self) -> float:
        """The uniform code of a sequence: (S - 1) · log2 V bits."""
        return (self.length - 1) * math.log2(self.vocab)

    def sample(self, count: int, seed: int = 0) -> "TextSequences":
        """A random subset of the split, in random order.

        Raises:
            ValueError: this is a sample itself; `count` is above the sequences of the split, or
                an argument is outside its limits.
        """
        if self.seed is not None:
            raise ValueError(f"{self!r} is a sample: take samples of the split")
        return TextSequences(self.folder, self.split, count, seed)

    def held_out(self, count: int) -> "TextSequences":
        """`count` sequences of the test split, by the same seed; for the train split alone.

        Raises:
            ValueError: the test split has fewer; this is another split.
        """
        if self.split != "train":
            raise ValueError(
                f"split {self.split} has no held-out sequences: take those of split train"
            )
        return TextSequences(self.folder, "test", count, self.seed)

    def documents(self, indices: Indices = slice(None)) -> NDArray[np.int64]:  # (n,)
        """The document of each of these sequences: a number of the corpus, as `sources` takes it.

        Raises:
            IndexError, ValueError: as `tokens`.
        """
        ends = np.load(self.folder / DOCUMENTS, mmap_mode="r")[:, 0]
        before = sum(
            self._manifest["splits"][split]["sequences"]
            for split in SPLITS[: SPLITS.index(self.split)]
        )
        places = self._places(self._rows(indices))
        rows = np.arange(places.start, places.stop) if isinstance(places, slice) else places
        return np.asarray(np.searchsorted(ends, rows.astype(np.int64) + before, "right"))

    def document_hashes(self) -> NDArray[np.int64]:
        """The different hashes of the documents of these sequences, which tell a document again in
        a corpus with the same split seed; none for a corpus that fastmem 0.1.0 prepared."""
        table = np.load(self.folder / DOCUMENTS, mmap_mode="r")
        return np.unique(table[np.unique(self.documents()), 2:])

    def sources(self, documents: NDArray[np.integer[Any]]) -> list[str]:
        """The names of documents: their files, and after a colon the line or row in the file."""
        begins = np.load(self.folder / DOCUMENTS, mmap_mode="r")[:, 1]
        names = []
        with (self.folder / SOURCES).open("rb") as file:
            for document in np.asarray(documents).ravel():
                file.seek(int(begins[document]))
                names.append(file.readline().rstrip(b"\n").decode("utf-8", "surrogateescape"))
        return names

    def texts(self, indices: Indices = slice(None)) -> list[str]:
        """The text of each of these sequences, with U+FFFD for characters that the cut divides.

        Raises:
            IndexError, ValueError: as `tokens`.
        """
        return [one.decode("utf-8", "replace") for one in self.text_bytes(indices, first=0)]

    def text_bytes(self, indices: Indices = slice(None), first: int = 1) -> list[bytes]:
        """The bytes of text of tokens first, …, S - 1 of each of these sequences.

        By default these are the coded tokens. They are exact for bytes and byte-level BPE; other
        tokenizers decode them, in which a divided character is U+FFFD.

        Raises:
            IndexError, ValueError: as `tokens`.
        """
        return self._tokenizer.to_bytes(np.atleast_2d(self.tokens(indices))[:, first:])

    def description(self) -> dict[str, Any]:
        """Folder, hash and shape; the folder is needed to make the set again."""
        shape = {"count": self.count, "length": self.length, "vocab": self.vocab}
        own = {"kind": self.kind, "path": str(self.folder), "hash": self.hash}
        return own | {"split": self.split, "seed": self.seed, "start": self.start} | shape

    @classmethod
    def _described(cls, description: dict[str, Any]) -> "TextSequences":
        names = ("path", "hash", "split", "seed", "start", "count", "length", "vocab")
        check_fields(cls.kind, description, names)
        path, *place = (description[k] for k in ("path", "split", "count", "seed", "start"))
        there = read_text_manifest(user_path(path))
        for name in ("hash", "length", "vocab"):
            if there[name] != description[name]:
                raise ValueError(
                    f"{path} has {name} {there[name]}, and its description {description[name]}: it "
                    "was prepared again from other text or with other settings"
                )
        return cls(path, *place)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return saved_tokenizer(self.folder)

    @cached_property
    def _sample(self) -> NDArray[np.uint64]:
        assert self.seed is not None
        end = self.start + self.count
        return permutation(self.seed, _SAMPLE_EPOCH, len(self._tokens), self.start, end)

    def _places(self, rows: Rows) -> slice | NDArray[np.uint64]:
        """The rows in the file of these sequences."""
        places = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        if self.seed is not None:
            return self._sample[places]
        if isinstance(rows, range):
            return slice(rows.start + self.start, rows.stop + self.start)
        return rows + np.uint64(self.start)

    def _fill(self, out: Tokens, rows: Rows, threads: int) -> None:
        np.copyto(out, self._tokens[self._places(rows)], casting="unsafe")

    def _files(self) -> list[Path]:
        return [self.folder / f"{self.split}.npy"]


@dataclass(frozen=True)
class TextCorpus:
    """A prepared corpus, as `prepare_text` returns it."""

    folder: Path
    hash: str
    """Of the sequences and their documents; names and places of files do not matter."""
    counts: dict[str, Any]
    """documents, bytes and tokens that were read; blank and binary documents, left out;
    dropped_tokens, which fill no sequence; sequences; exact_duplicates, sequences that were
    removed; near_duplicates, documents that were removed; and the sequences of each of the splits.
    """
    skipped: tuple[str, ...]
    """Names of files and documents that were left out, at most 1000."""
    train: TextSequences
    test: TextSequences
    reference: TextSequences

    def __repr__(self) -> str:
        splits = ", ".join(f"{split} {getattr(self, split).count:,}" for split in SPLITS)
        return f"TextCorpus({str(self.folder)!r}: {splits} sequences of {self.train.length})"

    @classmethod
    def open(cls, folder: str | Path) -> "TextCorpus":
        """Opens a prepared folder; ValueError unless it holds a corpus."""
        path = user_path(folder).absolute()
        manifest = read_text_manifest(path)
        stored = manifest["hash"], manifest["counts"], tuple(manifest["skipped"])
        return cls(path, *stored, *(TextSequences(path, split) for split in SPLITS))


def read_text_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus; ValueError unless the folder holds one."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} does not hold a prepared corpus: prepare it again with fastmem.prepare_text"
        )
    manifest = read_json(path)
    if manifest.get("schema") != SCHEMA or "splits" not in manifest:
        raise ValueError(f"{path} is not a manifest of text of this version: prepare it again")
    return manifest
