"""The documents: their lengths, links, figures, paths and examples."""

import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
TOP = ("bench", "csrc", "docs", "fastmem", "kernels", "tests")
PACKAGES = ("base", "cli", "data", "likelihood", "memorization", "models")
PACKAGES += ("report", "sweeps", "training", "integrations")
FILE = re.compile(rf"(?<![\w./{{-])(?:{'|'.join(TOP + PACKAGES)})/[\w./*-]*")
"""A path from the root, or from fastmem/ as in docs/design.md; not of a folder elsewhere."""

each_document = pytest.mark.parametrize(
    "path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCUMENTS]
)


def prose(path: Path) -> str:
    """The text of a document without its blocks of code."""
    return BLOCK.sub("", path.read_text())


def programs(path: Path) -> list[str]:
    """The blocks of Python in a document."""
    return [text for language, text in BLOCK.findall(path.read_text()) if language == "python"]


def anchors(path: Path) -> set[str]:
    """The fragments by which a document's headings are linked, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.M)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize(("name", "most"), [("README.md", 120), ("docs/results.md", 240)])
def test_lengths(name: str, most: int) -> None:
    """Fails if a document that is read first grows into one that nobody reads."""
    assert len((ROOT / name).read_text().splitlines()) <= most


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    """Fails if a document links to a file, a figure or a heading that does not exist."""
    broken = []
    for link in LINK.findall(prose(path)):
        if "://" in link:
            continue
        name, _, fragment = unquote(link).partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (fragment and fragment not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_figure_is_shown_once_at_least() -> None:
    """Fails if docs/figures/ keeps a figure that no document shows."""
    shown = {
        (path.parent / link).resolve() for path in DOCUMENTS for link in LINK.findall(prose(path))
    }
    assert set((ROOT / "docs" / "figures").iterdir()) <= shown


@each_document
def test_paths_exist(path: Path) -> None:
    """Fails if a document names a file or folder of the repository that is not there."""
    text = path.read_text() if path.name == "design.md" else prose(path)
    missing = []
    for name in {found.rstrip(".") for found in FILE.findall(text)}:
        places = [ROOT] if name.startswith(tuple(f"{top}/" for top in TOP)) else [ROOT / "fastmem"]
        if not any(any(place.glob(name.rstrip("/"))) for place in places):
            missing.append(name)
    assert missing == []


def test_the_results_name_all_their_data() -> None:
    """Fails if results.md names a JSON file that is not there, or leaves one out."""
    named = set(re.findall(r"bench/results/([\w.-]+\.json)", prose(ROOT / "docs" / "results.md")))
    assert named == {path.name for path in (ROOT / "bench" / "results").iterdir()}


@pytest.mark.parametrize("name", ["README.md", "docs/method.md", "docs/store.md"])
def test_programs_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the Python in a document does not run as printed, beside the folder of a sweep."""
    shutil.copytree(ROOT / "tests/fixtures/v0.1.0/sweep", tmp_path / "capacity-laptop")
    monkeypatch.chdir(tmp_path)
    assert programs(ROOT / name)
    for block in programs(ROOT / name):
        exec(compile(block, name, "exec"), {})


def test_the_readme_has_the_number_of_its_picture() -> None:
    """Fails if the number to expect, the text of the picture and the results disagree."""
    readme, results = (ROOT / "README.md").read_text(), (ROOT / "docs/results.md").read_text()
    (number,) = re.findall(r"about (\d\.\d\d) bits per\s+parameter", readme)
    assert f"![The report of the default run: {number} bits per parameter" in readme
    assert re.search(rf"\*\*{re.escape(number)} \[[\d., ]+\] strict\*\*", results)


def test_the_readme_has_the_packages_and_the_commands() -> None:
    """Fails if the README lacks a package, or a command that continuous integration starts."""
    readme = (ROOT / "README.md").read_text()
    named = re.findall(r"^- `fastmem/(\w+)`", readme, re.M)
    assert sorted(named) == sorted(path.parent.name for path in ROOT.glob("fastmem/*/__init__.py"))
    first = r"    pip install -e \. && fastmem capacity +# the main job\n"
    tests = r"pytest -n 2 --dist loadfile --no-loadscope-reorder +# the tests\n"
    second = r"    pip install -e '\.\[test\]' && " + tests
    assert re.search(first + second, readme)
