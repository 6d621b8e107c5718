"""fastmem.data.structure: weighted and prefixed sets against the rule and against what is counted.

N sequences, S tokens a sequence, V vocabulary, P tokens of a prefix.
"""

import json
import math
from typing import Any

import numpy as np
import pytest
from cases.sequence_rule import LAST, chi_square_sigmas, tokens_reference

from fastmem import (
    CanarySequences,
    PrefixedSequences,
    Sequences,
    UniformSequences,
    WeightedSequences,
    Weights,
    from_description,
    repeated,
    zipf,
)

WEIGHTS = [
    Weights([1]),
    Weights([0, 1, 0]),
    Weights([1, 1, 2, 0, 0]),
    Weights([2**31, 1, 0, 2**30]),
    zipf(2048, 1.0),
    zipf(300, 0.0),
]


# Weighted


def test_golden_weighted_tokens() -> None:
    """Fails if the weighted rule drifts, even where the core and the reference drift together."""
    sequences = WeightedSequences(2, 6, zipf(50257, 1.1), seed=2**63 + 5, start=2**40 - 1)
    assert sequences[:].tolist() == [
        [35442, 0, 1, 47254, 3, 0],
        [5, 7, 7, 0, 10, 2045],
    ]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_weighted_tokens_are_the_rule(weights: Weights, length: int) -> None:
    """Fails on any wrong token, at the edges of seed and index, in any dtype."""
    for seed, start in [(0, 0), (LAST, 2**64 - 17), (2**32, 2**32 - 8)]:
        sequences = WeightedSequences(17, length, weights, seed, start)
        indices = [start + i for i in range(17)]
        right = tokens_reference(seed, indices, length, weights.vocab, weights.cumulative)
        for dtype in (np.uint16, np.uint32, np.int32, np.int64):
            np.testing.assert_array_equal(sequences.tokens(slice(None), dtype), right)
            np.testing.assert_array_equal(sequences.tokens([9, 0], dtype), right[[9, 0]])


@pytest.mark.parametrize("weights", [Weights([3, 0, 1, 0, 4, 0]), zipf(200, 1.0)], ids=str)
def test_weighted_tokens_are_as_frequent_as_they_weigh(weights: Weights) -> None:
    """Fails if frequencies or entropy differ from the weights; fixed seed, 4 sigmas."""
    sequences = WeightedSequences(2**14, 32, weights, seed=3)
    tokens = sequences[:]
    seen = np.bincount(tokens.ravel(), minlength=weights.vocab)
    drawn = weights.probabilities > 0
    assert not seen[~drawn].any()
    assert abs(chi_square_sigmas(seen[drawn], weights.probabilities[drawn] * tokens.size)) < 4
    # The mean of -log2 p over the drawn tokens.
    bits = -np.log2(weights.probabilities, where=drawn, out=np.zeros(weights.vocab))[tokens]
    error = bits.std() / math.sqrt(bits.size)
    assert abs(bits.mean() - sequences.token_entropy_bits) < 4 * error


def test_threads_and_chunks_change_no_weighted_token() -> None:
    """Fails if a part of the work is misplaced, done twice or lost."""
    sequences = WeightedSequences(2**14, 65, zipf(300, 1.0), seed=9, start=77)
    whole = sequences.tokens(slice(None), threads=1)
    rows = np.arange(sequences.count)[::-1]
    for threads in (2, 7):
        np.testing.assert_array_equal(sequences.tokens(slice(None), threads=threads), whole)
        np.testing.assert_array_equal(sequences.tokens(rows, threads=threads), whole[::-1])
    chunks = [sequences[a : a + 1001] for a in range(0, sequences.count, 1001)]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_weighted_entropy_and_held_out() -> None:
    """Fails on a wrong unit, S for S - 1, or other weights or numbers of held-out sequences."""
    sequences = WeightedSequences(10, 8, [1, 1, 2], seed=4, start=50)
    assert sequences.vocab == 3
    assert sequences.token_entropy_bits == 1.5
    assert sequences.sequence_entropy_bits == 8 * 1.5
    assert sequences.entropy_bits == 10 * 8 * 1.5
    assert sequences.coded_entropy_bits == 10 * 7 * 1.5
    assert sequences.held_out(5) == WeightedSequences(5, 8, Weights([2, 2, 4]), seed=4, start=60)
    assert WeightedSequences(10, 8, [0, 5]).entropy_bits == 0


# Prefixed

BASE = UniformSequences(200, 8, 16, seed=3)


@pytest.mark.parametrize("prefix", [1, 3, 7])
@pytest.mark.parametrize(
    "base",
    [BASE, WeightedSequences(50, 8, zipf(30, 1.0)), repeated(BASE, 0.5, 3)],
    ids=lambda base: base.kind,
)
def test_a_prefix_replaces_the_first_tokens(base: Sequences, prefix: int) -> None:
    """Fails if the prefix is not shared by all rows, or touches the tokens behind it."""
    sequences = PrefixedSequences(base, prefix, seed=1)
    whole = sequences[:]
    assert whole.shape == (base.count, 8)
    np.testing.assert_array_equal(whole[:, prefix:], base[:][:, prefix:])
    assert len(np.unique(whole[:, :prefix], axis=0)) == 1
    np.testing.assert_array_equal(sequences[[7, 0]], whole[[7, 0]])
    np.testing.assert_array_equal(sequences[-1], whole[-1])
    np.testing.assert_array_equal(sequences.tokens(slice(9, 2, -3), np.int64), whole[9:2:-3])
    np.testing.assert_array_equal(sequences.copies(), base.copies())


def test_prefixes_are_drawn_as_the_tokens_are() -> None:
    """Fails if a prefix has another distribution, or ignores its seed. 4 sigmas."""
    base = WeightedSequences(1, 65, [1, 2, 1, 0])
    prefixes = [PrefixedSequences(base, 64, seed)[0][:64] for seed in range(200)]
    seen = np.bincount(np.concatenate(prefixes), minlength=4)
    assert seen[3] == 0
    assert abs(chi_square_sigmas(seen[:3] / np.array([1, 2, 1]), 200 * 16)) < 4
    assert len(np.unique(prefixes, axis=0)) == 200


def test_the_entropy_of_a_prefix_counts_once() -> None:
    """Fails if the prefix is counted for each sequence, or as coded."""
    sequences = PrefixedSequences(BASE, 3, seed=1)
    assert sequences.context == 3
    assert sequences.entropy_bits == 200 * 5 * 4 + 3 * 4
    assert sequences.coded_entropy_bits == 200 * 5 * 4
    doubled = PrefixedSequences(repeated(BASE, 1, 2), 3, seed=1)
    assert doubled.count == 400
    assert doubled.entropy_bits == sequences.entropy_bits
    assert doubled.coded_entropy_bits == sequences.coded_entropy_bits
    canaries = CanarySequences(BASE, WeightedSequences(5, 8, [1, 1, 2], seed=9), times=2)
    assert PrefixedSequences(canaries, 3).entropy_bits == 200 * 5 * 4 + 5 * 5 * 1.5 + 3 * 4


def test_held_out_sequences_have_the_same_prefix() -> None:
    """Fails if the prefix distinguishes members, or held-out data shares more than the prefix."""
    sequences = PrefixedSequences(BASE, 3, seed=1)
    held_out = sequences.held_out(100)
    assert held_out.count == 100
    np.testing.assert_array_equal(held_out[:][:, :3], sequences[:100][:, :3])
    np.testing.assert_array_equal(held_out[:][:, 3:], BASE.held_out(100)[:][:, 3:])


# Descriptions


@pytest.mark.parametrize(
    "sequences",
    [
        UniformSequences(5, 8, 50257, seed=LAST, start=2**63),
        WeightedSequences(5, 8, zipf(50257, 1.1), seed=LAST, start=7),
        WeightedSequences(5, 8, [0.1, 0, 0.7, 0], seed=1),
        PrefixedSequences(BASE, 3, seed=LAST),
        PrefixedSequences(WeightedSequences(5, 8, zipf(9)), 3),
        CanarySequences(BASE, BASE.held_out(4), times=3, seed=LAST),
        CanarySequences(BASE, WeightedSequences(5, 8, [1, 2]), times=1),
        repeated(BASE, 0.25, 4, seed=8),
        PrefixedSequences(CanarySequences(repeated(BASE, 0.1, 2), BASE.held_out(4), 3), 2),
    ],
    ids=lambda sequences: sequences.kind,
)
def test_a_description_makes_the_same_set(sequences: Sequences) -> None:
    """Fails if a kind loses a number in JSON, or an altered or foreign description passes."""
    description = json.loads(json.dumps(sequences.description(), allow_nan=False))
    again = from_description(description)
    assert again == sequences
    assert hash(again) == hash(sequences)
    assert repr(again) == repr(sequences)
    np.testing.assert_array_equal(again[:], sequences[:])
    assert again.entropy_bits == sequences.entropy_bits
    for name in description.keys() - {"kind"}:
        with pytest.raises(ValueError, match=f"lacks {name}; its fields are kind, generator"):
            from_description({k: v for k, v in description.items() if k != name})
    with pytest.raises(ValueError, match="has an unknown more; its fields"):
        from_description(description | {"more": 1})
    with pytest.raises(ValueError, match="generator must be philox4x32-10/1, got 'mt19937'"):
        from_description(description | {"generator": "mt19937"})
    with pytest.raises(ValueError, match=r"must be|from 0 to"):
        from_description(description | {"seed": -1})


@pytest.mark.parametrize(
    "wrong", [{}, {"kind": "poem"}, {"kind": None}, {"kind": []}, None, "x", 3]
)
def test_values_that_are_not_descriptions(wrong: Any) -> None:
    """Fails if another value makes a set, or the error does not list the kinds."""
    with pytest.raises(ValueError, match=r"kind must be one of canaries, .*uniform, weighted, got"):
        from_description(wrong)


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WeightedSequences(0, 4, [1]), "count must be from 1"),
        (lambda: WeightedSequences(5, 4, [1], start=LAST), r"\+ 5; .* at most 1 "),
        (lambda: WeightedSequences(5, 4.0, [1]), "length must be an integer"),
        (lambda: WeightedSequences(5, 4, [-1, 2]), "got -1 for token 0"),
        (lambda: WeightedSequences(5, 4, [0, 0]), "all 0"),
        (lambda: WeightedSequences(5, 4, zipf(65537)).tokens(0, "u2"), "65536, got 65537"),
        (lambda: PrefixedSequences(BASE, 0), "prefix must be from 1 to 7, got 0"),
        (lambda: PrefixedSequences(BASE, 8), "prefix must be from 1 to 7, got 8"),
        (lambda: PrefixedSequences(BASE, 2.0), "prefix must be an integer"),
        (lambda: PrefixedSequences(BASE, 2, -1), "seed must be from 0"),
        (lambda: PrefixedSequences(UniformSequences(4, 1, 16), 1), "base has length 1"),
        (lambda: PrefixedSequences(PrefixedSequences(BASE, 2), 3), "has a prefix of 2 tokens"),
        (lambda: PrefixedSequences(BASE[:], 2), "base must be a set of sequences"),
        (lambda: PrefixedSequences(BASE, 2).held_out(0), "count must be from 1"),
    ],
)
def test_bad_calls_name_what_is_wrong(call: Any, message: str) -> None:
    """Fails if a mistake passes, or its message lacks the value or the fix."""
    with pytest.raises(ValueError, match=message):
        call()
