"""fastmem._core for sequences and orders: known answers of Philox, every loop against the rule
written a second time, no writes outside the result, no GIL while it works, and invalid arrays
refused. test_uniform.py and test_order.py test more of tokens and orders.

Results start with a marker that shows skipped entries. N sequences, S tokens, V vocabulary.
"""

import math
import sys
import threading
from typing import Any

import numpy as np
import pytest
from cases.sequence_rule import (
    LAST,
    U64,
    Array,
    chi_square_sigmas,
    known_answers,
    tokens_reference,
)

from fastmem import _core
from fastmem.data.uniform import UniformSequences


def marked(shape: tuple[int, ...], dtype: Any) -> Array:
    out = np.empty(shape, dtype)
    out.view(np.uint8)[...] = 0xCA
    return out


def test_philox_known_answers() -> None:
    """Fails if the generator is not Random123's Philox4x32-10."""
    answers = known_answers()
    assert len(answers) == 3
    for words in answers:
        assert _core.philox4x32(words[:4], words[4:6]) == words[6:]


def sums(weights: Array) -> Array:
    """(V,) uint32: the cumulative weights before each token, in units of total / 2**32."""
    before = np.cumsum(np.concatenate([[0.0], weights]))
    return np.floor(before[:-1] / before[-1] * 2**32).astype(np.uint32)


ISAS = [isa for isa in ("portable", "avx2", "avx512") if _core.has_isa(isa)]
VOCABS = [1, 2, 128, 2048, 65536, 3, 50257, 65537, 3 * 2**29, 2**31]
# Equal; Zipf's, with many rare tokens; with zeros; almost everything on one token.
WEIGHTS = {
    "even": np.ones(7),
    "zipf": 1 / np.arange(1, 50258),
    "zeros": np.array([0, 0, 3, 0, 1.0]),
    "steep": np.concatenate([[1e9], np.ones(5000)]),
    "one": np.ones(1),
    "million": np.ones(2**20),
}


def check_fills(length: int, vocab: int, dtype: Any, isa: str, cumulative: Array | None) -> None:
    for seed, begin in ((LAST, LAST - 36), (7, 2**32 - 20)):
        options: dict[str, Any] = {
            "seed": seed, "vocab": vocab, "threads": 1, "isa": isa, "cumulative": cumulative
        }  # fmt: skip
        indices = np.arange(37, dtype=U64) + U64(begin)
        right = tokens_reference(seed, indices, length, vocab, cumulative)
        out = marked((37, length), dtype)
        _core.fill_range(out, begin=begin, **options)
        np.testing.assert_array_equal(out, right)
        shuffle = np.random.default_rng(0).permutation(37)
        out = marked((37, length), dtype)
        _core.fill_indices(out, indices[shuffle], **options)
        np.testing.assert_array_equal(out, right[shuffle])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64])
@pytest.mark.parametrize("vocab", VOCABS)
def test_every_loop_follows_the_rule(isa: str, dtype: Any, vocab: int) -> None:
    """Fails if a vector of blocks gives another token than the rule written a second time."""
    if dtype is np.uint16 and vocab > 65536:
        with pytest.raises(ValueError, match="at most 65536"):
            check_fills(4, vocab, dtype, isa, None)
        return
    # Less than a block; blocks in one vector; whole vectors, few and many; one token left.
    for length in (3, 16, 64, 256, 521):
        check_fills(length, vocab, dtype, isa, None)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_loop_follows_weights(isa: str, dtype: Any, name: str) -> None:
    """Fails if a word gives another token than the number of sums up to the word."""
    cumulative = sums(WEIGHTS[name])
    vocab = len(cumulative)
    if dtype is not np.uint16 or vocab <= 65536:
        for length in (3, 64, 521):
            check_fills(length, vocab, dtype, isa, cumulative)


def test_weights_at_the_ends_of_the_words() -> None:
    """Fails if a sum equal to the word is on the wrong side, or a token of weight 0 is drawn."""
    words = tokens_reference(0, np.arange(100, dtype=U64), 64, 65536).reshape(100, -1, 2)
    word = words[..., 0].astype(U64) | words[..., 1].astype(U64) << U64(16)
    first = int(word[3, 5])  # token 5 of sequence 3, by weights
    for entry, token in ((first, 1), (first + 1, 0)):
        out = np.empty((1, 6), np.uint16)
        cumulative = np.array([0, entry], np.uint32)
        _core.fill_range(out, seed=0, vocab=2, begin=3, threads=1, cumulative=cumulative)
        assert out[0, 5] == token
    out = np.empty((1000, 64), np.uint16)
    cumulative = sums(WEIGHTS["zeros"])
    _core.fill_range(out, seed=0, vocab=5, begin=0, threads=1, cumulative=cumulative)
    assert set(np.unique(out)) == {2, 4}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("vocab", "name"), [(2048, None), (50257, None), (50257, "zipf")], ids=str)
def test_threads_and_chunks_change_nothing(isa: str, vocab: int, name: str | None) -> None:
    """Fails if a part of the work does not begin where the part before it ends."""
    cumulative = None if name is None else sums(WEIGHTS[name])
    options: dict[str, Any] = {"seed": 3, "vocab": vocab, "isa": isa, "cumulative": cumulative}
    # Many sequences, with and without a tail, and three that threads must share.
    for n, length in ((10_007, 64), (20_003, 65), (3, 433_337)):
        whole = marked((n, length), np.uint16)
        _core.fill_range(whole, begin=5, threads=1, **options)
        for threads in (2, 5):
            out = marked((n, length), np.uint16)
            _core.fill_range(out, begin=5, threads=threads, **options)
            np.testing.assert_array_equal(out, whole)
        indices = np.arange(5, 5 + n, dtype=U64)
        out = marked((n, length), np.uint16)
        _core.fill_indices(out, indices, threads=3, **options)
        np.testing.assert_array_equal(out, whole)
        out = marked((n, length), np.uint16)
        for begin in range(0, n, n // 3 + 1):
            _core.fill_range(out[begin : begin + n // 3 + 1], begin=5 + begin, threads=1, **options)
        np.testing.assert_array_equal(out, whole)


@pytest.mark.parametrize("name", [None, "steps"], ids=["uniform", "weights"])
@pytest.mark.parametrize("vocab", [128, 100])
def test_tokens_and_pairs_have_their_probabilities(vocab: int, name: str | None) -> None:
    """Fails if a token or a pair of tokens is too frequent, along or across sequences."""
    weights = np.ones(vocab) if name is None else 1.0 + np.arange(vocab) % 5
    cumulative = None if name is None else sums(weights)
    out = np.empty((1 << 15, 64), np.int64)
    _core.fill_range(out, seed=11, vocab=vocab, begin=0, threads=2, cumulative=cumulative)
    p = weights / weights.sum()
    assert abs(chi_square_sigmas(np.bincount(out.ravel(), minlength=vocab), out.size * p)) < 4
    pairs = np.outer(p, p).ravel()
    neighbours = (out[:, ::2] * vocab + out[:, 1::2], out[:, 1:-1:2] * vocab + out[:, 2::2],
                  out[::2] * vocab + out[1::2])  # fmt: skip
    for pair in neighbours:
        counts = np.bincount(pair.ravel(), minlength=vocab**2)
        assert abs(chi_square_sigmas(counts, pair.size * pairs)) < 4


def order_of(last: int, begin: int, n: int) -> Array:
    out = np.empty(n, U64)
    _core.permutation(out, seed=9, epoch=4, last=last, begin=begin, threads=2)
    return out


def order_at(places: Array, last: int, inverse: bool = False) -> Array:
    out = np.empty(places.size, U64)
    _core.permutation_at(out, places, seed=9, epoch=4, last=last, threads=2, inverse=inverse)
    return out


@pytest.mark.parametrize("count", [*range(1, 301), 10**5, 10**6])
def test_an_order_has_each_number_once_and_knows_its_place(count: int) -> None:
    """Fails if an order is not a bijection, or its inverse is wrong."""
    order = order_of(count - 1, 0, count)
    places = np.arange(count, dtype=U64)
    np.testing.assert_array_equal(np.sort(order), places)
    np.testing.assert_array_equal(order_at(order, count - 1, inverse=True), places)
    np.testing.assert_array_equal(order_at(places[::-1].copy(), count - 1), order[::-1])


@pytest.mark.parametrize("count", [10**12, 2**64])
def test_a_long_order_repeats_none_and_knows_its_places(count: int) -> None:
    """Fails if two of a million places have the same element, or the inverse is wrong."""
    order = order_of(count - 1, count - 10**6, 10**6)
    in_order = np.sort(order)
    assert (in_order[1:] > in_order[:-1]).all()
    assert int(in_order[-1]) < count
    places = np.arange(10**6, dtype=U64) + U64(count - 10**6)
    np.testing.assert_array_equal(order_at(order, count - 1, inverse=True), places)
    np.testing.assert_array_equal(order_at(places, count - 1), order)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("last", [2, 999, 2**20, 10**12 - 1, LAST])
def test_every_loop_gives_the_same_order(isa: str, last: int) -> None:
    """Fails if a vector of places gives another order than the portable loop."""
    n = min(last + 1, 1003)
    options: dict[str, Any] = {"seed": 9, "epoch": 4, "last": last, "threads": 1}
    portable, order, places = (marked((n,), U64) for _ in range(3))
    _core.permutation(portable, begin=last + 1 - n, isa="portable", **options)
    _core.permutation(order, begin=last + 1 - n, isa=isa, **options)
    np.testing.assert_array_equal(order, portable)
    _core.permutation_at(places, order, inverse=True, isa=isa, **options)
    np.testing.assert_array_equal(places, np.arange(n, dtype=U64) + U64(last + 1 - n))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64])
@pytest.mark.parametrize(("length", "vocab"), [(65, 128), (13, 50257)])
def test_nothing_is_skipped_nor_written_beyond(dtype: Any, length: int, vocab: int) -> None:
    """Fails if the core skips an entry, or changes the rows before or after its result."""
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
    """Fails if an order skips an entry, or changes the entry before or after its result."""
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
    """Fails if the core keeps the GIL.

    With a switch interval of an hour no thread must yield. So the other thread runs up to its lock,
    and then only if the core releases the GIL; it may need several calls to wake up in time.
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
SUMS = SHARED[:8].view(np.uint32)
DOWN = np.array([0, 1, 9, 8, *[9] * 12], np.uint32)


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
        (np.empty((4, 4), np.int64), {"isa": "sse"}, "isa must be best, .* got sse"),
        (np.empty((4, 4), np.int64), {"cumulative": np.zeros(16, np.int64)}, "uint32.* got int64"),
        (
            np.empty((4, 4), np.int64),
            {"cumulative": np.zeros(17, np.uint32)},
            "got 17 for vocab 16",
        ),
        (np.empty((4, 4), np.int64), {"cumulative": np.ones(16, np.uint32)}, "must be 0, got 1"),
        (np.empty((4, 4), np.int64), {"cumulative": DOWN}, "decrease, got 9 before 8 at 3"),
        (np.empty((4, 4), np.int64), {"cumulative": np.zeros((4, 4), np.uint32)}, "dimension"),
        (np.empty((4, 4), np.int64), {"cumulative": DOWN[::2], "vocab": 8}, "C-contiguous"),
        (SHARED[:8].view(np.uint32).reshape(4, 4), {"cumulative": SUMS}, "share memory"),
        (
            np.empty((4, 4), np.int64),
            {"cumulative": np.zeros(2**20 + 1, np.uint32), "vocab": 2**20 + 1},
            "vocab must be from 1 to 1048576, got 1048577",
        ),
    ],
)
def test_the_core_checks_arrays(out: Array, changed: dict[str, Any], message: str) -> None:
    """Fails if the core would write outside the result, or invalid tokens."""
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
    """Fails if the core would write outside the result, or count beyond the last number."""
    keywords = {"seed": 0, "epoch": 0, "last": 9, "begin": 0, "threads": 1} | changed
    with pytest.raises(ValueError, match=message):
        _core.permutation(out, **keywords)


@pytest.mark.parametrize(
    ("out", "places", "message"),
    [
        (np.empty((4, 4), U64), np.zeros(4, U64), "out must have 1 dimension"),
        (np.empty(4, np.int64), np.zeros(4, U64), "out must be uint64"),
        (read_only((4,), U64), np.zeros(4, U64), "writeable"),
        (np.empty(4, U64), np.zeros(4, np.int64), "places must be uint64"),
        (np.empty(4, U64), np.zeros(8, U64)[::2], "C-contiguous"),
        (np.empty(4, U64), np.zeros(5, U64), "got 4 for 5 places"),
        (np.empty(4, U64), np.array([0, 9, 10, 3], U64), "at most last = 9, got 10 at 2"),
        (SHARED[:4], SHARED[3:7], "out and places must not share memory"),
    ],
)
def test_the_core_checks_places(out: Array, places: Array, message: str) -> None:
    """Fails if the core would read or write outside its arrays, or take an invalid place."""
    with pytest.raises(ValueError, match=message):
        _core.permutation_at(out, places, seed=0, epoch=0, last=9, threads=1)


def test_the_core_takes_arrays_only() -> None:
    """Fails if another object is converted to an array, and the result lost with the copy."""
    with pytest.raises(TypeError):
        _core.fill_range([[0, 0]], seed=0, vocab=2, begin=0, threads=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _core.permutation(np.empty(1, U64), seed=-1, epoch=0, last=1, begin=0, threads=1)
