"""TRL: per-token log-probabilities and entropies for its trainers, without logits.

B sequences, T tokens, D width, V vocabulary; N tokens that have a label.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastmem.integrations.head import PatchedForward, TrainedHead, trained_head
from fastmem.kernels import reference
from fastmem.likelihood.local import MAX_LOGITS

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
    model.forward = _Forward(model, temperature, cast_lm_head_to_fp32, outputs)


class _Forward(PatchedForward):
    head: TrainedHead

    def __init__(
        self, model: Any, temperature: float, cast_to_fp32: bool, outputs: Sequence[str]
    ) -> None:
        super().__init__(model, trained_head(model))
        self.temperature, self.cast_to_fp32, self.outputs = temperature, cast_to_fp32, outputs

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return self.original(*args, **kwargs)
        names = ("labels", "shift_labels", "num_items_in_batch")
        labels, shifted, items = (kwargs.pop(name, None) for name in names)
        with self.head.no_logits(self.model) as inputs:
            output = self.original(*args, **(kwargs | {"use_cache": False}))
        (hidden,) = inputs
        if shifted is None:
            hidden, shifted = hidden[:, :-1], labels[:, 1:]
        return self._output(hidden, shifted.to(hidden.device), items, output)

    def _output(self, hidden: Tensor, labels: Tensor, items: Any, of_model: Any) -> Any:
        mask = labels != -100
        plain: Any = nullcontext()
        if self.cast_to_fp32:
            hidden, plain = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        with plain:
            rows = hidden[mask], labels[mask]
            fields = _fields(self.head, *rows, self.temperature, self.outputs)
        # masked_scatter keeps the graph where no token has a label, so that backward() works.
        fields = {k: x.new_zeros(mask.shape).masked_scatter(mask, x) for k, x in fields.items()}
        loss = -fields["log_probs"].sum() / (mask.sum().clamp(min=1) if items is None else items)
        aux_loss = getattr(of_model, "aux_loss", None)
        if aux_loss is not None:
            loss = loss + getattr(self.model.config, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **fields)


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
        found["entropy"] = NATS * _Entropy.apply(  # type: ignore[no-untyped-call]
            *(stats.entropy_bits, hidden, head.weight, labels, head.bias),
            *(head.softcap, head.temperature * temperature),
        )
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
    def forward(
        ctx: Any,
        known: Tensor,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        *settings: float | None,  # softcap, temperature
    ) -> Tensor:
        ctx.settings = settings
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
