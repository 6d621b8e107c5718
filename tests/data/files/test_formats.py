"""Each format read by the reader of its users; N sequences, S tokens, V vocabulary."""

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from cases.written_files import FORMATS
from numpy.typing import NDArray

import fastmem
from fastmem.data.files import formats
from fastmem.data.files.formats import SUFFIXES, Format, read_layout

# Where the token type changes: uint16 for Megatron, uint16 for the others, uint32.
VOCABS = [2048, 65499, 65500, 65536, 65537]


def written(folder: Path, format: Format, vocab: int, shards: int = 1) -> NDArray[np.int64]:
    """Writes a set of 7 sequences and returns its tokens."""
    sequences = fastmem.UniformSequences(count=7, length=5, vocab=vocab, seed=3)
    fastmem.write(sequences, folder / "train", format, shards)
    return sequences.tokens(slice(None), np.int64)


def test_known_answer(tmp_path: Path) -> None:
    """Fails if nanoGPT's payload is anything but the tokens, two bytes each, low byte first."""
    sequences = fastmem.UniformSequences(count=1, length=4, vocab=2048, seed=0)
    assert sequences[0].tolist() == [213, 1575, 1421, 361]
    fastmem.write(sequences, tmp_path / "train.bin")
    assert (tmp_path / "train.bin").read_bytes() == bytes.fromhex("d500 2706 8d05 6901")


@pytest.mark.parametrize("vocab", VOCABS)
def test_bin(vocab: int, tmp_path: Path) -> None:
    """Fails if np.memmap, as nanoGPT's train.py calls it, does not see the tokens."""
    tokens = written(tmp_path, "bin", vocab)
    dtype = np.uint16 if vocab <= 65536 else np.uint32
    there = np.memmap(tmp_path / "train.bin", dtype=dtype, mode="r")
    assert there.tolist() == tokens.ravel().tolist()


@pytest.mark.parametrize("vocab", VOCABS)
def test_llmc(vocab: int, tmp_path: Path) -> None:
    """Fails if a file breaks a check of llm.c's dataloader: magic, version, count, exact size."""
    tokens = written(tmp_path, "llmc", vocab, shards=2)
    wide = vocab > 65536
    there = []
    for path in sorted(tmp_path.glob("train-*.bin")):  # llm.c takes a glob pattern
        payload = path.read_bytes()
        head = np.frombuffer(payload[:1024], "<i4")
        assert head[:2].tolist() == ([20240801, 7] if wide else [20240520, 1])
        assert head[2] > 0
        assert not head[3:].any()
        assert len(payload) == 256 * 4 + head[2] * (4 if wide else 2)
        there.append(np.frombuffer(payload, "<u4" if wide else "<u2", offset=1024))
    assert np.concatenate(there).tolist() == tokens.ravel().tolist()


def megatron(prefix: Path) -> list[NDArray[Any]]:
    """The sequences, by the rules of Megatron-LM's IndexedDataset, from a prefix of .bin, .idx."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, count, documents = struct.unpack("<QBQQ", index[9:34])
    assert version == 1
    dtype = {8: np.uint16, 4: np.int32}[code]
    lengths = np.frombuffer(index, np.int32, count, 34)
    pointers = np.frombuffer(index, np.int64, count, 34 + 4 * count)
    borders = np.frombuffer(index, np.int64, documents, 34 + 12 * count)
    assert len(index) == 34 + 12 * count + 8 * documents
    assert borders.tolist() == list(range(count + 1))  # each sequence is a document
    payload = prefix.with_suffix(".bin").read_bytes()
    rows = zip(lengths.tolist(), pointers.tolist(), strict=True)
    return [np.frombuffer(payload, dtype, n, offset) for n, offset in rows]


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("shards", [1, 3])
def test_megatron(vocab: int, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if Megatron's reader finds other sequences, types or documents; parts of 2 rows."""
    monkeypatch.setattr(formats, "_INDEX_ROWS", 2)
    tokens = written(tmp_path, "megatron", vocab, shards)
    rows = [row for path in sorted(tmp_path.glob("train*.bin")) for row in megatron(path)]
    assert [row.tolist() for row in rows] == tokens.tolist()
    assert rows[0].dtype == (np.uint16 if vocab < 65500 else np.int32)


@pytest.mark.parametrize("vocab", VOCABS)
def test_npy(vocab: int, tmp_path: Path) -> None:
    """Fails if np.load, mapped or not, gives another array, or an array that is not aligned."""
    tokens = written(tmp_path, "npy", vocab)
    there = np.load(tmp_path / "train.npy", mmap_mode="r")
    assert there.dtype == (np.uint16 if vocab <= 65536 else np.uint32)
    np.testing.assert_array_equal(there, tokens)
    np.testing.assert_array_equal(np.load(tmp_path / "train.npy"), tokens)
    assert there.offset % 4096 == 0


@pytest.mark.parametrize("vocab", VOCABS)
def test_safetensors(vocab: int, tmp_path: Path) -> None:
    """Fails if safetensors refuses the file or finds another tensor, in NumPy or torch."""
    tokens = written(tmp_path, "safetensors", vocab)
    path = tmp_path / "train.safetensors"
    there = safetensors.numpy.load_file(path)
    assert list(there) == ["input_ids"]
    assert there["input_ids"].dtype == (np.uint16 if vocab <= 65536 else np.uint32)
    np.testing.assert_array_equal(there["input_ids"], tokens)
    with safetensors.safe_open(path, "pt") as file:
        part = file.get_slice("input_ids")[2:4]
    assert part.to(torch.int64).tolist() == tokens[2:4].tolist()


@pytest.mark.parametrize("vocab", VOCABS)
def test_parquet(vocab: int, tmp_path: Path) -> None:
    """Fails if pyarrow or datasets finds other rows, another type or another column."""
    import pyarrow.parquet

    tokens = written(tmp_path, "parquet", vocab, shards=2)
    paths = sorted(tmp_path.glob("*.parquet"))
    table = pyarrow.parquet.read_table(paths)
    assert table.column_names == ["input_ids"]
    assert table.schema.field("input_ids").type == pyarrow.list_(pyarrow.int32())
    assert table["input_ids"].to_pylist() == tokens.tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_datasets(tmp_path: Path) -> None:
    """Fails if Hugging Face's datasets does not read the Parquet files as torch tensors."""
    import datasets

    tokens = written(tmp_path, "parquet", 2048, shards=2)
    paths = [str(path) for path in sorted(tmp_path.glob("*.parquet"))]
    there = datasets.Dataset.from_parquet(paths, cache_dir=str(tmp_path / "cache"))
    assert there.num_rows == 7
    assert there.with_format("torch")[5]["input_ids"].tolist() == tokens[5].tolist()


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if Parquet without pyarrow is a traceback or leaves a file."""
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install 'fastmem-lm\[parquet\]'"):
        written(tmp_path, "parquet", 2048)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "parquet"])
@pytest.mark.parametrize("vocab", VOCABS)
def test_layout(format: Format, vocab: int, tmp_path: Path) -> None:
    """Fails if the reader does not find the writer's layout in the file alone."""
    tokens = written(tmp_path, format, vocab)
    path = tmp_path / f"train{SUFFIXES[format]}"
    layout = read_layout(path, vocab)
    assert (layout.format, layout.tokens) == (format, 35)
    assert layout.length == (None if format in ("bin", "llmc") else 5)
    there = np.fromfile(path, layout.dtype, offset=layout.offset)
    assert there.tolist() == tokens.ravel().tolist()


@pytest.mark.parametrize("format", ["llmc", "npy", "safetensors", "megatron"])
def test_every_cut_is_seen(format: Format, tmp_path: Path) -> None:
    """Fails if a cut file passes, or its name is not in the message."""
    written(tmp_path, format, 2048)
    path = tmp_path / f"train{SUFFIXES[format]}"
    for cut in [path, path.with_suffix(".idx")] if format == "megatron" else [path]:
        payload = cut.read_bytes()
        # llm.c's magic is the only sign of its format: a file cut before it ends is a plain .bin.
        for end in range(
            1024 if format == "llmc" else 0, len(payload), max(1, len(payload) // 300)
        ):
            cut.write_bytes(payload[:end])
            with pytest.raises(ValueError, match=cut.name):
                read_layout(path)
        cut.write_bytes(payload + b"\0\0")
        if cut.suffix != ".idx":  # where the modes of a multimodal set may follow
            with pytest.raises(ValueError, match=cut.name):
                read_layout(path)
        cut.write_bytes(payload)
        read_layout(path)


@pytest.mark.parametrize(
    ("name", "payload", "message"),
    [
        ("a.npy", b"\x93NUMPX" + bytes(90), "not a .npy file, from byte 0 on"),
        ("a.safetensors", bytes(90), "not a safetensors file of tokens, from byte 0 on"),
        ("a.safetensors", b"\xff" * 90, "not a safetensors file of tokens, from byte 0 on"),
        ("a.bin", b"abc", "its last token, at byte 2, is incomplete"),
        ("a.bin", struct.pack("<3i", 20240520, 2, 5).ljust(2048, b"\0"), "version 2 and 5 tokens"),
        ("a.txt", b"1 2 3", "has the suffix '.txt': fastmem reads .bin, .npy"),
    ],
)
def test_foreign_files(name: str, payload: bytes, message: str, tmp_path: Path) -> None:
    """Fails if another file is read as a file of tokens."""
    (tmp_path / name).write_bytes(payload)
    with pytest.raises(ValueError, match=message):
        read_layout(tmp_path / name)


@pytest.mark.parametrize(
    "array",
    [np.zeros(4), np.zeros((2, 2), ">u2"), np.zeros((2, 2, 2), "<u2"), np.zeros((3, 2), "<u2").T],
)
def test_foreign_arrays(array: NDArray[Any], tmp_path: Path) -> None:
    """Fails if an .npy of floats, big-endian, of three axes or in Fortran order is read as rows."""
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=r"a\.npy holds .* not rows of little-endian integers"):
        read_layout(tmp_path / "a.npy")


def test_limits_of_a_format(tmp_path: Path) -> None:
    """Fails if a count that a header cannot hold is written as another, or the fix is wrong."""
    big = fastmem.UniformSequences(count=2**26, length=64, vocab=2048)
    with pytest.raises(ValueError, match=r"at most 2147483647 tokens .* write 3 times as many"):
        fastmem.write(big, tmp_path / "a", "llmc")
    assert len(formats.header("llmc", -(-(2**26) // 3), 64, np.dtype("<u2"))) == 1024
    with pytest.raises(ValueError, match="at most 2147483647 tokens, not 2147483648"):
        formats.header("megatron", 1, 2**31, np.dtype("<u2"))
    assert not list(tmp_path.iterdir())
