"""Extraction rates with intervals, from the table of sequences.

N sequences of a set, P tokens of a prefix.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmem.base.stats import Floats, Interval, clopper_pearson
from fastmem.base.storage import Row
from fastmem.memorization.extraction import extraction_probability, extraction_rates
from fastmem.models.causal.sampling import Way
from fastmem.models.extraction.measure import PLAIN, Columns

NEAR = 0.1
"""Edit distance, as a fraction of the suffix, up to which a suffix is nearly exact."""


def rates_of(
    columns: Columns,
    prefixes: Sequence[int],
    ways: Sequence[Way],
    samples: int,
    probability: float,
) -> list[Row]:
    """One entry a prefix: the rates of each set, as in extraction.json.

    Args:
        columns: of all sequences.
        prefixes: tokens.
        ways: ways of sampling.
        samples: n, independent samples of each suffix.
        probability: p; a sequence is discoverable if n samples hold it with at least p.

    Raises:
        ValueError: no sequence of a set has a token after a prefix.
    """
    entries = []
    for prefix in prefixes:
        entry: Row = {"prefix": prefix}
        for name in ("train", "test"):
            rows = columns["set"] == name
            of_set = {column: values[rows] for column, values in columns.items()}
            entry[name] = _rates(name, of_set, prefix, ways, samples, probability)
        entries.append(entry)
    return entries


def _rates(
    name: str, columns: Columns, prefix: int, ways: Sequence[Way], samples: int, p: float
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
    exact = extraction_rates(of["greedy_from"], of["tokens"], [prefix])[prefix]
    matched = of[f"matched_{prefix}"]
    found: Row = {
        "sequences": int(fits.sum()),
        "too_short": int(N - fits.sum()),
        "exact": exact.to_dict(),
        "matched_tokens": {
            "mean": float(matched.mean()),
            "longest": int(matched.max()),
        },
        "suffix_bits": float(of[f"bits_{prefix}"].mean()),
        "sampled": [_sampled(of, prefix, way, samples, p) for way in ways],
    }
    if f"distance_{prefix}" in of:
        distance = of[f"distance_{prefix}"]
        near = clopper_pearson(int((distance <= NEAR).sum()), len(distance))
        found["approximate"] = {
            "mean_distance": mean_interval(distance).to_dict(),
            "most_distance": NEAR,
            "near": near.to_dict(),
            "exact": clopper_pearson(int((distance == 0).sum()), len(distance)).to_dict(),
        }
    return found


def _sampled(columns: Columns, prefix: int, way: Way, samples: int, p: float) -> Row:
    """What n samples hold."""
    chances = extraction_probability(columns[bits_name(prefix, way)], samples)
    found = clopper_pearson(int((chances >= p).sum()), len(chances))
    return {
        "temperature": way.temperature,
        "top_k": way.top_k,
        "samples": samples,
        "expected": mean_interval(chances).to_dict(),
        "discoverable": {"probability": p, **found.to_dict()},
    }


def bits_name(prefix: int, way: Way) -> str:
    """The column of suffix bits."""
    return f"bits_{prefix}" if way == PLAIN else f"bits_{prefix}_{way.name}"


def mean_interval(values: NDArray[Any] | Floats) -> Interval:
    """The mean of values from 0 to 1, with 1.96 standard errors at each side inside 0 to 1.

    Example:
        >>> mean_interval(np.array([0.0, 1.0, 1.0, 0.0]))
        Interval(estimate=0.5, low=0.0, high=1.0)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean)
    error = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, max(0.0, mean - error), min(1.0, mean + error))
