"""fastmem.data: known answers first, then the rule written a second time, then what it promises.

Each test says what would make it fail. N sequences, S tokens a sequence, V vocabulary.
"""

import doctest
import math
import pickle
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from fastmem import _core, data
from fastmem.data import UniformSequences, batch_indices, permutation

U64 = np.uint64
LAST = 2**64 - 1

Array = NDArray[Any]

# The ends; a power of two on each rule and either side of the border; GPT-2's; a quarter of words
# rejected; the largest.
VOCABS = [1, 2, 3, 128, 2048, 50257, 65535, 65536, 65537, 2**17, 3 * 2**29, 2**31 - 1, 2**31]
# Around a block of 4 and of 8 tokens, and a sequence of many blocks.
LENGTHS = [1, 3, 4, 7, 8, 9, 64, 65]


def known_answers() -> list[list[int]]:
    text = (Path(__file__).parent / "philox_known_answers.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [[int(word, 16) for word in line.split()] for line in lines]


def philox_reference(counter: list[Array], key: list[int]) -> list[Array]:
    """Philox4x32-10 on arrays of words that are kept in uint64."""
    x = [word.astype(U64) for word in counter]
    k = list(key)
    low, shift = U64(0xFFFFFFFF), U64(32)
    for _ in range(10):
        even, odd = x[0] * U64(0xD2511F53), x[2] * U64(0xCD9E8D57)
        x = [
            (odd >> shift) ^ x[1] ^ U64(k[0]),
            odd & low,
            (even >> shift) ^ x[3] ^ U64(k[1]),
            even & low,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


def tokens_reference(seed: int, indices: list[int], length: int, vocab: int) -> Array:
    """The token rule of docs/design.md, for every position at once."""
    index, t = np.meshgrid(np.array(indices, U64), np.arange(length, dtype=U64), indexing="ij")
    key = [seed % 2**32, seed // 2**32]
    halves = vocab in {2**k for k in range(17)}
    per_block = 8 if halves else 4

    def words(attempt: int) -> Array:  # (N, S): the word that each token comes from
        attempts = np.full_like(t, attempt)
        counter = [t // U64(per_block), attempts, index % U64(2**32), index // U64(2**32)]
        word = (t % U64(per_block)) // U64(per_block // 4)
        return np.choose(word.astype(np.int64), philox_reference(counter, key))

    if halves:
        word = words(0)
        return np.where(t % U64(2) == 0, word % U64(65536), word // U64(65536)) % U64(vocab)
    product = words(0) * U64(vocab)
    attempt = 0
    while (rejected := product % U64(2**32) < U64(2**32 % vocab)).any():
        attempt += 1
        product = np.where(rejected, words(attempt) * U64(vocab), product)
    return product // U64(2**32)


def order_reference(seed: int, epoch: int, count: int) -> list[int]:
    """permutation() as csrc/order.h states it, in Python's own integers."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    keys = []
    for i in range(6):
        counter = [i, 2**32 - 1, epoch % 2**32, epoch // 2**32]
        w = philox_reference([np.array(c) for c in counter], [seed % 2**32, seed // 2**32])
        keys += [int(w[0]) + 2**32 * int(w[1]), int(w[2]) + 2**32 * int(w[3])]
    bits = max(8, (count - 1).bit_length())
    low_size, high_size = 2 ** (bits // 2), 2 ** (bits - bits // 2)
    order = []
    for x in range(count):
        while True:
            high, low = divmod(x, low_size)
            for i in range(0, 12, 2):
                high ^= mix(low ^ keys[i]) % high_size
                low ^= mix(high ^ keys[i + 1]) % low_size
            x = high * low_size + low
            if x < count:
                break
        order.append(x)
    return order


def chi_square_sigmas(observed: Array, expected: float) -> float:
    """Standard deviations by which counts are further from `expected` than chance puts them."""
    freedom = observed.size - 1
    statistic = float(((observed - expected) ** 2).sum() / expected)
    return (statistic - freedom) / math.sqrt(2 * freedom)


# Known answers


@pytest.mark.parametrize("answer", known_answers(), ids=["zeros", "ones", "pi"])
def test_philox_known_answers(answer: list[int]) -> None:
    """Fails if what these tests judge by is not Random123's Philox4x32-10."""
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
    order = permutation(seed=2**63 + 5, epoch=2**40 - 1, count=11)
    assert order.tolist() == [2, 3, 9, 1, 7, 10, 6, 8, 5, 0, 4]
    assert data.GENERATOR == "philox4x32-10/1"


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
    """Fails if rejection is never reached by the vocabularies that are tested for it."""
    tokens = UniformSequences(50, 64, 3 * 2**29)[:]
    # Without redraws, floor(word · 3/8) would be 2 mod 3 for two words in eight, not one in three.
    counts = np.bincount(tokens.ravel() % 3)
    assert chi_square_sigmas(counts, tokens.size / 3) < 4
    words = [_core.philox4x32([b, 0, i, 0], [0, 0]) for i in range(50) for b in range(16)]
    rejected = (np.array(words, U64) * U64(3 * 2**29) % U64(2**32)) < U64(2**30)
    assert 0.2 < rejected.mean() < 0.3


# The same tokens, however they are asked for


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
    """Fails if an int, slice or array picks other rows than it does from an array of them all."""
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
    """Fails if a count of 2**64 wraps somewhere on its way."""
    sequences = UniformSequences(2**64, 4, 2048)
    right = tokens_reference(0, [LAST, 0, 2**63], 4, 2048)
    np.testing.assert_array_equal(sequences[-1], right[0])
    np.testing.assert_array_equal(sequences[np.array([LAST, 0, 2**63], U64)], right)
    down = tokens_reference(0, [LAST, 2**63 - 1], 4, 2048)
    np.testing.assert_array_equal(sequences[:: -(2**63)], down)
    assert sequences[2**64 :].shape == (0, 4)
    assert sequences.count == 2**64
    with pytest.raises(OverflowError):
        len(sequences)
    with pytest.raises(ValueError, match="more than one array can hold"):
        sequences[:]


def test_held_out_follows_and_shares_nothing() -> None:
    """Fails if held-out data is not the next range: gap, overlap, or another seed or shape."""
    train = UniformSequences(1000, 16, 2048, seed=4, start=50)
    held_out = train.held_out(500)
    assert held_out == UniformSequences(500, 16, 2048, seed=4, start=1050)
    both = UniformSequences(1500, 16, 2048, seed=4, start=50)
    np.testing.assert_array_equal(both[:], np.concatenate([train[:], held_out[:]]))
    # 16 tokens are 176 bits: two alike by chance would be a wonder.
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


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_small_orders_are_all_as_frequent(count: int) -> None:
    """Fails if some order of few sequences is preferred: too few rounds, or too few bits."""
    epochs = 12_000
    index = {order: i for i, order in enumerate(permutations(range(count)))}
    seen = np.zeros(len(index))
    for epoch in range(epochs):
        seen[index[tuple(permutation(8, epoch, count, threads=1).tolist())]] += 1
    assert abs(chi_square_sigmas(seen, epochs / len(index))) < 4


@pytest.mark.parametrize("count", [7, 16, 100, 257])
def test_first_and_last_place_are_uniform(count: int) -> None:
    """Fails if an epoch or a seed is likelier to begin or end with some sequences than others."""
    draws = 50 * count
    first = [int(permutation(8, i, count, 0, 1)[0]) for i in range(draws)]
    last = [int(permutation(i, 8, count, count - 1)[0]) for i in range(draws)]
    for numbers in (first, last):
        assert abs(chi_square_sigmas(np.bincount(numbers, minlength=count), 50)) < 4


# Orders


def test_orders_are_the_stated_ones() -> None:
    """Fails if permutation() and its description in csrc/order.h part."""
    for seed, epoch, count in [(0, 0, 1), (LAST, LAST, 5), (1, 2**32, 256), (2**32, 1, 1000)]:
        assert permutation(seed, epoch, count).tolist() == order_reference(seed, epoch, count)


@pytest.mark.parametrize("counts", [range(1, 301), [511, 512, 513, 1000, 65537, 100_000]])
def test_an_order_has_each_number_once(counts: list[int]) -> None:
    """Fails if two places have the same number, at any count; or if a part differs from the whole,
    or threads from one another."""
    for count in counts:
        whole = permutation(5, count, count, threads=1)
        np.testing.assert_array_equal(np.sort(whole), np.arange(count))
        third = count // 3
        for begin, end in pairwise([0, third, third, count]):
            part = permutation(5, count, count, begin, end, threads=7)
            np.testing.assert_array_equal(part, whole[begin:end])


@pytest.mark.parametrize("count", [10**12, 2**64 - 1, 2**64])
def test_long_orders(count: int) -> None:
    """Fails if places of an order too long to hold share a number, pass its end or cluster."""
    n = 50_000
    places = [permutation(6, 1, count, begin, begin + n) for begin in (0, count // 2, count - n)]
    numbers = np.concatenate(places)
    assert len(np.unique(numbers)) == 3 * n
    assert int(numbers.max()) < count
    for bins in (64, 1000):
        high = np.bincount((numbers / count * (bins - 1e-9)).astype(np.int64))
        assert abs(chi_square_sigmas(high, 3 * n / bins)) < 4
        low = np.bincount((numbers % U64(bins)).astype(np.int64))
        assert abs(chi_square_sigmas(low, 3 * n / bins)) < 4
    assert permutation(6, 1, count, count).size == 0


def test_orders_differ() -> None:
    """Fails if seed or epoch, in any of their bits, does not reach the order."""
    orders = [permutation(0, 0, 1000)]
    orders += [permutation(2**bit, 0, 1000) for bit in range(64)]
    orders += [permutation(0, 2**bit, 1000) for bit in range(64)]
    assert len(np.unique(orders, axis=0)) == 129
    # Two random orders have one number at the same place on average.
    same = [np.count_nonzero(a == b) for i, a in enumerate(orders) for b in orders[:i]]
    assert 0.95 < np.mean(same) < 1.05


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (4, 4), (4, 6), (5, 17), (128, 300)])
def test_batches_are_the_epochs_in_a_row(batch: int, count: int) -> None:
    """Fails if a batch over the end of an epoch repeats, skips or reorders a sequence."""
    steps = 3 * count
    got = np.concatenate([batch_indices(2, step, batch, count) for step in range(steps)])
    right = np.concatenate([permutation(2, epoch, count) for epoch in range(3 * batch)])
    np.testing.assert_array_equal(got, right)
    assert batch_indices(2, LAST, batch, count).shape == (batch,)


# Bad input


SET: Any = UniformSequences(count=10, length=4, vocab=50257)


@pytest.mark.parametrize("value", [True, np.True_, 1.0, np.float64(1), "1", None, [1], np.ones(1)])
@pytest.mark.parametrize("name", ["count", "length", "vocab", "seed", "start"])
def test_a_set_is_made_of_ints(name: str, value: Any) -> None:
    """Fails if what is no int passes for one; the message names it, its limits and the fix."""
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
        (lambda: permutation(-1, 0, 5), ValueError, "seed must be from 0"),
        (lambda: permutation(0, 2**64, 5), ValueError, "epoch must be from 0"),
        (lambda: permutation(0, 0, 0), ValueError, "count must be from 1"),
        (lambda: permutation(0, 0, 2**64 + 1), ValueError, "count must be from 1"),
        (lambda: permutation(0, 0, 5, 6), ValueError, "begin must be from 0 to 5, got 6"),
        (lambda: permutation(0, 0, 5, 3, 2), ValueError, "end must be from 3 to 5, got 2"),
        (lambda: permutation(0, 0, 5, 0, 6), ValueError, "end must be from 0 to 5, got 6"),
        (lambda: permutation(0, 0, cast(int, 5.0)), ValueError, "count must be an integer"),
        (lambda: permutation(0, 0, 2**64), ValueError, "more than one array can hold"),
        (lambda: batch_indices(0, 0, 6, 5), ValueError, "batch must be from 1 to 5, got 6"),
        (lambda: batch_indices(0, -1, 5, 5), ValueError, "step must be from 0"),
    ],
)
def test_bad_calls_name_what_is_wrong(call: Any, error: type[Exception], message: str) -> None:
    """Fails if a mistake passes, or its message lacks the value or the limit."""
    with pytest.raises(error, match=message):
        call()


# The rest of the promise


def test_a_set_is_a_value() -> None:
    """Fails if a set cannot be compared, hashed, pickled (for data loaders) or kept from change."""
    copy = pickle.loads(pickle.dumps(SET))
    assert copy == SET
    assert hash(copy) == hash(SET)
    assert copy != UniformSequences(10, 4, 50257, seed=1)
    with pytest.raises(AttributeError):
        SET.seed = 1


def test_examples_in_the_documentation() -> None:
    """Fails if a docstring shows something else than what happens."""
    result = doctest.testmod(data)  # type: ignore[no-untyped-call, unused-ignore]
    assert result.attempted >= 8
    assert result.failed == 0
