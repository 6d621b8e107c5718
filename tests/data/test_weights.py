"""fastmem.data.weights: integers against exact fractions and closed forms; entropy; bad input."""

import copy
import math
import pickle
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from fastmem.data.weights import Weights, zipf


def edges(fractions: list[Fraction]) -> list[int]:
    """C_0, …, C_{V-1} by the definition, in exact fractions."""
    total = sum(fractions)
    return [math.floor(2**32 * sum(fractions[:i]) / total) for i in range(len(fractions))]


def whole(weights: Weights) -> list[int]:
    """The integers, with the omitted values 2**32 at the end."""
    return weights.cumulative.tolist() + [2**32] * (weights.vocab - len(weights.cumulative))


# Known answers and closed forms


@pytest.mark.parametrize(
    ("weights", "cumulative", "entropy"),
    [
        ([1, 1, 2], [0, 2**30, 2**31], 1.5),
        ([0.25, 0.25, 0.5], [0, 2**30, 2**31], 1.5),
        ([1, 1, 1], [0, 1431655765, 2863311530], math.log2(3)),
        ([5], [0], 0.0),
        ([0, 7, 0, 0], [0, 0], 0.0),
        ([1, 0, 1, 0], [0, 2**31, 2**31], 1.0),
        ([1] * 2048, list(range(0, 2**32, 2**21)), 11.0),
    ],
)
def test_known_weights(weights: list[float], cumulative: list[int], entropy: float) -> None:
    """Fails if rounding differs, a weight of 0 gets a probability, or 2**32 wraps to 0."""
    made = Weights(weights)
    assert made.cumulative.dtype == np.uint32
    assert made.cumulative.tolist() == cumulative
    assert made.vocab == len(weights)
    assert made.entropy_bits == pytest.approx(entropy, abs=1e-12)
    assert made.probabilities.sum() == 1
    assert ((made.probabilities == 0) == (np.array(weights) == 0)).all()


numbers = st.floats(1e-3, 1e3) | st.integers(0, 1000) | st.just(0.0)


@given(st.lists(numbers, min_size=1, max_size=9).filter(any))
def test_weights_are_exact_fractions(weights: list[float]) -> None:
    """Fails if a weight is rounded before the floor of the definition."""
    assert whole(Weights(weights)) == edges([Fraction(w) for w in weights])


@pytest.mark.parametrize("exponent", [0, 1, 2, 3])
@pytest.mark.parametrize("vocab", [1, 2, 3, 100, 600])
def test_zipf_of_a_whole_exponent_is_a_fraction(vocab: int, exponent: int) -> None:
    """Fails if a product of primes loses digits that the floor needs, or a rank is off by one."""
    assert whole(zipf(vocab, exponent)) == edges(
        [Fraction(1, k**exponent) for k in range(1, vocab + 1)]
    )


@pytest.mark.parametrize("exponent", [0.5, 1.07, 1.3, math.pi / 2])
def test_zipf_of_any_exponent(exponent: float) -> None:
    """Fails if the powers differ from those computed one by one with 70 digits."""
    with localcontext() as context:
        context.prec = 70
        powers = [Fraction((-Decimal(exponent) * Decimal(k).ln()).exp()) for k in range(1, 301)]
    assert whole(zipf(300, exponent)) == edges(powers)


def test_zipf_is_the_same_on_every_machine() -> None:
    """Fails if the integers change with the library, the processor or the version."""
    assert zipf(50257, 1.0).checksum == "efc0ac76c5c476a8"
    assert zipf(2048, 1.1).checksum == "f82bf3423cab4610"
    assert zipf(2048, np.float32(1)) == zipf(2048, 1)


def test_entropy_is_that_of_the_definition() -> None:
    """Fails if the entropy is of the requested, not the drawn probabilities, or in nats."""
    for weights in (zipf(50257, 1.0), zipf(7, 3.5), Weights([3, 1, 4, 1, 5])):
        p = weights.counts / 2**32
        assert weights.entropy_bits == pytest.approx(-(p * np.log2(p)).sum(), rel=1e-12)
    for exponent in (0, 0.5, 1):
        k = np.arange(1, 2049.0) ** -exponent
        wanted = -(k / k.sum() * np.log2(k / k.sum())).sum()
        assert zipf(2048, exponent).entropy_bits == pytest.approx(wanted, rel=1e-6)


# Invariance


def test_unit_and_type_change_nothing() -> None:
    """Fails if the unit or the dtype of weights changes the probabilities."""
    right = Weights([1, 2, 5, 0])
    assert Weights([0.125, 0.25, 0.625, 0]) == right
    assert Weights([2**40, 2**41, 5 * 2**40, 0]) == right
    for dtype in (np.uint8, np.int64, ">i4", np.float16, np.float32, np.longdouble):
        array = np.array([1, 9, 2, 9, 5, 9, 0], dtype)
        assert Weights(array[::2]) == right
        assert hash(Weights(array[::2])) == hash(right)
    assert Weights([1, 2, 5]) != right
    assert Weights([1, 2, 5, 1]) != right
    for same in (copy.deepcopy(right), pickle.loads(pickle.dumps(right))):
        assert same == right
        assert same.cumulative.tolist() == right.cumulative.tolist()
    with pytest.raises(ValueError, match="read-only"):
        right.cumulative[0] = 1


@pytest.mark.parametrize("weights", [zipf(50, 1.2), Weights([0, 1, 2.5, 0])], ids=["zipf", "list"])
def test_descriptions_make_the_same_weights(weights: Weights) -> None:
    """Fails if a description loses the integers, or an altered description passes."""
    description = weights.description()
    assert Weights.described(weights.vocab, description) == weights
    changes: list[dict[str, Any]] = [{"checksum": "0" * 16}]
    if "exponent" in description:
        changes += [{"exponent": 1.3}]
    else:
        changes += [{"cumulative": [0, 0, 5]}, {"cumulative": [0, 5, 0]}, {"cumulative": []}]
        changes += [{"cumulative": [1, 2, 3]}, {"cumulative": [0, 2**32]}, {"cumulative": [0, 0.5]}]
        changes += [{"cumulative": [0] * 9}, {"cumulative": 0}, {"cumulative": None}]
    for change in changes:
        with pytest.raises(ValueError, match=r"checksum|cumulative"):
            Weights.described(weights.vocab, description | change)
    for wrong in ({}, {"checksum": ""}, description | {"more": 1}, None, []):
        with pytest.raises(ValueError, match="must have a checksum and either"):
            Weights.described(weights.vocab, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checksum"):
        Weights.described(weights.vocab + 1, description)


def test_integers_of_any_size() -> None:
    """Fails if integers over 2**64 are refused, or rounded."""
    assert Weights([3 * 10**30, 10**30]) == Weights([3, 1])


# Bad input


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -1, 2], "at least 0, got -1 for token 1; use 0"),
        ([1.0, math.nan], "finite and at least 0, got nan for token 1"),
        ([math.inf, 1], "got inf for token 0"),
        ([0, 0, 0], "all 0, for 3 tokens"),
        ([0.0], "all 0, for 1 tokens"),
        ([], r"got shape \(0,\)"),
        ([[1, 2]], r"1-D list .* got shape \(1, 2\)"),
        (3, r"got shape \(\)"),
        (None, "of object"),
        ("12", "of <U2"),
        ([True, False], "of bool"),
        ([[1], [2, 3]], "1-D list .* lists of different lengths"),
        ([2**70, None], "of object"),
        (np.ones(2**20 + 1), r"1 to 1048576 numbers, got shape \(1048577,\)"),
        ([1e-300, 1], "token 0 has 1e-300 of all weight, less than the 2.*: give it 0 or more"),
        ([2**40, 1, 1], "token 1 has 9.09e-13 of all weight"),
    ],
)
def test_bad_weights(weights: Any, message: str) -> None:
    """Fails if an invalid weight passes, or the message lacks the token, the value or the fix."""
    with pytest.raises(ValueError, match=message):
        Weights(weights)


@pytest.mark.parametrize(
    ("vocab", "exponent", "message"),
    [
        (0, 1, "vocab must be from 1 to 1048576, got 0"),
        (2**20 + 1, 1, "got 1048577"),
        (2.0, 1, "vocab must be an integer"),
        (5, -1, "exponent must be a finite number of at least 0, got -1"),
        (5, math.nan, "got nan"),
        (5, math.inf, "got inf"),
        (5, "1", "got '1'"),
        (5, True, "got True"),
        (5, None, "got None"),
        (5, 1e9, "token 1 has .* use a smaller exponent than 1000000000.0 or a smaller vocab"),
        (50257, 2.5, "less than the 2.*: use a smaller exponent than 2.5"),
    ],
)
def test_bad_zipf(vocab: Any, exponent: Any, message: str) -> None:
    """Fails if invalid arguments of Zipf's law pass, or rare tokens get a probability of 0."""
    with pytest.raises(ValueError, match=message):
        zipf(vocab, exponent)
