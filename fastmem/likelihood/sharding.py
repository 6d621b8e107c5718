"""How DTensor may divide the operators' arguments: by rows, or not at all.

Public functions send no DTensor to the operators; graphs and torch.ops do. A divided vocabulary is
not an operator's business (vocabulary.py): its weight is gathered here.
"""

from typing import Any, NamedTuple

from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from fastmem.likelihood.operators import BACKWARD, BITS, STATS

Placements = list[Placement | None]
Ways = list[tuple[Placements, Placements]]


class _Way(NamedTuple):
    """Placements of all tensors, for one way to divide the work. A gradient lies as its input, or
    is a sum."""

    problem: Placements  # hidden, weight, targets, bias
    row: Placement  # of results with an entry a row
    state: Placement
    gradients: tuple[Placement, Placement, Placement]

    def arguments(self) -> Placements:
        return [*self.problem, None, None, None, None]

    def made(self, wanted: list[bool]) -> Placements:
        """Of gradients; those that are not wanted are empty everywhere."""
        pairs = zip(self.gradients, wanted, strict=True)
        return [g if want else Replicate() for g, want in pairs]


def _ways(hidden: Any, targets: Any, bias: Any) -> list[_Way]:
    def bias_is(placement: Placement) -> Placement | None:
        return None if bias is None else placement

    same, rows = Replicate(), Shard(hidden.ndim - 2)
    return [
        _Way([same, same, same, bias_is(same)], same, same, (same, same, same)),
        _Way(
            [rows, same, Shard(targets.ndim - 1), bias_is(same)],
            rows,
            Shard(2),
            (rows, Partial(), Partial()),
        ),
    ]


@register_sharding(BITS)  # type: ignore[untyped-decorator]
def _bits(hidden: Any, weight: Any, targets: Any, bias: Any, *settings_and_ahead: Any) -> Ways:
    ahead = settings_and_ahead[-1]
    return [
        ([way.row, way.state, *way.made(ahead)], way.arguments())
        for way in _ways(hidden, targets, bias)
    ]


@register_sharding(BACKWARD)  # type: ignore[untyped-decorator]
def _backward(upstream: Any, state: Any, *rest: Any) -> Ways:
    ahead, (hidden, _, targets, bias), needs = rest[:3], rest[3:7], rest[-1]
    made = [grad.shape.numel() > 0 for grad in ahead]
    return [
        (way.made(needs), [way.row, way.state, *way.made(made), *way.arguments()])
        for way in _ways(hidden, targets, bias)
    ]


@register_sharding(STATS)  # type: ignore[untyped-decorator]
def _stats(hidden: Any, weight: Any, targets: Any, bias: Any, *settings_and_wanted: Any) -> Ways:
    wanted = settings_and_wanted[-1]
    return [
        ([way.row, *(way.row if want else Replicate() for want in wanted)], way.arguments())
        for way in _ways(hidden, targets, bias)
    ]
