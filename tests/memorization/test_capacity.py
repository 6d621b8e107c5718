"""Capacity, its interval and its verdict, on arrays with known answers."""

import numpy as np
import pytest

from fastmem import bits_per_parameter, capacity_bits, why_not_saturated
from fastmem.base.stats import percentile_interval, slope_through_origin
from fastmem.memorization.capacity import late_gain


def test_maximum_of_means_not_mean_of_maxima() -> None:
    """Fails if the maximum is taken over single runs, 20, and not over the means of sizes, 15."""
    interval = capacity_bits([1, 1, 2, 2], [10.0, 20.0, 14.0, 14.0])
    assert interval.estimate == 15.0
    # All four ways to draw two seeds of the first size: means 10, 15, 15, 20; the floor is 14.
    assert (interval.low, interval.high) == (14.0, 20.0)


def test_one_seed_has_no_interval() -> None:
    """Fails if an interval is given without repeated runs."""
    interval = capacity_bits([1, 2, 3], [10.0, 20.0, 15.0])
    assert (interval.estimate, interval.low, interval.high) == (20.0, None, None)


def test_order_of_runs_changes_nothing() -> None:
    """Fails if the estimate or the interval depends on the order of rows."""
    rng = np.random.default_rng(1)
    counts, bits = np.repeat([4, 8, 16], 5), rng.normal(100, 5, 15)
    order = rng.permutation(15)
    shuffled = capacity_bits(counts[order], bits[order])
    assert shuffled.estimate == pytest.approx(capacity_bits(counts, bits).estimate)
    assert shuffled.low == pytest.approx(capacity_bits(counts, bits).low, rel=0.01)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Fails if the interval is far too narrow or too wide: 5 seeds, one size, 300 studies. The
    percentile bootstrap of 5 values covers about 84 %, not 95 %, as docs/method.md states."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        interval = capacity_bits([1] * 5, rng.normal(10, 1, 5))
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 10 <= interval.high
    assert 0.78 <= hits / 300 <= 0.90


def test_slope_through_origin() -> None:
    """Fails if the fit has an intercept: compares with least squares of y = sx by brute force."""
    x, y = np.array([1.0, 2.0, 5.0]), np.array([3.0, 8.0, 17.0])
    grid = np.linspace(0, 10, 100_001)
    losses = ((y - grid[:, None] * x) ** 2).sum(1)
    assert slope_through_origin(x, y) == pytest.approx(grid[losses.argmin()], abs=1e-4)


def test_bits_per_parameter() -> None:
    """Fails if a model counts once for each run, or capacities are not maxima."""
    runs = [([1, 2, 3], [10.0, 36.0, 30.0]), ([5], [72.0])]
    interval = bits_per_parameter([10, 20], runs)
    assert interval.estimate == pytest.approx(3.6)
    assert interval.low == pytest.approx(3.6)
    spread = bits_per_parameter([10, 20], [([1], [30.0]), ([1], [80.0])])
    assert spread.estimate == pytest.approx((300 + 1600) / 500)
    assert (spread.low, spread.high) == (3.0, 4.0)
    assert bits_per_parameter([10], [([1], [30.0])]).low is None


def test_interval_division_and_quantiles() -> None:
    """Fails if bounds are not scaled with the estimate."""
    interval = percentile_interval(5.0, np.arange(0, 10.001, 0.01), level=0.8) / 2
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((2.5, 0.5, 4.5))


PLATEAU = dict(
    counts=[64, 128, 256, 512],
    memorized=[98.0, 190.0, 205.0, 204.0],
    entropy=[100.0, 200.0, 400.0, 800.0],
    late_gain=[0.0, 0.0, 0.01, 0.01],
)


def verdict(**change: list[float]) -> str | None:
    return why_not_saturated(**{**PLATEAU, **change})  # type: ignore[arg-type]


def test_a_plateau_is_saturated() -> None:
    """Fails if a sweep that shows the capacity is called not saturated."""
    assert verdict() is None


def test_each_reason_names_its_fix() -> None:
    """Fails if a sweep that does not show the capacity passes, or its reason names another fix."""
    low = verdict(memorized=[90.0, 190.0, 205.0, 204.0])
    assert low is not None
    assert "the set of 64 is memorized to 90 %, not 95 %: add counts below 64" in low
    rising = verdict(memorized=[98.0, 190.0, 300.0, 330.0])
    assert rising == "the set of 512 still adds 10 % per doubling: add counts above 512"
    late = verdict(late_gain=[0.0, 0.0, 0.03, 0.0])
    assert late == "the set of 256 was still gaining 3.0 % in the last tenth: train longer"
    assert verdict(late_gain=[0.0, 0.0, 0.0, 0.5]) is None  # past the maximum it does not matter


def test_a_collapse_is_no_plateau() -> None:
    """Fails if the largest data set, trained for too few epochs, counts as a plateau."""
    collapsed = why_not_saturated([100, 20000], [98.0, 1.0], [100.0, 20000.0], [0.0, 0.0])
    assert collapsed == (
        "the set of 20000 holds 99 % less than the set of 100, too few epochs for it: "
        "train longer, or add counts between them"
    )
    on_diagonal = why_not_saturated([64, 512], [98.0, 90.0], [100.0, 800.0], [0.0, 0.0])
    assert on_diagonal == ("the set of 64, the best, is nearly all memorized: add counts above 64")


def test_sizes_that_are_nearly_the_same_are_no_slope() -> None:
    """Fails if noise between two close sizes is extrapolated to a doubling, or overflows."""
    close = verdict(
        counts=[64, 128, 256, 512, 515],
        memorized=[98.0, 190.0, 205.0, 204.0, 205.0],
        entropy=[100.0, 200.0, 400.0, 800.0, 805.0],
        late_gain=[0.0] * 5,
    )
    assert close is None
    assert why_not_saturated([1000, 1001], [1.0, 10.0], [10.0, 10.0], [0.0, 0.0]) is not None


def test_one_size_shows_no_plateau() -> None:
    """Fails if a single data set size counts as saturated."""
    assert why_not_saturated([64], [98.0], [100.0], [0.0]) == (
        "one data set size shows no plateau: add counts above 64"
    )


def test_nothing_memorized_is_no_capacity() -> None:
    """Fails if runs at or below zero bits raise an error, or count as saturated."""
    reasons = why_not_saturated([64, 128], [-5.0, 0.0], [100.0, 200.0], [0.0, 0.0])
    assert reasons is not None
    assert "the set of 64 is memorized to -5 %" in reasons


def test_late_gain() -> None:
    """Fails if the last tenth begins at another point, also for steps that are not a multiple of
    10."""
    curve = [(201, 60.0), (321, 90.0), (361, 97.0), (401, 100.0)]
    points = [{"step": step, "memorized_bits": bits} for step, bits in curve]
    assert late_gain(points) == pytest.approx(0.03)


def test_bad_input() -> None:
    """Fails if arrays of different lengths, or without runs, give a number."""
    with pytest.raises(ValueError, match=r"counts \(2,\) and values \(1,\)"):
        capacity_bits([1, 2], [1.0])
    with pytest.raises(ValueError, match="at least one run"):
        capacity_bits([], [])
    with pytest.raises(ValueError, match="1 parameter counts for the runs of 0 models"):
        bits_per_parameter([10], [])
