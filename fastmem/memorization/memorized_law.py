"""The memorized bits of a sequence that a shape, a data set size and a budget predict.

M runs, each of a model with P parameters on N sequences, each seen E times.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fastmem.base.arguments import numbers
from fastmem.base.stats import Floats, Interval, percentile_interval
from fastmem.memorization.membership_law import expected_membership, least_squares

REPLICATES = 200
VALUES = 4
BITS = (2.0, 4.0)
EPOCHS = (20.0, 60.0, 200.0)
SHARPNESS = (1.0, 2.0)
"""Starts of the fit."""


@dataclass(frozen=True)
class MemorizedLaw:
    """Memorized bits of a sequence, strict, fitted to runs.

    A model of P parameters holds at most `bits_per_parameter` · P bits, in equal parts of all N
    sequences, and at most the entropy of each. Of this it has learned, after E epochs, the fraction

        1 / (1 + (`epochs` · (P / `parameters`) ** `exponent` / E) ** `sharpness`)
    """

    bits_per_parameter: float
    epochs: float
    """Epochs after which a model of `parameters` has learned one half."""
    exponent: float
    """How these epochs grow with parameters."""
    sharpness: float
    parameters: float
    """The geometric mean of the fitted sizes: a unit."""

    def memorized(
        self, parameters: ArrayLike, sequences: ArrayLike, epochs: ArrayLike, entropy: ArrayLike
    ) -> Floats:
        """Bits of a sequence that models with `parameters` memorize of `sequences` in `epochs`.

        Args:
            parameters, sequences, epochs: P, N and E.
            entropy: bits of the coded tokens of a sequence.

        Example:
            >>> law = MemorizedLaw(2.5, 50.0, 0.1, 2.0, parameters=1000.0)
            >>> law.memorized(1000, [50, 250], [1e9, 50.0], entropy=40.0)
            array([40.,  5.])
        """
        P, N, E = (np.asarray(x, np.float64) for x in (parameters, sequences, epochs))
        limit = np.minimum(numbers("entropy", entropy), self.bits_per_parameter * P / N)
        half = self.epochs * (P / self.parameters) ** self.exponent
        return np.asarray(limit / (1 + (half / E) ** self.sharpness))


def memorized_law(
    parameters: ArrayLike,
    sequences: ArrayLike,
    epochs: ArrayLike,
    memorized: ArrayLike,
    *,
    entropy: ArrayLike,
    start: MemorizedLaw | None = None,
) -> MemorizedLaw:
    """Fits the law to the memorized bits of M runs, by least squares of their square roots.

    F1 follows the square root of memorized bits (`expected_membership`), so that an error costs as
    much at 0.1 as at 10 bits.

    Args:
        parameters, sequences, epochs: (M,) P, N and E.
        memorized: (M,) memorized bits of one sequence, strict; below 0 counts as 0.
        entropy: bits of the coded tokens of a sequence, (M,) or one for all.
        start: where the search begins; None: at several places.

    Raises:
        ValueError: arrays of different lengths, values that are not finite or not above 0, or fewer
            than four runs.

    Example:
        >>> law = MemorizedLaw(2.5, 50.0, 0.2, 2.0, parameters=2000.0)
        >>> P, N = np.repeat([1000, 4000], 4), np.tile([100, 400, 1600, 6400], 2)
        >>> bits = law.memorized(P, N, 1e5 / N, 105.0)
        >>> memorized_law(P, N, 1e5 / N, bits, entropy=105.0).epochs.__round__(3)
        50.0
    """
    P, N, E, y = (
        numbers(name, values)
        for name, values in (
            ("parameters", parameters),
            ("sequences", sequences),
            ("epochs", epochs),
            ("memorized", memorized),
        )
    )
    H = np.broadcast_to(numbers("entropy", entropy), P.shape)
    if not P.shape == N.shape == E.shape == y.shape or P.ndim != 1 or len(P) < VALUES:
        raise ValueError(
            f"parameters, sequences, epochs and memorized of shapes {P.shape}, {N.shape}, "
            f"{E.shape} and {y.shape}: give one of each for at least {VALUES} runs"
        )
    named = {"parameters": P, "sequences": N, "epochs": E, "entropy": H, "memorized": y}
    for name, x in named.items():
        low, words = (-np.inf, "") if name == "memorized" else (0, " and above 0")
        if not (right := np.isfinite(x) & (x > low)).all():
            raise ValueError(f"{name} must be finite{words}, not {x[~right][0]}: leave the run out")
    unit = float(np.exp(np.log(P).mean()))
    roots = np.sqrt(np.maximum(y, 0))

    def law_of(x: Floats) -> MemorizedLaw:
        bits, half, sharpness = np.exp(np.clip(x[[0, 1, 3]], -30, 30))
        return MemorizedLaw(float(bits), float(half), float(x[2]), float(sharpness), unit)

    def errors(x: Floats) -> Floats:
        return np.asarray(np.sqrt(law_of(x).memorized(P, N, E, H)) - roots)

    if start is None:
        starts = [
            np.array([np.log(bits), np.log(half), 0.0, np.log(sharpness)])
            for bits in BITS
            for half in EPOCHS
            for sharpness in SHARPNESS
        ]
    else:
        half = start.epochs * (unit / start.parameters) ** start.exponent
        logs = np.log([start.bits_per_parameter, half, start.sharpness])
        starts = [np.array([logs[0], logs[1], start.exponent, logs[2]])]
    with np.errstate(over="ignore"):
        fits = [least_squares(errors, one) for one in starts]
        return law_of(min(fits, key=lambda x: float((errors(x) ** 2).sum())))


def predicted_f1(
    runs: Sequence[ArrayLike],
    models: ArrayLike,
    targets: ArrayLike,
    *,
    spread: float = 0.0,
    seed: int = 0,
) -> list[tuple[Interval, Interval]]:
    """The memorized bits and the F1 of further models, with 95 % intervals.

    Each of 200 replicates fits the law to models drawn with replacement, all runs of each, and adds
    to the square root of its prediction the error of a run drawn at random, scaled up for the four
    fitted values. The interval holds the scatter of shapes, and not another form of the law outside
    the measured range.

    Args:
        runs: parameters, sequences, epochs, memorized bits and entropy, (M,) each.
        models: (M,) the model of each run, such as its parameters.
        targets: (K, 4) P, N, E and the entropy of each prediction.
        spread: as in `expected_membership`.
        seed: of the draws.

    Example:
        >>> law = MemorizedLaw(2.5, 50.0, 0.2, 2.0, parameters=2000.0)
        >>> P, N = np.repeat([500, 1000, 2000, 4000], 4), np.tile([100, 400, 1600, 6400], 4)
        >>> runs = [P, N, 1e5 / N, law.memorized(P, N, 1e5 / N, 105.0), np.full(16, 105.0)]
        >>> [(bits, f1)] = predicted_f1(runs, P, [(8000, 3200, 31.25, 105.0)])
        >>> round(f1.low, 3) == round(f1.estimate, 3) == round(f1.high, 3)
        True
    """
    P, N, E, y, H = (np.asarray(x, np.float64) for x in runs)
    names, wanted = np.asarray(models), np.asarray(targets, np.float64)
    law = memorized_law(P, N, E, y, entropy=H)
    distinct, rng = np.unique(names), np.random.default_rng(seed)
    scale = np.sqrt(len(P) / max(1, len(P) - VALUES))
    errors = scale * (np.sqrt(np.maximum(y, 0)) - np.sqrt(law.memorized(P, N, E, H)))
    roots = []
    for _ in range(REPLICATES):
        rows = np.empty(0, np.int64)
        while len(rows) < VALUES:  # a draw of models with few runs cannot be fitted
            drawn = rng.choice(distinct, len(distinct))
            rows = np.concatenate([np.flatnonzero(names == model) for model in drawn])
        fit = memorized_law(P[rows], N[rows], E[rows], y[rows], entropy=H[rows], start=law)
        roots.append(np.sqrt(fit.memorized(*wanted.T)) + rng.choice(errors))
    replicates = np.minimum(np.maximum(roots, 0.0) ** 2, wanted[:, 3])  # (REPLICATES, K)
    estimates = law.memorized(*wanted.T)
    f1 = expected_membership(np.vstack([replicates, estimates]), spread=spread, fpr=())["f1"]
    return [
        (
            percentile_interval(float(estimates[k]), replicates[:, k]),
            percentile_interval(float(f1[-1, k]), f1[:-1, k]),
        )
        for k in range(len(wanted))
    ]
