"""What the training of one sharded model will cost: memory of a rank, GPUs, hours.

B batch, S tokens a sequence, D width, L layers.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from fastmem.base.arguments import integer, number
from fastmem.base.terminal import duration, table
from fastmem.models.flops import flops_per_token, matmul_rate
from fastmem.models.gpt import GPTConfig, Recompute
from fastmem.models.sharded import Sharding
from fastmem.sweeps.groups import WEIGHT_BYTES, scored_tokens, total_bytes, trained_tokens
from fastmem.sweeps.rows import RunSpec
from fastmem.training.memory import Peak, planned_peak

PUBLISHED_TOKENS = 1_000_000 * 2048 * 64
"""Steps, sequences a step and tokens a sequence of arXiv 2505.24832, section 3."""
ASSUMED_RATE = {"fp32": 50e12, "bf16": 800e12}
"""FLOP/s of the products of an H100, where there is no GPU to measure."""
ASSUMED_MFU = 0.35
"""Fraction of the products' rate that training reaches."""
ASSUMED_FREE = 0.1
"""Fraction of a GPU's memory for what is not counted: the context of CUDA, buffers of NCCL and
cuBLAS, gaps between tensors."""
ASSUMED_BYTES = 80e9
MOST_GPUS = 4096


@dataclass(frozen=True)
class RankLine:
    """The plan for a number of GPUs."""

    gpus: int
    peak: Peak
    """Bytes on a GPU; without state that is offloaded."""
    tokens_per_second: float
    """Of one GPU."""
    seconds: float
    """To the budget of the run, its scores included."""
    published_seconds: float


@dataclass(frozen=True)
class LargePlan:
    """What a run needs."""

    lines: tuple[RankLine, ...]
    """The number of GPUs that was asked for, then the smallest that fits."""
    limit: float
    """Bytes of a GPU that the tensors may fill."""
    smallest: int
    notes: tuple[str, ...]
    """What the numbers assume."""

    def text(self) -> str:
        """A table for a terminal, and one line of what to do."""
        kinds = [field.name for field in fields(Peak)]
        rows = [("GPUs", *kinds, "peak GB", "tokens/s a GPU", "this budget", "published budget")]
        for line in self.lines:
            rows.append(
                (
                    f"{line.gpus}",
                    *(f"{getattr(line.peak, kind) / 1e9:.2f}" for kind in kinds),
                    f"{line.peak.total / 1e9:.2f}",
                    f"{line.tokens_per_second:,.0f}",
                    duration(line.seconds),
                    duration(line.published_seconds),
                )
            )
        first = self.lines[0]
        fits = first.peak.total <= self.limit
        N, local = (gpus := first.gpus if fits else self.smallest), math.gcd(gpus, 8)
        meet = "--rdzv-backend c10d --rdzv-endpoint HOST:29500"
        nodes = f"--nnodes {N // local} {meet} " if local < N else ""
        does_not = "" if fits else f"{first.gpus} GPUs are too few. "
        to_do = (
            f"{does_not}To train on {N}: torchrun {nodes}--nproc-per-node {local} -m fastmem train "
            "with these flags but --plan, --gpus and --gpu-memory"
        )
        return "\n".join([table(rows), "", *self.notes, to_do])


def large_plan(
    run: RunSpec,
    sharding: Sharding,
    gpus: int | None = None,
    gpu_bytes: float | None = None,
    device: str = "cuda",
) -> LargePlan:
    """What a run of one model on many GPUs needs. Needs no GPU and little memory, writes nothing.

    Args:
        run: model, data set, budget and optimizer.
        sharding: recomputation, accumulation, offload.
        gpus: how many share the model; by default the smallest number that fits.
        gpu_bytes: of a GPU; by default of the GPU here, or 80e9.
        device: cuda, or cpu for ranks without GPUs, each with the memory of this machine.

    Raises:
        ValueError: gpus below 1 or not a divisor of the batch, or a model that does not fit on any
            number of GPUs.

    Example:
        >>> from fastmem.data.uniform import UniformSequences
        >>> from fastmem.training.config import TrainConfig
        >>> run = RunSpec(GPTConfig(2, 32, 4, 64, 16), UniformSequences(64, 16, 64), TrainConfig())
        >>> found = large_plan(run, Sharding(), gpu_bytes=4e6)
        >>> found.smallest, found.lines[0].peak.total < 0.9 * 4e6
        (2, True)
    """
    if gpus is not None:
        integer("gpus", gpus, 1, MOST_GPUS)
    here = torch.cuda.is_available() and device == "cuda"
    if gpu_bytes is None:
        gpu_bytes = total_bytes(torch.device(device)) if here or device == "cpu" else ASSUMED_BYTES
    if not 0 < number("gpu_memory", gpu_bytes) < math.inf:
        raise ValueError(f"gpu_memory must be above 0, not {gpu_bytes / 1e9:g} GB: give it 80")
    limit = (1 - ASSUMED_FREE) * gpu_bytes
    known: dict[int, Peak] = {}

    def peak(ranks: int) -> Peak:
        if ranks not in known:
            known[ranks] = rank_peak(run, sharding, ranks, device)
        return known[ranks]

    if gpus is not None:
        peak(gpus)  # an error of the number that was asked for comes first
    smallest = _smallest(run, sharding, peak, limit)
    rate, note = _rate(run, device)
    lines = [
        _line(run, sharding, n, peak(n), rate) for n in dict.fromkeys([gpus or smallest, smallest])
    ]
    return LargePlan(tuple(lines), limit, smallest, (*_notes(limit, run, sharding, device), note))


def recomputed(shape: GPTConfig, length: int, recompute: Recompute) -> float:
    """Additional FLOPs of recomputation, as a fraction of `flops_per_token`."""
    L, D = shape.layers, shape.width
    weights = {"none": 0, "attention": 4, "block": 12}[recompute] * L * D * D
    attention = 0.0 if recompute == "none" else 4 * L * D * length / 2
    return (2 * weights + attention) * (length - 1) / length / flops_per_token(shape, length)


def rank_peak(run: RunSpec, sharding: Sharding, ranks: int, device: str) -> Peak:
    """`planned_peak` of a run, without what is offloaded."""
    count, length = run.sequences.count, run.sequences.length
    found = planned_peak(run.model, run.train, sharding, ranks, count, length, device)
    if sharding.offload and device == "cuda":
        return replace(found, weights=0, gradients=0, optimizer=0)
    return found


def _smallest(run: RunSpec, sharding: Sharding, peak: Callable[[int], Peak], limit: float) -> int:
    """The smallest number of ranks that divides the batch and whose peak is within the limit."""
    batch = run.train.step_batch(run.sequences.count)
    parts, rest = divmod(batch, sharding.accumulate)
    if rest:
        near = max(1, parts) * sharding.accumulate
        raise ValueError(
            f"batch {batch} is not divisible by accumulate {sharding.accumulate}, on any number of "
            f"GPUs: try batch {near}"
        )
    numbers = [n for n in range(1, min(parts, MOST_GPUS) + 1) if parts % n == 0]
    place = bisect.bisect_left(numbers, True, key=lambda n: peak(n).total <= limit)
    if place < len(numbers):
        return numbers[place]
    most, least = numbers[-1], peak(numbers[-1])
    fix = "a smaller model"
    if sharding.recompute != "block":
        fix = "--recompute block"
    elif least.state > limit / 2 and most < MOST_GPUS:
        fix = f"--batch {2 * batch}, which more GPUs can share"
    elif not sharding.offload and least.state > limit / 2:
        fix = "--offload"
    elif parts > most:
        fix = f"--accumulate {2 * sharding.accumulate}"
    raise ValueError(
        f"a rank of {most}, the most that share batch {batch}, needs {least.total / 1e9:.2f} GB ("
        f"{least.gathered / 1e9:.2f} of gathered weights, {least.activations / 1e9:.2f} of "
        f"activations), and may fill {limit / 1e9:.2f}: try {fix}"
    )


def _rate(run: RunSpec, device: str) -> tuple[float, str]:
    """FLOP/s of products, and where the number is from."""
    kind = "fp32" if run.train.precision == "fp32" else "bf16"
    if device == "cuda" and not torch.cuda.is_available():
        rate, how = ASSUMED_RATE[kind], "assumed of an H100"
    else:
        rate, how = (
            matmul_rate(device, torch.float32 if kind == "fp32" else torch.bfloat16),
            "measured here",
        )
    return rate, (
        f"speed: not measured; {ASSUMED_MFU:.0%} (assumed) of {rate / 1e12:.3g} TFLOP/s ({how}), "
        "less what is recomputed; networks between nodes are not counted"
    )


def _line(run: RunSpec, sharding: Sharding, gpus: int, peak: Peak, rate: float) -> RankLine:
    shape, length = run.model, run.sequences.length
    score = 3 * ASSUMED_MFU * rate / flops_per_token(shape, length)
    speed = score / 3 / (1 + recomputed(shape, length, sharding.recompute))
    seconds = trained_tokens(run) / speed / gpus + scored_tokens(run) / score / gpus
    budget = run.train.seconds
    return RankLine(
        gpus, peak, speed, seconds if budget is None else budget, PUBLISHED_TOKENS / speed / gpus
    )


def _notes(limit: float, run: RunSpec, sharding: Sharding, device: str) -> list[str]:
    notes = [
        "memory in GB: counted in two steps and a score of the training code, on tensors without "
        f"numbers; {limit / 1e9:.1f} GB of a rank may be filled, the rest is left for what is not "
        "counted (assumed)",
        "published budget: 1,000,000 steps of 2048 sequences of 64 tokens",
    ]
    if sharding.offload and device == "cuda":
        state = WEIGHT_BYTES[run.train.precision] * run.model.parameter_count / 1e9
        notes.append(
            f"weights, gradients and moments are in the memory of the CPU: {state:.1f} GB in all"
        )
    return notes
