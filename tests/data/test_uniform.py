"""Uniform sets: known answers, the rule written a second time, and the properties of a set.

N sequences, S tokens a sequence, V vocabulary.
"""

import math
import pickle
from typing import Any

import numpy as np
import pytest
from cases.sequence_rule import (
    LAST,
    U64,
    chi_square_sigmas,
    known_answers,
    philox_reference,
    tokens_reference,
)

from fastmem import _core
from fastmem.data.sequences import GENERATOR
from fastmem.data.uniform import UniformSequences

# The limits; powers of two on both rules and around their border; GPT-2's; a quarter of the words
# rejected; the largest.
VOCABS = [1, 2, 3, 128, 2048, 50257, 65535, 65536, 65537, 2**17, 3 * 2**29, 2**31 - 1, 2**31]
# Around a block of 4 and of 8 tokens, and a sequence of many blocks.
LENGTHS = [1, 3, 4, 7, 8, 9, 64, 65]


# Known answers


@pytest.mark.parametrize("answer", known_answers(), ids=["zeros", "ones", "pi"])
def test_philox_known_answers(answer: list[int]) -> None:
    """Fails if the reference of these tests is not Random123's Philox4x32-10."""
    assert philox_reference([np.array(w) for w in answer[:4]], answer[4:6]) == answer[6:]


def test_golden_tokens() -> None:
    """Fails if the rule drifts, even where the core and the reference here drift together."""
    halves = UniformSequences(count=2, length=9, vocab=2048, seed=2**63 + 5, start=2**40 - 1)
    assert halves[:].tolist() == [
        [862, 951, 705, 1869, 580, 436, 1030, 1857, 117],
        [986, 217, 1441, 81, 35, 1803, 1576, 252, 1996],
    ]
    products = UniformSequences(count=2, length=5, vocab=50257, seed=2**63 + 5, start=2**40 - 1)
    assert products[:].tolist() == [
        [49416, 4574, 9757, 50110, 12999],
        [15871, 17338, 17088, 193, 19039],
    ]
    redrawn = UniformSequences(count=2, length=5, vocab=3 * 2**29, seed=2**63 + 5, start=2**40 - 1)
    assert redrawn[:].tolist() == [
        [1583670083, 146602248, 312709849, 1605929090, 416606251],
        [508649841, 555661596, 967481496, 1171560638, 610161388],
    ]
    assert GENERATOR == "philox4x32-10/1"


# Tokens against the reference


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("length", LENGTHS)
def test_tokens_are_the_rule(vocab: int, length: int) -> None:
    """Fails on any wrong token at any S and V, at the edges of seed and index, in any dtype."""
    # 17 sequences: more than a batch of 16 blocks, and not a multiple.
    for seed, start in [(0, 0), (LAST, 2**64 - 17), (2**32, 2**32 - 8), (12345, 2**63)]:
        sequences = UniformSequences(17, length, vocab, seed, start)
        right = tokens_reference(seed, [start + i for i in range(17)], length, vocab)
        for dtype in (np.uint16, np.uint32, np.int32, np.int64):
            if dtype is np.uint16 and vocab > 65536:
                continue
            got = sequences.tokens(slice(None), dtype)
            assert got.dtype == dtype
            np.testing.assert_array_equal(got.astype(U64), right)
        assert sequences[0].dtype == (np.uint16 if vocab <= 65536 else np.uint32)


def test_a_rejected_word_is_redrawn() -> None:
    """Fails if the vocabulary that tests rejection rejects nothing."""
    tokens = UniformSequences(50, 64, 3 * 2**29)[:]
    # Without redraws, floor(word · 3/8) would be 2 mod 3 for two words in eight, not one in three.
    counts = np.bincount(tokens.ravel() % 3)
    assert chi_square_sigmas(counts, tokens.size / 3) < 4
    words = [_core.philox4x32([b, 0, i, 0], [0, 0]) for i in range(50) for b in range(16)]
    rejected = (np.array(words, U64) * U64(3 * 2**29) % U64(2**32)) < U64(2**30)
    assert 0.2 < rejected.mean() < 0.3


# The same tokens from every call


@pytest.mark.parametrize("vocab", [2048, 50257])
@pytest.mark.parametrize("length", [8, 65])
def test_threads_and_chunks_change_nothing(vocab: int, length: int) -> None:
    """Fails if a part of the work is misplaced, done twice or lost. Large enough for 7 threads."""
    count = 2**20 // length + 3
    sequences = UniformSequences(count, length, vocab, seed=9, start=77)
    whole = sequences.tokens(slice(None), threads=1)
    rows = np.arange(count)[::-1].copy()
    for threads in (2, 7, LAST):
        np.testing.assert_array_equal(sequences.tokens(slice(None), threads=threads), whole)
        np.testing.assert_array_equal(sequences.tokens(rows, threads=threads), whole[::-1])
    chunks = [sequences[a : a + 1001] for a in range(0, count, 1001)]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


@pytest.mark.parametrize("start", [0, 2**64 - 20])
def test_indexing_is_that_of_a_list(start: int) -> None:
    """Fails if an int, slice or array picks other rows than from an array of all rows."""
    sequences = UniformSequences(20, 9, 50257, seed=3, start=start)
    whole = tokens_reference(3, [start + i for i in range(20)], 9, 50257)
    edges = [None, 0, 1, 7, 19, 20, 25, -1, -20, -30]
    for a in edges:
        for b in edges:
            for step in (None, 1, 2, 19, 30, -1, -3, -25):
                np.testing.assert_array_equal(sequences[a:b:step], whole[a:b:step])
    for i in range(-20, 20):
        assert sequences[i].shape == (9,)
        np.testing.assert_array_equal(sequences[i], whole[i])
        np.testing.assert_array_equal(sequences[np.int8(i)], whole[i])
    for dtype in (np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64, ">i4"):
        rows = np.array([19, 0, 7, 7], dtype)
        np.testing.assert_array_equal(sequences[rows], whole[[19, 0, 7, 7]])
        np.testing.assert_array_equal(sequences[rows[::-2]], whole[[7, 0]])
    np.testing.assert_array_equal(sequences[[4, 2]], whole[[4, 2]])
    assert sequences[[]].shape == sequences[20:].shape == sequences[np.empty(0, U64)].shape
    assert len(list(sequences)) == len(sequences) == 20


def test_indexing_a_set_as_large_as_can_be() -> None:
    """Fails if a count of 2**64 wraps anywhere."""
    sequences = UniformSequences(2**64, 4, 2048)
    right = tokens_reference(0, [LAST, 0, 2**63], 4, 2048)
    np.testing.assert_array_equal(sequences[-1], right[0])
    np.testing.assert_array_equal(sequences[np.array([LAST, 0, 2**63], U64)], right)
    np.testing.assert_array_equal(sequences[[LAST, 0, 2**63]], right)
    down = tokens_reference(0, [LAST, 2**63 - 1], 4, 2048)
    np.testing.assert_array_equal(sequences[:: -(2**63)], down)
    assert sequences[2**64 :].shape == (0, 4)
    assert sequences.count == 2**64
    with pytest.raises(OverflowError):
        len(sequences)
    with pytest.raises(ValueError, match="more than one array can hold"):
        sequences[:]


def test_held_out_follows_and_shares_nothing() -> None:
    """Fails if held-out data is not the next range, with the same seed and shape."""
    train = UniformSequences(1000, 16, 2048, seed=4, start=50)
    held_out = train.held_out(500)
    assert held_out == UniformSequences(500, 16, 2048, seed=4, start=1050)
    both = UniformSequences(1500, 16, 2048, seed=4, start=50)
    np.testing.assert_array_equal(both[:], np.concatenate([train[:], held_out[:]]))
    # 16 tokens are 176 bits: sequences do not repeat by chance.
    assert len(np.unique(both[:], axis=0)) == 1500


def test_entropy_is_that_of_the_definition() -> None:
    """Fails on a wrong unit, or S tokens for S - 1."""
    sequences = UniformSequences(count=10, length=64, vocab=2048)
    assert sequences.sequence_entropy_bits == 64 * 11
    assert sequences.entropy_bits == 10 * 64 * 11
    assert sequences.coded_entropy_bits == 10 * 63 * 11
    assert UniformSequences(10, 1, 2048).coded_entropy_bits == 0
    assert UniformSequences(10, 64, 1).entropy_bits == 0
    assert UniformSequences(10, 64, 50257).sequence_entropy_bits == 64 * math.log2(50257)


# Statistics, at fixed seeds: deterministic, so a limit of 4 sigmas never fails by chance


@pytest.mark.parametrize(("vocab", "fold"), [(2, 2), (3, 3), (128, 128), (2048, 64), (1000, 100)])
def test_tokens_look_uniform_and_independent(vocab: int, fold: int) -> None:
    """Fails on bias, and on dependence of neighbours in a word, block, sequence, index or seed."""
    a = UniformSequences(2**14, 64, vocab, seed=1).tokens(slice(None), np.int64)
    b = UniformSequences(2**14, 64, vocab, seed=2).tokens(slice(None), np.int64)
    counts = np.bincount(a.ravel(), minlength=vocab)
    assert abs(chi_square_sigmas(counts, a.size / vocab)) < 4
    for left, right in [
        (a[:, 0::2], a[:, 1::2]),
        (a[:, 1:-1:2], a[:, 2::2]),
        (a[:, :32], a[:, 32:]),
        (a[0::2], a[1::2]),
        (a, b),
    ]:
        pairs = np.bincount((left % fold * fold + right % fold).ravel(), minlength=fold**2)
        assert abs(chi_square_sigmas(pairs, left.size / fold**2)) < 4


# Bad input


SET: Any = UniformSequences(count=10, length=4, vocab=50257)


@pytest.mark.parametrize("value", [True, np.True_, 1.0, np.float64(1), "1", None, [1], np.ones(1)])
@pytest.mark.parametrize("name", ["count", "length", "vocab", "seed", "start"])
def test_a_set_is_made_of_ints(name: str, value: Any) -> None:
    """Fails if another type passes, or the message lacks the name, the limits or the fix."""
    values = {"count": 10, "length": 4, "vocab": 16, "seed": 0, "start": 0}
    message = rf"{name} must be an integer from [01] to \d+, got .*; pass an int$"
    with pytest.raises(ValueError, match=message):
        UniformSequences(**(values | {name: value}))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("count", 1, 2**64),
        ("length", 1, 2**34),
        ("vocab", 1, 2**31),
        ("seed", 0, LAST),
        ("start", 0, LAST),
    ],
)
def test_a_set_has_limits(name: str, low: int, high: int) -> None:
    """Fails if a limit is off by one, or a NumPy int is refused or wraps."""
    values: dict[str, Any] = {"count": 1, "length": 4, "vocab": 16, "seed": 0, "start": 0}
    for good in (low, high):
        assert getattr(UniformSequences(**(values | {name: good})), name) == good
    assert type(UniformSequences(**(values | {name: np.int8(1)})).__dict__[name]) is int
    for bad in (low - 1, high + 1, -(2**70)):
        with pytest.raises(ValueError, match=rf"{name} must be from {low} to {high}, got {bad};"):
            UniformSequences(**(values | {name: bad}))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: UniformSequences(2, 4, 16, 0, LAST),
            ValueError,
            r"18446744073709551615 \+ 2; .* 1 ",
        ),
        (lambda: SET.held_out(0), ValueError, "count must be from 1 to .* got 0"),
        (lambda: SET.held_out(2**64 - 9), ValueError, "to 18446744073709551606, got 18.*607"),
        (
            lambda: UniformSequences(1, 4, 16, 0, LAST).held_out(1),
            ValueError,
            "no sequences are left",
        ),
        (lambda: SET[10], IndexError, "index 10 is outside this set of 10 sequences; use -10 to 9"),
        (lambda: SET[-11], IndexError, "index -11 is outside"),
        (lambda: SET[range(3, 11)], IndexError, "indices 3 to 10 are outside .* use 0 to 9"),
        (lambda: SET[range(2, -2, -1)], IndexError, "indices 2 to -1 are outside"),
        (lambda: SET[0.5:2], ValueError, "slice indices must be integers"),
        (lambda: SET[2**64], IndexError, "index 18446744073709551616 is outside"),
        (lambda: SET[[3, 10]], IndexError, "indices 3 to 10 are outside .* use 0 to 9"),
        (lambda: SET[np.array([-1, 3])], IndexError, "indices -1 to 3 are outside"),
        (lambda: SET[np.array([LAST], U64)], IndexError, "18446744073709551615"),
        (lambda: SET[True], ValueError, "1-D list or array of ints"),
        (lambda: SET[1.0], ValueError, "of float64; use"),
        (lambda: SET[np.array([1.0])], ValueError, "of float64; use"),
        (lambda: SET[np.ones(10, bool)], ValueError, "flatnonzero"),
        (lambda: SET[np.zeros((2, 2), int)], ValueError, r"shape \(2, 2\)"),
        (lambda: SET[[2**70]], ValueError, "of object"),
        (lambda: SET["1"], ValueError, "of <U1"),
        (lambda: SET[None], ValueError, "of object"),
        (lambda: SET.tokens(0, np.int16), ValueError, "dtype must be uint16, .* got .*int16"),
        (lambda: SET.tokens(0, ">u4"), ValueError, "got '>u4'"),
        (lambda: UniformSequences(1, 4, 65537).tokens(0, "u2"), ValueError, "65536, got 65537"),
        (lambda: SET.tokens(0, threads=0), ValueError, "threads must be from 1"),
        (lambda: SET.tokens(0, threads=1.5), ValueError, "threads must be an integer"),
    ],
)
def test_bad_calls_name_what_is_wrong(call: Any, error: type[Exception], message: str) -> None:
    """Fails if a mistake passes, or its message lacks the value or the limit."""
    with pytest.raises(error, match=message):
        call()


# Sets as values


def test_a_set_is_a_value() -> None:
    """Fails if a set cannot be compared, hashed and pickled (by data loaders), or can change."""
    copy = pickle.loads(pickle.dumps(SET))
    assert copy == SET
    assert hash(copy) == hash(SET)
    assert copy != UniformSequences(10, 4, 50257, seed=1)
    with pytest.raises(AttributeError):
        SET.seed = 1


def test_a_range_is_not_iterated() -> None:
    """Fails if a range gives other sequences than its list, or a huge range is iterated."""
    whole = SET[:]
    for places in (range(10), range(2, 9, 3), range(9, -1, -2), range(4, 4), range(-5, -9)):
        np.testing.assert_array_equal(SET[places], whole[list(places)])
    with pytest.raises(IndexError, match="outside this set of 10"):
        SET[range(2**63 - 1)]
