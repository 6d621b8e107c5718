"""Extraction arithmetic against exact fractions, and against a model that really decodes."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import fastmem


def runs(seed: int = 0) -> list[Any]:
    """is_greedy of 50 sequences of 3 to 12 coded tokens."""
    rng = np.random.default_rng(seed)
    return [rng.random(n) < 0.7 for n in rng.integers(3, 13, 50)]


def test_greedy_from_answers_every_prefix() -> None:
    """Fails if a prefix of P tokens extracts a sequence and greedy_from > P, or the reverse."""
    for uncoded in (0, 1):
        found = fastmem.greedy_from(runs(), uncoded=uncoded)
        for start, greedy in zip(found, runs(), strict=True):
            for prefix in range(1, len(greedy) + uncoded):
                assert (start <= prefix) == all(greedy[prefix - uncoded :])
            assert uncoded <= start <= len(greedy) + uncoded


def test_greedy_from_is_real_decoding() -> None:
    """Fails if a table of next tokens, decoded token by token, returns other suffixes, or ties."""
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(0, 1, (4, 4)), 0)  # a bigram model, with equal logits
    best = logits.argmax(1)  # the first of equal logits, as a decoder takes it
    tokens = rng.integers(0, 4, (200, 5))
    tokens[:100, 1:] = 0
    for t in range(1, 5):  # half of the sequences follow the model at first or at last
        tokens[:100, t] = np.where(
            rng.random(100) < 0.9, best[tokens[:100, t - 1]], tokens[:100, t]
        )
    is_greedy = tokens[:, 1:] == best[tokens[:, :-1]]
    found = fastmem.greedy_from(is_greedy)
    for prefix in range(1, 5):
        decoded = tokens[:, :prefix]
        while decoded.shape[1] < 5:
            decoded = np.concatenate([decoded, best[decoded[:, -1:]]], axis=1)
        assert np.array_equal((decoded == tokens).all(1), found <= prefix)
        matched = (decoded == tokens)[:, prefix:].cumprod(1).sum(1)
        assert np.array_equal(fastmem.longest_match(is_greedy, prefix), matched)
        rate = fastmem.extraction_rates(found, 5, [prefix])[prefix]
        assert rate.estimate == (decoded == tokens).all(1).mean()
    assert 0 < (found <= 2).mean() < 1


def test_longest_run_is_the_loop() -> None:
    """Fails if the longest run of greedy tokens is not that of a split at the errors."""
    expected = [
        max(map(len, "".join("x" if g else " " for g in greedy).split(" "))) for greedy in runs()
    ]
    assert fastmem.longest_match(runs()).tolist() == expected


def test_suffix_bits_are_sums() -> None:
    """Fails if a token of the prefix counts, or one of the suffix does not."""
    rng = np.random.default_rng(0)
    bits = [rng.exponential(3, n).astype(np.float16) for n in rng.integers(8, 20, 30)]
    for prefix, uncoded in ((1, 1), (5, 1), (5, 0)):
        expected = [float(b[prefix - uncoded :].astype(np.float64).sum()) for b in bits]
        np.testing.assert_allclose(
            fastmem.suffix_bits(bits, prefix, uncoded=uncoded), expected, rtol=1e-12
        )


@pytest.mark.parametrize("n", [0, 1, 2, 1000, 10**9])
def test_probability_is_exact_where_floats_cancel(n: int) -> None:
    """Fails if 1 - (1 - p)^n loses digits: p far below rounding, many samples, p of 0 and 1."""
    for bits in (0, 1, 10, 60, 200):
        found = float(fastmem.extraction_probability(bits, n))
        if n <= 1000:
            expected = float(1 - (1 - Fraction(1, 2**bits)) ** n)
        elif bits >= 60:  # one sample at most, to 1e-9
            expected = n / 2**bits
        else:
            expected = 1.0
        assert found == pytest.approx(expected, rel=1e-9, abs=0)
    assert fastmem.extraction_probability(2000.0, n) == 0


def test_samples_needed_is_the_inverse() -> None:
    """Fails if n samples do not reach the probability that they are needed for."""
    bits = np.array([0.5, 3.0, 20.0, 80.0])
    for p in (1e-9, 0.5, 0.999):
        n = fastmem.samples_needed(bits, p)
        np.testing.assert_allclose(fastmem.extraction_probability(bits, n), p, rtol=1e-9)
    assert fastmem.samples_needed([0.0, 5000.0], 0.5).tolist() == [0, np.inf]


def test_bad_input_is_one_line() -> None:
    """Fails if a sequence without a suffix, or values of the wrong kind, get a result."""
    with pytest.raises(
        ValueError, match=r"sequence 1 has 3 tokens, none after a prefix of 4 \(1 of"
    ):
        fastmem.longest_match([[True] * 4, [True] * 2], prefix=4)
    with pytest.raises(ValueError, match="sequence 1 has 8 tokens, none after a prefix of 8"):
        fastmem.extraction_rates([3, 8], [9, 8], [2, 8])
    for uncoded in (0, 1):
        with pytest.raises(ValueError, match="has 50 tokens, none after a prefix of 50"):
            fastmem.suffix_bits([[1.0] * (50 - uncoded)], prefix=50, uncoded=uncoded)
    with pytest.raises(ValueError, match=r"is_greedy must be true or false, not 0\.5"):
        fastmem.greedy_from([[0.5, 1.0]])
    with pytest.raises(ValueError, match="prefix must be from 1 to"):
        fastmem.suffix_bits([[1.0, 2.0]], prefix=0)
    with pytest.raises(
        ValueError, match=r"greedy_from of shape \(2,\) and lengths of shape \(3,\)"
    ):
        fastmem.extraction_rates([1, 2], [3, 3, 3], [1])
    for start in (-3, 3.5, 9):
        with pytest.raises(ValueError, match=f"greedy_from is {start} for sequence 1 of 8 tokens"):
            fastmem.extraction_rates([5, start], 8, [2])
    with pytest.raises(ValueError, match="bits and n must be from 0 up, not -1"):
        fastmem.extraction_probability([-1.0], 1)
    with pytest.raises(ValueError, match=r"p between 0 and 1, not 1\.0 and 1"):
        fastmem.samples_needed([1.0], 1)
    with pytest.raises(ValueError, match="bits not finite in sequence 0 at token 1"):
        fastmem.suffix_bits([[1.0, np.nan]], prefix=1)


def levenshtein(a: list[int], b: list[int]) -> int:
    """The textbook recursion."""
    if not a or not b:
        return len(a) + len(b)
    changed = levenshtein(a[1:], b[1:]) + (a[0] != b[0])
    return min(changed, levenshtein(a[1:], b) + 1, levenshtein(a, b[1:]) + 1)


def test_edit_distance_is_the_recursion() -> None:
    """Fails if an insertion, a deletion or a replacement is missed or costs otherwise."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 3, (2, 60, 5))
    b[:20, 1:] = a[:20, :-1]  # shifted by one
    expected = [levenshtein(x, y) / 5 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert fastmem.edit_distance(a, b).tolist() == expected
    assert len(set(expected)) > 3
    for wrong in (a[:, :4], a[0]):
        with pytest.raises(ValueError, match=r"give \(N, S\) of both"):
            fastmem.edit_distance(wrong, b)


def test_a_token_that_is_never_sampled_has_no_chance() -> None:
    """Fails if bits of inf (outside of the top k) are refused in a suffix, or count in a prefix."""
    found = fastmem.suffix_bits([[np.inf, 1.0, 2.0], [1.0, np.inf, 2.0]], prefix=2)
    assert found.tolist() == [3.0, np.inf]
    assert fastmem.extraction_probability(found, 10)[1] == 0
    with pytest.raises(ValueError, match="bits not finite in sequence 0 at token 1"):
        fastmem.suffix_bits([[1.0, np.nan, 2.0]], prefix=2)
