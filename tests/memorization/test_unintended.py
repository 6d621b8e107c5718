"""Codes and totals of unintended memorization against closed forms and slow code."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, strategies as st

from fastmem import total_unintended, unintended_bits
from fastmem.memorization.unintended import over_seeds

BITS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=8)


@given(BITS)
def test_codes_in_exact_arithmetic(pairs: list[tuple[int, int]]) -> None:
    """Fails if a code is not the maximum or the equal mixture of both likelihoods."""
    target, reference = (np.array(side, float) for side in zip(*pairs, strict=True))
    largest = unintended_bits(target, reference)
    mixed = unintended_bits(target, reference, "mixture")
    for i, (t, r) in enumerate(pairs):
        p, q = Fraction(1, 2**t), Fraction(1, 2**r)
        for bits, joint in ((largest[i], max(p, q)), (mixed[i], (p + q) / 2)):
            expected = r + math.log2(joint.numerator) - math.log2(joint.denominator)
            assert bits == pytest.approx(expected, abs=1e-12)


def test_codes_far_apart() -> None:
    """Fails if large differences overflow, or the mixture costs more than a bit."""
    with np.errstate(over="raise", invalid="raise"):
        found = unintended_bits([0.0, 1e6], [1e6, 0.0], "mixture")
    assert found.tolist() == [1e6 - 1, -1.0]
    assert unintended_bits([0.0, 1e6], [1e6, 0.0]).tolist() == [1e6, 0.0]


def test_the_mixture_is_a_code() -> None:
    """Fails if lengths of all sequences break Kraft's inequality, as those of the maximum do."""
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.ones(64)) for _ in range(2))
    target, reference = -np.log2(p), -np.log2(q)
    largest = reference - unintended_bits(target, reference)
    mixed = reference - unintended_bits(target, reference, "mixture")
    assert np.exp2(-mixed).sum() == pytest.approx(1)
    assert np.exp2(-largest).sum() > 1.1
    assert (mixed <= largest + 1).all()


def test_totals() -> None:
    """Fails if a total is another sum, or held-out sequences are not scaled to as many."""
    target, reference = np.array([2.0, 9.0, 12.0]), np.array([10.0, 10.0, 10.0])
    found = total_unintended(target, reference, [9.0, 11.0], [10.0, 10.0], uniform_bits=16)
    assert found.memorization.estimate == 3 * 16 - 23
    assert found.unintended.estimate == 8 + 1
    assert found.held_out.estimate == 1.5
    assert found.net.estimate == 7.5
    assert found.generalization.estimate == 25 - 9
    mixed = total_unintended(target, reference, [9.0], [10.0], 16, code="mixture")
    assert mixed.unintended.estimate == pytest.approx(
        unintended_bits(target, reference, "mixture").sum()
    )
    assert mixed.generalization.estimate == pytest.approx(25 - mixed.unintended.estimate)


def test_the_uniform_code_gives_total_memorization() -> None:
    """Fails if the uniform code as reference is not the memorization of what costs less."""
    target, uniform = np.array([2.0, 9.0]), np.full(2, 16.0)
    found = total_unintended(target, uniform, uniform, uniform, uniform_bits=16)
    assert found.unintended == found.memorization == found.net
    assert found.generalization.estimate == 0


def test_intervals_are_those_of_slow_code() -> None:
    """Fails if a replicate is not N times the mean over the sequences of drawn documents."""
    rng = np.random.default_rng(1)
    documents = rng.integers(12, size=100) * 7 - 3
    target, reference = rng.uniform(0, 20, 100), np.full(100, 10.0)
    found = total_unintended(
        target, reference, [9.0] * 4, [10.0] * 4, 16, documents=documents, replicates=50, seed=5
    )
    names, bits = np.unique(documents), unintended_bits(target, reference)
    draws = np.random.default_rng(5).integers(12, size=(50, 12))
    slow = [
        100 * np.concatenate([bits[documents == names[one]] for one in draw]).mean()
        for draw in draws
    ]
    assert found.unintended.low == pytest.approx(np.quantile(slow, 0.025))
    assert found.unintended.high == pytest.approx(np.quantile(slow, 0.975))
    assert found.held_out.low == found.held_out.high == pytest.approx(100)
    assert found.unintended.low is not None
    assert found.net.low == pytest.approx(found.unintended.low - 100)


def test_intervals_cover() -> None:
    """Fails if sequences of a document count as independent: too narrow intervals miss the truth.

    30 documents of 20 equal sequences each, whose unintended memorization has the mean 1.
    """
    covered, too_narrow = 0, 0
    documents = np.repeat(np.arange(30), 20)
    for seed in range(200):
        saved = np.repeat(np.random.default_rng(seed).exponential(size=30), 20)
        for groups in (documents, None):
            total = total_unintended(
                10 - saved, np.full(600, 10.0), [10.0], [10.0], 16, documents=groups, replicates=200
            )
            assert total.unintended.low is not None
            assert total.unintended.high is not None
            inside = total.unintended.low <= 600 <= total.unintended.high
            if groups is None:
                too_narrow += inside
            else:
                covered += inside
    assert 175 <= covered <= 197
    assert too_narrow < 80


def test_held_out_is_net_of_itself() -> None:
    """Fails if members that are as held-out sequences have net memorization beyond its interval."""
    outside = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        members, others = rng.normal(10, 3, (2, 300))
        total = total_unintended(
            members, np.full(300, 10.0), others, np.full(300, 10.0), 16, replicates=200, seed=seed
        )
        assert total.unintended.estimate > 200  # which the clip alone gives
        assert total.net.low is not None
        assert total.net.high is not None
        outside += not total.net.low <= 0 <= total.net.high
    assert outside <= 12


def test_pairs_of_slow_code() -> None:
    """Fails if a document that is drawn for members is not drawn for its held-out sequences too."""
    rng = np.random.default_rng(2)
    documents, others = rng.integers(9, size=80) * 3, rng.integers(9, size=60) * 3
    saved = [rng.uniform(-3, 9, n) + groups / 4 for n, groups in ((80, documents), (60, others))]
    target, held_out = (10 - one for one in saved)
    found = total_unintended(
        target,
        np.full(80, 10.0),
        held_out,
        np.full(60, 10.0),
        16,
        documents=documents,
        held_out_documents=others,
        paired=True,
        replicates=40,
        seed=3,
    )
    names = np.unique(np.concatenate([documents, others]))
    ours, theirs = (np.maximum(one, 0) for one in saved)
    slow = []
    for draw in np.random.default_rng(3).integers(names.size, size=(40, names.size)):
        members = np.concatenate([ours[documents == names[one]] for one in draw])
        beside = np.concatenate([theirs[others == names[one]] for one in draw])
        slow.append(80 * (members.mean() - beside.mean()))
    assert found.net.estimate == pytest.approx(80 * (ours.mean() - theirs.mean()))
    assert found.net.low == pytest.approx(np.quantile(slow, 0.025))
    assert found.net.high == pytest.approx(np.quantile(slow, 0.975))


def test_pairs_cover() -> None:
    """Fails if what documents have in common widens the interval of paired sequences, or members
    that are as their held-out sequences are net of them beyond its interval.

    40 documents of 10 members and 10 held-out sequences; documents differ by 30 times the noise.
    """
    documents, inside, widths = np.repeat(np.arange(40), 10), 0, [0.0, 0.0]
    for seed in range(60):
        rng = np.random.default_rng(seed)
        of_document = np.repeat(rng.exponential(30, 40), 10)
        members, others = (of_document + rng.normal(0, 1, 400) for _ in range(2))
        for place, paired in enumerate((True, False)):
            net = total_unintended(
                -members,
                np.zeros(400),
                -others,
                np.zeros(400),
                16,
                documents=documents,
                held_out_documents=documents,
                paired=paired,
                replicates=300,
                seed=seed,
            ).net
            assert net.low is not None
            assert net.high is not None
            widths[place] += net.high - net.low
            inside += paired and net.low <= 0 <= net.high
    assert inside >= 50
    assert 10 * widths[0] < widths[1]


def test_means_over_seeds() -> None:
    """Fails if a replicate is not the mean of replicates of drawn seeds."""
    bits = np.random.default_rng(0).uniform(0, 20, (2, 50))
    runs = [
        total_unintended(one, one + 3, one, one, 16, replicates=30, seed=seed).replicates[
            "memorization"
        ]
        for seed, one in enumerate(bits)
    ]
    found = over_seeds(runs, seed=4)
    drawn = np.random.default_rng(4).integers(2, size=(2, 30))
    slow = [np.mean([runs[seed][1 + r] for seed in drawn[:, r]]) for r in range(30)]
    assert found.estimate == pytest.approx((16 * 50 * 2 - bits.sum()) / 2)
    assert found.low == pytest.approx(np.quantile(slow, 0.025))
    assert found.high == pytest.approx(np.quantile(slow, 0.975))
    one = total_unintended(bits[0], bits[0] + 3, bits[0], bits[0], 16, replicates=30).memorization
    assert over_seeds(runs[:1]) == one
    assert over_seeds([np.array([2.0, np.nan, np.nan])]).low is None


def test_same_seed_same_interval() -> None:
    """Fails if the bootstrap is not seeded, or does not use its seed."""
    bits = np.random.default_rng(0).uniform(0, 20, 50)

    def interval(seed: int) -> object:
        return total_unintended(bits, bits + 3, bits, bits, 16, seed=seed).memorization

    assert interval(1) == interval(1)
    assert interval(1) != interval(2)


def test_one_document_has_no_interval() -> None:
    """Fails if one document gets an interval of width 0."""
    found = total_unintended([1.0, 2.0], [3.0, 3.0], [3.0], [3.0], 4, documents=[7, 7])
    assert (found.unintended.low, found.net.high, found.held_out.low) == (None, None, None)
    assert found.net.estimate == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0, 2.0]), r"of the same sequences, .* shapes \(1,\) and \(2,\)"),
        (([[1.0]], [[1.0]]), r"shapes \(1, 1\)"),
        (([], []), r"shapes \(0,\)"),
        (([1.0, math.nan], [1.0, 2.0]), "target_bits has 1 values not finite"),
        (([1.0], [math.inf]), "reference_bits has 1 values not finite"),
        (("text", [1.0]), "target_bits must be numbers"),
        (([1.0], [1.0], "minimum"), "code must be one of max, mixture, got 'minimum'"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:  # type: ignore[type-arg]
    """Fails if arrays that do not fit pass."""
    with pytest.raises(ValueError, match=message):
        unintended_bits(*arguments)


def test_bad_documents() -> None:
    """Fails if documents of other sequences pass."""
    with pytest.raises(ValueError, match=r"documents must be one for each of 2 sequences"):
        total_unintended([1.0, 2.0], [1.0, 2.0], [1.0], [1.0], 4, documents=[1])
    with pytest.raises(ValueError, match="replicates must be from 2"):
        total_unintended([1.0], [1.0], [1.0], [1.0], 4, replicates=1)
    with pytest.raises(ValueError, match="paired draws documents of both sets: give both"):
        total_unintended([1, 2], [3, 3], [1], [3], 4, documents=[0, 1], paired=True)
