"""The report in a real browser: pytest tests/report/browser_report.py

Needs Debian's chromium and chromium-driver, which the other tests do not.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cases.chromium import Browser, browser
from cases.made_text import made_study, text_json
from cases.study_rows import full

from fastmem.report.text_page import write_text_page

WIDTHS = (320, 390, 768, 1200)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    path = folder / "report.html"
    path.write_text(full(folder))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    study = made_study(folder)
    return write_text_page(study, text_json(study), folder)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


def column(chromium: Browser, number: int) -> list[str]:
    """The cells of a column of the table of models, from top to bottom."""
    cells = f"row => row.cells[{number}].dataset.value ?? row.cells[{number}].textContent"
    found: Any = chromium.ask(f"[...document.querySelector('#models tbody').rows].map({cells})")
    return [str(cell) for cell in found]


def click(chromium: Browser, number: int) -> str:
    """Clicks on a column head and returns its aria-sort, which screen readers read."""
    head = f"document.querySelectorAll('#models th')[{number}]"
    chromium.ask(f"{head}.querySelector('button').click()")
    return str(chromium.ask(f"{head}.getAttribute('aria-sort')"))


def test_it_renders_without_complaint_or_network(chromium: Browser, report: Path) -> None:
    """Fails if the console shows a message, or the page requests another file."""
    chromium.requests()
    chromium.complaints()
    chromium.open(report)
    assert chromium.ask("document.querySelectorAll('svg.wide').length") == 7
    box = "document.querySelector('svg.wide').getBoundingClientRect()"
    assert chromium.ask(f"{box}.width") > 600
    assert chromium.ask(f"{box}.height") > 300
    assert chromium.complaints() == []
    asked = [url for url in chromium.requests() if not url.startswith("data:")]
    assert asked == [report.resolve().as_uri()]


def test_the_test_above_would_see_a_request(chromium: Browser, tmp_path: Path) -> None:
    """Fails if requests() misses a request of a page, or complaints() an error."""
    page = tmp_path / "page.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('no')</script>")
    chromium.requests()
    chromium.complaints()
    chromium.open(page)
    assert "http://127.0.0.1:9/x.png" in chromium.requests()
    assert any("no" in complaint for complaint in chromium.complaints())


def test_the_policy_of_the_page_blocks_requests(chromium: Browser, report: Path) -> None:
    """Fails if the policy lets the page request an address."""
    chromium.open(report)
    chromium.complaints()
    chromium.ask("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/'}))")
    assert any("Content Security Policy" in complaint for complaint in chromium.complaints())


def test_tables_sort(chromium: Browser, report: Path) -> None:
    """Fails if a click sorts numbers as text, a second click does not reverse the order, or
    aria-sort is wrong."""
    chromium.open(report)
    before = column(chromium, 2)
    assert click(chromium, 2) == "ascending"
    assert column(chromium, 2) == sorted(before, key=float) != before
    assert click(chromium, 2) == "descending"
    assert column(chromium, 2) == sorted(before, key=float, reverse=True)
    # Capacities are 2,620 to 10,897 bits: as text, the largest would come first.
    assert click(chromium, 4) == "ascending"
    assert column(chromium, 4) == sorted(column(chromium, 4), key=float)
    assert column(chromium, 4) != sorted(column(chromium, 4))
    assert click(chromium, 3) == "ascending"
    assert column(chromium, 3) == sorted(column(chromium, 3))
    sorted_heads = "document.querySelectorAll('#models th[aria-sort]').length"
    assert chromium.ask(sorted_heads) == 1


def test_what_is_missing_sorts_last(chromium: Browser, report: Path) -> None:
    """Fails if a failed run comes first in one of the two directions."""
    chromium.open(report)
    bits = "[...document.querySelector('#runs tbody').rows].map(row => row.cells[7].textContent)"
    for _ in range(2):
        chromium.ask("document.querySelectorAll('#runs th button')[7].click()")
        assert chromium.ask(bits)[-1] == "failed"


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(chromium: Browser, report: Path, width: int) -> None:
    """Fails if a phone must scroll sideways, or shows the wide figures."""
    chromium.open(report, width)
    assert chromium.ask("document.documentElement.scrollWidth") <= width
    form = "narrow" if width < 640 else "wide"
    shown = "[...document.querySelectorAll('svg')].filter(x => x.getBoundingClientRect().width)"
    assert set(chromium.ask(f"{shown}.map(x => x.getAttribute('class'))")) == {form}
    scaled = "parseFloat(getComputedStyle(x).fontSize) * x.getScreenCTM().a"
    texts = f"[...document.querySelectorAll('svg.{form} text')].map(x => {scaled})"
    horizontal = [size for size in chromium.ask(texts) if size > 1]  # A label of y has a = 0.
    assert len(horizontal) > 50
    assert min(horizontal) >= 8.5


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", ["report", "text"])
def test_no_column_is_hidden(
    chromium: Browser, page: str, width: int, request: pytest.FixtureRequest
) -> None:
    """Fails if the table of models, or on the page of text any table, must be scrolled sideways."""
    chromium.open(request.getfixturevalue(page), width)
    chromium.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert chromium.ask("document.documentElement.scrollWidth") <= width
    of = "#models .table" if page == "report" else ".table"
    hidden = f"[...document.querySelectorAll('{of}')].map(x => x.scrollWidth - x.clientWidth)"
    assert set(chromium.ask(hidden)) == {0}
    cell = "document.querySelector('#models td')"
    shown = chromium.ask(f"getComputedStyle({cell}, '::before').content")
    assert shown == ('"Model"' if width < 832 else "none")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_follow_the_scheme(chromium: Browser, report: Path, scheme: str) -> None:
    """Fails if the text of a figure is dark on dark or light on light."""
    chromium.open(report, scheme=scheme)
    colour = "getComputedStyle(document.querySelector('svg.wide text')).fill"
    paper = "getComputedStyle(document.body).backgroundColor"
    bright = [sum(map(int, str(chromium.ask(x))[4:-1].split(","))) > 383 for x in (colour, paper)]
    assert bright == ([False, True] if scheme == "light" else [True, False])


def test_it_prints(chromium: Browser, report: Path, tmp_path: Path) -> None:
    """Fails if the printed report has too few or too many pages."""
    chromium.open(report, scheme="dark")
    chromium.print(tmp_path / "report.pdf")
    printed = (tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert 4 <= printed.count(b"/Type /Page\n") + printed.count(b"/Type/Page\n") <= 12


def test_a_download_is_the_data(chromium: Browser, report: Path) -> None:
    """Fails if the browser cannot read a table from a download link of the page."""
    chromium.open(report)
    link = "document.querySelector('a[download=\"memorized_bits.csv\"]')"
    text = chromium.ask(f"atob({link}.href.split(',')[1])")
    assert text.startswith("layers,width,heads,parameters,precision,count,seed")
    assert len(text.splitlines()) == 41
