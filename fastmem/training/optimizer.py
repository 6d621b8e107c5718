"""The update of E models: AdamW, each with its own rate, moments and limit of the gradient.

E models, P parameters each.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmem.training.config import TrainConfig

State = dict[str, Any]
"""What the update of one model remembers."""


class RowOptimizer:
    """torch.optim.AdamW on the rows of `parameters` (E, P) by those of `gradients` (E, P).

    Moments have the type of the weights. With stochastic rounding the weights are bfloat16 and all
    else float32: AdamW updates a float32 copy of them, and each number of it is rounded to one of
    the two bfloat16 numbers beside it, to the nearer one more often, so that the mean is right and
    updates below half a unit in the last place are not lost.

    Args:
        configs: of each row; all with stochastic rounding or none.
        states: what `state` gave for each row, or None for one that begins.
        schedules: rows of equal ones always have the same rate, betas and decay, and are updated
            in one call.
        embeddings: so many numbers of each row come first and have a rate of their own.
        capturable: rates are kept on the device, so that a CUDA graph of `update` reads those of
            each replay.

    Source: AdamW of arXiv 1711.05101, stochastic rounding as in arXiv 2010.06192.
    """

    def __init__(
        self,
        parameters: Tensor,
        gradients: Tensor,
        configs: Sequence[TrainConfig],
        states: Sequence[State | None],
        schedules: Sequence[Hashable] | None = None,
        embeddings: int = 0,
        capturable: bool = False,
    ) -> None:
        self._parameters, self._gradients = parameters, gradients
        self._updated, self._by = parameters, gradients
        self._generators: list[torch.Generator] = []
        if configs[0].precision == "bf16-stochastic":
            self._updated, self._by = parameters.float(), gradients.float()
            for config, state in zip(configs, states, strict=True):
                self._generators.append(_generator(parameters.device, config.seed, state))
        self._clips = torch.tensor([c.clip for c in configs], device=parameters.device)
        sizes = [embeddings, parameters.shape[1] - embeddings]
        self._parts = [row.split(sizes) for row in self._updated]
        for parts, row in zip(self._parts, self._by, strict=True):
            for part, gradient in zip(parts, row.split(sizes), strict=True):
                part.grad = gradient
        together: dict[Hashable, list[int]] = {}
        for e, schedule in enumerate(schedules or range(len(configs))):
            together.setdefault(schedule, []).append(e)
        self._firsts: list[tuple[int, float]] = []
        groups = []
        for rows in together.values():
            config = configs[rows[0]]
            for part, times in enumerate((config.embedding_factor, 1.0)):
                self._firsts.append((rows[0], times))
                groups.append(
                    {
                        "params": [self._parts[e][part] for e in rows],
                        "betas": (config.beta1, config.beta2),
                        "weight_decay": config.weight_decay,
                    }
                )
        self._rates: Tensor | None = None
        if capturable:
            self._rates = torch.zeros(len(groups), dtype=torch.float32, device=parameters.device)
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
        self._adamw = torch.optim.AdamW(
            groups, fused=parameters.device.type in ("cpu", "cuda"), capturable=capturable
        )
        for parts, state in zip(self._parts, states, strict=True):
            for part, of_part in zip(parts, state["parts"] if state else (), strict=False):
                self._adamw.state[part] = of_part

    def state(self, e: int) -> State:
        """What the update of row e remembers, for another optimizer to go on with: no copy."""
        state: State = {"parts": [dict(self._adamw.state[part]) for part in self._parts[e]]}
        if self._generators:
            state["rounding"] = self._generators[e].get_state()
        return state

    def step(self, rates: Sequence[float]) -> None:
        """One step of each row at its learning rate; nothing in it waits for a GPU."""
        self.set_rates(rates)
        self.update()

    def set_rates(self, rates: Sequence[float]) -> None:
        """The learning rate of each row from now on."""
        of_groups = [times * rates[first] for first, times in self._firsts]
        if self._rates is not None:
            self._rates.copy_(torch.tensor(of_groups), non_blocking=True)
            return
        for group, rate in zip(self._adamw.param_groups, of_groups, strict=True):
            group["lr"] = rate

    @torch.no_grad()
    def update(self) -> None:
        """One step of each row."""
        if self._generators:
            self._updated.copy_(self._parameters)
            self._by.copy_(self._gradients)
        norms = torch.linalg.vector_norm(self._by, dim=1)
        self._by.mul_((self._clips / (norms + 1e-6)).clamp_(max=1)[:, None])
        self._adamw.step()
        for e, generator in enumerate(self._generators):
            self._parameters[e].copy_(stochastically_rounded(self._updated[e], generator))


def stochastically_rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 numbers as bfloat16, up or down with the probability that keeps the mean.

    Numbers that bfloat16 has, and those that are not finite, stay as they are.

    >>> x = torch.full((10000,), 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
    >>> rounded = stochastically_rounded(x, torch.Generator().manual_seed(0))
    >>> sorted(set(rounded.tolist())), bool(abs(rounded.mean(dtype=torch.float32) - x[0]) < 1e-4)
    ([1.0, 1.0078125], True)
    """
    # bfloat16 is the upper half of a float32; what lies below it decides with the noise.
    noise = torch.randint(1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    rounded = ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    # A sum would turn some NaN into a number and hide that the weights are lost.
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def _generator(device: torch.device, seed: int, state: State | None) -> torch.Generator:
    generator = torch.Generator(device).manual_seed(seed)
    if state is not None:
        generator.set_state(state["rounding"].cpu())
    return generator
