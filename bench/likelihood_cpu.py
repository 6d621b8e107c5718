"""token_bits on a CPU against PyTorch's alternatives, in one process, in float32.

    python -m pytest bench/likelihood_cpu.py --benchmark-only --benchmark-json=cpu.json

Each round times every peer and then token_bits, so that a busy machine slows all alike. Each runs
twice in a row: cold, with the caches as the previous run left them, and hot. Results are compared
first. The table at the end has medians in ms and the ratio of the fastest peer to token_bits;
extra_info of the JSON has the same and the floor: 2 · N · D · V floating point operations, once for
the forward pass and three times (logits, dhidden, dweight) for both passes, at the speed of
PyTorch's 1024 × 1024 matrix product. pytest-benchmark's own figures are of token_bits, cold.

N rows, D width, V vocabulary.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastmem

# The shapes with a speed goal, then shapes of training on a CPU: V = 128, and batches of 64 x 64.
SHAPES = [
    (8192, 32, 2048),
    (8192, 128, 2048),
    (4096, 256, 2048),
    (1024, 768, 50257),
    (4096, 32, 2048),
    (2048, 16, 128),
    (2048, 32, 128),
]
SECONDS = 9.0
"""For all rounds of a shape and pass, all peers together."""

table: list[str] = []


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


@functools.cache
def compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    # Loading the compiler warns, which a test can ignore, but not an import.
    return torch.compile(eager, dynamic=False)


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return fastmem.token_bits(hidden, weight, targets).mean() * math.log(2)


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "eager": eager,
    "torch.compile": lambda *args: compiled()(*args),
}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    PEERS["F.linear_cross_entropy"] = F.linear_cross_entropy


@pytest.fixture(scope="module", autouse=True)
def print_table() -> Iterator[None]:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    yield
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}, medians in ms")
    print("\n".join(table))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_token_bits(benchmark: Any, shape: tuple[int, int, int], backward: bool) -> None:
    n, d, v = shape
    torch.compiler.reset()  # after eight shapes it would run eagerly
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=draw)
    weight = torch.randn(v, d, generator=draw) / d**0.5
    targets = torch.randint(v, (n,), generator=draw)

    def run(f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor | None, ...]:
        h, w = (x.detach().requires_grad_(backward) for x in (hidden, weight))
        loss = f(h, w, targets)
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), h.grad, w.grad

    ours = run(fused)
    for peer in PEERS.values():
        for a, b in zip(ours, run(peer), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    cold: dict[str, list[float]] = {name: [] for name in PEERS}
    hot: dict[str, list[float]] = {name: [] for name in [*PEERS, "fastmem"]}

    def time_peers() -> None:
        hot["fastmem"].append(seconds(functools.partial(run, fused)))  # follows a cold run
        for name, peer in PEERS.items():
            for times in (cold, hot):
                times[name].append(seconds(functools.partial(run, peer)))

    start = time.perf_counter()
    time_peers()
    rounds = max(3, min(100, int(SECONDS / (time.perf_counter() - start))))
    for times in (cold, hot):
        times.update({name: [] for name in times})
    run(fused)
    benchmark.pedantic(run, (fused,), setup=time_peers, rounds=rounds)

    floor = 1e3 * (3 if backward else 1) * 2 * n * d * v / flops()
    results = {
        "cold": medians(cold) | {"fastmem": 1e3 * benchmark.stats.stats.median},
        "hot": medians(hot),
    }
    benchmark.extra_info.update(shape=shape, backward=backward, floor_ms=floor, **results)
    for caches, ms in results.items():
        ours, best = ms["fastmem"], min(ms[name] for name in PEERS)
        peers = ", ".join(f"{name} {ms[name]:.2f}" for name in PEERS)
        table.append(
            f"{n:5} x {d:3} x {v:5} {'both   ' if backward else 'forward'} {caches:4} ours "
            f"{ours:8.2f}  {best / ours:5.2f}x  floor {floor:8.2f}  {peers}"
        )


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def flops() -> float:
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / min(seconds(lambda: a @ a) for _ in range(5))


def seconds(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = f()
    taken = time.perf_counter() - start
    del result  # freed after the clock, as in pytest-benchmark
    return taken
