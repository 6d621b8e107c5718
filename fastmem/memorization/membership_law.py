"""The membership law: AUC, F1 and rates that memorized bits a sequence predict.

M runs, each of a model with P parameters on N sequences.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from fastmem.base.arguments import numbers
from fastmem.base.stats import Floats
from fastmem.memorization.roc import check_rates

Form = Literal["theory", "published"]
PUBLISHED = (1.34, 33.14, 0.0337)
"""Height, steepness and middle of the published law, recovered from its printed predictions."""
ITERATIONS = 200


def expected_membership(
    memorized: ArrayLike, *, spread: ArrayLike = 0.0, fpr: Sequence[float] = (0.01, 0.001)
) -> dict[str, Floats]:
    """The quality of a threshold on bits that memorized bits of a sequence predict.

    The bits of members and of non-members are two normal distributions. Let D be the memorized bits
    of a sequence in nats. If bits decide between the two as well as any evidence could, then their
    difference is a log-likelihood ratio, and a normal log-likelihood ratio of mean ±D has the
    variance 2 D, since its exponential has the mean 1 over non-members. So members lie D below,
    non-members D above the middle, and with σ² = 2 D + spread²

    - auc = Φ(√2 · D / σ), Φ(√D) without a spread
    - f1 = Φ(D / σ), the median rule of `roc`, Φ(√(D / 2)) without a spread
    - tpr = Φ(2 D / σ - Φ⁻¹(1 - fpr)) at each false positive rate

    Args:
        memorized: memorized bits of one sequence, strict: the mean over members.
        spread: standard deviation, in bits, of the difficulty of sequences, which has nothing to do
            with membership: 0 on uniform tokens, where all sequences are equally difficult.
        fpr: false positive rates.

    Returns:
        Arrays of the shape of `memorized`: "auc", "f1", and "tpr_0.01" and so on.

    Raises:
        ValueError: a negative spread, values that are not finite, or an fpr outside 0 to 1.

    Example:
        >>> {name: round(float(x), 3) for name, x in expected_membership(12.0).items()}
        {'auc': 0.998, 'f1': 0.979, 'tpr_0.01': 0.96, 'tpr_0.001': 0.839}

    Source: ours; the variance of a normal log-likelihood ratio is that of signal detection theory.
    """
    nats = np.maximum(numbers("memorized", memorized) * math.log(2), 0.0)
    noise = numbers("spread", spread) * math.log(2)
    if not np.isfinite(nats).all():
        raise ValueError(f"memorized must be finite bits, not {memorized!r}")
    if not (np.isfinite(noise) & (noise >= 0)).all():
        raise ValueError(f"spread must be finite bits from 0 up, not {spread!r}")
    check_rates(fpr)
    sigma = np.sqrt(2 * nats + noise**2)
    shift = np.divide(nats, sigma, out=np.zeros(sigma.shape), where=sigma > 0)
    results = {"auc": _phi(math.sqrt(2) * shift), "f1": _phi(shift)}
    for rate in fpr:
        results[f"tpr_{rate:g}"] = _phi(2 * shift - NormalDist().inv_cdf(1 - rate))
    return results


@dataclass(frozen=True)
class MembershipLaw:
    """F1 of the median rule as a function of parameters and sequences, fitted to runs.

    theory: `expected_membership` of min(entropy, bits per parameter · P / N) bits, with `values` =
    (bits per parameter, spread). published: ½ (1 + height · logistic(-steepness · (N / P -
    middle))), with `values` = (height, steepness, middle).
    """

    form: Form
    values: tuple[float, ...]
    entropy: float

    def f1(self, parameters: ArrayLike, sequences: ArrayLike) -> Floats:
        """F1, from 0 to 1, of models with `parameters` P on `sequences` N (counts).

        Example:
            >>> law = MembershipLaw("published", PUBLISHED, entropy=704.0)
            >>> law.f1(1_556_075_200, [170_654_583, 18_851_574]).round(2)
            array([0.55, 0.95])
        """
        ratio = numbers("sequences", sequences) / numbers("parameters", parameters)
        return _f1(self.form, np.asarray(self.values), ratio, self.entropy)


def membership_law(
    parameters: ArrayLike,
    sequences: ArrayLike,
    f1: ArrayLike,
    *,
    entropy: float,
    form: Form = "theory",
    uniform: bool = True,
) -> MembershipLaw:
    """Fits a law to the F1 of M runs by least squares.

    Args:
        parameters: (M,) parameters P.
        sequences: (M,) sequences N.
        f1: (M,) F1 of the median rule (`roc`).
        entropy: bits of the coded tokens of a sequence, the most that can be memorized of it.
        form: "theory" or "published".
        uniform: whether all sequences are equally difficult: the spread is then 0, not fitted.

    Raises:
        ValueError: an unknown form, arrays of different lengths, values that are not finite or not
            above 0, or fewer runs than values to fit.

    Example:
        >>> P, N = np.full(4, 1000), np.array([100, 200, 400, 800])
        >>> f1 = expected_membership(2.5 * P / N)["f1"]
        >>> law = membership_law(P, N, f1, entropy=105.0)
        >>> [round(value, 6) for value in law.values]
        [2.5, 0.0]
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {get_args(Form)}, not {form!r}")
    P, N, y = (
        numbers(name, values)
        for name, values in (("parameters", parameters), ("sequences", sequences), ("f1", f1))
    )
    least = 3 if form == "published" else 1 if uniform else 2
    if not P.shape == N.shape == y.shape or P.ndim != 1 or len(P) < least:
        raise ValueError(
            f"parameters, sequences and f1 of shapes {P.shape}, {N.shape} and {y.shape}: give one "
            f"of each for at least {least} runs"
        )
    named = {"parameters": P, "sequences": N, "f1": y, "entropy": np.atleast_1d(entropy)}
    for name, x in named.items():
        if not (right := np.isfinite(x) & (x > 0)).all():
            raise ValueError(f"{name} must be finite and above 0, not {x[~right][0]}: leave it out")
    ratio = N / P

    def values_of(logs: Floats) -> Floats:
        return np.append(np.exp(logs), 0.0)[: max(2, least)]

    def errors(logs: Floats) -> Floats:
        return _f1(form, values_of(logs), ratio, entropy) - y

    middles = np.quantile(ratio, [0.1, 0.3, 0.5, 0.7, 0.9])
    if form == "published":
        starts = [np.array([1.0, s / m, m]) for m in middles for s in (1.0, 3.0)]
    else:
        starts = [np.array([bits, 3 * bits])[:least] for bits in (0.5, 3.0, 10.0)]
    fits = [least_squares(errors, np.log(start)) for start in starts]
    best = min(fits, key=lambda logs: float((errors(logs) ** 2).sum()))
    return MembershipLaw(form, tuple(values_of(best).tolist()), entropy)


def _f1(form: Form, values: Floats, ratio: Floats, entropy: float) -> Floats:
    """F1 at N / P."""
    if form == "theory":
        memorized = np.minimum(entropy, values[0] / ratio)
        return expected_membership(memorized, spread=values[1], fpr=())["f1"]
    height, steepness, middle = values
    argument = np.clip(steepness * (ratio - middle), -700, 700)
    return np.asarray((1 + height / (1 + np.exp(argument))) / 2)


def least_squares(errors: Callable[[Floats], Floats], start: Floats) -> Floats:
    """The argument with the least sum of squared errors near a start (Levenberg-Marquardt)."""
    x, damping = start, 1e-2
    now = errors(x)
    for _ in range(ITERATIONS):
        steps = 1e-6 * np.eye(len(x))
        slopes = np.stack([(errors(x + step) - now) / 1e-6 for step in steps], axis=1)
        square = slopes.T @ slopes
        damped = square + damping * np.diag(np.diag(square) + 1e-12)
        moved = x - np.clip(np.linalg.solve(damped, slopes.T @ now), -1, 1)
        then = errors(moved)
        gain = (now**2).sum() - (then**2).sum()
        damping = damping / 3 if gain > 0 else damping * 4
        if gain > 0:
            x, now = moved, then
        if damping > 1e8 or 0 < gain < 1e-12 * (now**2).sum():
            break
    return x


def _phi(z: ArrayLike) -> Floats:
    """The normal distribution function."""
    return np.asarray(
        np.vectorize(math.erfc, otypes=[np.float64])(-np.asarray(z) / math.sqrt(2)) / 2
    )
