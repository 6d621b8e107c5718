"""Capacity from runs: the plateau of memorized bits over data set sizes.

R runs of one model, M models.
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
"""Least memorized fraction of the smallest data set: below it no run is on the diagonal."""
RISE_PER_DOUBLING = 0.05
"""Largest gain per doubling of the data set on the plateau; on the diagonal the gain is 1."""
FALL = 0.25
"""With too few epochs a large data set is memorized less. The plateau cannot be judged if the
largest data set is memorized this fraction less than the best."""
LATE_GAIN = 0.02
"""The last tenth of training may add at most this fraction. A small gain proves nothing, since the
learning rate decays to zero."""
LITTLE = 0.05
"""A model is trained if more training would add at most this fraction."""
REPLICATES = 2000
CONVENTIONS = ("strict", "published")
BUDGET = ("steps", "epochs", "seconds", "until")
Groups = dict[int, Floats]
"""The memorized bits of the runs of one model, by the size of their data set."""


def capacity_bits(counts: ArrayLike, memorized: ArrayLike) -> Interval:
    """The maximum over data set sizes of the mean over seeds, with a 95 % interval.

    Args:
        counts: (R,) number of sequences of each run.
        memorized: (R,) memorized bits of each run.

    Returns:
        The estimate, with an interval by bootstrap: each replicate draws the seeds of each size
        again and takes the maximum. Without bounds if no size has two seeds.

    Raises:
        ValueError: no run, or arrays of different lengths.

    Example:
        >>> capacity_bits([64, 128, 128], [10.0, 14.0, 16.0])
        Interval(estimate=15.0, low=14.0, high=16.0)

    Source: the definition of capacity in arXiv 2505.24832, section 3.
    """
    groups = by_count(counts, memorized)
    (estimate,) = capacities([groups])
    if all(len(group) < 2 for group in groups.values()):
        return Interval(float(estimate))
    replicates = capacity_replicates([groups], np.random.default_rng(0))
    return percentile_interval(estimate, replicates[:, 0])


def bits_per_parameter(
    parameters: Sequence[int], runs: Sequence[tuple[ArrayLike, ArrayLike]]
) -> Interval:
    """The slope of capacity against parameters through the origin, with a 95 % interval.

    Args:
        parameters: (M,) parameter count of each model.
        runs: (M,) counts and memorized bits of the runs of each model.

    Returns:
        An interval by bootstrap over models and over the seeds of each model; without bounds for a
        single model without two seeds of one size.

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
    estimate = slope_through_origin(P, capacities(groups))
    if len(groups) == 1 and all(len(group) < 2 for group in groups[0].values()):
        return Interval(float(estimate))
    rng = np.random.default_rng(0)
    replicates = capacity_replicates(groups, rng)
    models = rng.integers(len(groups), size=replicates.shape)
    drawn = np.take_along_axis(replicates, models, axis=1)
    return percentile_interval(float(estimate), slope_through_origin(P[models], drawn))


def why_not_saturated(
    counts: ArrayLike, memorized: ArrayLike, entropy: ArrayLike, late_gain: ArrayLike
) -> str | None:
    """Why the runs of one model do not show its capacity, and what to do; None if they do.

    What more training would add is another question, which `more_training` answers: a late gain
    shows that it adds something, and no late gain shows nothing.

    Args:
        counts: (R,) number of sequences of each run.
        memorized: (R,) memorized bits of each run.
        entropy: (R,) entropy of the data set of each run, in the same convention.
        late_gain: (R,) fraction of its memorized bits that each run gained in the last tenth of
            training.

    Example:
        >>> why_not_saturated([64, 128], [97, 120], [100, 200], [0.0, 0.0])
        'the set of 128 still adds 24 % per doubling: add counts above 128'
    """
    mean, fraction = means(counts, memorized, entropy)
    best, smallest = max(mean, key=lambda size: mean[size]), min(mean)
    reasons = []
    if fraction[smallest] < NEARLY_ALL:
        reasons.append(
            f"the set of {smallest} is memorized to {fraction[smallest]:.0%}, not "
            f"{NEARLY_ALL:.0%}: add counts below {smallest}, or train longer"
        )
    reasons += _why_no_plateau(mean, fraction, best)
    gain = float(by_count(counts, late_gain)[best].mean())
    if gain > LATE_GAIN:
        reasons.append(
            f"the set of {best} was still gaining {gain:.1%} in the last tenth: train longer"
        )
    return "; ".join(reasons).replace("%", " %") or None


def _why_no_plateau(mean: dict[int, float], fraction: dict[int, float], best: int) -> list[str]:
    """At most one reason, from the mean bits and the memorized fraction of each size."""
    last = max(mean)
    if len(mean) < 2:
        return [f"one data set size shows no plateau: add counts above {last}"]
    rise = rise_per_doubling(mean)
    if rise > RISE_PER_DOUBLING:
        return [f"the set of {last} still adds {rise:.0%} per doubling: add counts above {last}"]
    if mean[last] < (1 - FALL) * mean[best]:
        return [
            f"the set of {last} holds {1 - mean[last] / mean[best]:.0%} less than the set of "
            f"{best}, too few epochs for it: train longer, or add counts between them"
        ]
    if best < last and fraction[best] >= NEARLY_ALL:
        return [f"the set of {best}, the best, is nearly all memorized: add counts above {best}"]
    return []


def more_training(rows: Sequence[Row]) -> Interval | None:
    """The fraction that training without end would add to the bits of one model, with an interval.

    Computes `extrapolated_bits / memorized bits - 1`, at least 0, over the runs of the data set
    with the most memorized bits; None if these runs have not trained in three stages
    (`--until converged`), since the end of a single decay does not show what a longer run holds.

    Args:
        rows: the finished rows of one model.
    """
    groups = by_count(*counts_and_bits(rows, "strict"))
    best = max(groups, key=lambda count: groups[count].mean())
    runs = [row for row in rows if row["sequences"]["count"] == best]
    limits = [limit for row in runs if (limit := row.get("extrapolated_bits"))]
    bits = sum(r["memorized_bits"]["strict"] for r in runs if r.get("extrapolated_bits"))
    if not limits or bits <= 0:
        return None
    sums = (sum(limit[name] for limit in limits) for name in ("estimate", "low", "high"))
    return Interval(*(max(0.0, total / bits - 1) for total in sums))


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """The content of capacity.json from the rows of a sweep; docs/method.md lists its fields."""
    rows = sorted(rows, key=lambda row: (row["sequences"]["count"], row["seed"]))
    models = [_summarize_model(of_model) for of_model in by_model(rows)]
    precisions = sorted({row["precision"] for row in rows}, reverse=True)  # fp32 first
    fits = {p: _fit([row for row in rows if row["precision"] == p]) for p in precisions}
    return {
        "bits_per_parameter": fits[precisions[0]] if precisions else None,
        "by_precision": fits,
        "saturated": bool(models) and all(model["saturated"] for model in models),
        "budget": rows and {n: rows[0].get("train", {}).get(n) for n in BUDGET},
        "models": models,
    }


def model_key(row: Row) -> tuple[Any, ...]:
    """Precision, parameters and shape: the same for all rows of a model."""
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
    """The fraction of the final memorized bits gained in the last tenth of the budget.

    The last two points of a curve are at 0.9 and at 1.0 of the budget (`training.curve.CURVE`).
    Where a sample was scored at 0.9, the upper bound of its estimate counts.
    """
    if len(curve) < 2 or curve[-1]["memorized_bits"] <= 0:
        return 0.0
    before = curve[-2].get("high", curve[-2]["memorized_bits"])
    return float(1 - before / curve[-1]["memorized_bits"])


def _late_gain(row: Row) -> float:
    """The late gain of a run; 0 if it converged, since it stopped when it gained too little."""
    return 0.0 if row.get("stopped_by") == "converged" else late_gain(row["curve"])


def counts_and_bits(rows: Sequence[Row], convention: str) -> tuple[list[int], list[float]]:
    """The data set sizes and the memorized bits of finished rows."""
    counts = [row["sequences"]["count"] for row in rows]
    return counts, [row["memorized_bits"][convention] for row in rows]


def _summarize_model(rows: Sequence[Row]) -> dict[str, Any]:
    done = [row for row in rows if row["status"] == "done"]
    first, P = rows[0], rows[0]["parameters"]
    capacity = {c: capacity_bits(*counts_and_bits(done, c)) if done else None for c in CONVENTIONS}
    why_not: str | None = "no run finished: see the errors in its rows"
    gain = None
    if done:
        entropy, gain = [row["entropy_bits"] for row in done], more_training(done)
        # What is gained late is a question of training, which has its own part of the verdict.
        why_not = why_not_saturated(*counts_and_bits(done, "published"), entropy, [0.0] * len(done))
    return {
        **first["model"],
        "parameters": P,
        "precision": first["precision"],
        "saturated": why_not is None,
        "why_not": why_not,
        "more_training": gain and gain.to_dict(),
        "late_gain": max((_late_gain(row) for row in best_rows(done)), default=None),
        "capacity_bits": {c: i and i.to_dict() for c, i in capacity.items()},
        "bits_per_parameter": {c: i and (i / P).to_dict() for c, i in capacity.items()},
        "runs": [_summarize_run(row) for row in rows],
    }


def _summarize_run(row: Row) -> dict[str, Any]:
    names = ("seed", "status", "error", "entropy_bits", "memorized_bits", "epochs", "steps")
    times = ("seconds", "tokens_per_second")
    return {"count": row["sequences"]["count"], **{n: row[n] for n in (*names, *times)}}


def _fit(rows: Sequence[Row]) -> dict[str, Any] | None:
    models = by_model(row for row in rows if row["status"] == "done")
    if not models:
        return None
    parameters = [runs[0]["parameters"] for runs in models]
    return {
        c: bits_per_parameter(parameters, [counts_and_bits(runs, c) for runs in models]).to_dict()
        for c in CONVENTIONS
    }


def by_count(counts: ArrayLike, values: ArrayLike) -> Groups:
    """The values of the runs by the size of their data set, the smallest size first."""
    counts, values = numbers("counts", counts), numbers("values", values)
    if counts.ndim != 1 or counts.shape != values.shape or not len(counts):
        raise ValueError(
            f"expected one value for each of at least one run, "
            f"not counts {counts.shape} and values {values.shape}"
        )
    if not np.isfinite(counts).all():
        raise ValueError(f"counts must be numbers of sequences, not {counts.tolist()}")
    return {int(count): values[counts == count] for count in np.unique(counts)}


def means(
    counts: ArrayLike, memorized: ArrayLike, entropy: ArrayLike
) -> tuple[dict[int, float], dict[int, float]]:
    """By data set size: the mean memorized bits, and the memorized fraction of the entropy."""
    entropies = by_count(counts, entropy)
    mean = {size: float(bits.mean()) for size, bits in by_count(counts, memorized).items()}
    return mean, {n: mean[n] / max(float(entropies[n].mean()), math.ulp(0.0)) for n in mean}


def rise_per_doubling(mean: dict[int, float]) -> float:
    """The relative gain from a smaller data set to the largest, per doubling of the size."""
    last = max(mean)
    # Between sizes that are nearly the same, noise would look like a slope.
    before = max((size for size in mean if size * 4 <= last * 3), default=min(mean))
    doublings = max(math.log2(last / before), 0.1)
    return (mean[last] / mean[before] - 1) / doublings if mean[before] > 0 else math.inf


def capacities(groups: Sequence[Groups]) -> Floats:
    """(M,) the largest mean of each model over its data set sizes."""
    return np.array([max(bits.mean() for bits in group.values()) for group in groups])


def capacity_replicates(groups: Sequence[Groups], rng: np.random.Generator) -> Floats:
    """(replicates, M) capacities with the seeds of each data set size drawn again."""
    drawn = [
        [
            bits[rng.integers(len(bits), size=(REPLICATES, len(bits)))].mean(axis=1)
            for bits in group.values()
        ]
        for group in groups
    ]
    return np.stack([np.max(means, axis=0) for means in drawn], axis=1)
