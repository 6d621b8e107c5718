"""What a sweep will cost, before it does: runs, tokens, FLOPs, memory and time.

E models trained together, P parameters each, N sequences of S tokens, B of them a step.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from tqdm import tqdm

from fastmem.base.arguments import checked_device, number
from fastmem.base.storage import Row
from fastmem.base.terminal import duration, table
from fastmem.data.uniform import UniformSequences
from fastmem.models.flops import flops_per_token, matmul_rate
from fastmem.models.gpt import GPT, GPTConfig
from fastmem.models.score import sequence_bits
from fastmem.sweeps.config import SweepConfig
from fastmem.sweeps.groups import (
    SHARE,
    free_bytes,
    group_compatible,
    group_size,
    needed_bytes,
    out_of_memory,
    scored_tokens,
    trained_tokens,
)
from fastmem.sweeps.rows import RunSpec
from fastmem.sweeps.study import read_study
from fastmem.training.config import TrainConfig
from fastmem.training.run_state import RunState
from fastmem.training.trainer import Group, train

CALIBRATION_SECONDS = 10.0
FEWEST_SEQUENCES = 8
"""A step that takes too long is measured on fewer sequences, down to so many."""
USUAL_SHARE = 0.3
"""Of the matmul rate: a guess of how long the first step takes, which decides if it is measured."""
SUPPOSED = 2.7
"""Bits per parameter, for a plan of runs that follow from each other."""
ROW_SECONDS = 0.02
"""What a run costs beside its training: its row and checkpoint, synced."""


@dataclass(frozen=True)
class Speed:
    """How fast runs of one kind go on a device."""

    tokens_per_second: float
    """Of training, all runs that are trained together counted."""
    score_tokens_per_second: float
    make_seconds: float
    """To initialize a model."""
    measured: bool
    """False where the time is scaled by FLOPs."""


@dataclass(frozen=True)
class Line:
    """The runs of one shape and precision that are still to do."""

    model: GPTConfig
    precision: str
    runs: int
    done: int
    tokens: float
    """Trained on; what is scored on the way is in flops and seconds."""
    flops: float
    bytes: int
    """Of the largest group that is trained at once."""
    seconds: float
    measured: bool


@dataclass(frozen=True)
class Plan:
    """What is left of a sweep; all numbers are of runs without a finished row."""

    device: torch.device
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    """What the times do not hold for."""
    most: bool = False
    """Whether runs may stop before their budget, so that all numbers are upper limits."""

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
        at_most, about = ("at most ", "at most about") if self.most else ("", "about")
        total = (
            f"{left} runs to do, {done} done: {at_most}{tokens:.3g} tokens, {self.flops:.3g} "
            f"FLOPs, up to {_size(max((line.bytes for line in self.lines), default=0))}, "
            f"{about} {duration(self.seconds)} on {self.device}"
        )
        return "\n".join([table(rows), "", total, *self.notes])


def plan(config: SweepConfig, seconds: float = CALIBRATION_SECONDS) -> Plan:
    """What the sweep still has to do, and how long that takes, from some real steps of each kind.

    The runs that can be trained together share one calibration: a few real steps, of fewer
    sequences where a step is long, and a real score. Kinds that do not fit into their part of the
    time, or into the memory, are scaled by their FLOPs: to the share of the matmul rate that the
    largest measured kind has, or to the whole rate where none was measured. Nothing is written.

    Args:
        config: the sweep; if its device is not here, its times are those of this CPU.
        seconds: for the whole calibration; at least one step of each kind that is measured.

    Raises:
        ValueError: a grid that cannot run, another study in the folder, seconds of 0, or no memory
            for a product of large matrices.

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
        notes.append(f"{config.device} is not here: the times are of this CPU")
    config = replace(config, device=str(device))
    runs = config.runs()
    if config.workers > 1 or config.ray is not None:
        notes.append("the time is that of one process alone: workers share it")
    rows = read_study(config)
    if config.counts == "auto":
        runs = _supposed_runs(config, rows)
        notes.append(f"the runs are those of a capacity of {SUPPOSED} bits per parameter")
    finished = {row["key"] for row in rows if row["status"] == "done"}
    kinds = group_compatible([run for run in runs if run.key not in finished])
    try:
        speeds = _calibrate(kinds, device, seconds)
    except (MemoryError, RuntimeError) as failure:
        if not out_of_memory(failure):
            raise
        raise ValueError(
            f"no memory to measure how fast {device} is ({str(failure).splitlines()[0]}): free "
            "some, or plan with --device cpu"
        ) from None
    if kinds and not any(speed.measured for speed in speeds):
        notes.append(
            "no step was measured: the times are at the full matmul rate, so at least these"
        )
    elif not all(speed.measured for speed in speeds):
        notes.append("times with a ~ are scaled by FLOPs from the largest kind that was measured")
    parts: dict[tuple[GPTConfig, str], list[Line]] = {}
    for kind, speed in zip(kinds, speeds, strict=True):
        parts.setdefault((kind[0].model, kind[0].train.precision), []).append(
            _line(kind, speed, device)
        )
    lines = []
    for shape, precision in dict.fromkeys((run.model, run.train.precision) for run in runs):
        of_this = [run for run in runs if (run.model, run.train.precision) == (shape, precision)]
        left = parts.get((shape, precision), [])
        lines.append(
            Line(
                shape,
                precision,
                runs=sum(line.runs for line in left),
                done=sum(run.key in finished for run in of_this),
                tokens=sum(line.tokens for line in left),
                flops=sum(line.flops for line in left),
                bytes=max((line.bytes for line in left), default=0),
                seconds=sum(line.seconds for line in left),
                measured=all(line.measured for line in left),
            )
        )
    if config.until == "converged":
        notes.append("a run that converges before its budget is spent takes less")
    return Plan(device, tuple(lines), tuple(notes), most=config.until == "converged")


def _supposed_runs(config: SweepConfig, rows: Sequence[Row]) -> list[RunSpec]:
    """With counts="auto", the runs of the rows, and the runs that follow if each model holds
    SUPPOSED bits per parameter."""
    rows, done = list(rows), {row["key"] for row in rows if row["status"] == "done"}
    grid = replace(config, counts=tuple({row["sequences"]["count"] for row in rows}) or (1,))
    found = [run for run in grid.runs() if run.key in done]
    while runs := config.runs(rows):
        found += runs
        for run in runs:
            entropy = run.sequences.coded_entropy_bits
            rows.append(
                {
                    "status": "done",
                    "model": asdict(run.model),
                    "precision": run.train.precision,
                    "sequences": {"count": run.sequences.count},
                    "seed": run.train.seed,
                    "coded_entropy_bits": entropy,
                    "memorized_bits": {
                        "strict": min(entropy, SUPPOSED * run.model.parameter_count)
                    },
                }
            )
    return found


def _size(count: float) -> str:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB")):
        if count >= 1000**power:
            return f"{count / 1000**power:,.1f} {unit}"
    return f"{count / 1000:,.0f} kB"


def _line(kind: Sequence[RunSpec], speed: Speed, device: torch.device) -> Line:
    per_token = flops_per_token(kind[0].model, kind[0].sequences.length)
    tokens = flops = seconds = 0.0
    for run in kind:
        scored = scored_tokens(run)
        score_seconds = scored / speed.score_tokens_per_second
        trained = trained_tokens(run)
        spent = trained / speed.tokens_per_second + score_seconds
        if run.train.seconds is not None:
            spent = run.train.seconds
            trained = max(0.0, spent - score_seconds) * speed.tokens_per_second
        tokens += trained
        flops += (trained + scored / 3) * per_token  # forward alone is a third
        seconds += spent + speed.make_seconds + ROW_SECONDS
    together = min(len(kind), group_size(kind, device))
    return Line(
        kind[0].model,
        kind[0].train.precision,
        runs=len(kind),
        done=0,
        tokens=tokens,
        flops=flops,
        bytes=together * max(needed_bytes(run, device) for run in kind),
        seconds=seconds,
        measured=speed.measured,
    )


def _calibrate(
    kinds: Sequence[Sequence[RunSpec]], device: torch.device, seconds: float
) -> list[Speed]:
    """The speed of each kind, the cheapest kinds first, so that the others can follow them."""
    if not kinds:
        return []
    rate = matmul_rate(device)
    # What is loaded and allocated once would count for each run of the first kind.
    shape = GPTConfig(layers=1, width=4, heads=1, vocab=4, length=4)
    train(GPT(shape, device=device), UniformSequences(4, 4, 4), TrainConfig(steps=2), None, False)
    share, part = 0.0, seconds / len(kinds)
    speeds: dict[int, Speed] = {}
    costs = [flops_per_token(kind[0].model, kind[0].sequences.length) for kind in kinds]
    for place in sorted(range(len(kinds)), key=lambda place: costs[place]):
        try:
            guess = rate * (share or USUAL_SHARE) / costs[place]
            found = _measured(kinds[place], device, part, guess)
        except (MemoryError, RuntimeError) as failure:
            if not out_of_memory(failure):
                raise
            found = None  # an estimate of memory was too low
        if found is None:
            tokens = rate * (share or 1.0) / costs[place]
            found = Speed(tokens, 3 * tokens, 0.0, measured=False)
        else:
            share = found.tokens_per_second * costs[place] / rate
        speeds[place] = found
    return [speeds[place] for place in range(len(kinds))]


def _measured(
    kind: Sequence[RunSpec], device: torch.device, seconds: float, guess: float
) -> Speed | None:
    """Times real steps; None where some would take longer than seconds, or need more memory.

    guess: tokens a second, about.
    """
    run, E = kind[0], min(len(kind), group_size(kind, device))
    S = run.sequences.length
    B = run.train.step_batch(run.sequences.count)
    # A first step that is not timed, two that are, and their score.
    fits = int(guess * seconds / 4 / (E * S))
    if fits < min(B, FEWEST_SEQUENCES):
        return None
    B = min(B, fits)
    first = replace(run, train=replace(run.train, batch=B))
    if E * needed_bytes(first, device) > SHARE * free_bytes(device):
        return None
    start = time.perf_counter()
    models = [GPT(run.model, seed=e, device=device) for e in range(E)]
    made = (time.perf_counter() - start) / E
    # So long a budget that no mark of its curve is reached.
    how = replace(run.train, steps=10**9, epochs=None, seconds=None, batch=B)
    sets = [UniformSequences(B, S, run.sequences.vocab, e) for e in range(E)]
    members = [RunState(m, s, how) for m, s in zip(models, sets, strict=True)]
    steps, spent = _time_steps(Group(members), device, seconds / 2)
    # As large as the sets are, so that what a call costs is shared as it will be.
    count = max(run.sequences.count for run in kind)
    affordable = int(steps * E * B / spent * seconds / 4)
    others = UniformSequences(max(1, min(count, affordable)), S, run.sequences.vocab)
    scored = _time_score(models[0], others, run, device)
    return Speed(steps * E * B * S / spent, others.count * S / scored, made, measured=True)


def _time_steps(group: Group, device: torch.device, seconds: float) -> tuple[int, float]:
    """How many steps were timed, and the seconds that they took."""
    with tqdm(disable=True) as bar:
        group.step(bar)
        _wait(device)
        start, steps, spent = time.perf_counter(), 0, 0.0
        while steps < 2 or spent < seconds:
            group.step(bar)
            if device.type == "cpu" or steps % 16 == 0:
                _wait(device)
            steps += 1
            spent = time.perf_counter() - start
        _wait(device)
    return steps, time.perf_counter() - start


def _time_score(
    model: GPT, sequences: UniformSequences, run: RunSpec, device: torch.device
) -> float:
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        sequence_bits(model, sequences, run.train.precision)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
