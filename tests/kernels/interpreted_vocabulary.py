"""A vocabulary divided over ranks on the Triton kernels. Threads, one at a time, are the ranks."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases.triton_interpreted import DEVICE, LIMIT
from fastmem.kernels import reference
from torch import Tensor

from fastmem.likelihood import backends, vocabulary
from fastmem.likelihood.problem import Problem, Saved

SIZES = [140, 0, 65]


class Ranks:
    """Runs a function on each rank; `reduce` stands for all-reduce."""

    def __init__(self, count: int) -> None:
        self.running, self.barrier = threading.Lock(), threading.Barrier(count, timeout=60)
        self.given: dict[int, list[Tensor]] = {}  # by the number of the reduction
        self.own = threading.local()

    def reduce(self, x: Tensor, part: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
        self.own.number = getattr(self.own, "number", 0) + 1
        given = self.given.setdefault(self.own.number, [])
        given.append(x)
        self.running.release()
        self.barrier.wait()
        self.running.acquire()
        stacked = torch.stack(given)
        if op == dist.ReduceOp.SUM:
            return stacked.sum(0)
        return stacked.amax(0) if op == dist.ReduceOp.MAX else stacked.amin(0)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        found: dict[int, Any] = {}

        def rank(r: int) -> None:
            torch.set_default_device(DEVICE)
            with self.running:
                found[r] = function(r)

        threads = [threading.Thread(target=rank, args=(r,)) for r in range(len(SIZES))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[r] for r in range(len(SIZES))]


def walk_on_triton(*arguments: Any) -> Any:
    return backends.cuda_walk(Problem(*arguments[:7]), arguments[7])


def on_triton(upstream: Tensor, state: Tensor, *rest: Any) -> Any:
    saved, problem = Saved(state, *rest[:3]), Problem(*rest[3:10])
    return backends.cuda_backward(upstream, saved, problem, rest[10])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "D"), [(torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 272)]
)
def test_a_divided_vocabulary(
    dtype: torch.dtype, D: int, bias: bool, softcap: float | None, monkeypatch: Any
) -> None:
    """Fails if the kernels' state, with the log-sum-exp of all ranks added, gives another p, or
    rows that fill a tile count."""
    torch.manual_seed(0)
    N, V = 19, sum(SIZES)
    hidden = (torch.randn(N, D) * 4 / D**0.5).to(dtype)
    weight, targets = torch.randn(V, D).to(dtype), torch.randint(V, (N,))
    targets[3], targets[5], upstream = -100, V, torch.randn(N)
    b = torch.randn(V) + 3 if bias else None
    settings = (softcap, 0.7, -100)
    exact = [None if x is None else x.double().requires_grad_() for x in (hidden, weight, b)]
    right = reference.token_bits(exact[0], exact[1], targets, exact[2], *settings)
    counted = ~right.isnan()
    right[counted].backward(upstream[counted].double())
    stats = reference.token_stats(exact[0], exact[1], targets, exact[2], *settings)

    ranks = Ranks(len(SIZES))
    monkeypatch.setattr(vocabulary, "CORE", set())
    monkeypatch.setattr(vocabulary, "_reduce", ranks.reduce)
    monkeypatch.setattr(vocabulary.operators, "WALK", walk_on_triton)
    monkeypatch.setattr(vocabulary.operators, "BACKWARD", on_triton)

    def rank(r: int) -> Any:
        first = sum(SIZES[:r])
        own = slice(first, first + SIZES[r])
        leaves = [hidden.clone(), weight[own].clone(), None if b is None else b[own].clone()]
        leaves = [None if x is None else x.requires_grad_() for x in leaves]
        problem = Problem(leaves[0], leaves[1], targets, leaves[2], *settings)
        part = vocabulary.part_of(problem, first, V, [])
        bits = vocabulary.token_bits(part)
        bits.backward(upstream)
        return bits.detach(), leaves, vocabulary.token_stats(part, [True] * 5)

    found = ranks.run(rank)
    grads = [sum(leaves[0].grad.double() for _, leaves, _ in found)]
    grads += [torch.cat([leaves[1].grad for _, leaves, _ in found])]
    if b is not None:
        grads += [torch.cat([leaves[2].grad for _, leaves, _ in found])]
    for bits, _, moments in found:
        torch.testing.assert_close(
            bits.double(), right.detach(), atol=LIMIT, rtol=0, equal_nan=True
        )
        assert torch.equal(moments.is_greedy, stats.is_greedy)
        for x, y in zip(moments, stats, strict=True):
            if x.dtype != torch.bool:
                torch.testing.assert_close(
                    x.double(), y.detach(), atol=LIMIT, rtol=1e-4, equal_nan=True
                )
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    for x, y in zip(grads, [x.grad for x in exact if x is not None], strict=True):
        assert (x - y).abs().amax() <= limit * y.abs().amax()
