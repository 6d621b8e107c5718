"""One training run between two steps: spent budget, curve, checkpoint.

B batch, S tokens a sequence, N sequences.
"""

import bisect
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.nn.utils import vector_to_parameters

from fastmem.base.ranks import current
from fastmem.base.stats import Interval
from fastmem.data.order import batch_indices
from fastmem.data.sequences import Sequences
from fastmem.memorization.bits import memorized_bits
from fastmem.memorization.convergence import has_converged
from fastmem.models.engine import flat, weights_dtype
from fastmem.models.flops import flops_per_token
from fastmem.models.gpt import GPT, frozen, ordered
from fastmem.models.score import NotFinite, check_fit, sequence_bits
from fastmem.models.sharded import is_sharded, reshard
from fastmem.training.checkpoint import read_record, write_record
from fastmem.training.config import TrainConfig
from fastmem.training.curve import (
    CURVE,
    CountedSubset,
    Point,
    estimated,
    sample,
    score_sizes,
    whole_marks,
)
from fastmem.training.optimizer import State

FORMAT = 3
"""Version of the checkpoint format."""
PATIENCE = 50
"""Steps that the loss may stay above twice the first loss: a model that memorized nearly all of a
small data set jumps there now and then, and comes back. No model comes back from ten times."""


@dataclass
class TrainResult:
    """The result of a run; memorized_bits and the curve are in the strict convention.

    Of E models that are trained together, each counts one E-th of the time in `seconds`. So
    tokens_per_second is the speed of all E models, and the seconds of a sweep's rows add up.
    """

    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    flops_per_second: float = 0.0
    """FLOP/s of the matrix products that a GPT needs: tokens_per_second · `flops_per_token`."""
    mfu: float = 0.0
    """flops_per_second / `matmul_rate`, the model FLOPs utilization."""
    memorized_bits: float = 0.0
    """Of the whole data set."""
    curve: list[Point] = field(default_factory=list)
    stages: list[Point] = field(default_factory=list)
    """Points of the curve at the ends of stages, with until="converged"."""
    stopped_by: str | None = None
    """"budget" or "converged"; None while the run trains."""

    def __repr__(self) -> str:
        known = not math.isnan(self.memorized_bits)
        bits = f"{self.memorized_bits:,.0f} bits" if known else "unknown bits"
        return (
            f"TrainResult({bits} memorized, {self.steps:,} steps, "
            f"{self.epochs:,.0f} epochs, {self.seconds:.1f} s, {len(self.curve)} points in curve)"
        )


class Diverged(RuntimeError):
    """The loss is not finite, or far above the first loss."""


class RunState:
    """A model in training, with the state of its run that a checkpoint saves.

    Raises:
        ValueError: a data set that does not fit the model, or a checkpoint of another run.
    """

    def __init__(
        self, model: GPT, sequences: Sequences, config: TrainConfig, checkpoint: Path | None = None
    ) -> None:
        check_fit(model.config, sequences)
        if is_sharded(model):
            reshard(model)
        else:
            model.to(weights_dtype(model, config.precision))
        self.model, self.sequences = model, sequences
        self.config = config.for_shape(model.config)
        self.checkpoint = checkpoint
        self.batch = config.step_batch(sequences.count)
        self.total_steps = config.total_steps(sequences.count)
        self._sample = sample(config, sequences.count)
        self.loss_limit = math.inf
        self.steps_above = 0
        self.result = TrainResult()
        self.optimizer_state: State | None = None
        self._shards: Any = None
        if checkpoint is not None and is_sharded(model):
            from fastmem.training.sharded_checkpoint import ShardedCheckpoint

            self._shards = ShardedCheckpoint(checkpoint)
        if checkpoint is not None:
            self._restore(checkpoint)

    @property
    def fraction(self) -> float:
        """Spent fraction of the budget."""
        return min(1.0, self._spent(self.result.steps, self.result.seconds))

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return self.config.rate(self.fraction, self.total_steps)

    @property
    def schedule(self) -> Hashable:
        """Equal for runs whose learning rate is the same in each step from here on."""
        if self.total_steps is None:
            return self
        return replace(self.config, seed=0), self.total_steps, self.result.steps

    @property
    def ranks(self) -> int:
        """Ranks that train the model."""
        return current().size if is_sharded(self.model) else 1

    def close(self) -> None:
        """Waits for a checkpoint that is being written."""
        if self._shards is not None:
            self._shards.finish()

    @property
    def finished(self) -> bool:
        return self.result.stopped_by is not None

    @property
    def due(self) -> bool:
        """True if the run passed a mark of CURVE since its last score."""
        return _passed(CURVE, self._scored, self.fraction) or self._whole_is_due

    def indices(self) -> NDArray[np.int64]:  # (B,)
        """Indices of the sequences of the next step."""
        count = self.sequences.count
        return batch_indices(self.config.seed, self.result.steps, self.batch, count).view(np.int64)

    def check(self, loss: float, rate: float, step: int) -> None:
        """Raises Diverged if the loss of a step is not finite, or too high for too long."""
        if self.loss_limit == math.inf:
            self.loss_limit = 2 * max(loss, math.log2(self.sequences.vocab)) + 1
        self.steps_above = self.steps_above + 1 if loss > self.loss_limit else 0
        if not loss <= 5 * self.loss_limit or self.steps_above > PATIENCE:
            raise self._diverged(f"the loss is {loss:.3g} bits per token", rate, step)

    @property
    def scored_indices(self) -> NDArray[np.uint64] | None:
        """The sequences of the score that is due; None for all."""
        return None if self._whole_is_due else self._sample

    @property
    def score_size(self) -> int:
        """How many sequences the score that is due takes."""
        indices = self.scored_indices
        return self.sequences.count if indices is None else len(indices)

    def score(self, rate: float, on_read: Callable[[int], None] = lambda _: None) -> Interval:
        """Memorized bits of the data set, with bounds if they are an estimate from the sample;
        raises Diverged if they are not finite. `on_read` gets the number of scored sequences."""
        indices, sequences = self.scored_indices, self.sequences
        try:
            read = CountedSubset(sequences, indices, on_read)
            bits = sequence_bits(self.model, read, self.config.precision)
        except NotFinite as error:
            raise self._diverged("the weights are not finite", rate, self.result.steps) from error
        if indices is None:
            return Interval(memorized_bits(bits, sequences).strict)
        return estimated(bits / sequences.copies(indices), sequences)

    def record(self, memorized: Interval) -> None:
        """Adds a point to the curve, and decides whether the run ends there."""
        result, sequences = self.result, self.sequences
        sampled = self._sample if memorized.low is not None else None
        result.memorized_bits = memorized.estimate
        result.epochs = result.steps * self.batch / sequences.count
        result.tokens_per_second = self.speed
        result.flops_per_second = self.speed * flops_per_token(self.model.config, sequences.length)
        at = result.steps, result.seconds, memorized.estimate
        size = None if sampled is None else len(sampled)
        result.curve.append(Point(*at, size, memorized.low, memorized.high))
        self._scored = self.fraction
        if sampled is not None:  # the time of this score may have ended a stage of seconds
            return
        if self.config.until == "converged" and self._whole_is_due:
            result.stages.append(result.curve[-1])
            held = [stage.memorized_bits for stage in result.stages]
            if has_converged(held, self.config.tolerance):
                result.stopped_by = "converged"
        if self.fraction >= 1 and result.stopped_by is None:
            result.stopped_by = "budget"
        self._scored_whole = self.fraction

    @property
    def step_tokens_left(self) -> int:
        """Tokens of the steps that are left of a budget that is not in seconds."""
        left = 0 if self.total_steps is None else self.total_steps - self.result.steps
        return left * self.batch * self.sequences.length

    @property
    def score_tokens_left(self) -> int:
        """Tokens of the remaining scores; with a budget in seconds only the final score, since that
        budget includes the earlier scores."""
        sizes = score_sizes(self.config, self.sequences.count, self._scored)
        return sum(sizes[-1:] if self.total_steps is None else sizes) * self.sequences.length

    @property
    def speed(self) -> float:
        """Tokens per second."""
        tokens = self.result.steps * self.batch * self.sequences.length
        return tokens / max(self.result.seconds, 1e-9)

    def line(self, loss: float) -> str:
        """Text of the progress bar."""
        memorized = self.sequences.coded_entropy_bits - loss * self._coded_tokens
        texts = [f"{loss:.3f} bits/token", f"{self.speed:,.0f} tokens/s"]
        if not math.isnan(memorized):
            texts[:0] = [f"{memorized / self.model.parameter_count:.2f} bits/parameter"]
            texts += [f"{memorized:,.0f} bits memorized"]
        return ", ".join(texts)

    def save(self, optimizer_state: State, wait: bool = True) -> None:
        """Writes the checkpoint atomically, if the run has a path for it. With wait=False a sharded
        run may write while it trains."""
        if self.checkpoint is None:
            return
        record = {
            "format": FORMAT,
            "identity": self._identity(),
            "result": asdict(self.result),
            "loss_limit": self.loss_limit,
            "steps_above": self.steps_above,
        }
        if self._shards is not None:
            self._shards.save(record, self.model, optimizer_state, wait)
            return
        tensors = {"parameters": flat(self.model), "optimizer": optimizer_state}
        write_record(self.checkpoint, record | tensors)

    @cached_property
    def _scored(self) -> float:
        """Fraction of the budget that was spent at the last score."""
        return self._spent_at(self.result.curve)

    @cached_property
    def _scored_whole(self) -> float:
        """Fraction of the budget that was spent at the last score of the whole data set."""
        return self._spent_at([point for point in self.result.curve if point.sampled is None])

    @property
    def _whole_is_due(self) -> bool:
        marks = whole_marks(self.config, self.sequences.count)
        return _passed(marks, self._scored_whole, self.fraction)

    @cached_property
    def _coded_tokens(self) -> float:
        """Coded tokens of the whole data set; a repeated sequence counts once."""
        distinct = float((1 / self.sequences.copies()).sum())
        return distinct * (self.sequences.length - self.sequences.context)

    def _spent_at(self, points: Sequence[Point]) -> float:
        """Fraction of the budget that was spent at the last of the points."""
        return self._spent(points[-1].step, points[-1].seconds) if points else 0.0

    def _spent(self, steps: int, seconds: float) -> float:
        if self.total_steps is not None:
            return steps / self.total_steps
        assert self.config.seconds is not None
        return seconds / self.config.seconds

    def _diverged(self, what: str, rate: float, step: int) -> Diverged:
        peak = self.config.lr
        assert peak is not None  # for_shape gave one
        return Diverged(
            f"diverged at step {step}, learning rate {rate:.3g}: {what}; try --lr {peak / 3:.2g}"
        )

    def _identity(self) -> dict[str, Any]:
        """What must be the same to resume from a checkpoint."""
        return {
            "model": asdict(self.model.config) | {"frozen": frozen(self.model)},
            "sequences": self.sequences.description(),
            "train": asdict(self.config),
        }

    def _restore(self, path: Path) -> None:
        """Goes on from the checkpoint, if there is one."""
        if self._shards is not None:
            found = self._shards.load(self.model, trained_ranges(self.model), self._check)
            if found is None:
                return
            record, self.optimizer_state = found
        elif path.exists():
            record = read_record(path, self.model.device)
            self._check(record, path)
            vector_to_parameters(record["parameters"], ordered(self.model).values())
            self.optimizer_state = record["optimizer"]
        else:
            return
        self.loss_limit, self.steps_above = record["loss_limit"], record["steps_above"]
        result = record["result"]
        points = {name: [Point(**p) for p in result[name]] for name in ("curve", "stages")}
        self.result = TrainResult(**result | points)

    def _check(self, record: dict[str, Any], path: Path) -> None:
        """ValueError for the checkpoint of another run or version."""
        if record.get("format") != FORMAT:
            raise ValueError(
                f"{path} is a checkpoint of another version of fastmem: delete it, and the run "
                "starts from its beginning"
            )
        ours = self._identity()
        record["identity"]["model"].setdefault("frozen", [])  # 0.1.0 trained every weight
        for part, theirs in record["identity"].items():
            for name, value in theirs.items():
                if ours[part].get(name) != value:
                    raise ValueError(
                        f"{path} is the checkpoint of another run ({part} {name} is {value} there, "
                        f"{ours[part].get(name)} here): delete it, or give another file"
                    )


def trained_ranges(model: GPT) -> list[tuple[int, int]]:
    """(begin, end) of each range of a row of the engine whose weights are not frozen."""
    ranges: list[tuple[int, int]] = []
    end = 0
    for p in ordered(model).values():
        begin, end = end, end + p.numel()
        if p.requires_grad:
            joined = ranges and ranges[-1][1] == begin
            ranges.append((ranges.pop()[0] if joined else begin, end))
    return ranges


def _passed(marks: Sequence[float], before: float, now: float) -> bool:
    return bisect.bisect(marks, now) > bisect.bisect(marks, before)
