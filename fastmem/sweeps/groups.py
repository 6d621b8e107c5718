"""Which runs of a sweep are trained together, and how many at a time.

E models, P parameters each, B batch, S tokens a sequence, D width, L layers, H heads.
"""

import os
from collections.abc import Hashable, Sequence
from math import ceil, nan

import torch

from fastmem.models.flops import flops_per_token
from fastmem.sweeps.rows import RunSpec
from fastmem.training.run_state import CURVE

WEIGHT_BYTES = {"fp32": 16, "bf16-mixed": 16, "bf16-true": 8, "bf16-stochastic": 20}
"""A parameter's weight, gradient and two moments; with stochastic rounding also a float32 copy of
the first two."""
SHARE = 0.8
"""The part of the free memory that a group may fill: what it needs is an estimate."""


def group_compatible(runs: Sequence[RunSpec]) -> list[list[RunSpec]]:
    """Runs of one shape, precision, sequences a step and length, which `train_many` takes."""
    kinds: dict[Hashable, list[RunSpec]] = {}
    for run in runs:
        kinds.setdefault(group_key(run), []).append(run)
    return list(kinds.values())


def group_key(run: RunSpec) -> Hashable:
    """The same for runs that are alike."""
    batch = run.train.step_batch(run.sequences.count)
    return run.model, run.train.precision, batch, run.sequences.length


def group_size(runs: Sequence[RunSpec], device: torch.device, free: float | None = None) -> int:
    """How many of these runs to train at a time: one on a CPU; on a GPU as many as fit into its
    free memory (bytes, by default those free now), at least one."""
    if device.type != "cuda":
        return 1
    free = free_bytes(device) if free is None else free
    return max(1, int(SHARE * free / max(needed_bytes(run, device) for run in runs)))


def needed_bytes(run: RunSpec, device: torch.device) -> int:
    """An estimate of the memory that one run needs while it is trained, in bytes.

    Computes sum of

        WEIGHT_BYTES[precision] * P                     # weights, gradients, two moments
        4 * B * S * D * (20 * L + 8)                    # what the backward pass reads again
        4 * B * H * S * S * (L + 3)                     # attention's shares, where it stores them
        8 * N * S                                       # tokens

    20 D a layer are two inputs of a norm, two outputs, q, k, v, the output of attention, and the
    8 D before and after GELU, rounded up for what is on its way. Three layers' shares are what one
    softmax and its gradient take on their way.
    """
    P, D, L, H = run.model.parameter_count, run.model.width, run.model.layers, run.model.heads
    N, S = run.sequences.count, run.sequences.length
    B = run.train.step_batch(N)
    needed = WEIGHT_BYTES[run.train.precision] * P + 4 * B * S * D * (20 * L + 8) + 8 * N * S
    return needed + stores_shares(run, device) * 4 * B * H * S * S * (L + 3)


def stores_shares(run: RunSpec, device: torch.device) -> bool:
    """Whether attention is a product, a softmax and a product, all in memory.

    On a GPU that is what PyTorch takes for float32 and heads that are no multiple of 4 wide: by
    its source (ATen/native/transformers/cuda/sdp_utils.cpp), not measured.
    """
    narrow = run.model.width // run.model.heads % 4 != 0
    return device.type == "cuda" and run.train.precision == "fp32" and narrow


def needed_flops(run: RunSpec) -> float:
    """What one run computes: its steps, and a forward pass of its set at each mark of the curve.

    A budget in seconds has no number of steps; the rest of it is nan.
    """
    per_token = flops_per_token(run.model, run.sequences.length)
    return (trained_tokens(run) + scored_tokens(run) / 3) * per_token


def trained_tokens(run: RunSpec) -> float:
    """Tokens in all its steps; nan for a budget in seconds."""
    N = run.sequences.count
    steps = run.train.total_steps(N)
    return nan if steps is None else steps * run.train.step_batch(N) * run.sequences.length


def scored_tokens(run: RunSpec) -> int:
    """Tokens that are scored on the way: the whole set at each mark of the curve."""
    steps = run.train.total_steps(run.sequences.count)
    # Several marks may fall on one step, which is scored once.
    marks = len(CURVE) if steps is None else len({ceil(round(m * steps, 9)) for m in CURVE})
    return marks * run.sequences.count * run.sequences.length


def check_fits(runs: Sequence[RunSpec], device: torch.device) -> None:
    """MemoryError where weights, gradients and moments alone are more than the device has.

    A system that promises memory it has not got would fill it for minutes, then end the process.
    """
    least = sum(WEIGHT_BYTES[run.train.precision] * run.model.parameter_count for run in runs)
    has = total_bytes(device)
    if least > has:
        raise MemoryError(
            f"weights, gradients and moments are {least / 1e9:,.2f} GB, and {device} has "
            f"{has / 1e9:,.2f} GB"
        )


def total_bytes(device: torch.device) -> int:
    """The memory that there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> int:
    """The memory that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def out_of_memory(failure: BaseException) -> bool:
    """Whether this is memory that is not there; on a CPU torch has no type of its own for it."""
    named = isinstance(failure, MemoryError | torch.OutOfMemoryError)
    return named or "allocate memory" in str(failure)


def what_is_missing(run: RunSpec, device: torch.device) -> str:
    """How much memory one run lacks, and what to change."""
    needed, free = needed_bytes(run, device), free_bytes(device)
    lacks = f"it needs about {needed / 1e9:,.2f} GB and {free / 1e9:,.2f} GB are free"
    weights = WEIGHT_BYTES[run.train.precision] * run.model.parameter_count
    if run.train.precision != "bf16-true" and weights > needed / 2:
        less = "--precision bf16-true, or a smaller model"
    elif weights > needed / 2:
        less = "a smaller model"
    else:
        less = f"--batch {max(1, run.train.step_batch(run.sequences.count) // 2)}"
    if needed <= free:
        return (
            f"{lacks} now, so another program had the memory, or the need is larger than thought: "
            f"run it again, then try {less}"
        )
    return f"{lacks}: try {less}"
