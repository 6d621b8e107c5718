"""Folders of extraction: rates, resuming, the default data sets, and bad input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.score_cases import byte_tokenizer, llama_folder, small_llama

import fastmem
from fastmem.base.stats import clopper_pearson
from fastmem.cli.main import main
from fastmem.models.extraction import run
from fastmem.models.extraction.folder import ExtractionFolder
from fastmem.models.extraction.run import extract

SEQUENCES = fastmem.UniformSequences(40, 12, 16)


def trained() -> fastmem.GPT:
    model = fastmem.GPT(fastmem.GPTConfig(1, 16, 4, vocab=16, length=12))
    fastmem.train(model, SEQUENCES, fastmem.TrainConfig(steps=150))
    return model


MODEL = trained()


def test_schema_and_rates(tmp_path: Path) -> None:
    """Fails if a field of extraction.json is missing, a rate differs from the table, or the test
    set counts as training sequences."""
    found = extract(
        MODEL, SEQUENCES, SEQUENCES.held_out(30), out=tmp_path, prefixes=(4, 2),
        temperatures=(1.0, 0.5), top_k=4, samples=7, probability=0.2, decode=True,
    )  # fmt: skip
    assert found == json.loads((tmp_path / "extraction.json").read_bytes())
    table = ExtractionFolder(tmp_path).read()
    assert [entry["prefix"] for entry in found["prefixes"]] == [2, 4]
    for entry in found["prefixes"]:
        prefix = entry["prefix"]
        for name, count in (("train", 40), ("test", 30)):
            rows = table["set"] == name
            assert entry[name]["sequences"] == rows.sum() == count
            extracted = int((table["greedy_from"][rows] <= prefix).sum())
            assert entry[name]["exact"] == clopper_pearson(extracted, count).to_dict()
            for way, column in zip(entry[name]["sampled"], ("t1_k4", "t0.5_k4"), strict=True):
                p = 1 - (1 - np.exp2(-table[f"bits_{prefix}_{column}"][rows])) ** 7
                assert way["expected"]["estimate"] == pytest.approx(p.mean())
                assert way["discoverable"]["estimate"] == pytest.approx((p >= 0.2).mean())
            assert entry[name]["approximate"]["exact"]["estimate"] == pytest.approx(
                extracted / count
            )
    assert found["prefixes"][1]["train"]["exact"]["estimate"] > 0.9
    assert found["prefixes"][1]["test"]["exact"]["estimate"] == 0
    again = extract(
        MODEL, SEQUENCES, SEQUENCES.held_out(30), out=tmp_path, prefixes=(2, 4),
        temperatures=(1.0, 0.5), top_k=4, samples=1, probability=0.2, decode=True,
    )  # fmt: skip
    assert again["samples"] == 1
    assert again["seconds"] == found["seconds"]  # nothing was measured again


@pytest.mark.parametrize("slide", [False, True])
def test_a_stopped_run_goes_on(
    slide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a run that is killed in any chunk, also inside a document, ends with other bytes, or
    measures a sequence twice."""
    options: dict[str, Any] = {"prefixes": (3,), "batch_tokens": 24}
    data: Any = (SEQUENCES, SEQUENCES.held_out(20))
    if slide:
        options |= {"slide": True, "suffix": 5, "stride": 2}
        data = [[part[:].ravel(), [1, 2]] for part in data]
    monkeypatch.setattr(run, "BATCHES_OF_A_CHUNK", 15 if slide else 5)
    extract(MODEL, *data, out=tmp_path / "whole", **options)
    add, stops = ExtractionFolder.add, 0

    def stopping(self: ExtractionFolder, *arguments: Any) -> None:
        add(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(ExtractionFolder, "add", stopping)
    while not (tmp_path / "parts" / "extraction.json").exists() and stops < 60:
        try:
            extract(MODEL, *data, out=tmp_path / "parts", **options)
        except KeyboardInterrupt:
            stops += 1
    assert 8 < stops < 60
    whole, parts = (tmp_path / name / "sequences.parquet" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    assert not (tmp_path / "parts" / "parts").exists()


def test_texts_are_cut_and_short_ones_counted(tmp_path: Path) -> None:
    """Fails if --suffix keeps more tokens, or a short text counts in a rate."""
    texts = ["abc", "", "a longer text of many bytes", "and another long one"]
    found = extract(
        small_llama(), texts, out=tmp_path, tokenizer=byte_tokenizer(), prefixes=(2, 8), suffix=6
    )
    table = ExtractionFolder(tmp_path).read()
    assert table["tokens"].tolist() == [3, 0, 14, 14]
    first, last = (entry["train"] for entry in found["prefixes"])
    assert (first["sequences"], first["too_short"]) == (3, 1)
    assert (last["sequences"], last["too_short"]) == (2, 2)
    assert last["exact"]["estimate"] * 2 == (table["greedy_from"][2:] <= 8).sum()


def bad(match: str, model: Any = MODEL, data: Any = SEQUENCES, **options: Any) -> None:
    with pytest.raises(ValueError, match=match) as error:
        extract(model, data, **options)
    assert "\n" not in str(error.value)


def test_bad_input(tmp_path: Path) -> None:
    """Fails if an input that has no rate gives one, or more than one line."""
    out = tmp_path / "out"
    bad("prefixes must be from 1", out=out, prefixes=(0,))
    bad(r"prefixes must be one or more, not \(\)", out=out, prefixes=())
    bad("prefixes must be one or more, not 8", out=out, prefixes=8)
    bad("temperatures must be one or more, not 0.7", out=out, temperatures=0.7)
    bad("prefix 12 of train sequences of 12 tokens leaves nothing", out=out, prefixes=(4, 12))
    bad("temperatures must be above 0, not 0", out=out, temperatures=(0.0,))
    bad("top_k must be from 1", out=out, top_k=0)
    bad("top_k 99 of a vocabulary of", out=out, top_k=99)
    bad("probability must be between 0 and 1, not 1", out=out, probability=1)
    bad("samples must be from 1", out=out, samples=0)
    bad("suffix must be from 1", out=out, suffix=0)
    llama, byte = small_llama(), byte_tokenizer()
    bad("memory has no documents", llama, [], out=tmp_path / "none", tokenizer=byte)
    bad("none of the 2 train sequences has a token after it, the longest has 3", llama,
        ["ab", "abc"], out=tmp_path / "short", tokenizer=byte)  # fmt: skip
    extract(llama, ["ab", "abc"], out=tmp_path / "short", tokenizer=byte, prefixes=(1,))
    bad("memory has no documents: give other test", llama, ["ab"], test=[], out=tmp_path / "none",
        tokenizer=byte, prefixes=(1,))  # fmt: skip
    bad("0 has 60 tokens, and the model reads 32 at once: give --suffix", llama, ["a" * 60],
        out=tmp_path / "long", tokenizer=byte)  # fmt: skip
    bad("token 15 at position", small_gpt(), out=tmp_path / "vocab", prefixes=(4,))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    bad("is not the folder of a run of fastmem extract", out=tmp_path / "notes", prefixes=(4,))
    extract(MODEL, SEQUENCES, out=out, prefixes=(4,), overwrite=True)
    bad("holds other extraction rates", data=SEQUENCES.held_out(40), out=out, prefixes=(4,))


def small_gpt() -> fastmem.GPT:
    return fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=15, length=12))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the command does not take a trained model's own data, print the rates, or write the
    page; or if an error takes more than a line."""
    model = tmp_path / "model"

    def ran(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        printed = capsys.readouterr()
        return int(f"{stop.value.code}"), printed.out, printed.err

    shape = ["--width", "8", "--vocab", "8", "--length", "6", "--count", "30", "--steps", "20"]
    assert ran("train", *shape, "--out", f"{model}")[0] == 0
    out = tmp_path / "out"
    code, text, _ = ran("extract", f"{model}", "--prefixes", "2", "4", "--out", f"{out}")
    assert code == 0
    assert "30 held-out sequences" in " ".join(text.split())
    page = (out / "extraction.html").read_text()
    (out / "extraction.html").unlink()
    assert ran("report", f"{out}")[0] == 0
    assert (out / "extraction.html").read_text() == page
    code, text, errors = ran("extract", f"{model}", "--prefixes", "0", "--out", f"{out}")
    assert code == 2
    assert errors.startswith("fastmem: --prefixes must be from 1")
    assert errors.count("\n") == 1
    llama = llama_folder(tmp_path / "llama")
    capsys.readouterr()
    code, _, errors = ran("extract", f"{llama}", "--out", f"{tmp_path / 'x'}")
    assert (code, errors.count("\n")) == (2, 1)
    assert "has no run.json" in errors
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "ab" * n}) + "\n" for n in range(10)))
    code, text, _ = ran(
        "extract", f"{llama}", f"{data}", "--prefixes", "4", "--json", "--out", f"{tmp_path / 'y'}"
    )
    assert code == 0
    assert json.loads(text)["prefixes"][0]["test"] is None
