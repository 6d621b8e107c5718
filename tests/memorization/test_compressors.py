"""Compressors as codes: what they count can be decoded, and costs what it should."""

import random
import zlib
from typing import Any

import numpy as np
import pytest

from fastmem import prepare_text
from fastmem.data.text import TextCorpus
from fastmem.memorization.compressors import compressor_bits, least_bits

zstandard = pytest.importorskip("zstandard")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> TextCorpus:
    return prepare_text(folder=tmp_path_factory.mktemp("python") / "c")


def test_bits_a_byte_of_python(python: TextCorpus) -> None:
    """Fails if 64-byte pieces of Python cost much more than with a good dictionary.

    Without headers and a dictionary raw deflate takes 6.4 bits a byte, zlib 7.2.
    """
    texts = python.train.sample(2000, seed=0).text_bytes()
    assert {len(text) for text in texts} == {63}
    found = compressor_bits(texts, python.reference.text_bytes())
    a_byte = {name: bits.mean() / 63 for name, bits in found.items()}
    assert 3.4 < a_byte["deflate"] < 4.5
    assert 3.4 < a_byte["zstd"] < 4.5
    least = least_bits(found, python.train.uniform_bits)
    assert least.mean() / 63 < min(a_byte.values())
    assert (least <= python.train.uniform_bits).all()
    zlib_bits = np.mean([8 * len(zlib.compress(text, 9)) for text in texts]) / 63
    assert zlib_bits > 7


def test_frames_can_be_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if bits are counted of less than a decoder needs, who has the dictionary."""
    rng = random.Random(0)
    words = ["alpha ", "beta ", "gamma ", "delta ", "(x)\n"]
    texts = ["".join(rng.choices(words, k=12)).encode() for _ in range(300)]
    made: dict[str, Any] = {}
    deflate, train = zlib.compressobj, zstandard.train_dictionary
    monkeypatch.setattr(
        zlib,
        "compressobj",
        lambda *a: made.update(zdict=a[-1], wbits=a[2]) or deflate(*a),
    )
    monkeypatch.setattr(
        zstandard, "train_dictionary", lambda *a: made.setdefault("zstd", train(*a))
    )
    found = compressor_bits(texts[:20], texts[100:])
    assert made["wbits"] == -15
    one = deflate(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, made["zdict"])
    for i, text in enumerate(texts[:20]):
        again = one.copy()
        frame = again.compress(text) + again.flush()
        assert zlib.decompressobj(-15, made["zdict"]).decompress(frame) == text
        assert found["deflate"][i] == 8 * len(frame)
    # A frame of one block has its content behind a header of 2 bytes, equal for all texts.
    parameters = zstandard.ZstdCompressionParameters.from_level(
        *(19,),
        **{"format": zstandard.FORMAT_ZSTD1_MAGICLESS, "write_checksum": False},
        **{"write_content_size": False, "write_dict_id": False},
    )
    coder = zstandard.ZstdCompressor(dict_data=made["zstd"], compression_params=parameters)
    frames = [coder.compress(text) for text in texts[:20]]
    assert len({frame[:2] for frame in frames}) == 1
    reader = zstandard.ZstdDecompressor(
        dict_data=made["zstd"], format=zstandard.FORMAT_ZSTD1_MAGICLESS
    )
    for i, frame in enumerate(frames):
        assert reader.decompress(frame, max_output_size=1000) == texts[i]
        assert found["zstd"][i] == 8 * (len(frame) - 2)


def test_same_bits_twice() -> None:
    """Fails if a dictionary depends on anything but the texts."""
    texts = [f"text number {i} of many, {i * i}".encode() for i in range(200)]
    first, second = (compressor_bits(texts[:9], texts) for _ in range(2))
    for name in ("deflate", "zstd"):
        assert first[name].tolist() == second[name].tolist()


def test_small_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if few texts for a dictionary, or no zstandard, is an error."""
    found = compressor_bits([b"abc", b""], [b"abcabc"])
    assert found["zstd"].shape == found["deflate"].shape == (2,)
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    assert compressor_bits([b"abc"], [b"abcabc"]).keys() == {"deflate"}
    with pytest.raises(ValueError, match="reference is empty"):
        compressor_bits([b"abc"], [])
