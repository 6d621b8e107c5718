"""The planned memory of a rank against the memory that ranks take."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from fastmem.models.engine import Precision
from fastmem.models.gpt import GPTConfig, Recompute
from fastmem.models.sharded import Sharding
from fastmem.training.config import TrainConfig
from fastmem.training.memory import Peak, planned_peak, workspace_bytes
from tests.cases.measured_ranks import COUNT, SHAPE

Case = tuple[Precision, Recompute]
CASES: list[Case] = [("fp32", "none"), ("bf16-mixed", "attention"), ("bf16-stochastic", "block")]
OF_ONE: list[Case] = [("bf16-true", "none")]


def test_the_plan_against_the_growth_of_real_ranks() -> None:
    """Fails if the planned peak of a rank is more than 10 % off the growth of its resident memory
    while it trains 10 million parameters, in each precision and with each recomputation."""
    both, one = started(2, CASES), started(1, OF_ONE)
    planned = {
        ranks: [planned_of(ranks, *case).total for case in cases]
        for ranks, cases in ((2, CASES), (1, OF_ONE))
    }
    for ranks, cases, processes in ((2, CASES, both), (1, OF_ONE, one)):
        for process in processes:
            out, error = process.communicate(timeout=300)
            assert process.returncode == 0, error[-2000:]
            measured = json.loads(out.splitlines()[-1])
            for case, ours, theirs in zip(cases, planned[ranks], measured, strict=True):
                assert abs(ours / theirs - 1) < 0.1, (ranks, case, ours / 1e6, theirs / 1e6)


def started(size: int, cases: list[Case]) -> "list[subprocess.Popen[str]]":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # the allocator gives back what is freed
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
    }
    command = [sys.executable, "-m", "tests.cases.measured_ranks", json.dumps(cases)]
    processes = []
    for rank in range(size):
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "RANK": f"{rank}"}
        environ = os.environ | shared | (address | {"WORLD_SIZE": f"{size}"} if size > 1 else {})
        processes.append(
            subprocess.Popen(
                command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    return processes


def planned_of(ranks: int, precision: Precision, recompute: Recompute) -> Peak:
    config = TrainConfig(precision=precision, batch=COUNT)
    return planned_peak(SHAPE, config, Sharding(recompute), ranks, COUNT, SHAPE.length, "cpu")


@pytest.mark.parametrize(
    ("precision", "weights", "optimizer"),
    [("fp32", 4, 8), ("bf16-mixed", 4, 8), ("bf16-true", 2, 4), ("bf16-stochastic", 2, 12)],
)
def test_the_state_of_a_rank_by_hand(precision: Precision, weights: int, optimizer: int) -> None:
    """Fails if a rank of two has another part of the weights and moments than half of them."""
    shape = GPTConfig(2, 32, 4, 128, 16)
    peak = planned_peak(shape, TrainConfig(precision=precision), Sharding(), 2, 400, 16)
    assert peak.weights == weights * shape.parameter_count / 2
    assert peak.optimizer == pytest.approx(optimizer * shape.parameter_count / 2, abs=1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_workspace_is_that_of_the_kernels(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the plan of a wide head differs from what kernels/chunks.py takes."""
    pytest.importorskip("triton", reason="Triton lacks a wheel for this platform")
    from fastmem.kernels import chunks

    found = []
    monkeypatch.setattr(
        chunks, "rows_of_a_chunk", lambda N, row, fixed, _: found.append(fixed + N * row) or N
    )
    hidden, weight = (torch.empty(n, 320, dtype=dtype, device="meta") for n in (64, 512))
    gradients = chunks.empty_gradients(hidden, weight, None, (True, True, False))
    chunks.Sums(hidden, weight, gradients)
    assert workspace_bytes(hidden, weight) == pytest.approx(found[0], rel=0.05)


def test_less_is_kept_where_more_is_computed_again() -> None:
    """Fails if recomputation or accumulation does not lower the activations."""
    shape, config = GPTConfig(8, 64, 4, 64, 64), TrainConfig(batch=64)

    def activations(sharding: Sharding) -> int:
        return planned_peak(shape, config, sharding, 2, 64, 64).activations

    none, attention, block = (activations(Sharding(r)) for r in get_args(Recompute))
    assert none > 1.3 * attention > 1.3 * block
    assert none > 1.7 * activations(Sharding(accumulate=2))
