"""TRL: per-token log-probabilities and entropies for its trainers, without logits.

B sequences, T tokens, D width, V vocabulary; N tokens that have a label.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastmem.integrations.head import TrainedHead, trained_head
from fastmem.kernels import reference
from fastmem.likelihood.api import MAX_LOGITS

try:
    from trl.trainer import utils
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError:
    raise ImportError(
        "fastmem.integrations.trl needs TRL 1.16 or newer: pip install 'trl>=1.16'"
    ) from None

NATS = math.log(2)


@contextmanager
def fused_heads() -> Iterator[None]:
    """Gives `add_fused_lm_head` of this module to all trainers of TRL that are made within.

    Example:
        >>> from trl import SFTTrainer
        >>> with fused_heads():  # doctest: +SKIP
        ...     trainer = SFTTrainer("Qwen/Qwen3-0.6B", train_dataset=dataset)
        >>> trainer.train()  # doctest: +SKIP
    """
    theirs = utils.add_fused_lm_head
    _replace(theirs, add_fused_lm_head)
    try:
        yield
    finally:
        _replace(add_fused_lm_head, theirs)


def add_fused_lm_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """TRL's `add_fused_lm_head` with the same arguments and fields, computed by token_bits.

    Afterwards `model(..., labels=labels, fused_lm_head=True)` returns a FusedCausalLMOutput:

        log_p = torch.log_softmax(logits[:, :-1].float() / temperature, -1)
        log_probs = log_p.gather(-1, labels[:, 1:, None])[..., 0]       # 0 where a label is -100
        entropy = -(log_p.exp() * log_p).sum(-1)
        log_sum_sq_probs = torch.logsumexp(2 * log_p, -1)
        loss = -log_probs.sum() / (num_items_in_batch or the number of labels)

    in nats, with gradients of `loss`, `log_probs` and `entropy`. Tokens without a label reach no
    head. All other calls of the model are as before.

    Raises:
        ValueError: the head is not a plain linear layer, or its logits are not those of the head
            after a softcap and a scale. The message has the reason.
    """
    head = trained_head(model)
    # A bound method is bound to the copy by copy.deepcopy, as TRL makes it for reference models.
    model._fastmem_head, model._fastmem_unfused = head, model.forward

    @wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        given = {
            "labels": labels,
            "shift_labels": shift_labels,
            "num_items_in_batch": num_items_in_batch,
        }
        if not fused_lm_head:
            more = {name: value for name, value in given.items() if value is not None}
            return self._fastmem_unfused(*args, **more, **kwargs)
        with self._fastmem_head.no_logits(self) as inputs:
            output = self._fastmem_unfused(*args, **(kwargs | {"use_cache": False}))
        (hidden,) = inputs
        if shift_labels is None:
            assert labels is not None
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        if cast_lm_head_to_fp32:
            hidden = hidden.float()
        mask = (shift_labels != -100).to(hidden.device)
        whole = not cast_lm_head_to_fp32
        with nullcontext() if whole else torch.autocast(hidden.device.type, enabled=False):
            rows = hidden[mask], shift_labels.to(hidden.device)[mask]
            fields = _fields(self._fastmem_head, *rows, temperature, outputs)
        # masked_scatter keeps the graph where no token has a label, so that backward() works.
        fields = {k: x.new_zeros(mask.shape).masked_scatter(mask, x) for k, x in fields.items()}
        items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -fields["log_probs"].sum() / items
        aux_loss = getattr(output, "aux_loss", None)
        if aux_loss is not None:
            loss = loss + getattr(self.config, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **fields)

    model.forward = MethodType(forward, model)


def _fields(
    head: TrainedHead,
    hidden: Tensor,  # (N, D)
    labels: Tensor,  # (N,)
    temperature: float,
    wanted: Sequence[str],
) -> dict[str, Tensor]:  # each (N,)
    """The fields of FusedCausalLMOutput that are `wanted`, in nats, and log_probs."""
    asked = {
        "entropy": "entropy" in wanted,
        "greedy": "is_top1" in wanted,
        "lse": "log_sum_sq_probs" in wanted,
    }
    found: dict[str, Any] = {
        "log_probs": -NATS * head.bits(hidden, labels, temperature=temperature)
    }
    if any(asked.values()):
        stats: Any = head.stats(hidden, labels, temperature, **asked)
    if asked["entropy"]:
        problem = head.problem(hidden, labels, temperature).values()
        found["entropy"] = NATS * _Entropy.apply(stats.entropy_bits, *problem)  # type: ignore[no-untyped-call]
    if asked["greedy"]:
        found["is_top1"] = stats.is_greedy
    if asked["lse"]:  # the squares of p are the exponentials at half the temperature
        twice: Any = head.stats(hidden, labels, temperature / 2, lse=True)
        found["log_sum_sq_probs"] = NATS * (twice.lse_bits - 2 * stats.lse_bits)
    if "mean_logits" in wanted:
        with torch.no_grad():
            found["mean_logits"] = _mean_logits(head, hidden, temperature)
    return found


def _mean_logits(head: TrainedHead, hidden: Tensor, temperature: float) -> Tensor:  # (N,)
    hidden, weight = hidden.float(), head.weight.float()
    bias = None if head.bias is None else head.bias.float()
    if head.softcap is None:  # the mean of products is the product with the mean
        mean = hidden @ weight.mean(0) + (0.0 if bias is None else bias.mean())
    else:
        parts = [F.linear(part, weight, bias) for part in torch.split(hidden, _rows(weight))]
        mean = torch.cat([head.softcap * (x / head.softcap).tanh().mean(-1) for x in parts])
    return mean / (head.temperature * temperature)


class _Entropy(torch.autograd.Function):
    """Entropies that are known, in bits, (N,). Only a loss that uses them computes logits, in
    chunks of rows, for their gradient."""

    @staticmethod
    def forward(ctx: Any, known: Tensor, *problem: Any) -> Tensor:
        hidden, weight, targets, bias, *ctx.settings = problem
        ctx.save_for_backward(hidden, weight, targets, bias)
        return known.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, weight, targets, bias = ctx.saved_tensors
        leaves = [None if x is None else x.detach().requires_grad_() for x in (weight, bias)]
        hidden = hidden.detach().requires_grad_()
        rows = _rows(weight)
        with torch.enable_grad():
            entropies = [
                checkpoint(_entropy, *part, *leaves, *ctx.settings, use_reentrant=False)
                for part in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
            ]
        wanted = [hidden, *(x for x in leaves if x is not None)]
        found = torch.autograd.grad(entropies, wanted, torch.split(gradient, rows))
        return None, found[0], found[1], None, found[2] if bias is not None else None, None, None


def _entropy(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, *settings: Any) -> Any:
    return reference.token_stats(hidden, weight, targets, bias, *settings).entropy_bits


def _rows(weight: Tensor) -> int:
    """Rows of logits that plain PyTorch computes at once."""
    return max(1, MAX_LOGITS // len(weight))


def _replace(old: Any, new: Any) -> None:
    """Replaces a function in all modules of TRL that have imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("trl.") and vars(module).get("add_fused_lm_head") is old:
            vars(module)["add_fused_lm_head"] = new
