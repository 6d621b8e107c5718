"""A causal language model of any library, which scores tokens without logits.

B sequences, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmem.kernels.reference import TokenStats
from fastmem.likelihood.api import token_bits, token_stats
from fastmem.models.causal.anatomy import (
    checked_head,
    device_of,
    embeddings_of,
    evaluating,
    longrope_limit_of,
    positions_of,
    unwrapped,
)
from fastmem.models.causal.head import (
    Head,
    head_in_float32,
    hidden_states,
    hooked,
    keeps_some,
    probed,
    run,
)
from fastmem.models.causal.sharded import Passes
from fastmem.models.causal.through_logits import IGNORED, MAX_LOGITS, fill_through_logits
from fastmem.models.gpt import GPT
from fastmem.models.sharded import is_sharded

TOLERANCE = 1e-3
"""Bits by which the hidden states may miss the model's own logits, in float32."""
HALF_TOLERANCE = 0.1
"""Bits by which another batch may change a token's bits in half precision, in the mean."""
SAMPLE = 32
"""Tokens of a sequence that are judged by the model's own logits."""


class CausalLM:
    """A causal language model that scores tokens without logits.

    Computes the per-token terms of transformers' causal LM loss without all logits in memory:

        logits = model(inputs).logits.double()
        bits = F.cross_entropy(logits.mT, targets, reduction="none") / math.log(2)

    The forward pass ends at the head (`get_output_embeddings()`), whose input goes to
    `fastmem.token_stats` with the head's own matrix. What the model does with the output of the
    head (a softcap, a scale, a cut of a padded vocabulary) is measured, not read from its
    configuration. In the first batch, and in any longer batch, bits are compared with those of the
    model's own logits, which the head and all that follows it compute in float32 for a sample of
    tokens. A model that differs by more than 1e-3 bits is scored through its logits, a few
    sequences at a time.

    Args:
        model: a fastmem.GPT, a *ForCausalLM of transformers, a PEFT model around one, or a module
            that maps tokens (B, T) to logits and has get_output_embeddings(). Its weights are read
            at each call; its training mode, hooks and configuration stay as they are.

    Attributes:
        device: where the model takes its tokens.
        parameters: the number of its weights.
        vocab: V, the number of logits.
        embeddings: the number of tokens that it can read, from 0.
        positions: the most tokens of one pass; None if any number fits.
        dtype: of bits: float64 for a model in float64, else float32.
        through: "hidden" or "logits"; the first batch may change "hidden" to "logits".
        reason: one line that says why "logits", else None.

    Raises:
        ValueError: an encoder-decoder, a masked model, a model that reads the tokens that follow,
            a model without a head, or without numbers (meta).

    Example:
        >>> model = CausalLM(GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4)))
        >>> tokens = torch.tensor([[3, 1, 2]])
        >>> bits = model.token_stats(tokens[:, :-1], tokens[:, 1:]).bits
        >>> bits.shape, model.through, model.vocab, model.positions
        (torch.Size([1, 2]), 'hidden', 16, 4)

    Source: the loss of transformers' `ForCausalLMLoss`; bits as in `fastmem.token_bits`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrapped(model)
        self.name = type(self.model).__name__.removeprefix("FSDP")
        self._passes = Passes(self.model, self._empty_pass) if is_sharded(self.model) else None
        self._module = checked_head(self.model)
        # Here, since a weight of two modules is two parameters where a sharded model is gathered.
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.device = device_of(self.model)
        self.positions = positions_of(self.model)
        self._longrope_limit = longrope_limit_of(self.model)
        self.through = "hidden"
        self.reason: str | None = None
        self._head: Head | None = None
        self._proved = 0
        if isinstance(self.model, GPT):
            self.vocab = self.embeddings = self.model.config.vocab
            self.dtype = torch.promote_types(self.model.head.dtype, torch.float32)
            self._head = Head(self.model.token_embedding, self.vocab, None, 1.0)
        else:
            self.embeddings = embeddings_of(self.model, self._module)
            weight = getattr(self._module, "weight", None)
            self._exact = getattr(weight, "dtype", None) in (torch.float32, torch.float64)
            with torch.no_grad(), evaluating(self.model):
                self._probe()
        self.wait()

    def token_stats(
        self,
        inputs: Tensor,  # (B, T)
        targets: Tensor,  # (B, T)
        *,
        entropy: bool = False,
        variance: bool = False,
        greedy: bool = False,
        lse: bool = False,
    ) -> TokenStats:  # each (B, T)
        """Bits of each target after the inputs up to its place, and statistics on request.

        Computes `fastmem.token_stats` of the hidden states, without gradients, in eval mode and
        without a cache of keys and values. No attention mask is given: sequences that are padded
        on the right need none, since the model is causal.

        Args:
            inputs: token ids, int64.
            targets: the token that follows each input; -100 for tokens that are not scored; the
                head skips them.
            entropy, variance, greedy, lse: the statistics to compute; each other one is None.

        Returns:
            Fields of shape (B, T) on the device of the model, in float32 (float64 for a model in
            float64) and bool: 0 and False where nothing is scored.

        Raises:
            ValueError: shapes differ, T is above `positions`, or a token is outside of the
                vocabulary.
        """
        self._check(inputs, targets)
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        scored = targets != IGNORED
        wanted = _Wanted(entropy, variance, greedy, lse)
        if not bool(scored.any()):
            found = self._nothing(inputs.shape)
        else:
            with torch.no_grad(), evaluating(self.model):
                found = self._split(inputs, targets, scored, wanted)
        return TokenStats(
            found.bits,
            found.entropy_bits if entropy else None,
            None,
            found.is_greedy if greedy else None,
            found.lse_bits if lse else None,
            found.variance if variance else None,
        )

    def _split(
        self, inputs: Tensor, targets: Tensor, scored: Tensor, wanted: "_Wanted"
    ) -> TokenStats:
        """Statistics of a batch; longrope gives padded short sequences the frequencies of long
        sequences, so the two have passes of their own."""
        limit = self._longrope_limit
        if limit is None or limit >= inputs.shape[1]:
            return self._stats_of_batch(inputs, targets, scored, wanted)
        whole = self._nothing(inputs.shape)
        long = scored[:, limit:].any(1)
        for rows, length in ((~long, limit), (long, inputs.shape[1])):
            if not scored[rows].any():
                continue
            part = [each[rows, :length] for each in (inputs, targets, scored)]
            found = self._stats_of_batch(part[0], part[1], part[2], wanted)
            for to, values in zip(whole, found, strict=True):
                if to is not None and values is not None:
                    to[rows, :length] = values
        return whole

    def _stats_of_batch(
        self, inputs: Tensor, targets: Tensor, scored: Tensor, wanted: "_Wanted"
    ) -> TokenStats:
        if self.through == "hidden":
            found = self._through_hidden(inputs, targets, scored, wanted)
            if self._proved < inputs.shape[1] and not isinstance(self.model, GPT):
                self._prove(inputs, targets, scored, found.bits)
        if self.through == "logits":
            found = self._nothing(inputs.shape)
            fill_through_logits(found, self.model, self.vocab, inputs, targets)
        return found

    def _nothing(self, shape: torch.Size) -> TokenStats:
        """Statistics of a batch in which no token is scored."""
        whole = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(5)]
        greedy = torch.zeros(shape, dtype=torch.bool, device=self.device)
        return TokenStats(whole[0], whole[1], whole[2], greedy, whole[3], whole[4])

    def _through_hidden(
        self, inputs: Tensor, targets: Tensor, scored: Tensor, wanted: "_Wanted"
    ) -> TokenStats:
        hidden = self.hidden(inputs)
        rows = scored.to(hidden.device)
        hidden = hidden.flatten(0, 1) if bool(rows.all()) else hidden[rows]
        stats = self._stats(hidden, targets[scored], wanted)
        placed = [x if x is None else _placed(x, scored) for x in stats[1:]]
        return TokenStats(_placed(stats.bits, scored), *placed)

    def hidden(self, inputs: Tensor) -> Tensor:  # (B, T) → (B, T, D)
        """What the head receives."""
        if isinstance(self.model, GPT):
            states: Tensor = self.model(inputs)
            return states
        return hidden_states(self.model, self._module, inputs)

    def _stats(self, hidden: Tensor, targets: Tensor, wanted: "_Wanted") -> TokenStats:
        """Statistics of rows (N, D) of hidden states."""
        head = self._head
        assert head is not None
        weight, bias, device = head.weight, head.bias, head.weight.device
        problem = hidden.to(device), weight, targets.to(device), bias
        scale = head.softcap, head.temperature
        if not any(wanted):
            return TokenStats(token_bits(*problem, *scale), None, None, None, None, None)
        return token_stats(
            *problem,
            *scale,
            entropy=wanted.entropy,
            greedy=wanted.greedy,
            lse=wanted.lse,
            variance=wanted.variance,
        )

    def _probe(self) -> None:
        """Finds the vocabulary, what follows the head, and whether the model is causal."""
        T = min(8, self.positions or 8)
        tokens = (torch.arange(T, device=self.device) * 7919 + 3) % self.embeddings
        later = torch.arange(T, device=self.device) >= (T + 1) // 2
        inputs = torch.stack([tokens, torch.where(later, tokens + 1, tokens) % self.embeddings])
        logits = run(self.model, inputs)[:, -T:]
        self.vocab = logits.shape[-1]
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        first, second = logits[:, : (T + 1) // 2].float().unbind()
        moved = float((first - second).nan_to_num(0, torch.inf, -torch.inf).abs().amax())
        if moved > float(first.nan_to_num(0, 0, 0).abs().amax()) * (1e-3 if self._exact else 0.05):
            raise ValueError(
                f"{self.name} is not causal: its logits change by {moved:.2g} with a later token; "
                "give a causal language model (for a BERT, one with is_decoder=True)"
            )
        self._head, reason = probed(self.model, self._module, inputs)
        if self._head is None:
            return self._fall_back(reason)
        try:
            hidden_states(self.model, self._module, inputs)
        except ValueError as error:
            self._fall_back(str(error))
        return None

    def _prove(self, inputs: Tensor, targets: Tensor, scored: Tensor, bits: Tensor) -> None:
        """Falls back to logits where a sample of the batch differs from the model's own logits.

        The sample spreads over the longest sequence, and over the sequence with the most padding.
        """
        lengths = (scored * torch.arange(1, scored.shape[1] + 1, device=scored.device)).amax(1)
        least = torch.where(lengths > 0, lengths, scored.shape[1] + 1).argmin()
        for row in {int(lengths.argmax()), int(least)}:
            reason = self._difference(inputs[row], targets[row], scored[row], bits[row])
            if reason is not None:
                return self._fall_back(reason)
        self._proved = scored.shape[1]
        return None

    def _difference(
        self, inputs: Tensor, targets: Tensor, scored: Tensor, bits: Tensor
    ) -> str | None:
        """One line if the bits of a sequence (T,) differ from those of the model's own logits."""
        places = scored.nonzero()[:, 0]
        if not keeps_some(self.model):  # then the logits of all its tokens are made
            places = places[places < max(1, MAX_LOGITS // self.vocab)]
        spread = torch.linspace(0, max(0, len(places) - 1), min(SAMPLE, len(places)))
        places = places[spread.round().long().to(places.device)]
        if not len(places):
            return None
        end, wanted = int(places[-1]) + 1, targets[places]
        keep = places if keeps_some(self.model) else None

        def product(hidden: Tensor, output: Tensor) -> Tensor:
            return output if self._exact else head_in_float32(self._module, hidden)

        try:
            with hooked(self._module, product) as taken:
                logits = run(self.model, inputs[None, :end], keep)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # such as a hook that casts what the head receives
            return f"its head does not compute in float32 ({error})"[:200]
        if len(taken) != 1:
            return f"its head is called {len(taken)} times as a module in one pass"
        rows, hidden = logits[0], taken[0].reshape(-1, taken[0].shape[-1])
        if len(rows) != len(places):  # virtual tokens of a PEFT prompt come first
            rows, hidden = rows[places - end], hidden[places - end]
        log_p = torch.log_softmax(rows.double(), -1)
        judge = -log_p.gather(-1, wanted[:, None].to(log_p.device))[:, 0].cpu() / math.log(2)
        if judge.isnan().any():
            return None  # weights that diverged
        limit = self._longrope_limit
        most = limit if limit is not None and end <= limit else self.positions
        padded = inputs[None, :end].repeat(1, 2)[:, :most]
        longer = hidden_states(self.model, self._module, padded)[0, places]
        # In half precision another batch shape rounds otherwise: by less, in the mean.
        for what, found, exact in (
            ("its hidden states and its head", self._stats(hidden, wanted, _Wanted()).bits, True),
            ("padding", self._stats(longer, wanted, _Wanted()).bits, self._exact),
            ("its batch", bits[places], self._exact),
        ):
            differ = (found.double().cpu() - judge).abs()
            differ = differ.amax() if exact else differ.mean()
            if not differ <= (TOLERANCE if exact else HALF_TOLERANCE):
                return f"bits by {what} differ from those of its own logits by {float(differ):.2g}"
        return None

    @property
    def head(self) -> Head | None:
        """The head and what follows it; None if that is unknown."""
        return self._head

    def wait(self) -> None:
        """Waits until all ranks of a sharded model wait: call it where a rank has no batch left."""
        if self._passes is not None:
            self._passes.wait()

    def _empty_pass(self) -> None:
        with torch.no_grad(), evaluating(self.model):
            run(self.model, torch.tensor([[3 % self.embeddings]], device=self.device))

    def follow(self, reasons: Iterable[str | None]) -> None:
        """Scores through logits, if one of the ranks with these `reason`s does."""
        for reason in filter(None, reasons):
            self.through, self.reason = "logits", reason

    def _fall_back(self, reason: str) -> None:
        self.through, self.reason = "logits", f"{self.name} is scored through its logits: {reason}"

    def _check(self, inputs: Tensor, targets: Tensor) -> None:
        for name, tensor in (("inputs", inputs), ("targets", targets)):
            if tensor.ndim != 2 or tensor.dtype != torch.int64 or tensor.shape != inputs.shape:
                raise ValueError(
                    f"{name} are {tensor.dtype} of shape {tuple(tensor.shape)}: give int64 of one "
                    f"shape (sequences, tokens); inputs have {tuple(inputs.shape)}"
                )
        if self.positions is not None and inputs.shape[1] > self.positions:
            raise ValueError(
                f"{inputs.shape[1]} tokens for the {self.positions} positions of {self.name}: cut "
                "documents into windows (fastmem.models.scoring.windows)"
            )
        if inputs.numel() == 0:
            return
        for tokens, limit, what in (
            (inputs, self.embeddings, "embeddings"),
            (targets[targets != IGNORED], self.vocab, "logits"),
        ):
            least, most = (int(x) for x in tokens.aminmax()) if tokens.numel() else (0, 0)
            if least < 0 or most >= limit:
                raise ValueError(
                    f"token {least if least < 0 else most} is outside of the {limit} {what} of "
                    f"{self.name}: use the tokenizer that belongs to the model"
                )


class _Wanted(NamedTuple):
    """The statistics that are asked for."""

    entropy: bool = False
    variance: bool = False
    greedy: bool = False
    lse: bool = False


def _placed(values: Tensor, scored: Tensor) -> Tensor:
    """Values of the scored rows (N,) in a tensor (B, T) that is zero elsewhere."""
    if values.numel() == scored.numel():
        return values.view(scored.shape).to(scored.device)
    whole = torch.zeros(scored.shape, dtype=values.dtype, device=scored.device)
    whole[scored] = values.to(scored.device)
    return whole
