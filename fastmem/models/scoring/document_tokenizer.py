"""Tokens of documents: the tokenizer, the first token's policy, special tokens, chat templates."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastmem.data.documents import Document
from fastmem.data.tokenizers import tokenizing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BosPolicy = Literal["auto", "always", "never"]
_BATCH, _BATCH_CHARACTERS = 64, 1 << 20


@dataclass(frozen=True)
class TokenizedDocument:
    """A document as tokens."""

    source: str
    tokens: NDArray[np.integer[Any]]  # (N,)
    """What the model reads: the tokens of the document, after BOS if one was added."""
    added: int
    """Tokens at the beginning that are not the document's: 1 if BOS was added, else 0."""
    bytes: int | None
    """Bytes of the text in UTF-8; None for tokens without text."""
    zlib_bits: int | None
    lossy: bool | None
    """True if the tokenizer does not give the text back; None for tokens without text."""
    read: float
    """As in `Document`."""

    @property
    def coded(self) -> int:
        """The number of tokens that have bits: all but the first that the model reads."""
        return max(0, len(self.tokens) - 1)


class DocumentTokenizer:
    """Turns documents into tokens.

    A text becomes the tokens of its characters, and nothing is added but BOS: "auto" adds one to a
    text if the tokenizer does so by itself, "always" adds one (EOS where the tokenizer has no BOS)
    to texts and tokens, "never" adds none. No BOS is added before a document that begins with it.

    Args:
        tokenizer: of transformers; None if all documents are tokens.
        policy: "auto", "always" or "never".
        special_tokens: a special token that a text spells out, such as <|im_end|>, becomes one
            token; by default it is text like any other.
        chat_template: a document is a conversation, a text is one message of a user; the text that
            the tokenizer's chat template makes of it is scored, with its special tokens.

    Raises:
        ValueError: an unknown policy; "always" without BOS and EOS; a chat template that is
            missing.
    """

    bos: dict[str, Any]
    """What was done: the policy, the token that is added (None: none), its text, and what it is."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | None",
        policy: BosPolicy,
        special_tokens: bool,
        chat_template: bool,
    ) -> None:
        self.tokenizer, self.policy = tokenizer, policy
        self.special_tokens, self.chat_template = special_tokens, chat_template
        if policy not in get_args(BosPolicy):
            raise ValueError(f"bos must be auto, always or never, got {policy!r}")
        token, what = self._first_token()
        text = None
        if token is not None and tokenizer is not None:
            text = tokenizer.convert_ids_to_tokens(token)
        self.bos = {"policy": policy, "token": token, "text": text, "is": what}
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise ValueError("chat_template: the tokenizer has none; score the texts without it")

    def _first_token(self) -> tuple[int | None, str | None]:
        """The token that is added, and whether it is the tokenizer's BOS or EOS."""
        bos, eos = (getattr(self.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
        if self.policy == "auto":
            adds = bos is not None and self._encode(["a"], add_special_tokens=True)[0][0] == bos
            return (bos, "BOS") if adds else (None, None)
        if self.policy == "never":
            return None, None
        if bos is None and eos is None:
            raise ValueError(
                "bos is 'always', and the model has no tokenizer with BOS or EOS: give bos as "
                "'never', or a tokenizer"
            )
        return (eos, "EOS") if bos is None else (bos, "BOS")

    def __call__(self, documents: Iterable[Document]) -> Iterator[TokenizedDocument]:
        """The documents as tokens, in their order; texts are tokenized some at a time."""
        batch: list[Document] = []
        size = 0
        for document in documents:
            batch.append(document)
            size += len(document.content)
            if len(batch) == _BATCH or size > _BATCH_CHARACTERS:
                yield from self._encoded(batch)
                batch, size = [], 0
        yield from self._encoded(batch)

    def _encoded(self, batch: list[Document]) -> Iterator[TokenizedDocument]:
        texts = [self._text(document) for document in batch]
        strings = [text for text in texts if text is not None]
        tokens = iter(self._encode(strings) if strings else [])
        for document, text in zip(batch, texts, strict=True):
            if text is None:
                assert isinstance(document.content, np.ndarray)
                begin = self.bos["token"] if self.policy == "always" else None
                yield _with_bos(document, document.content, begin)
            else:
                own = np.asarray(next(tokens), np.int64)
                lossy = self._decoded(own) != text.strip(" ")
                yield _with_bos(document, own, self.bos["token"], text.encode(), lossy)

    def _text(self, document: Document) -> str | None:
        """The text to score; None for tokens."""
        content = document.content
        if isinstance(content, np.ndarray):
            return None
        if self.tokenizer is None:
            raise ValueError(
                f"document {document.source} is text, and the model has no tokenizer: give tokens, "
                "or a tokenizer"
            )
        if not self.chat_template:
            if isinstance(content, str):
                return content
            raise ValueError(f"{document.source} is a list of messages: give chat_template")
        if isinstance(content, str):
            content = [{"role": "user", "content": content}]
        try:
            return str(self.tokenizer.apply_chat_template(content, tokenize=False))
        except Exception as error:  # of the template, which is a program of the model's authors
            raise ValueError(f"{document.source} does not fit the chat template: {error}") from None

    def _encode(self, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
        assert self.tokenizer is not None
        spelled = self.special_tokens or self.chat_template
        with tokenizing():
            encoded = self.tokenizer(
                texts,
                add_special_tokens=add_special_tokens,
                split_special_tokens=not spelled,
                return_attention_mask=False,
                verbose=False,  # a text may be longer than the model's positions
            )
        return list(encoded["input_ids"])

    def _decoded(self, tokens: NDArray[np.int64]) -> str:
        """The text of tokens, without the spaces that some tokenizers add or drop at its ends."""
        assert self.tokenizer is not None
        text = self.tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)
        return str(text).strip(" ")


def _with_bos(
    document: Document,
    tokens: NDArray[np.integer[Any]],
    bos: int | None,
    raw: bytes | None = None,
    lossy: bool | None = None,
) -> TokenizedDocument:
    """The document, with the bytes `raw` of its text, after `bos` unless it begins with that
    token."""
    adds = bos is not None and not (len(tokens) and int(tokens[0]) == bos)
    if adds:
        tokens = np.concatenate([np.asarray([bos], np.int64), tokens.astype(np.int64)])
    size = None if raw is None else len(raw)
    zlib_bits = None if raw is None else 8 * len(zlib.compress(raw))
    return TokenizedDocument(
        document.source, tokens, int(adds), size, zlib_bits, lossy, document.read
    )
