"""The grid of a text sweep: models × sizes × seeds on samples of a prepared corpus.

N sequences of text in a data set, K canaries, S tokens a sequence, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from fastmem.base.arguments import integer
from fastmem.base.storage import Row
from fastmem.data.joined import JoinedSequences
from fastmem.data.sequences import Sequences
from fastmem.data.text import TextCorpus, TextSequences
from fastmem.data.uniform import UniformSequences
from fastmem.models.gpt import GPTConfig
from fastmem.sweeps.config import SweepConfig

CORPUS, REFERENCE, UNIFORM = "corpus", "reference", "uniform"
"""Folders of a text sweep beside its rows."""
BITS_PER_BYTE = 2.0
"""What a byte of text costs a small model, for --loads, which count before a reference is there."""
UNIFORM_LOADS = (1.0, 2.0, 3.0, 4.0, 8.0)
FIRST_CANARY = 2**63
"""The index of the first canary among the uniform sequences of a seed."""


@dataclass(frozen=True)
class TextConfig(SweepConfig):
    """A text sweep: shapes × data set sizes × seeds on samples of the corpus in out/corpus."""

    vocab: int = 256
    length: int = 64
    counts: tuple[int, ...] | Literal["auto"] | None = None
    """Data set sizes in sequences of text, for every model, at most half of those to train on; by
    default from --loads."""
    loads: tuple[float, ...] = (0.25, 0.4, 0.6, 0.9, 1.3, 2.5, 6.0, 20.0, 60.0)
    """Data set sizes in bits of text per parameter, at 2 bits a byte: each model gets sizes that
    fit it. Sizes above half the corpus are cut to that."""
    steps: int | None = 2500
    """Budget in optimizer steps."""
    batch: int = 64
    """Sequences a step; the whole data set where it is smaller."""
    canaries: int = 4
    """Canaries: uniform sequences that are added to the text of every run; as many others are
    never trained on."""
    out: Path = Path("text-laptop")
    """Folder of the results; the same command skips what is finished there."""
    sequence_bits: bool = True
    own: ClassVar[tuple[str, ...]] = (CORPUS, REFERENCE)

    @cached_property
    def corpus(self) -> TextCorpus:
        """The corpus in out/corpus."""
        return TextCorpus.open(self.out / CORPUS)

    def of_corpus(self) -> "TextConfig":
        """A copy with the vocabulary and the length of the corpus."""
        return replace(self, vocab=self.corpus.train.vocab, length=self.corpus.train.length)

    def of_uniform(self) -> SweepConfig:
        """The sweep of the same models on uniform sequences: two seeds, in out/uniform."""
        shared = {one.name: getattr(self, one.name) for one in fields(SweepConfig)}
        own = {"counts": None, "loads": UNIFORM_LOADS, "out": self.out / UNIFORM}
        return SweepConfig(**shared | own | {"seeds": self.seeds[:2]})

    def corpus_hash(self) -> str:
        return self.corpus.hash

    def largest(self, seed: int) -> int:
        """N of the largest data set of a seed."""
        sizes = (self._sizes(shape, "fp32", ()) for shape in self.shapes())
        counts = [count for of_shape in sizes for count, one in of_shape if one == seed]
        return max(counts) - self.canaries

    def _check(self) -> None:
        super()._check()
        integer("canaries", self.canaries, 0, 2**20)
        if self.counts == "auto":
            raise ValueError(
                "counts auto needs data of known entropy, and the entropy of text is unknown: give "
                "--loads, or --counts 100 1000"
            )

    def _sizes(
        self, shape: GPTConfig, precision: Any, rows: Sequence[Row]
    ) -> list[tuple[int, int]]:
        """(N + K, seed) of the runs of one model."""
        there = self.corpus.train.count
        if self.counts is not None and (most := max(map(int, self.counts))) > there // 2:
            raise ValueError(
                f"--counts {most} is more than half of the {there:,} training sequences of the "
                "corpus, of which as many others are held out: give fewer, or more text"
            )
        sizes = super()._sizes(shape, precision, rows)
        return list(dict.fromkeys((min(N, there // 2) + self.canaries, seed) for N, seed in sizes))

    def _data(self, count: int, seed: int) -> tuple[Sequences, Sequences | None]:
        K = self.canaries
        members, held_out, test = text_sets(self.corpus, count - K, seed)
        others = JoinedSequences(held_out, test)
        if not K:
            return members, others
        canaries = UniformSequences(K, self.length, self.vocab, seed, FIRST_CANARY)
        return JoinedSequences(members, canaries), JoinedSequences(others, canaries.held_out(K))

    def _bits(self) -> float:
        counts = self.corpus.counts
        return BITS_PER_BYTE * (self.length - 1) * float(counts["bytes"] / counts["tokens"])


def text_sets(corpus: TextCorpus, count: int, seed: int) -> tuple[TextSequences, ...]:
    """The sequences of text of a run: N members, N held-out, and M sequences of the test split.

    Members and held-out sequences are drawn alike, from the first and from the second half of a
    random order of the training split: most documents have both. Those of the test split are of
    other documents; M = N, or as many as there are.
    """
    half = corpus.train.count // 2
    return (
        corpus.train.sample(count, seed),
        TextSequences(corpus.folder, "train", count, seed, half),
        corpus.test.sample(min(count, corpus.test.count), seed),
    )
