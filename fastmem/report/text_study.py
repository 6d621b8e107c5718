"""Reads the folder of a text sweep: bits of sequences by models, references and compressors.

N members, N held-out sequences and M sequences of the test split of a run, K canaries. Held-out
sequences are drawn as members are, most from the same documents; those of the test split are of
other documents. Bits are of tokens 2, …, S of a sequence, (S - 1) · log2 V by the uniform code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmem.base.arguments import user_path
from fastmem.base.stats import Floats
from fastmem.base.storage import Row, read_json
from fastmem.data.text import TextCorpus
from fastmem.memorization.capacity import by_model, capacity_bits, counts_and_bits
from fastmem.sweeps.references import CodeBits, read_code
from fastmem.sweeps.store import STUDY, load_rows, read_sequence_bits
from fastmem.sweeps.text_config import CORPUS, UNIFORM, text_sets

DEFAULT_LAW = 2.87
"""Strict bits per parameter of `fastmem capacity` with its defaults."""
DEFAULT_LAW_FROM = (
    f"{DEFAULT_LAW} bits a parameter, which fastmem capacity measures with its defaults "
    "(docs/results.md, 4,000 steps, V = 128, S = 16)"
)


@dataclass(frozen=True)
class TextRun:
    """A finished run, and the bits of its sequences by each code."""

    row: Row
    """As in `capacity`; row["sequences"]["count"] counts canaries too: `count` is N."""
    parameters: int
    members: Floats
    """(N,) bits of the training sequences by the target."""
    held_out: Floats
    """(N,) bits of held-out sequences of the training documents by the target."""
    test: Floats
    """(M,) bits of sequences of other documents by the target: its test loss."""
    codes: dict[str, tuple[Floats, Floats]]
    """Of "reference", "compressor" and "uniform": (N,) and (N,) bits of the same coded tokens of
    members and of held-out sequences."""
    test_codes: dict[str, Floats]
    """Of the same: (M,)"""
    canaries: tuple[Floats, Floats]
    """(K,) bits by the target of planted canaries, and of others that were never trained on."""
    member_documents: NDArray[np.int64]
    """(N,) numbers of documents in the corpus."""
    held_out_documents: NDArray[np.int64]
    """(N,)"""
    test_documents: NDArray[np.int64]
    """(M,)"""

    @property
    def count(self) -> int:
        """N, the training sequences of text."""
        return self.members.size

    @property
    def seed(self) -> int:
        return int(self.row["seed"])

    @property
    def shape(self) -> str:
        """The key of the model in `TextStudy.capacity_bits`, such as 1x16."""
        return shape_key(self.row)


@dataclass(frozen=True)
class Strength:
    """One reference model."""

    name: str
    """Such as "2 x 64, 1,000 steps"."""
    bits_per_byte: float
    """Of the test split."""
    codes: dict[int, tuple[Floats, Floats]]
    """By seed: bits of members and of held-out sequences of the largest data set of this seed;
    those of a smaller data set are the beginnings."""


@dataclass(frozen=True)
class TextStudy:
    """A folder of `fastmem text`."""

    folder: Path
    corpus: TextCorpus
    runs: tuple[TextRun, ...]
    """Finished runs, smallest models and data sets first."""
    strengths: tuple[Strength, ...]
    """Weakest first; the last is the code "reference" of the runs."""
    capacity_bits: dict[str, float]
    """Strict bits by shape, such as 1x16."""
    capacity_from: str
    """Where capacity_bits came from, in one line."""
    uniform: tuple[Row, ...]
    """Finished rows of uniform data of the same V, S and budget, with held_out_bits, the mean of a
    held-out sequence; may be empty."""
    canary_bits: float
    """The known entropy of a canary's coded tokens, (S - 1) · log2 V."""
    reference: Row
    """Of the reference: its name, bits_per_byte, convention (what it codes, in words), parameters
    and saw_training (True if it was trained on the training split)."""
    compressors: tuple[str, ...]
    """The compressors of which the code "compressor" is the least; one is uniform."""

    @property
    def uniform_bits(self) -> float:
        """The uniform code of a sequence."""
        return self.corpus.train.uniform_bits

    def texts(self, run: TextRun) -> list[str]:
        """The text of the members of a run."""
        return self.corpus.train.sample(run.count, run.seed).texts()


def read_text_study(folder: str | Path) -> TextStudy:
    """Reads a folder of `fastmem text`, finished or not.

    Raises:
        ValueError: the folder is not of a text sweep, lacks its references, or is damaged.
    """
    folder = user_path(folder)
    if not (folder / STUDY).exists():
        raise ValueError(f"{folder} is not the folder of a text sweep: run `fastmem text` first")
    study = read_json(folder / STUDY)
    corpus = TextCorpus.open(folder / CORPUS)
    rows = [row for row in load_rows(folder) if row["status"] == "done"]
    rows.sort(key=lambda row: (row["parameters"], row["sequences"]["count"], row["seed"]))
    codes = {name: read_code(folder / path) for name, path in study["codes"].items()}
    uniform = tuple(row for row in _uniform(folder) if row["status"] == "done")
    capacity, source = _capacity(study, rows, uniform)
    return TextStudy(
        folder=folder,
        corpus=corpus,
        runs=tuple(_run(folder, row, corpus, codes) for row in rows),
        strengths=tuple(
            Strength(
                one["name"],
                one["bits_per_byte"],
                {seed: bits[:2] for seed, bits in read_code(folder / one["path"]).items()},
            )
            for one in study["strengths"]
        ),
        capacity_bits=capacity,
        capacity_from=source,
        uniform=uniform,
        canary_bits=corpus.train.uniform_bits,
        reference=study["strengths"][-1],
        compressors=tuple(study["compressor"]["compressors"]),
    )


def shape_key(row: Row) -> str:
    """The shape of the model of a row, such as 1x16."""
    return "{layers}x{width}".format(**row["model"])


def _run(
    folder: Path, row: Row, corpus: TextCorpus, codes: dict[str, dict[int, CodeBits]]
) -> TextRun:
    seed, key = row["seed"], row["key"]
    K = row["sequences"].get("second", {"count": 0})["count"]
    members, others = read_sequence_bits(folder, key)
    N, M = members.size - K, others.size - members.size
    for name, of_seed in codes.items():
        there = of_seed[seed].members.size if seed in of_seed else 0
        if there < N:
            raise ValueError(
                f"{folder} has {there:,} sequences of seed {seed} by the {name}, and {key} needs "
                f"{N:,}: give the same fastmem text command again"
            )
    uniform = corpus.train.uniform_bits
    found = {name: of_seed[seed].of(N, M) for name, of_seed in codes.items()}
    found["uniform"] = CodeBits(*(np.full(n, uniform) for n in (N, N, M)))
    documents = [one.documents() for one in text_sets(corpus, N, seed)]
    return TextRun(
        row=row,
        parameters=row["parameters"],
        members=members[:N],
        held_out=others[:N],
        test=others[N : N + M],
        codes={name: bits[:2] for name, bits in found.items()},
        test_codes={name: bits.test for name, bits in found.items()},
        canaries=(members[N:], others[N + M :]),
        member_documents=documents[0],
        held_out_documents=documents[1],
        test_documents=documents[2],
    )


def _uniform(folder: Path) -> list[Row]:
    return load_rows(folder / UNIFORM) if (folder / UNIFORM).is_dir() else []


def _capacity(
    study: Row, rows: Sequence[Row], uniform: Sequence[Row]
) -> tuple[dict[str, float], str]:
    """The capacity of each shape, and where it is from: the first of a folder of capacity, the runs
    of uniform data, and the law of docs/results.md."""
    if study["capacity"]:
        return study["capacity"]["bits"], study["capacity"]["from"]
    parameters = {shape_key(row): row["parameters"] for row in rows}
    found = {
        shape_key(runs[0]): capacity_bits(*counts_and_bits(runs, "strict")).estimate
        for runs in by_model(uniform)
    }
    if parameters.keys() <= found.keys() and found:
        return found, "runs of uniform data with the same vocabulary, length and budget (uniform/)"
    return {name: DEFAULT_LAW * P for name, P in parameters.items()}, DEFAULT_LAW_FROM
