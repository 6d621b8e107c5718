"""Codes of a text sweep: references that are trained or given, compressors, capacity; resumed."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.score_cases import BOS, byte_tokenizer, llama_folder, oracle_bits, small_llama, token_ids
from cases.sweep_rows import finish
from cases.text_cases import documents

from fastmem import GPT, GPTConfig, SweepConfig, TrainConfig, prepare_text, sequence_bits
from fastmem.base.storage import read_json, write_json
from fastmem.data.files.tokenfile import TokenFile
from fastmem.data.text import TextSequences
from fastmem.memorization.compressors import compressor_bits, least_bits
from fastmem.sweeps import references
from fastmem.sweeps.references import ReferenceConfig, prepare_codes, read_code, saw_training
from fastmem.sweeps.store import STUDY
from fastmem.sweeps.text_config import TextConfig, text_sets

SMALL = ReferenceConfig(
    reference_steps=(20, 5), reference_width=16, reference_layers=1, reference_heads=4
)


@pytest.fixture
def config(tmp_path: Path) -> TextConfig:
    prepare_text(documents(120), tmp_path / "corpus", length=16)
    grid = TextConfig(width=(8,), heads=(2,), counts=(10, 30), seeds=(0, 4), steps=5, canaries=2)
    return replace(grid, out=tmp_path).of_corpus()


def test_trained(config: TextConfig) -> None:
    """Fails if a code is not the bits of the reference that is stored beside it, of the sets of the
    largest data set, or strengths are not in order."""
    study = prepare_codes(config, SMALL)
    assert read_json(config.out / STUDY) == study
    assert [one["name"] for one in study["strengths"]] == ["1 × 16, 5 steps", "1 × 16, 20 steps"]
    assert study["codes"]["reference"] == study["strengths"][1]["path"]
    per_byte = [one["bits_per_byte"] for one in study["strengths"]]
    assert per_byte[1] < per_byte[0] < 8
    folder = config.out / study["codes"]["reference"]
    model, codes = GPT.from_hf(folder), read_code(folder)
    assert codes.keys() == {0, 4}
    for one, sequences in zip(codes[4], text_sets(config.corpus, 30, 4), strict=True):
        np.testing.assert_allclose(one, sequence_bits(model, sequences), rtol=1e-6)
    expected = sequence_bits(model, config.corpus.test.sample(30, 0)).sum() / (30 * 15)
    assert per_byte[1] == pytest.approx(expected)
    run = read_json(folder / "run.json")
    assert run["sequences"]["split"] == "reference"
    assert run["train"]["steps"] == 20


def test_compressors(config: TextConfig) -> None:
    """Fails if the code is not the least of the compressors and of the uniform code."""
    study = prepare_codes(config, SMALL)
    found = read_code(config.out / study["codes"]["compressor"])[0]
    sequences = text_sets(config.corpus, 30, 0)[1]
    codes = compressor_bits(sequences.text_bytes(), config.corpus.reference.text_bytes())
    np.testing.assert_array_equal(found.held_out, least_bits(codes, 15 * 8))
    assert study["compressor"]["compressors"] == [*codes, "uniform"]


def test_resumed(config: TextConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a finished code is made again, a wider grid is not added, or a code of another
    corpus or setting stays."""
    study = prepare_codes(config, SMALL)
    folder = config.out / study["codes"]["reference"]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    trained: list[int] = []
    train = references.run_alone

    def counted(run: Any, *arguments: Any, **named: Any) -> Any:
        trained.append(run.train.steps)
        return train(run, *arguments, **named)

    monkeypatch.setattr(references, "run_alone", counted)
    assert prepare_codes(config, SMALL) == study
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    small = read_code(folder)[0]
    wider = replace(config, counts=(10, 50), seeds=(0, 4, 5))
    prepare_codes(wider, SMALL)
    large = read_code(folder)
    assert large.keys() == {0, 4, 5}
    assert large[0].members.size == 50
    np.testing.assert_allclose(large[0].of(30, 30).held_out, small.held_out, rtol=1e-6)
    assert trained == []
    (folder / "code.json").unlink()
    prepare_codes(config, SMALL)
    assert trained == [20]
    (folder / "seed4.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"seed4.npz is damaged .*: delete it and run again"):
        prepare_codes(config, SMALL)


def test_given_model_of_the_same_tokens(config: TextConfig, tmp_path: Path) -> None:
    """Fails if a model without a tokenizer codes other tokens, or one that is too small passes."""
    model = GPT(GPTConfig(1, 8, 2, vocab=300, length=20), seed=1)
    model.to_hf(tmp_path / "model")
    write_json(tmp_path / "model" / "run.json", {"sequences": {"kind": "uniform"}})
    study = prepare_codes(config, ReferenceConfig(reference=str(tmp_path / "model")))
    (strength,) = study["strengths"]
    assert strength["convention"] == "the same tokens 2 to S, given token 1"
    assert strength["parameters"] == model.config.parameter_count
    members = read_code(config.out / strength["path"])[0].members
    sequences = text_sets(config.corpus, 30, 0)[0]
    np.testing.assert_allclose(members, sequence_bits(model, sequences), rtol=1e-6)
    for name, shape, message in (
        ("a", GPTConfig(1, 8, 2, vocab=100, length=20), "a vocabulary of 100 and no tokenizer"),
        ("b", GPTConfig(1, 8, 2, vocab=256, length=9), "length 16 for a model of length 9"),
    ):
        GPT(shape).to_hf(tmp_path / name)
        write_json(tmp_path / name / "run.json", {"sequences": {"kind": "uniform"}})
        with pytest.raises(ValueError, match=message):
            prepare_codes(config, ReferenceConfig(reference=str(tmp_path / name)))
    with pytest.raises(ValueError, match=r"/absent does not exist"):
        prepare_codes(config, ReferenceConfig(reference=str(tmp_path / "absent")))


def test_given_model_with_another_tokenizer(config: TextConfig, tmp_path: Path) -> None:
    """Fails if a model with a tokenizer does not code the same text, after its BOS, or token 1 of
    the target is not taken off."""
    study = prepare_codes(config, ReferenceConfig(reference=str(llama_folder(tmp_path / "llama"))))
    (strength,) = study["strengths"]
    assert strength["convention"].startswith("the same text with another tokenizer")
    found = read_code(config.out / strength["path"])[4].test
    model, sequences = small_llama(), text_sets(config.corpus, 30, 4)[2]
    for place in (0, 7):
        tokens = [BOS, *token_ids(sequences.texts(place)[0])]
        assert found[place] == pytest.approx(oracle_bits(model, tokens).sum() - 8, rel=1e-4)


def test_given_model_without_bos(config: TextConfig, tmp_path: Path) -> None:
    """Fails if the first token of a reference, which it does not code, is free."""
    folder = tmp_path / "llama"
    small_llama().save_pretrained(folder)
    byte_tokenizer(adds=False).save_pretrained(folder)
    study = prepare_codes(config, ReferenceConfig(reference=str(folder)))
    found = read_code(config.out / study["codes"]["reference"])[0].members
    tokens = token_ids(text_sets(config.corpus, 30, 0)[0].texts(3)[0])
    expected = oracle_bits(small_llama(), tokens).sum() + math.log2(264) - 8
    assert found[3] == pytest.approx(expected, rel=1e-4)


def test_reference_that_saw_training(config: TextConfig, tmp_path: Path) -> None:
    """Fails if a model of the training or the test split is a reference unless asked for."""
    corpus = config.corpus
    model = GPT(GPTConfig(1, 8, 2, vocab=256, length=16))
    for name, sequences in (
        ("sweep", config.runs()[0].sequences),
        ("test", corpus.test),
        ("other", corpus.reference),
    ):
        model.to_hf(tmp_path / name)
        write_json(tmp_path / name / "run.json", {"sequences": sequences.description()})
    file = {"kind": "file", "path": str(corpus.folder / "train.npy")}
    model.to_hf(tmp_path / "file")
    write_json(tmp_path / "file" / "run.json", {"sequences": file})
    splits = {name: saw_training(tmp_path / name, corpus) for name in ("sweep", "test", "file")}
    assert splits == {"sweep": "split train", "test": "split test", "file": "split train"}
    assert saw_training(tmp_path / "other", corpus) is None
    for split, expected in (("test", "split test"), ("reference", None)):
        copy = tmp_path / f"copy of {split}.npy"  # of the corpus that another sweep prepared
        shutil.copy(corpus.folder / f"{split}.npy", copy)
        file = TokenFile.open(copy, vocab=256).description()
        write_json(tmp_path / "file" / "run.json", {"sequences": file})
        assert saw_training(tmp_path / "file", corpus) == expected
    given = ReferenceConfig(reference=str(tmp_path / "sweep"))
    with pytest.raises(ValueError, match=r"trained on split train .* or --reference-saw-training"):
        prepare_codes(config, given)
    study = prepare_codes(config, replace(given, reference_saw_training=True))
    assert study["strengths"][0]["saw_training"] is True


@pytest.mark.parametrize(
    ("split", "seed", "expected"),
    [
        ("train", 0, "documents of split train"),
        ("test", 0, "documents of split test"),
        ("reference", 0, None),
        ("train", 1, None),  # other hashes: nothing is known
    ],
)
def test_reference_of_the_same_documents_cut_anew(
    config: TextConfig, tmp_path: Path, split: str, seed: int, expected: str | None
) -> None:
    """Fails if a model that saw the documents in other pieces is taken for a reference."""
    other = prepare_text(documents(120), tmp_path / "again", length=24, seed=seed)
    sequences = TextSequences(other.folder, split)
    write_json(tmp_path / "run.json", {"sequences": sequences.description()})
    assert saw_training(tmp_path, config.corpus) == expected
    shutil.rmtree(other.folder)
    assert saw_training(tmp_path, config.corpus) is None


def test_capacity(config: TextConfig, tmp_path: Path) -> None:
    """Fails if the capacity of a shape is not its own in the folder, or that of the law."""
    out = tmp_path / "capacity"
    grid = SweepConfig(width=(8, 12), heads=(2,), vocab=256, length=16, counts=(8, 16), seeds=(0,))
    rows = finish(replace(grid, steps=200, out=out))
    best = max(row["memorized_bits"]["strict"] for row in rows if row["model"]["width"] == 8)
    found = prepare_codes(config, SMALL, out)["capacity"]
    assert found == {"bits": {"1x8": pytest.approx(best)}, "from": f"the capacity sweep {out}"}
    wide = replace(config, width=(16,))
    assert "by its bits per parameter" in prepare_codes(wide, SMALL, out)["capacity"]["from"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_steps": ()}, r"reference_steps needs one or more different values, not \(\)"),
        ({"reference_steps": (3, 3)}, r"different values, not \(3, 3\)"),
        ({"reference_steps": (0,)}, "reference_steps must be from 1"),
    ],
)
def test_bad_references(change: dict[str, Any], message: str) -> None:
    """Fails if budgets of references are not checked before they train."""
    with pytest.raises(ValueError, match=message):
        ReferenceConfig(**change)


def test_the_shape_of_a_reference(config: TextConfig) -> None:
    """Fails if an error of the reference's shape names the flags of the models."""
    with pytest.raises(
        ValueError, match=r"^reference_width 16 is not divisible by reference_heads"
    ):
        replace(SMALL, reference_width=16, reference_heads=3).shape(config.corpus)


def test_a_small_reference_is_named(config: TextConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a reference of the size of a target passes in silence."""
    torch.manual_seed(0)
    prepare_codes(config, replace(SMALL, reference_width=8, reference_heads=2))
    assert "takes what they learned for memorization" in capsys.readouterr().err
    assert TrainConfig(steps=20).steps == 20
