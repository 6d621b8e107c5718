"""Writing: the same bytes whatever happens, nothing half-written under a final name."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import fastmem
from fastmem.base.storage import read_json
from fastmem.data.files import journal
from fastmem.data.files import writer as files
from fastmem.data.files.formats import SUFFIXES, Format
from fastmem.data.files.manifest import Output

FORMATS: list[Format] = list(SUFFIXES)
BLOCK = 256
SEQUENCES = fastmem.UniformSequences(count=50, length=16, vocab=2048, seed=9)
OTHER = fastmem.UniformSequences(count=50, length=16, vocab=2048, seed=10)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight sequences a block, so that a small set has several; no test cuts the power."""
    monkeypatch.setattr(files, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class FullDisk:
    """os.write that takes `left` bytes, in parts, and then fails as a full disk does."""

    def __init__(self, left: int, part: int = 100) -> None:
        self.left, self.part, self.written = left, part, 0
        self.real = os.write

    def __call__(self, fd: int, data: Any) -> int:
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = self.real(fd, data[: min(self.part, self.left)])
        self.left -= n
        self.written += n
        return n


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
def test_manifest(format: Format, shards: int, tmp_path: Path) -> None:
    """Fails if the manifest leaves out what makes the set again, or a hash is not the file's."""
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


@pytest.mark.parametrize("format", FORMATS)
def test_full_disk(format: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a disk that is full at any byte leaves a half file under a final name, or costs a
    whole block, or the run that goes on ends with other bytes."""
    fastmem.write(SEQUENCES, tmp_path / "calm" / "train", format, shards=2)
    calm = contents(tmp_path / "calm")
    total = sum(len(payload) for name, payload in calm.items() if not name.endswith(".json"))
    for room in range(0, total, total // 23):
        folder = tmp_path / f"{room}"
        disk = FullDisk(room)
        with monkeypatch.context() as patch:
            patch.setattr(journal.os, "write", disk)
            with pytest.raises(OSError, match="No space left on device"):
                fastmem.write(SEQUENCES, folder / "train", format, shards=2)
        left = contents(folder)
        for name, payload in left.items():
            assert name.endswith((".part", ".journal")) or payload == calm[name]
        again = FullDisk(total)
        with monkeypatch.context() as patch:
            patch.setattr(journal.os, "write", again)
            fastmem.write(SEQUENCES, folder / "train", format, shards=2)
        assert contents(folder) == calm
        if format != "parquet":  # no more than the block or header that was cut is written twice
            assert total - room <= again.written <= total - room + 4096


def test_an_unfinished_set_is_no_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if what a killed run left can be opened or verified as if it were whole."""
    monkeypatch.setattr(journal.os, "write", FullDisk(1000))
    with pytest.raises(OSError, match="No space"):
        fastmem.write(SEQUENCES, tmp_path / "train")
    for use in (fastmem.TokenFile.open, fastmem.verify):
        with pytest.raises(ValueError, match="manifest"):
            use(tmp_path / "train.bin")


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, room: int = 1000) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "write", FullDisk(room))
        with pytest.raises(OSError, match="No space"):
            fastmem.write(SEQUENCES, folder / "train")


def test_damage_to_what_a_killed_run_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a journal cut anywhere, a lost block or an altered byte reaches the result."""
    whole = SEQUENCES.tokens(slice(None)).tobytes()
    interrupted(tmp_path, monkeypatch)
    part, log = tmp_path / "train.bin.part", tmp_path / "train.bin.journal"
    payload, lines = part.read_bytes(), log.read_bytes()
    cases = [(payload, lines[:cut]) for cut in range(7, len(lines), 7)]
    cases += [(payload, lines[:-40] + bytes(40)), (payload[:300], lines), (b"", lines)]
    for place in (0, 255, 256, 700):
        altered = bytearray(payload)
        altered[place] ^= 1
        cases.append((bytes(altered), lines))
    for part_bytes, log_bytes in cases:
        part.write_bytes(part_bytes)
        log.write_bytes(log_bytes)
        fastmem.write(SEQUENCES, tmp_path / "train")
        assert (tmp_path / "train.bin").read_bytes() == whole
        assert not part.exists()
        assert not log.exists()
        for path in tmp_path.iterdir():
            path.unlink()


def test_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run goes on with the blocks of another set, or destroys them unasked."""
    interrupted(tmp_path, monkeypatch)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"\(seed is 9 there, 10 here\): give the same again"):
        fastmem.write(OTHER, tmp_path / "train")
    with pytest.raises(ValueError, match=r"\(format is bin there, llmc here\)"):
        fastmem.write(SEQUENCES, tmp_path / "train", "llmc")
    with pytest.raises(ValueError, match=r"\(shards is 1 there, 2 here\)"):
        fastmem.write(SEQUENCES, tmp_path / "train", shards=2)
    assert contents(tmp_path) == before
    fastmem.write(OTHER, tmp_path / "train", shards=2, overwrite=True)
    assert fastmem.verify(tmp_path / "train") == 50
    assert len(contents(tmp_path)) == 3


def test_existing_files_are_refused(tmp_path: Path) -> None:
    """Fails if a set, or a file of somebody else, is overwritten without being asked to."""
    fastmem.write(SEQUENCES, tmp_path / "train", "megatron", shards=3)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"train\.bin\.json is there already: .*--overwrite"):
        fastmem.write(SEQUENCES, tmp_path / "train", shards=2)
    assert contents(tmp_path) == before
    (tmp_path / "mine.npy").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"mine\.npy is there already"):
        fastmem.write(SEQUENCES, tmp_path / "mine.npy", "npy")
    assert (tmp_path / "mine.npy").read_bytes() == b"precious"
    # Nothing of the old set stays, where a glob would find it.
    fastmem.write(SEQUENCES, tmp_path / "train", overwrite=True)
    assert contents(tmp_path).keys() == {"train.bin", "train.bin.json", "mine.npy"}


def test_two_writers(tmp_path: Path) -> None:
    """Fails if two processes write the same files at once."""
    output = Output.at(tmp_path / "train", "bin", 1)
    request = files._request(SEQUENCES, output)
    with files._journal(output, request, overwrite=False):
        (tmp_path / "train.bin.part").write_bytes(b"in the making")
        before = contents(tmp_path)
        for overwrite in (False, True):
            for sequences in (SEQUENCES, OTHER):
                with pytest.raises(ValueError, match="another fastmem is writing"):
                    fastmem.write(sequences, tmp_path / "train", overwrite=overwrite)
        assert contents(tmp_path) == before


def test_a_source_is_not_its_own_target(tmp_path: Path) -> None:
    """Fails if --overwrite deletes the file that the new one would be made from."""
    tokens = np.arange(60, dtype=np.uint16).reshape(12, 5)
    np.save(tmp_path / "x.npy", tokens)
    source = fastmem.TokenFile.open(tmp_path / "x.npy")
    fastmem.write(SEQUENCES, tmp_path / "y", shards=2)
    shard = fastmem.TokenFile.open(tmp_path / "y-00000-of-00002.bin", length=16)
    before = contents(tmp_path)
    for sequences in (source, fastmem.repeated(source, fraction=1, times=2)):
        with pytest.raises(ValueError, match=r"x\.npy is read from: give another name"):
            fastmem.write(sequences, tmp_path / "x", "npy", overwrite=True)
    with pytest.raises(ValueError, match=r"y-00000-of-00002\.bin is read from"):
        fastmem.write(shard, tmp_path / "y", overwrite=True)
    assert contents(tmp_path) == before


def test_files_that_no_run_vouches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if another's .part, payload or altered payload is destroyed, or called whole."""
    part = tmp_path / "p.bin.part"
    part.write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"p\.bin\.part is there already"):
        fastmem.write(SEQUENCES, tmp_path / "p")
    assert contents(tmp_path) == {"p.bin.part": b"precious"}
    part.unlink()
    interrupted(tmp_path, monkeypatch)
    (tmp_path / "train.bin").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"train\.bin is not what the unfinished run wrote"):
        fastmem.write(SEQUENCES, tmp_path / "train")
    assert (tmp_path / "train.bin").read_bytes() == b"precious"
    fastmem.write(SEQUENCES, tmp_path / "train", overwrite=True)
    assert fastmem.verify(tmp_path / "train") == 50


def test_a_whole_shard_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run goes on over a finished shard that was altered since, by its size alone."""
    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "write", FullDisk(1200))
        with pytest.raises(OSError, match="No space"):
            fastmem.write(SEQUENCES, tmp_path / "train", shards=2)
    first = tmp_path / "train-00000-of-00002.bin"
    first.write_bytes(bytes(first.stat().st_size))
    with pytest.raises(ValueError, match=r"00002\.bin is not what the unfinished run wrote"):
        fastmem.write(SEQUENCES, tmp_path / "train", shards=2)
    fastmem.write(SEQUENCES, tmp_path / "train", shards=2, overwrite=True)
    assert fastmem.verify(tmp_path / "train") == 50


def test_killed_behind_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the journal of a set that is whole stays for ever, or costs the set."""
    interrupted(tmp_path, monkeypatch)
    log = (tmp_path / "train.bin.journal").read_bytes()
    fastmem.write(SEQUENCES, tmp_path / "train")
    whole = contents(tmp_path)
    (tmp_path / "train.bin.journal").write_bytes(log)
    with pytest.raises(ValueError, match="is there already"):
        fastmem.write(SEQUENCES, tmp_path / "train")
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("text", ["{}", "[1]", "null", '{"name": "v.bin"}', "my diary"])
def test_journals_that_are_not_ours(text: str, tmp_path: Path) -> None:
    """Fails if another program's .journal is a traceback, or is destroyed unasked."""
    log = tmp_path / "train.bin.journal"
    log.write_text(text + "\n")
    with pytest.raises(ValueError, match=r"bin\.journal is no journal of fastmem"):
        fastmem.write(SEQUENCES, tmp_path / "train")
    assert contents(tmp_path) == {log.name: text.encode() + b"\n"}
    fastmem.write(SEQUENCES, tmp_path / "train", overwrite=True)
    assert fastmem.verify(tmp_path / "train") == 50


@pytest.mark.parametrize(
    "entry", ["{}", "[1]", "null", '{"name": "train.bin"}', '{"name": [], "bytes": "1"}']
)
def test_damaged_entries(entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a journal with a line that is JSON but no entry cannot be gone on with."""
    interrupted(tmp_path, monkeypatch)
    with (tmp_path / "train.bin.journal").open("a") as file:
        file.write(entry + "\n")
    fastmem.write(SEQUENCES, tmp_path / "train")
    assert fastmem.verify(tmp_path / "train") == 50


PEAK = """
import sys
from pathlib import Path
import fastmem
from fastmem.data.files import writer as files

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
        ("bin", 1 << 19, 256, 80 << 20),  # 256 MB in blocks of 4 MB: 9 and what is mapped
        ("megatron", 1 << 19, 256, 100 << 20),
        ("bin", 6, 20 << 20, 200 << 20),  # sequences of 40 MB, of which one is made at once
    ],
)
def test_memory_is_constant(
    format: Format, count: int, length: int, most: int, tmp_path: Path
) -> None:
    """Fails if memory, of which tracemalloc sees no map, grows with the set: 256 MB of files."""
    command = [sys.executable, "-c", PEAK, str(tmp_path), format, str(count), str(length)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(told.stdout) < most


def test_killed_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run killed ten times with SIGKILL ends with other bytes, or starts over."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 4 << 20)
    sequences = fastmem.UniformSequences(count=1 << 20, length=64, vocab=2048, seed=1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastmem"])
    log = tmp_path / "train.bin.journal"
    draw = np.random.default_rng(0)
    killed, noted = 0, 1
    while killed < 10:
        child = context.Process(target=fastmem.write, args=(sequences, tmp_path / "train"))
        child.start()
        assert child.pid is not None
        # 34 blocks of 4 MiB and a line for the request: none is lost, so all kills fit in.
        until = noted + int(draw.integers(0, 3))
        while child.is_alive() and not (log.exists() and log.read_bytes().count(b"\n") >= until):
            time.sleep(0.0005)
        time.sleep(float(draw.uniform(0, 0.004)))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert not (tmp_path / "train.bin.json").exists()
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        assert lines >= noted or noted == 1
        killed, noted = killed + 1, max(1, lines)
    fastmem.write(sequences, tmp_path / "train")
    assert contents(tmp_path).keys() == {"train.bin", "train.bin.json"}
    assert fastmem.verify(tmp_path / "train") == 1 << 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "csv"}, "format must be one of bin, llmc, megatron, npy, parquet, safetensors"),
        ({"shards": 0}, "shards must be from 1 to 50, got 0"),
        ({"shards": 51}, "shards must be from 1 to 50, got 51"),
        ({"shards": 1.5}, "shards must be an integer"),
        ({"workers": 0}, "workers must be from 1"),
        ({"path": "/"}, "is a folder: give the name of a file in it"),
        ({"path": "/proc/a.npy"}, r"a\.npy .* is \.npy the format\? give --format npy"),
        (
            {"sequences": fastmem.UniformSequences(2**62, 16, 16)},
            "147573952589676412928 bytes .* at most 9223372036854775807",
        ),
        (
            {"sequences": fastmem.UniformSequences(2**50, 16, 16)},
            "36028797018963968 bytes, and the disk has .*: make fewer",
        ),
        (
            {"sequences": fastmem.UniformSequences(2, 2**30, 16)},
            "a sequence of 1073741824 tokens takes 2147483648 bytes, at most 1073741824",
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
    """Fails if a suffix is doubled, a dot in a name is lost, or a shard is called otherwise."""
    assert fastmem.write(SEQUENCES, tmp_path / "v1.2").name == "v1.2.bin.json"
    assert (tmp_path / "v1.2.bin").exists()
    assert fastmem.write(SEQUENCES, tmp_path / "b.npy", "npy").name == "b.npy.json"
    fastmem.write(SEQUENCES, tmp_path / "new" / "c", "parquet", shards=2)
    assert json.loads((tmp_path / "new" / "c.parquet.json").read_text())["format"] == "parquet"
    assert (tmp_path / "new" / "c-00001-of-00002.parquet").exists()
