"""Which runs of a sweep train together, and how many at a time.

E models, P parameters each, N sequences, B batch, S tokens a sequence, D width, L layers, H heads.
"""

import os
from collections.abc import Hashable, Sequence
from math import nan

import torch

from fastmem.models.flops import flops_per_token
from fastmem.models.gpt import GPTConfig
from fastmem.sweeps.rows import RunSpec
from fastmem.training.curve import score_sizes
from fastmem.training.memory import stores_attention_weights

WEIGHT_BYTES = {"fp32": 16, "bf16-mixed": 16, "bf16-true": 8, "bf16-stochastic": 20}
"""Bytes of a parameter's weight, gradient and two moments; with stochastic rounding also of float32
copies of weight and gradient."""
MEMORY_FRACTION = 0.8
"""The fraction of the free memory that a group may fill, since `needed_bytes` is an estimate."""


def group_compatible(runs: Sequence[RunSpec]) -> list[list[RunSpec]]:
    """Lists of runs that `train_many` can train together."""
    groups: dict[Hashable, list[RunSpec]] = {}
    for run in runs:
        groups.setdefault(group_key(run), []).append(run)
    return list(groups.values())


def group_key(run: RunSpec) -> Hashable:
    """Equal for runs that can train together: shape, precision, batch and length."""
    batch = run.train.step_batch(run.sequences.count)
    return run.model, run.train.precision, batch, run.sequences.length


def model_key(run: RunSpec) -> tuple[GPTConfig, str]:
    """Equal for runs of one model, one line of a report: shape and precision."""
    return run.model, run.train.precision


def group_size(runs: Sequence[RunSpec], device: torch.device, free: float | None = None) -> int:
    """How many of the runs to train at a time: 1 on a CPU; on a GPU as many as fit into `free`
    bytes (by default its free memory), at least 1."""
    if device.type != "cuda":
        return 1
    free = free_bytes(device) if free is None else free
    return max(1, int(MEMORY_FRACTION * free / max(needed_bytes(run, device) for run in runs)))


def needed_bytes(run: RunSpec, device: torch.device) -> int:
    """Estimates the bytes of memory that one run needs while it trains.

    Computes the sum of

        WEIGHT_BYTES[precision] * P                     # weights, gradients, two moments
        4 * B * S * D * (20 * L + 8)                    # activations for the backward pass
        4 * B * H * S * S * (L + 3)                     # attention weights, if stored
        8 * N * S                                       # tokens

    20 D a layer are inputs and outputs of two norms, q, k, v, the output of attention, and the 8 D
    before and after GELU, rounded up for temporaries. One softmax and its gradient need three more
    layers' attention weights as temporaries.
    """
    P, D, L, H = run.model.parameter_count, run.model.width, run.model.layers, run.model.heads
    N, S = run.sequences.count, run.sequences.length
    B = run.train.step_batch(N)
    needed = WEIGHT_BYTES[run.train.precision] * P + 4 * B * S * D * (20 * L + 8) + 8 * N * S
    stored = stores_attention_weights(run.model, run.train.precision, device.type)
    return needed + stored * 4 * B * H * S * S * (L + 3)


def needed_flops(run: RunSpec) -> float:
    """FLOPs of one run: its steps, and the forward passes of its scores; nan for a budget in
    seconds, which fixes no number of steps."""
    per_token = flops_per_token(run.model, run.sequences.length)
    return (trained_tokens(run) + scored_tokens(run) / 3) * per_token


def trained_tokens(run: RunSpec) -> float:
    """Tokens of all steps of a run; nan for a budget in seconds."""
    N = run.sequences.count
    steps = run.train.total_steps(N)
    return nan if steps is None else steps * run.train.step_batch(N) * run.sequences.length


def scored_tokens(run: RunSpec) -> int:
    """Tokens that a run scores for its curve."""
    return sum(score_sizes(run.train, run.sequences.count)) * run.sequences.length


def check_fits(runs: Sequence[RunSpec], device: torch.device, ranks: int = 1) -> None:
    """MemoryError if weights, gradients and moments, spread over ranks that each have a device,
    alone exceed the device's memory.

    A system that overcommits memory would fill it for minutes, then kill the process.
    """
    least = sum(WEIGHT_BYTES[run.train.precision] * run.model.parameter_count for run in runs)
    has = total_bytes(device) * (ranks if device.type == "cuda" else 1)
    if least > has:
        raise MemoryError(
            f"weights, gradients and moments are {least / 1e9:,.2f} GB, and {device} has "
            f"{has / 1e9:,.2f} GB"
        )


def total_bytes(device: torch.device) -> int:
    """The device's whole memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> int:
    """The device's free memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def out_of_memory(failure: BaseException) -> bool:
    """True if memory was missing; on a CPU torch raises a plain RuntimeError then."""
    named = isinstance(failure, MemoryError | torch.OutOfMemoryError)
    return named or "allocate memory" in str(failure)


def memory_advice(run: RunSpec, device: torch.device) -> str:
    """How much memory one run needs, how much is free, and what to change."""
    needed, free = needed_bytes(run, device), free_bytes(device)
    needs = f"it needs about {needed / 1e9:,.2f} GB and {free / 1e9:,.2f} GB are free"
    weights = WEIGHT_BYTES[run.train.precision] * run.model.parameter_count
    if run.train.precision != "bf16-true" and weights > needed / 2:
        fix = "--precision bf16-true, or a smaller model"
    elif weights > needed / 2:
        fix = "a smaller model"
    else:
        fix = f"--batch {max(1, run.train.step_batch(run.sequences.count) // 2)}"
    if needed <= free:
        return (
            f"{needs} now, so another process may hold the memory, or the estimate is too low: "
            f"run it again, then try {fix}"
        )
    return f"{needs}: try {fix}"
