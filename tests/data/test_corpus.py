"""Prepared text against slow code: cuts, splits, duplicates; what must not change; bad input."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import Tokenizer, models

import fastmem
from fastmem import TextSequences, prepare_text
from fastmem.data import corpus as module, duplicates
from fastmem.data.duplicates import first_of_each, row_hashes
from fastmem.data.text import SPLITS, TextCorpus


def texts_of(n: int, seed: int = 0, longest: int = 200) -> list[str]:
    """Documents of few words, so that equal sequences are common, with letters of two bytes."""
    rng = random.Random(seed)
    words = ["one ", "two ", "three ", "naïve ", "да ", "0123456789abcdef", "\n"]
    return ["one " + "".join(rng.choices(words, k=rng.randrange(longest // 4))) for _ in range(n)]


def split_of(text: str, seed: int) -> str:
    share = xxhash.xxh3_64_intdigest(text.encode(), seed) / 2**64
    return "train" if share < 0.4 else "test" if share < 0.7 else "reference"


def slowly(texts: list[str], length: int, seed: int) -> tuple[dict[str, list[bytes]], int]:
    """The sequences of each split, and the number of duplicates, one sequence at a time."""
    splits: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    seen, repeats = set(), 0
    by_hash = sorted(texts, key=lambda text: xxhash.xxh3_64_intdigest(text.encode(), seed))
    for split in SPLITS:
        for text in by_hash:
            raw = text.encode()
            if split_of(text, seed) != split:
                continue
            for begin in range(0, len(raw) - length + 1, length):
                row = raw[begin : begin + length]
                repeats += row in seen
                if row not in seen:
                    splits[split].append(row)
                seen.add(row)
    return splits, repeats


def rows_of(corpus: TextCorpus) -> dict[str, list[bytes]]:
    return {split: getattr(corpus, split).text_bytes(first=0) for split in SPLITS}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def lines(folder: Path, texts: list[str]) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a corpus of a few documents takes several batches, chunks and ranges."""
    monkeypatch.setattr(module, "_BATCH_BYTES", 100)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 60)
    monkeypatch.setattr(duplicates, "_AT_ONCE", 20)
    monkeypatch.setattr(duplicates, "_BLOCK_ROWS", 3)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(("length", "seed"), [(5, 0), (8, 1), (13, 2), (16, 3)])
def test_against_slow_code(length: int, seed: int, tmp_path: Path) -> None:
    """Fails if a cut, a split, the order or the removal of equal sequences is another."""
    texts = texts_of(40, seed)
    texts += texts[:3]  # whole documents twice
    found = prepare_text(texts, tmp_path / "c", length=length, seed=seed)
    expected, repeats = slowly(texts, length, seed)
    assert rows_of(found) == expected
    assert repeats > 0
    sizes = [len(text.encode()) for text in texts]
    assert found.counts == {
        **{"documents": 43, "bytes": sum(sizes), "tokens": sum(sizes), "blank": 0, "binary": 0},
        "dropped_tokens": sum(size % length for size in sizes),
        **{"near_duplicates": 0, "exact_duplicates": repeats},
        "sequences": sum(map(len, expected.values())),
        "splits": {split: len(rows) for split, rows in expected.items()},
    }


def test_one_step_gives_what_many_give(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Fails if the size of a batch, a chunk or a range changes a file."""
    texts = texts_of(50)
    prepare_text(texts, tmp_path / "whole", length=8)
    request.getfixturevalue("small_steps")
    prepare_text(texts, tmp_path / "parts", length=8)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_documents(tmp_path: Path) -> None:
    """Fails if a sequence names another document, or a document is on two sides."""
    texts = texts_of(60, 5)
    found = prepare_text(lines(tmp_path, texts), tmp_path / "c", length=8)
    seen: dict[int, str] = {}
    for split in SPLITS:
        sequences = getattr(found, split)
        documents = sequences.documents()
        assert (np.diff(documents) >= 0).all()  # those of a document are consecutive
        names = sequences.sources(documents)
        for row, document, name in zip(
            sequences.text_bytes(first=0), documents, names, strict=True
        ):
            assert seen.setdefault(int(document), split) == split
            text = texts[int(name.removeprefix("corpus.jsonl:")) - 1].encode()
            assert row in [text[i : i + 8] for i in range(0, len(text), 8)]
            assert split_of(text.decode(), 0) == split
    sample = found.train.sample(10, seed=3)
    places = [found.train.text_bytes(first=0).index(row) for row in sample.text_bytes(first=0)]
    assert sample.documents().tolist() == found.train.documents()[places].tolist()


def test_an_added_document_moves_none(tmp_path: Path) -> None:
    """Fails if a new document changes the split of a sequence that stays."""
    texts = texts_of(80, 1)
    before = rows_of(prepare_text(texts[:60], tmp_path / "a", length=8))
    after = rows_of(prepare_text(texts, tmp_path / "b", length=8))
    old = {row: text for text in texts[:60] for row in cut(text, 8)}
    for split in SPLITS:
        for row in after[split]:
            if row in before[split]:
                continue
            # New here: of a new document, which may have taken it from a later split.
            owners = [text for text in texts[60:] if row in cut(text, 8)]
            assert [one for one in owners if split_of(one, 0) == split], (split, row, old.get(row))


def cut(text: str, length: int) -> list[bytes]:
    raw = text.encode()
    return [raw[i : i + length] for i in range(0, len(raw) - length + 1, length)]


def test_a_moved_file_changes_nothing(tmp_path: Path) -> None:
    """Fails if names, folders or the order of files change a file of the corpus or its hash."""
    rng, texts = random.Random(0), texts_of(30)
    for name in ("a", "b"):
        rng.shuffle(texts)
        for i, text in enumerate(texts):
            path = tmp_path / name / f"{rng.random()}" / f"{i}.txt"
            path.parent.mkdir(parents=True)
            path.write_text(text)
    first = prepare_text(tmp_path / "a", tmp_path / "c", length=8)
    second = prepare_text(tmp_path / "b", tmp_path / "d", length=8)
    assert first.hash == second.hash
    for split in SPLITS:
        name = f"{split}.npy"
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()
    assert first.train.documents().tolist() == second.train.documents().tolist()
    # The folder of the same text under other names is that of the corpus: no error.
    again = prepare_text(tmp_path / "b", tmp_path / "c", length=8)
    assert again.hash == first.hash
    assert again.train.sources(again.train.documents()) != []


def test_the_number_of_threads_changes_nothing(tmp_path: Path) -> None:
    """Fails if tokens, a trained tokenizer or splits depend on the threads of tokenizers."""
    path, hashes = lines(tmp_path, texts_of(300)), []
    for i, threads in enumerate(("1", "4", "false")):
        program = (
            "import fastmem; c = fastmem.prepare_text("
            f"{str(path)!r}, '{tmp_path}/{i}', length=8, train_tokenizer=300)\n"
            "print(c.hash)"
        )
        switch = {"TOKENIZERS_PARALLELISM": threads} if threads == "false" else {}
        env = {**os.environ, "RAYON_NUM_THREADS": threads.replace("false", "1"), **switch}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        hashes.append(done.stdout)
    assert len(set(hashes)) == 1


def test_near_duplicates(tmp_path: Path) -> None:
    """Fails if a document with one changed word stays, another goes, or both copies go."""
    rng = random.Random(0)
    texts = [" ".join(str(rng.random()) for _ in range(200)) for _ in range(40)]
    near = [text.replace(text.split()[7], "changed") for text in texts[:5]]
    alone = prepare_text(texts, tmp_path / "a", near_duplicates=0.7)
    assert alone.counts["near_duplicates"] == 0
    found = prepare_text([*texts, *near, texts[9]], tmp_path / "b", near_duplicates=0.7)
    assert found.counts["near_duplicates"] == 5
    assert found.counts["exact_duplicates"] == alone.counts["exact_duplicates"] + len(
        cut(texts[9], 64)
    )
    for text, other in zip(texts, near, strict=False):
        # The one that comes first stays, by split and hash.
        key = {one: xxhash.xxh3_64_intdigest(one.encode(), 0) for one in (text, other)}
        stays = min(key, key=key.__getitem__)
        rows = {row for split in SPLITS for row in getattr(found, split).text_bytes(first=0)}
        assert {*cut(stays, 64)} <= rows
        assert not {*cut(text if stays == other else other, 64)} - {*cut(stays, 64)} & rows


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 19),
    st.sampled_from(["u1", "<u2", "<u4"]),
    st.lists(st.integers(0, 2), min_size=1, max_size=30),
)
def test_row_hashes(width: int, dtype: str, kinds: list[int]) -> None:
    """Fails if equal rows differ in their hash, or rows that differ at any place do not."""
    base = np.arange(width).astype(dtype)
    rows = np.stack([base] * len(kinds))
    for i, kind in enumerate(kinds):
        if kind:
            rows[i, (i * 7) % width] += kind
    hashes = row_hashes(rows)
    for i in range(len(kinds)):
        for j in range(i):
            assert (hashes[i] == hashes[j]) == (rows[i] == rows[j]).all()


def test_first_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if another than the first kept row of a hash is kept, in one range or several."""
    rng = np.random.default_rng(0)
    hashes = rng.choice(rng.integers(2**64, size=50, dtype=np.uint64), 400)
    hashes[:3] = 2**64 - 1, 0, 2**64 - 1
    before = rng.random(400) < 0.8
    expected, seen = before.copy(), set()
    for i, value in enumerate(hashes.tolist()):
        expected[i] &= value not in seen
        if before[i]:
            seen.add(value)
    for at_once in (1000, 30):
        monkeypatch.setattr(duplicates, "_AT_ONCE", at_once)
        keep = before.copy()
        first_of_each([(i, hashes[i : i + 37]) for i in range(0, 400, 37)], keep, tmp_path)
        assert (keep == expected).all()
    assert list(tmp_path.iterdir()) == []


def test_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if text is prepared twice, or a call with other settings opens the same folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = lines(tmp_path, texts_of(30))
    first = prepare_text(path, length=8)
    assert first.folder.parent == tmp_path / "cache" / "fastmem" / "text"
    stamp = (first.folder / "train.npy").stat().st_mtime_ns
    assert prepare_text(path, length=8) == first
    assert repr(first).endswith(f", reference {first.reference.count} sequences of 8)")
    assert len(repr(first)) < 200 + len(str(first.folder))
    assert (first.folder / "train.npy").stat().st_mtime_ns == stamp
    assert prepare_text(path, length=16).folder != first.folder
    assert prepare_text(path, length=8, seed=1).folder != first.folder
    assert sorted(os.listdir(first.folder)) == [
        *("documents.npy", "manifest.json", "reference.npy", "sources.txt", "test.npy"),
        "train.npy",
    ]


def test_changed_text_is_refused(tmp_path: Path) -> None:
    """Fails if other text or settings are taken for those of a folder, or replace them unasked."""
    texts, folder = texts_of(30), tmp_path / "c"
    first = prepare_text(lines(tmp_path, texts), folder, length=8)
    path = lines(tmp_path, [*texts, "something new, which is long enough"])
    with pytest.raises(ValueError, match=r"was prepared from other text: .*jsonl has changed"):
        prepare_text(path, folder, length=8)
    with pytest.raises(ValueError, match="was prepared with length 8, not 9: give another folder"):
        prepare_text(path, folder, length=9)
    assert TextCorpus.open(folder) == first
    second = prepare_text(path, folder, length=8, overwrite=True)
    assert second.hash != first.hash
    with pytest.raises(ValueError, match="prepared again from other text"):
        fastmem.from_description(first.train.description())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run that fails leaves a folder, or what a killed run left stops the next."""
    path = lines(tmp_path, texts_of(30))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            prepare_text(path, tmp_path / "c", length=8)
    assert [one.name for one in tmp_path.iterdir()] == ["corpus.jsonl"]
    (tmp_path / ".c.part").mkdir()
    (tmp_path / ".c.part" / "train.npy").write_text("cut")
    assert prepare_text(path, tmp_path / "c", length=8).counts["documents"] == 30


def test_the_folder_of_something_else_stays(tmp_path: Path) -> None:
    """Fails if files that are not ours are replaced, even with overwrite."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not the folder of a prepared corpus"):
            prepare_text(texts_of(30), tmp_path / "c", length=8, overwrite=overwrite)
    assert (tmp_path / "c" / "thesis.tex").read_text() == "mine"
    (tmp_path / "c" / "thesis.tex").rename(tmp_path / "c" / ".thesis.tex")
    with pytest.raises(ValueError, match=r"holds \.thesis\.tex: remove it"):
        prepare_text(texts_of(30), tmp_path / "c", length=8)


def test_the_standard_library(tmp_path: Path) -> None:
    """Fails if the default corpus is not there, or has tests or installed packages in it."""
    found = prepare_text(folder=tmp_path / "c")
    assert 8e6 < found.counts["bytes"] < 40e6
    assert found.counts["exact_duplicates"] > 1000
    names = found.train.sources(np.unique(found.train.documents()))
    assert "argparse.py" in [
        *names,
        *found.test.sources(np.unique(found.test.documents())),
        *found.reference.sources(np.unique(found.reference.documents())),
    ]
    assert not [name for name in names if "site-packages" in name or "/test/" in f"/{name}"]


KNOWS_ONE = Tokenizer(models.WordLevel({"one": 0}))
TWO = ["first document of two", "second document of two"]
BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": ([], {}, "holds no text: give text"),
    "two documents": (TWO, {}, "has 2 of the 3 documents that 3 splits need"),
    "white space": (["  \n", "\t"] * 9, {}, "holds white space: give text"),
    "short": (list("abcdef"), {}, "none of 6 documents of memory has 8 tokens"),
    "duplicates": (["the same text"] * 50, {}, r"split \w+ is empty: .* hold 0 new sequences"),
    "binary": (["a\0b" * 9] * 9, {}, "holds no text"),
    "tokens": ([[1, 2, 3]] * 9, {}, "holds tokens or messages: give text"),
    "length 1": (texts_of(9), {"length": 1}, "length is 1: only tokens after the first are coded"),
    "length 0": (texts_of(9), {"length": 0}, "length must be from 2 to"),
    "small V": (texts_of(9), {"vocab": 100}, r"token \d+ of \d is outside the vocabulary of 100"),
    "fractions": (texts_of(9), {"fractions": (0.5, 0.5, 0.5)}, "3 numbers above 0 with the sum 1"),
    "no number": (texts_of(9), {"fractions": (math.nan, 0.5, 0.5)}, "3 numbers above 0 with the"),
    "unknown word": (texts_of(9), {"tokenizer": KNOWS_ONE}, r"cannot encode the text \(WordLevel"),
    "near": (texts_of(9), {"near_duplicates": 1.5}, "near_duplicates must be above 0 and below 1"),
    "no tokenizer": (texts_of(9), {"tokenizer": "/no/such.json"}, "no/such.json cannot be read"),
    "two tokenizers": (
        *(texts_of(9), {"tokenizer": "a.json", "train_tokenizer": 300}),
        "leave out tokenizer a.json",
    ),
    "small BPE": (texts_of(9), {"train_tokenizer": 100}, "train_tokenizer must be from 257"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path: Path) -> None:
    """Fails if bad input passes, gives more than one line, or leaves files."""
    data, options, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        prepare_text(data, tmp_path / "c", **{"length": 8, **options})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_files_of_a_folder(tmp_path: Path) -> None:
    """Fails if a binary file stops the others or is read as text, or is not counted and named."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, text in enumerate(texts_of(20)):
        (folder / f"{i}.txt").write_text(text)
    expected = rows_of(prepare_text(folder, tmp_path / "a", length=8))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "program.txt").write_bytes(b"\x7fELF\0\xff" * 9)
    (folder / "blank.txt").write_text(" \n" * 99)
    found = prepare_text(folder, tmp_path / "b", length=8)
    assert rows_of(found) == expected
    assert sorted(found.skipped) == ["blank.txt", "picture.png", "program.txt"]
    (folder / "latin.txt").write_bytes("naïve text".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt, byte 2: 0xef is not UTF-8 .*: give errors"):
        prepare_text(folder, tmp_path / "d", length=8)
    assert (
        prepare_text(folder, tmp_path / "d", length=8, errors="replace").counts["documents"] == 21
    )


def test_one_writer(tmp_path: Path) -> None:
    """Fails if two processes write one folder at once."""
    from fastmem.base.lock import locked

    (tmp_path / ".c.part").mkdir()
    with (
        locked(tmp_path / ".c.part"),
        pytest.raises(ValueError, match="another fastmem is at work"),
    ):
        prepare_text(texts_of(20), tmp_path / "c", length=8)
    shutil.rmtree(tmp_path / ".c.part")
    assert isinstance(prepare_text(texts_of(20), tmp_path / "c", length=8).train, TextSequences)
