"""A write that was killed, or whose disk was full: never whole, and resumed to the same bytes."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.written_files import FORMATS, OTHER, SEQUENCES, contents

import fastmem
from fastmem.data.files import blocks
from fastmem.data.files.formats import Format


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
def test_full_disk(format: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a disk that is full at any byte leaves a half file under a final name or costs a
    whole block, or the resumed run ends with other bytes."""
    fastmem.write(SEQUENCES, tmp_path / "calm" / "train", format, shards=2)
    calm = contents(tmp_path / "calm")
    total = sum(len(payload) for name, payload in calm.items() if not name.endswith(".json"))
    for room in range(0, total, total // 23):
        folder = tmp_path / f"{room}"
        disk = FullDisk(room)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", disk)
            with pytest.raises(OSError, match="No space left on device"):
                fastmem.write(SEQUENCES, folder / "train", format, shards=2)
        left = contents(folder)
        for name, payload in left.items():
            assert name.endswith((".part", ".journal")) or payload == calm[name]
        again = FullDisk(total)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", again)
            fastmem.write(SEQUENCES, folder / "train", format, shards=2)
        assert contents(folder) == calm
        if format != "parquet":  # only the block or header that was cut is written twice
            assert total - room <= again.written <= total - room + 4096


def test_an_unfinished_set_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the files of a killed run can be opened or verified as if they were whole."""
    monkeypatch.setattr(os, "write", FullDisk(1000))
    with pytest.raises(OSError, match="No space"):
        fastmem.write(SEQUENCES, tmp_path / "train")
    for use in (fastmem.TokenFile.open, fastmem.verify):
        with pytest.raises(ValueError, match="manifest"):
            use(tmp_path / "train.bin")


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, room: int = 1000) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(room))
        with pytest.raises(OSError, match="No space"):
            fastmem.write(SEQUENCES, folder / "train")


def test_damage_to_the_files_of_a_killed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a journal cut anywhere, a lost block or an altered byte reaches the result."""
    whole = SEQUENCES.tokens(slice(None)).tobytes()
    interrupted(tmp_path, monkeypatch)
    half, log = tmp_path / "train.bin.part", tmp_path / "train.bin.journal"
    payload, lines = half.read_bytes(), log.read_bytes()
    cases = [(payload, lines[:cut]) for cut in range(7, len(lines), 7)]
    cases += [(payload, lines[:-40] + bytes(40)), (payload[:300], lines), (b"", lines)]
    for place in (0, 255, 256, 700):
        altered = bytearray(payload)
        altered[place] ^= 1
        cases.append((bytes(altered), lines))
    for part_bytes, log_bytes in cases:
        half.write_bytes(part_bytes)
        log.write_bytes(log_bytes)
        fastmem.write(SEQUENCES, tmp_path / "train")
        assert (tmp_path / "train.bin").read_bytes() == whole
        assert not half.exists()
        assert not log.exists()
        for path in tmp_path.iterdir():
            path.unlink()


def test_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run resumes with the blocks of another set, or destroys them unasked."""
    interrupted(tmp_path, monkeypatch)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"\(seed is 9 there, 10 here\): give the same seed"):
        fastmem.write(OTHER, tmp_path / "train")
    with pytest.raises(ValueError, match=r"\(format is bin there, llmc here\)"):
        fastmem.write(SEQUENCES, tmp_path / "train", "llmc")
    with pytest.raises(ValueError, match=r"\(shards is 1 there, 2 here\)"):
        fastmem.write(SEQUENCES, tmp_path / "train", shards=2)
    assert contents(tmp_path) == before
    fastmem.write(OTHER, tmp_path / "train", shards=2, overwrite=True)
    assert fastmem.verify(tmp_path / "train") == 50
    assert len(contents(tmp_path)) == 3


def test_files_that_no_run_vouches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a foreign .part or payload, or an altered payload, is destroyed or passes."""
    half = tmp_path / "p.bin.part"
    half.write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"p\.bin\.part exists already"):
        fastmem.write(SEQUENCES, tmp_path / "p")
    assert contents(tmp_path) == {"p.bin.part": b"precious"}
    half.unlink()
    interrupted(tmp_path, monkeypatch)
    (tmp_path / "train.bin").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"train\.bin differs from the file that the unfinished"):
        fastmem.write(SEQUENCES, tmp_path / "train")
    assert (tmp_path / "train.bin").read_bytes() == b"precious"
    fastmem.write(SEQUENCES, tmp_path / "train", overwrite=True)
    assert fastmem.verify(tmp_path / "train") == 50


def test_a_whole_shard_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run trusts the size of a finished shard that was altered since."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(1200))
        with pytest.raises(OSError, match="No space"):
            fastmem.write(SEQUENCES, tmp_path / "train", shards=2)
    first = tmp_path / "train-00000-of-00002.bin"
    first.write_bytes(bytes(first.stat().st_size))
    with pytest.raises(ValueError, match=r"00002\.bin differs from the file that"):
        fastmem.write(SEQUENCES, tmp_path / "train", shards=2)
    fastmem.write(SEQUENCES, tmp_path / "train", shards=2, overwrite=True)
    assert fastmem.verify(tmp_path / "train") == 50


def test_killed_after_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the journal of a whole set stays for ever, or costs the set."""
    interrupted(tmp_path, monkeypatch)
    log = (tmp_path / "train.bin.journal").read_bytes()
    fastmem.write(SEQUENCES, tmp_path / "train")
    whole = contents(tmp_path)
    (tmp_path / "train.bin.journal").write_bytes(log)
    with pytest.raises(ValueError, match="exists already"):
        fastmem.write(SEQUENCES, tmp_path / "train")
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("text", ["{}", "[1]", "null", '{"name": "v.bin"}', "my diary"])
def test_journals_that_are_not_ours(text: str, tmp_path: Path) -> None:
    """Fails if another program's .journal is a traceback, or is destroyed unasked."""
    log = tmp_path / "train.bin.journal"
    log.write_text(text + "\n")
    with pytest.raises(ValueError, match=r"bin\.journal is not a journal of fastmem"):
        fastmem.write(SEQUENCES, tmp_path / "train")
    assert contents(tmp_path) == {log.name: text.encode() + b"\n"}
    fastmem.write(SEQUENCES, tmp_path / "train", overwrite=True)
    assert fastmem.verify(tmp_path / "train") == 50


@pytest.mark.parametrize(
    "entry", ["{}", "[1]", "null", '{"name": "train.bin"}', '{"name": [], "bytes": "1"}']
)
def test_damaged_entries(entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a line that is JSON but not an entry stops a journal from resuming."""
    interrupted(tmp_path, monkeypatch)
    with (tmp_path / "train.bin.journal").open("a") as file:
        file.write(entry + "\n")
    fastmem.write(SEQUENCES, tmp_path / "train")
    assert fastmem.verify(tmp_path / "train") == 50


def test_killed_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run killed ten times with SIGKILL ends with other bytes, or starts over."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 << 20)
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
        # 34 blocks of 4 MiB and a line for the request: no block is lost, so all kills fit in.
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
