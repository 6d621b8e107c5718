"""mimir: the interface of its `Model`, for its attacks, without logits.

N tokens of a text.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fastmem.base.arguments import integer
from fastmem.models.causal.lm import CausalLM
from fastmem.models.scoring.windows import Window, scored_windows


class Model:
    """A model and its tokenizer with the methods that mimir's attacks call.

    Log-probabilities, in nats, of all tokens but the first, each from the window that mimir gives
    it: tokens are scored in blocks of `stride` = `max_length` // 2, after as many tokens as fill
    `max_length`. Numbers are those of mimir in float32, in batches and without logits. A text that
    holds the padding token keeps it, where mimir's `get_lls` leaves it out.

    Args:
        model: as CausalLM takes it.
        tokenizer: gives `tokenizer(text).input_ids`.
        name: what attacks that cache their results call the model.
        max_length: tokens of a window, from 2; None: `max_position_embeddings` or `n_positions` of
            the model's configuration, else 1024.

    Raises:
        ValueError: as CausalLM; a window of less than 2 tokens.

    Example:
        >>> import fastmem
        >>> model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4))
        >>> scores = Model(model, tokenizer=None, max_length=4)
        >>> found = scores.get_probabilities("", tokens=np.array([3, 1, 2, 5, 4, 9]))
        >>> len(found), all(abs(p + math.log(16)) < 0.1 for p in found)  # untrained
        (5, True)

    Source: github.com/iamgroot42/mimir, mimir/models.py.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, name: str = "fastmem", max_length: int | None = None
    ) -> None:
        self.lm = CausalLM(model)
        self.model, self.tokenizer, self.name, self.device = model, tokenizer, name, self.lm.device
        config = getattr(model, "config", None)
        found = [getattr(config, n, None) for n in ("max_position_embeddings", "n_positions")]
        longest = next((n for n in found if n), 1024) if max_length is None else max_length
        self.max_length = integer("max_length", longest, 2, 2**40)
        self.stride = self.max_length // 2

    def get_probabilities(
        self,
        text: str,
        tokens: NDArray[np.integer[Any]] | None = None,  # (N,) or (1, N)
        no_grads: bool = True,
        return_all_probs: bool = False,
    ) -> list[float]:  # (N - 1,)
        """The log-probability of each token of the text, or of `tokens` in its place."""
        if return_all_probs or not no_grads:
            raise NotImplementedError(
                "all log-probabilities, and gradients, need logits: take mimir's own model, or "
                "fastmem.token_stats(..., entropy=True, variance=True) for Min-K%++"
            )
        ids = self.tokenizer(text).input_ids if tokens is None else tokens
        (found,) = self._log_probabilities([ids], batch_tokens=512)
        return [float(p) for p in found]

    def get_ll(
        self,
        text: str,
        tokens: NDArray[np.integer[Any]] | None = None,
        probs: Sequence[float] | None = None,
    ) -> float:
        """Minus the mean log-probability of the tokens in nats; NaN for a text of one token."""
        return _loss(self.get_probabilities(text, tokens) if probs is None else probs)

    def get_lls(self, texts: Sequence[str], batch_size: int = 6) -> list[float]:
        """`get_ll` of each text, `batch_size` windows at a time."""
        ids = [self.tokenizer(text).input_ids for text in texts]
        found = self._log_probabilities(ids, batch_tokens=batch_size * self.max_length)
        return [_loss(each) for each in found]

    def _log_probabilities(
        self, texts: Sequence[Any], batch_tokens: int
    ) -> list[NDArray[np.float64]]:
        documents = [np.asarray(ids, np.int64).reshape(-1) for ids in texts]
        found = [np.zeros(max(0, len(tokens) - 1)) for tokens in documents]
        cut = [
            Window(document, max(at + self.stride - self.max_length, 0), max(at, 1), end)
            for document, tokens in enumerate(documents)
            for at in range(0, len(tokens), self.stride)
            if (end := min(at + self.stride, len(tokens))) > 1
        ]
        for batch, scored in scored_windows(self.lm, documents, cut, batch_tokens):
            for window, bits in zip(batch, scored["bits"], strict=True):
                nats = -math.log(2) * bits.astype(np.float64)
                found[window.document][window.first - 1 : window.end - 1] = nats
        return found


def _loss(log_probabilities: Sequence[float] | NDArray[np.float64]) -> float:
    return -float(np.mean(log_probabilities)) if len(log_probabilities) else math.nan
