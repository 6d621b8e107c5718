"""A causal language model of any library, which scores tokens without logits.

B sequences, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastmem.kernels.reference import TokenStats, stats_of_logits
from fastmem.likelihood.api import token_bits, token_stats
from fastmem.models.causal.head import Head, head_in_float32, hidden_states, hooked, probed, run
from fastmem.models.gpt import GPT

IGNORED = -100
"""The target of a token that is not scored."""
TOLERANCE = 1e-3
"""Bits by which the hidden states may miss the model's own logits, in float32."""
SAMPLE = 32
"""Tokens of the first batch that are judged by the model's own logits."""
MAX_LOGITS = 1 << 26
"""Logits that a model holds at once if it is scored through them (256 MiB in float32)."""


class CausalLM:
    """A causal language model that scores tokens without logits.

    Computes what the loss of transformers' models is made of, without all logits in memory:

        logits = model(inputs).logits.double()
        bits = F.cross_entropy(logits.mT, targets, reduction="none") / math.log(2)

    The forward pass ends at the head (`get_output_embeddings()`), whose input goes to
    `fastmem.token_stats` with the head's own matrix. What the model does with the output of the
    head (a softcap, a scale, a cut of a padded vocabulary) is measured, not read from its
    configuration. In the first batch bits are compared with those of the model's own logits, which
    the head and all that follows it compute in float32 for a sample of tokens. A model that
    differs by more than 1e-3 bits is scored through its logits, a few sequences at a time.

    Args:
        model: a fastmem.GPT, a *ForCausalLM of transformers, a PEFT model around one, or a module
            that maps tokens (B, T) to logits and has get_output_embeddings(). Its weights are read
            at each call; its training mode, hooks and configuration stay as they are.

    Attributes:
        device: where the model takes its tokens.
        vocab: V, the number of logits.
        positions: the most tokens of one pass; None if any number fits.
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
        self.model = _unwrapped(model)
        self.name = type(self.model).__name__
        self._module = _checked_head(self.model)
        self.device = _device(self.model)
        self.positions = _positions(self.model)
        self.through, self.reason = "hidden", None
        self._head: Head | None = None
        self._proved = isinstance(self.model, GPT)
        if isinstance(self.model, GPT):
            self.vocab = self._embeddings = self.model.config.vocab
            self._head = Head(self.model.token_embedding, self.vocab, None, 1.0)
        else:
            self._embeddings = _embeddings(self.model, self._module)
            with torch.no_grad(), evaluating(self.model):
                self._probe()

    def token_stats(
        self,
        inputs: Tensor,  # (B, T)
        targets: Tensor,  # (B, T)
        *,
        entropy: bool = False,
        variance: bool = False,
        is_greedy: bool = False,
        lse: bool = False,
    ) -> TokenStats:  # each (B, T)
        """Bits of each target after the inputs up to its place, and statistics on request.

        Computes `fastmem.token_stats` of the hidden states, without gradients, in eval mode and
        without a cache of keys and values. No attention mask is given: sequences that are padded
        on the right need none, since the model is causal.

        Args:
            inputs: token ids, int64.
            targets: the token that follows each input; -100 where nothing is scored, and such a
                row does not reach the head.
            entropy, variance, is_greedy, lse: the statistics to compute; each other one is None.

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
        asked = {"entropy": entropy, "variance": variance, "greedy": is_greedy, "lse": lse}
        with torch.no_grad(), evaluating(self.model):
            if self.through == "hidden":
                found = self._through_hidden(inputs, targets, scored, asked)
                if not self._proved and bool(scored.any()):
                    self._prove(inputs, targets, scored, found.bits)
            if self.through == "logits":
                found = self._through_logits(inputs, targets, scored)
        wanted = {"second_moment": False, **asked, "variance": variance}
        return TokenStats(
            found.bits,
            found.entropy_bits if entropy else None,
            None,
            found.is_greedy if wanted["greedy"] else None,
            found.lse_bits if lse else None,
            found.variance if variance else None,
        )

    def _through_hidden(
        self, inputs: Tensor, targets: Tensor, scored: Tensor, asked: dict[str, bool]
    ) -> TokenStats:
        assert self._head is not None
        if isinstance(self.model, GPT):
            hidden = self.model(inputs)
        else:
            hidden = hidden_states(self.model, self._module, inputs)
        weight = self._head.weight
        rows = scored.to(hidden.device)
        hidden = hidden.flatten(0, 1) if bool(rows.all()) else hidden[rows]
        stats = self._stats(hidden.to(weight.device), targets[scored].to(weight.device), asked)
        return TokenStats(*(_placed(x, scored) for x in stats))

    def _stats(self, hidden: Tensor, targets: Tensor, asked: dict[str, bool]) -> TokenStats:
        """Statistics of rows (N, D) of hidden states."""
        head = self._head
        assert head is not None
        problem = (hidden, head.weight, targets, head.bias, head.softcap, head.temperature)
        if not any(asked.values()):
            return TokenStats(token_bits(*problem), None, None, None, None, None)
        return token_stats(*problem, **asked)

    def _through_logits(self, inputs: Tensor, targets: Tensor, scored: Tensor) -> TokenStats:
        """Sequences of one length at a time, without padding and with at most MAX_LOGITS logits."""
        B, T = inputs.shape
        places = torch.arange(1, T + 1, device=scored.device)
        lengths = (scored * places).amax(1).tolist() if T else [0] * B
        parts: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            parts.setdefault(length, []).append(row)
        dtype = torch.promote_types(self._dtype, torch.float32)
        whole = TokenStats(*(
            torch.zeros(B, T, dtype=torch.bool if name == "is_greedy" else dtype, device=self.device)
            for name in TokenStats._fields
        ))  # fmt: skip
        for length, rows in parts.items():
            size = max(1, MAX_LOGITS // max(1, length * self.vocab))
            for begin in range(0, len(rows) if length else 0, size):
                some = rows[begin : begin + size]
                logits = run(self.model, inputs[some, :length])[:, -length:]
                self._fill(whole, some, logits, targets[some, :length])
        return whole

    def _fill(self, whole: TokenStats, rows: list[int], logits: Tensor, targets: Tensor) -> None:
        size = max(1, MAX_LOGITS // 8 // logits.shape[-1])  # statistics hold several copies
        for row, own, wanted in zip(rows, logits, targets.to(logits.device), strict=True):
            for begin in range(0, len(wanted), size):
                part = own[begin : begin + size]
                part = part.to(torch.promote_types(part.dtype, torch.float32))
                stats = stats_of_logits(part, wanted[begin : begin + size], IGNORED)
                scored = wanted[begin : begin + size] != IGNORED
                for to, values in zip(whole, stats, strict=True):
                    assert to is not None
                    assert values is not None
                    values = torch.where(scored, values, torch.zeros_like(values))
                    to[row, begin : begin + len(part)] = values.to(to.device)

    def _probe(self) -> None:
        """Finds the vocabulary, what follows the head, and whether the model is causal."""
        T = min(8, self.positions or 8)
        tokens = (torch.arange(T, device=self.device) * 7919 + 3) % self._embeddings
        other = tokens.clone()
        other[(T + 1) // 2 :] = (other[(T + 1) // 2 :] + 1) % self._embeddings
        inputs = torch.stack([tokens, other])
        logits = run(self.model, inputs)[:, -T:]
        self.vocab, self._dtype = logits.shape[-1], logits.dtype
        same = (T + 1) // 2
        size = float(logits[:, :same].float().abs().amax())
        moved = float((logits[0, :same] - logits[1, :same]).float().abs().amax())
        if moved > size * (1e-3 if logits.dtype in (torch.float32, torch.float64) else 0.05):
            raise ValueError(
                f"{self.name} is not causal: its logits change by {moved:.2g} with a later token; "
                "give a causal language model (for a BERT, one with is_decoder=True)"
            )
        self._head, reason = probed(self.model, self._module, inputs)
        if self._head is None:
            self._fall_back(reason)

    def _prove(self, inputs: Tensor, targets: Tensor, scored: Tensor, bits: Tensor) -> None:
        """Falls back to logits where a sample of the batch differs from the model's own logits."""
        lengths = (scored * torch.arange(1, scored.shape[1] + 1, device=scored.device)).amax(1)
        lengths = torch.where(lengths > 0, lengths, scored.shape[1] + 1)
        row = int(lengths.argmin())  # the sequence with the most padding
        first = int(scored[row].nonzero()[0])
        length = min(int(lengths[row]), first + SAMPLE)
        wanted = targets[row, first:length]
        kept = scored[row, first:length]
        exact = self._dtype in (torch.float32, torch.float64)

        def product(hidden: Tensor, output: Tensor) -> Tensor:
            return output if exact else head_in_float32(self._module, hidden)

        with hooked(self._module, product) as taken:
            logits = run(self.model, inputs[row : row + 1, :length])
        if len(taken) != 1:
            return self._fall_back(f"its head is called {len(taken)} times as a module in one pass")
        hidden = taken[0].reshape(-1, taken[0].shape[-1])[first - length :]
        log_p = torch.log_softmax(logits[0, first - length :].double(), -1)
        judge = -log_p.gather(-1, wanted.clamp(min=0)[:, None].to(log_p.device))[:, 0] / math.log(2)
        ours = self._stats(hidden, wanted.to(hidden.device), {}).bits
        for what, found, bound in (
            ("its hidden states and its head", ours, TOLERANCE),
            # In half precision another batch shape rounds otherwise.
            ("padding", bits[row, first:length], TOLERANCE if exact else math.inf),
        ):
            differ = (found.double().to(judge.device) - judge)[kept.to(judge.device)].abs()
            worst = float(differ.amax())
            if not worst <= bound and not (judge[kept.to(judge.device)].isnan().any()):
                return self._fall_back(
                    f"bits by {what} differ from those of its own logits by {worst:.2g}"
                )
        self._proved = True

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
                "documents into windows (fastmem.models.causal.windows)"
            )
        if inputs.numel() == 0:
            return
        for tokens, limit, what in (
            (inputs, self._embeddings, "embeddings"),
            (targets[targets != IGNORED], self.vocab, "logits"),
        ):
            least, most = (int(x) for x in tokens.aminmax()) if tokens.numel() else (0, 0)
            if least < 0 or most >= limit:
                raise ValueError(
                    f"token {least if least < 0 else most} is outside of the {limit} {what} of "
                    f"{self.name}: use the tokenizer that belongs to the model"
                )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _placed(values: Tensor | None, scored: Tensor) -> Tensor | None:
    """Values of the scored rows (N,) in a tensor (B, T) that is zero elsewhere."""
    if values is None:
        return None
    if values.numel() == scored.numel():
        return values.view(scored.shape).to(scored.device)
    whole = torch.zeros(scored.shape, dtype=values.dtype, device=scored.device)
    whole[scored] = values.to(scored.device)
    return whole


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel or DistributedDataParallel."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"a model must be a torch.nn.Module, not {type(model).__name__}: load it with "
            "fastmem.models.causal.load.load_model"
        )
    for wrapped in ("_orig_mod", "module"):
        inner = getattr(model, wrapped, None)
        if isinstance(inner, nn.Module) and not hasattr(model, "get_output_embeddings"):
            return _unwrapped(inner)
    inner = vars(model).get("_orig_mod") or model._modules.get("_orig_mod")
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def _checked_head(model: nn.Module) -> nn.Module:
    """The head of a model; ValueError if the model is not a causal language model with numbers."""
    name, config = type(model).__name__, getattr(model, "config", None)
    fix = "give a causal language model, as AutoModelForCausalLM loads it"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder, which codes a target and not a text: {fix}"
        )
    base = getattr(model, "get_base_model", lambda: model)()
    if "MaskedLM" in type(base).__name__:
        raise ValueError(f"{name} is a masked model, which has no code length of a text: {fix}")
    offloaded = getattr(model, "hf_device_map", None)
    if any(p.is_meta for p in model.parameters()) and not offloaded:
        raise ValueError(
            f"{name} is on meta, which holds no numbers: load its weights, with device='cpu'"
        )
    if isinstance(model, GPT):
        return model.token_embedding
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise ValueError(f"{name} has no head (get_output_embeddings() is {head}): {fix}")
    return head


def _embeddings(model: nn.Module, head: nn.Module) -> int:
    """The number of tokens that the model can read."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        return int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])
    except (AttributeError, NotImplementedError):
        return int(head.weight.shape[0])  # type: ignore[union-attr,arg-type]


def _device(model: nn.Module) -> torch.device:
    """Where the model takes its tokens."""
    try:
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        device = next(model.parameters()).device
    if device.type == "meta":  # offloaded: accelerate moves the tokens
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    return torch.device(device)


def _positions(model: nn.Module) -> int | None:
    """The most tokens of one pass that the configuration names; None if it names none."""
    if isinstance(model, GPT):
        return model.config.length
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    for name in ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and 0 < value < 1 << 31:
            peft = getattr(model, "active_peft_config", None)
            return value - (getattr(peft, "num_virtual_tokens", None) or 0)
    return None
