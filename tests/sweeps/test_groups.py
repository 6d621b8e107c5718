"""The memory that a run is thought to need, against what autograd keeps."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmem import GPT, GPTConfig, TrainConfig, UniformSequences
from fastmem.models.engine import PlainEngine, Precision, stacked
from fastmem.sweeps.groups import group_compatible, needed_bytes, stores_shares
from fastmem.sweeps.rows import RunSpec


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    "shape",
    [GPTConfig(1, 32, 16, 128, 64), GPTConfig(4, 64, 32, 64, 33), GPTConfig(2, 64, 4, 64, 128)],
)
def test_the_memory_of_a_run_is_that_of_what_autograd_keeps(
    shape: GPTConfig, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the estimate is below what the backward pass reads again, or above twice that, with
    attention that stores its shares and without."""
    monkeypatch.setattr("fastmem.sweeps.groups.stores_shares", lambda *_: stored)
    B, model = 32, GPT(shape)
    engine, kept = PlainEngine(model, stacked([model])), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no place is used twice
        return tensor

    backend = SDPBackend.MATH if stored else SDPBackend.FLASH_ATTENTION
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), sdpa_kernel(backend):
        leaf = engine.parameters.detach().requires_grad_()
        engine._bits(leaf, torch.zeros(1, B, shape.length, dtype=torch.int64))
    needed = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    run = RunSpec(shape, UniformSequences(B, shape.length, shape.vocab), TrainConfig(batch=B))
    on_its_way = 3 * 4 * B * shape.heads * shape.length**2 * stored
    found = needed_bytes(run, torch.device("cpu"))
    assert needed + on_its_way <= found <= 2 * needed + on_its_way


def run_of(
    precision: Precision = "fp32", count: int = 40, length: int = 8, batch: int = 8
) -> RunSpec:
    shape, sequences = GPTConfig(1, 32, 8, 16, 16), UniformSequences(count, length, 16)
    return RunSpec(shape, sequences, TrainConfig(precision=precision, batch=batch))


@pytest.mark.parametrize(
    ("precision", "number"), [("fp32", 4), ("bf16-mixed", 4), ("bf16-true", 2)]
)
def test_the_memory_by_hand(precision: Precision, number: int) -> None:
    """Fails if a part of the estimate is left out: weights, gradients and two moments, what the
    backward pass reads, tokens."""
    run = run_of(precision)
    P = run.model.parameter_count
    needed = 4 * P * number + 4 * 8 * 8 * 32 * 28 + 8 * 40 * 8
    assert needed_bytes(run, torch.device("cpu")) == needed


def test_which_runs_are_alike() -> None:
    """Fails if runs that one computation cannot train are put together, or others are not."""
    first, again = run_of(), run_of(count=99)
    others = [run_of("bf16-true"), run_of(length=7), run_of(batch=7), run_of(count=5)]
    assert group_compatible([first, *others, again]) == [[first, again], *([run] for run in others)]


def test_where_attention_stores_its_shares() -> None:
    """Fails if the estimate has them where PyTorch's fused attention runs, or not where it cannot:
    float32 on a GPU, heads no multiple of 4 wide. That it is so was read, not measured."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for heads, precision, device, stores in (
        (16, "fp32", cuda, True),
        (8, "fp32", cuda, False),
        (16, "bf16-mixed", cuda, False),
        (16, "fp32", cpu, False),
    ):
        shape = GPTConfig(1, 32, heads, 16, 4)
        run = RunSpec(shape, UniformSequences(4, 4, 16), TrainConfig(precision=precision))  # type: ignore[arg-type]
        assert stores_shares(run, device) is stores
