"""File formats of the field: the header before and the index beside a row-major token payload.

N sequences, S tokens a sequence, V vocabulary. Everything is little-endian.
"""

import json
import math
import struct
from collections.abc import Iterator, Sequence
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
    f"{kind}{8 * n}": np.dtype(f"<{kind.lower()}{n}") for kind in "UI" for n in (1, 2, 4, 8)
}
_SAFETENSORS_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
_LLMC_OTHERS = {
    **{20240326: "a model", 20240803: "a Llama 3 model", 20240327: "a debug state"},
    **{20240328: "a tokenizer", 20240522: "an evaluation set", 20240527: "a training state"},
}
_OTHERS: dict[bytes, str] = {
    **{struct.pack("<i", magic): f"{kind} of llm.c" for magic, kind in _LLMC_OTHERS.items()},
    **{b"24ka": "a model of llama2.c", b"GGUF": "a GGUF model", b"PAR1": "a Parquet file"},
    **{b"PK\3\4": "a zip archive or torch.save's file", _NPY_MAGIC: "an .npy file"},
    **{b"\x80\2\x8a\n": "an old torch.save's file", b"\x80\4\x95": "a pickle"},
    **{b"\x1f\x8b\b": "a gzip file", b"\x28\xb5\x2f\xfd": "a zstd file"},
    **{b"ARROW1": "an Arrow file", _MEGATRON_MAGIC: "an index of Megatron"},
    **{
        b"version https://git-lfs": "a pointer that git lfs pull replaces",
        b"<!DOCTYPE": "a web page",
    },
}
"""The first bytes of other files that are called .bin."""
_HALVES_TOKENS = 1 << 22
_MAX_INT32 = 2**31 - 1
_INDEX_ROWS = 1 << 19
_PAGE = 4096  # a payload that begins at a page is written faster and can be mapped alone


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a file are: contiguous from `offset` on."""

    format: Format
    dtype: Dtype
    offset: int
    """Bytes before the first token."""
    tokens: int
    length: int | None
    """S, if the file has it."""
    after: int = 0
    """Bytes after the tokens, which hold other tensors."""


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


def read_layout(
    path: Path, vocab: int | None = None, dtype: Dtype | None = None, column: str | None = None
) -> Layout:
    """Finds the tokens in a file of any format but Parquet; compares its size with its header.

    Args:
        path: its suffix determines the format; for .bin the first bytes and an .idx beside it do.
        vocab: if above 65536, a .bin without header or index is uint32, else uint16.
        dtype: of a .bin without header or index; None: as `vocab` says, and numbers that look like
            halves of wider tokens are refused.
        column: the name of a tensor of safetensors; None: input_ids, or the only tensor.

    Raises:
        ValueError: the file is cut, or is not of its suffix's format; names the byte.
    """
    size = path.stat().st_size
    if column is not None and path.suffix != ".safetensors":
        raise ValueError(f"{path} has no named columns, got column {column!r}: leave column out")
    with path.open("rb") as file:
        if path.suffix == ".npy":
            layout = _read_npy(path, file)
        elif path.suffix == ".safetensors":
            layout = _read_safetensors(path, file, size, column)
        elif path.suffix == ".bin":
            layout = _read_bin(path, file, size, vocab, dtype)
        else:
            known = ", ".join(sorted(set(SUFFIXES.values())))
            raise ValueError(f"{path} has the suffix {path.suffix!r}: fastmem reads {known}")
    end = layout.offset + layout.tokens * layout.dtype.itemsize + layout.after
    if size != end:
        wrong = "is cut" if size < end else "has bytes after its tokens"
        raise ValueError(
            f"{path} {wrong}: its header requires {end} bytes, and it has {size}; generate it again"
        )
    if dtype not in (None, layout.dtype):
        raise ValueError(
            f"{path} has tokens of {layout.dtype} by its header, not {dtype}: leave dtype out"
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
    except Exception as error:  # NumPy parses the header as Python
        raise ValueError(
            f"{path} is not a .npy file, from byte 0 on: {error}; raw tokens are called .bin"
        ) from None
    if dtype.kind not in "iu" or dtype.byteorder == ">" or fortran or len(shape) not in (1, 2):
        raise ValueError(
            f"{path} holds {dtype} of shape {shape}{' in Fortran order' if fortran else ''}, not "
            "rows of little-endian integers: save np.ascontiguousarray(tokens, '<u4')"
        )
    if not _is_shape(shape):
        raise ValueError(f"{path} has the impossible shape {shape} in its header at byte 0")
    return Layout("npy", dtype, file.tell(), math.prod(shape), _length(shape))


def _read_safetensors(path: Path, file: BinaryIO, size: int, column: str | None) -> Layout:
    try:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        if header_bytes > min(size - 8, _SAFETENSORS_HEADER_BYTES):
            raise ValueError(f"a header of {header_bytes} bytes in a file of {size}")
        tensors = json.loads(file.read(header_bytes))
        tensors.pop("__metadata__", None)
        name = column or (COLUMN if COLUMN in tensors or len(tensors) != 1 else next(iter(tensors)))
        if name not in tensors:
            raise ValueError(f"tensors {sorted(tensors)} without {name!r}: give column")
        spans = [tensor["data_offsets"] for tensor in tensors.values()]
        shape, (begin, end) = tensors[name]["shape"], tensors[name]["data_offsets"]
        dtype = _SAFETENSORS.get(tensors[name]["dtype"])
        if dtype is None or not _is_shape(shape) or not all(map(_is_shape, spans)):
            raise ValueError(f"tensors {tensors}, not rows of integers")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{end - begin} bytes of {name}, not {dtype} of shape {shape}")
        after = max(end for _, end in spans) - end
    except Exception as error:  # JSON of any depth and with any values
        reason = error if isinstance(error, ValueError | struct.error) else repr(error)
        raise ValueError(
            f"{path} is not a safetensors file of tokens, from byte 0 on: {reason}"
        ) from None
    offset = 8 + header_bytes + begin
    return Layout("safetensors", dtype, offset, math.prod(shape), _length(shape), after)


def _is_shape(shape: Sequence[object]) -> bool:
    """True for one or two integers, at least 0 and at most 2**63 - 1."""
    return len(shape) in (1, 2) and all(type(n) is int and 0 <= n < 2**63 for n in shape)


def _length(shape: Sequence[int]) -> int | None:
    return shape[1] if len(shape) == 2 else None


def _read_bin(
    path: Path, file: BinaryIO, size: int, vocab: int | None, dtype: Dtype | None
) -> Layout:
    start = file.read(32)
    for magic, kind in _OTHERS.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is {kind} by its first bytes, not tokens: give a data set")
    known = _LLMC.get(int.from_bytes(start[:4], "little"))
    if known is not None and len(start) >= 4:
        if size < _LLMC_HEADER_BYTES:
            raise ValueError(
                f"{path} is cut: llm.c's header takes {_LLMC_HEADER_BYTES} bytes, and the file has "
                f"{size}; generate it again"
            )
        magic_number, version, tokens = struct.unpack("<3i", start[:12])
        expected, wanted = known
        if version != expected or tokens < 1:
            raise ValueError(
                f"{path} has llm.c's magic {magic_number}, but version {version} and {tokens} "
                f"tokens at byte 4: only version {expected} with tokens can be read"
            )
        return Layout("llmc", wanted, _LLMC_HEADER_BYTES, tokens, None)
    if index_path(path).exists():
        return _read_index(path, size)
    plain: Dtype = dtype or np.dtype("<u4" if vocab is not None and vocab > 65536 else "<u2")
    if size % plain.itemsize:
        raise ValueError(f"{path} is cut: its last token, at byte {size - 1}, is incomplete")
    if dtype is None:
        _check_halves(path, plain, size // plain.itemsize)
    return Layout("bin", plain, 0, size // plain.itemsize, None)


def _check_halves(path: Path, dtype: Dtype, tokens: int) -> None:
    """ValueError if the numbers of a .bin look like parts of wider tokens, or pairs of bytes."""
    for begin in range(0, tokens, _HALVES_TOKENS):
        part = np.fromfile(path, dtype, _HALVES_TOKENS, offset=begin * dtype.itemsize)
        if part.size < 4 or not part.any():
            continue
        # Tokens of this width do not differ so at even and odd places, or in both of their bytes.
        low, high = sorted((int(part[::2].max()), int(part[1::2].max())))
        byte = int((part & 255).max())
        if low == 0 or (part.size >= 32 and 256 * (low + 1) <= high + 1):
            looks = f"every second number at most {low} and the others up to {high}"
            others = f"uint{16 * dtype.itemsize} or int64"
        elif part.size >= 64 and part.max() > 255 and byte < 128:
            looks, others = f"no low byte above {byte}, as text does", "uint8 or >u2"
        else:
            return
        raise ValueError(
            f"{path} read as {dtype} has {looks}: give dtype {others}, or {dtype} if "
            "these are the tokens"
        )


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
    low, high, tokens = _checked_index(index, count, documents, dtype)
    if tokens * dtype.itemsize != size:
        raise ValueError(
            f"{path} does not match its index: {index} has {tokens} tokens of {dtype}, "
            f"{tokens * dtype.itemsize} bytes, and the file has {size} bytes"
        )
    return Layout("megatron", dtype, 0, tokens, low if low == high else None)


def _checked_index(index: Path, count: int, documents: int, dtype: Dtype) -> tuple[int, int, int]:
    """The shortest and the longest sequence of an index, and its tokens, read part by part.

    Raises:
        ValueError: the sequences do not follow each other in the file, or the documents are not
            made of the sequences; names the byte.
    """
    lowest, highest, tokens, border = _MAX_INT32 if count else 0, 0, 0, 0

    def check(wrong: NDArray[np.bool_], values: NDArray[Any], start: int, rule: str) -> None:
        if wrong.any():
            i = int(wrong.argmax())
            raise ValueError(
                f"{index}, byte {start + values.itemsize * i}: {values[i]} is {rule}: generate the "
                "set again"
            )

    for begin in range(0, count, _INDEX_ROWS):
        n = min(_INDEX_ROWS, count - begin)
        start = _MEGATRON_HEADER.size + 4 * begin
        lengths = np.fromfile(index, "<i4", n, offset=start)
        check(lengths < 0, lengths, start, "not the length of a sequence")
        ends = tokens + np.cumsum(lengths, dtype=np.int64)
        start = _MEGATRON_HEADER.size + 4 * count + 8 * begin
        pointers = np.fromfile(index, "<i8", n, offset=start)
        rule = f"not where a sequence begins, since sequences follow each other in {index.stem}.bin"
        check(pointers != (ends - lengths) * dtype.itemsize, pointers, start, rule)
        lowest, highest = min(lowest, int(lengths.min())), max(highest, int(lengths.max()))
        tokens = int(ends[-1])
    for begin in range(0, documents, _INDEX_ROWS):
        n = min(_INDEX_ROWS, documents - begin)
        start = _MEGATRON_HEADER.size + 12 * count + 8 * begin
        borders = np.fromfile(index, "<i8", n, offset=start)
        wrong = (np.diff(borders, prepend=border) < 0) | (borders > count)
        if begin == 0:
            wrong[0] |= borders[0] != 0
        if begin + n == documents:
            wrong[-1] |= borders[-1] != count
        check(wrong, borders, start, f"not a border of documents from 0 to {count} sequences")
        border = int(borders[-1])
    return lowest, highest, tokens
