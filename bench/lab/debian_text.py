"""Texts of four Debian packages as documents, one a line of JSON.

    apt-get download dict-gcide wordnet-base manpages-dev perl-doc
    for each in *.deb; do dpkg-deb -x "$each" unpacked; done
    python bench/lab/debian_text.py unpacked texts

An entry of the dictionary, a synset of WordNet, a page of the manual and a page of Perl's
documentation are documents: about 250,000 of together 104 MB.
"""

import argparse
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

SHORTEST = 20
"""Characters of the shortest document."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("unpacked", type=Path, help="the files of the packages")
    parser.add_argument("out", type=Path, help="the folder of texts")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    share = options.unpacked / "usr" / "share"
    for name, texts in (
        ("gcide", entries(share / "dictd" / "gcide.dict.dz")),
        ("wordnet", synsets(share / "wordnet")),
        ("manpages", pages(share / "man")),
        ("perl", pages(share / "perl")),
    ):
        count, size = write(options.out / f"{name}.jsonl", texts)
        print(f"{name}: {count:,} documents, {size:,} bytes")


def write(path: Path, texts: Iterable[str]) -> tuple[int, int]:
    """The number of documents, and their bytes."""
    count = size = 0
    with path.open("w") as file:
        for text in texts:
            text = text.strip()
            if len(text) > SHORTEST:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                count, size = count + 1, size + len(text.encode())
    return count, size


def entries(path: Path) -> list[str]:
    return re.split(r"\n(?=\S)", gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))


def synsets(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("data.*")):
        yield from (line for line in path.read_text().splitlines() if not line.startswith("  "))


def pages(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".gz" and path.is_file():
            yield gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        elif path.suffix == ".pod":
            yield path.read_text("utf-8", "replace")


if __name__ == "__main__":
    main()
