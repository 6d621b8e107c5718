"""Training to memorize: E models of one shape together, each on its own data set.

E models, B batch, S tokens a sequence, N sequences.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastmem.data.sequences import Sequences, sent
from fastmem.models.engine import make_engine, one_thread, stacked
from fastmem.models.flops import matmul_rate
from fastmem.models.gpt import GPT
from fastmem.training.config import TrainConfig
from fastmem.training.optimizer import RowOptimizer, State
from fastmem.training.profile import phase
from fastmem.training.run_state import Diverged, RunState, TrainResult
from fastmem.training.step import GraphedStep, Step, cuda_graph, is_graphed

RESIDENT_BYTES = 1 << 30
"""Data sets up to this size stay in memory; larger ones are made or read batch by batch."""
RESIDENT_SHARE = 0.1
"""The same on a GPU, as a share of its memory; larger random sets are made there, batch by batch,
without a copy of tokens from the host."""
CHECKPOINT_SECONDS: float | str = os.environ.get("FASTMEM_CHECKPOINT_SECONDS", "20")
"""Between two checkpoints; the environment says it to workers too."""
DISPLAY_SECONDS = 0.5
READ_STEPS = 50
"""Losses are read, which a GPU waits for, so many steps at a time. Each counts as if it were read
after its step: what is a divergence, and at which step, depends on no device and no clock."""


def train(
    model: GPT,
    sequences: Sequences,
    config: TrainConfig | None = None,
    checkpoint: str | Path | None = None,
    progress: bool | str = True,
) -> TrainResult:
    """Trains the model, in place, to code the sequences in as few bits as it can.

    Minimizes `model.token_bits(batch).mean()` over batches in the order of
    `permutation(config.seed, epoch, N)`; a batch may end one epoch and begin the next. In float32
    on a CPU the C++ core computes loss and gradients in one call, else PyTorch does.

    Args:
        model: trained on its device; "bf16-true" turns its weights to bfloat16. Its parameters
            become views of one tensor.
        sequences: the data set, of the model's vocabulary and at most its length.
        config: budget, optimizer and precision.
        checkpoint: a file to save the run in, every 20 seconds and at the end. If it is there,
            the run goes on from it and ends with the same bytes (same device and threads) as one
            that never stopped. The caller deletes it.
        progress: shows a bar when standard error is a terminal; a string is written before it.

    Raises:
        ValueError: arguments that do not fit each other, or a checkpoint of another run.
        Diverged: a loss that is not finite, ten times that of the first step, or twice that for 50
            steps; names step and rate. It is raised up to READ_STEPS steps later.

    Example:
        >>> import fastmem
        >>> model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4))
        >>> sequences = fastmem.UniformSequences(8, length=4, vocab=16)
        >>> result = train(model, sequences, TrainConfig(steps=100), progress=False)
        >>> result.epochs, result.memorized_bits > 0.3 * sequences.coded_entropy_bits
        (100.0, True)

    Source: the capacity experiment of arXiv 2505.24832, section 3.
    """
    (outcome,) = train_many([model], [sequences], [config or TrainConfig()], [checkpoint], progress)
    if isinstance(outcome, Diverged):
        raise outcome
    return outcome


def train_many(
    models: Sequence[GPT],
    sets: Sequence[Sequences],
    configs: Sequence[TrainConfig] | None = None,
    checkpoints: Sequence[str | Path | None] | None = None,
    progress: bool | str = True,
) -> list[TrainResult | Diverged]:
    """Trains E models of one shape together; each gets what `train` would give it alone.

    Computes `[train(*run) for run in zip(models, sets, configs, checkpoints)]`, to rounding, with
    one step of all models in one computation. A model that has spent its budget, or diverged,
    leaves; the others go on.

    Args:
        models: E different models of one shape, on one device.
        sets: a data set for each, all of one length and, up to the batch size, one size.
        configs: a config for each; precision, stochastic rounding and batch size are the same.
            Budgets in seconds share the clock: each model counts its part of the time.
        checkpoints: a file for each, or None; they may be of different steps.
        progress: as in `train`.

    Returns:
        For each model its result, or the Diverged that `train` would raise.

    Raises:
        ValueError: arguments that do not fit each other, or a checkpoint of another run.

    Example:
        >>> import fastmem
        >>> shape = fastmem.GPTConfig(1, 8, 2, vocab=16, length=4)
        >>> models = [fastmem.GPT(shape, seed) for seed in (0, 1)]
        >>> sets = [fastmem.UniformSequences(8, length=4, vocab=16, seed=s) for s in (0, 1)]
        >>> [r.steps for r in train_many(models, sets, [TrainConfig(steps=9)] * 2, progress=False)]
        [9, 9]
    """
    E = len(models)
    configs = [TrainConfig()] * E if configs is None else configs
    checkpoints = [None] * E if checkpoints is None else checkpoints
    _check(models, sets, configs, checkpoints)
    if not E:
        return []
    members = [
        RunState(model, sequences, config, None if path is None else Path(path))
        for model, sequences, config, path in zip(models, sets, configs, checkpoints, strict=True)
    ]
    group = Group(members)
    with group.bar(progress) as bar:
        while group.members:
            with phase("step"):
                group.step(bar)
    bfloat16 = configs[0].precision != "fp32"
    dtype = torch.bfloat16 if bfloat16 else models[0].head.dtype
    rate = matmul_rate(models[0].device, dtype)
    for member in members:
        member.result.mfu = member.result.flops_per_second / rate
    return [group.failures.get(member, member.result) for member in members]


class Group:
    """Members that take their steps together."""

    def __init__(self, members: Sequence[RunState]) -> None:
        self.failures: dict[RunState, Diverged] = {}
        self.everyone = list(members)
        self._form([(m, m.optimizer_state) for m in members if not m.finished])
        self._saved = self._shown = self._tick = time.perf_counter()

    def step(self, bar: "tqdm[Any]") -> None:
        """One step of each member; scores, shows, saves and lets go those for which it is time."""
        members, rates = self.members, [member.rate for member in self.members]
        with phase("data"), one_thread():
            self._gather()
        self._losses[len(self._rates)] = self._step.take(self._tokens, rates)
        self._rates.append(rates)
        for member in members:
            member.result.steps += 1
        self._count_time()
        due = [member.due for member in members]
        shows = self._tick - self._shown > DISPLAY_SECONDS or any(due)
        if shows or len(self._rates) == READ_STEPS:
            losses = self._read()
            self._score(rates, due)
            if shows:
                self._show(bar, losses)
        if self._tick - self._saved > float(CHECKPOINT_SECONDS):
            self.save()
        if any(member.finished or member in self.failures for member in members):
            self._let_go()

    def save(self) -> None:
        """Writes the checkpoint of each member that is to have one and did not diverge."""
        self._read()
        for e, member in enumerate(self.members):
            if member not in self.failures:
                member.save(self._optimizer.state(e))
        self._saved = time.perf_counter()

    def bar(self, progress: bool | str) -> "tqdm[Any]":
        shape = "{l_bar}{bar}| {n:.0f}/{total:.0f}{unit}, {remaining} left{postfix}"
        total, unit = float(len(self.everyone)), " runs"
        if len(self.everyone) == 1:
            (member,) = self.everyone
            total = member.total_steps or member.config.seconds or 0.0
            unit = " step" if member.total_steps else " s"
        else:
            shape = shape.replace("{n:.0f}", "{n:.1f}")
        return tqdm(
            desc=progress if isinstance(progress, str) else None,
            total=total,
            initial=self._done,
            unit=unit,
            disable=None if progress else True,
            bar_format=shape,
            leave=False,
        )

    @property
    def _done(self) -> float:
        """How far the bar is."""
        if len(self.everyone) > 1:
            return sum(1.0 if m in self.failures else m.share for m in self.everyone)
        (member,) = self.everyone
        return member.result.steps if member.total_steps else member.result.seconds

    def _form(self, together: Sequence[tuple[RunState, State | None]]) -> None:
        """Puts the weights of these members into one tensor."""
        self.members = [member for member, _ in together]
        if not together:
            return
        models = [member.model for member in self.members]
        configs = [member.config for member in self.members]
        states = [state for _, state in together]
        engine = make_engine(models[0], stacked(models), configs[0].precision)
        rows = engine.parameters, engine.gradients
        schedules = [member.schedule for member in self.members]
        embeddings = sum(p.numel() for n, p in models[0].named_parameters() if "embedding" in n)
        device, sets = models[0].device, [member.sequences for member in self.members]
        graphed = is_graphed(device, configs[0].precision)
        self._optimizer = RowOptimizer(*rows, configs, states, schedules, embeddings, graphed)
        self._step = (
            GraphedStep(engine, self._optimizer, cuda_graph)
            if graphed
            else Step(engine, self._optimizer)
        )
        E, B, S = len(models), self.members[0].batch, sets[0].length
        # What is not read yet: the losses, and the rate of each member in each of their steps.
        self._losses = torch.empty(READ_STEPS, E, dtype=torch.float64, device=device)
        self._rates: list[list[float]] = []
        self._tokens = torch.empty(E, B, S, dtype=torch.int64, device=device)
        self._sets: Tensor | None = None
        if sum(s.count for s in sets) * S * 8 <= resident_bytes(device):
            self._sets = torch.cat([s.to_torch(device) for s in sets])
            self._starts = np.cumsum([0, *(s.count for s in sets[:-1])])

    def _gather(self) -> None:
        """Writes the tokens of the next step."""
        indices = [member.indices() for member in self.members]
        if self._sets is None:
            for place, member, own in zip(self._tokens, self.members, indices, strict=True):
                place.copy_(member.sequences.to_torch(place.device, own.view(np.uint64)))
        else:
            moved = zip(indices, self._starts, strict=True)
            rows = np.concatenate([own + start for own, start in moved])
            out = self._tokens.flatten(0, 1)
            torch.index_select(self._sets, 0, sent(rows, out.device), out=out)

    def _let_go(self) -> None:
        """Members that are finished or diverged leave, with weights of their own."""
        stay = []
        for e, member in enumerate(self.members):
            if member.finished or member in self.failures:
                if member.finished:
                    member.save(self._optimizer.state(e))
                stacked([member.model])
            else:
                stay.append((member, self._optimizer.state(e)))
        del self._step, self._optimizer  # their memory is wanted for the next
        self._form(stay)

    def _read(self) -> list[float]:
        """Reads the losses since it was last called, checks each, and gives the last of each
        member."""
        unread, all_rates = self._losses[: len(self._rates)].tolist(), self._rates
        self._rates = []
        for e, member in enumerate(self.members):
            first = member.result.steps - len(unread) + 1
            try:
                for step, (losses, rates) in enumerate(zip(unread, all_rates, strict=True), first):
                    member.check(losses[e], rates[e], step)
            except Diverged as failure:
                self._fail(member, failure)
        return unread[-1] if unread else []

    def _fail(self, member: RunState, failure: Diverged) -> None:
        # Tracebacks would keep this group, and the memory of its CUDA graph.
        failure.__cause__ = failure.__context__ = None
        self.failures.setdefault(member, failure.with_traceback(None))

    def _score(self, rates: list[float], due: list[bool]) -> None:
        """Scores the members that are due."""
        scored = []
        for member, rate, is_due in zip(self.members, rates, due, strict=True):
            if is_due and member not in self.failures:
                try:
                    with phase("score"):
                        scored.append((member, member.score(rate)))
                except Diverged as failure:
                    self._fail(member, failure)
        if scored:
            self._count_time()
        for member, memorized in scored:
            member.record(memorized)

    def _show(self, bar: "tqdm[Any]", losses: list[float]) -> None:
        self._shown = self._tick
        bar.n = self._done
        if len(self.everyone) == 1:
            text = self.members[0].line(losses[0])
        else:
            text = f"{sum(losses) / len(losses):.3f} bits/token, "
            text += f"{self.members[0].speed:,.0f} tokens/s"
        bar.set_postfix_str(text)

    def _count_time(self) -> None:
        now = time.perf_counter()
        part = (now - self._tick) / len(self.members)
        for member in self.members:
            member.result.seconds += part
        self._tick = now


def resident_bytes(device: torch.device) -> float:
    """The largest data sets, of int64 tokens, that are kept on the device as a whole."""
    if device.type != "cuda":
        return RESIDENT_BYTES
    _, total = torch.cuda.mem_get_info(device)
    return RESIDENT_SHARE * total


def _check(
    models: Sequence[GPT],
    sets: Sequence[Sequences],
    configs: Sequence[TrainConfig],
    checkpoints: Sequence[str | Path | None],
) -> None:
    """ValueError where models cannot be trained together."""
    lengths = len(models), len(sets), len(configs), len(checkpoints)
    if len(set(lengths)) > 1:
        raise ValueError(
            "expected one data set, config and checkpoint for each model, not "
            "{} models, {} sets, {} configs and {} checkpoints".format(*lengths)
        )
    for what, values, kind in (
        ("data set must be a fastmem.Sequences", sets, Sequences),
        ("config must be a fastmem.TrainConfig", configs, TrainConfig),
        ("checkpoint must be a path or None", checkpoints, str | Path | None),
    ):
        for value in values:
            if not isinstance(value, kind):
                raise ValueError(f"a {what}, not {value!r} ({type(value).__name__})")
    try:
        seconds = float(CHECKPOINT_SECONDS)
    except ValueError:
        seconds = -1
    if not seconds >= 0:
        raise ValueError(
            f"FASTMEM_CHECKPOINT_SECONDS must be seconds, at least 0, not {CHECKPOINT_SECONDS!r}"
        )
    for model in models:
        if type(model) is not GPT:
            raise ValueError(f"a model must be a fastmem.GPT, not {type(model).__name__}")
        if model.parameter_count != model.config.parameter_count:
            raise ValueError(
                f"the model has {model.parameter_count} parameters, its shape "
                f"{model.config.parameter_count}: train it before its modules are changed"
            )
    if len({id(model) for model in models}) < len(models):
        raise ValueError("a model is there twice: make one for each run, fastmem.GPT(config, seed)")
    for model, sequences, config in zip(models, sets, configs, strict=True):
        first = models[0], sets[0], configs[0]
        for what, ours, theirs in (
            ("model", model.config, first[0].config),
            ("device", model.device, first[0].device),
            ("dtype", model.head.dtype, first[0].head.dtype),
            ("length", sequences.length, first[1].length),
            ("precision", config.precision, first[2].precision),
            ("batch", config.step_batch(sequences.count), first[2].step_batch(first[1].count)),
        ):
            if ours != theirs:
                raise ValueError(
                    f"models that are trained together need the same {what}, not {theirs} and "
                    f"{ours}: train them in two calls"
                )
    paths = [Path(path).resolve() for path in checkpoints if path is not None]
    if len(set(paths)) < len(paths):
        raise ValueError("two models have the same checkpoint: give each a file of its own")
