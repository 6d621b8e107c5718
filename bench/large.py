"""One model across ranks: speed, memory, and what FSDP2 costs, on the GPUs of this job.

    python bench/large.py --json large.json                       one GPU
    torchrun --nproc-per-node 8 bench/large.py --json large.json  eight
    python bench/large.py --quick                                 tiny shapes on a CPU: does it run

Each row trains for some seconds after three steps that are not timed, or scores. MFU is of
800 TFLOP/s, what a bf16 product reaches on an H100 (of `matmul_rate` elsewhere). `plain` is the
training of a process alone, in turns with `sharded`: their medians give the overhead of FSDP2.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastmem
from fastmem import GPTConfig, Sharding, TrainConfig, UniformSequences
from fastmem.base.ranks import Ranks
from fastmem.base.terminal import progress_bar
from fastmem.models.flops import synchronize
from fastmem.sweeps.rows import environment
from fastmem.training.group import Group
from fastmem.training.run_state import RunState

H100 = 800e12
XL = {"layers": 48, "width": 1600, "heads": 25, "vocab": 50257}
SMALL = {"layers": 12, "width": 768, "heads": 12, "vocab": 50257}
ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """What one row measures."""

    side: str
    """sharded, plain or score."""
    shape: GPTConfig
    batch: int
    """Sequences of all ranks."""
    sharding: Sharding = field(default_factory=Sharding)
    precision: Any = "bf16-mixed"


CASES = [
    Case("sharded", GPTConfig(**XL, length=1024), 32, Sharding("block", accumulate=4)),
    Case("sharded", GPTConfig(**XL, length=64), 512, Sharding("block", accumulate=4)),
    Case("score", GPTConfig(**XL, length=1024), 32, precision="bf16-true"),
    Case("plain", GPTConfig(**SMALL, length=1024), 16),
    Case("sharded", GPTConfig(**SMALL, length=1024), 16),
]
TINY = GPTConfig(2, 32, 4, vocab=64, length=16)
QUICK = [
    Case("sharded", TINY, 8, Sharding("block", accumulate=2)),
    Case("score", TINY, 8),
    Case("plain", TINY, 8),
    Case("sharded", TINY, 8),
]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each timing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    seconds, cases = (0.05, QUICK) if options.quick else (options.seconds, CASES)
    with fastmem.joined("cpu" if options.quick else "auto") as job:
        rows = [measured(job, case, seconds) for case in cases if applies(job, case)]
        found = {"rows": rows, "ranks": job.size, **environment(job.device)}
        found["overhead"] = overhead(job, cases, seconds)
        if job.rank == 0:
            print(json.dumps(found, indent=1))
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def applies(job: Ranks, case: Case) -> bool:
    parts = job.size * case.sharding.accumulate
    return case.batch % parts == 0 and (case.side != "plain" or job.size == 1)


def measured(job: Ranks, case: Case, seconds: float) -> dict[str, Any]:
    """Tokens a second of all ranks, MFU and peak memory."""
    gc.collect()
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    work = prepared(job, case)
    for _ in range(3):
        work()
    steps, start = 0, begun(job)
    while job.first(time.perf_counter() - start) < seconds or steps < 2:
        work()
        steps += 1
        synchronize(job.device)
    spent = begun(job) - start
    speed = steps * case.batch * case.shape.length / spent
    peak = torch.cuda.max_memory_allocated() if job.device.type == "cuda" else None
    flops = speed * fastmem.flops_per_token(case.shape) / (3 if case.side == "score" else 1)
    rate = H100 if "H100" in environment(job.device)["device"] else rate_of(job)
    return {
        **asdict(case),
        "tokens_per_second": speed,
        "mfu": flops / (rate * job.size),
        "peak_bytes": peak,
    }


def rate_of(job: Ranks) -> float:
    return fastmem.matmul_rate(job.device, torch.bfloat16)


def begun(job: Ranks) -> float:
    """The time, once all ranks have done their work."""
    synchronize(job.device)
    job.all(True)
    return time.perf_counter()


def prepared(job: Ranks, case: Case) -> Callable[[], object]:
    """A step of training, or a pass of scoring."""
    sequences = UniformSequences(case.batch, case.shape.length, case.shape.vocab)
    if case.side == "plain":
        model = fastmem.GPT(case.shape, device=job.device)
    else:
        model = fastmem.sharded_gpt(case.shape, 0, case.precision, case.sharding)
    if case.side == "score":
        return lambda: fastmem.sequence_bits(model, sequences, case.precision)
    # No mark of the curve falls on the first steps of this budget.
    config = TrainConfig(steps=10**9, batch=case.batch, precision=case.precision)
    group = Group([RunState(model, sequences, config)])
    bar = progress_bar(False, None, "")
    return lambda: group.step(bar)


def overhead(job: Ranks, cases: Sequence[Case], seconds: float) -> float | None:
    """Time of a sharded step over that of a plain step on one rank, less 1; medians of turns."""
    if job.size > 1:
        return None
    plain, sharded = cases[-2:]
    speeds: dict[str, list[float]] = {"plain": [], "sharded": []}
    for _ in range(ROUNDS):
        for case in (plain, sharded):
            speeds[case.side].append(measured(job, case, seconds / 3)["tokens_per_second"])
    return statistics.median(speeds["plain"]) / statistics.median(speeds["sharded"]) - 1


if __name__ == "__main__":
    sys.exit(main())
