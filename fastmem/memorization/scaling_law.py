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
from fastmem.memorization.capacity import by_count, by_model, capacity_replicates

Places = NDArray[np.int64]
Convention = Literal["strict", "published"]


class Published(NamedTuple):
    """A model of the paper and the capacities that it prints, in the published convention."""

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
    """What a model holds beside what the law through the origin gives it."""

    layers: int
    width: int
    parameters: int
    capacity_bits: float
    share: float
    """capacity / law - 1: above 0 where the model holds more than the law says."""


@dataclass(frozen=True)
class Prediction:
    """The capacity of a model that was not trained, in bits, by each of the two laws."""

    proportional: Interval
    """slope · P."""
    power: Interval
    """The power law; it may bend, so its interval grows with the distance from what was measured;
    without bounds where two models leave nothing over to judge it by."""


@dataclass(frozen=True)
class Law:
    """Capacity against parameters; each interval is of 95 %, by bootstrap (see `scaling_law`)."""

    slope: Interval
    """Bits per parameter, of the line through the origin."""
    line_slope: Interval
    """Bits per parameter, of the line with an intercept."""
    line_intercept: Interval
    """Bits at no parameters, of that line."""
    exponent: Interval
    """The slope of log capacity against log parameters: 1 where capacity is proportional."""
    residuals: tuple[Residual, ...]
    """Of the line through the origin, the smallest model first."""
    _proportional: Floats = field(repr=False, compare=False)  # (replicates,) slopes
    # (replicates + 1, 2) exponent and log factor, the estimate first
    _power: Floats = field(repr=False, compare=False)
    _power_residuals: Floats = field(repr=False, compare=False)  # (M,) in log capacity

    def mean_residuals(self, axis: Literal["layers", "width"]) -> dict[int, float]:
        """The mean share that models of each depth or width hold above the law."""
        if axis not in ("layers", "width"):
            raise ValueError(f"axis must be layers or width, not {axis!r}")
        shares: dict[int, list[float]] = {}
        for residual in self.residuals:
            shares.setdefault(getattr(residual, axis), []).append(residual.share)
        return {value: float(np.mean(shares[value])) for value in sorted(shares)}

    def predict(self, parameters: int) -> Prediction:
        """The capacity of a model with so many parameters, with a 95 % interval for that model.

        Each replicate of the law is moved by the residual of a model drawn at random, so that the
        interval holds what shapes of one size differ by and not only the law's own doubt.

        Raises:
            ValueError: no parameters.
        """
        parameters = integer("parameters", parameters, 1, MAX_WORD)
        M, P = len(self.residuals), float(parameters)
        rng = np.random.default_rng(0)
        shares = np.array([r.share for r in self.residuals]) * np.sqrt(M / (M - 1))
        moved = self._proportional * P * (1 + rng.choice(shares, len(self._proportional)))
        proportional = percentile_interval(self.slope.estimate * P, moved)
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
            "residuals": [vars(residual) for residual in self.residuals],
            "by_layers": self.mean_residuals("layers"),
            "by_width": self.mean_residuals("width"),
        }


def scaling_law(
    parameters: Sequence[int],
    runs: Sequence[tuple[ArrayLike, ArrayLike]],
    layers: Sequence[int],
    width: Sequence[int],
) -> Law:
    """Fits capacity = slope · P, = intercept + slope · P and = factor · P^exponent.

    The first two are least squares in bits, the third in log bits; a model counts once, by the
    maximum over data set sizes of its mean over seeds.

    Args:
        parameters: (M,) P of each model.
        runs: (M,) the counts and the memorized bits of each model's runs.
        layers: (M,) its depth.
        width: (M,) its width.

    Returns:
        The three fits with 95 % intervals by bootstrap over models, and over seeds within each.
        Draws of models that are all of one size have no line and no exponent, and for these are
        drawn again; the interval of the slope is that of `bits_per_parameter`.

    Raises:
        ValueError: lengths that differ; a model without runs or with bits that are not finite or
            sum up to a capacity below 1 bit; models of one size only, which have no law.

    Example:
        >>> law = scaling_law([10, 20, 40], [([4], [36.0]), ([4], [72.0]), ([4], [144.0])],
        ...                   layers=[1, 1, 2], width=[2, 4, 4])
        >>> law.slope
        Interval(estimate=3.6, low=3.6, high=3.6)
        >>> round(law.exponent.estimate, 9), round(law.predict(1000).proportional.estimate, 9)
        (1.0, 3600.0)

    Source: arXiv 2505.24832, section 3, which fits the line through the origin.
    """
    given = {"parameters": parameters, "layers": layers, "width": width}
    for name, values in given.items():
        if numbers(name, values).ndim != 1:
            raise ValueError(f"{name} must be one number for each model, not {values!r}")
    if len({len(parameters), len(runs), len(layers), len(width)}) != 1:
        raise ValueError(
            f"{len(parameters)} parameter counts, {len(runs)} lists of runs, {len(layers)} depths "
            f"and {len(width)} widths: give one of each for every model"
        )
    order = sorted(range(len(parameters)), key=lambda m: (parameters[m], layers[m], width[m]))
    P = numbers("parameters", [parameters[m] for m in order])
    if not (np.isfinite(P) & (P >= 1)).all():
        raise ValueError(f"parameters must be numbers from 1 up, not {list(parameters)}")
    sizes = sorted(set(parameters))
    if len(sizes) < 2:
        raise ValueError(
            f"no law from models of one size ({f'{sizes[0]:,} parameters' if sizes else 'none'}): "
            "add a --width or --layers"
        )
    for m in order:
        if len(runs[m]) != 2:
            raise ValueError(f"runs must be pairs of counts and memorized bits, not {runs[m]!r}")
    groups = [by_count(*runs[m]) for m in order]
    capacity = np.array([max(bits.mean() for bits in group.values()) for group in groups])
    for m, bits in zip(order, capacity, strict=True):
        if not 1 <= bits < np.inf:
            raise ValueError(
                f"the model of {parameters[m]:,} parameters ({layers[m]} layers, width {width[m]}) "
                f"has a capacity of {bits:.3g} bits: leave it out, or train it longer"
            )
    rng = np.random.default_rng(0)
    drawn = np.stack([capacity_replicates(group, rng) for group in groups], axis=1)
    models = rng.integers(len(P), size=drawn.shape)  # the draws of bits_per_parameter
    sizes_drawn, bits_drawn = P[models], np.take_along_axis(drawn, models, axis=1)
    slope = slope_through_origin(P, capacity)
    slopes = (sizes_drawn * bits_drawn).sum(1) / (sizes_drawn**2).sum(1)
    models = _apart(models, P, rng)
    sizes_drawn, bits_drawn = P[models], np.take_along_axis(drawn, models, axis=1)
    line, lines = _line(P, capacity), _line(sizes_drawn, bits_drawn)
    power = _line(np.log(P), np.log(capacity))
    # Seeds drawn again may hold nothing together, which has no logarithm.
    powers = _line(np.log(sizes_drawn), np.log(np.maximum(bits_drawn, 1.0)))
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
    rows: Sequence[Row],
    precision: str | None = None,
    convention: Convention = "strict",
) -> Law:
    """The scaling law over the finished rows of a sweep at one precision.

    Args:
        rows: as `load_rows` gives them; failed ones and those of unknown entropy do not count.
        precision: by default fp32 if there is a finished row of it, else the first by name.
        convention: of the memorized bits.

    Raises:
        ValueError: an unknown convention, no finished row of the precision, or no law.
    """
    models = by_model(fitted_rows(rows, precision, convention))
    firsts = [runs[0] for runs in models]
    return scaling_law(
        [first["parameters"] for first in firsts],
        [
            (
                [row["sequences"]["count"] for row in runs],
                [row["memorized_bits"][convention] for row in runs],
            )
            for runs in models
        ],
        [first["model"]["layers"] for first in firsts],
        [first["model"]["width"] for first in firsts],
    )


def fitted_rows(
    rows: Sequence[Row], precision: str | None = None, convention: Convention = "strict"
) -> list[Row]:
    """The rows that `law_of_rows` fits; raises what `law_of_rows` raises."""
    if convention not in get_args(Convention):
        raise ValueError(f"convention must be one of {get_args(Convention)}, not {convention!r}")
    done = [
        row
        for row in rows
        if row["status"] == "done" and row["memorized_bits"][convention] is not None
    ]
    there = sorted({row["precision"] for row in done}, reverse=True)
    if not there:
        raise ValueError(f"no finished run among {len(rows)} rows: run `fastmem capacity` first")
    precision = precision or there[0]
    if precision not in there:
        raise ValueError(f"no finished run at {precision!r}: use one of {', '.join(there)}")
    return [row for row in done if row["precision"] == precision]


def _apart(models: Places, P: Floats, rng: np.random.Generator) -> Places:
    """(replicates, M) draws of models, those of one size only drawn again."""
    models = models.copy()
    while (alike := np.ptp(P[models], axis=1) == 0).any():
        models[alike] = rng.integers(len(P), size=(int(alike.sum()), len(P)))
    return models


def _line(x: Floats, y: Floats) -> Floats:
    """(..., 2) the slope and the intercept of the least-squares line through (..., M) points."""
    x0, y0 = x.mean(-1, keepdims=True), y.mean(-1, keepdims=True)
    slope = ((x - x0) * (y - y0)).sum(-1) / ((x - x0) ** 2).sum(-1)
    return np.stack([slope, y0[..., 0] - slope * x0[..., 0]], axis=-1)
