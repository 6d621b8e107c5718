"""Parquet files of other writers, and their rows in random order."""

import errno
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import fastmem
from fastmem import TokenFile
from fastmem.data.files import blocks, parquet
from fastmem.data.sequences import Tokens

ROWS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    "kind", [pyarrow.list_(pyarrow.int32()), pyarrow.large_list(pyarrow.uint16()),
             pyarrow.list_(pyarrow.int64(), 4)], ids=str
)  # fmt: skip
@pytest.mark.parametrize("sizes", [[0, 3], [0, 0, 1, 0, 2], [3, 0], [1, 0, 2, 0]])
def test_empty_row_groups(kind: pyarrow.DataType, sizes: list[int], tmp_path: Path) -> None:
    """Fails if the length is taken from a row group without rows."""
    table = pyarrow.table({"input_ids": pyarrow.array(ROWS, kind)})
    begin = 0
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for size in sizes:
            writer.write_table(table[begin : begin + size])
            begin += size
    file = TokenFile.open(tmp_path / "a.parquet", length=4)
    assert file[:].tolist() == ROWS
    assert file[[2, 0]].tolist() == [ROWS[2], ROWS[0]]


@pytest.mark.parametrize("groups", [0, 3])
def test_no_rows(groups: int, tmp_path: Path) -> None:
    """Fails if a file without sequences is not refused."""
    table = pyarrow.table({"input_ids": pyarrow.array(ROWS[:0], pyarrow.list_(pyarrow.int32()))})
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for _ in range(groups):
            writer.write_table(table)
    with pytest.raises(ValueError, match=r"a\.parquet lacks a sequence"):
        TokenFile.open(tmp_path / "a.parquet")


def test_random_order_decodes_each_group_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if shuffled batches decode row groups again, or give other tokens than .npy."""
    sequences = fastmem.UniformSequences(count=500, length=16, vocab=2048)
    fastmem.write(sequences, tmp_path / "a", "parquet")  # groups of a few sequences
    reads: list[int] = []
    read = parquet.ParquetRows._read

    def counted(self: parquet.ParquetRows, group: int) -> Tokens:
        reads.append(group)
        return read(self, group)

    monkeypatch.setattr(parquet.ParquetRows, "_read", counted)
    file = TokenFile.open(tmp_path / "a")
    before = set(tmp_path.iterdir())
    for batch in range(100):
        places = fastmem.permutation(batch, 0, 500, 0, 64)
        np.testing.assert_array_equal(file[places], sequences[places])
    groups = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups
    assert groups > 50
    assert len(reads) <= groups + 1  # the first also at the begin
    assert set(tmp_path.iterdir()) == before
    np.testing.assert_array_equal(file[:], sequences[:])


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_shuffled_batches_take_no_longer(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a shuffled batch of Parquet decodes the set again, which takes 30 ms."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 18)
    fastmem.write(fastmem.UniformSequences(100_000, 16, 2048), tmp_path / "a", format)
    stream = fastmem.SequenceStream(TokenFile.open(tmp_path / "a"), batch=4000, seed=0)
    batches = iter(stream)
    next(batches)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01


def test_a_scratch_file_is_said_and_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if gigabytes are written silently, or a disk without permission or room is an error."""
    fastmem.write(fastmem.UniformSequences(500, 16, 2048), tmp_path / "a", "parquet")
    monkeypatch.setattr(parquet, "_TOLD_BYTES", 1)
    temporary, folders = tempfile.TemporaryFile, []

    def refuse(dir: Path | None = None) -> object:
        folders.append(dir)
        if dir is not None:
            raise PermissionError(dir)
        return temporary()

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    file, full = (TokenFile.open(tmp_path / "a") for _ in range(2))
    with pytest.warns(UserWarning, match=r"a\.parquet: decodes each row group once into a scratch"):
        assert file[[400, 3]].shape == (2, 16)
    assert folders == [tmp_path, None]

    def no_space(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", no_space)
    monkeypatch.setattr(parquet, "_TOLD_BYTES", 1 << 30)
    assert full[[400, 3]].tolist() == file[[400, 3]].tolist()
