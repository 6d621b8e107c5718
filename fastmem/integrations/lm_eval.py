"""lm-evaluation-harness: `--model fastmem`, log-likelihoods without logits.

B sequences of a batch, T tokens of the longest, N scored tokens.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from fastmem.integrations.head import TrainedHead, trained_head
from fastmem.kernels.reference import TokenStats
from fastmem.models.causal.head import hidden_states

try:
    import lm_eval.models  # noqa: F401  (it fills the registry)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator
except ImportError:
    raise ImportError(
        "fastmem.integrations.lm_eval needs the harness: pip install 'lm-eval[hf]>=0.4.13'"
    ) from None

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Two strings, and the tokens of the context and of the continuation."""
LOG = logging.getLogger(__name__)


class FastmemLM(HFLM):
    """HFLM of lm-evaluation-harness, with log-likelihoods that need no logits.

    Arguments, tokenization, prefix tokens, windows, batches, caches and `generate_until` are those
    of HFLM. HFLM itself scores encoder-decoders and models that need their logits, and the log says
    why.
    """

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation in nats, and whether greedy decoding has it."""
        if self._head is None:
            theirs: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm, override_bs
            )
            return theirs
        order = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
            group_by="contexts" if self.logits_cache else None,
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        adapts = self.batch_size == "auto" and not override_bs and len(order) > 0
        if adapts:
            self.batch_sizes: dict[int, int] = {}
        size = (override_bs or 0) if self.batch_size == "auto" else self.batch_size
        scheduler = self._batch_scheduler if adapts else None
        answers = []
        hidden = disable_tqdm or self.rank != 0
        with tqdm(
            total=len(requests), disable=hidden, desc="Running loglikelihood requests"
        ) as bar:
            for chunk in order.get_batched(n=size, batch_fn=scheduler):
                for request, answer in self._answers(chunk, order):
                    answers.append(answer)
                    if request is not None:  # a window of loglikelihood_rolling has None
                        self.cache_hook.add_partial("loglikelihood", request, answer)
                    bar.update()
        return list(order.get_original(answers))

    def _answers(
        self, chunk: Sequence[Request], order: Collator
    ) -> Iterator[tuple[tuple[str, str] | None, tuple[float, bool]]]:
        """The answers of a batch, and of cached requests that share all tokens but the last."""
        inputs = []
        for _, context, continuation in chunk:
            assert context, "the context has no tokens"
            assert 0 < len(continuation) <= self.max_length
            if (cut := len(context + continuation) - 1 - self.max_length) > 0:
                LOG.warning(f"{cut} tokens on the left do not fit in {self.max_length} positions")
            inputs.append(torch.tensor((context + continuation)[-(self.max_length + 1) : -1]))
        tokens = pad_sequence(inputs, batch_first=True)
        asked = []
        for place, (request, context, continuation) in enumerate(chunk):
            end = place * tokens.shape[1] + len(inputs[place])
            rows = torch.arange(end - len(continuation), end).view(1, -1, 1)
            # Rows of hidden states take the place of rows of logits.
            asked += order.get_cache(request, context, continuation, rows)
        # Requests of a group may have continuations of several lengths; all end at one token.
        rows = torch.cat([rows.flatten()[-len(wanted) :] for _, wanted, rows in asked])
        targets = torch.cat([torch.tensor(wanted) for _, wanted, _ in asked])
        stats = self._stats(tokens, rows, targets)
        lengths = [len(wanted) for _, wanted, _ in asked]
        nats = torch.split(-math.log(2) * stats.bits.double().cpu(), lengths)
        assert stats.is_greedy is not None
        greedy = torch.split(stats.is_greedy.cpu(), lengths)
        for (request, _, _), of_tokens, same in zip(asked, nats, greedy, strict=True):
            yield request, (float(of_tokens.sum()), bool(same.all()))

    def _stats(
        self,
        tokens: Tensor,  # (B, T)
        rows: Tensor,  # (N,), places in B * T
        targets: Tensor,  # (N,)
    ) -> TokenStats:  # each (N,)
        """Bits and greediness of targets after the places `rows`."""
        head, dtype = self._head, self.mixed_precision_dtype
        assert head is not None
        if int(targets.max()) >= head.vocab:
            raise ValueError(
                f"token {int(targets.max())} is outside of the {head.vocab} logits of "
                f"{type(self.model).__name__}: use the tokenizer that belongs to the model"
            )
        enabled = dtype is not None
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
            hidden = hidden_states(self.model, head.module, tokens.to(self.device)).flatten(0, 1)
            rows, targets = rows.to(hidden.device), targets.to(hidden.device)
            return head.stats(hidden[rows], targets, greedy=True)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What HFLM calls to find the largest batch: a pass as it will be, without logits."""
        if self._head is None:
            logits: Tensor = super()._model_call(inps, *args, **kwargs)
            return logits
        rows = torch.arange(inps.numel())
        return self._stats(inps, rows, inps.flatten()).bits

    @cached_property
    def _head(self) -> TrainedHead | None:
        """What follows the hidden states; None if HFLM has to score the model."""
        if self.backend != "causal":
            return None
        try:
            return trained_head(self.model)
        except ValueError as error:
            LOG.warning(f"scored by HFLM: {error}")
            return None


if "fastmem" not in model_registry:  # later versions find it by its entry point
    model_registry.register("fastmem")(FastmemLM)

if __name__ == "__main__":  # python -m fastmem.integrations.lm_eval takes lm_eval's arguments
    cli_evaluate()
