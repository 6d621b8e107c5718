"""Files that are whole or absent."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastmem.base import storage
from fastmem.base.storage import (
    read_json,
    read_result,
    read_sealed,
    write_json,
    write_sealed,
    write_whole,
)


def test_round_trips(tmp_path: Path) -> None:
    """Fails if reading does not give the written value, or a temporary file stays."""
    write_whole(tmp_path / "new" / "a", b"one")
    write_whole(tmp_path / "new" / "a", b"two")
    assert (tmp_path / "new" / "a").read_bytes() == b"two"
    write_sealed(tmp_path / "b", b"payload")
    assert read_sealed(tmp_path / "b") == b"payload"
    value = {"x": [1, 2.5, None, "é"], "y": {"z": 1e300}}
    write_json(tmp_path / "c.json", value)
    assert read_json(tmp_path / "c.json") == value
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c.json", "new"]


def test_every_cut_and_every_changed_byte_is_found(tmp_path: Path) -> None:
    """Fails if damage passes for data."""
    path = tmp_path / "b"
    write_sealed(path, b"payload")
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        for damaged in (whole[:place], bytes(changed)):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"b is damaged: delete it"):
                read_sealed(path)


def test_altered_json_is_found(tmp_path: Path) -> None:
    """Fails if a row that was edited or cut, or another value, counts as a result."""
    path = tmp_path / "row.json"
    write_json(path, {"bits": 10})
    text = path.read_text()
    path.write_text(text.replace("10", "11"))
    with pytest.raises(ValueError, match=r"row.json was altered after it was written"):
        read_json(path)
    for other in (text[:-5], "", "[]", "3", '{"bits": 10}', "\x00"):
        path.write_text(other)
        with pytest.raises(ValueError, match=r"row.json is not a whole file of fastmem"):
            read_json(path)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"prefixes": []}'])
def test_results_of_another_version(text: str | None, tmp_path: Path) -> None:
    """Fails if a result without its fields is read, or its error does not name the file."""
    path = tmp_path / "extraction.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"n.json is missing, damaged or of another version"):
        read_result(path, "prefixes", "settings")


def test_nan_is_never_written(tmp_path: Path) -> None:
    """Fails if a NaN reaches a table."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "row.json", {"bits": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """Fails if a write that stops half way replaces the old file, or leaves a part."""
    path = tmp_path / "a"
    write_whole(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(path, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    """Fails if a writer killed at any moment leaves a torn file under the final name."""
    path = tmp_path / "row.json"
    write_json(path, {"n": -1})
    program = (
        "import itertools, pathlib, runpy, sys\n"
        # Without the package, which would load torch.
        f"write_json = runpy.run_path({storage.__file__!r})['write_json']\n"
        "print('ready', flush=True)\n"
        "for n in itertools.count():\n"
        "    write_json(pathlib.Path(sys.argv[1]), {'n': n, 'pad': 'x' * 100_000})"
    )
    for _ in range(9):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout
            child.stdout.readline()
            for _ in range(20):
                assert json.loads(path.read_text())["n"] >= -1
            os.kill(child.pid, signal.SIGKILL)
        assert read_json(path)["n"] >= -1
