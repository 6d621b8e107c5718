"""Extraction rates with intervals, from the table of sequences.

N sequences of a set, P tokens of a prefix.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastmem.base.stats import Floats, Interval, clopper_pearson, percentile_interval
from fastmem.base.storage import Row
from fastmem.memorization.extraction import extraction_probability
from fastmem.models.causal.sampling import Way
from fastmem.models.extraction.measure import PLAIN, Columns

NEAR = 0.1
"""Edit distance, as a fraction of the suffix, up to which a suffix is nearly exact."""

MIN_DOCUMENTS = 20
"""Documents below which windows of them have no interval."""
REPLICATES = 1000


def rates_of(
    columns: Columns,
    prefixes: Sequence[int],
    ways: Sequence[Way],
    samples: int,
    probability: float,
    windows: bool = False,
) -> list[Row]:
    """One entry a prefix: the rates of each set, as in extraction.json.

    Args:
        columns: of all sequences.
        prefixes: tokens.
        ways: ways of sampling.
        samples: n, independent samples of each suffix.
        probability: p; a sequence is discoverable if n samples hold it with at least p.
        windows: whether the sequences are windows of documents, which overlap: intervals are then a
            bootstrap over documents, and there are none with fewer than MIN_DOCUMENTS.

    Raises:
        ValueError: no sequence of a set has a token after a prefix.
    """
    entries = []
    for prefix in prefixes:
        entry: Row = {"prefix": prefix}
        for name in ("train", "test"):
            rows = columns["set"] == name
            of_set = {column: values[rows] for column, values in columns.items()}
            entry[name] = _rates(name, of_set, prefix, ways, samples, probability, windows)
        entries.append(entry)
    return entries


def _rates(
    name: str,
    columns: Columns,
    prefix: int,
    ways: Sequence[Way],
    samples: int,
    p: float,
    windows: bool,
) -> Row | None:
    """The rates of one set at one prefix; None if there is no such set."""
    N = len(columns["tokens"])
    if not N and name == "test":
        return None
    fits = columns["tokens"] > prefix
    if not fits.any():
        longest = int(columns["tokens"].max()) if N else 0
        raise ValueError(
            f"prefix {prefix}: none of the {N:,} {name} sequences has a token after it, the "
            f"longest has {longest:,}: give a shorter prefix, or longer sequences"
        )
    of = {column: values[fits] for column, values in columns.items()}
    documents = of["document"] if windows else None
    matched = of[f"matched_{prefix}"]
    found: Row = {
        "sequences": int(fits.sum()),
        "too_short": int(N - fits.sum()),
        "exact": rate_of(of["greedy_from"] <= prefix, documents).to_dict(),
        "matched_tokens": {"mean": float(matched.mean()), "longest": int(matched.max())},
        "suffix_bits": float(of[f"bits_{prefix}"].mean()),
        "sampled": [_sampled(of, prefix, way, samples, p, documents) for way in ways],
    }
    if f"distance_{prefix}" in of:
        distance = of[f"distance_{prefix}"]
        found["approximate"] = {
            "mean_distance": mean_of(distance, documents).to_dict(),
            "most_distance": NEAR,
            "near": rate_of(distance <= NEAR, documents).to_dict(),
            "exact": rate_of(distance == 0, documents).to_dict(),
        }
    return found


def _sampled(
    columns: Columns,
    prefix: int,
    way: Way,
    samples: int,
    p: float,
    documents: NDArray[np.int64] | None,
) -> Row:
    """What n samples hold."""
    chances = extraction_probability(columns[bits_name(prefix, way)], samples)
    return {
        "temperature": way.temperature,
        "top_k": way.top_k,
        "samples": samples,
        "expected": mean_of(chances, documents).to_dict(),
        "discoverable": {"probability": p, **rate_of(chances >= p, documents).to_dict()},
    }


def bits_name(prefix: int, way: Way) -> str:
    """The column of suffix bits."""
    return f"bits_{prefix}" if way == PLAIN else f"bits_{prefix}_{way.name}"


def rate_of(hits: NDArray[np.bool_], documents: NDArray[np.int64] | None) -> Interval:
    """The fraction of hits; Clopper-Pearson unless the sequences are windows of documents."""
    if documents is None:
        return clopper_pearson(int(hits.sum()), len(hits))
    return _over_documents(hits.astype(np.float64), documents)


def mean_of(values: Floats, documents: NDArray[np.int64] | None = None) -> Interval:
    """The mean of values from 0 to 1, with 1.96 standard errors at each side inside 0 to 1, or over
    documents.

    Example:
        >>> mean_of(np.array([0.0, 1.0, 1.0, 0.0]))
        Interval(estimate=0.5, low=0.0, high=1.0)
    """
    if documents is not None:
        return _over_documents(values, documents)
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean)
    error = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, max(0.0, mean - error), min(1.0, mean + error))


def _over_documents(values: Floats, documents: NDArray[np.int64]) -> Interval:
    """The mean over windows, with a percentile bootstrap over documents if there are enough; of
    equal windows with the Clopper-Pearson interval of as many documents."""
    mean = float(values.mean())
    _, places = np.unique(documents, return_inverse=True)
    counts = np.bincount(places)
    D = len(counts)
    if D < MIN_DOCUMENTS:
        return Interval(mean)
    if values.min() == values.max():  # of which all draws are equal too
        exact = clopper_pearson(round(mean * D), D)
        return Interval(mean, exact.low, exact.high)
    sums, rng = np.bincount(places, values), np.random.default_rng(0)
    draws = [rng.integers(D, size=D) for _ in range(REPLICATES)]
    return percentile_interval(mean, np.array([sums[d].sum() / counts[d].sum() for d in draws]))
