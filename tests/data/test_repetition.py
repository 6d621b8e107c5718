"""Repetition: canaries and duplicates against sets that are made row by row, and counted.

N sequences, S tokens a sequence, V vocabulary, R repeated sequences.
"""

from typing import Any

import numpy as np
import pytest
from cases.sequence_rule import LAST, U64, Array, order_reference

from fastmem import (
    CanarySequences,
    PrefixedSequences,
    RepeatedSequences,
    Sequences,
    UniformSequences,
    WeightedSequences,
    repeated,
    zipf,
)

BASE = UniformSequences(90, 6, 50, seed=3, start=7)
CANARIES = UniformSequences(5, 6, 32, seed=4)
SPICED = CanarySequences(BASE, CANARIES, times=4, seed=2**63 + 1)
DOUBLED = repeated(BASE, 0.2, 3, seed=5)
NESTED = CanarySequences(SPICED, CANARIES.held_out(2), times=7, seed=1)
SETS = [
    SPICED,
    DOUBLED,
    NESTED,
    CanarySequences(DOUBLED, repeated(CANARIES, 0.5, 2), times=3),
    CanarySequences(WeightedSequences(90, 6, zipf(50)), CANARIES, times=1),
    repeated(BASE, 1, 2),
    PrefixedSequences(DOUBLED, 2),
]


def built(sequences: Sequences) -> Array:
    """The rows of a set with repetitions, by its definition from the rows of its parts."""
    if isinstance(sequences, CanarySequences):
        canaries, base = built(sequences.canaries), built(sequences.base)
        ranked = [canaries[q % len(canaries)] for q in range(len(canaries) * sequences.times)]
    elif isinstance(sequences, RepeatedSequences):
        base, first = built(sequences.base), sequences.first
        ranked = [base[q % first] for q in range(first * sequences.times)]
        base = base[first:]
    else:
        return sequences[:].astype(np.int64)
    ranked += list(base)
    return np.array([ranked[q] for q in order_reference(sequences.seed, LAST, len(ranked))])


@pytest.mark.parametrize("sequences", SETS[:-1], ids=lambda s: f"{s.kind}-{s.count}")
def test_rows_are_those_of_the_definition(sequences: Sequences) -> None:
    """Fails if any way to index gives a misplaced, lost or foreign row."""
    whole = built(sequences)
    assert sequences.count == len(whole)
    for dtype in (None, np.uint16, np.uint32, np.int32, np.int64):
        np.testing.assert_array_equal(sequences.tokens(slice(None), dtype), whole)
    for threads in (1, 2, 7):
        np.testing.assert_array_equal(sequences.tokens(slice(None), threads=threads), whole)
    for a, b in ((0, 10), (10, 11), (50, 200), (30, 30)):
        np.testing.assert_array_equal(sequences[a:b], whole[a:b])
    np.testing.assert_array_equal(sequences[::-7], whole[::-7])
    rows = np.array([3, 80, 0, 80, 41], np.uint8)
    np.testing.assert_array_equal(sequences[rows], whole[rows])
    for i in (0, 5, 77, -1):
        np.testing.assert_array_equal(sequences[i], whole[i])


@pytest.mark.parametrize("sequences", SETS, ids=lambda s: f"{s.kind}-{s.count}")
def test_copies_and_entropy_are_what_is_counted(sequences: Sequences) -> None:
    """Fails if copies differ from the copies counted, or entropy counts a row twice.

    Sequences are too long to be equal by chance, so the distinct rows are the rows of the parts.
    """
    whole = sequences[:]
    distinct, place, count = np.unique(whole, axis=0, return_inverse=True, return_counts=True)
    copies = count[place.ravel()]
    np.testing.assert_array_equal(sequences.copies(), copies)
    np.testing.assert_array_equal(sequences.copies([3, 1, 3]), copies[[3, 1, 3]])
    np.testing.assert_array_equal(sequences.copies(slice(50, 2, -3)), copies[50:2:-3])
    assert sequences.copies(-1).shape == ()
    assert sequences.copies(-1) == copies[-1]
    assert (1 / sequences.copies()).sum() == pytest.approx(len(distinct))


def test_entropy_of_canaries_and_duplicates() -> None:
    """Fails if a repetition adds entropy, or a canary is counted in the base's vocabulary."""
    H = float(np.log2(50))
    assert SPICED.entropy_bits == pytest.approx(90 * 6 * H + 5 * 6 * 5)
    assert SPICED.coded_entropy_bits == pytest.approx(90 * 5 * H + 5 * 5 * 5)
    assert NESTED.entropy_bits == pytest.approx(90 * 6 * H + 7 * 6 * 5)
    assert DOUBLED.entropy_bits == BASE.entropy_bits
    assert DOUBLED.coded_entropy_bits == BASE.coded_entropy_bits
    assert PrefixedSequences(DOUBLED, 2).coded_entropy_bits == pytest.approx(90 * 4 * H)


@pytest.mark.parametrize(
    ("sequences", "alike"), [(SPICED, CANARIES), (DOUBLED, BASE), (NESTED, NESTED.canaries)]
)
def test_places_are_where_repeated_sequences_stand(sequences: Any, alike: Sequences) -> None:
    """Fails if a place is wrong, missing or out of order."""
    places = sequences.places
    whole = sequences[:]
    assert places.dtype == U64
    for j, row in enumerate(places):
        expected = np.flatnonzero((whole == alike[j]).all(1))
        np.testing.assert_array_equal(row, expected)
        assert len(row) == sequences.times
    assert len(places) == (5 if sequences is SPICED else 18 if sequences is DOUBLED else 2)


def test_places_depend_on_the_seed_and_spread() -> None:
    """Fails if places ignore the seed or cluster: means within 4 standard errors."""
    base = UniformSequences(9000, 4, 2048)
    all_places = [
        CanarySequences(base, base.held_out(10), times=100, seed=seed).places for seed in range(20)
    ]
    assert len({places.tobytes() for places in all_places}) == 20
    places = np.array(all_places, np.float64)
    error = 10_000 / np.sqrt(12 * places.size)
    assert abs(places.mean() - 4999.5) < 4 * error


FRACTIONS = [(0.5, 5), (0.25, 3), (0.05, 1), (1, 10), (1 / 3, 3), (np.float32(0.5), 5)]


@pytest.mark.parametrize(("fraction", "first"), FRACTIONS)
def test_a_fraction_is_rounded_to_whole_sequences(fraction: float, first: int) -> None:
    """Fails if a fraction is rounded down, or its old name `share` makes another set."""
    base = UniformSequences(10, 4, 2048)
    sequences = repeated(base, fraction, times=3)
    assert sequences.first == first
    assert sequences.count == 10 + 2 * first
    assert repeated(base, fraction=fraction, times=3) == sequences
    assert repeated(base, share=fraction, times=3) == sequences
    assert repeated(base, fraction, 3, 0) == sequences


def test_the_largest_repeated_set() -> None:
    """Fails if the count of a repeated set wraps."""
    assert repeated(UniformSequences(2**63, 4, 2048), 1, 2).count == 2**64


def test_sets_as_large_as_can_be() -> None:
    """Fails if a count of 2**64 wraps anywhere."""
    base = UniformSequences(2**64 - 12, 4, 2048)
    canaries = UniformSequences(4, 4, 2048, seed=1)
    for sequences in (
        CanarySequences(base, canaries, times=3),
        repeated(UniformSequences(2**63, 4, 2048), 1, 2),
        RepeatedSequences(UniformSequences(2**64 - 6, 4, 2048), first=3, times=3),
    ):
        assert sequences.count == 2**64
        assert sequences[-2:].shape == (2, 4)
        ends = np.concatenate([sequences[-1:], sequences[:1]])
        np.testing.assert_array_equal(sequences[[LAST, 0]], ends)
    spiced = CanarySequences(base, canaries, times=3)
    np.testing.assert_array_equal(spiced[spiced.places[2]], canaries[[2, 2, 2]])
    assert spiced.copies(spiced.places[2]).tolist() == [3, 3, 3]


def test_held_out_sequences_are_not_in_the_set() -> None:
    """Fails if held-out data is in the set, or the canaries that follow a base are held out."""
    for sequences in (SPICED, DOUBLED, NESTED):
        held_out = sequences.held_out(50)
        assert held_out == BASE.held_out(50)
        both = np.concatenate([sequences[:], held_out[:]])
        assert len(np.unique(both, axis=0)) == len(np.unique(sequences[:], axis=0)) + 50
    follow = CanarySequences(BASE, BASE.held_out(4), times=2)
    with pytest.raises(ValueError, match="after the base are the canaries; give another seed"):
        follow.held_out(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CanarySequences(BASE, BASE, 2), "canaries must not be sequences of the base"),
        (lambda: CanarySequences(DOUBLED, BASE.held_out(1), 2).held_out(1), "are the canaries"),
        (
            lambda: CanarySequences(BASE, UniformSequences(4, 6, 2, 3, start=96), 2),
            "give them another seed",
        ),
        (
            lambda: CanarySequences(SPICED, CANARIES, 2),
            "canaries must not be sequences of the base",
        ),
        (
            lambda: CanarySequences(BASE, UniformSequences(4, 7, 50), 2),
            "as long as the base, got 7 and 6 tokens; make them 6",
        ),
        (
            lambda: CanarySequences(BASE, UniformSequences(4, 6, 51), 2),
            "the base's vocabulary of 50, got 51",
        ),
        (
            lambda: CanarySequences(PrefixedSequences(BASE, 2), CANARIES, 2),
            r"no prefix, got 2 and 1 tokens; prefix the set with canaries",
        ),
        (lambda: CanarySequences(BASE, CANARIES, 0), "times must be from 1"),
        (lambda: CanarySequences(BASE, CANARIES, 2.0), "times must be an integer"),
        (lambda: CanarySequences(BASE, CANARIES, 2, seed=-1), "seed must be from 0"),
        (lambda: CanarySequences(BASE, CANARIES, 2**63), r"at most 2\*\*64 sequences, got 4611.*"),
        (lambda: CanarySequences(BASE, CANARIES[:], 2), "canaries must be a set of sequences"),
        (lambda: CanarySequences(None, CANARIES, 2), "base must be a set of sequences, got None"),
        (lambda: repeated(SPICED, 0.5, 2), "must not repeat sequences itself, got CanarySeq"),
        (
            lambda: repeated(PrefixedSequences(DOUBLED, 2), 0.5, 2),
            "got PrefixedSequences",
        ),
        (
            lambda: repeated(BASE, 0.5, 2, share=0.5),
            "fraction must be given, .* not both, got 0.5 and 0.5; pass fraction=0.1",
        ),
        (lambda: repeated(BASE, times=2), "not both, got None and None; pass fraction=0.1"),
        (lambda: repeated(BASE, 0.5), "times must be an integer from 2 to .*, got None"),
        (lambda: repeated(BASE, share=2, times=2), "fraction must be above 0 .*, got 2; 0.1 is a"),
        (lambda: repeated(BASE, 0, 2), "fraction must be above 0 and at most 1, got 0"),
        (lambda: repeated(BASE, 1.01, 2), "got 1.01"),
        (lambda: repeated(BASE, float("nan"), 2), "got nan"),
        (lambda: repeated(BASE, "1", 2), "got '1'"),
        (lambda: repeated(BASE, True, 2), "got True"),
        (lambda: repeated(BASE, 0.001, 2), "fraction must be at least half of 1 / 90, got 0.001"),
        (lambda: repeated(BASE, 0.5, 1), "times must be from 2"),
        (lambda: repeated(BASE, 0.5, -3), "times must be from 2"),
        (lambda: repeated(BASE, 0.5, 2**63), r"at most 2\*\*64 sequences"),
        (lambda: repeated([1], 0.5, 2), r"base must be a set of sequences, got \[1\]"),
        (lambda: RepeatedSequences(BASE, 91, 2), "first must be from 1 to 90, got 91"),
        (lambda: SPICED[[1.0]], "of float64; use"),
        (lambda: SPICED.copies([1.0]), "of float64; use"),
        (lambda: SPICED.copies(None), "of object"),
    ],
)
def test_bad_calls_name_what_is_wrong(call: Any, message: str) -> None:
    """Fails if a mistake passes, or its message lacks the value or the fix."""
    with pytest.raises(ValueError, match=message):
        call()


def test_indices_outside_the_set() -> None:
    """Fails if a row outside the set is made or looked up."""
    for sequences in SETS:
        for wrong in (sequences.count, -sequences.count - 1, [-1], [0, sequences.count]):
            with pytest.raises(IndexError, match=f"outside this set of {sequences.count}"):
                sequences[wrong]
            with pytest.raises(IndexError, match=f"outside this set of {sequences.count}"):
                sequences.copies(wrong)
