"""transformers: the loss of a causal language model from its hidden states, without logits.

B sequences, T tokens, D width.
"""

import math
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from fastmem.integrations.head import PatchedForward, TrainedHead, trained_head

try:
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.utils.generic import ModelOutput
except ImportError:
    raise ImportError(
        "fastmem.integrations.transformers needs transformers 5: pip install 'fastmem-lm[hf]'"
    ) from None

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model) -> Model:
    """Makes a model of transformers compute its loss without logits; returns the model.

    With labels, `model(...)` returns what it returned before, but for `logits`, which are None
    (a tuple leaves them out), and for the rounding of `loss`:

        targets = labels, shifted by one token, or shift_labels
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        loss = loss / (num_items_in_batch or the number of targets that are not -100)

    Losses that the model adds to this one, as a load balance of experts, are kept. Without labels
    nothing changes. Trainer works as before, with any gradient accumulation. For
    `label_smoothing_factor` and `compute_loss_func` it keeps the labels to itself, so that these
    have logits. `compute_metrics` would have no predictions: call `unpatch` before.

    Args:
        model: a causal language model of transformers, or a PEFT model around it whose adapters
            leave the head alone. `nn.DataParallel` is not supported: start a process per GPU.

    Raises:
        ValueError: the model computes another loss; its head is not a plain linear layer; or its
            logits are not those of its head after a softcap and a scale. The message has the
            reason.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2))
        >>> tokens = torch.arange(12).view(2, 6)
        >>> before = model.eval()(tokens, labels=tokens).loss
        >>> output = patch(model)(tokens, labels=tokens)
        >>> output.logits is None, bool(abs(output.loss - before) < 1e-5)
        (True, True)
        >>> unpatch(model)(tokens, labels=tokens).logits.shape
        torch.Size([2, 6, 50])
    """
    base = _without_adapters(model)
    if base.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"{type(base).__name__} computes {base.loss_function.__name__}: patch takes the place "
            "of ForCausalLMLoss alone"
        )
    head = trained_head(base)
    if isinstance(getattr(base, "_fastmem_loss", None), _Forward):
        base._fastmem_loss.head = head
    else:
        base.forward = base._fastmem_loss = _Forward(base, head)
    return model


def unpatch(model: Model) -> Model:
    """Undoes `patch`; returns the model. A model that was not patched stays as it is."""
    base = _without_adapters(model)
    ours = getattr(base, "_fastmem_loss", None)
    if ours is not None:
        ours.head = None  # enough, and all that is possible if another library has wrapped it
        if base.forward is ours:
            base.forward, base._fastmem_loss = ours.original, None
            if base.forward == MethodType(type(base).forward, base):
                del base.forward
    return model


class _Forward(PatchedForward):
    def __init__(self, model: PreTrainedModel, head: TrainedHead) -> None:
        super().__init__(model, head)
        self.labels_at = list(self.__signature__.parameters).index("labels")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        at = self.labels_at
        labels = args[at] if len(args) > at else kwargs.get("labels")
        # A loss that was set after patch is the model's.
        if labels is None or self.head is None or "_loss_function" in vars(self.model):
            return self.original(*args, **kwargs)
        return self._with_loss(self.head, args, kwargs)

    def _with_loss(self, head: TrainedHead, args: Any, kwargs: Any) -> Any:
        model = self.model
        losses: list[Tensor] = []

        def loss_function(logits: Tensor, labels: Tensor, vocab_size: int, **more: Any) -> Tensor:
            (hidden,) = given
            losses.append(_mean_nats(head, hidden, labels, **more))
            return losses[0]

        with head.no_logits(model) as given:
            model.loss_function = loss_function
            try:
                output = self.original(*args, **kwargs)
            finally:
                del model._loss_function
        if len(given) != 1 or len(losses) != 1:
            raise RuntimeError(
                f"{type(model).__name__} called its head {len(given)} times and its loss "
                f"{len(losses)} times, not once: call fastmem.integrations.transformers.unpatch"
            )
        if isinstance(output, ModelOutput):
            return type(output)(**{**output, "logits": None})
        return output[:1] + output[2:]


def _mean_nats(
    head: TrainedHead,
    hidden: Tensor,  # (B, T, D)
    labels: Tensor,  # (B, T)
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """ForCausalLMLoss from hidden states."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(hidden.shape[:-1]).to(hidden.device)
    nats = head.bits(hidden, targets, ignore_index).sum() * math.log(2)
    if num_items_in_batch is None:
        return nats / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(nats.device)
    return nats / num_items_in_batch


def _without_adapters(model: nn.Module) -> Any:
    """The model of transformers inside a PEFT model; ValueError for anything else."""
    inner = getattr(model, "get_base_model", None)
    base = inner() if inner is not None and not isinstance(model, PreTrainedModel) else model
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a model of transformers: patch the model before it is "
            "compiled or wrapped"
        )
    return base
