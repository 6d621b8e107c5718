"""Two sets as one: rows, held-out sequences, descriptions, bad input."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from fastmem import PrefixedSequences, UniformSequences, from_description, prepare_text, repeated
from fastmem.data.joined import JoinedSequences

FIRST = UniformSequences(40, 6, 50, seed=1)
SECOND = UniformSequences(5, 6, 32, seed=2)
BOTH = JoinedSequences(FIRST, SECOND)


def test_rows() -> None:
    """Fails if a slice, an index or an array gives another row, at the border too."""
    whole = np.concatenate([FIRST[:], SECOND[:]])
    assert (BOTH.count, BOTH.length, BOTH.vocab) == (45, 6, 50)
    for indices in (
        slice(None),
        slice(38, 42),
        slice(44, 0, -3),
        [0, 44, 39, 40, 40],
        range(39, 41),
    ):
        expected = whole[list(indices) if isinstance(indices, range) else indices]
        np.testing.assert_array_equal(BOTH[indices], expected)
    np.testing.assert_array_equal(BOTH[-1], SECOND[4])
    assert BOTH.tokens([40], np.int64).dtype == np.int64
    assert BOTH.to_torch(indices=[3, 41]).tolist() == whole[[3, 41]].tolist()
    assert BOTH.coded_entropy_bits == FIRST.coded_entropy_bits + SECOND.coded_entropy_bits


def test_copies() -> None:
    """Fails if repeated sequences of a part count once."""
    twice = repeated(SECOND, 1, 2)
    assert JoinedSequences(FIRST, twice).copies([39, 40, 49]).tolist() == [1, 2, 2]


def test_description(tmp_path: Path) -> None:
    """Fails if a joined set of text is not made again from its description, or from a pickle."""
    corpus = prepare_text([f"{i} is a text" * 9 for i in range(40)], tmp_path / "c", length=6)
    for both in (BOTH, JoinedSequences(corpus.train.sample(9, 1), SECOND)):
        assert from_description(both.description()) == both
        assert pickle.loads(pickle.dumps(both)) == both
    with pytest.raises(ValueError, match="of 46 sequences has parts of 45"):
        from_description(BOTH.description() | {"count": 46})


def test_held_out() -> None:
    """Fails if held-out sequences are members, or the second part grows with the first."""
    held_out = BOTH.held_out(25)
    np.testing.assert_array_equal(held_out[:], [*FIRST.held_out(20)[:], *SECOND.held_out(5)[:]])
    with pytest.raises(ValueError, match="count must be above the 5 sequences of the second set"):
        BOTH.held_out(5)


def test_bad_sets() -> None:
    """Fails if sets that do not fit are joined."""
    with pytest.raises(ValueError, match="share sequences"):
        JoinedSequences(FIRST, UniformSequences(3, 6, 50, seed=1, start=39))
    with pytest.raises(ValueError, match=r"lengths 6 and 7"):
        JoinedSequences(FIRST, UniformSequences(3, 7, 50, seed=3))
    with pytest.raises(ValueError, match="prefixes of 2 and 1 tokens"):
        JoinedSequences(PrefixedSequences(FIRST, 2), SECOND)
    with pytest.raises(ValueError, match="vocabulary of 50, and first of 32"):
        JoinedSequences(SECOND, FIRST)
    with pytest.raises(ValueError, match="second must be a set of sequences"):
        JoinedSequences(FIRST, [1, 2])  # type: ignore[arg-type]
