"""The estimated memory of a run, against the tensors that autograd keeps."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmem import GPT, GPTConfig, TrainConfig, UniformSequences
from fastmem.models.engine import PlainEngine, Precision, stacked
from fastmem.sweeps.groups import group_compatible, needed_bytes
from fastmem.sweeps.rows import RunSpec
from fastmem.training.memory import stores_attention_weights


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    "shape",
    [GPTConfig(1, 32, 16, 128, 64), GPTConfig(4, 64, 32, 64, 33), GPTConfig(2, 64, 4, 64, 128)],
)
def test_the_memory_of_a_run_against_autograd(
    shape: GPTConfig, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the estimate is below the bytes that the backward pass reads, or above twice these
    bytes, with stored attention weights and without."""
    monkeypatch.setattr("fastmem.sweeps.groups.stores_attention_weights", lambda *_: stored)
    B, model = 32, GPT(shape)
    engine, kept = PlainEngine(model, stacked([model])), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = (
            tensor  # held, so that its address is not used again
        )
        return tensor

    backend = SDPBackend.MATH if stored else SDPBackend.FLASH_ATTENTION
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), sdpa_kernel(backend):
        leaves = [piece.detach().requires_grad_() for piece in engine._pieces(engine.parameters)]
        engine._bits(leaves, torch.zeros(1, B, shape.length, dtype=torch.int64))
    needed = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    run = RunSpec(shape, UniformSequences(B, shape.length, shape.vocab), TrainConfig(batch=B))
    temporary = 3 * 4 * B * shape.heads * shape.length**2 * stored
    found = needed_bytes(run, torch.device("cpu"))
    assert needed + temporary <= found <= 2 * needed + temporary


def run_of(
    precision: Precision = "fp32", count: int = 40, length: int = 8, batch: int = 8
) -> RunSpec:
    shape, sequences = GPTConfig(1, 32, 8, 16, 16), UniformSequences(count, length, 16)
    return RunSpec(shape, sequences, TrainConfig(precision=precision, batch=batch))


@pytest.mark.parametrize(
    ("precision", "number"), [("fp32", 4), ("bf16-mixed", 4), ("bf16-true", 2)]
)
def test_the_memory_by_hand(precision: Precision, number: int) -> None:
    """Fails if the estimate lacks a part: weights, gradients and two moments, activations,
    tokens."""
    run = run_of(precision)
    P = run.model.parameter_count
    needed = 4 * P * number + 4 * 8 * 8 * 32 * 28 + 8 * 40 * 8
    assert needed_bytes(run, torch.device("cpu")) == needed


def test_which_runs_can_train_together() -> None:
    """Fails if a group mixes shapes, precisions, batches or lengths, or splits compatible runs."""
    first, again = run_of(), run_of(count=99)
    others = [run_of("bf16-true"), run_of(length=7), run_of(batch=7), run_of(count=5)]
    assert group_compatible([first, *others, again]) == [[first, again], *([run] for run in others)]


def test_where_attention_stores_its_weights() -> None:
    """Fails if attention weights count where PyTorch's fused attention runs, or do not where it
    cannot: float32 on a GPU, head width not a multiple of 4. Read in its source, not measured."""
    for heads, precision, device, stores in (
        (16, "fp32", "cuda", True),
        (8, "fp32", "cuda", False),
        (16, "bf16-mixed", "cuda", False),
        (16, "fp32", "cpu", False),
    ):
        shape = GPTConfig(1, 32, heads, 16, 4)
        assert stores_attention_weights(shape, precision, device) is stores
