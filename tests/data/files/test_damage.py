"""Headers that no program writes: a ValueError that names the file, and nothing else."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmem
from fastmem import TokenFile
from fastmem.base.storage import read_json, write_json

VALUES: list[Any] = [
    *(-1, 3, 2.0, 4.5, True, None, "4", [], {}, [4], 2**31, 2**64, -(2**70), 10**300, 1e300),
    *(float("inf"), float("nan")),
]
WHOLE = {"dtype": "U16", "shape": [4, 6], "data_offsets": [0, 48]}
DEEP = ["[" * 1000, "[" * 100_000, "{'a':" * 1000, "(" * 5000, "[" * 1000 + "]" * 1000, "-" * 9000]


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match=path.name) as error:
        TokenFile.open(path)
    return str(error.value)


def safetensors_file(folder: Path, header: Any) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(48))
    return path


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_safetensors(value: Any, tmp_path: Path) -> None:
    """Fails if a shape or an offset that is not a size is rounded, or an error of Python."""
    assert TokenFile.open(safetensors_file(tmp_path, {"input_ids": WHOLE})).count == 4
    for name, good in WHOLE.items():
        wrong = [value]
        if isinstance(good, list):
            wrong = [value, [value, good[1]], [good[0], value], [value, value], [*good, value]]
        for bad in wrong:
            header = {"input_ids": {**WHOLE, name: bad}}
            assert "from byte 0 on" in refused(safetensors_file(tmp_path, header))
    for header in (value, {"input_ids": value}, {"input_ids": WHOLE, "other": value}):
        assert "from byte 0 on" in refused(safetensors_file(tmp_path, header))
    negative = {"input_ids": {**WHOLE, "shape": [-4, -6]}}
    assert "from byte 0 on" in refused(safetensors_file(tmp_path, negative))


@pytest.mark.parametrize("text", DEEP, ids=lambda text: f"{text[0]} {len(text)}")
def test_nested_headers(text: str, tmp_path: Path) -> None:
    """Fails if a header that is nested a thousand deep is a RecursionError or a MemoryError."""
    for header in (text, '{"input_ids":' + text, '{"input_ids":{"shape":' + text + "}}"):
        refused(safetensors_file(tmp_path, header.replace("'", '"').encode()))
    for header in (text, "{'shape':" + text + "}"):
        assert "from byte 0 on" in refused(npy_file(tmp_path, header))


def npy_file(folder: Path, header: str) -> Path:
    path = folder / "a.npy"
    head = b"\x93NUMPY\2\0" + struct.pack("<I", len(header)) + header.encode()
    path.write_bytes(head + bytes(48))
    return path


@pytest.mark.parametrize(
    "shape",
    [
        *("(4, 6.0)", "(True, 24)", "(24, True)", "(-4, -6)", "(-4, 6)", "(0, -1)", "None", "24"),
        *("()", "(2, 2, 6)", "[4, 6]", "('4', 6)", "(4, 6), 1", f"({2**70}, 1)", f"({2**62}, 4)"),
        *(f"(0, {2**70})", f"(0, {2**62})", f"({2**62}, 0)", "(1e5, 6)", "x", "lambda: 1"),
    ],
)
def test_npy(shape: str, tmp_path: Path) -> None:
    """Fails if a shape of NumPy's header that no array has is read, or an error of Python."""
    good = "{'descr': '<u2', 'fortran_order': False, 'shape': %s}\n"
    assert TokenFile.open(npy_file(tmp_path, good % "(4, 6)")).count == 4
    refused(npy_file(tmp_path, good % shape))


def places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of each value inside a manifest."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    inner = ((part, (*before, key)) for key, part in parts)
    return [
        place
        for part, here in inner
        for place in [here, *(places(part, here) if isinstance(part, dict | list) else [])]
    ]


@pytest.mark.parametrize("value", VALUES[:13], ids=repr)
def test_manifests(value: Any, tmp_path: Path) -> None:
    """Fails if a manifest with a value of another type is an error of Python or another set."""
    sequences = fastmem.repeated(fastmem.UniformSequences(7, 5, 300), 0.5, 2)
    manifest = fastmem.write(sequences, tmp_path / "a", shards=2)
    whole = json.dumps(read_json(manifest))
    for *before, last in places(json.loads(whole)):
        altered = inner = json.loads(whole)
        for key in before:
            inner = inner[key]
        inner[last] = value
        write_json(manifest, altered)
        for call in (TokenFile.open, fastmem.verify):
            try:
                found = call(tmp_path / "a")
            except ValueError:
                continue
            assert isinstance(found, int) or np.array_equal(found[:], sequences[:])


def test_a_description_of_too_many_sets() -> None:
    """Fails if a set of a thousand sets is a RecursionError."""
    description = fastmem.UniformSequences(7, 5, 300).description()
    for _ in range(1000):
        description = {**description, "kind": "repeated", "base": description, "first": 1}
        description = {name: description[name] for name in ("kind", "generator", "base", "first")}
        description |= {"times": 2, "seed": 0}
    with pytest.raises(ValueError, match="made of too many sets"):
        fastmem.from_description(description)


@pytest.mark.filterwarnings("ignore:.*drops the last")
@pytest.mark.parametrize("format", ["parquet", "megatron", "safetensors", "npy", "llmc"])
def test_altered_bytes(format: str, tmp_path: Path) -> None:
    """Fails if a changed byte of a header is an error of Python, or ends the process."""
    sequences = fastmem.UniformSequences(7, 5, 300)
    fastmem.write(sequences, tmp_path / "a", format).unlink()
    paths = [path for path in tmp_path.iterdir() if path.suffix != ".json"]
    payload = next(path for path in paths if path.suffix != ".idx")
    draw = np.random.default_rng(0)
    for path in paths:
        whole = path.read_bytes()
        header = len(whole) if path.suffix in (".idx", ".parquet") else min(len(whole), 140)
        for i in range(0, header, 1 if header < 400 else 2):
            altered = bytearray(whole)
            altered[i] = [0, 255, int(draw.integers(256))][i % 3]
            path.write_bytes(altered)
            try:
                TokenFile.open(payload, length=5, vocab=300)[:]
            except ValueError as error:
                assert str(error).startswith(str(tmp_path))  # noqa: PT017
        path.write_bytes(whole)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 1000])
def test_a_nested_journal(line: str, tmp_path: Path) -> None:
    """Fails if a journal that is nested a thousand deep is a RecursionError."""
    (tmp_path / "a.bin.journal").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"a\.bin\.journal is not a journal of fastmem"):
        fastmem.write(fastmem.UniformSequences(7, 5, 300), tmp_path / "a")
