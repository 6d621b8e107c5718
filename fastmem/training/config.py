"""Hyperparameters of training, their defaults and their flags."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from fastmem.base.arguments import number, plain_numbers
from fastmem.memorization.convergence import in_stage
from fastmem.models.engine import Precision
from fastmem.models.gpt import GPTConfig

DEFAULT_STEPS = 4000
PEAK = 0.04
"""Learning rate of small models."""
Until = Literal["budget", "converged"]


@dataclass(frozen=True)
class Hyperparameters:
    """Budget and optimizer of a run, the same for all runs of a sweep.

    The optimizer is AdamW with linear warm-up, then linear decay to zero. The budget is one of
    steps, epochs and seconds, by default 4000 steps. With until="converged" a run may stop before
    its budget is spent (see `fastmem.memorization.convergence`).
    """

    steps: int | None = None
    """Budget in optimizer steps; 4000 if neither epochs nor seconds is given."""
    epochs: float | None = None
    """Budget in passes over the data set."""
    seconds: float | None = None
    """Budget in seconds, scoring included; two runs give different bytes. Models trained together
    share the clock: each counts its part of the time."""
    until: Until = "budget"
    """budget, or converged: train in stages of doubled steps, each with a warm-up and a decay,
    until a stage adds too little."""
    tolerance: float = 0.02
    """Fraction of the memorized bits that a doubling of steps must add to go on; 0 always goes
    on."""
    batch: int = 128
    """Sequences a step; the whole data set where it is smaller."""
    lr: float | None = None
    """Peak learning rate; by default from the shape of the model."""
    embedding_lr: float | None = None
    """Peak learning rate of the embeddings; by default lr if given, else from the shape."""
    warmup: float = 0.02
    """Fraction of the budget, or of each stage, in which the learning rate rises."""
    beta1: float = 0.8
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.99
    """AdamW's decay of the mean squared gradient."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        budgets = {n: getattr(self, n) for n in ("steps", "epochs", "seconds")}
        given = {n: v for n, v in budgets.items() if v is not None}
        if len(given) > 1:
            raise ValueError(f"the budget is one of steps, epochs and seconds, not {given}")
        if self.steps is not None and not _is_int(self.steps):
            raise ValueError(f"steps must be a whole number, not {self.steps!r}: pass an int")
        if not _is_int(self.batch) or self.batch < 1:
            raise ValueError(f"batch must be a whole number from 1 up, not {self.batch!r}")
        rates = [name for name in ("lr", "embedding_lr") if getattr(self, name) is not None]
        for name in (*given, *rates, "clip"):
            if not 0 < number(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, not {getattr(self, name)}")
        if self.until not in get_args(Until):
            raise ValueError(f"until must be one of {get_args(Until)}, not {self.until!r}")
        for name in ("tolerance", "warmup", "beta1", "beta2"):
            if not 0 <= number(name, getattr(self, name)) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")
        if not 0 <= number("weight_decay", self.weight_decay) < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, not {self.weight_decay}")

    def hyperparameters(self) -> dict[str, Any]:
        """Each hyperparameter by its name."""
        return {field.name: getattr(self, field.name) for field in fields(Hyperparameters)}


@dataclass(frozen=True)
class TrainConfig(Hyperparameters):
    """How to train one model: hyperparameters, precision and seed."""

    precision: Precision = "fp32"
    """fp32, bf16-mixed (fp32 weights and optimizer, bf16 compute), bf16-true (all bf16) or
    bf16-stochastic (bf16 weights and compute, fp32 updates with stochastic rounding)."""
    seed: int = 0
    """Seed of the order of sequences, and of stochastic rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision must be one of {get_args(Precision)}, not {self.precision!r}"
            )
        if not _is_int(self.seed) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, not {self.seed!r}")

    def total_steps(self, count: int) -> int | None:
        """Steps of the budget for a data set of `count` sequences; None for a budget in seconds."""
        if self.epochs is not None:
            return math.ceil(self.epochs * count / self.step_batch(count))
        return self.steps if self.seconds is not None or self.steps is not None else DEFAULT_STEPS

    def step_batch(self, count: int) -> int:
        """Sequences in a step on a data set of `count` sequences."""
        return min(self.batch, count)

    def for_shape(self, shape: GPTConfig) -> "TrainConfig":
        """A copy with both learning rates; those not given follow from the shape.

        lr is PEAK for up to 12,288 weights in the blocks, 12 · L · D², and PEAK · 12288 /
        (12 · L · D²) for more. embedding_lr is PEAK · cbrt(V / 128), at least PEAK and at most
        2.5 PEAK, for any width; if only lr is given, embedding_lr is lr.

        Example:
            >>> shape = GPTConfig(layers=1, width=64, heads=32, vocab=1024, length=16)
            >>> found = TrainConfig().for_shape(shape)
            >>> found.lr, round(found.embedding_lr, 3)
            (0.01, 0.08)

        Source: measured on small models (docs/lab.md, "The recipe"); hidden weights need a
        smaller rate with width and embeddings do not, as in arXiv 2203.03466.
        """
        lr, embedding_lr = self.lr, self.embedding_lr
        if embedding_lr is None:
            embedding_lr = lr or PEAK * min(2.5, max(1.0, (shape.vocab / 128) ** (1 / 3)))
        if lr is None:
            lr = PEAK * min(1.0, 12288 / (12 * shape.layers * shape.width**2))
        return replace(self, lr=lr, embedding_lr=embedding_lr)

    @property
    def embedding_factor(self) -> float:
        """embedding_lr / lr."""
        return self.embedding_lr / self.lr if self.lr and self.embedding_lr else 1.0

    def rate(self, spent: float, total_steps: int | None) -> float:
        """Learning rate once a fraction `spent` of the budget is spent.

        The rate rises to lr during the warm-up, then falls to zero; with until="converged" it does
        so in each stage.
        """
        # The middle of the step, so that the rate of the first and of the last step is above 0.
        middle = max(spent, 0.5 / DEFAULT_STEPS)
        if total_steps is not None:
            middle = spent + 0.5 / total_steps
        begin, end = in_stage(spent, total_steps) if self.until == "converged" else (0.0, 1.0)
        # A stage may end between two steps, before the middle of its last step.
        place = (min(middle, end) - begin) / (end - begin)
        rise = 1.0 if self.warmup == 0 else place / self.warmup
        if self.lr is None:
            raise ValueError("lr is None and has no default without a shape: use for_shape(shape)")
        return self.lr * min(rise, (1 - place) / (1 - self.warmup))


def _is_int(value: object) -> bool:
    """True for an int that JSON writes as a number: not a bool, not an integer of NumPy."""
    return isinstance(value, int) and not isinstance(value, bool)
