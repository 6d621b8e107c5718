"""The sequences of which a model returns most tokens, with their text, for the page."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastmem.base.storage import Row, write_document
from fastmem.data.documents import Documents
from fastmem.models.extraction.folder import PASSAGES, ExtractionFolder
from fastmem.models.extraction.measure import Columns, Plan
from fastmem.models.extraction.rates import bits_name
from fastmem.models.extraction.slide import by_document, heat, in_json, least_bits, verbatim_run
from fastmem.models.scoring.document_tokenizer import DocumentTokenizer
from fastmem.models.scoring.passages import pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT = {"train": 8, "test": 3}
"""Sequences of each set that are shown."""
SHOWN_TOKENS = 200
"""Most tokens of a sequence that are shown."""
MAPS, MAP_TOKENS = {"train": 5, "test": 2}, 1500
"""Documents of each set with a heat map, and the most tokens of their text."""
BEFORE = 40
"""Tokens of text before the longest run."""
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
    if plan.stride is not None:
        found["slide"] = _slides(columns, opened, tokenize, plan, decode)
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


def _slides(
    columns: Columns,
    opened: dict[str, Documents],
    tokenize: DocumentTokenizer,
    plan: Plan,
    decode: Callable[[list[int]], str] | None,
) -> list[Row]:
    """The documents with the longest verbatim runs: bits by place, and the text around the run."""
    prefix, suffix = max(plan.prefixes), plan.suffix
    assert suffix is not None
    column = columns[bits_name(prefix, plan.ways[0])]
    found = []
    matched = columns[f"matched_{prefix}"]
    ranked: dict[str, list[Any]] = {name: [] for name in MAPS}
    for name, document, rows in by_document(columns):
        run = verbatim_run(columns["start"][rows], prefix, matched[rows])
        ranked[name].append((-run[1], float(column[rows].min()), name, document, rows, run))
    best = [
        one for n, many in ranked.items() for one in sorted(many, key=lambda x: x[:2])[: MAPS[n]]
    ]
    for _, _, name, document, rows, (begin, count) in best:
        tokens = tokens_of(opened[name], tokenize, document)
        starts = columns["start"][rows]
        least = least_bits(starts, prefix, suffix, column[rows], len(tokens))
        first = max(0, (begin if count else int(least.argmin())) - BEFORE)
        shown = tokens[first : first + MAP_TOKENS].tolist()
        found.append(
            {
                "set": name,
                "source": columns["source"][rows[0]],
                "length": len(tokens),
                "run": {"start": begin, "tokens": count},
                "heat": heat(least),
                "start": first,
                "tokens": shown,
                "texts": _pieces(shown, decode) if decode else None,
                "bits": in_json(least[first : first + MAP_TOKENS]),
            }
        )
    return found


def _pieces(tokens: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """`pieces` of a long text, a part at a time, since it decodes each beginning."""
    parts = (tokens[i : i + SHOWN_TOKENS] for i in range(0, len(tokens), SHOWN_TOKENS))
    return [piece for part in parts for piece in pieces(part, decode)]


def tokens_of(
    documents: Documents, tokenize: DocumentTokenizer, number: int
) -> NDArray[np.integer[Any]]:
    """The tokens of one document, without a BOS that is added."""
    document = next(iter(tokenize([next(iter(documents.after(number)))])))
    return document.tokens[document.added :]
