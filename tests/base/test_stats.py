"""The exact binomial interval and the studentized range against their definitions."""

import math
from math import comb

import pytest

from fastmem.base.stats import clopper_pearson, studentized_range


@pytest.mark.parametrize(("successes", "trials"), [(1, 1000), (3, 20), (19, 20), (250, 500)])
def test_each_bound_is_where_the_tail_is_2_5_percent(successes: int, trials: int) -> None:
    """Fails if a bound does not leave 2.5 % to rates beyond it, summed over the binomial."""
    rate = clopper_pearson(successes, trials)
    assert rate.low
    assert rate.high

    def at_least(k: int, p: float) -> float:
        return sum(comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(k, trials + 1))

    assert at_least(successes, rate.low) == pytest.approx(0.025, rel=1e-9)
    assert 1 - at_least(successes + 1, rate.high) == pytest.approx(0.025, rel=1e-9)


def test_bounds_are_the_quantiles_of_scipy() -> None:
    """Fails if the continued fraction loses digits from 1 to a million trials."""
    beta = pytest.importorskip("scipy.stats").beta
    for trials in (1, 20, 1000, 1_000_000):
        for successes in {0, 1, trials // 3, trials - 1, trials}:
            rate = clopper_pearson(successes, trials)
            low = beta.ppf(0.025, successes, trials - successes + 1) if successes else 0
            high = beta.ppf(0.975, successes + 1, trials - successes) if successes < trials else 1
            assert (rate.low, rate.high) == pytest.approx((low, high), rel=1e-8)


def test_closed_forms_of_no_success() -> None:
    """Fails if 0 of n has another upper bound than 1 - 0.025^(1/n), the rule of three's exact."""
    assert clopper_pearson(0, 50).low == 0
    assert clopper_pearson(0, 50).high == pytest.approx(1 - 0.025 ** (1 / 50))
    assert clopper_pearson(50, 50).low == pytest.approx(0.025 ** (1 / 50))


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes: int, trials: int) -> None:
    """Fails if a rate over 1, below 0 or of no trial gets an interval."""
    with pytest.raises(ValueError, match=f"{successes} successes in {trials} trials"):
        clopper_pearson(successes, trials)


@pytest.mark.parametrize(("values", "df"), [(2, 3), (3, 10), (6, 6), (6, 18), (8, math.inf)])
def test_studentized_range(values: int, df: float) -> None:
    """Fails if the quantile is 3 % beside scipy's: sizes in noise would differ too often."""
    stats = pytest.importorskip("scipy.stats")
    wanted = stats.studentized_range.ppf(0.95, values, min(df, 1e5))
    assert studentized_range(values, df) == pytest.approx(wanted, rel=0.03)
    assert studentized_range(values, 0) == math.inf
