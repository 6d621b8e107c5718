"""Made-up text studies: a small corpus of real files, and bits that follow a given course.

The reference codes each sequence in about 40 bits of the 120 of the uniform code (S = 16, V = 256).
A model saves `saved(N)` bits on each member and loses `lost(N)` on each held-out sequence, and 10
more on one of another document; each sequence has noise of its own.
"""

import random
from collections.abc import Callable, Sequence
from math import log2
from pathlib import Path
from typing import Any, get_args

import numpy as np

from fastmem.data.corpus import prepare_text
from fastmem.data.text import TextCorpus
from fastmem.memorization.unintended import Code, total_unintended
from fastmem.models.gpt import GPTConfig
from fastmem.report.text_runs import CODES
from fastmem.report.text_study import Strength, TextRun, TextStudy

Row = dict[str, Any]

S, V = 16, 256
UNIFORM = (S - 1) * log2(V)
COUNTS = (10, 30, 90, 270)
SOURCE = "wibble"
EVIL = "</p><i>&</i>"
WORDS = ["zorkle", "quuxon", "wobblesnatch", "fnordic", "blargh", "Дом", "вода"]


def rises_and_falls(N: int) -> float:
    """40 bits of each sequence up to N = 90, then 900 bits in all."""
    return 40.0 if N <= 90 else 900 / N


def corpus(folder: Path, documents: int = 160) -> TextCorpus:
    """About 4,000 sequences of made-up words and some HTML, in files named wibble."""
    rng = random.Random(0)
    files = folder.with_name("files")
    files.mkdir(exist_ok=True)
    for i in range(documents):
        words = [EVIL, *rng.choices([*WORDS, f"n{rng.random()}"], k=60), EVIL]
        (files / f"{SOURCE}-{i}.txt").write_text(" ".join(words))
    return prepare_text(files, folder, length=S)


def made_study(
    folder: Path,
    saved: Callable[[int], float] = rises_and_falls,
    lost: Callable[[int], float] = lambda N: 5.0,
    *,
    widths: Sequence[int] = (8, 16),
    counts: Sequence[int] = COUNTS,
    seeds: Sequence[int] = (0, 1),
    canaries: int = 4,
    uniform: bool = True,
    noise: float = 3.0,
) -> TextStudy:
    """A study in memory; only its corpus is in the folder."""
    of_text = corpus(folder / "corpus")
    runs, codes = [], {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        codes[seed] = [40 + 4 * rng.standard_normal(max(counts)) for _ in range(3)]
    for width in widths:
        for N in counts:
            for seed in seeds:
                runs.append(
                    _run(of_text, width, N, seed, codes[seed], saved, lost, canaries, noise)
                )
    weak = {seed: (a + 20, b + 20) for seed, (a, b, _) in codes.items()}
    strong = {seed: (a, b) for seed, (a, b, _) in codes.items()}
    parameters = {run.shape: run.parameters for run in runs}
    return TextStudy(
        folder=folder,
        corpus=of_text,
        runs=tuple(runs),
        strengths=(
            Strength("1 × 16, 100 steps", 4.0, weak),
            Strength("2 × 64, 1,000 steps", 2.7, strong),
        ),
        capacity_bits={name: 2.0 * P for name, P in parameters.items()},
        capacity_from="a folder of made-up capacities",
        uniform=tuple(_uniform(width, load) for width in widths for load in UNIFORM_BITS) * uniform,
        canary_bits=UNIFORM,
        reference={
            "name": "2 × 64, 1,000 steps",
            "bits_per_byte": 2.7,
            "convention": "tokens 2 to S given token 1",
            "parameters": 100_000,
            "saw_training": False,
        },
        compressors=("deflate", "uniform"),
    )


UNIFORM_BITS = {0.3: 126.0, 0.7: 140.0, 1.4: 133.0, 2.8: 121.0}
"""Bits of a held-out sequence of uniform data by entropy over capacity."""


def _run(
    of_text: TextCorpus,
    width: int,
    N: int,
    seed: int,
    codes: Sequence[Any],
    saved: Callable[[int], float],
    lost: Callable[[int], float],
    canaries: int,
    noise: float,
) -> TextRun:
    rng = np.random.default_rng([width, N, seed])
    references = [bits[:N] for bits in codes]
    members = references[0] - saved(N) + noise * rng.standard_normal(N)
    held_out = references[1] + lost(N) + noise * rng.standard_normal(N)
    test = references[2] + 10 + lost(N) + noise * rng.standard_normal(N)
    compressed = [bits + 30.0 for bits in references]
    row = _row(width, N + canaries, seed)
    return TextRun(
        row=row,
        parameters=row["parameters"],
        members=members,
        held_out=held_out,
        test=test,
        codes={
            "reference": (references[0], references[1]),
            "compressor": (compressed[0], compressed[1]),
            "uniform": (np.full(N, UNIFORM), np.full(N, UNIFORM)),
        },
        test_codes={
            "reference": references[2],
            "compressor": compressed[2],
            "uniform": np.full(N, UNIFORM),
        },
        canaries=(np.linspace(1, 3, canaries), np.linspace(125, 190, canaries)),
        member_documents=of_text.train.sample(N, seed).documents(),
        held_out_documents=of_text.train.sample(2 * N, seed).documents(slice(N, 2 * N)),
        test_documents=of_text.test.sample(N, seed).documents(),
    )


def _row(width: int, count: int, seed: int, kind: str = "text") -> Row:
    train = {"steps": 100, "epochs": None, "seconds": None, "batch": 8, "lr": None, "until": None}
    return {
        "key": f"1x{width}-h2-fp32-n{count}-seed{seed}",
        "status": "done",
        "model": {"layers": 1, "width": width, "heads": 2, "vocab": V, "length": S},
        "parameters": GPTConfig(1, width, 2, V, S).parameter_count,
        "precision": "fp32",
        "seed": seed,
        "sequences": {"kind": kind, "count": count},
        "train": train,
        "seconds": 1.5,
        "device": "cpu: a machine",
        "version": "0.2.0",
    }


def _uniform(width: int, load: float) -> Row:
    row = _row(width, 1, 0, "uniform")
    entropy = load * 2.0 * row["parameters"]
    count = round(entropy / UNIFORM)
    return row | {
        "sequences": {"kind": "uniform", "count": count},
        "coded_entropy_bits": entropy,
        "held_out_bits": UNIFORM_BITS[load],
    }


def text_json(study: TextStudy, replicates: int = 200) -> Row:
    """The content of text.json that the page reads, by the public functions, run after run."""
    counts = study.corpus.counts
    names = ("documents", "bytes", "sequences", "exact_duplicates", "near_duplicates", "splits")
    models: dict[str, Row] = {}
    for run in study.runs:
        shape = {**run.row["model"], "parameters": run.parameters, "precision": "fp32"}
        models.setdefault(run.shape, {**shape, "runs": []})["runs"].append(
            _numbers(run, replicates)
        )
    for model in models.values():
        model["sizes"] = [
            {
                "count": N,
                "unintended_bits": {name: {"net": _mean(model, N, name)} for name in CODES},
            }
            for N in sorted({run["count"] for run in model["runs"]})
        ]
    return {
        "corpus": {name: counts[name] for name in names},
        "models": list(models.values()),
        "canaries": _canaries(study),
    }


def _mean(model: Row, count: int, code: str) -> Row:
    """Of the seeds of a size, with an interval that is the range of theirs."""
    nets = [run["unintended_bits"][code]["net"] for run in model["runs"] if run["count"] == count]
    return {
        "estimate": sum(net["estimate"] for net in nets) / len(nets),
        "low": min(net["low"] for net in nets),
        "high": max(net["high"] for net in nets),
    }


def _canaries(study: TextStudy) -> Row | None:
    planted, others = (np.concatenate([run.canaries[i] for run in study.runs]) for i in range(2))
    if not planted.size:
        return None
    found: Row = {"each_bits": UNIFORM, "counts": [min(run.count for run in study.runs)]}
    for name, bits in (("planted", planted), ("held_out", others)):
        total = float(np.maximum(UNIFORM - bits, 0).sum())
        found[name] = {
            "count": bits.size,
            "entropy_bits": UNIFORM * bits.size,
            "unintended_bits": {"estimate": total, "low": total - 9.0, "high": total + 9.0},
        }
    return found


def _numbers(run: TextRun, replicates: int) -> Row:
    found: Row = {"count": run.count, "seed": run.seed}
    found["entropy_bits"] = {name: float(bits[0].sum()) for name, bits in run.codes.items()}
    found["unintended_bits"], found["generalization_bits"] = {}, {}
    for name, (ours, theirs) in run.codes.items():
        by = {
            code: total_unintended(
                run.members,
                ours,
                run.held_out,
                theirs,
                UNIFORM,
                documents=run.member_documents,
                held_out_documents=run.held_out_documents,
                paired=True,
                code=code,
                replicates=replicates,
            )
            for code in get_args(Code)
        }
        of_test = total_unintended(
            run.members,
            ours,
            run.test,
            run.test_codes[name],
            UNIFORM,
            documents=run.member_documents,
            held_out_documents=run.test_documents,
            replicates=replicates,
        )
        found["unintended_bits"][name] = {
            "max": by["max"].unintended.estimate,
            "mixture": by["mixture"].unintended.estimate,
            "held_out_max": by["max"].held_out.estimate,
            "held_out_mixture": by["mixture"].held_out.estimate,
            "net": by["max"].net.to_dict(),
            "net_test": of_test.net.to_dict(),
        }
        found["generalization_bits"][name] = by["max"].generalization.estimate
    found["train_bits_per_token"] = float(run.members.mean()) / (S - 1)
    found["held_out_bits_per_token"] = float(run.held_out.mean()) / (S - 1)
    found["test_bits_per_token"] = float(run.test.mean()) / (S - 1)
    return found
