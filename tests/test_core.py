"""fastmem._core: Philox as its authors publish it, results where they belong and only there, other
threads running meanwhile, and every array that is off refused. What the tokens and orders are is
judged in test_data.py.

Each test says what would make it fail. Results start as a marker, so that a slot which was skipped
shows. N sequences, S tokens a sequence, V vocabulary.
"""

import math
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastmem import _core
from fastmem.data import UniformSequences

U64 = np.uint64
LAST = 2**64 - 1

Array = NDArray[Any]


def marked(shape: tuple[int, ...], dtype: Any) -> Array:
    out = np.empty(shape, dtype)
    out.view(np.uint8)[...] = 0xCA
    return out


def test_philox_known_answers() -> None:
    """Fails if the generator is not Random123's Philox4x32-10."""
    text = (Path(__file__).parent / "philox_known_answers.txt").read_text()
    answers = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(answers) == 3
    for answer in answers:
        words = [int(word, 16) for word in answer.split()]
        assert _core.philox4x32(words[:4], words[4:6]) == words[6:]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64])
@pytest.mark.parametrize(("length", "vocab"), [(65, 128), (13, 50257)])
def test_nothing_is_skipped_nor_written_beyond(dtype: Any, length: int, vocab: int) -> None:
    """Fails if the core leaves a slot as it was, or touches the rows before or after its own."""
    rows = marked((12, length), dtype)
    untouched = rows[0].copy()
    _core.fill_range(rows[2:9], seed=1, vocab=vocab, begin=5, threads=1)
    right = UniformSequences(7, length, vocab, seed=1, start=5).tokens(slice(None), dtype)
    np.testing.assert_array_equal(rows[2:9], right)
    _core.fill_indices(rows[9:11], np.array([5, 9], U64), seed=1, vocab=vocab, threads=1)
    np.testing.assert_array_equal(rows[9:11], right[[0, 4]])
    for row in (0, 1, 11):
        np.testing.assert_array_equal(rows[row], untouched)


def test_no_place_is_skipped_nor_written_beyond() -> None:
    """Fails if an order leaves a slot as it was, or touches one before or after its own."""
    places = marked((1002,), U64)
    untouched = places[0]
    _core.permutation(places[1:-1], seed=5, epoch=0, last=999, begin=0, threads=1)
    assert places[0] == places[-1] == untouched
    np.testing.assert_array_equal(np.sort(places[1:-1]), np.arange(1000))


@pytest.mark.parametrize(
    ("fill", "arrays", "keywords"),
    [
        (_core.fill_range, [np.empty((1, 2**18), np.uint16)], {"vocab": 2, "begin": 0}),
        (_core.fill_indices, [np.empty((1, 2**18), np.int64), np.zeros(1, U64)], {"vocab": 3}),
        (_core.permutation, [np.empty(2**14, U64)], {"epoch": 0, "last": LAST, "begin": 0}),
    ],
    ids=["fill_range", "fill_indices", "permutation"],
)
def test_other_threads_run_meanwhile(
    fill: Any, arrays: list[Array], keywords: dict[str, int]
) -> None:
    """Fails if the GIL is kept.

    With a switch interval of an hour no thread is told to yield, so the other one runs up to its
    lock at once, and then only if the core lets go; it may take several calls to wake up in time.
    """
    wait = threading.Lock()
    ran: list[bool] = []

    def other() -> None:
        with wait:
            ran.append(True)

    thread = threading.Thread(target=other)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    try:
        wait.acquire()
        thread.start()
        wait.release()
        for _ in range(1000):
            fill(*arrays, seed=0, threads=1, **keywords)
            if ran:
                break
        progressed = bool(ran)
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert progressed


def strided(dtype: Any = np.uint16) -> Array:
    return np.empty((4, 8), dtype)[:, ::2]


def read_only(shape: tuple[int, ...], dtype: Any) -> Array:
    out = np.empty(shape, dtype)
    out.flags.writeable = False
    return out


def unaligned(shape: tuple[int, ...], dtype: Any) -> Array:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    array: Array = np.empty(size + 1, np.uint8)[1:].view(dtype)
    return array.reshape(shape)


SHARED = np.zeros(32, U64)


@pytest.mark.parametrize(
    ("out", "changed", "message"),
    [
        (np.empty(4, np.uint16), {}, r"out must have 2 dimension\(s\), got shape \(4,\)"),
        (np.empty((4, 0), np.uint16), {}, "length of a sequence, must be from 1 to .* got 0"),
        (strided(), {}, "out must be C-contiguous"),
        (read_only((4, 4), np.uint16), {}, "out must be writeable"),
        (unaligned((4, 4), np.uint16), {}, "out must be aligned"),
        (np.empty((4, 4), np.int16), {}, "out must be uint16.* got int16"),
        (np.empty((4, 4), np.float32), {}, "out must be uint16.* got float32"),
        (np.empty((4, 4), ">u4"), {}, "native byte order, got >u4"),
        (np.empty((4, 4), np.uint16), {"vocab": 65537}, "at most 65536 for uint16 .* got 65537"),
        (np.empty((4, 4), np.int64), {"vocab": 2**31 + 1}, "vocab must be .* got 2147483649"),
        (np.empty((4, 4), np.int64), {"vocab": 0}, "vocab must be from 1 to 2147483648, got 0"),
        (np.empty((4, 4), np.int64), {"threads": 0}, "threads must be from 1"),
        (np.empty((4, 4), np.int64), {"begin": 2**64 - 3}, r"begin = 18.*613 and len\(out\) = 4"),
        (np.empty((4, 4), np.int64), {"indices": np.zeros(3, U64)}, "4 rows for 3 indices"),
        (np.empty((4, 4), np.int64), {"indices": np.zeros(4, np.int64)}, "indices must be uint64"),
        (np.empty((4, 4), np.int64), {"indices": np.zeros(8, U64)[::2]}, "C-contiguous"),
        (np.empty((4, 4), np.int64), {"indices": unaligned((4,), U64)}, "indices must be aligned"),
        (SHARED[:16].view(np.int64).reshape(4, 4), {"indices": SHARED[15:19]}, "share memory"),
    ],
)
def test_the_core_checks_arrays(out: Array, changed: dict[str, Any], message: str) -> None:
    """Fails if the core would write where or what it must not."""
    keywords = {"seed": 0, "vocab": 16, "threads": 1} | changed
    fill: Any = _core.fill_indices if "indices" in changed else _core.fill_range
    begin = {} if "indices" in changed else {"begin": 0}
    with pytest.raises(ValueError, match=message):
        fill(out, **(begin | keywords))


@pytest.mark.parametrize(
    ("out", "changed", "message"),
    [
        (np.empty((4, 4), U64), {}, r"out must have 1 dimension\(s\)"),
        (np.empty(8, U64)[::2], {}, "C-contiguous"),
        (read_only((4,), U64), {}, "writeable"),
        (unaligned((4,), U64), {}, "aligned"),
        (np.empty(4, np.int64), {}, "out must be uint64"),
        (np.empty(4, U64), {"begin": 7}, "at most 9, got begin = 7"),
        (np.empty(4, U64), {"begin": 10}, "at most 9, got begin = 10"),
        (np.empty(4, U64), {"threads": 0}, "threads"),
    ],
)
def test_the_core_checks_orders(out: Array, changed: dict[str, Any], message: str) -> None:
    """Fails if the core would write where it must not, or count beyond the last number."""
    keywords = {"seed": 0, "epoch": 0, "last": 9, "begin": 0, "threads": 1} | changed
    with pytest.raises(ValueError, match=message):
        _core.permutation(out, **keywords)


def test_the_core_takes_arrays_only() -> None:
    """Fails if something that is no array is converted, and the result lost with the copy."""
    with pytest.raises(TypeError):
        _core.fill_range([[0, 0]], seed=0, vocab=2, begin=0, threads=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _core.permutation(np.empty(1, U64), seed=-1, epoch=0, last=1, begin=0, threads=1)
