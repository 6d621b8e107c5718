"""A study of membership: scores and their quality from the passes in its folder.

N sequences, members first; E shadow or reference models.
"""

import warnings
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmem.base.stats import Floats
from fastmem.base.storage import Row, write_document
from fastmem.base.terminal import progress_bar
from fastmem.data.files.parquet import write_table
from fastmem.memorization.blind_baselines import blind_baselines, blind_warning
from fastmem.memorization.membership import Ragged, membership_scores
from fastmem.memorization.membership_law import expected_membership
from fastmem.memorization.roc import roc
from fastmem.memorization.shadow_models import lira, rmia
from fastmem.models.scoring.folder import TOKENS, read_columns
from fastmem.models.scoring.labelled import Labelled, contents_of
from fastmem.models.scoring.scores import read_scores

SCHEMA = 1
RESULT, TABLE, CASES, PAGE = (
    "membership.json",
    "membership.parquet",
    "cases.json",
    "membership.html",
)
TARGET, REFERENCE, REFERENCES, SHADOWS = "target", "reference", "references", "shadows"
"""Folders of scores inside the folder of a study, and the folder of its shadow models."""
BLIND_MOST = 5000
"""Documents of a side that the blind baselines see, at even distances."""
CASES_EACH, CASE_CHARACTERS = 3, 400
KINDS = {
    "members, rightly": (True, True),
    "non-members, rightly": (False, False),
    "members, though they are not": (False, True),
    "non-members, though they are members": (True, False),
}
"""What the most confident cases are called: whether they are members, and score high."""


class Pass(NamedTuple):
    """The scores of all documents under one model."""

    tokens: dict[str, NDArray[Any]]
    """Columns of tokens.parquet, the documents end to end."""
    counts: NDArray[np.int64]  # (N,)
    """Tokens with bits of each document."""
    documents: dict[str, NDArray[Any]]
    reason: str | None
    """Why the model was scored through its logits; None if it was not."""

    def ragged(self, name: str) -> Ragged:
        """A column of tokens as an array for each document."""
        values = self.tokens[name]
        if (self.counts == self.counts[0]).all():
            return values.reshape(len(self.counts), -1)
        return np.split(values, np.cumsum(self.counts)[:-1])

    def means(self) -> Floats:  # (N,)
        """Bits a token of each document."""
        return np.asarray(self.documents["bits"] / self.counts)


def read_pass(folder: Path, statistics: bool = False) -> Pass:
    """The scores in a finished folder of `fastmem score`, with entropy and variance if asked for.

    Raises:
        ValueError: a document without a token that has bits.
    """
    found = read_scores(folder)
    names = ["token", "bits", *(["entropy_bits", "variance"] if statistics else [])]
    counts = found.documents["coded_tokens"]
    if not counts.all():
        empty = found.documents["source"][counts == 0]
        raise ValueError(
            f"{empty[0]} has no token with bits ({len(empty)} of {len(counts)} documents): leave "
            "it out, or give --bos always, with --overwrite"
        )
    tokens = read_columns(folder / TOKENS, names)
    return Pass(tokens, counts, found.documents, found.summary["reason"])


def check_same_tokens(target: Pass, other: Pass, name: str) -> None:
    """ValueError if a reference read other tokens than the target."""
    same = np.array_equal(target.counts, other.counts)
    if same and np.array_equal(target.tokens["token"], other.tokens["token"]):
        return
    wrong = target.counts != other.counts
    row = int(wrong.argmax())
    if same:
        place = int((target.tokens["token"] != other.tokens["token"]).argmax())
        row = int(np.searchsorted(np.cumsum(target.counts), place, "right"))
    raise ValueError(other_tokenizer(name, target.documents["source"][row]))


def other_tokenizer(name: str, source: str) -> str:
    """The error of a reference whose tokens are not the target's."""
    return (
        f"the reference {name} has another tokenizer than the model ({source} is other tokens "
        "there): give a reference with the same tokenizer"
    )


def target_scores(
    target: Pass, reference: Pass | None, k: Sequence[float]
) -> tuple[dict[str, Floats], list[str]]:
    """The scores of one pass of the target and, if given, one of a reference, by name; and the
    warnings.

    They are those of `fastmem.membership_scores`. Without text, zlib compresses the coded tokens
    as integers of 16 bits, of 32 if a token needs them.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = membership_scores(
            target.ragged("bits"),
            entropy=target.ragged("entropy_bits"),
            variance=target.ragged("variance"),
            reference=None if reference is None else reference.ragged("bits"),
            k=k,
        )
    named = {"loss": scores["loss"], "zlib": scores["loss"] / _compressed(target), **scores}
    return named, [str(warning.message) for warning in caught]


def _compressed(target: Pass) -> Floats:
    """(N,) bytes after zlib."""
    known: Floats = np.asarray(target.documents["zlib_bits"], np.float64) / 8
    missing = np.flatnonzero(np.isnan(known))
    if missing.size:
        known = known.copy()
        starts = np.cumsum(target.counts) - target.counts
        tokens = target.tokens["token"]
        tokens = tokens.astype("<u2" if tokens.max() < 2**16 else "<u4")
        for i in missing:
            known[i] = len(zlib.compress(tokens[starts[i] : starts[i] + target.counts[i]].data))
    return known


def ensemble_scores(
    target: Floats, models: Floats, is_member: NDArray[np.bool_]
) -> dict[str, Floats]:
    """LiRA and RMIA from (N,) bits a token of the target and (E, N) of other models.

    Online forms need models that were trained on the sequences. rmia is then the online form, else
    the offline form.
    """
    inside = is_member.sum(0)
    online, outside = bool(is_member.any()), len(models) - inside
    several = outside.min() >= 2 and (not online or inside.min() >= 2)
    scores = {}
    for form in ("offline", "online")[: 1 + online]:
        of_form = partial(lira, target, models, is_member, online=form == "online")
        scores[f"lira_{form}"] = of_form()
        if several:
            scores[f"lira_{form}_example"] = of_form(variance="example")
    scores["rmia"] = rmia(target, models, is_member, online=online)
    if online:
        scores["rmia_offline"] = rmia(target, models, is_member, online=False)
    return scores


def blind(labelled: Labelled, seed: int) -> tuple[Row, str | None, str | None]:
    """The AUC of the blind baselines, their warning, and a note on what they did not see."""
    numbers = _spread(labelled.counts)
    texts = contents_of(labelled, numbers)
    labels = labelled.labels[numbers]
    try:
        found = blind_baselines([texts[n] for n in numbers], labels, seed=seed)
    except ValueError as error:  # no word is in two texts, or scikit-learn is not installed
        return {}, None, f"no blind baselines: {error}"
    note = None
    if len(numbers) < len(labelled.labels):
        note = f"the blind baselines see {len(numbers):,} of {len(labelled.labels):,} sequences"
    values = {name: {"auc": interval.to_dict()} for name, interval in found.items()}
    return values, blind_warning(found), note


def _spread(counts: tuple[int, int]) -> list[int]:
    """Up to BLIND_MOST numbers of documents of each side, at even distances."""
    found: list[int] = []
    for begin, count in zip((0, counts[0]), counts, strict=True):
        places = np.linspace(0, count - 1, min(count, BLIND_MOST)).astype(int)
        found += (begin + places).tolist()
    return found


def quality(
    scores: dict[str, Floats], labels: NDArray[np.bool_], seed: int, progress: bool
) -> dict[str, Row]:
    """`fastmem.roc` of each score, as plain values."""
    found = {}
    form = "{desc} |{bar}| {n}/{total}{postfix}"
    with progress_bar(progress, len(scores), form, desc="intervals", unit=" scores") as bar:
        for name, values in scores.items():
            found[name] = roc(values, labels, seed=seed).to_dict()
            bar.update(1)
            bar.set_postfix_str(name)
    return found


def best_score(found: dict[str, Row]) -> str:
    """The score with the highest AUC, the first of several."""
    return max(found, key=lambda name: found[name]["auc"]["estimate"])


def expected(target: Pass, members: int, entropy_bits: float | None) -> Row | None:
    """What memorized bits predict for sequences of uniform tokens; None for other data."""
    if entropy_bits is None:
        return None
    memorized = entropy_bits - float(target.documents["bits"][:members].mean())
    predicted = expected_membership(memorized)
    return {
        "memorized_bits_a_sequence": memorized,
        **{name: float(value) for name, value in predicted.items()},
    }


def confident_cases(
    labelled: Labelled, sources: NDArray[Any], scores: Floats
) -> dict[str, list[Row]]:
    """The sequences of which a score is most certain, rightly and wrongly, with their text."""
    labels, order = labelled.labels, np.argsort(scores, kind="stable")
    chosen = {}
    for kind, (member, high) in KINDS.items():
        of_kind = order[labels[order] == member]
        chosen[kind] = (of_kind[::-1] if high else of_kind)[:CASES_EACH].tolist()
    texts = contents_of(labelled, [n for numbers in chosen.values() for n in numbers])
    return {
        kind: [
            {
                "sequence": n,
                "source": str(sources[n]),
                "score": float(scores[n]),
                "rank": float((scores < scores[n]).mean() + (scores == scores[n]).mean() / 2),
                "text": texts[n][:CASE_CHARACTERS],
                "is_cut": len(texts[n]) > CASE_CHARACTERS,
            }
            for n in numbers
        ]
        for kind, numbers in chosen.items()
    }


def write_study(folder: Path, result: Row, scores: dict[str, Floats], cases: Row) -> None:
    """Writes membership.parquet, cases.json and, last, membership.json."""
    import pyarrow

    members, others = result["members"], result["non_members"]
    labels = np.arange(members + others) < members
    table = pyarrow.table({"sequence": np.arange(len(labels)), "is_member": labels, **scores})
    write_table(folder / TABLE, table, compression="zstd")
    write_document(folder / CASES, cases)
    write_document(folder / RESULT, result)
