"""How to train: the one source of flags and defaults."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from fastmem.base.arguments import number
from fastmem.memorization.convergence import in_stage
from fastmem.models.engine import Precision
from fastmem.models.gpt import GPTConfig

DEFAULT_STEPS = 4000
PEAK = 0.04
"""The learning rate of small models."""
Until = Literal["budget", "converged"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW, linear warm-up, then linear decay to zero.

    The budget is one of steps, epochs and seconds; with none of them it is 4000 steps. Until
    "converged" it is the most that is spent: see fastmem.memorization.convergence.
    """

    steps: int | None = None
    """Budget in optimizer steps."""
    epochs: float | None = None
    """Budget in passes over the data set."""
    seconds: float | None = None
    """Budget in seconds, scoring along the way included; not the same bytes twice. Models that are
    trained together share the clock: each counts its part of the time."""
    until: Until = "budget"
    """budget, or converged: in stages of doubled steps, each with a warm-up and a decay of its own,
    until one adds too little."""
    tolerance: float = 0.02
    """The share of the memorized bits that a doubling of steps must add to go on; 0 goes on."""
    batch: int = 128
    """Sequences a step; the whole set where it is smaller."""
    lr: float | None = None
    """Peak learning rate; by default from the shape."""
    embedding_lr: float | None = None
    """That of the embeddings; by default from the shape, or of lr where that is given."""
    warmup: float = 0.02
    """Share of the budget, or of each stage, in which the learning rate rises."""
    beta1: float = 0.8
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.99
    """AdamW's decay of the mean squared gradient."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    precision: Precision = "fp32"
    """fp32, bf16-mixed (fp32 weights and optimizer, bf16 compute), bf16-true (all bf16) or
    bf16-stochastic (bf16 weights and compute, updates in fp32 and rounded at random)."""
    seed: int = 0
    """Of the order in which sequences are visited, and of stochastic rounding."""

    def __post_init__(self) -> None:
        budgets = {n: getattr(self, n) for n in ("steps", "epochs", "seconds")}
        given = {n: v for n, v in budgets.items() if v is not None}
        if len(given) > 1:
            raise ValueError(f"the budget is one of steps, epochs and seconds, not {given}")
        if self.steps is not None and not _is_whole(self.steps):
            raise ValueError(f"steps must be a whole number, not {self.steps!r}: pass an int")
        if not _is_whole(self.batch) or self.batch < 1:
            raise ValueError(f"batch must be a whole number from 1 up, not {self.batch!r}")
        rates = [name for name in ("lr", "embedding_lr") if getattr(self, name) is not None]
        for name in (*given, *rates, "clip"):
            if not 0 < number(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, not {getattr(self, name)}")
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision must be one of {get_args(Precision)}, not {self.precision!r}"
            )
        if self.until not in get_args(Until):
            raise ValueError(f"until must be one of {get_args(Until)}, not {self.until!r}")
        for name in ("tolerance", "warmup", "beta1", "beta2"):
            if not 0 <= number(name, getattr(self, name)) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")
        if not 0 <= number("weight_decay", self.weight_decay) < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, not {self.weight_decay}")
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, not {self.seed!r}")

    def total_steps(self, count: int) -> int | None:
        """The steps of the budget for a set of this many sequences; None if it is of seconds."""
        if self.epochs is not None:
            return math.ceil(self.epochs * count / self.step_batch(count))
        return self.steps if self.seconds is not None or self.steps is not None else DEFAULT_STEPS

    def step_batch(self, count: int) -> int:
        """Sequences in a step on a set of this many."""
        return min(self.batch, count)

    def for_shape(self, shape: GPTConfig) -> "TrainConfig":
        """With the learning rates that follow from the shape, where none is given.

        lr is PEAK, and less for more than 12,288 weights between the embeddings, 12 · L · D²: there
        PEAK · 12288 / (12 · L · D²). embedding_lr is PEAK · cbrt(V / 128), from PEAK to 2.5 PEAK,
        whatever the width; if only lr is given, it is that.

        Example:
            >>> shape = GPTConfig(layers=1, width=64, heads=32, vocab=1024, length=16)
            >>> found = TrainConfig().for_shape(shape)
            >>> found.lr, round(found.embedding_lr, 3)
            (0.01, 0.08)

        Source: measured on small models (docs/results.md, "The recipe"); that hidden weights take
        less with width and embeddings do not is as in arXiv 2203.03466.
        """
        lr, embedding_lr = self.lr, self.embedding_lr
        if embedding_lr is None:
            embedding_lr = lr or PEAK * min(2.5, max(1.0, (shape.vocab / 128) ** (1 / 3)))
        if lr is None:
            lr = PEAK * min(1.0, 12288 / (12 * shape.layers * shape.width**2))
        return replace(self, lr=lr, embedding_lr=embedding_lr)

    @property
    def embedding_share(self) -> float:
        """The embeddings' rate as a multiple of the others'."""
        return self.embedding_lr / self.lr if self.lr and self.embedding_lr else 1.0

    def rate(self, share: float, total_steps: int | None) -> float:
        """The learning rate where this share of the budget is spent: up to lr at the end of the
        warm-up, then down to zero; in each stage so, until converged."""
        # The middle of the step, so that neither the first nor the last is lost to a rate of 0.
        middle = max(share, 0.5 / DEFAULT_STEPS)
        if total_steps is not None:
            middle = share + 0.5 / total_steps
        begin, end = in_stage(share, total_steps) if self.until == "converged" else (0.0, 1.0)
        # A stage may end between two steps, before the middle of its last.
        place = (min(middle, end) - begin) / (end - begin)
        rise = 1.0 if self.warmup == 0 else place / self.warmup
        if self.lr is None:
            raise ValueError("lr is None until it is that of a shape: use for_shape(shape)")
        return self.lr * min(rise, (1 - place) / (1 - self.warmup))


def _is_whole(value: object) -> bool:
    """Whether it is an int, and one that JSON writes as a number: no bool, no type of NumPy."""
    return isinstance(value, int) and not isinstance(value, bool)
