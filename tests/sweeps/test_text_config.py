"""The grid of a text sweep: its data sets, canaries, sizes, and what it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.sweep_rows import bytes_of, finish, serial
from cases.text_cases import documents

from fastmem import TextCorpus, UniformSequences, prepare_text
from fastmem.data.joined import JoinedSequences
from fastmem.sweeps.config import SweepConfig
from fastmem.sweeps.study import corpus_of
from fastmem.sweeps.text_config import FIRST_CANARY, TextConfig, text_sets

GRID = TextConfig(
    width=(8, 12), heads=(2,), counts=(20, 40), seeds=(0, 1), steps=12, batch=16, canaries=3
)


def prepared(out: Path, n: int = 200, **options: Any) -> TextConfig:
    """The grid on a corpus of made-up documents."""
    prepare_text(documents(n), out / "corpus", length=16, **options)
    return replace(GRID, out=out).of_corpus()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    return prepared(tmp_path_factory.mktemp("text"))


def test_runs(config: TextConfig) -> None:
    """Fails if a run has other text than its sample, no canaries, or others than its seed's."""
    runs, corpus = config.runs(), config.corpus
    assert len(runs) == 8
    assert [run.key for run in runs[:3]] == [
        "1x8-h2-fp32-n23-seed0",
        "1x8-h2-fp32-n43-seed0",
        "1x8-h2-fp32-n23-seed1",
    ]
    run = runs[3]
    canaries = UniformSequences(3, 16, 256, 1, FIRST_CANARY)
    members, held_out, test = text_sets(corpus, 40, 1)
    assert run.sequences == JoinedSequences(members, canaries)
    others = JoinedSequences(held_out, test)
    assert run.held_out == JoinedSequences(others, canaries.held_out(3))
    bare = replace(config, canaries=0).runs()[3]
    assert (bare.sequences, bare.held_out) == (members, others)
    assert [(run.model.vocab, run.model.length) for run in runs] == [(256, 16)] * 8


def test_sets(config: TextConfig) -> None:
    """Fails if held-out sequences are members, of few of their documents, or not prefixes."""
    corpus = config.corpus
    half = corpus.train.count // 2
    members, held_out, test = text_sets(corpus, half, 5)
    rows = [{row.tobytes() for row in one[:]} for one in (members, held_out, test)]
    assert not rows[0] & rows[1]
    assert not (rows[0] | rows[1]) & rows[2]
    ours = {*members.documents().tolist()}
    assert not ours & {*test.documents().tolist()}
    assert np.isin(held_out.documents(), [*ours]).mean() > 0.9
    for small, large in zip(text_sets(corpus, 10, 5), (members, held_out, test), strict=True):
        np.testing.assert_array_equal(small[:], large[:10])


def test_few_test_sequences(tmp_path: Path) -> None:
    """Fails if a small test split limits the members, or is read past its end."""
    config = prepared(tmp_path, fractions=(0.8, 0.1, 0.1))
    there = config.corpus.test.count
    assert there < 500 < config.corpus.train.count // 2
    assert [one.count for one in text_sets(config.corpus, 500, 0)] == [500, 500, there]


def test_loads_are_cut_to_the_corpus(config: TextConfig) -> None:
    """Fails if default sizes are above half the training sequences, or a size is there twice."""
    found = replace(config, counts=None, loads=(0.5, 1e6, 2e6), canaries=0).runs()
    counts = [run.sequences.count for run in found if run.train.seed == 0]
    half = config.corpus.train.count // 2
    P = found[0].model.parameter_count
    assert counts[1::2] == [half] * 2
    assert counts[0] == pytest.approx(0.5 * P / (2 * 15), rel=0.1)
    assert replace(config, counts=None).largest(1) == half


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": (10, 10**6)}, r"--counts 1000000 is more than half of the [\d,]+ training"),
        ({"counts": "auto"}, "counts auto needs data of known entropy"),
        ({"canaries": -1}, "canaries must be from 0 to"),
        ({"canaries": 1.5}, "canaries must be"),
        ({"counts": (0,)}, "count must be from 1"),
    ],
)
def test_bad_grids(config: TextConfig, change: dict[str, Any], message: str) -> None:
    """Fails if an invalid grid starts."""
    with pytest.raises(ValueError, match=message):
        replace(config, **change).runs()


def test_uniform_grid(config: TextConfig) -> None:
    """Fails if the runs on uniform data have other models, another budget or another vocabulary."""
    found = config.of_uniform()
    assert type(found) is SweepConfig
    assert {run.model for run in found.runs()} == {run.model for run in config.runs()}
    assert {run.train for run in found.runs()} == {run.train for run in config.runs()}
    assert found.out == config.out / "uniform"
    assert {run.sequences.vocab for run in found.runs()} == {256}


def test_workers_change_no_row(tmp_path: Path) -> None:
    """Fails if a row or a file of bits depends on the number of workers, or on who prepared."""
    found = []
    for workers in (1, 2):
        out = tmp_path / "here"
        config = replace(prepared(out), width=(8,), workers=workers)
        found.append(bytes_of(serial(config)))
        out.rename(tmp_path / f"with-{workers}")
    assert len(found[0]) == 8
    assert found[0] == found[1]


def test_a_document_more_moves_none(tmp_path: Path) -> None:
    """Fails if an added document, or another name of a file, moves a document to another split."""
    texts = documents(60)
    for name, given in (("a", texts), ("b", ["one more text of words " * 9, *texts])):
        (tmp_path / name).mkdir()
        for place, text in enumerate(given):
            (tmp_path / name / f"{(place * 7) % 61:03}-{name}.txt").write_text(text)
    few, more, moved = (
        prepare_text(tmp_path / name, tmp_path / f"{place}", length=16, seed=3)
        for place, name in enumerate(("a", "b", "a"))
    )
    for split in ("train", "test", "reference"):
        ours, theirs = (
            {row.tobytes() for row in getattr(corpus, split)[:]} for corpus in (few, more)
        )
        assert ours <= theirs
    assert isinstance(few, TextCorpus)
    assert few.hash == moved.hash != more.hash


def test_another_corpus_is_refused(tmp_path: Path) -> None:
    """Fails if rows of two corpora mix, or of text and uniform sequences."""
    config = replace(prepared(tmp_path / "a"), width=(8,), counts=(20,), seeds=(0,))
    (row,) = finish(config)
    assert corpus_of(row) == config.corpus.hash
    assert finish(config) == []
    other = prepared(tmp_path / "b", n=150)
    (tmp_path / "a" / "corpus").rename(tmp_path / "was")
    (tmp_path / "b" / "corpus").rename(tmp_path / "a" / "corpus")
    changed = replace(config, steps=12)  # reads the corpus again
    with pytest.raises(
        ValueError, match=r"holds runs on a corpus of hash .* is on a corpus of hash"
    ):
        finish(changed)
    assert other.out.exists()
    uniform = SweepConfig(
        width=(8,), heads=(2,), vocab=256, length=16, counts=(20,), steps=12, batch=16
    )
    with pytest.raises(ValueError, match="and this sweep is on uniform sequences: give another"):
        finish(replace(uniform, out=config.out))
