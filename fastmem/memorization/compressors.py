"""Bits of texts by general compressors, as a reference code that needs no training.

A container's header would cost a short text more than its content, so frames are raw. A dictionary
of reference texts gives the compressor what a model of the language would know.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastmem.base.stats import Floats

_WINDOW_BYTES = 1 << 15  # of deflate
_ZSTD_DICTIONARY_BYTES = 1 << 20
_ZSTD_TEXTS = 1 << 16
_ZSTD_LEVEL = 19
_FRAME_HEADER_BYTES = 2  # the descriptor and the window; the block's size, behind them, is code


def compressor_bits(texts: Sequence[bytes], reference: Sequence[bytes]) -> dict[str, Floats]:
    """Bits of each text by each compressor: 8 · the bytes of its raw frame.

        deflate  raw deflate, level 9; its dictionary is 32 KiB of reference texts
        zstd     level 19, without magic number and frame header; a dictionary of up to 1 MiB that
                 zstd trains on reference texts; needs the library zstandard, else left out

    Dictionaries are made of reference texts at even distances, the same in every call.

    Args:
        texts: bytes of the coded tokens of each sequence, as `TextSequences.text_bytes` gives them.
        reference: texts of the reference split.

    Raises:
        ValueError: reference is empty.

    Example:
        >>> texts = [b"def first(self):", b"def second(self):"]
        >>> bits = compressor_bits(texts, [b"def third(self):"] * 8)["deflate"]
        >>> bits < [8 * len(text) for text in texts]
        array([ True,  True])
    """
    if not len(reference):
        raise ValueError("reference is empty: give texts for the dictionary")
    found = {"deflate": _deflate_bits(texts, reference)}
    try:
        import zstandard
    except ImportError:
        return found
    return found | {"zstd": _zstd_bits(zstandard, texts, reference)}


def least_bits(codes: dict[str, Floats], uniform_bits: float) -> Floats:
    """The least bits of each text by any of the codes, and at most `uniform_bits`.

    The choice costs a decoder log2 of the number of codes, which is not counted, as in the paper.

    Example:
        >>> least_bits({"deflate": np.array([80.0, 130.0]), "zstd": np.array([88.0, 96.0])}, 90.0)
        array([80., 90.])
    """
    return np.asarray(np.minimum(np.stack(list(codes.values())).min(0), uniform_bits))


def _deflate_bits(texts: Sequence[bytes], reference: Sequence[bytes]) -> Floats:
    mean = max(1, sum(map(len, reference)) // len(reference))
    dictionary = b"".join(_spread(reference, -(-_WINDOW_BYTES // mean)))[-_WINDOW_BYTES:]
    # A copy has the dictionary indexed already, which takes most of the time.
    ready = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, dictionary)

    def size(text: bytes) -> int:
        one = ready.copy()
        return len(one.compress(text)) + len(one.flush())

    return np.array([8.0 * size(text) for text in texts])


def _zstd_bits(library: Any, texts: Sequence[bytes], reference: Sequence[bytes]) -> Floats:
    samples = _spread(reference, _ZSTD_TEXTS)
    room = min(_ZSTD_DICTIONARY_BYTES, max(1024, sum(map(len, samples)) // 4))
    try:
        dictionary = library.train_dictionary(room, samples)
    except library.ZstdError:  # too few samples to count their statistics
        dictionary = library.ZstdCompressionDict(
            b"".join(samples)[-room:], dict_type=library.DICT_TYPE_RAWCONTENT
        )
    parameters = library.ZstdCompressionParameters.from_level(
        _ZSTD_LEVEL,
        format=library.FORMAT_ZSTD1_MAGICLESS,
        write_checksum=False,
        write_content_size=False,
        write_dict_id=False,
    )
    one = library.ZstdCompressor(dict_data=dictionary, compression_params=parameters)
    return np.array([8.0 * (len(one.compress(text)) - _FRAME_HEADER_BYTES) for text in texts])


def _spread(texts: Sequence[bytes], n: int) -> list[bytes]:
    """At most n texts at even distances."""
    n = min(n, len(texts))
    return [texts[len(texts) * i // n] for i in range(n)]
