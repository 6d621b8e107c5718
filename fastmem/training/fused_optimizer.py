"""AdamW of E models by the Triton kernels of kernels/adamw.py on a GPU, else by PyTorch.

E models, P parameters each.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from fastmem.models.attention import DEVICES
from fastmem.training.config import TrainConfig
from fastmem.training.optimizer import RowAdamW, State, spans_of


def make_optimizer(
    parameters: Tensor,
    gradients: Tensor,
    configs: Sequence[TrainConfig],
    states: Sequence[State | None],
    schedules: Sequence[Hashable] | None = None,
    embeddings: int = 0,
    capturable: bool = False,
    trained: Sequence[tuple[int, int]] | None = None,
) -> "RowAdamW | FusedAdamW":
    """The fastest optimizer for the rows of `parameters`, with the arguments of `RowAdamW`."""
    if is_fused(parameters.device) and parameters.dtype in (torch.float32, torch.bfloat16):
        return FusedAdamW(parameters, gradients, configs, states, embeddings, trained)
    return RowAdamW(
        parameters, gradients, configs, states, schedules, embeddings, capturable, trained
    )


def is_fused(device: torch.device) -> bool:
    """True if the kernels update float32 and bfloat16 weights on the device."""
    return device.type in DEVICES


class FusedAdamW:
    """`RowAdamW` in two launches for all rows, always fit for a CUDA graph.

    Stochastic rounding draws from (seed of the run, step, index of the weight), so nothing of it is
    saved or restored; `state` has an unused generator for `RowAdamW` to continue with.

    Args:
        parameters, gradients, configs, states, embeddings, trained: as of `RowAdamW`.
    """

    def __init__(
        self,
        parameters: Tensor,
        gradients: Tensor,
        configs: Sequence[TrainConfig],
        states: Sequence[State | None],
        embeddings: int = 0,
        trained: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        from fastmem.kernels import adamw

        (E, P), device = parameters.shape, parameters.device
        rounds = configs[0].precision == "bf16-stochastic"
        moments = torch.float32 if rounds else parameters.dtype
        means, squares = torch.zeros(2, E, P, dtype=moments, device=device)
        settings = [(c.beta1, c.beta2, c.weight_decay, c.clip, c.embedding_factor) for c in configs]
        self._spans = spans_of(P, embeddings, trained)
        self._seeds = [c.seed for c in configs] if rounds else []
        # The seed's 64 bits as a signed number.
        seeds = [seed - (seed >> 63 << 64) for seed in self._seeds]
        self._rows = adamw.Rows(
            parameters,
            gradients,
            means,
            squares,
            rates=torch.zeros(E, dtype=torch.float32, device=device),
            steps=torch.zeros(E, dtype=torch.float32, device=device),
            settings=torch.tensor(settings, dtype=torch.float64, device=device),
            embeddings=embeddings,
            seeds=torch.tensor(seeds, dtype=torch.int64, device=device) if rounds else None,
        )
        self._rows.trained = self._trained(P)
        for e, state in enumerate(states):
            for (a, b), part in zip(self._spans, state["parts"] if state else (), strict=False):
                if part:  # empty before the first step
                    self._rows.steps[e].copy_(part["step"])
                    means[e, a:b].copy_(part["exp_avg"])
                    squares[e, a:b].copy_(part["exp_avg_sq"])

    def state(self, e: int) -> State:
        """A copy of the state of row e, for another optimizer to continue."""
        rows = self._rows
        step, means, squares = rows.steps[e], rows.means[e], rows.squares[e]
        names = ("step", "exp_avg", "exp_avg_sq")
        parts = [(step, means[a:b], squares[a:b]) for a, b in self._spans]
        clones = [[x.clone() for x in part] for part in parts]
        state: State = {"parts": [dict(zip(names, part, strict=True)) for part in clones]}
        if self._seeds:
            generator = torch.Generator(rows.weights.device).manual_seed(self._seeds[e])
            state["rounding"] = generator.get_state()
        return state

    def step(self, rates: Sequence[float]) -> None:
        """One step of each row at its learning rate, without waiting for a GPU."""
        self.set_rates(rates)
        self.update()

    def set_rates(self, rates: Sequence[float]) -> None:
        """Sets the learning rate of each row."""
        self._rows.rates.copy_(torch.tensor(rates, dtype=torch.float32), non_blocking=True)

    def update(self) -> None:
        """One step of each row."""
        from fastmem.kernels import adamw

        adamw.update(self._rows)

    def _trained(self, P: int) -> Tensor | None:  # (P,)
        """Which weights of a row are trained; None for all."""
        if sum(b - a for a, b in self._spans) == P:
            return None
        mask = torch.zeros(P, dtype=torch.bool, device="cpu")
        for a, b in self._spans:
            mask[a:b] = True
        return mask.to(self._rows.weights.device)
