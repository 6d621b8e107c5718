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
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

from fastmem.base.arguments import user_path
from fastmem.base.terminal import progress_bar
from fastmem.data.array import as_sequences
from fastmem.data.sequences import Sequences, sent
from fastmem.models.engine import make_engine, one_thread, stacked, weights_dtype
from fastmem.models.flops import matmul_rate
from fastmem.models.gpt import GPT, check_model, difference, frozen, ordered
from fastmem.training.config import TrainConfig
from fastmem.training.optimizer import RowOptimizer, State
from fastmem.training.profile import phase
from fastmem.training.run_state import Diverged, RunState, TrainResult
from fastmem.training.step import GraphedStep, Step, cuda_graph, is_graphed

RESIDENT_BYTES = 1 << 30
"""Data sets up to this size stay in memory; larger ones are made or read batch by batch."""
RESIDENT_FRACTION = 0.1
"""The limit on a GPU, as a fraction of its memory; larger random data sets are made on the GPU,
batch by batch."""
CHECKPOINT_SECONDS: float | str = os.environ.get("FASTMEM_CHECKPOINT_SECONDS", "20")
"""Seconds between two checkpoints; workers inherit the environment variable."""
DISPLAY_SECONDS = 0.5
_NOT_A_SET = "a data set must be a fastmem.Sequences"
READ_STEPS = 50
"""Steps between two reads of losses, since a read waits for a GPU. Each loss is checked as if it
were read after its step, so divergence and its step do not depend on device or clock."""


def train(
    model: GPT,
    sequences: Sequences | ArrayLike,
    config: TrainConfig | None = None,
    checkpoint: str | Path | None = None,
    progress: bool | str = True,
) -> TrainResult:
    """Trains the model, in place, to code the sequences in as few bits as possible.

    Minimizes `model.token_bits(batch).mean()` over batches in the order of
    `permutation(config.seed, epoch, N)`; a batch may end one epoch and begin the next. In float32
    on a CPU the C++ core computes loss and gradients in one call, else PyTorch does.

    Args:
        model: a GPT as made, trained on its device. Its weights get the dtype of the precision:
            float32 (float64 stays), bfloat16 for "bf16-true" and "bf16-stochastic". Parameters with
            requires_grad False stay as they are. The others become views of one tensor.
        sequences: the data set, with a vocabulary and a length up to those of the model, or tokens
            as `from_array` takes them.
        config: budget, optimizer and precision.
        checkpoint: file to save the run in, every 20 seconds and at the end. If the file exists,
            the run resumes from it and ends with the same bytes (same device and threads) as a run
            that never stopped. The caller deletes the file.
        progress: shows a bar on a terminal and in a notebook, else a line every 30 seconds; a
            string becomes its label.

    Raises:
        ValueError: arguments that do not fit each other, a checkpoint of another run, or a model
            with hooks, masks or other modules, which training would ignore.
        Diverged: a loss that is not finite, ten times the first loss, or twice the first loss for
            50 steps; names step and learning rate. Raised up to READ_STEPS steps later.

    Example:
        >>> import fastmem
        >>> model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4))
        >>> sequences = fastmem.UniformSequences(8, length=4, vocab=16)
        >>> result = train(model, sequences, TrainConfig(steps=100), progress=False)
        >>> result.epochs, result.memorized_bits > 0.3 * sequences.coded_entropy_bits
        (100.0, True)

    Source: the capacity experiment of arXiv 2505.24832, section 3.
    """
    sequences = as_sequences(_NOT_A_SET, sequences)
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
    """Trains E models of one shape together, each with the result that `train` gives it alone.

    Computes `[train(*run) for run in zip(models, sets, configs, checkpoints)]`, up to rounding,
    with one step of all models in one computation. A model that has spent its budget or diverged
    leaves; the other models continue.

    Args:
        models: E different models of one shape, on one device.
        sets: a data set for each model, all of one length, and of one size if smaller than the
            batch.
        configs: a config for each model, all of one precision and one batch size. Budgets in
            seconds share the clock: each model counts its part of the time.
        checkpoints: a file or None for each model; files may be of different steps.
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
    lengths = len(models), len(sets), len(configs), len(checkpoints)
    if len(set(lengths)) > 1:
        raise ValueError(
            "expected one data set, config and checkpoint for each model, not "
            "{} models, {} sets, {} configs and {} checkpoints".format(*lengths)
        )
    sets = [as_sequences(_NOT_A_SET, one) for one in sets]
    _check_types(sets, configs, checkpoints)
    _check_together(models, sets, configs, checkpoints)
    if not E:
        return []
    runs = [
        RunState(model, sequences, config, None if path is None else user_path(path))
        for model, sequences, config, path in zip(models, sets, configs, checkpoints, strict=True)
    ]
    group = Group(runs)
    # Autocast of the caller must not change the precision.
    with group.bar(progress) as bar, torch.autocast(models[0].device.type, enabled=False):
        while group.runs:
            with phase("step"):
                group.step(bar)
    bfloat16 = configs[0].precision != "fp32"
    rate = matmul_rate(models[0].device, torch.bfloat16 if bfloat16 else models[0].head.dtype)
    for run in runs:
        run.result.mfu = run.result.flops_per_second / rate
    return [group.failures.get(run, run.result) for run in runs]


class Group:
    """Runs that take their steps together."""

    def __init__(self, runs: Sequence[RunState]) -> None:
        self.failures: dict[RunState, Diverged] = {}
        self._all = list(runs)
        self._form([(run, run.optimizer_state) for run in runs if not run.finished])
        self._saved = self._shown = self._tick = time.perf_counter()

    def step(self, bar: "tqdm[Any]") -> None:
        """One step of each run; then scores, shows, saves and removes runs as they are due."""
        runs, rates = self.runs, [run.rate for run in self.runs]
        with phase("data"), one_thread():
            self._gather()
        self._losses[len(self._rates)] = self._step.take(self._tokens, rates)
        self._rates.append(rates)
        for run in runs:
            run.result.steps += 1
        self._count_time()
        due = [run.due for run in runs]
        shows = self._tick - self._shown > DISPLAY_SECONDS or any(due)
        if shows or len(self._rates) == READ_STEPS:
            losses = self._read()
            self._score(rates, due)
            if shows:
                self._show(bar, losses)
        if self._tick - self._saved > float(CHECKPOINT_SECONDS):
            self.save()
        if any(run.finished or run in self.failures for run in runs):
            self._remove_ended()

    def save(self) -> None:
        """Writes the checkpoint of each run that has a path and did not diverge."""
        self._read()
        for e, run in enumerate(self.runs):
            if run not in self.failures:
                run.save(self._optimizer.state(e))
        self._saved = time.perf_counter()

    def bar(self, progress: bool | str) -> "tqdm[Any]":
        """The progress bar: steps or seconds of a single run, else finished runs."""
        total, unit, done = float(len(self._all)), " runs", "{n:.1f}"
        if len(self._all) == 1:
            (run,) = self._all
            total = run.total_steps or run.config.seconds or 0.0
            unit, done = " step" if run.total_steps else " s", "{n:.0f}"
        bar: tqdm[Any] = progress_bar(
            bool(progress),
            desc=progress if isinstance(progress, str) else None,
            total=total,
            initial=self._done,
            unit=unit,
            bar_format="{l_bar}{bar}| " + done + "/{total:.0f}{unit}, {remaining} left{postfix}",
        )
        return bar

    @property
    def _done(self) -> float:
        """The position of the bar."""
        if len(self._all) > 1:
            return sum(1.0 if run in self.failures else run.fraction for run in self._all)
        (run,) = self._all
        return run.result.steps if run.total_steps else run.result.seconds

    def _form(self, together: Sequence[tuple[RunState, State | None]]) -> None:
        """Moves the weights of runs into one tensor, with their optimizer states."""
        self.runs = [run for run, _ in together]
        if not together:
            return
        models, configs = [run.model for run in self.runs], [run.config for run in self.runs]
        states = [state for _, state in together]
        engine = make_engine(models[0], stacked(models), configs[0].precision)
        rows = engine.parameters, engine.gradients
        schedules = [run.schedule for run in self.runs]
        embeddings = sum(p.numel() for n, p in ordered(models[0]).items() if "embedding" in n)
        device, sets = models[0].device, [run.sequences for run in self.runs]
        graphed = is_graphed(device, configs[0].precision)
        trained = _trained(models[0])
        self._optimizer = RowOptimizer(
            *rows, configs, states, schedules, embeddings, graphed, trained
        )
        self._step = (
            GraphedStep(engine, self._optimizer, cuda_graph)
            if graphed
            else Step(engine, self._optimizer)
        )
        E, B, S = len(models), self.runs[0].batch, sets[0].length
        # Unread steps: the loss of each run on the device, and its learning rate.
        self._losses = torch.empty(READ_STEPS, E, dtype=torch.float64, device=device)
        self._rates: list[list[float]] = []
        self._tokens = torch.empty(E, B, S, dtype=torch.int64, device=device)
        self._sets: Tensor | None = None
        if sum(s.count for s in sets) * S * 8 <= resident_bytes(device):
            self._sets = torch.cat([s.to_torch(device) for s in sets])
            self._starts = np.cumsum([0, *(s.count for s in sets[:-1])])

    def _gather(self) -> None:
        """Writes the tokens of the next step."""
        indices = [run.indices() for run in self.runs]
        if self._sets is None:
            for tokens, run, places in zip(self._tokens, self.runs, indices, strict=True):
                tokens.copy_(run.sequences.to_torch(tokens.device, places.view(np.uint64)))
        else:
            moved = zip(indices, self._starts, strict=True)
            rows = np.concatenate([places + start for places, start in moved])
            out = self._tokens.flatten(0, 1)
            torch.index_select(self._sets, 0, sent(rows, out.device), out=out)

    def _remove_ended(self) -> None:
        """Removes finished and diverged runs; their weights leave the common tensor."""
        stay = []
        for e, run in enumerate(self.runs):
            if run.finished or run in self.failures:
                if run.finished:
                    run.save(self._optimizer.state(e))
                stacked([run.model])
            else:
                stay.append((run, self._optimizer.state(e)))
        del self._step, self._optimizer  # frees their memory for the next
        self._form(stay)

    def _read(self) -> list[float]:
        """Reads and checks the unread losses; returns the last of each run."""
        unread, all_rates = self._losses[: len(self._rates)].tolist(), self._rates
        self._rates = []
        for e, run in enumerate(self.runs):
            first = run.result.steps - len(unread) + 1
            try:
                for step, (losses, rates) in enumerate(zip(unread, all_rates, strict=True), first):
                    run.check(losses[e], rates[e], step)
            except Diverged as failure:
                self._fail(run, failure)
        return unread[-1] if unread else []

    def _fail(self, run: RunState, failure: Diverged) -> None:
        # A traceback would keep this group, and the memory of its CUDA graph.
        failure.__cause__ = failure.__context__ = None
        self.failures.setdefault(run, failure.with_traceback(None))

    def _score(self, rates: list[float], due: list[bool]) -> None:
        """Scores the runs that are due."""
        scored = []
        for run, rate, is_due in zip(self.runs, rates, due, strict=True):
            if is_due and run not in self.failures:
                try:
                    with phase("score"):
                        scored.append((run, run.score(rate)))
                except Diverged as failure:
                    self._fail(run, failure)
        if scored:
            self._count_time()
        for run, memorized in scored:
            run.record(memorized)

    def _show(self, bar: "tqdm[Any]", losses: list[float]) -> None:
        self._shown = self._tick
        bar.n = self._done
        if len(self._all) == 1:
            text = self.runs[0].line(losses[0])
        else:
            text = f"{sum(losses) / len(losses):.3f} bits/token, {self.runs[0].speed:,.0f} tokens/s"
        bar.set_postfix_str(text)

    def _count_time(self) -> None:
        now = time.perf_counter()
        part = (now - self._tick) / len(self.runs)
        for run in self.runs:
            run.result.seconds += part
        self._tick = now


def resident_bytes(device: torch.device) -> float:
    """The largest size of data sets, as int64 tokens, that stay on the device."""
    if device.type != "cuda":
        return RESIDENT_BYTES
    _, total = torch.cuda.mem_get_info(device)
    return RESIDENT_FRACTION * total


def _check_types(
    sets: Sequence[Sequences],
    configs: Sequence[TrainConfig],
    checkpoints: Sequence[str | Path | None],
) -> None:
    """ValueError for a value of the wrong type, or an invalid FASTMEM_CHECKPOINT_SECONDS."""
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


def _check_together(
    models: Sequence[GPT],
    sets: Sequence[Sequences],
    configs: Sequence[TrainConfig],
    checkpoints: Sequence[str | Path | None],
) -> None:
    """ValueError if the models cannot be trained together."""
    for model, config in zip(models, configs, strict=True):
        check_model(model)
        if changed := difference(model):
            raise ValueError(
                f"train takes a GPT as fastmem makes it, and would ignore {changed}: remove hooks, "
                "masks and wrappers before, or train with torch.optim"
            )
        _check_frozen(model, config)
    places = [p.data_ptr() for model in models for p in ordered(model).values()]
    if len({id(model) for model in models}) < len(models):
        raise ValueError("a model is there twice: make one for each run, fastmem.GPT(config, seed)")
    if len(set(places)) < len(places):
        raise ValueError("two parameters share memory: clone one, or make the models apart")
    for model, sequences, config in zip(models, sets, configs, strict=True):
        first = models[0], sets[0], configs[0]
        for what, ours, theirs in (
            ("model", model.config, first[0].config),
            ("device", model.device, first[0].device),
            ("dtype", model.head.dtype, first[0].head.dtype),
            ("frozen weights", frozen(model), frozen(first[0])),
            ("length", sequences.length, first[1].length),
            ("precision", config.precision, first[2].precision),
            ("batch", config.step_batch(sequences.count), first[2].step_batch(first[1].count)),
        ):
            if ours != theirs:
                raise ValueError(
                    f"models that are trained together need the same {what}, not {theirs} and "
                    f"{ours}: train them in two calls"
                )
    paths = [user_path(path).resolve() for path in checkpoints if path is not None]
    if len(set(paths)) < len(paths):
        raise ValueError("two models have the same checkpoint: give each model another file")


def _check_frozen(model: GPT, config: TrainConfig) -> None:
    """ValueError if nothing is to be trained, or the precision would round a frozen weight."""
    if not _trained(model):
        raise ValueError("every weight is frozen: call requires_grad_() of the weights to train")
    dtype = weights_dtype(model, config.precision)
    for name in frozen(model):
        p = model.get_parameter(name)
        if not torch.equal(p.to(dtype).to(p.dtype), p):
            raise ValueError(
                f"{config.precision} would round the frozen {name} from {p.dtype} to {dtype}: use "
                f"another precision, or convert the model with model.to({dtype})"
            )


def _trained(model: GPT) -> list[tuple[int, int]]:
    """(begin, end) of each range of a row of the engine whose weights are not frozen."""
    ranges: list[tuple[int, int]] = []
    end = 0
    for p in ordered(model).values():
        begin, end = end, end + p.numel()
        if p.requires_grad:
            joined = ranges and ranges[-1][1] == begin
            ranges.append((ranges.pop()[0] if joined else begin, end))
    return ranges
