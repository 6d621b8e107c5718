"""fastmem.data.order: a known answer, the rule written a second time, and statistics."""

from itertools import pairwise, permutations
from typing import Any, cast

import numpy as np
import pytest
from cases.sequence_rule import LAST, U64, chi_square_sigmas, order_reference

from fastmem.data.order import batch_indices, permutation


def test_golden_order() -> None:
    """Fails if the rule drifts, even where the core and the reference here drift together."""
    order = permutation(seed=2**63 + 5, epoch=2**40 - 1, count=11)
    assert order.tolist() == [2, 3, 9, 1, 7, 10, 6, 8, 5, 0, 4]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_small_orders_are_equally_frequent(count: int) -> None:
    """Fails if an order of few sequences is too frequent: too few rounds, or too few bits."""
    epochs = 12_000
    index = {order: i for i, order in enumerate(permutations(range(count)))}
    seen = np.zeros(len(index))
    for epoch in range(epochs):
        seen[index[tuple(permutation(8, epoch, count, threads=1).tolist())]] += 1
    assert abs(chi_square_sigmas(seen, epochs / len(index))) < 4


@pytest.mark.parametrize("count", [7, 16, 100, 257])
def test_first_and_last_place_are_uniform(count: int) -> None:
    """Fails if some sequences begin or end an epoch, or the epochs of a seed, too often."""
    draws = 50 * count
    first = [int(permutation(8, i, count, 0, 1)[0]) for i in range(draws)]
    last = [int(permutation(i, 8, count, count - 1)[0]) for i in range(draws)]
    for numbers in (first, last):
        assert abs(chi_square_sigmas(np.bincount(numbers, minlength=count), 50)) < 4


def test_orders_are_the_stated_ones() -> None:
    """Fails if permutation() differs from its description in csrc/sequences/order.h."""
    for seed, epoch, count in [(0, 0, 1), (LAST, LAST, 5), (1, 2**32, 256), (2**32, 1, 1000)]:
        assert permutation(seed, epoch, count).tolist() == order_reference(seed, epoch, count)


@pytest.mark.parametrize("counts", [range(1, 301), [511, 512, 513, 1000, 65537, 100_000]])
def test_an_order_has_each_number_once(counts: list[int]) -> None:
    """Fails if two places have the same number at any count, or a part or a number of threads
    changes the order."""
    for count in counts:
        whole = permutation(5, count, count, threads=1)
        np.testing.assert_array_equal(np.sort(whole), np.arange(count))
        third = count // 3
        for begin, end in pairwise([0, third, third, count]):
            part = permutation(5, count, count, begin, end, threads=7)
            np.testing.assert_array_equal(part, whole[begin:end])


@pytest.mark.parametrize("count", [10**12, 2**64 - 1, 2**64])
def test_long_orders(count: int) -> None:
    """Fails if an order larger than memory repeats a number, passes its end or clusters."""
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
    """Fails if a bit of the seed or epoch does not change the order."""
    orders = [permutation(0, 0, 1000)]
    orders += [permutation(2**bit, 0, 1000) for bit in range(64)]
    orders += [permutation(0, 2**bit, 1000) for bit in range(64)]
    assert len(np.unique(orders, axis=0)) == 129
    # Two random orders agree at one place on average.
    same = [np.count_nonzero(a == b) for i, a in enumerate(orders) for b in orders[:i]]
    assert 0.95 < np.mean(same) < 1.05


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (4, 4), (4, 6), (5, 17), (128, 300)])
def test_batches_are_consecutive_epochs(batch: int, count: int) -> None:
    """Fails if a batch over the end of an epoch repeats, skips or reorders a sequence."""
    steps = 3 * count
    got = np.concatenate([batch_indices(2, step, batch, count) for step in range(steps)])
    right = np.concatenate([permutation(2, epoch, count) for epoch in range(3 * batch)])
    np.testing.assert_array_equal(got, right)
    assert batch_indices(2, LAST, batch, count).shape == (batch,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permutation(-1, 0, 5), "seed must be from 0"),
        (lambda: permutation(0, 2**64, 5), "epoch must be from 0"),
        (lambda: permutation(0, 0, 0), "count must be from 1"),
        (lambda: permutation(0, 0, 2**64 + 1), "count must be from 1"),
        (lambda: permutation(0, 0, 5, 6), "begin must be from 0 to 5, got 6"),
        (lambda: permutation(0, 0, 5, 3, 2), "end must be from 3 to 5, got 2"),
        (lambda: permutation(0, 0, 5, 0, 6), "end must be from 0 to 5, got 6"),
        (lambda: permutation(0, 0, cast(int, 5.0)), "count must be an integer"),
        (lambda: permutation(0, 0, 2**64), "more than one array can hold"),
        (lambda: batch_indices(0, 0, 6, 5), "batch must be from 1 to 5, got 6"),
        (lambda: batch_indices(0, -1, 5, 5), "step must be from 0"),
    ],
)
def test_bad_calls_name_what_is_wrong(call: Any, message: str) -> None:
    """Fails if a mistake passes, or its message lacks the value or the limit."""
    with pytest.raises(ValueError, match=message):
        call()
