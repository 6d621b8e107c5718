"""fastmem membership: tell members of the training set from non-members."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from fastmem.base.arguments import MAX_WORD, integer, user_path
from fastmem.base.stats import Floats
from fastmem.base.storage import Row, check_folder, read_json
from fastmem.base.terminal import say, show, table
from fastmem.cli.dataset import Flat
from fastmem.cli.score import default_device
from fastmem.cli.score_documents import DocumentFlags, TokenFileFlags, split_dtype
from fastmem.data.sequences import Tokens, from_description
from fastmem.memorization.membership import check_percentages
from fastmem.models.causal.load import RUN, tokenizer_of
from fastmem.models.scoring.document_tokenizer import DocumentTokenizer
from fastmem.models.scoring.folder import SUMMARY
from fastmem.models.scoring.labelled import Labelled, labelled_documents
from fastmem.models.scoring.scores import score
from fastmem.report import membership_study as study
from fastmem.report.membership_page import write_membership_page
from fastmem.report.score_page import last_name
from fastmem.report.sections import interval
from fastmem.sweeps.shadows import check_models, shadow_models

_CHECKED = 20
"""Documents whose tokens by a reference are compared before it scores all."""


@dataclass(frozen=True)
class Membership:
    """Tells members of a model's training set from non-members, by each score that one pass of the
    model gives, and by references or shadow models on request, with intervals. Blind baselines
    show whether members and non-members differ without any model. Writes membership.json,
    membership.parquet and membership.html to --out. The same command resumes a stopped study.

    Example: fastmem membership pythia --members seen/ --non-members unseen/ --out study
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Folder of a model of fastmem or transformers, a hub name, a GGUF file, or a PEFT adapter."""
    members: str | None = None
    """Documents of the training set: files or data sets as fastmem score takes them. Of a model of
    fastmem train, by default its training set."""
    non_members: str | None = None
    """Documents that are not in the training set, by default as many held-out sequences."""
    out: Path = Path("membership")
    """Folder of the study."""
    reference: str | None = None
    """A model with the same tokenizer that was not trained on the members: adds reference,
    reference_ratio and window_votes."""
    references: tuple[str, ...] = ()
    """Two or more such models: adds LiRA and RMIA, offline."""
    shadows: int = 0
    """Train this many models of the shape of MODEL together, each on a random half of all
    sequences, such as 16: adds LiRA and RMIA, online and offline. Of a model of fastmem train."""
    k: tuple[float, ...] = (20,)
    """Percentages of tokens that Min-K%, Min-K%++, Max-K% and surp take."""
    allow_overlap: bool = False
    """Take documents that are members and non-members."""
    seed: int = 0
    """Seed of halves, folds and draws."""
    files: Annotated[TokenFileFlags, Flat] = field(default_factory=TokenFileFlags)
    texts: Annotated[DocumentFlags, Flat] = field(default_factory=DocumentFlags)
    device: str = "auto"
    """Where to compute: auto (a GPU where there is one), cpu, cuda, cuda:1, …"""
    json: bool = False
    """Print membership.json instead of the table."""


def run_membership(command: Membership) -> int:
    _check_flags(command)
    row = _training(command.model)
    if command.shadows and row is None:
        raise ValueError(
            f"--shadows {command.shadows} trains models of the shape of {command.model}, which is "
            "not a folder of fastmem train: leave it out, or name models that exist by --references"
        )
    own = (study.TARGET, study.RESULT)
    if not command.texts.overwrite:
        check_folder(command.out, own, "study of membership")
    labelled, entropy = _labelled(command, row)
    result, scores, cases = _measured(command, labelled, row, entropy)
    study.write_study(command.out, result, scores, cases)
    page = write_membership_page(command.out, text=command.texts.text)
    if command.json:
        print(json.dumps(result, indent=1))
    else:
        show(f"{words(result)}\n\n{page}")
    return 0


def _check_flags(command: Membership) -> None:
    integer("seed", command.seed, 0, MAX_WORD)
    check_percentages(command.k)
    if command.shadows:
        check_models(command.shadows)
    if (command.members is None) != (command.non_members is None):
        raise ValueError("members need non-members: give --members and --non-members, or neither")
    if len(command.references) == 1:
        raise ValueError(
            f"--references {command.references[0]} is a single model: give two or more, or one as "
            "--reference"
        )
    if command.references and command.shadows:
        raise ValueError(
            f"--references and --shadows {command.shadows} give the same scores: leave one out"
        )


def _training(model: str) -> Row | None:
    """The row of the training of a model of fastmem train; None for another model."""
    path = user_path(model) / RUN
    return read_json(path) if path.exists() else None


def _labelled(command: Membership, row: Row | None) -> tuple[Labelled, float | None]:
    """The documents of both sides; and, of uniform tokens, the bits of a sequence's coded
    tokens."""
    files = command.files
    _, token_dtype = split_dtype(files.dtype)
    options: Row = {"field": command.texts.field, "errors": command.texts.errors}
    options |= {"column": files.column, "length": files.length, "vocab": files.vocab}
    options |= {"without": command.out}
    members: Any = command.members
    others: Any = command.non_members
    entropy = None
    if members is None:
        if row is None:
            raise ValueError(
                f"{command.model} has no {RUN} that records the members: give --members and "
                "--non-members"
            )
        members = from_description(row["sequences"])
        others = members.held_out(members.count)
        if members.kind == "uniform":
            entropy = members.coded_entropy_bits / members.count
    allow = command.allow_overlap
    found = labelled_documents(members, others, allow_overlap=allow, dtype=token_dtype, **options)
    return found, entropy


def _measured(
    command: Membership, labelled: Labelled, row: Row | None, entropy: float | None
) -> tuple[Row, dict[str, Floats], Row]:
    """Scores what the folder lacks; the content of membership.json, the scores, and the cases."""
    target = _scored(command, labelled, command.model, study.TARGET, ("entropy", "variance"))
    scores, notes = _from_passes(command, labelled, target)
    shadows = None
    if not command.shadows and (folder := command.out / study.SHADOWS).exists():
        say(f"{folder} has shadow models, which are left out: give --shadows again")
    if command.shadows and row is not None:
        shadows, more = _by_shadows(command, labelled, row, target)
        scores |= more
    if labelled.overlap:
        notes.append(f"{labelled.overlap:,} non-members are members too, as --allow-overlap allows")
    say(f"{len(scores)} scores; now intervals and blind baselines")
    found = study.quality(scores, labelled.labels, command.seed, progress=True)
    blind, warning, note = study.blind(labelled, command.seed)
    best = study.best_score(found)
    result = {
        "schema": study.SCHEMA,
        "model": command.model,
        "data": dict(zip(("members", "non_members"), labelled.names, strict=True)),
        "members": labelled.counts[0],
        "non_members": labelled.counts[1],
        "tokens": int(target.counts.sum()),
        "scores": found,
        "blind": blind,
        "warning": warning,
        "best": best,
        "expected": study.expected(target, labelled.counts[0], entropy),
        "notes": notes + [note] * bool(note),
        "reference": command.reference,
        "references": list(command.references),
        "shadows": shadows,
        "k": list(command.k),
        "seed": command.seed,
        "command": list(_as_typed(command)),
    }
    cases = study.confident_cases(labelled, target.documents["source"], scores[best])
    return result, scores, cases


def _from_passes(
    command: Membership, labelled: Labelled, target: study.Pass
) -> tuple[dict[str, Floats], list[str]]:
    """The scores of the target and of references, and what a reader must know of them."""
    reference = None
    if command.reference is not None:
        reference = _referred(command, labelled, target, command.reference, study.REFERENCE)
    scores, notes = study.target_scores(target, reference, command.k)
    if target.reason:
        notes.append(target.reason)
    if command.references:
        bits = np.stack([
            _referred(command, labelled, target, model, f"{study.REFERENCES}/{i}").means()
            for i, model in enumerate(command.references)
        ])  # fmt: skip
        scores |= study.ensemble_scores(target.means(), bits, np.zeros(bits.shape, np.bool_))
        notes.append("lira_online needs models that were trained on the sequences: --shadows")
    return scores, notes


def _scored(
    command: Membership, labelled: Labelled, model: str, name: str, also: tuple[str, ...] = ()
) -> study.Pass:
    """The pass of a model over all documents, from the folder if it is finished there."""
    weights, _ = split_dtype(command.files.dtype)
    flags = vars(command.texts)
    options = {name: value for name, value in flags.items() if name not in ("text", "also")}
    folder = command.out / name
    begun = command.texts.overwrite or not (folder / SUMMARY).exists()
    if begun:
        say(f"{model} scores {sum(labelled.counts):,} documents")
    score(
        model,
        labelled.documents,
        folder,
        dtype=weights,
        device=command.device,
        also=(*also, *command.texts.also) if also else (),
        progress=begun,
        **options,
    )
    return study.read_pass(folder, statistics=bool(also))


def _referred(
    command: Membership, labelled: Labelled, target: study.Pass, model: str, name: str
) -> study.Pass:
    """The pass of a reference; ValueError, before it scores if possible, for other tokens."""
    flags, first = command.texts, list(islice(labelled.documents, _CHECKED))
    tokenizer = tokenizer_of(model, flags.trust_remote_code)
    if tokenizer is not None and not isinstance(first[0].content, np.ndarray):
        tokenize = DocumentTokenizer(
            tokenizer, flags.bos, flags.special_tokens, flags.chat_template
        )
        ours = np.split(target.tokens["token"], np.cumsum(target.counts[: len(first)]))
        for one, tokens in zip(tokenize(first), ours, strict=False):
            if not np.array_equal(one.tokens[len(one.tokens) - one.coded :], tokens):
                raise ValueError(study.other_tokenizer(model, one.source))
    found = _scored(command, labelled, model, name)
    study.check_same_tokens(target, found, model)
    return found


def _by_shadows(
    command: Membership, labelled: Labelled, row: Row, target: study.Pass
) -> tuple[Row, dict[str, Floats]]:
    """How shadow models were trained, and the scores by them."""
    tokens = _tokens(labelled)
    found = shadow_models(
        row,
        tokens,
        command.shadows,
        command.out / study.SHADOWS,
        seed=command.seed,
        device=default_device(command.device),
        overwrite=command.texts.overwrite,
        progress=True,
    )
    means = found.bits / (tokens.shape[1] - 1)
    scores = study.ensemble_scores(target.means(), means, found.is_member)
    train = found.settings["train"]
    told = {"models": command.shadows, "sequences": len(tokens) // 2, "steps": train["steps"]}
    return told, scores


def _tokens(labelled: Labelled) -> Tokens:
    """(N, S) tokens of all documents."""
    rows: list[Tokens] = []
    for document in labelled.documents:
        content = document.content
        if not isinstance(content, np.ndarray) or (rows and len(content) != len(rows[0])):
            what = f"{len(content)} tokens" if isinstance(content, np.ndarray) else "text"
            raise ValueError(
                f"--shadows trains on tokens of one length, and {document.source} is {what}: cut "
                "the data into sequences of tokens, or give --references"
            )
        rows.append(content)
    return np.stack(rows)


def words(result: Row) -> str:
    """A sentence, the table of scores and of blind baselines, and what a reader must know."""
    members, others = result["members"], result["non_members"]
    lines = [
        f"{members:,} members and {others:,} non-members under {last_name(result['model'])}",
        "",
    ]
    rows = [["score", "AUC", "TPR at 1 %", "0.1 %", "F1"]]
    for name, one in sorted(result["scores"].items(), key=lambda item: -item[1]["auc"]["estimate"]):
        low, lower = one["tpr"].values()
        rates = ["-" if low["reason"] else interval(low, ".3f")]
        rates += ["-" if lower["reason"] else f"{lower['estimate']:.3f}"]
        rows.append(
            [
                name,
                interval(one["auc"], ".3f"),
                *rates,
                f"{one['f1']['calibrated']['estimate']:.3f}",
            ]
        )
    for name, one in result["blind"].items():
        rows.append([f"blind: {name}", interval(one["auc"], ".3f"), "", "", ""])
    lines += [table(rows, rule=True), ""]
    reasons = {r["reason"] for one in result["scores"].values() for r in one["tpr"].values()}
    lines += [f"TPR {reason}" for reason in sorted(filter(None, reasons))]
    lines.append("F1 at the threshold of a calibration half; always answering member has 0.667.")
    if result["expected"]:
        told = result["expected"]
        lines.append(
            f"{told['memorized_bits_a_sequence']:.2f} memorized bits a sequence predict an AUC of "
            f"{told['auc']:.3f}."
        )
    if result["warning"]:
        lines.append(f"warning: {result['warning']}")
    return "\n".join([*lines, *result["notes"]])


def _as_typed(
    command: Any, beside: tuple[str, ...] = ("json", "overwrite", "device")
) -> Iterator[str]:
    """The words of the command that gives this result again."""
    if isinstance(command, Membership):
        yield from ("fastmem", "membership", command.model)
    for one in fields(command):
        value = getattr(command, one.name)
        if is_dataclass(value):
            yield from _as_typed(value)
        elif one.name not in ("model", *beside) and value != one.default:
            flag = one.name.replace("_", "-")
            values = value if isinstance(value, tuple) else (value,)
            if isinstance(value, bool):
                yield f"--{flag}" if value else f"--no-{flag}"
            else:
                yield from (f"--{flag}", *map(str, values))
