"""One GPT across ranks: FSDP2 keeps a part of each parameter on each rank.

B batch, T tokens a sequence, D width.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmem.base import ranks
from fastmem.base.arguments import integer, plain_numbers, user_path
from fastmem.base.terminal import say
from fastmem.models import engine as engines
from fastmem.models.engine import Precision, compute_in, converted
from fastmem.models.gpt import GPT, Block, GPTConfig, Recompute, fill
from fastmem.models.hf import agreeing, read_model, state_of


@dataclass(frozen=True)
class Sharding:
    """How one model lies on its ranks."""

    recompute: Recompute = "none"
    """What the backward pass computes again instead of keeping it: none, attention, or block (all
    but the input of each layer)."""
    accumulate: int = 1
    """Parts of a rank's batch, one after another, whose gradients are added."""
    offload: bool = False
    """Keep weights, gradients and moments in the memory of the CPU."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.recompute not in get_args(Recompute):
            raise ValueError(
                f"recompute must be one of {get_args(Recompute)}, not {self.recompute!r}"
            )
        integer("accumulate", self.accumulate, 1, 1 << 20)
        if not isinstance(self.offload, bool):
            raise ValueError(f"offload must be True or False, not {self.offload!r}")


def sharded_gpt(
    config: GPTConfig,
    seed: int = 0,
    precision: Precision = "fp32",
    sharding: Sharding | None = None,
) -> GPT:
    """A GPT whose parameters are spread over the ranks of `fastmem.joined`, for `fastmem.train`.

    Computes `GPT(config, seed)`, with the same numbers, by PyTorch's `fully_shard` on each block
    and on the whole: no rank holds all weights, except for the matrices of one block at a time and
    the embeddings. bf16-mixed keeps float32 weights, gathers and computes in bfloat16, the residual
    stream too, and adds gradients in float32.

    Args:
        config, seed: as of `GPT`.
        precision: of training; decides the dtype of the weights.
        sharding: recomputation, accumulation, offload.

    Raises:
        ValueError: outside of `joined`, or a device without bfloat16.

    Example:
        >>> with fastmem.joined("cpu"):
        ...     model = sharded_gpt(GPTConfig(1, 8, 2, vocab=16, length=4), seed=3)
        ...     sequences = fastmem.UniformSequences(8, length=4, vocab=16)
        ...     config = fastmem.TrainConfig(steps=300)
        ...     result = fastmem.train(model, sequences, config, progress=False)
        >>> result.memorized_bits > 0.3 * sequences.coded_entropy_bits
        True

    Source: FSDP, arXiv 2304.11277; `torch.distributed.fsdp.fully_shard`.
    """
    model = _empty(config, precision, sharding or Sharding())
    model.initialize(seed)
    return model


def sharded_from_hf(folder: str | Path, precision: Precision = "fp32") -> GPT:
    """`GPT.from_hf` of a folder, with its parameters spread over the ranks of `fastmem.joined`.

    A rank reads one weight after another and keeps its part.

    Raises:
        ValueError: as in `GPT.from_hf`; outside of `joined`, or a device without bfloat16.
    """
    folder = user_path(folder)
    config, tied, tensors = read_model(folder, GPTConfig)
    model = _empty(config, precision, Sharding())
    parameters = dict(model.named_parameters())

    @torch.no_grad()
    def keep(name: str, whole: Tensor) -> Tensor:
        fill(parameters[name], whole)
        return whole[:0].clone()

    with agreeing(folder):
        state_of(model, tensors, tied, keep)
    return model


def _empty(config: GPTConfig, precision: Precision, sharding: Sharding) -> GPT:
    model = sharded_on_meta(config, precision, sharding)
    model.to_empty(device="cpu" if sharding.offload else ranks.current().device)
    return model


def sharded_on_meta(config: GPTConfig, precision: Precision, sharding: Sharding) -> GPT:
    """`sharded_gpt` without memory."""
    compute_in(precision, ranks.current().device)
    model = GPT(config, device="meta")
    model.to(torch.bfloat16 if precision in ("bf16-true", "bf16-stochastic") else torch.float32)
    spread(model, list(model.blocks), precision, sharding)
    return model


def spread(model: nn.Module, blocks: list[nn.Module], precision: str, sharding: Sharding) -> None:
    """Applies fully_shard to the blocks, and to the rest of the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    job = ranks.current()
    options: dict[str, Any] = {"mesh": init_device_mesh(job.device.type, (job.size,))}
    options["mp_policy"] = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
        # bfloat16 would round each of the sums that a reduction adds.
        reduce_dtype=None if precision == "fp32" else torch.float32,
    )
    if sharding.offload and job.device.type != "cpu":
        options["offload_policy"] = CPUOffloadPolicy()
    compiled = engines.STEP == "compiled" or (job.device.type == "cuda" and engines.STEP == "graph")
    if compiled and blocks:
        say("compiling the blocks takes a minute or more; FASTMEM_STEP=eager leaves that out")
    for block in blocks:
        if isinstance(block, Block):
            block.recompute = sharding.recompute
        if compiled:
            block.forward = torch.compile(block.forward)
        fully_shard(block, **options)
    # The embedding is the head too, which is read after the forward pass of the module.
    fully_shard(model, **options, reshard_after_forward=False)
    model.sharding, model.precision = sharding, precision  # type: ignore[assignment]


def is_sharded(model: object) -> bool:
    """True for a model of fully_shard."""
    return hasattr(model, "set_requires_gradient_sync") and hasattr(model, "reshard")


def device_of(model: GPT) -> torch.device:
    """Where the model computes; the weights of a sharded model may lie elsewhere."""
    return ranks.current().device if is_sharded(model) else model.device


def computing(model: GPT, precision: Precision) -> tuple[AbstractContextManager[object], GPT]:
    """The context in which a model computes in a precision, and the model or a converted copy."""
    if not is_sharded(model):
        return compute_in(precision, model.device), converted(model, precision)
    made: Precision = model.precision  # type: ignore[assignment]
    if made != precision:
        raise ValueError(
            f"the model is sharded for {made}, not {precision}: give sharded_gpt the precision"
        )
    return _resharding(model), model


@contextmanager
def _resharding(model: GPT) -> Iterator[None]:
    try:
        yield
    finally:  # also after Stopped, whose checkpoint is of the parts
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Frees what a forward pass without a backward pass has gathered: until then the parameters
    of the model are not the parts of this rank."""
    model.reshard()  # type: ignore[operator]


def locals_of(model: nn.Module) -> Iterator[tuple[str, Any, Tensor]]:
    """Each parameter, a DTensor, with the part of it on this rank: a view."""
    parameter: Any
    for name, parameter in model.named_parameters():
        yield name, parameter, parameter.to_local()


class ShardedEngine:
    """`Engine` of one sharded model: tokens and losses are those of all ranks' sequences."""

    def __init__(self, model: GPT) -> None:
        self._model = model
        self._sharding: Sharding = model.sharding  # type: ignore[assignment]

    def compute(self, tokens: Tensor) -> Tensor:  # (1, B, T) of this rank → (1,) of all ranks
        """Mean bits per token over the batches of all ranks; leaves gradients in `.grad`."""
        parts = self._sharding.accumulate
        loss = torch.zeros(1, dtype=torch.float64, device=tokens.device)
        for part in tokens[0].chunk(parts):
            bits = self._model.token_bits(part).mean() / parts
            bits.backward()  # type: ignore[no-untyped-call]
            loss += bits.detach()
        dist.all_reduce(loss)
        return loss / dist.get_world_size()
