"""Blind baselines: how well texts alone tell members from non-members, without any model."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastmem.base.stats import Floats, Interval
from fastmem.memorization.roc import checked, roc

YEAR = re.compile(r"\b(?:1[5-9]|20)\d\d\b")
FOLDS = 5
TREES = 100


def blind_baselines(
    texts: Sequence[str], labels: ArrayLike, *, seed: int = 0
) -> dict[str, Interval]:
    """The AUC of classifiers that see the texts and never the model, with 95 % intervals.

    Members and non-members of a good benchmark have the same distribution, and every AUC is 0.5.
    An AUC above 0.5 means that membership scores may detect this text difference instead of
    training.

    - bag_of_words: logistic regression on the TF-IDF of words in at least two texts.
    - date_length: a random forest on the years in a text (first, last, mean, how many) and on its
      length (characters, words, lines, characters a word).

    Scores are out of fold (5 folds of both classes), and the interval is the bootstrap of `roc`.
    Works on texts of token ids in decimal too.

    Args:
        texts: N texts.
        labels: (N,) true (1) for members, false (0) for non-members.
        seed: of the folds and the forest.

    Raises:
        ValueError: as `roc`; a text for some sequences only, or scikit-learn not installed.

    Example:
        >>> old = [f"In {1900 + i} the war." for i in range(30)]
        >>> new = [f"In {2000 + i % 20} the phone." for i in range(30)]
        >>> auc = blind_baselines(old + new, [1] * 30 + [0] * 30)
        >>> {name: interval.estimate > 0.9 for name, interval in auc.items()}
        {'bag_of_words': True, 'date_length': True}

    Source: arXiv 2406.16201 (dates, bag of words) and arXiv 2406.17975 (bag of words).
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError("texts must be a list of str: pass one text for each label")
    _, is_member = checked(np.zeros(len(texts)), labels)
    try:
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise ValueError(
            "blind baselines need scikit-learn, which is not installed: pip install "
            "'fastmem-lm[text]'"
        ) from None
    words = TfidfVectorizer(token_pattern=r"\w+", min_df=2, sublinear_tf=True)
    forest = RandomForestClassifier(TREES, min_samples_leaf=5, random_state=seed)
    baselines: dict[str, tuple[Any, Any]] = {
        "bag_of_words": (make_pipeline(words, LogisticRegression(max_iter=1000)), list(texts)),
        "date_length": (forest, _features(texts)),
    }
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    results = {}
    for name, (model, inputs) in baselines.items():
        scores = cross_val_predict(model, inputs, is_member, cv=folds, method="predict_proba")[:, 1]
        results[name] = roc(scores, is_member, seed=seed).auc
    return results


def blind_warning(baselines: dict[str, Interval]) -> str | None:
    """One line if a blind baseline is above chance, None if no interval lies above 0.5.

    Example:
        >>> blind_warning({"bag_of_words": Interval(0.93, 0.9, 0.96)})
        'members and non-members differ without any model (bag_of_words: AUC 0.93): no score shows \
membership unless it beats that'
    """
    above = [(n, b) for n, b in baselines.items() if b.low is not None and b.low > 0.5]
    if not above:
        return None
    name, best = max(above, key=lambda item: item[1].estimate)
    return (
        f"members and non-members differ without any model ({name}: AUC {best.estimate:.2f}): no "
        "score shows membership unless it beats that"
    )


def _features(texts: Sequence[str]) -> Floats:
    """(N, 8) years and lengths of each text; years are 0 where there are none."""
    rows = []
    for text in texts:
        years = [int(year) for year in YEAR.findall(text)] or [0]
        words = text.split()
        letters = sum(map(len, words)) / max(1, len(words))
        lengths = [len(text), len(words), text.count("\n"), letters]
        rows.append([min(years), max(years), np.mean(years), len(years) * (years[0] > 0), *lengths])
    return np.asarray(rows, dtype=np.float64)
