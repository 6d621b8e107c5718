"""AdamW for E models, each with its own learning rate, moments and gradient clipping.

E models, P parameters each.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmem.training.config import TrainConfig

State = dict[str, Any]
"""Optimizer state of one model."""


class RowAdamW:
    """torch.optim.AdamW on each row of `parameters` (E, P), by its row of `gradients` (E, P).

    Moments have the dtype of the weights. With stochastic rounding the weights are bfloat16 and
    everything else is float32: AdamW updates a float32 copy of the weights, and each value is
    rounded to one of the two nearest bfloat16 numbers, with the probabilities that keep the mean.
    So updates below half a unit in the last place are not lost.

    Args:
        configs: config of each row; all with stochastic rounding or none.
        states: `state` of each row of an earlier optimizer, or None for a new row.
        schedules: rows with equal schedules always have the same rate, betas and decay, and are
            updated in one call.
        embeddings: number of embedding weights, the first of each row, with their own rate.
        trained: (begin, end) of each range of a row that is trained, by default the whole row. The
            rest stays as it is, and does not count in the norm that is clipped.
        capturable: keeps rates on the device, so that each replay of a CUDA graph of `update`
            reads the current rates.

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
        trained: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self._parameters, self._gradients = parameters, gradients
        self._master, self._master_gradients = parameters, gradients
        self._generators: list[torch.Generator] = []
        if configs[0].precision == "bf16-stochastic":
            self._master, self._master_gradients = parameters.float(), gradients.float()
            for config, state in zip(configs, states, strict=True):
                self._generators.append(_generator(parameters.device, config.seed, state))
        self._clips = torch.tensor([c.clip for c in configs], device=parameters.device)
        P = parameters.shape[1]
        trained = [(0, P)] if trained is None else trained
        spans = spans_of(P, embeddings, trained)
        ends = [0, *(end for span in trained for end in span), P]
        frozen = zip(ends[::2], ends[1::2], strict=True)
        self._frozen = [self._master_gradients[:, a:b] for a, b in frozen if a < b]
        self._parts = [[row[a:b] for a, b in spans] for row in self._master]
        for parts, row in zip(self._parts, self._master_gradients, strict=True):
            for part, (a, b) in zip(parts, spans, strict=True):
                part.grad = row[a:b]
        together: dict[Hashable, list[int]] = {}
        for e, schedule in enumerate(schedules or range(len(configs))):
            together.setdefault(schedule, []).append(e)
        self._firsts: list[tuple[int, float]] = []
        groups = []
        for rows in together.values():
            config = configs[rows[0]]
            for part in range(len(spans)):
                self._firsts.append((rows[0], 1.0 if part % 2 else config.embedding_factor))
                params, betas = [self._parts[e][part] for e in rows], (config.beta1, config.beta2)
                decay = config.weight_decay
                groups.append({"params": params, "betas": betas, "weight_decay": decay})
        self._rates: Tensor | None = None
        if capturable:
            self._rates = torch.zeros(len(groups), dtype=torch.float32, device=parameters.device)
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
        self._adamw = torch.optim.AdamW(
            groups, fused=parameters.device.type in ("cpu", "cuda"), capturable=capturable
        )
        for parts, state in zip(self._parts, states, strict=True):
            for part, part_state in zip(parts, state["parts"] if state else (), strict=False):
                self._adamw.state[part] = part_state

    def state(self, e: int) -> State:
        """The state of row e, not copied, for another optimizer to continue."""
        state: State = {"parts": [dict(self._adamw.state[part]) for part in self._parts[e]]}
        if self._generators:
            state["rounding"] = self._generators[e].get_state()
        return state

    def step(self, rates: Sequence[float]) -> None:
        """One step of each row at its learning rate, without waiting for a GPU."""
        self.set_rates(rates)
        self.update()

    def set_rates(self, rates: Sequence[float]) -> None:
        """Sets the learning rate of each row."""
        group_rates = [factor * rates[first] for first, factor in self._firsts]
        if self._rates is not None:
            self._rates.copy_(torch.tensor(group_rates), non_blocking=True)
            return
        for group, rate in zip(self._adamw.param_groups, group_rates, strict=True):
            group["lr"] = rate

    @torch.no_grad()
    def update(self) -> None:
        """One step of each row."""
        if self._generators:
            self._master.copy_(self._parameters)
            self._master_gradients.copy_(self._gradients)
        for gradients in self._frozen:
            gradients.zero_()
        norms = torch.linalg.vector_norm(self._master_gradients, dim=1)
        self._master_gradients.mul_((self._clips / (norms + 1e-6)).clamp_(max=1)[:, None])
        self._adamw.step()
        for e, generator in enumerate(self._generators):
            self._parameters[e].copy_(stochastically_rounded(self._master[e], generator))


def spans_of(
    P: int, embeddings: int, trained: Sequence[tuple[int, int]] | None
) -> list[tuple[int, int]]:
    """(begin, end) of each part of a row with one rate, some empty: embeddings, rest, in turn."""
    return [
        (a, max(a, b))
        for begin, end in ([(0, P)] if trained is None else trained)
        for a, b in ((begin, min(end, embeddings)), (max(begin, embeddings), end))
    ]


def stochastically_rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds float32 to bfloat16, up or down with the probabilities that keep the mean.

    Values that bfloat16 represents, and values that are not finite, stay as they are.

    >>> x = torch.full((10000,), 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
    >>> rounded = stochastically_rounded(x, torch.Generator().manual_seed(0))
    >>> sorted(set(rounded.tolist())), bool(abs(rounded.mean(dtype=torch.float32) - x[0]) < 1e-4)
    ([1.0, 1.0078125], True)
    """
    noise = torch.randint(1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return rounded_by(x, noise)


def rounded_by(x: Tensor, noise: Tensor) -> Tensor:
    """`stochastically_rounded` by given noise: int32, uniform from 0 to 65535."""
    # bfloat16 is the upper half of a float32; noise plus the lower half carries, or does not.
    rounded = ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    # The addition would turn some NaN into numbers and hide a divergence.
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def _generator(device: torch.device, seed: int, state: State | None) -> torch.Generator:
    generator = torch.Generator(device).manual_seed(seed)
    if state is not None:
        before = state["rounding"].cpu()
        # A CPU cannot continue the generator of a GPU, nor a GPU that of a CPU.
        if before.numel() == generator.get_state().numel():
            generator.set_state(before)
    return generator
