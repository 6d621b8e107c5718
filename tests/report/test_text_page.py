"""The page of a text study: whole, offline, escaped, and without text where that is asked."""

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.html_document import Document
from cases.made_text import EVIL, SOURCE, WORDS, made_study, text_json

from fastmem.report import text_json as report_text_json
from fastmem.report.sections import interval
from fastmem.report.text_page import render_text_page, write_text_page
from fastmem.report.text_runs import ranked
from fastmem.report.text_study import TextStudy

NAMES = ("unintended", "generalization", "double_descent", "sequences", "rarity", "reference")
PRIVATE = (SOURCE, *(word[:4] for word in WORDS))
"""Parts of words and of names of files, which the cut into sequences may divide."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> TextStudy:
    return made_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def text(study: TextStudy) -> dict[str, Any]:
    return text_json(study)


@pytest.fixture(scope="module")
def folder(
    study: TextStudy, text: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("page <b>")
    assert write_text_page(study, text, folder) == folder / "text.html"
    return folder


@pytest.fixture(scope="module")
def document(folder: Path) -> Document:
    return Document((folder / "text.html").read_text())


def test_it_is_well_formed(document: Document) -> None:
    """Fails if elements do not nest, an id occurs twice, or a link has no target."""
    ids = [a["id"] for _, a, _ in document.elements if "id" in a]
    assert len(set(ids)) == len(ids)
    links = [str(a["href"]) for a, _ in document.all("a")]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert len(document.all("h1")) == 1


def test_it_needs_no_other_file(document: Document) -> None:
    """Fails if the page loads or links to anything outside itself."""
    for _, attributes, _ in document.elements:
        for name in ("src", "href", "data"):
            assert str(attributes.get(name, "data:")).startswith(("data:", "#"))
    assert len(document.all("script")) == 1


def test_six_figures_and_the_canaries_with_their_data(folder: Path, document: Document) -> None:
    """Fails if a figure has no files, or the data in the page are not those in its CSV."""
    links = {a["download"]: str(a["href"]) for a, _ in document.all("a") if "download" in a}
    assert set(links) == {f"{name}.csv" for name in (*NAMES, "canaries")}
    for name in (*NAMES, "canaries"):
        assert document.all("section", id=name)
        for ending in ("png", "svg", "pdf"):
            assert (folder / "figures" / f"{name}.{ending}").stat().st_size > 1000
        inside = base64.b64decode(links[f"{name}.csv"].partition(",")[2])
        assert (folder / "figures" / f"{name}.csv").read_bytes() == inside
    for form in ("wide", "narrow"):
        assert len(document.all("svg", class_=form)) == 7


def test_the_headline(document: Document, text: dict[str, Any]) -> None:
    """Fails if the number is not of the run with most net unintended memorization."""
    runs = [run for model in text["models"] for run in model["runs"]]
    nets = [run["unintended_bits"]["reference"]["net"] for run in runs]
    best = max(nets, key=lambda net: float(net["estimate"]))
    ((_, headline),) = document.all("h1")
    assert headline == f"{best['estimate']:,.0f} bits of unintended memorization"
    ((_, said),) = document.all("p", class_="interval")
    assert f"95 % interval {best['low']:,.0f} to {best['high']:,.0f} ·" in said
    ((_, lead),) = document.all("p", class_="lead")
    assert "rises and falls in both models" in lead


def test_the_tables(document: Document, text: dict[str, Any]) -> None:
    """Fails if a table lacks a model or a run, or a row differs from its head."""
    assert len(document.all("table", class_="stack")) == 2
    heads = len(document.all("th"))
    cells = len(document.all("td"))
    runs = sum(len(model["runs"]) for model in text["models"])
    assert heads == 18
    assert cells == 9 * (len(text["models"]) + runs)
    size = text["models"][1]["sizes"][2]["unintended_bits"]["reference"]["net"]
    assert interval(size, ",.0f") in [text for _, text in document.all("td")]


def test_counts_of_the_corpus(document: Document, study: TextStudy) -> None:
    """Fails if a count of the corpus is missing."""
    values = [text for _, text in document.all("dd")]
    counts = study.corpus.counts
    for value in (counts["documents"], counts["exact_duplicates"], *counts["splits"].values()):
        assert f"{value:,}" in values


def test_text_is_escaped(study: TextStudy, text: dict[str, Any]) -> None:
    """Fails if text or a name is taken for HTML, or a sequence is missing or changed."""
    top = ranked(study)
    order = sorted(range(len(top.texts)), key=lambda i: ("<" not in top.texts[i], i))
    top = replace(top, order=np.array(order))
    document = Document(render_text_page(study, text, [], top, EVIL))
    shown = [text for _, text in document.all("p", dir="auto")]
    wanted = [" ".join(top.texts[i].split()) for i in order[:20]]
    assert shown == wanted
    assert sum("<" in one for one in wanted) > 0
    assert not document.all("i")
    names = [text for _, text in document.all("strong")]
    assert names[0] == EVIL
    assert sum(SOURCE in name for name in names) == 20


def test_without_text(study: TextStudy, text: dict[str, Any], tmp_path: Path) -> None:
    """Fails if text or the name of a document is left in any file of the page."""
    page = write_text_page(study, text, tmp_path, show_text=False).read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1 + 7 * 4
    for path in files:
        content = path.read_bytes()
        assert not [word for word in PRIVATE if word.encode() in content], path
    embedded = [
        base64.b64decode(str(a["href"]).partition(",")[2])
        for a, _ in Document(page).all("a")
        if "download" in a
    ]
    assert not [word for word in PRIVATE for data in embedded if word.encode() in data]
    assert "left out on request" in page
    assert "--no-text" in page
    assert Document(page).all("figure", class_="passage")


def test_text_is_there_otherwise(folder: Path) -> None:
    """Fails if the test above would pass with any page."""
    for path in (folder / "text.html", folder / "figures" / "rarity.csv"):
        content = path.read_text()
        assert any(word[:4] in content for word in WORDS)


def test_nothing_finished(study: TextStudy) -> None:
    """Fails if a folder without a finished run is a traceback."""
    with pytest.raises(ValueError, match="holds no finished run"):
        report_text_json.text_json(replace(study, runs=()))
