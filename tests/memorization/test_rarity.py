"""TF-IDF and its correlation with memorized bits against slow code."""

import math
import random
import re

import numpy as np
import pytest
from scipy.stats import spearmanr

from fastmem.memorization.rarity import rarity, rarity_correlation, scripts


def test_rarity_is_the_mean_idf() -> None:
    """Fails if a word's weight or the mean over words is another."""
    rng = random.Random(0)
    words = ["the", "The", "x1", "==", "(", "да", "  ", "\n", "naïve"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(9))) for _ in range(60)]
    split = [re.findall(r"\w+|[^\w\s]+", text) for text in texts]
    for found, own in zip(rarity(texts), split, strict=True):
        idf = [math.log(61 / (1 + sum(word in other for other in split))) + 1 for word in own]
        assert found == pytest.approx(sum(idf) / len(idf) if idf else math.nan, nan_ok=True)


def test_texts_without_words() -> None:
    """Fails if white space alone is an error or a number."""
    assert np.isnan(rarity([" ", "\n"])).all()


def test_correlation_among_the_memorized() -> None:
    """Fails if sequences without memorized bits or words count, or rho is not Spearman's."""
    rng = np.random.default_rng(0)
    rare = rng.normal(size=200).round(1)  # with ties
    bits = np.maximum(0, rare + rng.normal(size=200))
    rare[:5] = np.nan
    documents = rng.integers(40, size=200)
    inside = (bits > 0) & ~np.isnan(rare)
    rho, n = rarity_correlation(rare, bits, documents, replicates=300, seed=2)
    assert n == inside.sum()
    assert rho is not None
    assert rho.estimate == pytest.approx(spearmanr(rare[inside], bits[inside]).statistic)
    again = np.random.default_rng(2)
    a, b, groups = rare[inside], bits[inside], documents[inside]
    names, slow = np.unique(groups), []
    for _ in range(300):
        drawn = names[again.integers(len(names), size=len(names))]
        rows = np.concatenate([np.flatnonzero(groups == one) for one in drawn])
        slow.append(spearmanr(a[rows], b[rows]).statistic)
    assert (rho.low, rho.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))
    assert rho == rarity_correlation(rare, bits, documents, replicates=300, seed=2)[0]


def test_too_few() -> None:
    """Fails if two sequences, or constant bits, have a correlation."""
    assert rarity_correlation([1.0, 2.0, 3.0], [1.0, 1.0, 0.0]) == (None, 2)
    assert rarity_correlation([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == (None, 3)
    rho, _ = rarity_correlation([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], documents=[4, 4, 4])
    assert rho is not None
    assert rho.estimate == pytest.approx(0.5)
    assert rho.low is None
    with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(1,\)"):
        rarity_correlation([1.0, 2.0], [1.0])


def test_scripts() -> None:
    """Fails if a text has another script than most of its letters."""
    texts = ["abc d", "1 + 1", "日本語 text", "ひらがな", "мир x", "naïve"]
    assert scripts(texts) == ["LATIN", "", "LATIN", "HIRAGANA", "CYRILLIC", "LATIN"]
