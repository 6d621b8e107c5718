"""Tokenizers of text: bytes, or a tokenizer of the library tokenizers.

n documents, M sequences, S tokens a sequence, V vocabulary.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from fastmem.base.arguments import integer, user_path
from fastmem.data.sequences import Tokens

Cut = tuple[Tokens, NDArray[np.int64], NDArray[np.int64]]
"""Whole sequences (M, S) of documents; their number, and the number of tokens, of each (n,)."""
_FILE = "tokenizer.json"


class ByteTokenizer:
    """Each byte of UTF-8 is a token: V = 256."""

    vocab = 256
    saved = ""
    identity = "bytes"

    def cut(self, texts: Sequence[str], raw: Sequence[bytes], length: int) -> Cut:
        """Cuts documents, given as texts and as bytes, into sequences; drops remainders."""
        whole = b"".join([one[: len(one) // length * length] for one in raw])
        sizes = np.array([len(one) for one in raw], np.int64)
        return np.frombuffer(whole, np.uint8).reshape(-1, length), sizes // length, sizes

    def to_bytes(self, rows: Tokens) -> list[bytes]:
        """The bytes of text that each row of tokens spells."""
        return [row.tobytes() for row in rows.astype(np.uint8)]


class PieceTokenizer:
    """A tokenizer of the library tokenizers, with neither truncation, padding nor special tokens.

    Its vocabulary is one more than its largest token, which holes can make larger than the number
    of tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        # A copy, since the caller's tokenizer stays as it is.
        self._tokenizer = type(tokenizer).from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.saved: str = self._tokenizer.to_str()
        self.identity = xxhash.xxh3_128_hexdigest(self.saved.encode())

    def cut(self, texts: Sequence[str], raw: Sequence[bytes], length: int) -> Cut:
        """As `ByteTokenizer.cut`; on all cores, without Python's lock."""
        with tokenizing():
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        documents = [one.ids for one in encodings]
        sizes = np.array([len(ids) for ids in documents], np.int64)
        rows = sizes // length
        whole = (ids[:n] for ids, n in zip(documents, (rows * length).tolist(), strict=True))
        count = int(rows.sum()) * length
        flat = np.fromiter(chain.from_iterable(whole), np.uint32, count)
        return flat.reshape(-1, length), rows, sizes

    def to_bytes(self, rows: Tokens) -> list[bytes]:
        """As `ByteTokenizer.to_bytes`; exact for byte-level tokenizers, else what they decode."""
        table = self._pieces
        if table is not None:
            return [b"".join([table[token] for token in row]) for row in rows.tolist()]
        decode = self._tokenizer.decode
        return [decode(row, skip_special_tokens=False).encode() for row in rows.tolist()]

    @cached_property
    def _pieces(self) -> list[bytes] | None:
        """The bytes of each token, None unless tokens are made of bytes."""
        if "'ByteLevel'" not in str(json.loads(self.saved)["decoder"]):
            return None
        bytes_of = _byte_of_character()
        added = self._tokenizer.get_added_tokens_decoder()
        table = [b""] * self.vocab
        for piece, token in self._tokenizer.get_vocab().items():
            in_bytes = token not in added and all(letter in bytes_of for letter in piece)
            table[token] = (
                bytes(bytes_of[letter] for letter in piece) if in_bytes else piece.encode()
            )
        return table


Tokenizer = ByteTokenizer | PieceTokenizer


@contextmanager
def tokenizing() -> Iterator[None]:
    """Makes ValueError of the errors of a tokenizer, which raises Exception itself."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"the tokenizer cannot encode the text ({error}): give a tokenizer that spells any text"
        ) from None


def load_tokenizer(tokenizer: Any) -> Tokenizer:
    """A tokenizer from "bytes", a file of tokenizers, a folder of transformers, or an object.

    Raises:
        ValueError: it is none of these, or cannot be read.
    """
    if isinstance(tokenizer, ByteTokenizer | PieceTokenizer):
        return tokenizer
    if tokenizer == "bytes":
        return ByteTokenizer()
    found = getattr(tokenizer, "backend_tokenizer", tokenizer)  # of transformers
    if hasattr(found, "encode_batch_fast"):
        return PieceTokenizer(found)
    path = user_path(tokenizer)
    try:
        if path.is_dir() and not (path / _FILE).is_file():
            from transformers import AutoTokenizer

            return PieceTokenizer(AutoTokenizer.from_pretrained(path).backend_tokenizer)
        return PieceTokenizer(
            _library().Tokenizer.from_file(str(path / _FILE if path.is_dir() else path))
        )
    except Exception as error:  # of tokenizers, which raises Exception itself, or transformers
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"tokenizer {tokenizer} cannot be read ({reason}): give 'bytes', a tokenizer.json or a "
            "folder of transformers"
        ) from None


def train_tokenizer(texts: Iterable[str], vocab: int) -> PieceTokenizer:
    """Trains a byte-level BPE of at most `vocab` tokens, which can spell any text.

    Raises:
        ValueError: vocab is outside 257 to 2**20.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """
    integer("train_tokenizer", vocab, 257, 2**20)
    library = _library()
    pieces = library.pre_tokenizers.ByteLevel
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = pieces(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=pieces.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_in_blocks(texts), trainer)
    return PieceTokenizer(tokenizer)


def saved_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder of prepared text."""
    return load_tokenizer(folder / _FILE) if (folder / _FILE).is_file() else ByteTokenizer()


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer into a folder of prepared text."""
    if tokenizer.saved:
        (folder / _FILE).write_text(tokenizer.saved)


def check_vocab(tokens: Tokens, vocab: int, rows: NDArray[np.int64], names: Sequence[str]) -> None:
    """ValueError unless the tokens (M, S) of these documents, of (n,) rows each, are below V."""
    if tokens.size and int(tokens.max()) >= vocab:
        row = int(np.argmax((tokens >= vocab).any(1)))
        name = names[int(np.searchsorted(np.cumsum(rows), row, "right"))]
        raise ValueError(
            f"token {int(tokens[row].max())} of {name} is outside the vocabulary of {vocab}; give "
            "a larger vocab, or leave it out"
        )


def _in_blocks(texts: Iterable[str], documents: int = 256) -> Iterator[list[str]]:
    """Lists of texts, which tokenizers counts on all cores."""
    block: list[str] = []
    for text in texts:
        block.append(text)
        if len(block) == documents:
            yield block
            block = []
    yield block


def _byte_of_character() -> dict[str, int]:
    """GPT-2's characters, one for each byte: printable bytes are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "a tokenizer other than bytes needs tokenizers, which is not installed: pip install "
            "'fastmem-lm[text]'"
        ) from None
    return tokenizers
