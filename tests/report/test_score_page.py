"""The page of scores: what it shows, escaped, and what it leaves out."""

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.score_cases import byte_tokenizer, llama_folder, small_llama

import fastmem
from fastmem.base.storage import write_json
from fastmem.cli.main import main, parse
from fastmem.models.scoring.scores import read_scores, score
from fastmem.report.score_page import (
    LEVELS,
    SHOWN,
    command,
    render_score_page,
    visible,
    write_score_page,
)

EVIL = '<script>alert("x")</script> & </p><img src=http://a.b/c>'


class Reader(HTMLParser):
    """The texts of a page by the class or name of their element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {}
        self.tags: list[str] = []
        self.links: list[str] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.links += [f"{given[name]}" for name in ("src", "href") if name in given]
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(given.get("class") or tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.found.setdefault(self._open[-1], []).append(data)


def page_of(folder: Path, texts: Any, text: bool = True, **options: Any) -> str:
    score(small_llama(), texts, folder, tokenizer=byte_tokenizer(), **options)
    return write_score_page(folder, text).read_text()


def test_text_is_escaped(tmp_path: Path) -> None:
    """Fails if a token or a name of a file is taken for HTML, or changed."""
    page_of(tmp_path, ["x"])
    passages = json.loads((tmp_path / "passages.json").read_bytes())
    passages["most"][0] |= {"texts": [EVIL], "source": EVIL}
    found = read_scores(tmp_path)
    found.documents["source"][0] = EVIL
    page = Reader(render_score_page(found, passages, EVIL))
    assert page.found["t"][LEVELS:] == [EVIL]
    assert page.found["strong"][-1] == EVIL
    assert EVIL in page.found["td"]
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert [link for link in page.links if not link.startswith(("data:", "#"))] == []


def test_each_token_has_its_bits(tmp_path: Path) -> None:
    """Fails if a token shows another number or colour than its bits."""
    page = page_of(tmp_path, ["abc\n"])
    tokens = score(small_llama(), ["abc\n"], tokenizer=byte_tokenizer(), tokens=True).tokens
    assert tokens is not None
    spans = re.findall(r'style="--b:(\d)" title="([\d.]+) bits, token (\d+)">([^<]*)<', page)
    assert [text for *_, text in spans] == ["a", "b", "c", "↵\n"]
    for (level, bits, token, _), exact, own in zip(
        spans, tokens["bits"], tokens["token"], strict=True
    ):
        assert float(bits) == pytest.approx(exact, abs=0.006)
        assert int(level) == min(LEVELS - 1, int(exact / 2))
        assert int(token) == own


def test_a_page_without_text(tmp_path: Path) -> None:
    """Fails if --no-text leaves text, or tokens that a tokenizer makes text of, in the page."""
    page = page_of(tmp_path, ["a secret 😀"], text=False)
    reader = Reader(page)
    assert "t" not in reader.found
    assert "title=" not in page
    assert "secret" not in page
    assert "tokens 0 to 12" in page
    assert "secret" in "".join(Reader(page_of(tmp_path, ["a secret 😀"])).found["t"])


def test_tokens_without_a_tokenizer(tmp_path: Path) -> None:
    """Fails if tokens without text do not make a page, or show bits a byte that nobody knows."""
    rows = np.random.default_rng(0).integers(0, 16, (SHOWN + 5, 6))
    score(fastmem.GPT(fastmem.GPTConfig(1, 8, 2, 16, 8)), rows, tmp_path)
    page = write_score_page(tmp_path).read_text()
    reader = Reader(page)
    assert "bits a token" in "".join(reader.found["h1"])
    assert f"{SHOWN} documents of {SHOWN + 5}" in page
    assert not re.search(r"\bnan\b", page)
    assert "The middle document costs" in page
    assert {text for text in reader.found["t"] if not text.strip().isdigit()} == {"14+"}


def test_no_documents_and_no_tokens(tmp_path: Path) -> None:
    """Fails if empty data does not make a page."""
    for name, texts in (("none", []), ("empty", [""])):
        page = page_of(tmp_path / name, texts, bos="never")
        assert "0.000" in page
        assert "passages</h2>" not in page


def test_the_same_scores_give_the_same_page(tmp_path: Path) -> None:
    """Fails if the page depends on anything but the files of the folder."""
    page = page_of(tmp_path, ["abc"])
    assert write_score_page(tmp_path).read_text() == page


def test_the_command_scores_again(tmp_path: Path) -> None:
    """Fails if the command in the page lacks a flag, or is not parsed to the same settings."""
    model, data = llama_folder(tmp_path / "the model"), tmp_path / "a.txt"
    data.write_text("some text")
    flags = ["--context", "4", "--stride", "2", "--bos", "always", "--also", "lse", "entropy"]
    flags += ["--trust-remote-code", "--vocab", "300"]
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        main(["score", str(model), str(data), "--out", out, *flags, "--special-tokens"])
    assert not stop.value.code
    summary = read_scores(out).summary
    line = command(summary, "out")
    assert line is not None
    words = shlex.split(line)
    assert words[:4] == ["fastmem", "score", str(model), str(data)]
    parsed = parse("score", words[2:])
    wanted = parse("score", [str(model), str(data), "--out", "out", *flags, "--special-tokens"])
    assert parsed.dataset.vocab == wanted.dataset.vocab
    assert {*parsed.texts.also} == {*wanted.texts.also}
    for name, value in vars(wanted.texts).items():
        if name != "also":
            assert getattr(parsed.texts, name) == value
    assert command(summary | {"model": "org/name"}, "out") is not None


def test_no_command_for_what_was_in_memory(tmp_path: Path) -> None:
    """Fails if the page shows a command for a made data set, a module or another tokenizer, which
    no command names, or for two types that --dtype cannot both give."""
    model, data = llama_folder(tmp_path / "model"), tmp_path / "a.txt"
    data.write_text("some text")
    tokenizer = byte_tokenizer()
    for i, (scored, texts, options) in enumerate([
        (small_llama(), data, {"tokenizer": tokenizer}),
        (model, ["some text"], {}),
        (model, fastmem.UniformSequences(2, 4, 16), {}),
        (model, data, {"tokenizer": tokenizer}),
        (model, data, {"dtype": "float32", "token_dtype": "uint16"}),
    ]):  # fmt: skip
        summary = score(scored, texts, tmp_path / f"{i}", **options).summary  # type: ignore[arg-type]
        assert command(summary, "out") is None


def test_the_command_of_a_models_own_data(tmp_path: Path) -> None:
    """Fails if the page names data that the command takes from the model's folder, or has a
    command for other data."""
    model, own = str(tmp_path / "model"), fastmem.UniformSequences(6, 4, 16)
    fastmem.GPT(fastmem.GPTConfig(1, 8, 2, 16, 4)).to_hf(model)
    write_json(tmp_path / "model/run.json", {"sequences": own.description()})
    summary = score(model, own, tmp_path / "own").summary
    assert command(summary, "out") == f"fastmem score {model} --out out"
    summary = score(model, own.held_out(6), tmp_path / "others").summary
    assert command(summary, "out") is None


def test_signs_for_what_cannot_be_seen() -> None:
    """Fails if a control character reaches the page, or a newline is lost."""
    assert visible("a\0\t\x1b\n") == "a␀→\t␛↵\n"
