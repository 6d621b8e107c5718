"""The peer: transformers' GPT-2 in a plain loop with torch's AdamW.

`Peer` starts from the weights of a fastmem.GPT and converts back to one, so that both are judged by
the same scores. Its dropout is 0, and it does not cache keys and values.

B batch, S tokens a sequence, N sequences.
"""

import math
import tempfile

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import fastmem

# Each load and save would draw a progress bar.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


class Peer:
    """A GPT2LMHeadModel, its optimizer, and a usual training step.

    The eager peer computes the loss from labels. The compiled peer has one graph for the logits of
    the S - 1 inputs and their cross-entropy, and the fused AdamW. Its loss is in nats and ours in
    bits, so its gradient is clipped at ln 2 times our norm.
    """

    def __init__(
        self,
        model: fastmem.GPT,
        compiled: bool = False,
        precision: str = "fp32",
        config: fastmem.TrainConfig | None = None,
    ) -> None:
        config = config or fastmem.TrainConfig()
        with tempfile.TemporaryDirectory() as folder:
            model.to_hf(folder)
            self.model = transformers.GPT2LMHeadModel.from_pretrained(folder)
        self.model.config.use_cache = False
        self.model.to(model.device).train()
        self.clip, self.mixed = config.clip * math.log(2), precision == "bf16-mixed"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=compiled or None,
        )
        self._loss, self._bits = self._eager_loss, self._plain_bits
        if compiled:
            self._loss = torch.compile(self._plain_loss, dynamic=False)
            self._bits = torch.compile(self._plain_bits, dynamic=False)

    def loss(self, tokens: Tensor) -> Tensor:  # (B, S) → ()
        """Mean cross-entropy of the tokens after the first, in nats."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.mixed):
            return self._loss(tokens)

    def step(self, tokens: Tensor, rate: float) -> None:  # (B, S)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        self.loss(tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()

    @torch.no_grad()
    def bits(self, tokens: Tensor, batch: int = 128) -> Tensor:  # (N, S) → (N,) float64
        """The code length of each sequence, as fastmem.sequence_bits."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.mixed):
            return torch.cat([self._bits(part) for part in tokens.split(batch)])

    def to_ours(self) -> fastmem.GPT:
        """A fastmem.GPT with the same weights."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return fastmem.GPT.from_hf(folder, self.model.device)

    def gradients(self, tokens: Tensor) -> list[Tensor]:  # (B, S)
        """Gradients of the loss, in the order and layout of the parameters of fastmem.GPT."""
        weights = [p.detach().clone() for p in self.model.parameters()]
        self.model.zero_grad()
        self.loss(tokens).backward()
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(p.grad)
            ours = self.to_ours()
            for p, weight in zip(self.model.parameters(), weights, strict=True):
                p.copy_(weight)
        return [p.detach() for p in ours.parameters()]

    def _eager_loss(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens).loss

    def _plain_loss(self, tokens: Tensor) -> Tensor:
        logits = self.model(input_ids=tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def _plain_bits(self, tokens: Tensor) -> Tensor:
        logits = self.model(input_ids=tokens[:, :-1]).logits
        targets = tokens[:, 1:]
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return nats.view(targets.shape).double().sum(-1) / math.log(2)
