"""Megatron-LM's sets as Megatron-LM and others write them."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmem import TokenFile
from fastmem.data.files import formats

LENGTHS = [3, 5, 2]


def written(
    folder: Path,
    lengths: Sequence[int] = LENGTHS,
    pointers: Sequence[int] | None = None,
    borders: Sequence[int] | None = None,
    after: bytes = b"",
) -> Path:
    """The prefix of a set of the tokens 0, 1, 2, … in uint16."""
    ends = np.cumsum([0, *lengths])
    pointers = [2 * int(end) for end in ends[:-1]] if pointers is None else pointers
    borders = list(range(len(lengths) + 1)) if borders is None else borders
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(borders))
    index += np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes()
    index += np.array(borders, "<i8").tobytes() + after
    np.arange(10, dtype="<u2").tofile(folder / "my.set_document.bin")
    (folder / "my.set_document.idx").write_bytes(index)
    return folder / "my.set_document"


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_names_of_a_set(ending: str, tmp_path: Path) -> None:
    """Fails if a set is not opened by its prefix, its .bin or its .idx, or is another set."""
    prefix = written(tmp_path)
    file = TokenFile.open(f"{prefix}{ending}", length=5)
    assert file[:].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]  # documents are joined
    assert file.path == Path(f"{prefix}{ending}")
    with pytest.raises(ValueError, match="does not have the length of its sequences: give length"):
        TokenFile.open(f"{prefix}{ending}")
    written(tmp_path, [5, 5])
    assert TokenFile.open(f"{prefix}{ending}").count == 2


@pytest.mark.parametrize("name", ["x", "x.idx"])
def test_an_index_without_tokens(name: str, tmp_path: Path) -> None:
    """Fails if an .idx alone is read, or a prefix is found without its .bin."""
    written(tmp_path).with_suffix(".set_document.idx").rename(tmp_path / "x.idx")
    with pytest.raises(ValueError, match=r"x(\.idx)? (has the suffix|is neither a file)"):
        TokenFile.open(tmp_path / name, length=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pointers": [0, 16, 6]}, "byte 54: 16 is not where a sequence begins"),
        ({"pointers": [2, 8, 18]}, "byte 46: 2 is not where a sequence begins"),
        ({"pointers": [0, 6, -4]}, "byte 62: -4 is not where a sequence begins"),
        ({"pointers": [0, 6, 2**62]}, "byte 62: 4611686018427387904 is not where a sequence"),
        ({"pointers": [0, 0, 0]}, "byte 54: 0 is not where a sequence begins"),
        ({"lengths": [3, 9, -2]}, "byte 42: -2 is not the length of a sequence"),
        ({"lengths": [-3, 11, 2]}, "byte 34: -3 is not the length of a sequence"),
        ({"borders": [0, 1, 4]}, "byte 86: 4 is not a border of documents from 0 to 3"),
        ({"borders": [0, 2, 1, 3]}, "byte 86: 1 is not a border of documents from 0 to 3"),
        ({"borders": [1, 2, 3]}, "byte 70: 1 is not a border of documents from 0 to 3"),
        ({"borders": [-1, 2, 3]}, "byte 70: -1 is not a border of documents from 0 to 3"),
        ({"borders": [0, 1, 2]}, "byte 86: 2 is not a border of documents from 0 to 3"),
        ({"borders": [0, 2**62, 3]}, "byte 78: 4611686018427387904 is not a border"),
    ],
)
def test_an_index_that_is_altered(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if sequences are read where the index does not say, in one part or in several."""
    prefix = written(tmp_path, **change)
    for rows in (1, 2, 1 << 19):
        monkeypatch.setattr(formats, "_INDEX_ROWS", rows)
        with pytest.raises(ValueError, match=rf"my\.set_document\.idx, {message}"):
            TokenFile.open(prefix, length=5)


def test_empty_documents_and_modes(tmp_path: Path) -> None:
    """Fails if documents without tokens, of several sequences, or of other modes are refused."""
    changes: list[dict[str, Any]] = [
        {"lengths": [0, 10, 0]},
        {"borders": [0, 0, 3, 3]},
        {"borders": [0, 3], "after": b"\1\0\1"},
    ]
    for change in changes:
        assert TokenFile.open(written(tmp_path, **change), length=5).count == 2
