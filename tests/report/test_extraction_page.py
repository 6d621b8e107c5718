"""The page of extraction: its rates, text that is escaped, and what --no-text leaves out."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from cases.score_cases import byte_tokenizer, llama_folder, small_llama

import fastmem
from fastmem import GPT, GPTConfig, UniformSequences
from fastmem.base.storage import write_json
from fastmem.cli.extract import words
from fastmem.cli.main import parse
from fastmem.models.extraction.run import extract
from fastmem.report.extraction_page import (
    command,
    rate,
    render_extraction_page,
    verdict,
    write_extraction_page,
)

EVIL = '<script>alert("x")</script> & </p><i src='


def page_of(folder: Path, text: bool = True, **options: Any) -> str:
    extract(
        small_llama(), [EVIL[:30], EVIL[9:]], [EVIL[4:25]], out=folder, tokenizer=byte_tokenizer(),
        prefixes=(4, 8), suffix=20, **options,
    )  # fmt: skip
    show_all(folder)
    return write_extraction_page(folder, text).read_text()


def show_all(folder: Path) -> None:
    """Makes the shown sequences those of the data, whether the random model returns them or not."""
    passages = {
        name: [
            {"document": 0, "source": f"{name} <b>", "start": 0, "length": 30, "prefix": 4,
             "matched": 9, "bits": 1.5, "tokens": list(EVIL.encode()), "texts": list(EVIL)}
        ]
        for name in ("train", "test")
    }  # fmt: skip
    (folder / "passages.json").write_text(json.dumps(passages))


def test_text_is_escaped(tmp_path: Path) -> None:
    """Fails if a sequence or the name of its source becomes an element of the page."""
    page = page_of(tmp_path)
    assert page.count("<script>") == 1  # the page's own
    assert "alert" not in page
    assert "<b>" not in page
    assert "train &lt;b&gt;" in page
    assert page.count('class="t verbatim"') == 2 * 9
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_no_text_leaves_the_sequences_out(tmp_path: Path) -> None:
    """Fails if --no-text shows a token."""
    page = page_of(tmp_path, text=False)
    assert 'class="t ' not in page
    assert "9 of 26 tokens verbatim" in page


def entry(extracted: tuple[float, float, float], test: Any = None) -> Any:
    found = {
        "exact": dict(zip(("estimate", "low", "high"), extracted, strict=True)),
        "sequences": 9,
    }
    return {
        "slide": None,
        "prefixes": [{"prefix": 8, "train": found, "test": test and test["prefixes"][0]["train"]}],
    }


def test_the_verdict_stands_once(tmp_path: Path) -> None:
    """Fails if a section repeats the headline's sentence, or leaves a prefix out."""
    page = page_of(tmp_path)
    assert page.count("so prediction alone may explain the rate") == 1
    finding = "Returned exactly of the training sequences: after 4 tokens 0\xa0% and 0\xa0% of the"
    assert f"{finding} held-out sequences; after 8 tokens 0\xa0%" in page


def test_verdict_follows_the_intervals() -> None:
    """Fails if overlapping intervals are called memorization, or the reverse."""
    high, low = entry((0.5, 0.4, 0.6)), entry((0.1, 0.0, 0.39))
    assert "are apart" in verdict(entry((0.5, 0.4, 0.6), low))
    assert "overlap" in verdict(entry((0.3, 0.2, 0.5), high))
    assert "Without held-out" in verdict(high)
    assert (
        rate({"estimate": 0.0312, "low": 0.01, "high": 0.2}).replace("\xa0", "") == "3.1% [1%, 20%]"
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 5, "temperatures": (0.7, 1.0), "decode": True, "probability": 0.9}],
)
def test_command_measures_again(tmp_path: Path, options: dict[str, Any]) -> None:
    """Fails if the command of the page does not parse to the settings of the folder."""
    model = llama_folder(tmp_path / "llama")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a text of some bytes")
    found = extract(
        model, tmp_path / "a.txt", tmp_path / "b.txt", out=tmp_path / "out", prefixes=(4,),
        samples=3, **options,
    )  # fmt: skip
    written = command(found, "out")
    assert written is not None
    program, name, *flags = shlex.split(written)
    assert (program, name) == ("fastmem", "extract")
    parsed = parse(name, flags)
    assert (parsed.prefixes, parsed.samples, parsed.test) == ((4,), 3, f"{tmp_path / 'b.txt'}")
    for option, value in options.items():
        assert getattr(parsed, option) == value
    page = render_extraction_page(found, {"train": []}, "out")
    assert "fastmem extract" in page


def test_each_way_of_sampling_is_printed(tmp_path: Path) -> None:
    """Fails if the table lacks a temperature, or does not say that top-k cuts the samples."""
    model, own = GPT(GPTConfig(1, 8, 2, 16, 4)), UniformSequences(6, 4, 16)
    found = extract(model, own, out=tmp_path, prefixes=[2], temperatures=(1, 0.7), top_k=3)
    told = "\n".join(words(found))
    assert "at temperature 1, top-k 3" in told
    assert "at temperature 0.7, top-k 3" in told


def test_the_command_of_a_models_own_data(tmp_path: Path) -> None:
    """Fails if the page names data that the command takes from the model's folder, or has a
    command where it would take others."""
    model, own = str(tmp_path / "model"), UniformSequences(6, 4, 16)
    GPT(GPTConfig(1, 8, 2, 16, 4)).to_hf(model)
    write_json(tmp_path / "model/run.json", {"sequences": own.description()})
    commands = [
        command(extract(model, own, test, out=tmp_path / name, prefixes=[2]), "out")
        for name, test in (("a", own.held_out(6)), ("b", own.held_out(5)), ("c", None))
    ]
    assert commands == [f"fastmem extract {model} --prefixes 2 --samples 100 --out out", None, None]
    fastmem.write(own, tmp_path / "file", "npy")  # of which no sequences are held out
    file = fastmem.TokenFile.open(tmp_path / "file")
    write_json(tmp_path / "model/run.json", {"sequences": file.description()})
    found = extract(model, file, own, out=tmp_path / "d", prefixes=[2])
    assert command(found, "out") is None
