"""What a sweep will cost: runs, tokens, FLOPs, memory and time.

E models trained together, P parameters each, N sequences of S tokens, B of them a step.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from tqdm import tqdm

from fastmem.base.arguments import checked_device, number
from fastmem.base.storage import Row
from fastmem.base.terminal import duration, say, table
from fastmem.data.uniform import UniformSequences
from fastmem.models.flops import flops_per_token, matmul_rate, synchronize
from fastmem.models.gpt import GPT, GPTConfig
from fastmem.models.score import sequence_bits
from fastmem.models.sharded import Sharding
from fastmem.sweeps.config import SweepConfig
from fastmem.sweeps.groups import (
    MEMORY_FRACTION,
    free_bytes,
    group_compatible,
    group_size,
    model_key,
    needed_bytes,
    out_of_memory,
    scored_tokens,
    trained_tokens,
)
from fastmem.sweeps.large_plan import rank_peak
from fastmem.sweeps.rows import RunSpec
from fastmem.sweeps.study import read_study
from fastmem.training.config import TrainConfig
from fastmem.training.group import Group
from fastmem.training.run_state import RunState
from fastmem.training.trainer import train

CALIBRATION_SECONDS = 10.0
MIN_SEQUENCES = 8
"""A step that takes too long is measured on fewer sequences, down to this many."""
USUAL_MFU = 0.3
"""Fraction of the matmul rate that the first step is guessed to reach."""
ASSUMED_CAPACITY = 2.7
"""Bits per parameter, for planning runs that depend on earlier runs."""
ROW_SECONDS = 0.02
"""Time of a run beside its training: its row and checkpoint, synced."""


@dataclass(frozen=True)
class Speed:
    """How fast a group of runs trains and scores on a device."""

    tokens_per_second: float
    """In training, summed over the runs that train together."""
    score_tokens_per_second: float
    init_seconds: float
    """To initialize one model."""
    measured: bool
    """False if the speed is scaled by FLOPs."""


@dataclass(frozen=True)
class Line:
    """The runs of one shape and precision that are left."""

    model: GPTConfig
    precision: str
    runs: int
    done: int
    tokens: float
    """Trained tokens; scored tokens count in flops and seconds."""
    flops: float
    bytes: int
    """Memory of the largest group that trains at once, or of a rank of the largest run."""
    seconds: float
    measured: bool


@dataclass(frozen=True)
class Plan:
    """What is left of a sweep: all numbers count the runs without a finished row."""

    device: torch.device
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    """Limits of the numbers."""
    upper_limit: bool = False
    """True if runs may stop before their budget."""

    @property
    def seconds(self) -> float:
        return sum(line.seconds for line in self.lines)

    @property
    def flops(self) -> float:
        return sum(line.flops for line in self.lines)

    def text(self) -> str:
        """A table for a terminal."""
        head = ("model", "heads", "parameters", "precision", "done", "to do", "tokens", "FLOPs")
        rows = [(*head, "memory", "time")]
        for line in self.lines:
            model = line.model
            rows.append(
                (
                    f"{model.layers} × {model.width}",
                    f"{model.heads}",
                    f"{model.parameter_count:,}",
                    line.precision,
                    f"{line.done}",
                    f"{line.runs}",
                    f"{line.tokens:.2g}",
                    f"{line.flops:.2g}",
                    _size(line.bytes),
                    ("" if line.measured else "~") + duration(line.seconds),
                )
            )
        left, done = (sum(getattr(line, name) for line in self.lines) for name in ("runs", "done"))
        tokens = sum(line.tokens for line in self.lines)
        at_most, about = ("at most ", "at most about") if self.upper_limit else ("", "about")
        total = (
            f"{left} runs to do, {done} done: {at_most}{tokens:.3g} tokens, {self.flops:.3g} "
            f"FLOPs, up to {_size(max((line.bytes for line in self.lines), default=0))}, "
            f"{about} {duration(self.seconds)} on {self.device}"
        )
        return "\n".join([table(rows), "", total, *self.notes])


def plan(config: SweepConfig, seconds: float = CALIBRATION_SECONDS, progress: bool = False) -> Plan:
    """What a sweep still has to do, and how long that takes. Writes nothing.

    Each group of runs that can train together is calibrated once: a few real steps, on fewer
    sequences if a step is long, and a real score. Groups that do not fit into their part of the
    time, or into memory, are scaled by FLOPs: at the MFU of the largest measured group, or at the
    full matmul rate if no group was measured.

    Args:
        config: the sweep; if its device is unavailable, the times are of this CPU.
        seconds: for the whole calibration; a measured group takes at least one step.
        progress: says that the calibration begins.

    Raises:
        ValueError: the grid is invalid, the folder holds another study, seconds is not above 0, or
            memory is too small for a product of large matrices.

    Example:
        >>> from pathlib import Path
        >>> grid = fastmem.SweepConfig(width=(8, 16), steps=100, out=Path("never-made"))
        >>> found = plan(grid, seconds=0.1)
        >>> [(line.model.parameter_count, line.runs) for line in found.lines]
        [(2040, 10), (5616, 10)]
        >>> found.lines[0].tokens  # 100 steps of 2 seeds of 15, 29, 66, 87, 120 sequences of 16
        1014400.0
    """
    if not 0 < number("seconds", seconds) < math.inf:
        raise ValueError(f"the calibration needs some seconds, not {seconds}: give it 10")
    notes = []
    try:
        device = checked_device(config.device)
    except ValueError:
        device = torch.device("cpu")
        notes.append(f"{config.device} is unavailable: the times are of this CPU")
    config = replace(config, device=str(device))
    runs, rows = config.runs(), read_study(config)
    if config.counts == "auto":
        runs = _assumed_runs(config, rows)
    done = {row["key"] for row in rows if row["status"] == "done"}
    lines, speeds = _lines(runs, done, device, seconds, progress)
    if config.gpus_per_run > 1:
        left = [run for run in runs if run.key not in done]
        lines = tuple(_of_ranks(line, left, config.gpus_per_run, device) for line in lines)
    notes += _notes(config, speeds)
    return Plan(device, lines, tuple(notes), upper_limit=config.until == "converged")


def plan_runs(runs: Sequence[RunSpec], device: torch.device, seconds: float) -> Plan:
    """`plan` of runs that do not belong to a sweep."""
    return Plan(device, _lines(runs, set(), device, seconds, False)[0], ())


def _lines(
    runs: Sequence[RunSpec], done: set[str], device: torch.device, seconds: float, progress: bool
) -> tuple[tuple[Line, ...], list[Speed]]:
    """The line of each model, and the speed of each group that is left."""
    groups = group_compatible([run for run in runs if run.key not in done])
    if progress and groups:
        say(f"timing training steps for about {seconds:.0f} s")
    speeds = _calibrate(groups, device, seconds)
    lines = []
    for model in dict.fromkeys(map(model_key, runs)):
        finished = sum(run.key in done for run in runs if model_key(run) == model)
        measured = zip(groups, speeds, strict=True)
        left = [(group, speed) for group, speed in measured if model_key(group[0]) == model]
        lines.append(_line(*model, finished, left, device))
    return tuple(lines), speeds


def _notes(config: SweepConfig, speeds: Sequence[Speed]) -> Iterator[str]:
    if config.workers > 1 or config.ray is not None:
        yield "the time is for one process alone: workers divide it"
    if config.gpus_per_run > 1:
        yield "the memory is that of one rank, the time that of one process: ranks divide it"
    if config.counts == "auto":
        yield f"the runs assume a capacity of {ASSUMED_CAPACITY} bits per parameter"
    if speeds and not any(speed.measured for speed in speeds):
        yield "no step was measured: the times are at the full matmul rate, so at least these"
    elif not all(speed.measured for speed in speeds):
        yield "times with a ~ are scaled by FLOPs from the largest group that was measured"
    if config.until == "converged":
        yield "a run that converges before its budget is spent takes less"


def _of_ranks(line: Line, left: Sequence[RunSpec], ranks: int, device: torch.device) -> Line:
    """The line with the memory of a rank of its largest run."""
    runs = [run for run in left if model_key(run) == (line.model, line.precision)]
    if not runs:
        return line
    largest = max(runs, key=lambda run: needed_bytes(run, device))
    return replace(line, bytes=rank_peak(largest, Sharding(), ranks, device.type).total)


def _assumed_runs(config: SweepConfig, rows: Sequence[Row]) -> list[RunSpec]:
    """With counts="auto", the runs of the rows, and the runs that follow if each model memorizes
    ASSUMED_CAPACITY bits per parameter."""
    rows, done = list(rows), {row["key"] for row in rows if row["status"] == "done"}
    counts = tuple({row["sequences"]["count"] for row in rows}) or (1,)
    grid = replace(config, counts=counts, gpus_per_run=1)  # of which some may divide no batch
    found = [run for run in grid.runs() if run.key in done]
    while runs := config.runs(rows):
        found += runs
        for run in runs:
            entropy = run.sequences.coded_entropy_bits
            capacity = ASSUMED_CAPACITY * run.model.parameter_count
            rows.append(
                {
                    "status": "done",
                    "model": asdict(run.model),
                    "precision": run.train.precision,
                    "sequences": {"count": run.sequences.count},
                    "seed": run.train.seed,
                    "coded_entropy_bits": entropy,
                    "memorized_bits": {"strict": min(entropy, capacity)},
                }
            )
    return found


def _size(count: float) -> str:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB")):
        if count >= 1000**power:
            return f"{count / 1000**power:,.1f} {unit}"
    return f"{count / 1000:,.0f} kB"


def _line(
    model: GPTConfig,
    precision: str,
    done: int,
    left: Sequence[tuple[Sequence[RunSpec], Speed]],
    device: torch.device,
) -> Line:
    """The line of a model from its groups that are left, each with its speed."""
    costs = [_cost(run, speed) for group, speed in left for run in group]
    tokens, flops, seconds = (sum((cost[k] for cost in costs), 0.0) for k in range(3))
    return Line(
        model,
        precision,
        runs=len(costs),
        done=done,
        tokens=tokens,
        flops=flops,
        bytes=max((_group_bytes(group, device) for group, _ in left), default=0),
        seconds=seconds,
        measured=all(speed.measured for _, speed in left),
    )


def _cost(run: RunSpec, speed: Speed) -> tuple[float, float, float]:
    """Trained tokens, FLOPs and seconds of a run."""
    trained, scored = trained_tokens(run), scored_tokens(run)
    score_seconds = scored / speed.score_tokens_per_second
    seconds = trained / speed.tokens_per_second + score_seconds
    if run.train.seconds is not None:
        seconds = run.train.seconds
        trained = max(0.0, seconds - score_seconds) * speed.tokens_per_second
    # A forward pass alone is a third of a step.
    flops = (trained + scored / 3) * flops_per_token(run.model, run.sequences.length)
    return trained, flops, seconds + speed.init_seconds + ROW_SECONDS


def _group_bytes(group: Sequence[RunSpec], device: torch.device) -> int:
    together = min(len(group), group_size(group, device))
    return together * max(needed_bytes(run, device) for run in group)


def _calibrate(
    groups: Sequence[Sequence[RunSpec]], device: torch.device, seconds: float
) -> list[Speed]:
    """The speed of each group; measures the cheapest first, so that it can scale the expensive."""
    if not groups:
        return []
    try:
        rate = matmul_rate(device)
        # The first training loads and allocates what all later ones reuse.
        shape, config = GPTConfig(1, 4, 1, vocab=4, length=4), TrainConfig(steps=2)
        train(GPT(shape, device=device), UniformSequences(4, 4, 4), config, progress=False)
    except (MemoryError, RuntimeError) as failure:
        if not out_of_memory(failure):
            raise
        raise ValueError(
            f"no memory to measure how fast {device} is ({str(failure).splitlines()[0]}): free "
            "some, or plan with --device cpu"
        ) from None
    mfu, part = 0.0, seconds / len(groups)
    speeds: dict[int, Speed] = {}
    costs = [flops_per_token(group[0].model, group[0].sequences.length) for group in groups]
    for place in sorted(range(len(groups)), key=lambda place: costs[place]):
        try:
            guess = rate * (mfu or USUAL_MFU) / costs[place]
            found = _measured(groups[place], device, part, guess)
        except (MemoryError, RuntimeError) as failure:
            if not out_of_memory(failure):
                raise
            found = None  # the estimate of the memory was too low
        if found is None:
            tokens = rate * (mfu or 1.0) / costs[place]
            found = Speed(tokens, 3 * tokens, 0.0, measured=False)
        else:
            mfu = found.tokens_per_second * costs[place] / rate
        speeds[place] = found
    return [speeds[place] for place in range(len(groups))]


def _measured(
    group: Sequence[RunSpec], device: torch.device, seconds: float, guess: float
) -> Speed | None:
    """Times real steps and a score; None if they would exceed `seconds` or the free memory.

    guess: tokens a second, roughly.
    """
    run, E = group[0], min(len(group), group_size(group, device))
    S = run.sequences.length
    B = run.train.step_batch(run.sequences.count)
    # A first step that is not timed, two that are, and their score.
    fits = int(guess * seconds / 4 / (E * S))
    if fits < min(B, MIN_SEQUENCES):
        return None
    B = min(B, fits)
    # No mark of the curve falls on the first steps of this budget.
    config = replace(run.train, steps=10**9, epochs=None, seconds=None, batch=B)
    if E * needed_bytes(replace(run, train=config), device) > MEMORY_FRACTION * free_bytes(device):
        return None
    start = time.perf_counter()
    models = [GPT(run.model, seed=e, device=device) for e in range(E)]
    init_seconds = (time.perf_counter() - start) / E
    sets = [UniformSequences(B, S, run.sequences.vocab, e) for e in range(E)]
    states = [RunState(m, s, config) for m, s in zip(models, sets, strict=True)]
    steps, spent = _time_steps(Group(states), device, seconds / 2)
    # As many sequences as the largest set, as time allows: a call has costs beside its sequences.
    count = max(run.sequences.count for run in group)
    affordable = int(steps * E * B / spent * seconds / 4)
    scored = UniformSequences(max(1, min(count, affordable)), S, run.sequences.vocab)
    score_seconds = _time_score(models[0], scored, run, device)
    rate, score_rate = steps * E * B * S / spent, scored.count * S / score_seconds
    return Speed(rate, score_rate, init_seconds, measured=True)


def _time_steps(group: Group, device: torch.device, seconds: float) -> tuple[int, float]:
    """How many steps were timed, and their seconds."""
    with tqdm(disable=True) as bar:
        group.step(bar)
        synchronize(device)
        start, steps, spent = time.perf_counter(), 0, 0.0
        while steps < 2 or spent < seconds:
            group.step(bar)
            if device.type == "cpu" or steps % 16 == 0:
                synchronize(device)
            steps += 1
            spent = time.perf_counter() - start
        synchronize(device)
    return steps, time.perf_counter() - start


def _time_score(
    model: GPT, sequences: UniformSequences, run: RunSpec, device: torch.device
) -> float:
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        sequence_bits(model, sequences, run.train.precision)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
