"""What is memorized most: rarity of words, scripts, and their correlation with memorized bits."""

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmem.base.arguments import numbers
from fastmem.base.stats import Floats, Interval, percentile_interval
from fastmem.memorization.unintended import numbered

_WORD = r"\w+|[^\w\s]+"


def rarity(texts: Sequence[str]) -> Floats:
    """TF-IDF of each text: the mean over its words of idf(word) = ln((1 + N) / (1 + n)) + 1.

    n of the N texts have the word. A word is a run of letters, digits and underscores, or a run of
    other visible characters; case counts. A text without words has nan.

    Raises:
        ValueError: scikit-learn is not installed.

    Example:
        >>> rarity(["a b", "a a a c", " "]).round(3)
        array([1.49 , 1.389,   nan])

    Source: arXiv 2505.24832, section 4; scikit-learn's TfidfTransformer (smooth_idf).
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise ValueError(
            "rarity needs scikit-learn, which is not installed: pip install 'fastmem-lm[text]'"
        ) from None
    vectorizer = TfidfVectorizer(token_pattern=_WORD, lowercase=False, norm=None)
    try:
        weighted = vectorizer.fit_transform(texts)
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        return np.full(len(texts), np.nan)
    words = weighted.copy()
    words.data = weighted.data / vectorizer.idf_[weighted.indices]
    total, n = np.asarray(weighted.sum(1)).ravel(), np.asarray(words.sum(1)).ravel()
    out = np.full(len(texts), np.nan)
    return np.asarray(np.divide(total, n, out=out, where=n > 0))


def rarity_correlation(
    rarity: ArrayLike,
    unintended_bits: ArrayLike,
    documents: ArrayLike | None = None,
    replicates: int = 1000,
    seed: int = 0,
) -> tuple[Interval | None, int]:
    """Spearman's rho of rarity and bits among sequences with unintended memorization above 0.

    Args:
        rarity: (N,), nan where a sequence is to be left out.
        unintended_bits: (N,)
        documents: (N,) any integers; None: each sequence is a document.
        replicates: of the bootstrap over documents that gives the interval of 95 %.
        seed: of the bootstrap.

    Returns:
        Rho, None for fewer than three sequences or constant values; and the number of sequences.

    Raises:
        ValueError: the arrays have different shapes.

    Example:
        >>> rho, n = rarity_correlation([1.0, 3.0, 2.0, 9.0], [5.0, 7.0, 6.0, 0.0])
        >>> rho.estimate, n
        (1.0, 3)
    """
    a, b = numbers("rarity", rarity), numbers("unintended_bits", unintended_bits)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"rarity and unintended_bits must be (N,) both, got shapes {a.shape} and {b.shape}"
        )
    groups, inside = numbered("documents", documents, a.size), (b > 0) & np.isfinite(a)
    a, b = a[inside], b[inside]
    groups = np.unique(groups[inside], return_inverse=True)[1]
    if a.size < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None, a.size
    values = [np.unique(one, return_inverse=True)[1] for one in (a, b)]
    estimate = _spearman(values, np.ones(a.size))
    G = int(groups.max()) + 1
    if G == 1:
        return Interval(estimate), a.size
    rng = np.random.default_rng(seed)
    drawn = (np.bincount(rng.integers(G, size=G), minlength=G) for _ in range(replicates))
    found = np.array([_spearman(values, times[groups].astype(np.float64)) for times in drawn])
    return percentile_interval(estimate, found[np.isfinite(found)]), a.size


def scripts(texts: Sequence[str]) -> list[str]:
    """The script of most letters of each text, by their Unicode names; "" without letters.

    Example:
        >>> scripts(["mostly Latin, мало", "да", "12 + 3"])
        ['LATIN', 'CYRILLIC', '']
    """
    return [_script(text) for text in texts]


def _script(text: str) -> str:
    if text.isascii():
        return "LATIN" if any(map(str.isalpha, text)) else ""
    names = (unicodedata.name(letter, "").partition(" ")[0] for letter in text if letter.isalpha())
    found = Counter(names).most_common(1)
    return found[0][0] if found else ""


def _spearman(values: list[NDArray[np.int64]], times: Floats) -> float:
    """Rho of two rows of values, numbered in their order, of which entry i occurs times[i] times.

    Mid-ranks are counted, not sorted, so that a replicate is linear. nan if a row is constant.
    """
    ranks = []
    for row in values:
        n = np.bincount(row, times)
        rank = (np.cumsum(n) - n / 2)[row]
        ranks.append(rank - times @ rank / times.sum())
    a, b = ranks
    with np.errstate(invalid="ignore", divide="ignore"):
        return float((times * a) @ b / np.sqrt((times * a) @ a * ((times * b) @ b)))
