"""What is only done on a GPU, on the device of this folder: tests/test_host_cuda.py runs this."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastmem
from fastmem import GPT, GPTConfig, TrainConfig, UniformSequences
from fastmem.models import engine, flops
from fastmem.training import group

pytestmark = [
    pytest.mark.filterwarnings("error:CUDA graph capture failed"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of NumPy, about infinities of kernels
]

flops.MATMUL_SIZES["cuda"] = (64,)  # a GPU's would take this device half a minute
SHAPE = GPTConfig(1, 8, 4, vocab=11, length=7)
SETS = [UniformSequences(8, 7, 11, seed=e) for e in range(2)]
ENTROPY = SETS[0].coded_entropy_bits


def captured(work: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def test_a_graph_of_the_device() -> None:
    """Fails if a capture changes memory, or a replay has other numbers than the capture."""
    x, y, number = torch.arange(4.0, device="cuda"), torch.zeros(4, device="cuda"), 2.0
    made: list[Tensor] = []

    def work() -> None:
        made.append(x * number)
        y.add_(made[0]).mul_(2)

    graph = captured(work)
    assert y.tolist() == [0, 0, 0, 0]
    number = 100.0
    x.fill_(3)
    for right in (12, 36):
        graph.replay()
        assert y.tolist() == [right] * 4
        assert made[0].tolist() == [6] * 4


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), Tensor.cpu, lambda x: x + x.new_tensor(1)]
)
def test_a_capture_refuses_to_wait(wait: Any) -> None:
    """Fails if a graph may have what a GPU's may not."""
    x = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captured(lambda: wait(x))


def test_the_device_is_not_the_host() -> None:
    """Fails if an operator takes what a GPU would refuse."""
    x = torch.ones(4, device="cuda")
    for wrong in (lambda: torch.cat([x, torch.ones(2)]), lambda: x @ torch.ones(4)):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    assert x[torch.tensor([1, 3])].tolist() == [1, 1]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("D", [24, 272])
def test_likelihood_in_a_graph(D: int, reduction: str) -> None:
    """Fails if a pass waits, reads what was there at the capture, or differs from float64."""
    N, V = 21, 70
    hidden, weight = (torch.randn(n, D, device="cuda", dtype=torch.bfloat16) for n in (N, V))
    weight = weight / D**0.5
    leaves, targets = (
        [x.requires_grad_() for x in (hidden, weight)],
        torch.randint(V, (N,), device="cuda"),
    )
    found: list[Tensor] = []

    def run() -> None:
        loss = fastmem.linear_cross_entropy(*leaves, targets, reduction=reduction)
        found[:] = loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    run()
    graph = captured(run)
    with torch.no_grad():
        hidden.copy_(torch.randn(N, D))
    targets.copy_(targets.flip(0))
    graph.replay()
    double = [x.detach().double().requires_grad_() for x in leaves]
    loss = F.cross_entropy(double[0] @ double[1].T, targets, reduction=reduction)
    right = loss.detach(), *torch.autograd.grad(loss.sum(), double)
    for ours, exact in zip(found, right, strict=True):
        assert ours.is_cuda
        assert (ours.double() - exact).norm() <= 8e-3 * exact.norm()


@pytest.mark.parametrize("loss", [fastmem.token_bits, fastmem.linear_cross_entropy])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch.compile does
def test_torch_compile(loss: Any) -> None:
    """Fails if the choice of the operator breaks a graph, or a compiled call is another one."""
    inputs = torch.randn(21, 24, device="cuda"), torch.randn(70, 24, device="cuda")
    leaves, targets = [x.requires_grad_() for x in inputs], torch.arange(21, device="cuda")

    def run(function: Any) -> list[Tensor]:
        found = function(*leaves, targets)
        return [found.detach(), *torch.autograd.grad(found.sum(), leaves)]

    compiled = run(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for ours, right in zip(compiled, run(loss), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


def trained(way: str, device: str, precision: Any, models: int = 1) -> tuple[list[float], Tensor]:
    """The code lengths of the data sets, and all weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "STEP", way)
        made = [GPT(SHAPE, seed=e, device=device) for e in range(models)]
        configs = [
            TrainConfig(steps=5 + 4 * e, batch=4, seed=e, precision=precision)
            for e in range(models)
        ]
        results = fastmem.train_many(made, SETS[:models], configs, progress=False)
    weights = [p.detach().float().cpu().flatten() for model in made for p in model.parameters()]
    return [ENTROPY - r.memorized_bits for r in results], torch.cat(weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-stochastic"])
def test_steps_of_a_graph(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a step waits, mixes devices, is not what was captured, or not what a CPU computes.
    One model ends before the other, so that there are two captures."""
    captures, capture = [], group.cuda_graph
    monkeypatch.setattr(group, "cuda_graph", lambda *a: captures.append(a) or capture(*a))
    bits, weights = trained("graph", "cuda", precision, 2)
    assert len(captures) == 2
    assert torch.equal(weights, trained("eager", "cuda", precision, 2)[1])
    right, _ = trained("eager", "cpu", precision, 2)
    assert bits == pytest.approx(right, rel=1e-5 if precision == "fp32" else 5e-2)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a kernel's operator breaks the graph of a compiled model, or computes otherwise."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiler(f, backend="aot_eager"))
    assert trained("compiled", "cuda", "bf16-mixed")[0] == trained("eager", "cuda", "bf16-mixed")[0]


def test_scores_are_those_of_the_cpu() -> None:
    """Fails if a model, quantized or not, has other scores on a GPU."""
    model, twin = GPT(SHAPE, device="cuda"), GPT(SHAPE)
    for ours, right in ((model, twin), (fastmem.quantized(model, 8), fastmem.quantized(twin, 8))):
        bits = fastmem.sequence_bits(ours, SETS[0]), fastmem.sequence_bits(right, SETS[0])
        assert abs(bits[0] - bits[1]).max() < 1e-3


@pytest.mark.parametrize("vocab", [128, 50257])
def test_tokens_are_those_of_the_cpu(vocab: int) -> None:
    """Fails if a set has other tokens on a GPU."""
    for sequences in (
        UniformSequences(1 << 40, 9, vocab, seed=2**63),
        fastmem.WeightedSequences(1 << 40, 9, fastmem.zipf(vocab), seed=1),
    ):
        for indices in (slice(7, 40), torch.randint(5000, (20,)).numpy()):
            ours, right = (sequences.to_torch(device, indices) for device in ("cuda", "cpu"))
            assert ours.is_cuda
            assert torch.equal(ours.cpu().to(torch.int64), right.to(torch.int64))
