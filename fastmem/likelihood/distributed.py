"""token_bits, token_stats and linear_cross_entropy of DTensors; imported when the first one is met.

What hidden says of a dimension of the mesh decides what that dimension divides:

    hidden is Shard of an axis of rows:            rows; weight is gathered along it, once
    hidden is Replicate and weight is Shard(0):    the vocabulary (vocabulary.py)
    else:                                          nothing: each rank computes the same

Everything else is redistributed to fit. DTensor's autograd then moves the gradients: those of a
gathered weight are sums over ranks, scattered again where weight was Shard.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fastmem.kernels.reference import TokenStats
from fastmem.likelihood import local, reduced, sharding as sharding, vocabulary
from fastmem.likelihood.checks import check_targets
from fastmem.likelihood.problem import Problem


class Spread(NamedTuple):
    """A problem on a mesh: this rank's tensors, and where they lie."""

    rank: Problem
    tokens: int  # V of all ranks
    mesh: DeviceMesh | None  # None: hidden is a plain tensor, the rank's own rows, as all results
    rows: tuple[Placement, ...]  # of hidden
    divided: tuple[int, ...]  # dimensions of the mesh that divide the vocabulary
    shape: torch.Size  # of the rows of all ranks

    def part(self) -> vocabulary.Part:
        """The rank's part of a divided vocabulary, with flat rows."""
        assert self.mesh is not None
        first, count = 0, self.tokens
        for dim in self.divided:  # as Shard divides: ceil, then what is left
            step = -(-count // self.mesh.size(dim))
            skipped = min(count, step * self.mesh.get_local_rank(dim))
            first, count = first + skipped, min(step, count - skipped)
        groups = [self.mesh.get_group(dim) for dim in self.divided]
        return vocabulary.part_of(local.prepared(self.rank), first, self.tokens, groups)

    def bits(self) -> Tensor:
        """The bits of this rank's rows."""
        if not self.divided:
            return local.token_bits(self.rank)
        return vocabulary.token_bits(self.part()).view(self.rank.hidden.shape[:-1])

    def whole(self, x: Tensor) -> Tensor:
        """The DTensor of all rows from those of this rank."""
        if self.mesh is None:
            return x
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            x, self.mesh, self.rows, run_check=False, shape=self.shape, stride=stride
        )

    def partial(self) -> list[Placement]:
        """Of a sum over this rank's rows."""
        return [Partial() if p.is_shard() else Replicate() for p in self.rows]

    def sum(self, x: Tensor) -> DTensor:  # () of this rank → () of all
        assert self.mesh is not None
        whole = DTensor.from_local(x, self.mesh, self.partial(), run_check=False)
        return whole.redistribute(placements=[Replicate()] * self.mesh.ndim)


def token_bits(problem: Problem, check: bool) -> Tensor:
    spread = spread_of(problem)
    if check:
        check_targets(spread.rank.targets, spread.tokens, problem.ignore_index)
    return spread.whole(spread.bits())


def token_stats(problem: Problem, wanted: list[bool], check: bool) -> TokenStats:
    """wanted: entropy, second moment, greedy, lse, variance."""
    spread = spread_of(problem)
    if check:
        check_targets(spread.rank.targets, spread.tokens, problem.ignore_index)
    if spread.divided:
        with torch.no_grad():
            found = vocabulary.token_stats(spread.part(), wanted)
    else:
        found = local.token_stats(spread.rank, wanted)
    shape = spread.rank.hidden.shape[:-1]
    return TokenStats._make(None if x is None else spread.whole(x.view(shape)) for x in found)


def cross_entropy(
    problem: Problem, weight: Tensor | None, token_weight: Tensor | None, reduction: str
) -> Tensor:
    spread = spread_of(problem)
    rank, mesh = spread.rank, spread.mesh
    if mesh is None:
        return reduced.cross_entropy(rank, weight, token_weight, reduction)
    if weight is not None:
        weight = _local(weight, mesh, [Replicate()] * mesh.ndim, spread.partial())
    if token_weight is not None:
        token_weight = _local(token_weight, mesh, spread.rows, spread.rows)
    ignored, factor = reduced.factors(rank.targets, rank.ignore_index, weight, token_weight)
    if spread.divided:
        nats = spread.bits() * math.log(2)
        nats = nats if factor is None else nats * factor.to(nats.dtype)
        nats = nats if reduction == "none" else nats.sum()
    else:
        one = "none" if reduction == "none" else "sum"
        nats = reduced.cross_entropy(rank, weight, token_weight, one)
    if reduction == "none":
        return spread.whole(nats)
    total = spread.sum(nats)
    return total if reduction == "sum" else total / spread.sum(reduced.count(factor, ignored))


def spread_of(problem: Problem) -> Spread:
    """This rank's tensors of a checked problem: weight and its gradient are gathered or divided.

    Raises:
        ValueError: tensors on different meshes, models side by side, plain hidden states with
            targets that are not.
    """
    hidden, weight, targets, bias, *settings = problem
    if weight.ndim > 2:
        raise ValueError(
            f"weight is {tuple(weight.shape)}: with DTensors pass one model at a time, (V, D)"
        )
    mesh, V = _mesh(problem), len(weight)
    everywhere: list[Placement] = [Replicate()] * mesh.ndim
    if not isinstance(hidden, DTensor):
        if isinstance(targets, DTensor):
            raise ValueError(
                f"targets is a DTensor, {targets.placements}, hidden a plain tensor, the rows of "
                "this rank: pass their targets, targets.to_local(), or a DTensor for hidden"
            )
        added: list[Placement] = [Partial()] * mesh.ndim  # every rank has other rows
        weight = _local(weight, mesh, everywhere, added)
        bias = _local(bias, mesh, everywhere, added) if isinstance(bias, DTensor) else bias
        rank = Problem(hidden, weight, targets, bias, *settings)  # type: ignore[arg-type]
        return Spread(rank, V, None, (), (), hidden.shape[:-1])
    rows = tuple(_rows_of(p, hidden.ndim) for p in hidden.placements)
    divided = _divided(problem, rows)

    def placed(on_rows: Placement, divides: Placement) -> list[Placement]:
        return [
            on_rows if p.is_shard() else divides if dim in divided else Replicate()
            for dim, p in enumerate(rows)
        ]

    matrix, gradient = placed(Replicate(), Shard(0)), placed(Partial(), Shard(0))
    missing = hidden.ndim - 1 - targets.ndim  # leading axes that share the targets
    of_targets = [
        Shard(p.dim - missing) if isinstance(p, Shard) and p.dim >= missing else Replicate()
        for p in rows
    ]
    rank = Problem(
        _local(hidden, mesh, rows, [Partial() if d in divided else p for d, p in enumerate(rows)]),
        _local(weight, mesh, matrix, gradient),
        _local(targets, mesh, of_targets, of_targets),
        None if bias is None else _local(bias, mesh, matrix, gradient),
        *settings,  # type: ignore[arg-type]
    )
    return Spread(rank, V, mesh, rows, divided, hidden.shape[:-1])


def _rows_of(placement: Placement, axes: int) -> Placement:
    """What hidden becomes: whole rows, divided as they are."""
    kept = type(placement) is Shard and placement.dim != axes - 1
    return placement if kept else Replicate()


def _divided(problem: Problem, rows: Sequence[Placement]) -> tuple[int, ...]:
    weight = problem.weight
    if not isinstance(weight, DTensor) or not local.is_fused(problem):
        return ()  # float64 and D = 0, which no kernel takes: weight is gathered
    return tuple(
        dim
        for dim, (row, own) in enumerate(zip(rows, weight.placements, strict=True))
        if row.is_replicate() and type(own) is Shard and own.dim == 0
    )


def _mesh(problem: Problem) -> DeviceMesh:
    named = dict(zip(("hidden", "weight", "targets", "bias"), problem[:4], strict=True))
    meshes = {name: x.device_mesh for name, x in named.items() if isinstance(x, DTensor)}
    (first, mesh), *others = meshes.items()
    for name, other in others:
        if other != mesh:
            raise ValueError(
                f"{first} is on {mesh}, {name} on {other}: distribute both over one mesh"
            )
    return mesh


def _local(
    x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], gradient: Sequence[Placement]
) -> Tensor:
    """This rank's part of a tensor; every rank holds the whole of a plain one."""
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return x.redistribute(placements=placements).to_local(grad_placements=gradient)
