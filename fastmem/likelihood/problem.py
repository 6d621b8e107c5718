"""The arguments that the operators and their backends share."""

from typing import NamedTuple

from torch import Tensor

Tensors = tuple[Tensor, ...]


class Problem(NamedTuple):
    """Inputs and settings in the order of the schemas. N rows, D width, V vocabulary, E models."""

    hidden: Tensor  # (N, D) or (E, N, D)
    weight: Tensor  # (V, D) or (E, V, D)
    targets: Tensor  # (N,) or (E, N) integers
    bias: Tensor | None  # (V,) or (E, V)
    softcap: float | None
    temperature: float
    ignore_index: int

    @property
    def differentiable(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The inputs that have gradients."""
        return self.hidden, self.weight, self.bias
