"""E models of one shape that take their steps together, each on its own data set.

E models, B batch, S tokens a sequence, N sequences.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastmem.base import ranks
from fastmem.base.terminal import progress_bar, say
from fastmem.data.sequences import sent
from fastmem.models.engine import make_engine, one_thread, stacked
from fastmem.models.gpt import GPT, ordered
from fastmem.models.sharded import ShardedEngine, device_of, is_sharded
from fastmem.training.fused_optimizer import FusedAdamW, make_optimizer
from fastmem.training.optimizer import RowAdamW, State
from fastmem.training.profile import phase
from fastmem.training.run_state import Diverged, RunState, trained_ranges
from fastmem.training.sharded_optimizer import ShardedAdamW
from fastmem.training.step import GraphedStep, Step, cuda_graph, is_graphed

RESIDENT_BYTES = 1 << 30
"""Data sets up to this size stay in memory; larger ones are made or read batch by batch."""
RESIDENT_FRACTION = 0.1
"""The limit on a GPU, as a fraction of its memory; larger random data sets are made on the GPU,
batch by batch."""
CHECKPOINT_SECONDS: float | str = os.environ.get("FASTMEM_CHECKPOINT_SECONDS", "20")
"""Seconds between two checkpoints; workers inherit the environment variable."""
DISPLAY_SECONDS = 0.5
Label = str | Callable[[float | None], str]
"""The label of a progress bar, or a function that makes it from the seconds left, None if
unknown."""
READ_STEPS = 50
"""Steps between two reads of losses, since a read waits for a GPU. Each loss is checked as if it
were read after its step, so divergence and its step do not depend on device or clock."""


class Group:
    """Runs that take their steps together."""

    def __init__(self, runs: Sequence[RunState]) -> None:
        self.failures: dict[RunState, Diverged] = {}
        self._all = list(runs)
        self._label: Callable[[float | None], str] | None = None
        # Tokens and seconds of all steps and of all scores of this process.
        self._trained, self._scored = [0.0, 0.0], [0.0, 0.0]
        self._read_tokens = 0
        """Tokens of the score at work."""
        # All ranks of a sharded model decide by the clock of rank 0 what is due.
        self._clock = ranks.current().clock if is_sharded(runs[0].model) else time.perf_counter
        self._form([(run, run.optimizer_state) for run in runs if not run.finished])
        self._saved = self._shown = self._tick = self._now = self._clock()

    def step(self, bar: "tqdm[Any]") -> None:
        """One step of each run; then scores, shows, saves and removes runs as they are due."""
        runs, rates = self.runs, [run.rate for run in self.runs]
        with phase("data"), one_thread():
            self._gather()
        self._losses[len(self._rates)] = self._step.take(self._tokens, rates)
        self._rates.append(rates)
        for run in runs:
            run.result.steps += 1
        self._trained[0] += self._tokens.numel()
        self._count_time(self._trained)
        due = [run.due for run in runs]
        shows = self._tick - self._shown > DISPLAY_SECONDS or any(due)
        if shows or len(self._rates) == READ_STEPS:
            losses = self._read()
            self._count_time(self._trained)
            self._score(bar, rates, due, losses)
            if shows:
                self._show(bar, losses)
        if self._tick - self._saved > checkpoint_seconds():
            self.save(wait=False)
        self._remove_ended()

    def catch_up(self, bar: "tqdm[Any]") -> None:
        """Does the score that a stop of all ranks left out after their last step."""
        due = [run.due for run in self.runs]
        if any(due):
            rates = [run.rate for run in self.runs]
            self._score(bar, rates, due, [math.nan] * len(rates))
            self._remove_ended()

    def save(self, wait: bool = True) -> None:
        """Writes the checkpoint of each run that has a path and did not diverge."""
        self._read()
        for e, run in enumerate(self.runs):
            if run not in self.failures:
                run.save(self._optimizer.state(e), wait)
        self._saved = self._clock()

    def bar(self, progress: bool | Label) -> "tqdm[Any]":
        """The progress bar: steps or seconds of a single run, else finished runs."""
        total, unit, done = float(len(self._all)), " runs", "{n:.1f}"
        first = ranks.rank_and_size()[0] == 0
        self._label = progress if callable(progress) else None
        desc = progress(None) if callable(progress) else progress if progress is not True else None
        if len(self._all) == 1:
            (run,) = self._all
            total = run.total_steps or run.config.seconds or 0.0
            unit, done = " steps" if run.total_steps else " s", "{n:.0f}"
            if run.result.steps and not run.finished and progress is True and first:
                say(f"goes on after step {run.result.steps:,}")
        place = "{percentage:.0f}%" if self._label else done + "/{total:.0f}{unit}"
        bar: tqdm[Any] = progress_bar(
            bool(progress) and first,
            desc=desc or None,
            total=total,
            initial=self._done,
            unit=unit,
            bar_format=("{desc} |" if desc else "|") + "{bar}| " + place + "{postfix}",
        )
        return bar

    @property
    def seconds_left(self) -> float | None:
        """The time left of all runs, their scores included; None before the first step."""
        tokens, seconds = self._trained
        if not tokens:
            return None
        a_token, scored, scoring = seconds / tokens, *self._scored
        if self._read_tokens:
            scored, scoring = scored + self._read_tokens, scoring + time.perf_counter() - self._tick
        a_score = scoring / scored if scored else a_token / 3  # a forward pass alone
        left = -self._read_tokens * a_score
        for run in self.runs:
            left += run.step_tokens_left * a_token + run.score_tokens_left * a_score
            if run.config.seconds is not None:
                left += max(0.0, run.config.seconds - run.result.seconds)
        return max(0.0, left)

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
        models, sets = [run.model for run in self.runs], [run.sequences for run in self.runs]
        device = device_of(models[0])
        self._own = slice(None)
        self._optimizer: RowAdamW | FusedAdamW | ShardedAdamW
        if is_sharded(models[0]):
            self._form_sharded(*together[0])
        else:
            self._form_flat(models, [state for _, state in together])
        E, S = len(models), sets[0].length
        B = len(range(self.runs[0].batch)[self._own])
        # Unread steps: the loss of each run on the device, and its learning rate.
        self._losses = torch.empty(READ_STEPS, E, dtype=torch.float64, device=device)
        self._rates: list[list[float]] = []
        self._tokens = torch.empty(E, B, S, dtype=torch.int64, device=device)
        self._sets: Tensor | None = None
        if sum(s.count for s in sets) * S * 8 <= resident_bytes(device):
            self._sets = torch.cat([s.to_torch(device) for s in sets])
            self._starts = np.cumsum([0, *(s.count for s in sets[:-1])])

    def _form_flat(self, models: Sequence[GPT], states: Sequence[State | None]) -> None:
        configs = [run.config for run in self.runs]
        engine = make_engine(models[0], stacked(models), configs[0].precision)
        schedules = [run.schedule for run in self.runs]
        embeddings = sum(p.numel() for n, p in ordered(models[0]).items() if "embedding" in n)
        graphed = is_graphed(models[0].device, configs[0].precision)
        self._optimizer = make_optimizer(
            engine.parameters,
            engine.gradients,
            configs,
            states,
            schedules,
            embeddings,
            graphed,
            trained_ranges(models[0]),
        )
        self._step = (
            GraphedStep(engine, self._optimizer, cuda_graph)
            if graphed
            else Step(engine, self._optimizer)
        )

    def _form_sharded(self, run: RunState, state: State | None) -> None:
        job = ranks.current()
        self._optimizer = ShardedAdamW(run.model, run.config, state)
        self._step = Step(ShardedEngine(run.model), self._optimizer)
        own = run.batch // job.size
        self._own = slice(job.rank * own, (job.rank + 1) * own)

    def _gather(self) -> None:
        """Writes the tokens of the next step, those of this rank."""
        indices = [run.indices()[self._own] for run in self.runs]
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
        if not any(run.finished or run in self.failures for run in self.runs):
            return
        stay = []
        for e, run in enumerate(self.runs):
            if run.finished or run in self.failures:
                if run.finished:
                    run.save(self._optimizer.state(e))
                if not is_sharded(run.model):
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

    def _score(
        self, bar: "tqdm[Any]", rates: list[float], due: list[bool], losses: list[float]
    ) -> None:
        """Scores the runs that are due."""
        scored, before = [], 0

        def on_read(read: int) -> None:
            if is_sharded(run.model):  # each rank reads its own
                read = min(read * ranks.current().size, run.score_size)
            self._read_tokens = (before + read) * run.sequences.length
            self._now = self._clock()
            if self._now - self._shown > DISPLAY_SECONDS:
                self._show(bar, losses, f"scoring {read / run.score_size:.0%}")

        for run, rate, is_due in zip(self.runs, rates, due, strict=True):
            if is_due and run not in self.failures:
                try:
                    with phase("score"):
                        scored.append((run, run.score(rate, on_read)))
                except Diverged as failure:
                    self._fail(run, failure)
                before += run.score_size
        self._read_tokens = 0
        if scored:
            self._scored[0] += before * self._tokens.shape[2]
            self._count_time(self._scored)
        for run, memorized in scored:
            run.record(memorized)

    def _show(self, bar: "tqdm[Any]", losses: list[float], *texts: str) -> None:
        self._shown = self._now
        bar.n = self._done
        left = self.seconds_left
        if self._label:
            bar.set_description_str(self._label(left), refresh=False)
        elif left is not None:
            texts = (f"{tqdm.format_interval(left)} left", *texts)
        if len(self._all) == 1:
            text = self.runs[0].line(losses[0])
        else:
            text = f"{sum(losses) / len(losses):.3f} bits/token, {self.runs[0].speed:,.0f} tokens/s"
        bar.set_postfix_str(", ".join([*texts, text]))

    def _count_time(self, of: list[float]) -> None:
        """Counts the time since the last count for the runs, and for steps or scores."""
        self._now = self._clock()
        part = (self._now - self._tick) / len(self.runs)
        for run in self.runs:
            run.result.seconds += part
        of[1] += self._now - self._tick
        self._tick = self._now


def checkpoint_seconds() -> float:
    """CHECKPOINT_SECONDS as a number; ValueError for an invalid environment variable."""
    try:
        seconds = float(CHECKPOINT_SECONDS)
    except ValueError:
        seconds = -1
    if not seconds >= 0:
        raise ValueError(
            f"FASTMEM_CHECKPOINT_SECONDS must be seconds, at least 0, not {CHECKPOINT_SECONDS!r}"
        )
    return seconds


def resident_bytes(device: torch.device) -> float:
    """The largest size of data sets, as int64 tokens, that stay on the device."""
    if device.type != "cuda":
        return RESIDENT_BYTES
    _, total = torch.cuda.mem_get_info(device)
    return RESIDENT_FRACTION * total
