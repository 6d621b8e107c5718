"""Capacity from runs: the plateau of memorized bits over data set sizes.

Arrays have one entry a run: the size of its data set, its memorized bits, and so on.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastmem.base.arguments import numbers
from fastmem.base.stats import Floats, Interval, percentile_interval, slope_through_origin
from fastmem.base.storage import Row

NEARLY_ALL = 0.95
"""The smallest set must be memorized to this share, or the diagonal was never seen."""
RISE_PER_DOUBLING = 0.05
"""On the plateau a set twice as large adds less than this share; on the diagonal it adds 1."""
FALL = 0.25
"""With too few epochs a large set is memorized less; one that holds this share less than the best
says nothing of a plateau."""
LATE_GAIN = 0.02
"""Training is flat when its last tenth adds less than this share."""
REPLICATES = 2000


def capacity_bits(counts: ArrayLike, memorized: ArrayLike) -> Interval:
    """The maximum over data set sizes of the mean over seeds, with a 95 % interval.

    Args:
        counts: (R,) the number of sequences of each run.
        memorized: (R,) its memorized bits.

    Returns:
        An interval by bootstrap over the seeds of each size, the maximum taken anew in each
        replicate; without bounds where no size has two seeds.

    Raises:
        ValueError: no run, or arrays of different lengths.

    Example:
        >>> capacity_bits([64, 128, 128], [10.0, 14.0, 16.0])
        Interval(estimate=15.0, low=14.0, high=16.0)

    Source: the definition of capacity in arXiv 2505.24832, section 3.
    """
    groups = by_count(counts, memorized)
    estimate = max(float(group.mean()) for group in groups.values())
    if all(len(group) < 2 for group in groups.values()):
        return Interval(estimate)
    return percentile_interval(estimate, capacity_replicates(groups, np.random.default_rng(0)))


def bits_per_parameter(
    parameters: Sequence[int], runs: Sequence[tuple[ArrayLike, ArrayLike]]
) -> Interval:
    """The slope of capacity against parameters through the origin, with a 95 % interval.

    Args:
        parameters: (M,) the size of each model.
        runs: (M,) the counts and the memorized bits of each model's runs.

    Returns:
        An interval by bootstrap over models, and over seeds within each; without bounds where
        there is one model and no size of its data set has two seeds.

    Raises:
        ValueError: no model, a model without runs, or lengths that differ.

    Example:
        >>> bits_per_parameter([10, 20], [([4, 8], [30.0, 36.0]), ([4, 8], [30.0, 72.0])])
        Interval(estimate=3.6, low=3.6, high=3.6)
    """
    if len(parameters) != len(runs) or not runs:
        raise ValueError(f"{len(parameters)} parameter counts for the runs of {len(runs)} models")
    P = np.asarray(parameters, dtype=np.float64)
    groups = [by_count(counts, memorized) for counts, memorized in runs]
    best = np.array([max(group.mean() for group in g.values()) for g in groups])
    estimate = slope_through_origin(P, best)
    if len(groups) == 1 and all(len(group) < 2 for group in groups[0].values()):
        return Interval(estimate)
    rng = np.random.default_rng(0)
    capacities = np.stack([capacity_replicates(g, rng) for g in groups], axis=1)  # (replicates, M)
    models = rng.integers(len(groups), size=capacities.shape)
    chosen = np.take_along_axis(capacities, models, axis=1)
    slopes = (P[models] * chosen).sum(1) / (P[models] ** 2).sum(1)
    return percentile_interval(estimate, slopes)


def why_not_saturated(
    counts: ArrayLike, memorized: ArrayLike, entropy: ArrayLike, late_gain: ArrayLike
) -> str | None:
    """What keeps these runs of one model from showing its capacity, and what to do; or None.

    Args:
        counts: (R,) the number of sequences of each run.
        memorized: (R,) its memorized bits.
        entropy: (R,) the entropy of what it coded, in the same convention.
        late_gain: (R,) the share of its memorized bits gained in the last tenth of training.

    Example:
        >>> why_not_saturated([64, 128], [97, 120], [100, 200], [0.0, 0.0])
        'the set of 128 still adds 24 % per doubling: add counts above 128'
    """
    bits, shares = by_count(counts, memorized), by_count(counts, entropy)
    gains = by_count(counts, late_gain)
    sizes = sorted(bits)
    mean = {size: float(bits[size].mean()) for size in sizes}
    best = max(sizes, key=lambda size: mean[size])
    reasons = []
    share = mean[sizes[0]] / max(float(shares[sizes[0]].mean()), math.ulp(0.0))
    if share < NEARLY_ALL:
        reasons.append(
            f"the set of {sizes[0]} is memorized to {share:.0%}, not {NEARLY_ALL:.0%}: "
            f"add counts below {sizes[0]}, or train longer"
        )
    if len(sizes) < 2:
        reasons.append(f"one data set size shows no plateau: add counts above {sizes[-1]}")
    else:
        last = sizes[-1]
        # Between sizes that are nearly the same, noise would pass for a slope.
        before = max((size for size in sizes if size * 4 <= last * 3), default=sizes[0])
        doublings = max(math.log2(last / before), 0.1)
        rise = (mean[last] / mean[before] - 1) / doublings if mean[before] > 0 else math.inf
        if rise > RISE_PER_DOUBLING:
            reasons.append(
                f"the set of {last} still adds {rise:.0%} per doubling: add counts above {last}"
            )
        elif mean[last] < (1 - FALL) * mean[best]:
            reasons.append(
                f"the set of {last} holds {1 - mean[last] / mean[best]:.0%} less than that of "
                f"{best}, too few epochs for it: train longer, or add counts between them"
            )
        elif best < last and mean[best] >= NEARLY_ALL * float(shares[best].mean()):
            reasons.append(
                f"the set of {best}, the best, is nearly all memorized: add counts above {best}"
            )
    gain = float(gains[best].mean())
    if gain > LATE_GAIN:
        reasons.append(
            f"the set of {best} was still gaining {gain:.1%} in the last tenth: train longer"
        )
    return "; ".join(reasons).replace("%", " %") or None


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """The content of capacity.json from the rows of a sweep: see docs/method.md for its fields."""
    models = [_summarize_model(of_model) for of_model in by_model(rows)]
    precisions = sorted({model["precision"] for model in models}, reverse=True)  # fp32 first
    fits = {p: _fit([m for m in models if m["precision"] == p]) for p in precisions}
    return {
        "bits_per_parameter": fits[precisions[0]] if precisions else None,
        "by_precision": fits,
        "saturated": bool(models) and all(model["saturated"] for model in models),
        "models": models,
    }


def model_key(row: Row) -> tuple[Any, ...]:
    """What the rows of one model share: precision, parameters and shape."""
    return (row["precision"], row["parameters"], *row["model"].values())


def by_model(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each model, ordered by `model_key`."""
    models: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        models.setdefault(model_key(row), []).append(row)
    return [models[key] for key in sorted(models)]


def best_rows(rows: Iterable[Row]) -> list[Row]:
    """The finished row of each model with the most memorized bits, ordered by `model_key`."""
    done = (row for row in rows if row["memorized_bits"]["strict"] is not None)
    return [max(runs, key=lambda row: row["memorized_bits"]["strict"]) for runs in by_model(done)]


def late_gain(curve: Sequence[Row]) -> float:
    """The share of the final memorized bits that came in the last tenth of the budget.

    The curve's last two points are at 0.9 of the budget and at its end (`CURVE` of training).
    """
    if len(curve) < 2 or curve[-1]["memorized_bits"] <= 0:
        return 0.0
    return float(1 - curve[-2]["memorized_bits"] / curve[-1]["memorized_bits"])


def _late_gain(row: Row) -> float:
    """Of a run; one that converged has stopped because it no longer gained."""
    return 0.0 if row.get("stopped_by") == "converged" else late_gain(row["curve"])


def _summarize_model(rows: Sequence[Row]) -> dict[str, Any]:
    rows = sorted(rows, key=lambda row: (row["sequences"]["count"], row["seed"]))
    done = [row for row in rows if row["status"] == "done"]
    first = rows[0]
    counts = [row["sequences"]["count"] for row in done]
    capacity = {}
    for convention in ("strict", "published"):
        memorized = [row["memorized_bits"][convention] for row in done]
        capacity[convention] = capacity_bits(counts, memorized) if done else None
    why_not = (
        why_not_saturated(
            counts,
            [row["memorized_bits"]["published"] for row in done],
            [row["entropy_bits"] for row in done],
            [_late_gain(row) for row in done],
        )
        if done
        else "no run finished: see the errors in its rows"
    )
    P = first["parameters"]
    return {
        **first["model"],
        "parameters": P,
        "precision": first["precision"],
        "saturated": why_not is None,
        "why_not": why_not,
        "capacity_bits": {c: i and i.to_dict() for c, i in capacity.items()},
        "bits_per_parameter": {c: i and (i / P).to_dict() for c, i in capacity.items()},
        "runs": [_summarize_run(row) for row in rows],
    }


def _summarize_run(row: Row) -> dict[str, Any]:
    names = ("seed", "status", "error", "entropy_bits", "memorized_bits", "epochs", "steps")
    times = ("seconds", "tokens_per_second")
    return {"count": row["sequences"]["count"], **{n: row[n] for n in (*names, *times)}}


def _fit(models: Sequence[Row]) -> dict[str, Any] | None:
    fit = {}
    for convention in ("strict", "published"):
        parameters, runs = [], []
        for model in models:
            done = [run for run in model["runs"] if run["status"] == "done"]
            if done:
                parameters.append(model["parameters"])
                bits = [run["memorized_bits"][convention] for run in done]
                runs.append(([run["count"] for run in done], bits))
        if not runs:
            return None
        fit[convention] = bits_per_parameter(parameters, runs).to_dict()
    return fit


def by_count(counts: ArrayLike, values: ArrayLike) -> dict[int, Floats]:
    counts, values = numbers("counts", counts), numbers("values", values)
    if counts.ndim != 1 or counts.shape != values.shape or not len(counts):
        raise ValueError(
            f"expected one value for each of at least one run, "
            f"not counts {counts.shape} and values {values.shape}"
        )
    if not np.isfinite(counts).all():
        raise ValueError(f"counts must be numbers of sequences, not {counts.tolist()}")
    return {int(count): values[counts == count] for count in np.unique(counts)}


def capacity_replicates(groups: dict[int, Floats], rng: np.random.Generator) -> Floats:
    """(replicates,) capacities with the seeds of each data set size drawn again."""
    means = [
        group[rng.integers(len(group), size=(REPLICATES, len(group)))].mean(axis=1)
        for group in groups.values()
    ]
    return np.max(means, axis=0)  # type: ignore[no-any-return]
