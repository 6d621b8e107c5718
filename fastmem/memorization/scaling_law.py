"""The scaling law: capacity against parameters, over models of many shapes. NumPy only.

M models; a run is one model trained on one data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmem.base.arguments import MAX_WORD, integer, numbers
from fastmem.base.stats import Floats, Interval, percentile_interval, slope_through_origin
from fastmem.base.storage import Row
from fastmem.memorization.capacity import (
    by_count,
    by_model,
    capacities,
    capacity_replicates,
    counts_and_bits,
)

Indices = NDArray[np.int64]
Ints = Sequence[int]
Runs = Sequence[tuple[ArrayLike, ArrayLike]]
Convention = Literal["strict", "published"]


class Published(NamedTuple):
    """A model of the paper and its printed capacities, in the published convention."""

    layers: int
    width: int
    parameters: int
    fp32_bits: float
    bf16_bits: float


PUBLISHED = (
    Published(1, 32, 80_352, 3.39e5, 3.16e5),
    Published(1, 64, 185_280, 7.27e5, 6.93e5),
    Published(1, 128, 468_864, 1.71e6, 1.69e6),
    Published(2, 32, 93_056, 3.87e5, 3.31e5),
    Published(2, 128, 667_136, 2.66e6, 2.60e6),
    Published(2, 256, 2_120_704, 8.49e6, 7.76e6),
    Published(4, 64, 335_232, 1.34e6, 1.14e6),
    Published(4, 256, 3_700_224, 1.36e7, 1.30e7),
    Published(8, 32, 169_280, 5.12e5, 4.85e5),
    Published(8, 256, 6_859_264, 2.71e7, 2.51e7),
)
"""Ten of the sixteen rows of the capacity table of arXiv 2505.24832; V = 2048, S = 64."""


@dataclass(frozen=True)
class Residual:
    """The capacity of a model against the law through the origin."""

    layers: int
    width: int
    parameters: int
    capacity_bits: float
    fraction: float
    """capacity / law - 1: above 0 if the model holds more bits than the law predicts."""

    @property
    def share(self) -> float:
        """The name of `fraction` in 0.1.0."""
        return self.fraction


@dataclass(frozen=True)
class Prediction:
    """The capacity of a model that was not trained, in bits, by two laws."""

    proportional: Interval
    """slope · P."""
    power: Interval
    """factor · P^exponent; its interval grows with the distance from the measured sizes, and has no
    bounds with two models, which the law fits exactly."""


@dataclass(frozen=True)
class Law:
    """Capacity against parameters, with 95 % intervals by bootstrap (see `scaling_law`)."""

    slope: Interval
    """Bits per parameter by the line through the origin."""
    line_slope: Interval
    """Bits per parameter by the line with an intercept."""
    line_intercept: Interval
    """Bits of that line at 0 parameters."""
    exponent: Interval
    """Slope of log capacity against log parameters: 1 if capacity is proportional."""
    residuals: tuple[Residual, ...]
    """Residuals of the line through the origin, the smallest model first."""
    _proportional: Floats = field(repr=False, compare=False)  # (replicates,) slopes
    # (replicates + 1, 2) exponent and log factor, the estimate first
    _power: Floats = field(repr=False, compare=False)
    _power_residuals: Floats = field(repr=False, compare=False)  # (M,) in log capacity

    def mean_residuals(self, axis: Literal["layers", "width"]) -> dict[int, float]:
        """The mean residual, as a fraction of the law, of the models of each depth or width."""
        if axis not in ("layers", "width"):
            raise ValueError(f"axis must be layers or width, not {axis!r}")
        at = [getattr(residual, axis) for residual in self.residuals]
        fractions = np.array([residual.fraction for residual in self.residuals])
        return {value: float(fractions[np.equal(at, value)].mean()) for value in sorted(set(at))}

    def predict(self, parameters: int) -> Prediction:
        """The capacity of a model of this parameter count, with a 95 % prediction interval.

        Each replicate of the law is multiplied by the residual of a model drawn at random: the
        interval covers the scatter of models of one size as well as the uncertainty of the law.

        Raises:
            ValueError: parameters below 1.
        """
        parameters = integer("parameters", parameters, 1, MAX_WORD)
        M, P = len(self.residuals), float(parameters)
        rng = np.random.default_rng(0)
        fractions = np.array([r.fraction for r in self.residuals]) * np.sqrt(M / (M - 1))
        bits = self._proportional * P * (1 + rng.choice(fractions, len(self._proportional)))
        proportional = percentile_interval(self.slope.estimate * P, bits)
        logs = self._power @ np.array([np.log(P), 1.0])
        with np.errstate(over="ignore"):
            power = Interval(float(np.exp(logs[0])))
            if M > 2:
                errors = self._power_residuals * np.sqrt(M / (M - 2))
                bits = np.exp(logs[1:] + rng.choice(errors, len(logs) - 1))
                power = percentile_interval(power.estimate, bits)
        return Prediction(proportional, power)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        fits = ("slope", "line_slope", "line_intercept", "exponent")
        return {
            **{name: getattr(self, name).to_dict() for name in fits},
            "residuals": [
                {"share" if name == "fraction" else name: value for name, value in vars(r).items()}
                for r in self.residuals
            ],
            "by_layers": self.mean_residuals("layers"),
            "by_width": self.mean_residuals("width"),
        }


def scaling_law(parameters: Ints, runs: Runs, layers: Ints, width: Ints) -> Law:
    """Fits capacity = slope · P, = intercept + slope · P and = factor · P^exponent.

    The first two are least squares in bits, the third in log bits. Each model is one point: its
    capacity is the maximum over data set sizes of the mean over seeds.

    Args:
        parameters: (M,) parameter count P of each model.
        runs: (M,) counts and memorized bits of the runs of each model.
        layers: (M,) depth of each model.
        width: (M,) width of each model.

    Returns:
        The three fits with 95 % intervals by bootstrap over models and over the seeds of each
        model. The interval of the slope is the interval of `bits_per_parameter`. For the line and
        the exponent, a draw whose models are all of one size is drawn again.

    Raises:
        ValueError: lengths that differ; a model without runs, or with a capacity that is not finite
            or below 1 bit; models of one size only.

    Example:
        >>> law = scaling_law([10, 20, 40], [([4], [36.0]), ([4], [72.0]), ([4], [144.0])],
        ...                   layers=[1, 1, 2], width=[2, 4, 4])
        >>> law.slope
        Interval(estimate=3.6, low=3.6, high=3.6)
        >>> round(law.exponent.estimate, 9), round(law.predict(1000).proportional.estimate, 9)
        (1.0, 3600.0)

    Source: arXiv 2505.24832, section 3, which fits the line through the origin.
    """
    order = _checked_order(parameters, runs, layers, width)
    P = np.array([parameters[m] for m in order], dtype=np.float64)
    groups = [by_count(*runs[m]) for m in order]
    capacity = capacities(groups)
    for m, bits in zip(order, capacity, strict=True):
        if not 1 <= bits < np.inf:
            raise ValueError(
                f"the model of {parameters[m]:,} parameters ({layers[m]} layers, width {width[m]}) "
                f"has a capacity of {bits:.3g} bits: leave it out, or train it longer"
            )
    rng = np.random.default_rng(0)
    replicates = capacity_replicates(groups, rng)
    models = rng.integers(len(P), size=replicates.shape)  # the draws of bits_per_parameter
    slope = float(slope_through_origin(P, capacity))
    slopes = slope_through_origin(P[models], np.take_along_axis(replicates, models, axis=1))
    models = _of_two_sizes(models, P, rng)
    P_drawn, drawn = P[models], np.take_along_axis(replicates, models, axis=1)
    line, lines = _line(P, capacity), _line(P_drawn, drawn)
    power = _line(np.log(P), np.log(capacity))
    # A replicate may memorize 0 bits or fewer, which has no logarithm.
    powers = _line(np.log(P_drawn), np.log(np.maximum(drawn, 1.0)))
    return Law(
        slope=percentile_interval(slope, slopes),
        line_slope=percentile_interval(line[0], lines[:, 0]),
        line_intercept=percentile_interval(line[1], lines[:, 1]),
        exponent=percentile_interval(power[0], powers[:, 0]),
        residuals=tuple(
            Residual(layers[m], width[m], parameters[m], float(bits), float(bits / (slope * p) - 1))
            for m, bits, p in zip(order, capacity, P, strict=True)
        ),
        _proportional=slopes,
        _power=np.concatenate([power[None], powers]),
        _power_residuals=np.log(capacity) - (power[0] * np.log(P) + power[1]),
    )


def law_of_rows(
    rows: Sequence[Row], precision: str | None = None, convention: Convention = "strict"
) -> Law:
    """The scaling law over the finished rows of a sweep at one precision.

    Args:
        rows: from `load_rows`; failed rows and rows of unknown entropy are left out.
        precision: by default fp32 if it has a finished row, else the last by name.
        convention: of the memorized bits.

    Raises:
        ValueError: an unknown convention, no finished row at the precision, or models of one size.
    """
    models = by_model(fitted_rows(rows, precision, convention))
    firsts = [runs[0] for runs in models]
    return scaling_law(
        [first["parameters"] for first in firsts],
        [counts_and_bits(runs, convention) for runs in models],
        [first["model"]["layers"] for first in firsts],
        [first["model"]["width"] for first in firsts],
    )


def fitted_rows(
    rows: Sequence[Row], precision: str | None = None, convention: Convention = "strict"
) -> list[Row]:
    """The rows that `law_of_rows` fits; the same errors, except for models of one size."""
    if convention not in get_args(Convention):
        raise ValueError(f"convention must be one of {get_args(Convention)}, not {convention!r}")
    done = [
        row
        for row in rows
        if row["status"] == "done" and row["memorized_bits"][convention] is not None
    ]
    precisions = sorted({row["precision"] for row in done}, reverse=True)  # fp32 first
    if not precisions:
        raise ValueError(f"no finished run among {len(rows)} rows: run `fastmem capacity` first")
    precision = precision or precisions[0]
    if precision not in precisions:
        raise ValueError(f"no finished run at {precision!r}: use one of {', '.join(precisions)}")
    return [row for row in done if row["precision"] == precision]


def _checked_order(parameters: Ints, runs: Runs, layers: Ints, width: Ints) -> list[int]:
    """The order of the models by size; ValueError unless there is a law."""
    for name, values in (("parameters", parameters), ("layers", layers), ("width", width)):
        if numbers(name, values).ndim != 1:
            raise ValueError(f"{name} must be one number for each model, not {values!r}")
    if len({len(parameters), len(runs), len(layers), len(width)}) != 1:
        raise ValueError(
            f"{len(parameters)} parameter counts, {len(runs)} lists of runs, {len(layers)} depths "
            f"and {len(width)} widths: give one of each for every model"
        )
    P = numbers("parameters", parameters)
    if not (np.isfinite(P) & (P >= 1)).all():
        raise ValueError(f"parameters must be numbers from 1 up, not {list(parameters)}")
    sizes = sorted(set(parameters))
    if len(sizes) < 2:
        raise ValueError(
            f"no law from models of one size ({f'{sizes[0]:,} parameters' if sizes else 'none'}): "
            "add a --width or --layers"
        )
    for pair in runs:
        if len(pair) != 2:
            raise ValueError(f"runs must be pairs of counts and memorized bits, not {pair!r}")
    return sorted(range(len(P)), key=lambda m: (parameters[m], layers[m], width[m]))


def _of_two_sizes(models: Indices, P: Floats, rng: np.random.Generator) -> Indices:
    """(replicates, M) draws of models; draws with a single size are drawn again."""
    models = models.copy()
    while (alike := np.ptp(P[models], axis=1) == 0).any():
        models[alike] = rng.integers(len(P), size=(int(alike.sum()), len(P)))
    return models


def _line(x: Floats, y: Floats) -> Floats:
    """(..., 2) the slope and the intercept of the least-squares line through (..., M) points."""
    x0, y0 = x.mean(-1, keepdims=True), y.mean(-1, keepdims=True)
    slope = slope_through_origin(x - x0, y - y0)
    return np.stack([slope, y0[..., 0] - slope * x0[..., 0]], axis=-1)
