"""Training to memorize: one model, one data set, one result.

B batch, S tokens a sequence, N sequences.
"""

import bisect
import io
import math
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastmem.memorization import memorized_bits
from fastmem.model import GPT
from fastmem.order import batch_indices
from fastmem.score import NotFinite, Precision, check_fit, compute_in, sequence_bits
from fastmem.sequences import Sequences, sent
from fastmem.storage import read_sealed, write_sealed

DEFAULT_STEPS = 1000
RESIDENT_BYTES = 1 << 30
"""A data set up to this size stays in memory; a larger one is made or read batch by batch."""
RESIDENT_SHARE = 0.1
"""The same on a GPU, as a share of its memory; larger random sets are made there, batch by batch,
without a copy of tokens from the host."""
CURVE = sorted({0.5**k for k in range(1, 10)} | {k / 10 for k in range(1, 11)})
"""The shares of the budget at which the whole set is scored."""
CHECKPOINT_SECONDS = 20.0
DISPLAY_SECONDS = 0.5


@dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW, linear warm-up, then linear decay to zero.

    The budget is one of steps, epochs and seconds; with none of them it is 1000 steps.
    """

    steps: int | None = None
    """Budget in optimizer steps."""
    epochs: float | None = None
    """Budget in passes over the data set."""
    seconds: float | None = None
    """Budget in seconds, scoring along the way included; not the same bytes twice."""
    batch: int = 128
    """Sequences a step; the whole set where it is smaller."""
    lr: float = 0.02
    """Peak learning rate."""
    warmup: float = 0.02
    """Share of the budget in which the learning rate rises."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.99
    """AdamW's decay of the mean squared gradient."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    precision: Precision = "fp32"
    """fp32, bf16-mixed (fp32 weights and optimizer, bf16 compute) or bf16-true (all bf16)."""
    seed: int = 0
    """Of the order in which sequences are visited."""

    def __post_init__(self) -> None:
        budgets = {n: getattr(self, n) for n in ("steps", "epochs", "seconds")}
        given = {n: v for n, v in budgets.items() if v is not None}
        if len(given) > 1:
            raise ValueError(f"the budget is one of steps, epochs and seconds, not {given}")
        if self.steps is not None and not isinstance(self.steps, int):
            raise ValueError(f"steps must be a whole number, not {self.steps!r}")
        if not isinstance(self.batch, int) or self.batch < 1:
            raise ValueError(f"batch must be a whole number from 1 up, not {self.batch!r}")
        for name in (*given, "lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, not {getattr(self, name)}")
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision must be one of {get_args(Precision)}, not {self.precision!r}"
            )
        for name in ("warmup", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, not {self.weight_decay}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, not {self.seed!r}")


@dataclass(frozen=True)
class Point:
    """The state of a run at one step, the whole set scored."""

    step: int
    seconds: float
    memorized_bits: float
    """Strict convention; nan where the entropy of the set is not known."""


@dataclass
class TrainResult:
    """What a run did; memorized_bits and the curve are in the strict convention."""

    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    memorized_bits: float = 0.0
    curve: list[Point] = field(default_factory=list)


class Diverged(RuntimeError):
    """The loss left the range of a model that learns."""


def train(
    model: GPT,
    sequences: Sequences,
    config: TrainConfig | None = None,
    checkpoint: str | Path | None = None,
    progress: bool | str = True,
) -> TrainResult:
    """Trains the model, in place, to code the sequences in as few bits as it can.

    Minimizes `model.token_bits(batch).mean()` over batches in the order of
    `permutation(config.seed, epoch, N)`; a batch may end one epoch and begin the next.

    Args:
        model: trained on its device; "bf16-true" turns its weights to bfloat16.
        sequences: the data set, of the model's vocabulary and at most its length.
        config: budget, optimizer and precision.
        checkpoint: a file to save the run in, every 20 seconds and at the end. If it is there,
            the run goes on from it and ends with the same bytes (same device and threads) as one
            that never stopped. The caller deletes it.
        progress: shows a bar when standard error is a terminal; a string is written before it.

    Raises:
        ValueError: arguments that do not fit each other, or a checkpoint of another run.
        Diverged: a loss that is not finite, or twice that of the first step; names step and rate.

    Example:
        >>> import fastmem
        >>> model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4))
        >>> sequences = fastmem.UniformSequences(8, length=4, vocab=16)
        >>> result = train(model, sequences, TrainConfig(steps=100), progress=False)
        >>> result.epochs, result.memorized_bits > 0.3 * sequences.coded_entropy_bits
        (100.0, True)

    Source: the capacity experiment of arXiv 2505.24832, section 3.
    """
    config = config or TrainConfig()
    check_fit(model.config, sequences)
    run = _Run(model, sequences, config, None if checkpoint is None else Path(checkpoint))
    with run.bar(progress) as bar:
        while not run.finished:
            run.step(bar)
        run.save()
    return run.result


class _Run:
    """One training run between two steps: everything that a checkpoint holds."""

    def __init__(
        self, model: GPT, sequences: Sequences, config: TrainConfig, checkpoint: Path | None
    ) -> None:
        if config.precision == "bf16-true":
            model.to(torch.bfloat16)
        self.model, self.sequences, self.config = model, sequences, config
        self.checkpoint = checkpoint
        self.batch = min(config.batch, sequences.count)
        self.total_steps = config.steps
        if config.epochs is not None:
            self.total_steps = math.ceil(config.epochs * sequences.count / self.batch)
        elif config.seconds is None and config.steps is None:
            self.total_steps = DEFAULT_STEPS
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=model.device.type in ("cpu", "cuda"),
        )
        self.tokens: Tensor | None = None
        if sequences.count * sequences.length * 8 <= resident_bytes(model.device):
            self.tokens = sequences.to_torch(model.device)
        self.loss_limit = math.inf
        self.result = TrainResult()
        if checkpoint is not None and checkpoint.exists():
            self._restore(checkpoint)
        self.saved = self.shown = self.tick = time.perf_counter()

    @property
    def share(self) -> float:
        """How much of the budget is spent."""
        if self.total_steps is not None:
            return self.result.steps / self.total_steps
        assert self.config.seconds is not None
        return min(1.0, self.result.seconds / self.config.seconds)

    @property
    def finished(self) -> bool:
        return self.share >= 1

    @property
    def rate(self) -> float:
        """The learning rate: up to config.lr at the end of the warm-up, then down to zero."""
        # The middle of the step, so that neither the first nor the last is lost to a rate of 0.
        share = max(self.share, 0.5 / DEFAULT_STEPS)
        if self.total_steps is not None:
            share = self.share + 0.5 / self.total_steps
        warmup = self.config.warmup
        return self.config.lr * min(
            1.0 if warmup == 0 else share / warmup, (1 - share) / (1 - warmup)
        )

    def step(self, bar: "tqdm[Any]") -> None:
        before, rate = self.share, self.rate
        # Autocast keeps its bfloat16 weights until it ends, so it must end before they change.
        with compute_in(self.config.precision, self.model.device):
            loss = self.model.token_bits(self._batch()).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.result.steps += 1
        self._count_time()
        # Reading the loss makes a GPU wait, so there only a display or a score pays for it.
        scores = bisect.bisect(CURVE, self.share) > bisect.bisect(CURVE, before)
        shows = self.tick - self.shown > DISPLAY_SECONDS
        if scores or shows or self.result.steps == 1 or loss.device.type == "cpu":
            value = loss.item()
            self._check_loss(value, rate)
            if shows or scores:
                self._show(bar, value)
        if scores:
            self._score(rate)
        if self.tick - self.saved > CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes the checkpoint, if there is to be one, whole or not at all."""
        if self.checkpoint is None:
            return
        buffer = io.BytesIO()
        state = {
            "identity": self._identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "result": asdict(self.result),
            "loss_limit": self.loss_limit,
        }
        torch.save(state, buffer)
        write_sealed(self.checkpoint, buffer.getvalue())
        self.saved = time.perf_counter()

    def bar(self, progress: bool | str) -> "tqdm[Any]":
        return tqdm(
            desc=progress if isinstance(progress, str) else None,
            total=self.total_steps or self.config.seconds,
            initial=self.result.steps if self.total_steps else self.result.seconds,
            unit=" step" if self.total_steps else " s",
            disable=None if progress else True,
            bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f}{unit}, {remaining} left{postfix}",
            leave=False,
        )

    def _batch(self) -> Tensor:  # (B, S)
        indices = batch_indices(
            self.config.seed, self.result.steps, self.batch, self.sequences.count
        )
        if self.tokens is None:
            return self.sequences.to_torch(self.model.device, indices)
        return self.tokens[sent(indices.view(np.int64), self.tokens.device)]

    def _score(self, rate: float) -> None:
        try:
            bits = sequence_bits(self.model, self.sequences, self.config.precision)
        except NotFinite as error:
            raise self._diverged("the weights are not finite", rate) from error
        memorized = memorized_bits(bits, self.sequences).strict
        self._count_time()
        result = self.result
        result.memorized_bits = memorized
        result.epochs = result.steps * self.batch / self.sequences.count
        result.tokens_per_second = (
            result.steps * self.batch * self.sequences.length / result.seconds
        )
        result.curve.append(Point(result.steps, result.seconds, memorized))

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.result.seconds += now - self.tick
        self.tick = now

    def _check_loss(self, loss: float, rate: float) -> None:
        if self.loss_limit == math.inf:
            self.loss_limit = 2 * max(loss, math.log2(self.sequences.vocab)) + 1
        if not loss <= self.loss_limit:
            raise self._diverged(f"the loss is {loss:.3g} bits per token", rate)

    def _diverged(self, what: str, rate: float) -> Diverged:
        return Diverged(
            f"diverged at step {self.result.steps}, learning rate {rate:.3g}: {what}; "
            f"try --lr {self.config.lr / 3:.2g}"
        )

    def _show(self, bar: "tqdm[Any]", loss: float) -> None:
        self.shown = self.tick
        result, sequences = self.result, self.sequences
        memorized = sequences.coded_entropy_bits - loss * self._coded_tokens
        speed = result.steps * self.batch * sequences.length / result.seconds
        bar.n = result.steps if self.total_steps else result.seconds
        held = (
            f"{memorized:,.0f} bits memorized, "
            f"{memorized / self.model.parameter_count:.2f} bits/parameter, "
        )
        bar.set_postfix_str(
            f"{loss:.3f} bits/token, {'' if math.isnan(memorized) else held}{speed:,.0f} tokens/s"
        )

    @cached_property
    def _coded_tokens(self) -> float:
        """Of the whole set, those of a sequence that stands in it twice counted once."""
        distinct = float((1 / self.sequences.copies()).sum())
        return distinct * (self.sequences.length - self.sequences.context)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to go on."""
        return {
            "model": asdict(self.model.config),
            "sequences": self.sequences.description(),
            "train": asdict(self.config),
        }

    def _restore(self, path: Path) -> None:
        state = torch.load(io.BytesIO(read_sealed(path)), map_location=self.model.device)
        ours = self._identity()
        for part, theirs in state["identity"].items():
            for name, value in theirs.items():
                if ours[part].get(name) != value:
                    raise ValueError(
                        f"{path} is of another run ({part} {name} is {value} there, "
                        f"{ours[part].get(name)} here): delete it or give another"
                    )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss_limit = state["loss_limit"]
        result = state["result"]
        self.result = TrainResult(**result | {"curve": [Point(**p) for p in result["curve"]]})


def resident_bytes(device: torch.device) -> float:
    """The largest data set, of int64 tokens, that is kept on the device as a whole."""
    if device.type != "cuda":
        return RESIDENT_BYTES
    _, total = torch.cuda.mem_get_info(device)
    return RESIDENT_SHARE * total
