"""The head of a model that trains: its input and the gradients of its bits, without logits.

N rows, D width, V vocabulary.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmem.kernels.reference import TokenStats
from fastmem.likelihood.api import token_bits, token_stats
from fastmem.likelihood.checks import refuse_dtensor
from fastmem.models.causal.head import Head
from fastmem.models.causal.lm import CausalLM


@dataclass(frozen=True)
class TrainedHead(Head):
    """A head and what follows it, as CausalLM proved it; methods as token_bits and token_stats."""

    rows: int
    """Of its matrix, with those of a padded vocabulary."""

    def bits(
        self,
        hidden: Tensor,  # (..., D)
        targets: Tensor,  # (...)
        ignore_index: int = -100,
        temperature: float = 1.0,
    ) -> Tensor:  # (...)
        """Bits of each target, with gradients; `temperature` divides the logits."""
        # F.cross_entropy refuses a target that is not a token, on a GPU by a crash. A NaN would be
        # hidden by Trainer's logging_nan_inf_filter, but the check would wait for a GPU.
        check = hidden.device.type == "cpu"
        problem = self.problem(hidden, targets, temperature)
        return token_bits(**problem, ignore_index=ignore_index, check=check)

    def stats(
        self,
        hidden: Tensor,  # (..., D)
        targets: Tensor,  # (...)
        temperature: float = 1.0,
        **wanted: Any,
    ) -> TokenStats:  # each (...)
        """Bits and statistics, without gradients."""
        return token_stats(**self.problem(hidden, targets, temperature), **wanted)

    def problem(self, hidden: Tensor, targets: Tensor, temperature: float) -> dict[str, Any]:
        """The arguments of token_bits, by name."""
        # Its gradient would be a sum over ranks, whatever the trainer does with the others.
        refuse_dtensor("the head's weight", self.weight, "a model whose head is whole")
        return {
            "hidden": hidden,
            "weight": self.weight,
            "targets": targets,
            "bias": self.bias,
            "softcap": self.softcap,
            "temperature": self.temperature * temperature,
        }

    @contextmanager
    def no_logits(self, model: Any) -> Iterator[list[Tensor]]:
        """Lets the head compute no rows of logits; collects the inputs that it was given.

        Raises:
            RuntimeError: the head of the model is not the one that was proved.
        """
        module: Any = model.get_output_embeddings()
        rows = len(module.weight)
        if module is not self.module or rows != self.rows:
            raise RuntimeError("the head of the model was replaced after it was patched")
        given: list[Tensor] = []

        def cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            given.append(args[0])
            return (args[0][..., :0, :],)

        hook = module.register_forward_pre_hook(cut)
        try:
            yield given
        finally:
            hook.remove()


class PatchedForward:
    """The forward method of a patched model. copy.deepcopy gives a copied model its own, as TRL
    copies models for their references."""

    def __init__(self, model: Any, head: TrainedHead) -> None:
        self.model, self.original = model, model.forward
        self.head: TrainedHead | None = head
        self.__signature__ = inspect.signature(model.forward)  # which trainers and generate read


def trained_head(model: Any) -> TrainedHead:
    """The head of a model of transformers; ValueError with the reason if its logits are needed."""
    module = model.get_output_embeddings()
    kind = type(module)
    # CausalLM judges today's bits: an adapter may be zero today and differ after a step.
    if getattr(kind, "forward", None) is not nn.Linear.forward or "forward" in vars(module):
        raise ValueError(
            f"the head of {type(model).__name__} is {kind.__module__}.{kind.__name__}, not a plain "
            "nn.Linear: leave it out of adapters, quantization and offloading"
        )
    lm = CausalLM(model)
    tokens = torch.arange(min(16, lm.positions or 16), device=lm.device)[None] % lm.vocab
    lm.token_stats(tokens, tokens)  # proves it
    if lm.through == "logits":
        raise ValueError(lm.reason)
    assert lm.head is not None
    return TrainedHead(**vars(lm.head), rows=len(module.weight))
