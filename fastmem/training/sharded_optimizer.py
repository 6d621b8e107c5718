"""AdamW of one sharded model: each rank updates its part of each parameter."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmem.base import ranks
from fastmem.data.uniform import UniformSequences
from fastmem.models.gpt import GPT
from fastmem.models.sharded import locals_of
from fastmem.training.config import TrainConfig
from fastmem.training.optimizer import State, rounded_by

_ROUNDED = 1 << 22
"""Weights that are rounded at a time: each takes 8 bytes of noise."""


class ShardedAdamW:
    """`RowAdamW` of one row on all ranks: the norm that is clipped is that of the whole gradient.

    Stochastic rounding of a weight draws from (seed, step, parameter, index), so the weights do not
    depend on the number of ranks.

    Args:
        model: a sharded GPT; parameters that are not trained stay as they are.
        state: `state` of an earlier optimizer, or None.
    """

    def __init__(self, model: GPT, config: TrainConfig, state: State | None) -> None:
        self._config = config
        trained = [(n, p, own) for n, p, own in locals_of(model) if p.requires_grad]
        self._names = [name for name, _, _ in trained]
        self._parameters = [parameter for _, parameter, _ in trained]
        self._locals = [own.detach() for _, _, own in trained]
        self._rounds = config.precision == "bf16-stochastic"
        self._master = [x.float() for x in self._locals] if self._rounds else self._locals
        groups = []
        for embeddings in (True, False):
            chosen = [
                x
                for name, x in zip(self._names, self._master, strict=True)
                if ("embedding" in name) == embeddings
            ]
            betas = config.beta1, config.beta2
            groups.append({"params": chosen, "betas": betas, "weight_decay": config.weight_decay})
        self._adamw = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
        self._factors = [
            config.embedding_factor if embeddings else 1.0
            for embeddings, group in zip((True, False), groups, strict=True)
            if group["params"]
        ]
        for name, x in zip(self._names, self._master, strict=True):
            if state is not None:
                moments = state["parts"][name]
                # The fused kernel reads the step where the weights are.
                self._adamw.state[x] = moments | {"step": moments["step"].to(x.device)}

    def state(self, e: int = 0) -> State:
        """The moments of this rank's part of each parameter, not copied."""
        named = zip(self._names, self._master, strict=True)
        return {"parts": {name: self._adamw.state[x] for name, x in named}}

    def step(self, rates: Sequence[float]) -> None:
        """One step at a learning rate."""
        self.set_rates(rates)
        self.update()

    def set_rates(self, rates: Sequence[float]) -> None:
        """Sets the learning rate."""
        for group, factor in zip(self._adamw.param_groups, self._factors, strict=True):
            group["lr"] = factor * rates[0]

    @torch.no_grad()
    def update(self) -> None:
        """One step."""
        gradients = [self._gradient(p) for p in self._parameters]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        squares = torch.stack(norms).square().sum()
        torch.distributed.all_reduce(squares)
        scale = (self._config.clip / (squares.sqrt() + 1e-6)).clamp_(max=1)
        torch._foreach_mul_(gradients, scale)
        for x, own, gradient in zip(self._master, self._locals, gradients, strict=True):
            x.grad = gradient
            if self._rounds:
                x.copy_(own)
        self._adamw.step()
        if self._rounds:
            self._round()
        for parameter, x in zip(self._parameters, self._master, strict=True):
            parameter.grad = x.grad = None

    def _gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        gradient: Tensor = parameter.grad.to_local()  # type: ignore[attr-defined]
        return gradient.float() if self._rounds else gradient

    def _round(self) -> None:
        for name, parameter, own, x in zip(
            self._names, self._parameters, self._locals, self._master, strict=True
        ):
            if own.numel():
                self._round_one(name, parameter, own.view(len(own), -1), x.view(len(own), -1))

    def _round_one(self, name: str, parameter: Tensor, own: Tensor, x: Tensor) -> None:
        """Rounds updated float32 weights to one of the two nearest bfloat16 numbers."""
        rows, columns = own.shape
        noise = self._noise(name, len(parameter), columns)
        for start in range(0, rows, size := max(1, _ROUNDED // columns)):
            part = slice(start, min(start + size, rows))
            own[part].copy_(rounded_by(x[part], noise(part, x.device).to(torch.int32)))

    def _noise(self, name: str, rows: int, columns: int) -> Callable[[slice, torch.device], Tensor]:
        """Gives the noise of some of this rank's rows of a parameter."""
        # The rows of a parameter are split like torch.chunk splits them.
        first = ranks.current().rank * -(-rows // ranks.current().size)
        step = int(self._adamw.state[self._master[self._names.index(name)]]["step"])
        text = f"{self._config.seed}/{step}/{name}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8])
        noise = UniformSequences(rows, columns, 1 << 16, seed)
        return lambda part, device: noise.to_torch(
            device, slice(first + part.start, first + part.stop)
        )
