"""Blind baselines on texts that differ, and on texts that do not."""

import sys

import numpy as np
import pytest

import fastmem

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def texts(count: int, year: int, extra: str = "", seed: int = 0) -> list[str]:
    """Random words of 20 to 40, with a year around `year`."""
    rng = np.random.default_rng(seed)
    return [
        " ".join([*rng.choice(WORDS, rng.integers(20, 40)), extra, str(year + rng.integers(8))])
        for _ in range(count)
    ]


def test_texts_of_one_kind_are_chance() -> None:
    """Fails if a baseline sees labels it should predict: folds that leak are far above 0.5."""
    pytest.importorskip("sklearn")
    found = fastmem.blind_baselines(texts(200, 1990, seed=1), np.arange(200) % 2)
    for interval in found.values():
        assert interval.low is not None
        assert interval.low < 0.5
        assert interval.estimate < 0.6
    assert fastmem.blind_warning(found) is None


@pytest.mark.parametrize(
    ("year", "extra", "best"), [(2015, "", "date_length"), (1990, "covid", "bag_of_words")]
)
def test_texts_that_differ_are_found(year: int, extra: str, best: str) -> None:
    """Fails if dates or words that separate the two sets give no warning."""
    pytest.importorskip("sklearn")
    both = [*texts(60, 1990), *texts(60, year, extra, seed=1)]
    found = fastmem.blind_baselines(both, np.repeat([1, 0], 60))
    assert found[best].estimate > 0.95
    assert f"({best}: AUC" in str(fastmem.blind_warning({best: found[best]}))


def test_the_warning_is_about_the_interval() -> None:
    """Fails if an AUC above 0.5 whose interval holds 0.5 warns, or the best is not named."""
    unsure = fastmem.Interval(0.55, 0.49, 0.61)
    assert fastmem.blind_warning({"bag_of_words": unsure}) is None
    both = {"bag_of_words": fastmem.Interval(0.7, 0.6, 0.8), "date_length": unsure}
    assert "(bag_of_words: AUC 0.70)" in str(fastmem.blind_warning(both))


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a single str, labels of one class or a missing scikit-learn is not said."""
    with pytest.raises(ValueError, match="texts must be a list of str: pass one text for each"):
        fastmem.blind_baselines("a text", [1])
    with pytest.raises(ValueError, match="40 members and 0 non-members: give at least 20 of each"):
        fastmem.blind_baselines(["a"] * 40, np.ones(40))
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(ValueError, match=r"need scikit-learn.* install 'fastmem-lm\[text\]'"):
        fastmem.blind_baselines(["a"] * 40, np.arange(40) % 2)
