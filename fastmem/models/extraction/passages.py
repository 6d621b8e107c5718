"""The sequences that come out longest, with their text, for the page."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastmem.base.storage import Row
from fastmem.data.documents import Documents
from fastmem.models.extraction.folder import PASSAGES, ExtractionFolder, write_document
from fastmem.models.extraction.measure import Columns, Plan
from fastmem.models.scoring.document_tokenizer import DocumentTokenizer
from fastmem.models.scoring.passages import pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT = {"train": 8, "test": 3}
"""Sequences of each set that are shown."""
SHOWN_TOKENS = 200
"""Most tokens of a sequence that are shown."""
LOOKED_AT = 50
"""Candidates for the sequences shown, of which equal ones are left out."""


def write_passages(
    folder: ExtractionFolder,
    columns: Columns,
    opened: dict[str, Documents],
    tokenize: DocumentTokenizer,
    plan: Plan,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> None:
    """Writes passages.json: of each set the sequences of which most tokens come out verbatim."""
    decode = None if tokenizer is None else lambda ids: str(tokenizer.decode(ids))
    found = {
        name: _longest(name, columns, documents, tokenize, plan, decode)
        for name, documents in opened.items()
    }
    write_document(folder.path / PASSAGES, found)


def _longest(
    name: str,
    columns: Columns,
    documents: Documents,
    tokenize: DocumentTokenizer,
    plan: Plan,
    decode: Callable[[list[int]], str] | None,
) -> list[Row]:
    """The sequences of a set with the most tokens verbatim after one of the prefixes; of equal ones
    those with the fewest bits."""
    rows = np.flatnonzero(columns["set"] == name)
    matched = np.stack([columns[f"matched_{prefix}"][rows] for prefix in plan.prefixes])
    matched = np.where(np.isnan(matched), -1, matched)
    which = matched.argmax(0)  # of equal ones the shortest prefix
    most = matched.max(0)
    bits = np.stack([columns[f"bits_{prefix}"][rows] for prefix in plan.prefixes])
    order = np.lexsort((bits[which, np.arange(len(rows))], -most))
    found: list[Row] = []
    for place in order[:LOOKED_AT]:
        if most[place] < 1 or len(found) == KEPT[name]:
            break
        row, prefix = rows[place], plan.prefixes[which[place]]
        document, start = int(columns["document"][row]), int(columns["start"][row])
        tokens = tokens_of(documents, tokenize, document)
        end = start + int(columns["tokens"][row])
        shown = tokens[start : min(end, start + SHOWN_TOKENS)].tolist()
        if any(other["tokens"] == shown for other in found):
            continue
        found.append(
            {
                "document": document,
                "source": columns["source"][row],
                "start": start,
                "length": end - start,
                "prefix": prefix,
                "matched": int(most[place]),
                "bits": float(bits[which[place], place]),
                "tokens": shown,
                "texts": pieces(shown, decode) if decode else None,
            }
        )
    return found


def tokens_of(
    documents: Documents, tokenize: DocumentTokenizer, number: int
) -> NDArray[np.integer[Any]]:
    """The tokens of one document, without a BOS that is added."""
    document = next(iter(tokenize([next(iter(documents.after(number)))])))
    return document.tokens[document.added :]
