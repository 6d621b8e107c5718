"""Files read back as sequences: our files exactly, foreign files with their damage named."""

import copy
import math
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.written_files import FORMATS
from numpy.typing import NDArray

import fastmem
from fastmem import TokenFile
from fastmem.data.files.formats import Format


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("vocab", [2048, 65536, 70000])
def test_our_own(format: Format, shards: int, vocab: int, tmp_path: Path) -> None:
    """Fails if a file gives other tokens than its set for any index, or loses a property."""
    sequences = fastmem.UniformSequences(count=53, length=7, vocab=vocab, seed=2)
    fastmem.write(sequences, tmp_path / "train", format, shards)
    file = TokenFile.open(tmp_path / "train")
    assert file.known == sequences
    for name in ("count", "length", "vocab", "entropy_bits", "coded_entropy_bits", "context"):
        assert getattr(file, name) == getattr(sequences, name)
    assert fastmem.from_description(file.description()) == sequences
    assert file.held_out(4) == sequences.held_out(4)
    assert len(file.files) == shards
    draw = np.random.default_rng(0)
    for indices in (
        *(0, -1, 17, 18, 35, slice(None), slice(10, 40), slice(40, 10, -3), slice(5, 5)),
        *([], [52, 0, 17, 18, 18], draw.integers(0, 53, 300), np.array([3], np.uint64)),
    ):
        for dtype in (None, np.int64, np.uint32):
            there, expected = file.tokens(indices, dtype), sequences.tokens(indices, dtype)
            assert there.dtype == expected.dtype
            np.testing.assert_array_equal(there, expected)
    assert file.to_torch().tolist() == sequences.to_torch().tolist()
    assert (file.copies() == 1).all()
    copy = pickle.loads(pickle.dumps(file))
    assert copy == file
    np.testing.assert_array_equal(copy[3:9], file[3:9])
    with pytest.raises(IndexError, match="index 53 is outside this set of 53"):
        file[53]


def test_structure_is_known(tmp_path: Path) -> None:
    """Fails if duplicates or a prefix are forgotten on the way through a file."""
    base = fastmem.UniformSequences(count=50, length=8, vocab=16)
    sequences = fastmem.PrefixedSequences(fastmem.repeated(base, 0.2, 3), prefix=3)
    fastmem.write(sequences, tmp_path / "train")
    file = TokenFile.open(tmp_path / "train")
    np.testing.assert_array_equal(file.copies(), sequences.copies())
    assert (file.context, file.entropy_bits) == (3, sequences.entropy_bits)
    np.testing.assert_array_equal(file[:], sequences[:])


def foreign(folder: Path, name: str, tokens: NDArray[Any]) -> Path:
    """A file as another program would write it: tokens (n, S) of small ints."""
    path = folder / name
    if name.endswith("npy"):
        np.save(path, tokens)
    elif name.endswith("safetensors"):
        import safetensors.numpy

        safetensors.numpy.save_file({"tokens": tokens}, path, metadata={"made": "elsewhere"})
    elif name.endswith("parquet"):
        import pyarrow.parquet

        table = pyarrow.table({"attention_mask": [1] * len(tokens), "input_ids": tokens.tolist()})
        pyarrow.parquet.write_table(table, path, row_group_size=4)
    else:
        tokens.tofile(path)
    return path


@pytest.mark.parametrize("name", ["a.bin", "a.npy", "a.safetensors", "a.parquet"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_foreign_files(name: str, dtype: type, tmp_path: Path) -> None:
    """Fails if a file of another program gives other tokens, or an entropy."""
    tokens = np.arange(60, dtype=dtype).reshape(12, 5)
    if name == "a.bin":  # which has no header with a dtype
        tokens = tokens.astype(np.uint16)
    path = foreign(tmp_path, name, tokens)
    file = TokenFile.open(path, length=5)
    assert (file.count, file.length, file.vocab, file.known) == (12, 5, 60, None)
    np.testing.assert_array_equal(file.tokens(slice(None), np.int64), tokens)
    np.testing.assert_array_equal(file[[11, 0, 4]], tokens[[11, 0, 4]])
    assert math.isnan(file.entropy_bits)
    assert math.isnan(file.coded_entropy_bits)
    assert fastmem.from_description(file.description()) == file
    assert TokenFile.open(path, length=5, vocab=100).vocab == 100
    with pytest.raises(ValueError, match="without held-out sequences"):
        file.held_out(1)


def test_a_foreign_file_as_source(tmp_path: Path) -> None:
    """Fails if another program's file cannot be converted, and the result checked against it."""
    path = foreign(tmp_path, "a.npy", np.arange(60, dtype=np.uint16).reshape(12, 5))
    fastmem.write(TokenFile.open(path), tmp_path / "b", "megatron")
    assert fastmem.verify(tmp_path / "b") == 12
    file = TokenFile.open(tmp_path / "b")
    assert file[11].tolist() == [55, 56, 57, 58, 59]
    assert math.isnan(file.entropy_bits)


def test_each_name_of_a_megatron_set(tmp_path: Path) -> None:
    """Fails if the prefix, the tokens or the index names a set without its manifest."""
    sequences = fastmem.UniformSequences(9, 4, 300)
    fastmem.write(sequences, tmp_path / "a", "megatron")
    for name in ("a", "a.bin", "a.idx"):
        file = TokenFile.open(tmp_path / name)
        assert (file.vocab, file.entropy_bits) == (300, sequences.entropy_bits)
    fastmem.write(sequences, tmp_path / "b", "megatron", shards=2)
    assert TokenFile.open(tmp_path / "b-00001-of-00002.idx").vocab == 300


@pytest.mark.parametrize("name", ["a.bin", "a.npy", "a.safetensors"])
def test_a_length_cuts_and_a_tail_warns(name: str, tmp_path: Path) -> None:
    """Fails if sequences overlap, or tokens at the end are dropped without a warning."""
    path = foreign(tmp_path, name, np.arange(60, dtype=np.uint16).reshape(12, 5))
    with pytest.warns(UserWarning, match="the last 4 tokens, which do not fill a sequence of 8"):
        file = TokenFile.open(path, length=8)
    assert (file.count, file.dropped_tokens) == (7, 4)
    assert file[6].tolist() == list(range(48, 56))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(file))[:], file[:])


def test_llmc_and_large_vocabularies(tmp_path: Path) -> None:
    """Fails if llm.c's header is read as tokens, or uint32 tokens as uint16."""
    head = struct.pack("<3i", 20240520, 1, 6).ljust(1024, b"\0")
    (tmp_path / "a.bin").write_bytes(head + np.arange(6, dtype="<u2").tobytes())
    assert TokenFile.open(tmp_path / "a.bin", length=3)[1].tolist() == [3, 4, 5]
    (tmp_path / "b.bin").write_bytes(np.array([0, 70000, 1, 2], "<u4").tobytes())
    assert TokenFile.open(tmp_path / "b.bin", 2, vocab=70001)[0].tolist() == [0, 70000]


def test_megatron_of_several_lengths(tmp_path: Path) -> None:
    """Fails if documents of different lengths are cut without a given length."""
    lengths, tokens = [3, 5, 2], np.arange(10, dtype="<u2")
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack("<3i", *lengths)
    index += struct.pack("<3q", 0, 6, 16) + struct.pack("<4q", 0, 1, 2, 3)
    (tmp_path / "a.idx").write_bytes(index)
    tokens.tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="does not have the length of its sequences: give length"):
        TokenFile.open(tmp_path / "a.bin")
    assert TokenFile.open(tmp_path / "a.bin", length=5)[1].tolist() == [5, 6, 7, 8, 9]
    (tmp_path / "a.idx").write_bytes(index.replace(b"MMIDIDX", b"XXIDIDX"))
    with pytest.raises(ValueError, match="not an index of Megatron, from byte 0 on"):
        TokenFile.open(tmp_path / "a.bin", length=5)
    (tmp_path / "a.idx").write_bytes(index)
    tokens[:9].tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="10 tokens of uint16, 20 bytes, and the file has 18 b"):
        TokenFile.open(tmp_path / "a.bin", length=5)


@pytest.mark.parametrize("name", ["a.bin", "a.npy", "a.safetensors", "a.parquet"])
def test_tokens_outside_the_vocabulary(name: str, tmp_path: Path) -> None:
    """Fails if a token outside the vocabulary is returned, or its byte is not named."""
    tokens = np.arange(60, dtype=np.uint16).reshape(12, 5)
    path = foreign(tmp_path, name, tokens)
    file = TokenFile.open(path, length=5, vocab=50)
    np.testing.assert_array_equal(file[:10], tokens[:10])
    byte = path.stat().st_size - 20
    where = r"in the row group from byte \d+ on" if name == "a.parquet" else f"byte {byte}"
    message = rf"{name}, {where} \(sequence 10, position 0\): token 50 is outside the vocabulary"
    for indices in (slice(None), [3, 10, 2], 10):
        with pytest.raises(ValueError, match=message):
            file[indices]


def test_tokens_below_zero(tmp_path: Path) -> None:
    """Fails if a padding of -100 becomes the token 65436."""
    tokens = np.zeros((3, 4), np.int32)
    tokens[2, 1] = -100
    path = foreign(tmp_path, "a.npy", tokens)
    where = r"a\.npy, byte 164 \(sequence 2, position 1\)"
    with pytest.raises(ValueError, match=rf"{where}: token -100 is outside 0 to 2147483647"):
        TokenFile.open(path)
    with pytest.raises(ValueError, match=rf"{where}: token -100 is outside"):
        TokenFile.open(path, vocab=10)[:]


def test_names(tmp_path: Path) -> None:
    """Fails if two sets under one name are confused, or one shard passes for the whole set."""
    sequences = fastmem.UniformSequences(count=10, length=4, vocab=16)
    fastmem.write(sequences, tmp_path / "a", "npy", shards=2)
    fastmem.write(sequences, tmp_path / "a", "bin")
    with pytest.raises(ValueError, match=r"several data sets: give one of .*a\.bin\.json"):
        TokenFile.open(tmp_path / "a")
    assert TokenFile.open(tmp_path / "a.bin").known == sequences
    assert TokenFile.open(str(tmp_path / "a.npy")).known == sequences
    shard = TokenFile.open(tmp_path / "a-00001-of-00002.npy")
    assert (shard.known, shard.count) == (None, 5)
    with pytest.raises(ValueError, match=r"is neither a file nor .* give a path with one of \.bin"):
        TokenFile.open(tmp_path / "b")
    with pytest.raises(ValueError, match="does not exist: give the path of a file of tokens"):
        TokenFile.open(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 5}, "a set with length 4, and the call gives 5: leave length out"),
        ({"vocab": 17}, "a set with vocab 16, and the call gives 17: leave vocab out"),
    ],
)
def test_another_shape_of_our_own(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Fails if a set of known shape is read in another shape."""
    fastmem.write(fastmem.UniformSequences(count=10, length=4, vocab=16), tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        TokenFile.open(tmp_path / "a", **arguments)
    assert TokenFile.open(tmp_path / "a", length=4, vocab=16).count == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "does not have the length of its sequences"),
        ({"length": 0}, "length must be from 1"),
        ({"length": 2.5}, "length must be an integer"),
        ({"length": 61}, "lacks a sequence of 61 tokens"),
        ({"length": 5, "vocab": 0}, "vocab must be from 1"),
        ({"length": 5, "vocab": 2**31 + 1}, "vocab must be from 1"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*the last 60 tokens")
def test_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Fails if a foreign file is opened in an impossible shape."""
    path = foreign(tmp_path, "a.bin", np.arange(60, dtype=np.uint16))
    with pytest.raises(ValueError, match=message):
        TokenFile.open(path, **arguments)


@pytest.mark.parametrize("rows", [[[1, 2], [3]], [[1, 2], None], [[1.5], [2.5]], [1, 2]])
def test_parquet_that_is_not_a_set(rows: list[Any], tmp_path: Path) -> None:
    """Fails if lists of different lengths, nulls or floats are read as sequences."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"input_ids": rows}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row group 0") as error:
        TokenFile.open(tmp_path / "a.parquet")
    assert "attribute" not in str(error.value)  # of a column without lists
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet has columns \['text'\]"):
        TokenFile.open(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"c\.parquet is not a whole Parquet file"):
        TokenFile.open(tmp_path / "c.parquet")


def test_another_file_under_a_described_name(tmp_path: Path) -> None:
    """Fails if a run on a foreign file resumes with another file of the same name."""
    path = foreign(tmp_path, "a.npy", np.arange(60, dtype=np.uint16).reshape(12, 5))
    description = TokenFile.open(path).description()
    foreign(tmp_path, "a.npy", np.arange(50, dtype=np.uint16).reshape(10, 5))
    with pytest.raises(ValueError, match="has 10 sequences, and its description 12"):
        fastmem.from_description(description)


def test_training_and_scoring(tmp_path: Path) -> None:
    """Fails if training on a file differs from training on its set."""
    sequences = fastmem.UniformSequences(count=20, length=6, vocab=16)
    fastmem.write(sequences, tmp_path / "train", "safetensors", shards=2)
    bits = []
    for source in (sequences, TokenFile.open(tmp_path / "train")):
        model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=6))
        fastmem.train(model, source, fastmem.TrainConfig(steps=20, batch=7), progress=False)
        bits.append(fastmem.sequence_bits(model, source))
    np.testing.assert_array_equal(bits[0], bits[1])


def test_repeats_in_a_file_count_once(tmp_path: Path) -> None:
    """Fails if a repeated sequence of a file counts more than once."""
    sequences = fastmem.repeated(fastmem.UniformSequences(10, 4, 16), fraction=0.5, times=3)
    fastmem.write(sequences, tmp_path / "a")
    bits = np.ones(sequences.count)
    file = TokenFile.open(tmp_path / "a")
    assert fastmem.memorized_bits(bits, file) == fastmem.memorized_bits(bits, sequences)
    assert fastmem.memorized_bits(bits, file).strict == pytest.approx(10 * (3 * 4 - 1))


def test_a_copy_outlives_its_source(tmp_path: Path) -> None:
    """Fails if a converted file cannot be read or verified after its source is gone."""
    tokens = np.arange(60, dtype=np.uint16).reshape(12, 5)
    source = foreign(tmp_path, "a.npy", tokens)
    manifest = fastmem.write(TokenFile.open(source), tmp_path / "b", "megatron")
    source.unlink()
    file = TokenFile.open(tmp_path / "b")
    np.testing.assert_array_equal(file[:], tokens)
    assert (file.vocab, file.known) == (60, None)
    assert pickle.loads(pickle.dumps(file))[3].tolist() == tokens[3].tolist()
    fastmem.write(file, tmp_path / "c", "parquet")
    assert fastmem.verify(tmp_path / "b") == fastmem.verify(tmp_path / "c") == 12
    with pytest.raises(ValueError, match=r"b\.bin\.json.* sample"):
        fastmem.verify(manifest, sample=3)
    for name in ("b.bin", "b.idx"):
        payload = bytearray((tmp_path / name).read_bytes())
        payload[9] ^= 1
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(payload)
        with pytest.raises(ValueError, match=name):
            fastmem.verify(tmp_path / "b")
        (tmp_path / name).write_bytes(before)


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.uint64])
def test_tokens_over_the_largest(dtype: type, tmp_path: Path) -> None:
    """Fails if a token beyond every vocabulary is returned as another token."""
    tokens = np.zeros((3, 4), dtype)
    tokens[2, 1] = 2**31
    path = foreign(tmp_path, "a.npy", tokens)
    where = rf"a\.npy, byte {128 + 9 * tokens.itemsize} \(sequence 2, position 1\)"
    with pytest.raises(ValueError, match=f"{where}: token 2147483648 is outside 0 to 2147483647"):
        TokenFile.open(path)
    tokens[2, 1] -= 1
    assert TokenFile.open(foreign(tmp_path, "b.npy", tokens)).vocab == 2**31


@pytest.mark.parametrize("text", ["{}", "[1]", "null", '{"vocab": 9}', "not JSON", ""])
def test_another_json_beside_a_file(text: str, tmp_path: Path) -> None:
    """Fails if the .json of another program makes its tokens unreadable."""
    path = foreign(tmp_path, "tok.bin", np.arange(60, dtype=np.uint16))
    (tmp_path / "tok.bin.json").write_text(text)
    assert TokenFile.open(path, length=5).count == 12
    with pytest.raises(ValueError, match="has no manifest"):
        fastmem.verify(path)


def test_a_damaged_manifest_is_not_foreign(tmp_path: Path) -> None:
    """Fails if a set of fastmem is read as a foreign file, or the fix deletes its manifest."""
    manifest = fastmem.write(fastmem.UniformSequences(10, 4, 16), tmp_path / "a")
    whole = manifest.read_text()
    for text in (whole[:-20], whole[:60], whole.replace('"vocab": 16', '"vocab": 17', 1)):
        manifest.write_text(text)
        for name in (tmp_path / "a", tmp_path / "a.bin", manifest):
            with pytest.raises(ValueError, match=r"a\.bin\.json .*again with --overwrite") as error:
                TokenFile.open(name, length=4)
            assert "delete" not in str(error.value)


def test_a_directory(tmp_path: Path) -> None:
    """Fails if a directory causes an error of pathlib."""
    for path in (".", "/", tmp_path):
        with pytest.raises(ValueError, match="is a directory: give the path of a file"):
            TokenFile.open(path)


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a file opened by a relative path means another file in another directory."""
    for name, first in (("a", 0), ("b", 500)):
        (tmp_path / name).mkdir()
        foreign(tmp_path / name, "x.bin", np.arange(first, first + 40, dtype=np.uint16))
    monkeypatch.chdir(tmp_path / "a")
    file = TokenFile.open("x.bin", length=4, vocab=1000)
    blob, described = pickle.dumps(file), file.description()
    monkeypatch.chdir(tmp_path / "b")
    assert file.description() == described
    assert file.path == tmp_path / "a" / "x.bin"
    other = TokenFile.open("x.bin", length=4, vocab=1000)
    for same in (pickle.loads(blob), copy.deepcopy(file), fastmem.from_description(described)):
        assert same[0].tolist() == [0, 1, 2, 3]
        assert same == file
        assert hash(same) == hash(file)
        assert same != other
    with pytest.raises(ValueError, match=rf"{tmp_path}/a/x\.bin, byte 8 \(sequence 1"):
        TokenFile.open(tmp_path / "a" / "x.bin", length=4, vocab=4)[1]


def test_two_paths_of_one_set(tmp_path: Path) -> None:
    """Fails if equal sets have different hashes."""
    sequences = fastmem.UniformSequences(10, 4, 16)
    fastmem.write(sequences, tmp_path / "a")
    fastmem.write(sequences, tmp_path / "b", "npy")
    assert len({TokenFile.open(tmp_path / "a"), TokenFile.open(tmp_path / "b")}) == 1


@pytest.mark.parametrize("size", [160, 40_000, 4_000_000])
def test_a_file_that_changed(size: int, tmp_path: Path) -> None:
    """Fails if another file under the same name and of the same shape is read as the first."""
    draw = np.random.default_rng(0)
    path = foreign(tmp_path, "a.bin", draw.integers(0, 999, size // 2).astype(np.uint16))
    file = TokenFile.open(path, length=4, vocab=1000)
    blob, description = pickle.dumps(file), file.description()
    assert pickle.loads(blob) == file
    foreign(tmp_path, "b.bin", draw.integers(0, 999, size // 2).astype(np.uint16)).replace(path)
    for open_again in (
        lambda: pickle.loads(blob),
        lambda: fastmem.from_description(description),
        lambda: copy.deepcopy(file),
    ):
        with pytest.raises(ValueError, match=r"a\.bin has fingerprint .* changed since it was o"):
            open_again()
    old = {name: value for name, value in description.items() if name != "fingerprint"}
    assert fastmem.from_description(old).count == file.count  # a description of 0.1.0
    with path.open("r+b") as file_of_bytes:
        file_of_bytes.truncate(size // 2)
    with pytest.raises(ValueError, match=r"a\.bin has \d+ sequences, and its description \d+"):
        pickle.loads(blob)


def test_our_own_file_that_changed(tmp_path: Path) -> None:
    """Fails if a set that was generated again with another seed passes for the first."""
    fastmem.write(fastmem.UniformSequences(10, 4, 16, seed=1), tmp_path / "a")
    blob = pickle.dumps(TokenFile.open(tmp_path / "a"))
    fastmem.write(fastmem.UniformSequences(10, 4, 16, seed=2), tmp_path / "a", overwrite=True)
    with pytest.raises(ValueError, match="has seed 2, and its description 1"):
        pickle.loads(blob)


@pytest.mark.parametrize("path", ["x.npy", Path("x.npy"), np.zeros((2, 2), int), None])
def test_the_class_opens_nothing(path: Any) -> None:
    """Fails if TokenFile("x.npy") is a TypeError that does not name TokenFile.open."""
    with pytest.raises(ValueError, match=r"use TokenFile\.open"):
        TokenFile(path)
    if not isinstance(path, str | Path):
        with pytest.raises(ValueError, match=r"a path must be a str or a Path, .*from_array"):
            TokenFile.open(path)
