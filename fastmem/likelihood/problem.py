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


class Saved(NamedTuple):
    """What the backward pass gets of the forward pass, in the order of the schemas."""

    state: Tensor
    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor

    @property
    def ahead(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients that the forward pass made; empty where it made none."""
        return self.dhidden, self.dweight, self.dbias
