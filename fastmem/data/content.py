"""What a document holds, a text, tokens or messages: decoded from files, and checked."""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastmem.data.sequences import Tokens

Messages = list[dict[str, Any]]
"""A conversation: dicts with role and content, as chat templates take them."""
Content = str | Tokens | Messages


def whole_text(path: Path, errors: str) -> str:
    return _decoded(path.read_bytes(), path, 0, errors).removeprefix("\ufeff")


def _decoded(raw: bytes, path: Path, offset: int, errors: str) -> str:
    """The text of bytes that begin at `offset` of a file."""
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, byte {offset + error.start}: {raw[error.start]:#04x} is not UTF-8 "
            f"({error.reason}): give errors as 'replace' or 'ignore', or convert the file"
        ) from None


def lines(path: Path, field: str, errors: str) -> Iterator[tuple[str, Content, float]]:
    size, offset = path.stat().st_size, 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            # A handler may write what JSON does not take: it waits for the field.
            how = errors if errors == "strict" else "surrogateescape"
            text = _decoded(raw, path, offset, how).removeprefix("\ufeff" * (number == 1))
            if text.strip():
                where = f"{path}, line {number} (byte {offset})"
                yield f"{number}", _field(text, field, where, errors), (offset + len(raw)) / size
            offset += len(raw)


def _field(line: str, field: str, where: str, errors: str) -> Content:
    """The field of a line of JSON."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict) or field not in value:
        fields = f"has fields {', '.join(value)}" if isinstance(value, dict) else "is not an object"
        raise ValueError(f"{where} {fields}, none is {field!r}: give field")
    return content_of(value[field], f"{where}, field {field!r},", errors)


def _without_surrogates(value: Any, where: str, errors: str) -> Any:
    """Text in which `errors` replaces bytes that were not UTF-8, and halves of surrogate pairs; or
    messages with such text."""
    if isinstance(value, Mapping):
        return {name: _without_surrogates(one, where, errors) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_surrogates(one, where, errors) for one in value]
    if not isinstance(value, str):
        return value
    text = value
    try:
        return text.encode("utf-8", "strict" if errors == "strict" else "surrogateescape").decode(
            "utf-8", errors
        )
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        if errors != "strict":
            return text.encode("utf-8", errors).decode()
        raise ValueError(
            f"{where} has half of a surrogate pair, which UTF-8 lacks: give errors as 'replace' or "
            "'ignore'"
        ) from None


def content_of(value: Any, where: str, errors: str = "strict") -> Content:
    """`value` as a text, an array of tokens, or messages."""
    if isinstance(value, str):
        return str(_without_surrogates(value, where, errors))
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, Sequence) and value and all(isinstance(one, Mapping) for one in value):
        return [_without_surrogates(one, where, errors) for one in value]
    if isinstance(value, np.ndarray | Sequence) and not isinstance(value, bytes):
        try:
            tokens = np.asarray(value) if len(value) else np.empty(0, np.int64)
        except ValueError:  # lists of different lengths
            tokens = np.empty((0, 0))
        if tokens.ndim == 1 and tokens.dtype.kind in "iu":
            return tokens
    # The command line takes braces in an error for flags.
    shown = "an object" if isinstance(value, Mapping) else reprlib.repr(value)
    raise ValueError(
        f"{where} is {shown}: a document is a text, a list of tokens, or a list of messages with "
        "role and content"
    )
