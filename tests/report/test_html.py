"""The report as HTML, without a browser: its content, and that it is well formed."""

import base64
import csv
import io
import re
from pathlib import Path

import pytest
from cases.html_document import Document
from cases.study_rows import full, report, study_row, study_rows

from fastmem.base.storage import write_json
from fastmem.memorization.capacity import summarize
from fastmem.memorization.scaling_law import law_of_rows
from fastmem.report.html import SHOWN
from fastmem.report.sections import interval
from fastmem.sweeps.store import PLANNED

TEMPLATES = Path(__file__).parents[2] / "fastmem" / "report" / "templates"
SINGLE = ("memorized_bits", "capacity", "training")
ALL = (*SINGLE, "precision", "sequence_bits", "double_descent")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return full(tmp_path_factory.mktemp("study"))


def test_it_is_well_formed(text: str) -> None:
    """Fails if elements do not nest, an id occurs twice, or a link has no target."""
    document = Document(text)
    ids = [a["id"] for _, a, _ in document.elements if "id" in a]
    assert len(set(ids)) == len(ids)
    links = [str(a["href"]) for a, _ in document.all("a")]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert len(document.all("h1")) == 1
    assert document.all("html")[0][0]["lang"] == "en"


def test_it_needs_no_other_file(text: str) -> None:
    """Fails if the page has a network address, or loads a file."""
    assert not re.findall(r"https?:|//[\w.]+/|@import|url\((?!#)", text)
    document = Document(text)
    assert not [a for _, a, _ in document.elements if "src" in a]
    assert [a["href"] for a, _ in document.all("link")] == ["data:,"]
    (policy,) = [a["content"] for a, _ in document.all("meta") if "http-equiv" in a]
    assert str(policy).startswith("default-src 'none'")


def test_each_figure_has_a_sentence_and_its_data(text: str) -> None:
    """Fails if a figure lacks its sentence, or its download has other numbers."""
    document = Document(text)
    figures = document.all("svg")
    assert len(figures) == 2 * len(ALL)
    assert len(document.all("figure")) == len(ALL)
    sentences = [words for _, words in document.all("p", class_="finding")][: len(ALL)]
    for (attributes, _), sentence in zip(figures[::2], sentences, strict=True):
        assert " ".join(str(attributes["aria-label"]).split()) == sentence
        assert sentence.endswith(".")
        assert len(sentence) > 40
    downloads = {
        str(a["download"]): str(a["href"]) for a, _ in document.all("a") if "download" in a
    }
    assert list(downloads) == [f"{name}.csv" for name in ALL]
    tables = {}
    for name, uri in downloads.items():
        start, _, payload = uri.partition(",")
        assert start == "data:text/csv;charset=utf-8;base64"
        tables[name] = list(csv.DictReader(io.StringIO(base64.b64decode(payload).decode())))
    rows = list(study_rows(precisions=("fp32", "bf16-mixed")))
    drawn = {
        (int(r["width"]), r["precision"], int(r["count"]), int(r["seed"])): float(r["strict_bits"])
        for r in tables["memorized_bits.csv"]
    }
    assert drawn == {
        (r["model"]["width"], r["precision"], r["sequences"]["count"], r["seed"]): (
            r["memorized_bits"]["strict"]
        )
        for r in rows
    }
    assert len(tables["training.csv"]) == sum(len(row["curve"]) for row in rows)
    estimates = [float(r["strict_estimate"]) for r in tables["capacity.csv"]]
    assert estimates == [
        m["capacity_bits"]["strict"]["estimate"] for m in summarize(rows)["models"]
    ]


def test_the_headline_is_the_fit() -> None:
    """Fails if the headline or the verdict differs from capacity.json."""
    rows = [*study_rows(), study_row(24, 400)]
    plateau = "Lower bound More data adds nothing at 100 steps; what more training would add is not"
    for some, verdict in (
        (rows[:-1], plateau),
        (rows, "Lower bound 1 of 3 models does not show a plateau at 100 steps (why"),
    ):
        summary = summarize(some)
        document = Document(report(some))
        strict = summary["bits_per_parameter"]["strict"]
        head = f"{strict['estimate']:.2f} bits per parameter at 100 steps"
        assert document.all("h1")[0][1] == head
        line = document.all("p", class_="interval")[0][1]
        low, high = f"{strict['low']:.2f}", f"{strict['high']:.2f}"
        other = interval(summary["bits_per_parameter"]["published"])
        assert line.startswith(
            f"Strict, 95 % interval {low} to {high} · {other} in the published convention · fp32"
        )
        assert document.all("p", class_="verdict")[0][1].startswith(verdict)
        links = [a["href"] for a, _ in document.all("a") if "download" not in a]
        assert links == ["#models"] * (verdict != plateau)
    assert "add counts" in " ".join(words for _, words in document.all("li"))


def staged(gain: float, widths: tuple[int, ...] = (8, 16), **changed: object) -> list[dict]:  # type: ignore[type-arg]
    """Rows trained in stages, whose runs would gain a fraction with more training."""
    rows = [
        study_row(row["model"]["width"], row["sequences"]["count"], row["seed"], **changed)
        for row in study_rows(widths)
    ]
    for row in rows:
        bits = row["memorized_bits"]["strict"]
        limits = (bits * (1 + gain), bits * (1 + gain / 2) - 10, bits * (1 + 2 * gain))
        row["extrapolated_bits"] = dict(zip(("estimate", "low", "high"), limits, strict=True))
        row["train"]["until"] = "converged"
    return rows


@pytest.mark.parametrize(
    ("rows", "pill", "text"),
    [
        (
            staged(0.02),
            "Saturated",
            "within 100 steps; more training would add up to about 2\xa0% [",
        ),
        (
            staged(0.3),
            "Lower bound",
            "more training would add up to about 30\xa0% [15\xa0%, 60\xa0%].",
        ),
        (staged(0.3, (8,)), "Lower bound", "more training would add about 30\xa0% ["),
        (
            staged(0.02)[:10] + list(study_rows((16,))),
            "Lower bound",
            "not measured for 1 of 2 models",
        ),
        (
            list(study_rows((8,), (0,))),
            "Lower bound",
            "not measured: --until converged measures it",
        ),
    ],
    ids=["trained", "far", "one", "half", "no stages"],
)
def test_the_verdict_has_two_parts(rows: list[dict], pill: str, text: str) -> None:  # type: ignore[type-arg]
    """Fails if a model that more training would improve, or might, is called saturated."""
    page = report(rows)
    (line,) = re.findall(r'<p class="verdict">\s*(.*?)\s*</p>', page, re.S)
    assert f">{pill}</span>" in line
    assert ("good" in line) is (pill == "Saturated")
    assert "More data adds nothing " in line
    assert text in line
    assert "flat at its end" not in page


def test_a_law_that_is_not_proportional() -> None:
    """Fails if a slope other than 1 is not said beside the fit through the origin."""
    rows = [
        row if row["model"]["width"] == 8 else row | {"memorized_bits": {k: v / 2 for k, v in bits}}
        for row in study_rows()
        for bits in [row["memorized_bits"].items()]
    ]
    for some, said in ((rows, True), (list(study_rows()), False)):
        words = " ".join(t for _, t in Document(report(some)).all("p"))
        assert ("capacity is not proportional to parameters" in words) is said


def test_the_law_matches_predict(text: str) -> None:
    """Fails if the fits below the figure differ from `fastmem predict`."""
    law = law_of_rows(list(study_rows()))
    terms = [words for _, words in Document(text).all("dd")]
    assert "3.00 [3.00, 3.00] bits per parameter" in terms
    exponent = law.exponent
    expected = (
        f"{exponent.estimate:.2f} [{exponent.low:.2f}, {exponent.high:.2f}]; 1 means proportional"
    )
    assert any(term.startswith(expected) for term in terms)


def test_tables_have_buttons_and_values(text: str) -> None:
    """Fails if a column cannot be sorted by keyboard, or a row lacks a cell."""
    document = Document(text)
    heads = document.all("th")
    assert len(document.all("button")) == len(heads) == 9 + 12
    assert all(a["scope"] == "col" for a, _ in heads)
    models = summarize(list(study_rows(precisions=("fp32", "bf16-mixed"))))["models"]
    runs = sum(len(model["runs"]) for model in models) + 1
    assert len(document.all("td")) == 9 * len(models) + 12 * runs
    values = [a["data-value"] for a, _ in document.all("td", class_="number")]
    assert {str(model["parameters"]) for model in models} <= set(values)


def test_failed_runs_and_names_are_escaped(text: str) -> None:
    """Fails if the text of a row or a folder name becomes HTML."""
    assert "Diverged: &lt;lr&gt; &amp; more" in text
    assert "<lr>" not in text
    named = report(list(study_rows()), name="<i>'\"&")
    assert "<i>" not in named
    Document(named)


@pytest.mark.parametrize("only", ["fp32", "bf16-mixed"])
def test_figures_without_numbers_say_what_to_run(only: str) -> None:
    """Fails if a section without runs is left out or empty."""
    document = Document(report(list(study_rows(precisions=(only,)))))
    assert len(document.all("figure")) == len(SINGLE)
    ((_, words),) = document.all("p", class_="missing")
    other = "bf16-mixed" if only == "fp32" else "fp32"
    assert words == (
        f"Not measured: precision (--precision {only} {other}), members against held-out sequences "
        "(in a new folder, --sequence-bits), double descent (in a new folder, --sequence-bits)."
    )


def test_an_unfinished_sweep_says_so(tmp_path: Path) -> None:
    """Fails if a report of a part of the runs looks like the whole, or a whole like a part."""
    rows = staged(0.02)
    work = {row["key"]: 1.0 for row in rows}
    for missing, said in ((3, True), (0, False)):
        write_json(tmp_path / PLANNED, {"work": work | {f"{k}": 1.0 for k in range(missing)}})
        text = report(rows, tmp_path)
        assert ("Unfinished, 20 of 23 runs:" in text) is said
        assert ("Saturated</span>" in text) is not said
    for missing, said in ((("9x9-h1-fp32-n1-seed0",), True), ((), False)):
        work = dict.fromkeys(missing, 1.0)
        write_json(tmp_path / PLANNED, {"work": work, "search": True})
        text = report(rows, tmp_path)
        assert ("Unfinished, 20 runs so far, 1 model needs more:" in text) is said
        assert ("Saturated</span>" in text) is not said


def test_one_model_has_no_law() -> None:
    """Fails if one model size gives a law or an interval."""
    text = report([row for row in study_rows((8,), seeds=(0,))])
    assert "There is no law yet" in text
    assert "Strict, no interval: one run for each data set size" in text
    assert "one model size: no law" in text
    assert "fit, fp32" not in text
    Document(text)


def test_fp32_that_never_finished_is_not_the_headline() -> None:
    """Fails if the headline is of a precision without a finished run."""
    rows = [*study_rows(precisions=("bf16-mixed",)), study_row(8, 5, error="lost")]
    document = Document(report(rows))
    assert "bf16-mixed" in document.all("p", class_="interval")[0][1]
    assert document.all("h1")[0][1] == "2.50 bits per parameter at 100 steps"


def test_many_rows_keep_the_page_short() -> None:
    """Fails if the table of runs or the curves grow without limit."""
    rows = list(study_rows(range(8, 8 + 4 * 12, 4), seeds=range(20)))
    assert len(rows) > SHOWN
    text = report(rows)
    assert len(text) < 1_500_000
    assert len(Document(text).all("tbody")) == 2
    assert text.count("<tr>") == 2 + 12 + SHOWN
    assert f"the first {SHOWN:,} here" in text
    assert "12 of 1,200 runs are drawn" in text


def test_the_same_rows_give_the_same_page() -> None:
    """Fails if the page changes with the clock or the order of a set."""
    rows = list(study_rows())
    assert report(rows) == report(list(study_rows()))


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2.2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int) -> None:
    """Fails if the contrast of text is below WCAG's 4.5, or of a mark in a figure below 3."""
    blocks = re.findall(r":root \{(.*?)\}", (TEMPLATES / "report.css").read_text(), re.S)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[scheme]))
    texts = [(t, on) for t in ("ink", "muted", "accent") for on in ("paper", "card")]
    texts += [("good", "good-soft"), ("open", "open-soft")]
    marks = [(f"{kind}{i}", "paper") for kind in "cr" for i in range(1, 8)]
    for pairs, least in ((texts, 4.5), (marks, 3.0)):
        for one, other in pairs:
            low, high = sorted(luminance(colours[name]) for name in (one, other))
            assert (high + 0.05) / (low + 0.05) >= least, (one, other)
