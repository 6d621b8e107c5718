"""torchtitan: its loss of next tokens from hidden states, without logits.

B sequences, T tokens, D width, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastmem.likelihood.api import token_bits
from fastmem.likelihood.checks import refuse_dtensor

try:
    from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper
except ImportError:
    raise ImportError(
        "fastmem.integrations.torchtitan needs torchtitan: pip install 'torchtitan>=0.3'"
    ) from None


class TokenBitsLoss(ChunkedLossWrapper):  # the trainer gives such a loss hidden states and head
    """torchtitan's loss `(pred, labels, global_valid_tokens) -> (loss, metrics)` by token_bits.

        F.cross_entropy(lm_head(pred).float().flatten(0, 1), labels.flatten(), reduction="sum")

    divided by `global_valid_tokens`, where labels of -100 count nothing. In a configuration of the
    trainer it takes the place of ChunkedLossWrapper: `loss=TokenBitsLoss.Config()`. The loss needs
    no chunks, and its `num_chunks` and `loss_fn` are not used. FSDP gathers the head as usual. A
    head that tensor parallelism shards over the vocabulary is a ValueError.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        """No fields of its own."""

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.lm_head: nn.Module | None = None

    def __call__(
        self,
        pred: Tensor,  # (B, T, D)
        labels: Tensor,  # (B, T)
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of -ln p of all labels, and no metrics."""
        head: Any = self.lm_head
        if head is None:
            raise ValueError("the loss has no head: call set_lm_head(model.lm_head) first")

        def nats(hidden: Tensor) -> Tensor:
            refuse_dtensor("the head's weight", head.weight, "a head that no loss parallel shards")
            bias = getattr(head, "bias", None)
            bits = token_bits(hidden, head.weight, labels, bias, ignore_index=IGNORE_INDEX)
            return bits.sum() * math.log(2)

        # FSDP gathers the weight for a call of the head, and its gradient after the call.
        head.forward = nats
        try:
            loss = head(pred)
        finally:
            del head.forward
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}
