"""The peak of the test loss on curves whose peak is known, and on curves without one."""

from collections.abc import Callable

import numpy as np
import pytest

from fastmem.memorization.double_descent import DoubleDescent, double_descent

NOISE = 0.05
Truth = Callable[[float], float]


def found(
    truth: Truth,
    seed: int = 0,
    shapes: int = 3,
    sizes: int = 6,
    seeds: int = 2,
    noise: float = NOISE,
    replicates: int = 200,
    first: float = 0.1,
) -> DoubleDescent:
    """Of shapes with sizes at ratios three times apart, from about `first` on."""
    rng = np.random.default_rng(seed)
    runs = []
    for shape in range(shapes):
        begin = first * rng.uniform(0.7, 1.4)
        for k in range(sizes):
            x = begin * 3**k
            runs += [
                (x, truth(np.log(x)) + noise * rng.standard_normal(), f"1x{shape}", 10 * 3**k)
                for _ in range(seeds)
            ]
    return double_descent(*zip(*runs, strict=True), replicates=replicates)


def bump(x: float) -> float:
    """A peak of 2 bits at ratio 1, over 4 bits."""
    return 4 + 2 * float(np.exp(-(x**2) / 2))


def skewed(x: float) -> float:
    """Rises fast to ratio 1 and falls slowly."""
    return 4 + 2 * float(np.exp(-(x**2) / (4 if x > 0 else 0.5)))


WITHOUT: dict[str, Truth] = {
    "flat": lambda x: 4.0,
    "falls": lambda x: 4 - 0.3 * x,
    "falls slowly": lambda x: 4 - 0.02 * x,
    "rises": lambda x: 4 + 0.3 * x,
    "U": lambda x: x**2,
    "rises to a plateau": lambda x: 4 + min(x, 0.0),
    "falls from a plateau": lambda x: 4 - max(x, 0.0),
}


@pytest.mark.parametrize("truth", [bump, skewed])
def test_a_known_peak(truth: Truth) -> None:
    """Fails if a peak is missed, or if its interval leaves out ratio 1 in more than one of 20."""
    peaks = [found(truth, seed).peak_ratio for seed in range(40)]
    inside = [
        peak.low <= 1 <= peak.high and 0.5 < peak.estimate < 2.2
        for peak in peaks
        if peak is not None and peak.low is not None and peak.high is not None
    ]
    assert len(inside) == 40
    assert sum(inside) >= 38


@pytest.mark.parametrize("name", WITHOUT)
def test_no_peak_where_none_is(name: str) -> None:
    """Fails if noise is taken for a peak in more than one of 20 studies."""
    seen = sum(
        found(WITHOUT[name], seed, replicates=2).peak_ratio is not None for seed in range(100)
    )
    assert seen <= 5


def test_the_estimate_is_the_highest_size() -> None:
    """Fails if the ratio is not of the highest mean, or not the geometric mean over shapes."""
    x = [1, 1, 2, 2, 4, 4, 8, 8, 3, 3, 6, 6, 8, 8]
    y = [5, 5.1, 9, 9.1, 6, 6.1, 4, 4.1, 5, 5.1, 4, 4.1, 3, 3.1]
    only = double_descent(x, y, ["a"] * 8 + ["b"] * 6, x)
    assert only.peaks == {"a": 2.0}
    assert only.peak_ratio is not None
    assert only.peak_ratio.estimate == 2.0
    assert only.found.startswith("The test loss peaks where the data hold 2.00 [")
    assert "in 1 of 2 shapes: a at 2.00." in only.found
    both = double_descent(
        x[:8] * 2, y[:8] * 2, ["a"] * 8 + ["b"] * 8, x[:8] + [n + 1 for n in x[:8]]
    )
    assert both.peak_ratio is not None
    assert both.peak_ratio.estimate == pytest.approx(2.0)
    assert "both shapes: a at 2.00, b at 2.00" in both.found
    scaled = double_descent([8 * one for one in x[:8]], y[:8], ["b"] * 8, x[:8])
    assert scaled.peaks == {"b": pytest.approx(16.0)}


def test_the_interval_reaches_between_the_neighbours() -> None:
    """Fails if the interval claims more than the sizes beside the highest show."""
    peak = found(bump, shapes=1, noise=1e-6).peak_ratio
    assert peak is not None
    assert peak.low is not None
    assert peak.high is not None
    assert 1 / 3 < peak.low / peak.estimate < 0.4
    assert 2.5 < peak.high / peak.estimate < 3


def test_a_peak_below_a_high_first_size() -> None:
    """Fails if only the highest of all sizes can be the peak: models of tiny sets overfit too."""
    x = np.repeat([1, 2, 4, 8], 2)
    y = np.array([12, 12.1, 8, 8.1, 9.5, 9.6, 5, 5.1])
    assert double_descent(x, y, ["a"] * 8, x).peaks == {"a": 4.0}


def test_noise_decides() -> None:
    """Fails if the same means make a peak in any noise, or in none."""
    x, means = np.repeat([1, 2, 4], 3), np.repeat([4.0, 5.0, 4.0], 3)
    for spread, seen in ((0.01, True), (1.0, False)):
        y = means + spread * np.tile([-1, 0, 1], 3)
        result = double_descent(x, y, ["a"] * 9, x)
        assert (result.peak_ratio is not None) == seen
    assert "by less than the noise: a (ratio 2.00). Run more seeds" in result.found


def test_one_seed() -> None:
    """Fails if one run a size is taken for certain, or if several shapes do not show the noise."""
    alone = found(bump, shapes=1, seeds=1)
    assert alone.peak_ratio is None
    assert "With one seed the noise is not known" in alone.found
    assert "--seeds 0 1 2 3" in alone.found
    assert found(bump, shapes=3, seeds=1).peak_ratio is not None
    seen = [found(WITHOUT["flat"], s, seeds=1, replicates=2).peak_ratio for s in range(100)]
    assert sum(peak is not None for peak in seen) <= 5


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([9, 6, 4], "highest at the smallest data set: a (ratio 1.00). Run smaller data sets"),
        ([4, 6, 9], "highest at the largest data set: a (ratio 4.00). Run larger data sets"),
        ([4, 5], "Fewer than 3 sizes were run: a"),
    ],
)
def test_what_to_run(values: list[float], said: str) -> None:
    """Fails if the sentence does not say where the curve stands and which sizes would help."""
    counts = [100 * 2**k for k in range(len(values)) for _ in range(2)]
    x = [count / 100 for count in counts]
    y = [value + d for value in values for d in (0, 0.1)]
    result = double_descent(x, y, ["a"] * len(x), counts)
    assert result.peak_ratio is None
    assert result.found.startswith("No peak of the test loss was seen.")
    assert said in result.found
    flags = {"smallest": "--counts 25 50", "largest": "--counts 800 1600"}
    assert all(flag in result.found for word, flag in flags.items() if word in said)


def test_a_curve_that_brackets_the_capacity() -> None:
    """Fails if sizes are asked for that were run: only training can still show a peak."""
    result = found(WITHOUT["falls"], sizes=8, first=0.03)
    assert "a longer training (--steps)" in result.found
    assert "--counts" not in result.found


def test_nothing_measured() -> None:
    """Fails if a study without a known capacity is an error."""
    assert double_descent([], [], [], []).peak_ratio is None


def test_bad_input() -> None:
    """Fails if arrays that do not fit, or a ratio of 0, give a number."""
    with pytest.raises(ValueError, match=r"one value a run, got shapes \(2,\), \(1,\)"):
        double_descent([1, 2], [1], ["a", "a"], [1, 2])
    with pytest.raises(ValueError, match="1 of 2 runs have a ratio not above 0"):
        double_descent([0, 1], [1, 2], ["a", "a"], [1, 2])
    with pytest.raises(ValueError, match="1 of 2 runs"):
        double_descent([1, 1], [np.nan, 2], ["a", "a"], [1, 2])
