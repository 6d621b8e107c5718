"""text.json: the numbers of a text sweep, from its folder.

N members and N held-out sequences of a run, M of the test split, S tokens a sequence, K canaries.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import get_args

import numpy as np

from fastmem.base.stats import Floats
from fastmem.base.storage import Row, write_document
from fastmem.memorization.unintended import Code, over_seeds, total_unintended
from fastmem.report.text_exhibits import double_descent_of, rarity_of
from fastmem.report.text_runs import CODES
from fastmem.report.text_study import TextRun, TextStudy
from fastmem.sweeps.membership import membership_rows

TEXT_JSON = "text.json"
REPLICATES = 2000
Found = dict[str, dict[Code, dict[str, Floats]]]
"""Estimates with their replicates, by code of H(x), by code of both likelihoods, by field of
Unintended; "net_test" is net of the test split."""


def write_text_json(study: TextStudy) -> Row:
    """Writes text.json into the folder of a study and returns its content.

    Raises:
        ValueError: no run is finished.
        OSError: the folder cannot be written.
    """
    found = text_json(study)
    write_document(study.folder / TEXT_JSON, found)
    return found


def text_json(study: TextStudy) -> Row:
    """The content of text.json; docs/method.md lists its fields.

    Raises:
        ValueError: no run is finished.
    """
    if not study.runs:
        raise ValueError(f"{study.folder} holds no finished run: run `fastmem text` again")
    counts, corpus = study.corpus.counts, study.corpus
    of_model = groupby(study.runs, lambda run: (run.row["model"], run.row["precision"]))
    return {
        "corpus": {**counts, "hash": corpus.hash, "length": corpus.train.length},
        "reference": study.reference,
        "strengths": [
            {"name": one.name, "bits_per_byte": one.bits_per_byte} for one in study.strengths
        ],
        "compressors": list(study.compressors),
        "capacity_from": study.capacity_from,
        "models": [_model(study, list(runs)) for _, runs in of_model],
        "canaries": canaries_of(study),
        "double_descent": double_descent_of(study).to_dict(),
        "rarity": rarity_of(study),
        "membership": membership_rows(study.folder, [run.row for run in study.runs]),
    }


def _model(study: TextStudy, runs: Sequence[TextRun]) -> Row:
    found = [_found(study, run) for run in runs]
    first = runs[0]
    sizes = sorted({run.count for run in runs})
    capacity = study.capacity_bits.get(first.shape)
    return {
        **first.row["model"],
        "parameters": first.parameters,
        "precision": first.row["precision"],
        "capacity_bits": capacity,
        "runs": [_run(study, *one) for one in zip(runs, found, strict=True)],
        "sizes": [
            _size(size, [one for run, one in zip(runs, found, strict=True) if run.count == size])
            for size in sizes
        ],
    }


def _found(study: TextStudy, run: TextRun) -> Found:
    found: Found = {}
    for name, ours in run.codes.items():
        found[name] = {}
        for code in get_args(Code):
            sets = {
                "": (run.held_out, ours[1], run.held_out_documents),
                "_test": (run.test, run.test_codes[name], run.test_documents),
            }
            values: dict[str, Floats] = {}
            for suffix, (bits, theirs, documents) in sets.items():
                total = total_unintended(
                    run.members,
                    ours[0],
                    bits,
                    theirs,
                    study.uniform_bits,
                    documents=run.member_documents,
                    held_out_documents=documents,
                    paired=not suffix,
                    code=code,
                    replicates=REPLICATES,
                    seed=run.seed,
                )
                of = total.replicates
                values |= {f"net{suffix}": of["net"]} if suffix else of
            found[name][code] = values
    return found


def _run(study: TextStudy, run: TextRun, found: Found) -> Row:
    capacity = study.capacity_bits.get(run.shape)
    entropy = {name: float(run.codes[name][0].sum()) for name in CODES}
    planted = run.canaries[0].size * study.canary_bits
    coded = study.corpus.train.length - 1
    return {
        "count": run.count,
        "seed": run.seed,
        "entropy_bits": entropy,
        "entropy_over_capacity": {
            name: None if capacity is None else (entropy[name] + planted) / capacity
            for name in CODES
        },
        "memorization_bits": _interval(found["uniform"]["max"]["memorization"]),
        "unintended_bits": {name: _unintended(found[name]) for name in CODES},
        "generalization_bits": {
            name: float(found[name]["max"]["generalization"][0]) for name in CODES
        },
        "train_bits_per_token": float(run.members.mean()) / coded,
        "held_out_bits_per_token": float(run.held_out.mean()) / coded,
        "test_bits_per_token": float(run.test.mean()) / coded,
        "test_sequences": int(run.test.size),
        "canaries": _canaries([run], study.canary_bits),
    }


def _unintended(found: dict[Code, dict[str, Floats]]) -> Row:
    """Sums over members and over held-out sequences by both codes, and their differences."""
    values: Row = {code: float(found[code]["unintended"][0]) for code in found}
    values |= {f"held_out_{code}": float(found[code]["held_out"][0]) for code in found}
    return values | {
        "net": _interval(found["max"]["net"]),
        "net_mixture": _interval(found["mixture"]["net"]),
        "net_test": _interval(found["max"]["net_test"]),
    }


def _size(count: int, found: Sequence[Found]) -> Row:
    """The mean over seeds, with intervals over seeds and documents."""

    def mean(name: str, code: Code, field: str) -> Row:
        return over_seeds([one[name][code][field] for one in found]).to_dict()

    return {
        "count": count,
        "seeds": len(found),
        "memorization_bits": mean("uniform", "max", "memorization"),
        "unintended_bits": {
            name: {
                "net": mean(name, "max", "net"),
                "net_mixture": mean(name, "mixture", "net"),
                "net_test": mean(name, "max", "net_test"),
            }
            for name in CODES
        },
        "generalization_bits": {name: mean(name, "max", "generalization") for name in CODES},
    }


def _interval(values: Floats) -> Row:
    return over_seeds([values]).to_dict()


def canaries_of(study: TextStudy) -> Row | None:
    """Unintended memorization of canaries, planted and never trained on, against the uniform code.

    Summed over the runs with the smallest data set of each model and seed, which is memorized. The
    interval is a bootstrap over canaries; a canary of a seed is the same in all models. None
    without canaries.
    """
    smallest: dict[tuple[str, str, int], TextRun] = {}
    for run in study.runs:
        key = (run.shape, run.row["precision"], run.seed)
        if run.canaries[0].size and run.count <= smallest.get(key, run).count:
            smallest[key] = run
    if not smallest:
        return None
    runs = list(smallest.values())
    return {
        "each_bits": study.canary_bits,
        "counts": sorted({run.count for run in runs}),
        **_canaries(runs, study.canary_bits),
    }


def _canaries(runs: Sequence[TextRun], each: float) -> Row:
    """Of the canaries "planted" and "held_out" of these runs, each as many; None without any."""
    planted, others = (np.concatenate([run.canaries[which] for run in runs]) for which in (0, 1))
    if not planted.size:
        return {"planted": None, "held_out": None}
    canary = np.concatenate([run.seed * 2**20 + np.arange(run.canaries[0].size) for run in runs])
    known = np.full(planted.size, each)
    found = total_unintended(
        planted, known, others, known, each, documents=canary, held_out_documents=canary
    )
    return {
        name: {
            "count": planted.size,
            "entropy_bits": each * planted.size,
            "unintended_bits": bits.to_dict(),
        }
        for name, bits in (("planted", found.unintended), ("held_out", found.held_out))
    }
