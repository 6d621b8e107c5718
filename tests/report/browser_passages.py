"""The page of scores in a real browser: pytest tests/report/browser_passages.py

Needs Debian's chromium and chromium-driver, which the other tests do not.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases.chromium import Browser, browser
from cases.score_cases import byte_tokenizer, small_llama

from fastmem.models.scoring.scores import score
from fastmem.report.score_page import write_score_page

WIDTHS = (320, 400, 768, 1200)
EVIL = '<script>document.title = "broken"</script> <b>bold</b> \u202e right to left'


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    long = ["word" * 60, "a" * 500, "x\n" * 40]
    score(small_llama(), [EVIL, *long, *["short"] * 30], folder, tokenizer=byte_tokenizer())
    return write_score_page(folder)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


def test_it_renders_without_complaint_or_network(chromium: Browser, page: Path) -> None:
    """Fails if the console shows a message, the page requests another file, or text is HTML."""
    chromium.requests()
    chromium.complaints()
    chromium.open(page)
    assert chromium.ask("document.querySelectorAll('svg.wide').length") == 2
    assert chromium.ask("document.querySelectorAll('.passage b').length") == 0
    assert "broken" not in str(chromium.ask("document.title"))
    assert chromium.complaints() == []
    asked = [url for url in chromium.requests() if not url.startswith("data:")]
    assert asked == [page.resolve().as_uri()]


def numbers(colour: object) -> list[float]:
    """The channels of rgb(r, g, b), from 0 to 255."""
    return [float(number) for number in re.findall(r"[\d.]+", str(colour))][:3]


def luminance(colour: list[float]) -> float:
    """The relative luminance of WCAG 2 of channels from 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_any_width(chromium: Browser, page: Path, width: int) -> None:
    """Fails if the page scrolls sideways, or text is cut."""
    chromium.open(page, width)
    assert chromium.ask("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('.passage p')].filter(p => p.scrollWidth > p.clientWidth)"
    assert chromium.ask(f"{wide}.length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_rise_with_bits(chromium: Browser, page: Path, scheme: str) -> None:
    """Fails if two steps of the scale have one colour, or the text on one is hard to read."""
    chromium.open(page, scheme=scheme)
    colours = chromium.ask(
        "[...document.querySelector('.legend').querySelectorAll('.t')]"
        ".map(t => getComputedStyle(t).backgroundColor)"
    )
    assert len(set(colours)) == len(colours) == 8
    ink, card = (
        numbers(chromium.ask(f"getComputedStyle(document.querySelector('{name}')).{of}"))
        for name, of in ((".passage p", "color"), (".passage p", "backgroundColor"))
    )
    *strong, alpha = (float(number) for number in re.findall(r"[\d.]+", str(colours[-1])))
    under = [alpha * a + (1 - alpha) * b / 255 for a, b in zip(strong, card, strict=True)]
    light, dark = sorted((luminance(under), luminance([n / 255 for n in ink])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) > 4.5


def test_a_token_shows_its_bits(chromium: Browser, page: Path) -> None:
    """Fails if pointing at a token, as a finger also does, shows nothing."""
    chromium.open(page)
    chromium.ask(
        "document.querySelector('.passage p .t')"
        ".dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
    )
    title = chromium.ask("document.querySelector('.passage p .t').title")
    assert "bits" in str(title)
    assert chromium.ask("document.querySelector('.passage output').textContent") == title
