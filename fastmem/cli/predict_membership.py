"""fastmem predict --membership: F1 of a threshold on bits, by laws that are compared."""

import json
from collections.abc import Sequence
from math import log2
from pathlib import Path

from fastmem.base.arguments import MAX_WORD, integer
from fastmem.base.storage import Row
from fastmem.base.terminal import show, table
from fastmem.models.gpt import GPTConfig
from fastmem.report.sections import interval
from fastmem.sweeps.membership import membership_rows
from fastmem.sweeps.membership_laws import FORMS, compared, predicted, study_of
from fastmem.sweeps.store import load_rows

PUBLISHED = (
    ("48 × 1600", 1_556_075_200, 170_654_583, 0.55, 0.5461),
    ("48 × 1600", 1_556_075_200, 18_851_574, 0.95, 0.9585),
    ("12 × 768", 123_702_528, 13_566_442, 0.55, 0.5344),
    ("12 × 768", 123_702_528, 1_498_634, 0.95, 0.9798),
)
"""Shape, parameters, sequences, predicted and observed F1 of arXiv 2505.24832."""
PUBLISHED_DRAWS, PUBLISHED_ENTROPY = 1_000_000 * 2048, 63 * log2(50257)
"""Sequences in a million steps of 2048, and the bits of one under a uniform code."""


def predict_membership(
    folders: Sequence[Path],
    shape: GPTConfig | None,
    count: int | None,
    epochs: float | None,
    as_json: bool,
) -> None:
    """Fits and compares the laws, predicts, and prints."""
    rows = {folder: load_rows(folder) for folder in folders}
    records = [record for folder in folders for record in membership_rows(folder, rows[folder])]
    if not records:
        raise ValueError(
            f"{folders[0]} lacks a finished run with stored bits: run fastmem capacity with "
            "--sequence-bits"
        )
    study = study_of(records)
    targets = [
        (float(P), float(N), PUBLISHED_DRAWS / N, PUBLISHED_ENTROPY) for _, P, N, _, _ in PUBLISHED
    ]
    if shape is not None:
        if count is None:
            raise ValueError("--count is missing: give the sequences of the data set to predict")
        integer("--count", count, 1, MAX_WORD)
        entropy = (shape.length - 1) * log2(shape.vocab)
        seen = _epochs(rows[folders[0]][0], count, epochs)
        targets.append((float(shape.parameter_count), float(count), seen, entropy))
    f1 = [{name: one.to_dict() for name, one in each.items()} for each in predicted(study, targets)]
    found: Row = {
        "laws": compared(study),
        "published_models": [
            {"shape": name, "parameters": P, "count": N, "printed": printed, "observed": observed}
            | one
            for (name, P, N, printed, observed), one in zip(PUBLISHED, f1, strict=False)
        ],
    }
    if shape is not None:
        found["prediction"] = {
            "layers": shape.layers,
            "width": shape.width,
            "parameters": shape.parameter_count,
            "count": count,
            "epochs": targets[-1][2],
            **f1[-1],
        }
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show("\n".join(words(found)))


def words(found: Row) -> list[str]:
    """Tables of the errors and of the predictions, and which form is better."""
    laws = found["laws"]
    sizes = laws["sizes"]
    head = ("error of F1, percentage points", "largest left out", "each size left out")
    errors = [
        (FORMS[form], *(f"{100 * laws[name][form]:.1f}" for name in ("largest", "each_size")))
        for form in FORMS
    ]
    ratio = laws["largest"]["published"] / max(1e-9, laws["largest"]["budget"])
    lines = [
        f"{laws['runs']} runs of {len(sizes)} models from {sizes[0]:,} to {sizes[-1]:,} parameters",
        "",
        table([head, *errors], rule=True),
        "",
        f"On models of {laws['left_out']:,} parameters, which no fit has seen, "
        f'"{FORMS[laws["better"]]}" predicts better'
        + (f": {ratio:.1f} times less error than as published." if ratio > 1 else ".")
        + f" From the measured bits of each run F1 is right to "
        f"{100 * laws['from_own_bits']:.1f} points.",
        "",
        _published_table(found["published_models"]),
        "They were trained on text for a million steps of 2048: far outside of these runs.",
    ]
    if one := found.get("prediction"):
        rows = [(FORMS[form], interval(one[form], ".3f")) for form in FORMS]
        rows.append(("memorized bits a sequence", interval(one["memorized_bits"], ",.3g")))
        what = f"{one['layers']} × {one['width']}, {one['parameters']:,} parameters"
        what += f", {one['count']:,} sequences, {one['epochs']:,.4g} epochs"
        lines += ["", table([(what, "F1"), *rows], rule=True)]
    return lines


def _published_table(models: list[Row]) -> str:
    head = (
        "published",
        "sequences",
        "F1 observed",
        "printed law",
        "as published, refitted",
        "ours",
    )
    rows = [
        (
            one["shape"],
            f"{one['count']:,}",
            f"{one['observed']:.3f}",
            f"{one['printed']:.2f}",
            f"{one['published']['estimate']:.2f}",
            interval(one["budget"]),
        )
        for one in models
    ]
    return table([head, *rows], rule=True)


def _epochs(row: Row, count: int, epochs: float | None) -> float:
    """The epochs of the prediction: those asked for, or the budget of the sweep."""
    if epochs is not None:
        if not epochs > 0:
            raise ValueError(f"--epochs must be above 0, not {epochs}")
        return epochs
    train = row["train"]
    if train["epochs"] is not None:
        return float(train["epochs"])
    if train["steps"] is not None:
        return float(train["steps"] * min(train["batch"], count) / count)
    raise ValueError("the runs have a budget in seconds: give --epochs of the model to predict")
