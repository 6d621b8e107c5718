"""File formats of the field: the header before and the index beside a row-major token payload.

N sequences, S tokens a sequence, V vocabulary. Everything is little-endian.
"""

import json
import struct
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Format = Literal["bin", "llmc", "megatron", "npy", "parquet", "safetensors"]
Dtype = np.dtype[np.integer[Any]]
Bytes = NDArray[np.uint8]

SUFFIXES: dict[Format, str] = {
    "bin": ".bin",
    "llmc": ".bin",
    "megatron": ".bin",
    "npy": ".npy",
    "parquet": ".parquet",
    "safetensors": ".safetensors",
}
COLUMN = "input_ids"
"""The name of the tensor in safetensors and of the column in Parquet."""

_LLMC_HEADER_BYTES = 256 * 4
# llm.c's magic: its version and dtype. GPT-2's tokens are uint16, Llama 3's uint32.
_LLMC: dict[int, tuple[int, Dtype]] = {
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}
_MEGATRON_MAGIC = b"MMIDIDX\0\0"
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")
_MEGATRON: dict[int, Dtype] = {
    **{1: np.dtype("u1"), 2: np.dtype("i1"), 3: np.dtype("<i2")},
    **{4: np.dtype("<i4"), 5: np.dtype("<i8"), 8: np.dtype("<u2")},
}
_NPY_MAGIC = b"\x93NUMPY"
_SAFETENSORS: dict[str, Dtype] = {
    **{"U8": np.dtype("u1"), "U16": np.dtype("<u2"), "U32": np.dtype("<u4")},
    **{"I16": np.dtype("<i2"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8")},
}
_MAX_INT32 = 2**31 - 1
_INDEX_ROWS = 1 << 19
_PAGE = 4096  # a payload that begins at a page is written faster and can be mapped alone


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a file are: contiguous from `offset` to the end of the file."""

    format: Format
    dtype: Dtype
    offset: int
    """Bytes before the first token."""
    tokens: int
    length: int | None
    """S, if the file has it."""


def checked_format(name: str) -> Format:
    """The name; ValueError unless it is one of the six formats."""
    if name not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {name!r}")
    return name  # type: ignore[return-value]


def token_dtype(format: Format, vocab: int) -> Dtype:
    """The dtype that readers of the format expect for this vocabulary."""
    if format == "megatron":  # Megatron's own rule, DType.optimal_dtype
        return np.dtype("<u2" if vocab < 65500 else "<i4")
    if format == "parquet":
        return np.dtype("<i4")
    return np.dtype("<u2" if vocab <= 65536 else "<u4")


def header(format: Format, count: int, length: int, dtype: Dtype) -> bytes:
    """The bytes before the tokens of `count` sequences; ValueError above the format's limit.

    >>> struct.unpack("<3i", header("llmc", 3, 4, np.dtype("<u2"))[:12])
    (20240520, 1, 12)
    """
    if format == "llmc":
        magic, version = next((key, value[0]) for key, value in _LLMC.items() if value[1] == dtype)
        if count * length > _MAX_INT32:
            shards = -(-count // (_MAX_INT32 // length)) if length <= _MAX_INT32 else "more"
            raise ValueError(
                f"llm.c counts at most {_MAX_INT32} tokens in a file, not {count * length}: "
                f"write {shards} times as many shards"
            )
        return struct.pack("<3i", magic, version, count * length).ljust(_LLMC_HEADER_BYTES, b"\0")
    if format == "npy":
        # Not by NumPy's writer, whose padding differs between versions.
        text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count}, {length}), }}"
        text += " " * (-(len(text) + 11) % _PAGE) + "\n"
        return _NPY_MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    if format == "safetensors":
        name = next(name for name, kind in _SAFETENSORS.items() if kind == dtype)
        span = [0, count * length * dtype.itemsize]
        tensor = {"dtype": name, "shape": [count, length], "data_offsets": span}
        encoded = json.dumps({COLUMN: tensor}).encode()
        encoded += b" " * (-(len(encoded) + 8) % _PAGE)
        return struct.pack("<Q", len(encoded)) + encoded
    if format == "megatron" and length > _MAX_INT32:
        raise ValueError(f"Megatron's sequences have at most {_MAX_INT32} tokens, not {length}")
    return b""


def index_path(payload: Path) -> Path:
    """The path of Megatron's index, which is beside the tokens."""
    return payload.with_suffix(".idx")


def index_bytes(count: int) -> int:
    """The bytes of Megatron's index of `count` sequences, where each is a document."""
    return _MEGATRON_HEADER.size + 4 * count + 8 * count + 8 * (count + 1)


def index_chunks(count: int, length: int, dtype: Dtype) -> Iterator[Bytes]:
    """Megatron's index, part by part: header, lengths, byte offsets, document boundaries."""
    code = next(code for code, known in _MEGATRON.items() if known == dtype)
    head = _MEGATRON_HEADER.pack(_MEGATRON_MAGIC, 1, code, count, count + 1)
    yield np.frombuffer(head, np.uint8)
    # The number of values, each value as first + step * place, and their type.
    for n, first, step, kind in (
        (count, length, 0, "<i4"),
        (count, 0, length * dtype.itemsize, "<i8"),
        (count + 1, 0, 1, "<i8"),
    ):
        for begin in range(0, n, _INDEX_ROWS):
            places = np.arange(begin, min(begin + _INDEX_ROWS, n), dtype=np.int64)
            yield (first + step * places).astype(kind).view(np.uint8)


def read_layout(path: Path, vocab: int | None = None) -> Layout:
    """Finds the tokens in a file of any format but Parquet; compares its size with its header.

    Args:
        path: its suffix determines the format; for .bin the first bytes and an .idx beside it do.
        vocab: if above 65536, a .bin without header or index is uint32, else uint16.

    Raises:
        ValueError: the file is cut, or is not of its suffix's format; names the byte.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix == ".npy":
            layout = _read_npy(path, file)
        elif path.suffix == ".safetensors":
            layout = _read_safetensors(path, file, size)
        elif path.suffix == ".bin":
            layout = _read_bin(path, file, size, vocab)
        else:
            known = ", ".join(sorted(set(SUFFIXES.values())))
            raise ValueError(f"{path} has the suffix {path.suffix!r}: fastmem reads {known}")
    end = layout.offset + layout.tokens * layout.dtype.itemsize
    if size != end:
        wrong = "is cut" if size < end else "has bytes after its tokens"
        raise ValueError(
            f"{path} {wrong}: its header requires {end} bytes, and it has {size}; generate it again"
        )
    return layout


def _read_npy(path: Path, file: BinaryIO) -> Layout:
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(file)
    # NumPy parses the header as Python.
    except (ValueError, KeyError, SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{path} is not a .npy file, from byte 0 on: {error}") from None
    if dtype.kind not in "iu" or dtype.byteorder == ">" or fortran or len(shape) not in (1, 2):
        raise ValueError(
            f"{path} holds {dtype} of shape {shape}{' in Fortran order' if fortran else ''}, not "
            "rows of little-endian integers: save np.ascontiguousarray(tokens, '<u4')"
        )
    tokens = int(np.prod(shape, dtype=object))
    return Layout("npy", dtype, file.tell(), tokens, shape[1] if len(shape) == 2 else None)


def _read_safetensors(path: Path, file: BinaryIO, size: int) -> Layout:
    try:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        if header_bytes > size - 8:
            raise ValueError(f"a header of {header_bytes} bytes")
        tensors = json.loads(file.read(header_bytes))
        tensors.pop("__metadata__", None)
        if COLUMN not in tensors and len(tensors) != 1:
            raise ValueError(f"tensors {sorted(tensors)} without {COLUMN!r}")
        tensor = tensors.get(COLUMN) or next(iter(tensors.values()))
        shape, (begin, end) = tensor["shape"], tensor["data_offsets"]
        dtype = _SAFETENSORS[tensor["dtype"]]
        tokens = int(np.prod(shape, dtype=object))
        if len(shape) not in (1, 2) or end - begin != tokens * dtype.itemsize or len(tensors) > 1:
            raise ValueError(f"tensors {tensors}, not one of rows of integers")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(
            f"{path} is not a safetensors file of tokens, from byte 0 on: {error!r}"
        ) from None
    length = shape[1] if len(shape) == 2 else None
    return Layout("safetensors", dtype, 8 + header_bytes + begin, tokens, length)


def _read_bin(path: Path, file: BinaryIO, size: int, vocab: int | None) -> Layout:
    start = file.read(12)
    if len(start) == 12 and size >= _LLMC_HEADER_BYTES:
        magic, version, tokens = struct.unpack("<3i", start)
        if magic in _LLMC:
            expected, dtype = _LLMC[magic]
            if version != expected or tokens < 1:
                raise ValueError(
                    f"{path} has llm.c's magic {magic}, but version {version} and {tokens} tokens "
                    f"at byte 4: only version {expected} with tokens can be read"
                )
            return Layout("llmc", dtype, _LLMC_HEADER_BYTES, tokens, None)
    if index_path(path).exists():
        return _read_index(path, size)
    plain: Dtype = np.dtype("<u4" if vocab is not None and vocab > 65536 else "<u2")
    if size % plain.itemsize:
        raise ValueError(f"{path} is cut: its last token, at byte {size - 1}, is incomplete")
    return Layout("bin", plain, 0, size // plain.itemsize, None)


def _read_index(path: Path, size: int) -> Layout:
    index = index_path(path)
    there = index.stat().st_size
    with index.open("rb") as file:
        start = file.read(_MEGATRON_HEADER.size)
    if len(start) < _MEGATRON_HEADER.size or not start.startswith(_MEGATRON_MAGIC):
        raise ValueError(f"{index} is not an index of Megatron, from byte 0 on")
    _, version, code, count, documents = _MEGATRON_HEADER.unpack(start)
    if version != 1 or code not in _MEGATRON:
        raise ValueError(
            f"{index} has version {version} at byte 9 and dtype {code} at byte 17: only version 1 "
            f"and dtypes {sorted(_MEGATRON)} can be read"
        )
    # The modes of a multimodal set may follow.
    wanted = _MEGATRON_HEADER.size + 12 * count + 8 * documents
    if there < wanted:
        raise ValueError(f"{index} is cut: of {wanted} bytes only the first {there} exist")
    dtype = _MEGATRON[code]
    lengths = np.memmap(index, "<i4", "r", _MEGATRON_HEADER.size, (count,)) if count else [0]
    low, high, tokens = _extent(lengths)
    if tokens * dtype.itemsize != size:
        raise ValueError(
            f"{path} does not match its index: {index} has {tokens} tokens of {dtype}, "
            f"{tokens * dtype.itemsize} bytes, and the file has {size} bytes"
        )
    return Layout("megatron", dtype, 0, tokens, low if low == high else None)


def _extent(lengths: Any) -> tuple[int, int, int]:
    """The minimum, the maximum and the sum, computed part by part."""
    parts = [lengths[i : i + _INDEX_ROWS] for i in range(0, len(lengths), _INDEX_ROWS)]
    low, high = min(int(np.min(p)) for p in parts), max(int(np.max(p)) for p in parts)
    return low, high, sum(int(np.sum(p, dtype=np.int64)) for p in parts)
