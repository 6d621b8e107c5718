"""Documents: each kind of data, read from any document on, and what is refused."""

import json
import os
import resource
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import fastmem
from fastmem.data.documents import Documents, open_documents


def contents(documents: Documents) -> list[Any]:
    """The contents, with arrays as lists."""
    return [
        d.content.tolist() if isinstance(d.content, np.ndarray) else d.content for d in documents
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file of each kind, one in a folder, an empty one, and two that are not read."""
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("héllo\r\n", newline="")
    (tmp_path / "b" / "c.jsonl").write_text('{"text": "one"}\n\n{"text": [1, 2]}\n{"text": ""}\n')
    columns = {"text": ["p", "q", "r"], "other": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet", row_group_size=2)
    lists = pyarrow.table({"input_ids": [[1, 2, 3], [], [4]]})
    pyarrow.parquet.write_table(lists, tmp_path / "e.parquet", row_group_size=2)
    batch = pyarrow.record_batch({"text": ["s", "t"]})
    with pyarrow.ipc.new_stream(str(tmp_path / "f.arrow"), batch.schema) as stream:
        stream.write_batch(batch)
    with pyarrow.ipc.new_file(str(tmp_path / "g.arrow"), batch.schema) as file:
        file.write_batch(batch)
    np.save(tmp_path / "h.npy", np.arange(6, dtype=np.uint16).reshape(2, 3))
    np.arange(5, dtype=np.uint16).tofile(tmp_path / "i.bin")
    (tmp_path / "j.txt").write_bytes(b"")
    (tmp_path / "notes.md").write_text("#")
    (tmp_path / "z.csv").write_text("1")
    (tmp_path / ".hidden.txt").write_text("hidden")
    return tmp_path


FOLDER = [
    ("a.txt", "héllo\r\n"),
    ("b/c.jsonl:1", "one"),
    ("b/c.jsonl:3", [1, 2]),
    ("b/c.jsonl:4", ""),
    ("d.parquet:0", "p"),
    ("d.parquet:1", "q"),
    ("d.parquet:2", "r"),
    ("e.parquet:0", [1, 2, 3]),
    ("e.parquet:1", []),
    ("e.parquet:2", [4]),
    ("f.arrow:0", "s"),
    ("f.arrow:1", "t"),
    ("g.arrow:0", "s"),
    ("g.arrow:1", "t"),
    ("h.npy:0", [0, 1, 2]),
    ("h.npy:1", [3, 4, 5]),
    ("i.bin", [0, 1, 2, 3, 4]),
    ("j.txt", ""),
]


def test_a_folder_of_all_kinds(folder: Path) -> None:
    """Fails if a file is left out, read in another order or under another name, or if a file that
    is not read is not named."""
    found = open_documents(folder)
    assert [d.source for d in found] == [source for source, _ in FOLDER]
    assert contents(found) == [content for _, content in FOLDER]
    assert found.skipped_in_words() == f"{folder}: skips 2 files, notes.md, z.csv"
    read = [d.read for d in found]
    assert read == sorted(read)
    assert read[-1] == 1


def test_reading_begins_at_any_document(folder: Path) -> None:
    """Fails if documents from number k on are others than those of a whole reading: a run that
    resumes would score a document twice, or none."""
    found = open_documents(folder)
    whole = [d.source for d in found]
    for first in range(len(whole) + 2):
        assert [d.source for d in found.after(first)] == whole[first:]


def test_a_pattern(folder: Path) -> None:
    """Fails if a pattern takes other files than it matches."""
    found = open_documents(f"{folder}/[de].parquet")
    assert [d.source for d in found] == [s for s, _ in FOLDER if s[:2] in ("d.", "e.")]
    found = open_documents(f"{folder.parent}/*/[de].parquet")
    assert {d.source.split("/")[1][0] for d in found} == {"d", "e"}


def test_a_file_is_a_stream(tmp_path: Path) -> None:
    """Fails if memory grows with the data."""
    path = tmp_path / "large.jsonl"
    line = json.dumps({"text": "x" * 1000}) + "\n"
    path.write_text(line * 20_000)
    table = pyarrow.table({"text": ["x" * 1000] * 20_000})
    pyarrow.parquet.write_table(table, tmp_path / "large.parquet", row_group_size=1000)
    for name in ("large.jsonl", "large.parquet"):
        tracemalloc.start()
        assert sum(len(d.content) for d in open_documents(tmp_path / name)) == 20_000_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4e6, name


@pytest.mark.parametrize(
    ("name", "raw", "byte"),
    [("a.txt", b"caf\xe9 au lait", 3), ("a.jsonl", b'{"text":"ok"}\n{"text":"\xff"}\n', 23)],
)
def test_invalid_utf_8(name: str, raw: bytes, byte: int, tmp_path: Path) -> None:
    """Fails if the file and the byte are not named, or errors does another thing than in Python."""
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{path}, byte {byte}: 0x.. is not UTF-8"):
        list(open_documents(path))
    for errors in ("replace", "ignore", "backslashreplace"):
        text = raw if name == "a.txt" else raw[-4:-3]
        assert contents(open_documents(path, errors=errors))[-1] == text.decode("utf-8", errors)
    with pytest.raises(ValueError, match="errors must be one of strict, replace"):
        open_documents(path, errors="surrogateescape")


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    """Fails if the three bytes that some editors put first are scored."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhi")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hi"}')
    assert contents(open_documents(tmp_path)) == ["hi", "hi"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 (byte 15) is not JSON"),
        ('{"body": "x"}', "line 2 (byte 15) has fields body, none is 'text': give field"),
        ("[1]", "line 2 (byte 15) is not an object, none is 'text'"),
        ('{"text": null}', "field 'text', is None: a document is a text, a list of tokens"),
        ('{"text": 1.5}', "is 1.5: a document is a text"),
        ('{"text": [1, "x"]}', "a document is a text"),
        ('{"text": [[1], [2, 3]]}', "field 'text', is [[1], [2, 3]]: a document is a text"),
        ('{"text": {"a": 1}}', "is an object: a document is a text"),
        ('{"text": [{"role": "u", "content": "\\ud800"}]}', "has half of a surrogate pair"),
        ('{"text": "\\ud800"}', "has half of a surrogate pair"),
    ],
)
def test_lines_that_are_no_document(line: str, message: str, tmp_path: Path) -> None:
    """Fails if a bad line is left out silently, or its place is not named."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}\n' + line + "\n")
    with pytest.raises(ValueError) as told:  # noqa: PT011
        list(open_documents(path))
    assert message in str(told.value)
    assert str(path) in str(told.value)


def test_fields_and_columns(tmp_path: Path) -> None:
    """Fails if another field or column is read than asked for, or than the documents say."""
    (tmp_path / "a.jsonl").write_text('{"text": "t", "body": "b"}\n')
    assert contents(open_documents(tmp_path / "a.jsonl", field="body")) == ["b"]
    path = tmp_path / "b.parquet"
    for columns, column, wanted in (
        ({"input_ids": [[1]], "text": ["t"], "x": ["x"]}, None, ["t"]),
        ({"input_ids": [[1]], "x": ["x"]}, None, [[1]]),
        ({"n": [1], "x": ["x"]}, None, ["x"]),
        ({"text": ["t"], "x": ["x"]}, "x", ["x"]),
        ({"text": pyarrow.array(["t", "u"]).dictionary_encode()}, None, ["t", "u"]),
        ({"text": pyarrow.array(["t"], pyarrow.string_view())}, None, ["t"]),
        (
            {"text": [[{"role": "user", "content": "x"}]]},
            "text",
            [[{"role": "user", "content": "x"}]],
        ),
    ):
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        assert contents(open_documents(path, column=column)) == wanted
    for columns, column, message in (
        (
            {"x": ["x"], "y": ["y"]},
            None,
            r"has columns \['x', 'y'\], and not one alone with text or tokens: give column",
        ),
        ({"x": ["x"]}, "z", r"lacks column 'z' and has \['x'\]: give column"),
        ({"text": ["x", None]}, None, "row 1, is null"),
        ({"text": ["x"], "n": [7]}, "n", r"b\.parquet, row 0, is 7: a document is a text"),
        ({"text": ["x"], "n": [[0.5]]}, "n", r"b\.parquet, row 0, is \[0\.5\]: a document is"),
        ({"text": ["x"], "n": [b"x"]}, "n", r"row 0, is b'x': a document is"),
        ({"input_ids": [[1], [2, None]]}, None, r"b\.parquet, row 1, is \[2, None\]: a document"),
    ):
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(ValueError, match=message):
            list(open_documents(path, column=column))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a whole parquet file"):
        open_documents(path)


def test_token_files(tmp_path: Path) -> None:
    """Fails if a file without a length is not one document, or `length` or a manifest is not
    heeded."""
    path = tmp_path / "t.bin"
    np.arange(7, dtype=np.uint16).tofile(path)
    assert contents(open_documents(path)) == [list(range(7))]
    with pytest.warns(UserWarning, match="drops the last 1 tokens"):
        cut = open_documents(path, length=3)
    assert contents(cut) == [[0, 1, 2], [3, 4, 5]]
    np.arange(3, dtype=np.uint32).tofile(path)
    assert contents(open_documents(path, dtype="uint32")) == [[0, 1, 2]]
    uniform = fastmem.UniformSequences(3, length=4, vocab=16)
    fastmem.write(uniform, tmp_path / "set" / "u", "bin")
    assert contents(open_documents(tmp_path / "set")) == uniform[:].tolist()
    assert contents(open_documents(tmp_path / "set" / "u")) == uniform[:].tolist()


def test_data_in_memory() -> None:
    """Fails if data in memory becomes other documents than it holds."""
    tokens = [[1, 2], [3, 4]]
    for data, wanted in (
        (["a", "b"], ["a", "b"]),
        ([[1], [], [2, 3]], [[1], [], [2, 3]]),
        ([1, 2, 3], [[1, 2, 3]]),
        (np.asarray(tokens), tokens),
        (np.asarray([5, 6], np.uint16), [[5, 6]]),
        (torch.tensor(tokens), tokens),
        ([torch.tensor([1, 2]), np.asarray([3])], [[1, 2], [3]]),
        ([[{"role": "user", "content": "x"}]], [[{"role": "user", "content": "x"}]]),
        (datasets.Dataset.from_dict({"text": ["a", "b", "c"]}), ["a", "b", "c"]),
        (fastmem.from_array(tokens), tokens),
        ([], []),
    ):
        found = open_documents(data)
        assert contents(found) == wanted
        assert found.count == len(wanted)
        assert [d.source for d in found.after(1)] == [f"{i}" for i in range(1, len(wanted))]


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    """Fails if a folder of many files keeps one open for each, or another error than the limit of
    open files is told."""
    for i in range(40):
        pyarrow.parquet.write_table(pyarrow.table({"text": [f"{i}"]}), tmp_path / f"{i:02}.parquet")
        batch = pyarrow.record_batch({"text": [f"{i}"]})
        for kind, new in (("s", pyarrow.ipc.new_stream), ("f", pyarrow.ipc.new_file)):
            with new(str(tmp_path / f"{kind}{i:02}.arrow"), batch.schema) as file:
                file.write_batch(batch)
        np.save(tmp_path / f"n{i:02}.npy", np.array([[i, 1]], np.uint16))
        np.array([i, 1], np.uint16).tofile(tmp_path / f"t{i:02}.bin")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, limits[1]))
    try:
        documents = open_documents(tmp_path)
        assert sum(1 for _ in documents) == 200
        spare: list[Any] = []
        try:
            with suppress(OSError):
                while True:
                    spare.append(Path("/dev/null").open())  # noqa: SIM115
            with pytest.raises(OSError, match="Too many open files"):
                open_documents(tmp_path / "00.parquet")
        finally:
            for one in spare:
                one.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_halves_of_surrogate_pairs_in_memory() -> None:
    """Fails if text that UTF-8 lacks is an error without a place, or errors is not heeded."""
    with pytest.raises(ValueError, match="document 1 has half of a surrogate pair"):
        open_documents(["a", "\ud800"])
    message = {"role": "user", "content": "x\ud800"}
    with pytest.raises(ValueError, match="document 0 has half of a surrogate pair"):
        open_documents([[message]])
    assert contents(open_documents(["a", "b\ud800"], errors="replace")) == ["a", "b?"]
    assert contents(open_documents([[message]], errors="ignore")) == [[message | {"content": "x"}]]


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """Fails if a name that is not UTF-8 becomes text that cannot be written."""
    path = Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"\xff.txt"))
    path.write_text("x")
    for data in (tmp_path, path):
        assert [d.source for d in open_documents(data)] == ["a\\xff.txt"]


def test_the_identity_changes_with_the_data(folder: Path) -> None:
    """Fails if a run could go on with other data."""
    for one, other in (
        (["ab", "c"], ["a", "bc"]),
        ([[1, 2], [3]], [[1], [2, 3]]),
        (["1"], [[1]]),
    ):
        assert open_documents(one).identity != open_documents(other).identity
        assert open_documents(one).identity == open_documents(list(one)).identity
    before = open_documents(folder).identity
    assert open_documents(folder).identity == before
    (folder / "a.txt").write_text("hello!")
    changed = open_documents(folder).identity
    (folder / "a.txt").rename(folder / "aa.txt")
    assert len({before, changed, open_documents(folder).identity}) == 3


def test_a_data_set_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if NAME:CONFIG:SPLIT is read otherwise, or a choice of splits is not asked for."""
    called: list[Any] = []
    part = datasets.Dataset.from_dict({"text": ["a"]})

    def load(path: str, config: str | None, split: str | None) -> Any:
        called.append((path, config, split))
        if path == "gone":
            raise ConnectionError("no\nnetwork")
        splits = datasets.DatasetDict({"train": part, "test": part})
        return part if split else splits

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert contents(open_documents("org/name:en:test")) == ["a"]
    assert called == [("org/name", "en", "test")]
    with pytest.raises(ValueError, match="has several splits: give one of org/name:en:train, "):
        open_documents("org/name:en")
    with pytest.raises(ValueError, match=r"gone is neither a file nor .*: no network"):
        open_documents("gone")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "data is an empty name"),
        ("missing.txt", "missing.txt does not exist"),
        ("/no/where", "/no/where does not exist"),
        (5, "data must be a path, a list of documents"),
        ({"text": "a"}, "data must be a path"),
        ([1.5], "document 0 is 1.5"),
        (["a", None], "document 1 is None"),
    ],
)
def test_what_is_refused(data: Any, message: str) -> None:
    """Fails if another error than a line that names the data ends the call."""
    with pytest.raises(ValueError, match=message):
        list(open_documents(data))


def test_results_in_the_folder_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run that writes into the folder of its data reads its results, or a file that is
    not read makes other data of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    before = open_documents(".", without="scores/now")
    for name in ("scores/now/a.parquet", ".DS_Store", "picture.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"results")
    for data, without in ((".", "scores/now"), (tmp_path, "../" + tmp_path.name + "/scores/now")):
        after = open_documents(data, without=without)
        assert after.identity == before.identity
        assert contents(after) == ["x"]
        assert after.skipped == ("picture.png",)


def test_token_files_in_a_folder_of_text(tmp_path: Path) -> None:
    """Fails if a file of tokens, or a damaged one, ends the reading of a folder of text, or is not
    named."""
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "odd.bin").write_bytes(b"odd")
    found = open_documents(tmp_path, only_text=True)
    assert contents(found) == ["x"]
    assert found.skipped == ("odd.bin",)
    with pytest.raises(ValueError, match=r"odd\.bin"):
        contents(open_documents(tmp_path))


def test_a_folder_without_documents(tmp_path: Path) -> None:
    """Fails if a folder of other files is taken for an empty data set, or a file for text."""
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(ValueError, match=r"holds no file of \.arrow, \.bin"):
        open_documents(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    for name in (".md", ".json"):
        with pytest.raises(ValueError, match=rf"has the suffix '\{name}'"):
            open_documents(tmp_path / f"a{name}")


def test_a_text_in_the_place_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a text that is given as DATA is only called the name of a data set."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"a text is neither a file nor a folder, .* give a path"):
        open_documents("a text")
