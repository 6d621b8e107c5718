"""How curves go: known courses, in noise and without."""

import math

import numpy as np
import pytest

from fastmem.report.courses import Course, course, curve

CASES: list[tuple[Course, list[float]]] = [
    ("rises and falls", [1, 5, 2]),
    ("falls and rises", [5, 1, 4]),
    ("rises", [1, 2, 5]),
    ("falls", [5, 2, 1]),
    ("flat", [3, 3, 3]),
    ("rises", [1, 5]),
    ("flat", [2]),
]


@pytest.mark.parametrize(("way", "values"), CASES)
def test_known_courses(way: Course, values: list[float]) -> None:
    """Fails if a curve without noise, or beyond it, is called otherwise."""
    sizes = list(range(len(values)))
    assert course(curve(sizes, values)) == way
    assert course(curve(sizes, values, [0.1] * len(values))) == way
    assert course(curve([*sizes, *sizes], [*values, *(v + 0.01 for v in values)])) == way


@pytest.mark.parametrize(("way", "values"), CASES)
def test_noise_hides_them(way: Course, values: list[float]) -> None:
    """Fails if changes within the errors, of runs or of seeds, are told as changes."""
    sizes = list(range(len(values)))
    assert course(curve(sizes, values, [5.0] * len(values))) == "flat"
    apart = [value + d for d in (-5, 5) for value in values]
    assert course(curve([*sizes, *sizes], apart)) == "flat"


def test_flat_curves_stay_flat() -> None:
    """Fails if noise is told as a change in more than one of 20 curves."""
    rng = np.random.default_rng(0)
    sizes = np.repeat(range(6), 2)
    changes = sum(
        course(curve(sizes.tolist(), rng.normal(size=12).tolist())) != "flat" for _ in range(200)
    )
    assert changes <= 16  # of 200 · 0.05 = 10, two standard deviations


def test_the_curve_is_of_means() -> None:
    """Fails if a mean, or the larger of its two errors, is another."""
    found = curve([4, 2, 4, 2], [1.0, 3.0, 3.0, 3.0], [0.1, 0.4, 0.1, 0.3])
    assert found.sizes == [2, 4]
    assert found.means.tolist() == [3.0, 2.0]
    # Deviations -1 and 1 at one of two sizes: variance 2 / 2, over two runs.
    assert found.errors == pytest.approx([math.sqrt(1 / 2), math.sqrt(1 / 2)])
    assert found.df == 2
    assert found.top == 0
    # In units of √size the deviations are 1 / √4 each: variance 0.5 / 2.
    sums = curve([4, 2, 4, 2], [1.0, 3.0, 3.0, 3.0], power=0.5)
    assert sums.errors == pytest.approx([0.5, math.sqrt(0.5)])
    known = curve([1, 2], [3.0, 4.0], [0.3, 0.4])
    assert known.errors == pytest.approx([0.3, 0.4])
    assert math.isinf(known.df)


def test_above_zero() -> None:
    """Fails if a curve within its noise of 0 is above it, or the sign is lost."""
    assert curve([1, 2], [3.0, 1.0], [0.5, 0.5]).above_zero()
    assert not curve([1, 2], [3.0, 1.0], [2.0, 2.0]).above_zero()
    assert not curve([1, 2], [-3.0, -1.0], [0.1, 0.1]).above_zero()
