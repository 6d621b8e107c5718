"""A .bin without a header: the type of its tokens, and other files of that name."""

import struct
from pathlib import Path

import numpy as np
import pytest

import fastmem
from fastmem import TokenFile
from fastmem.data.files import formats

TEXT = np.random.default_rng(0).integers(0, 50257, 4096)  # of GPT-2's vocabulary


def saved(folder: Path, tokens: object, dtype: str) -> Path:
    np.asarray(tokens).astype(dtype).tofile(folder / "x.bin")
    return folder / "x.bin"


@pytest.mark.parametrize("dtype", ["<u4", "<i4", "<i8", "<u8", ">u4", ">i8"])
@pytest.mark.parametrize("tokens", [TEXT, np.arange(4), np.tile([0, 1], 30), [7] * 40])
def test_wide_tokens_are_not_read_as_narrow(dtype: str, tokens: object, tmp_path: Path) -> None:
    """Fails if tokens of 32 or 64 bits are read as twice or four times as many uint16."""
    path = saved(tmp_path, tokens, dtype)
    with pytest.raises(
        ValueError, match=r"x\.bin read as uint16 has every second number at most 0"
    ):
        TokenFile.open(path, length=4, vocab=50257)
    file = TokenFile.open(path, length=4, dtype=dtype)
    assert file.tokens(slice(None), np.int64).ravel().tolist() == list(tokens)  # type: ignore[call-overload]
    assert fastmem.from_description(file.description())[:].tolist() == file[:].tolist()


@pytest.mark.parametrize("vocab", [100_000, 128_256, 256_000, 2**20])
def test_large_vocabularies_are_not_read_as_uint16(vocab: int, tmp_path: Path) -> None:
    """Fails if a uint32 file of a large vocabulary passes for uint16, or int64 for uint32."""
    sequences = fastmem.UniformSequences(20, 8, vocab)
    fastmem.write(sequences, tmp_path / "big")
    (tmp_path / "big.bin.json").unlink()
    with pytest.raises(ValueError, match=r"every second number at most \d+ .*: give dtype uint32"):
        TokenFile.open(tmp_path / "big.bin", length=8)
    assert (TokenFile.open(tmp_path / "big.bin", 8, vocab)[:] == sequences[:]).all()
    path = saved(tmp_path, sequences[:], "<i8")
    with pytest.raises(ValueError, match="read as uint32 has every second number at most 0"):
        TokenFile.open(path, 8, vocab)
    assert (TokenFile.open(path, 8, dtype="int64")[:] == sequences[:]).all()


def test_uint16_that_looks_like_halves(tmp_path: Path) -> None:
    """Fails if true uint16 tokens cannot be read, or common ones are refused."""
    pairs = np.stack([TEXT, np.zeros_like(TEXT)], 1)
    path = saved(tmp_path, pairs, "<u2")
    with pytest.raises(ValueError, match="or uint16 if these are the tokens"):
        TokenFile.open(path, length=2)
    assert (TokenFile.open(path, 2, dtype=np.uint16)[:] == pairs).all()
    for tokens in (TEXT, np.zeros(99), np.arange(3), np.tile([9, 0, 0], 50), TEXT % 2):
        assert TokenFile.open(saved(tmp_path, tokens, "<u2"), length=1).count == len(tokens)


@pytest.mark.parametrize("text", [b"To be, or not to be. " * 20, bytes(range(65)) * 20])
def test_bytes_are_not_read_in_pairs(text: bytes, tmp_path: Path) -> None:
    """Fails if a text, or one byte a token as of a vocabulary of characters, is read as uint16."""
    (tmp_path / "x.bin").write_bytes(text)
    with pytest.raises(ValueError, match=r"has no low byte above \d+, as text does: .* uint8"):
        TokenFile.open(tmp_path / "x.bin", length=4)
    assert bytes(TokenFile.open(tmp_path / "x.bin", 10, dtype=np.uint8)[0].tolist()) == text[:10]


def test_zeros_before_the_first_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if only the begin of a file is looked at, and the begin is padding."""
    monkeypatch.setattr(formats, "_HALVES_TOKENS", 64)
    path = saved(tmp_path, np.concatenate([np.zeros(500), TEXT]), "<i4")
    with pytest.raises(ValueError, match="read as uint16"):
        TokenFile.open(path, length=4)


@pytest.mark.parametrize("format", ["bin", "npy", "megatron", "parquet"])
def test_a_shard_of_our_own(format: formats.Format, tmp_path: Path) -> None:
    """Fails if one shard of a set is read in another type, or cut shards pass."""
    sequences = fastmem.UniformSequences(20, 8, 100_000)
    fastmem.write(sequences, tmp_path / "big", format, shards=2)
    path = tmp_path / f"big-00001-of-00002{formats.SUFFIXES[format]}"
    shard = TokenFile.open(path)
    assert (shard.known, shard.count, shard.length, shard.vocab) == (None, 10, 8, 100_000)
    assert (shard[:] == sequences[10:]).all()
    assert (fastmem.from_description(shard.description())[3] == sequences[13]).all()
    with pytest.raises(ValueError, match="with length 8, and the call gives 4: leave length out"):
        TokenFile.open(path, length=4)
    with pytest.raises(ValueError, match="and the call gives <i8: leave dtype out"):
        TokenFile.open(tmp_path / "big", dtype="int64")
    path.write_bytes(path.read_bytes()[:-32])
    with pytest.raises(ValueError, match=r"big-00001-of-00002\.\w+ has \d+ bytes"):
        TokenFile.open(path)


@pytest.mark.parametrize("dtype", [float, bool, "text", object, "<f4", [("a", int)], 7])
def test_a_type_that_is_not_of_tokens(dtype: object, tmp_path: Path) -> None:
    """Fails if a dtype that is not an integer type is a TypeError or reads the file."""
    path = saved(tmp_path, TEXT, "<u2")
    with pytest.raises(ValueError, match="dtype must be an integer type"):
        TokenFile.open(path, 4, dtype=dtype)  # type: ignore[arg-type]


def test_a_type_that_contradicts_the_header(tmp_path: Path) -> None:
    """Fails if dtype or column is silently ignored."""
    np.save(tmp_path / "a.npy", TEXT.reshape(-1, 4))
    with pytest.raises(ValueError, match=r"a\.npy has tokens of int64 .* not uint16: leave dtype"):
        TokenFile.open(tmp_path / "a.npy", dtype="uint16")
    assert TokenFile.open(tmp_path / "a.npy", dtype="int64").count == 1024
    with pytest.raises(ValueError, match=r"a\.npy has no named columns, got column 'tokens'"):
        TokenFile.open(tmp_path / "a.npy", column="tokens")


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (struct.pack("<i", 20240522), "an evaluation set of llm.c"),
        (struct.pack("<i", 20240326), "a model of llm.c"),
        (struct.pack("<i", 20240328), "a tokenizer of llm.c"),
        (struct.pack("<i", 0x616B3432), "a model of llama2.c"),
        (b"GGUF", "a GGUF model"),
        (b"PK\3\4", r"a zip archive or torch\.save's file"),
        (b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", r"an old torch\.save's file"),
        (b"\x1f\x8b\x08\x00", "a gzip file"),
        (b"\x93NUMPY", r"an \.npy file"),
        (b"PAR1", "a Parquet file"),
        (b"MMIDIDX\0\0", "an index of Megatron"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer that git lfs pull replaces"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
)
def test_other_files_are_refused_by_name(start: bytes, kind: str, tmp_path: Path) -> None:
    """Fails if a model, a tokenizer or an archive is read as tokens, whatever the type given."""
    path = tmp_path / "x.bin"
    path.write_bytes(start.ljust(1024, b"\0") + np.arange(64, dtype="<u2").tobytes())
    for dtype in (None, "uint16", "int32"):
        with pytest.raises(ValueError, match=rf"x\.bin is {kind} by its first bytes, not tokens"):
            TokenFile.open(path, length=8, dtype=dtype)


@pytest.mark.parametrize("magic", [20240520, 20240801])
@pytest.mark.parametrize("size", [4, 12, 700, 1023])
def test_a_header_of_llmc_that_is_cut(magic: int, size: int, tmp_path: Path) -> None:
    """Fails if a download that stopped inside llm.c's header is read as tokens."""
    head = struct.pack("<3i", magic, 1 if magic == 20240520 else 7, 64).ljust(1024, b"\0")
    (tmp_path / "x.bin").write_bytes(head[:size])
    with pytest.raises(ValueError, match=rf"x\.bin is cut: .* 1024 bytes, and the file has {size}"):
        TokenFile.open(tmp_path / "x.bin", length=2)
