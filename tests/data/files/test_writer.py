"""Writing: the same bytes whatever happens, and existing files kept."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from cases.written_files import FORMATS, OTHER, SEQUENCES, contents

import fastmem
from fastmem.base.storage import read_json
from fastmem.data.files import writer
from fastmem.data.files.formats import SUFFIXES, Format
from fastmem.data.files.manifest import Output


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
def test_manifest(format: Format, shards: int, tmp_path: Path) -> None:
    """Fails if the manifest cannot make the set again, or has a wrong hash of a file."""
    path = fastmem.write(SEQUENCES, tmp_path / "train", format, shards)
    manifest = read_json(path)
    assert path == tmp_path / f"train{SUFFIXES[format]}.json"
    assert fastmem.from_description(manifest["sequences"]) == SEQUENCES
    assert {name: manifest[name] for name in ("generator", "seed", "vocab", "length", "count")} == {
        "generator": "philox4x32-10/1",
        "seed": 9,
        "vocab": 2048,
        "length": 16,
        "count": 50,
    }
    assert manifest["dtype"] == ("int32" if format == "parquet" else "uint16")
    borders = [0, 50] if shards == 1 else [0, 16, 33, 50]
    assert [shard["begin"] for shard in manifest["shards"]] == borders[:-1]
    assert [shard["end"] for shard in manifest["shards"]] == borders[1:]
    listed = [file for shard in manifest["shards"] for file in shard["files"]]
    for file in listed:
        payload = (tmp_path / file["name"]).read_bytes()
        assert file["bytes"] == len(payload)
        assert file["xxh3"] == xxhash.xxh3_64_hexdigest(payload)
    assert {file["name"] for file in listed} | {path.name} == contents(tmp_path).keys()


def test_shards_and_workers_change_no_token(tmp_path: Path) -> None:
    """Fails if tokens depend on how they are divided among files or threads."""
    whole = SEQUENCES.tokens(slice(None)).tobytes()
    for shards in (1, 2, 7, 50):
        for workers in (1, 5):
            fastmem.write(SEQUENCES, tmp_path / "a", shards=shards, workers=workers, overwrite=True)
            there = b"".join(path.read_bytes() for path in sorted(tmp_path.glob("*.bin")))
            assert there == whole, (shards, workers)


def test_existing_files_are_refused(tmp_path: Path) -> None:
    """Fails if a set, or a file of another program, is overwritten without `overwrite`."""
    fastmem.write(SEQUENCES, tmp_path / "train", "megatron", shards=3)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"train\.bin\.json exists already: .*--overwrite"):
        fastmem.write(SEQUENCES, tmp_path / "train", shards=2)
    assert contents(tmp_path) == before
    (tmp_path / "mine.npy").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"mine\.npy exists already"):
        fastmem.write(SEQUENCES, tmp_path / "mine.npy", "npy")
    assert (tmp_path / "mine.npy").read_bytes() == b"precious"
    # No file of the old set stays for a glob to find.
    fastmem.write(SEQUENCES, tmp_path / "train", overwrite=True)
    assert contents(tmp_path).keys() == {"train.bin", "train.bin.json", "mine.npy"}


def test_two_writers(tmp_path: Path) -> None:
    """Fails if two processes write the same files at once."""
    output = Output.at(tmp_path / "train", "bin", 1)
    request = writer._request(SEQUENCES, output)
    with writer._journal(output, request, overwrite=False):
        (tmp_path / "train.bin.part").write_bytes(b"in the making")
        before = contents(tmp_path)
        for overwrite in (False, True):
            for sequences in (SEQUENCES, OTHER):
                with pytest.raises(ValueError, match="another fastmem is writing"):
                    fastmem.write(sequences, tmp_path / "train", overwrite=overwrite)
        assert contents(tmp_path) == before


def test_a_source_is_not_its_own_target(tmp_path: Path) -> None:
    """Fails if --overwrite deletes the source of the new file."""
    tokens = np.arange(60, dtype=np.uint16).reshape(12, 5)
    np.save(tmp_path / "x.npy", tokens)
    source = fastmem.TokenFile.open(tmp_path / "x.npy")
    fastmem.write(SEQUENCES, tmp_path / "y", shards=2)
    shard = fastmem.TokenFile.open(tmp_path / "y-00000-of-00002.bin", length=16)
    before = contents(tmp_path)
    for sequences in (source, fastmem.repeated(source, fraction=1, times=2)):
        with pytest.raises(ValueError, match=r"x\.npy is a source of the data set: write to"):
            fastmem.write(sequences, tmp_path / "x", "npy", overwrite=True)
    with pytest.raises(ValueError, match=r"y-00000-of-00002\.bin is a source"):
        fastmem.write(shard, tmp_path / "y", overwrite=True)
    assert contents(tmp_path) == before


PEAK = """
import sys
from pathlib import Path
import fastmem

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024

def make(count, length, name):
    sequences = fastmem.UniformSequences(count, length, vocab=2048)
    fastmem.write(sequences, Path(sys.argv[1]) / name, sys.argv[2], workers=4)
    return sequences

count, length = map(int, sys.argv[3:5])
make(2, length // 8 + 1, "warm")
fastmem.verify(Path(sys.argv[1]) / "warm")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = status("VmRSS")
make(count, length, "train")
fastmem.verify(Path(sys.argv[1]) / "train", workers=4)
fastmem.verify(Path(sys.argv[1]) / "train", sample=1)
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize(
    ("format", "count", "length", "most"),
    [
        ("bin", 1 << 19, 256, 80 << 20),  # 256 MB in blocks of 4 MB: 9 blocks and the maps
        ("megatron", 1 << 19, 256, 100 << 20),
        ("bin", 6, 20 << 20, 200 << 20),  # sequences of 40 MB, made one at a time
    ],
)
def test_memory_is_constant(
    format: Format, count: int, length: int, most: int, tmp_path: Path
) -> None:
    """Fails if memory, mapped memory included, grows with the set: 256 MB of files."""
    command = [sys.executable, "-c", PEAK, str(tmp_path), format, str(count), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < most


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "csv"}, "format must be one of bin, llmc, megatron, npy, parquet, safetensors"),
        ({"shards": 0}, "shards must be from 1 to 50, got 0"),
        ({"shards": 51}, "shards must be from 1 to 50, got 51"),
        ({"shards": 1.5}, "shards must be an integer"),
        ({"workers": 0}, "workers must be from 1"),
        ({"path": "/"}, "is a directory: give the path of a file"),
        ({"path": "/proc/a.npy"}, r"a\.npy .* is \.npy the format\? give --format npy"),
        (
            {"sequences": fastmem.UniformSequences(2**62, 16, 16)},
            "147573952589676412928 bytes, more than 9223372036854775807: make fewer",
        ),
        (
            {"sequences": fastmem.UniformSequences(2**50, 16, 16)},
            "36028797018963968 bytes, and the disk has .*: make fewer",
        ),
        (
            {"sequences": fastmem.UniformSequences(2, 2**30, 16)},
            "a sequence of 1073741824 tokens takes 2147483648 bytes, more than 1073741824: make",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Fails if a wrong argument writes something."""
    arguments = {"sequences": SEQUENCES, "path": tmp_path / "train", **change}
    with pytest.raises(ValueError, match=message):
        fastmem.write(**arguments)
    assert not list(tmp_path.glob("*.bin*"))


def test_names(tmp_path: Path) -> None:
    """Fails if a suffix is doubled, a dot in a name is lost, or a shard has another name."""
    assert fastmem.write(SEQUENCES, tmp_path / "v1.2").name == "v1.2.bin.json"
    assert (tmp_path / "v1.2.bin").exists()
    assert fastmem.write(SEQUENCES, tmp_path / "b.npy", "npy").name == "b.npy.json"
    fastmem.write(SEQUENCES, tmp_path / "new" / "c", "parquet", shards=2)
    assert json.loads((tmp_path / "new" / "c.parquet.json").read_text())["format"] == "parquet"
    assert (tmp_path / "new" / "c-00001-of-00002.parquet").exists()
