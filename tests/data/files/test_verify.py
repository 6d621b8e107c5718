"""Verification: each kind of damage is found, and named to the byte."""

import struct
from pathlib import Path

import numpy as np
import pytest
from cases.written_files import FORMATS, SEQUENCES

import fastmem
from fastmem.base.storage import read_json, write_json
from fastmem.data.files.formats import SUFFIXES, Format

RAW = [name for name in FORMATS if name != "parquet"]


def alter(path: Path, place: int) -> None:
    payload = bytearray(path.read_bytes())
    payload[place] ^= 1
    path.write_bytes(payload)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_written_set_passes(format: Format, shards: int, tmp_path: Path) -> None:
    """Fails if a whole set counts as damaged, under any of its names, whole or sampled."""
    manifest = fastmem.write(SEQUENCES, tmp_path / "train", format, shards)
    for name in (manifest, tmp_path / "train", tmp_path / f"train{SUFFIXES[format]}"):
        assert fastmem.verify(name) == 50
        assert fastmem.verify(name, sample=7, workers=3) == 7
        assert fastmem.verify(str(name), sample=1000) == 50


@pytest.mark.parametrize("format", RAW)
def test_an_altered_token_is_named(format: Format, tmp_path: Path) -> None:
    """Fails if an altered byte passes, or another sequence, position or byte is named."""
    fastmem.write(SEQUENCES, tmp_path / "train", format, shards=2)
    path = tmp_path / f"train-00001-of-00002{SUFFIXES[format]}"
    header = path.stat().st_size - 25 * 16 * 2
    for row, position in ((0, 0), (7, 15), (8, 0), (24, 15)):
        place = header + (row * 16 + position) * 2
        alter(path, place)
        where = rf"{path.name}, byte {place} \(sequence {25 + row}, position {position}\)"
        with pytest.raises(ValueError, match=where) as error:
            fastmem.verify(tmp_path / "train")
        assert f"is not {SEQUENCES[25 + row][position]}" in str(error.value)
        with pytest.raises(ValueError, match=where):
            fastmem.verify(tmp_path / "train", sample=50)
        alter(path, place)
    assert fastmem.verify(tmp_path / "train") == 50


@pytest.mark.parametrize("format", FORMATS)
def test_every_altered_byte_is_found(format: Format, tmp_path: Path) -> None:
    """Fails if a byte of a file can change without the file being named."""
    fastmem.write(SEQUENCES, tmp_path / "train", format)
    listed = read_json(tmp_path / f"train{SUFFIXES[format]}.json")["shards"][0]["files"]
    for path in (tmp_path / file["name"] for file in listed):
        size = path.stat().st_size
        for place in [*range(min(size, 60)), *range(60, size, max(1, size // 7)), size - 1]:
            alter(path, place)
            with pytest.raises(ValueError, match=path.stem):
                fastmem.verify(tmp_path / "train")
            alter(path, place)


@pytest.mark.parametrize("format", FORMATS)
def test_a_cut_or_longer_file_is_named(format: Format, tmp_path: Path) -> None:
    """Fails if a truncated or extended file passes, sampled or not, or its byte is not named."""
    fastmem.write(SEQUENCES, tmp_path / "train", format)
    path = tmp_path / f"train{SUFFIXES[format]}"
    payload = path.read_bytes()
    for other in (payload[:-1], payload[: len(payload) // 2], b"", payload + b"\0\0"):
        path.write_bytes(other)
        byte = min(len(payload), len(other))
        for sample in (None, 1):
            with pytest.raises(ValueError, match=rf"{path.name} has .* from byte {byte} on"):
                fastmem.verify(tmp_path / "train", sample)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} is missing, and .* names it"):
        fastmem.verify(tmp_path / "train")


def test_parquet_with_other_tokens(tmp_path: Path) -> None:
    """Fails if a valid Parquet file of other tokens passes, or its sequence is not named."""
    import pyarrow.parquet

    fastmem.write(SEQUENCES, tmp_path / "train", "parquet")
    path = tmp_path / "train.parquet"
    rows = SEQUENCES.tokens(slice(None), np.int64).tolist()
    rows[33][4] ^= 1
    schema = pyarrow.schema([("input_ids", pyarrow.list_(pyarrow.int32()))])
    table = pyarrow.table({"input_ids": rows}, schema)
    pyarrow.parquet.write_table(table, path, row_group_size=10)
    manifest = read_json(tmp_path / "train.parquet.json")
    manifest["shards"][0]["files"][0]["bytes"] = path.stat().st_size
    write_json(tmp_path / "train.parquet.json", manifest)
    where = r"in the row group from byte \d+ on \(sequence 33, position 4\)"
    for sample in (None, 50):
        with pytest.raises(ValueError, match=where):
            fastmem.verify(path, sample)


def test_a_manifest_of_other_files(tmp_path: Path) -> None:
    """Fails if a manifest that was edited, or has another hash, dtype or seed, passes."""
    path = fastmem.write(SEQUENCES, tmp_path / "train", "npy")
    text = path.read_text()
    path.write_text(text.replace('"seed": 9', '"seed": 8'))
    with pytest.raises(ValueError, match=r"train\.npy\.json was cut or altered"):
        fastmem.verify(path)
    path.write_text(text)
    manifest = read_json(path)

    def refused(message: str, **change: object) -> None:
        write_json(path, manifest | change)
        with pytest.raises(ValueError, match=message):
            fastmem.verify(path)

    refused("a set with length 16, and its manifest gives 8", length=8)
    refused("schema 7, and this version reads 1", schema=7)
    refused("not a manifest of fastmem that fits its name", shards=[])
    refused("not a manifest of fastmem that fits its name", format="bin")
    refused(r"'<u2'|uint16.* in its header at byte 0, and .*uint32", dtype="uint32")
    sequences = manifest["sequences"] | {"seed": 8}
    refused(r"train\.npy, byte 4096 \(sequence 0, position 0\)", sequences=sequences)
    sequences = manifest["sequences"] | {"generator": "philox4x32-10/2"}
    refused("generator must be philox4x32-10/1", sequences=sequences)
    shard = manifest["shards"][0]
    file = shard["files"][0] | {"xxh3": "0" * 16}
    refused("its manifest gives 0000000000000000", shards=[shard | {"files": [file]}])
    file = shard["files"][0] | {"name": "../other.npy"}
    refused("not a manifest of fastmem that fits its name", shards=[shard | {"files": [file]}])


def test_a_wrong_index_is_named(tmp_path: Path) -> None:
    """Fails if Megatron would read other sequences than the manifest describes."""
    fastmem.write(SEQUENCES, tmp_path / "train", "megatron")
    index = tmp_path / "train.idx"
    payload = bytearray(index.read_bytes())
    # Two lengths that still sum to the same number of tokens.
    payload[34:42] = struct.pack("<2i", 15, 17)
    index.write_bytes(payload)
    with pytest.raises(ValueError, match=r"train\.idx"):
        fastmem.verify(tmp_path / "train")


def test_bad_arguments(tmp_path: Path) -> None:
    """Fails if a set without a manifest, or an empty sample, counts as verified."""
    SEQUENCES.tokens(slice(None)).tofile(tmp_path / "foreign.bin")
    with pytest.raises(ValueError, match=r"foreign\.bin has no manifest beside it"):
        fastmem.verify(tmp_path / "foreign.bin")
    with pytest.raises(ValueError, match="has no manifest"):
        fastmem.verify(tmp_path / "nothing")
    path = fastmem.write(SEQUENCES, tmp_path / "train")
    for arguments in ({"sample": 0}, {"sample": -1}, {"sample": 2.5}, {"workers": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
            fastmem.verify(path, **arguments)
