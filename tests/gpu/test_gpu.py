"""Every public function that has work for a GPU, there, against float64 or against the CPU.

tests/kernels/interpreted_*.py test the edges of the kernels, on a GPU too. Here are large sizes,
CUDA graphs, torch.compile and training.
"""

import math
from typing import Any

import pytest
import torch
from fastmem.kernels import reference
from torch import Tensor
from torch.library import opcheck

import fastmem
from fastmem import GPT, GPTConfig, TrainConfig, UniformSequences
from fastmem.likelihood import operators
from fastmem.models import attention, engine

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # of libraries; what is ours is asked for below
]

LIMIT = 1e-4  # bits

# N, D, V: each width with tiles of its own, one streamed, ragged ones, and each limit.
SHAPES = [
    (4096, 32, 2048), (4096, 64, 2048), (1000, 128, 2048), (513, 256, 2047), (300, 512, 2048),
    (2000, 1600, 50257), (300, 101, 1009), (130, 8192, 100), (3, 1, 1 << 20), (40, 4096, 128256),
]  # fmt: skip
WIDE_16_BITS = {(130, 8192, 100), (40, 4096, 128256)}
"""Where the products of 16-bit numbers are off by up to 2e-4 of a bit."""
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def example(
    N: int, D: int, V: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of standard deviation 3."""
    draw = torch.Generator("cuda").manual_seed(N * 7 + D * 3 + V)
    hidden = torch.randn(N, D, generator=draw, device="cuda").to(dtype)
    weight = (torch.randn(V, D, generator=draw, device="cuda") * (3 / D**0.5)).to(dtype)
    return hidden, weight, torch.randint(V, (N,), generator=draw, device="cuda")


def log2_p(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """In float64, from the definition."""
    logits = hidden.double() @ weight.double().mT
    if bias is not None:
        logits = logits + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, -1) / math.log(2)


def exact(targets: Tensor, *inputs: Tensor | None, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Bits, and the gradients of their sum."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    bits = -log2_p(*leaves, **options).gather(-1, targets[:, None])[:, 0]  # type: ignore[arg-type]
    bits.sum().backward()  # type: ignore[no-untyped-call]
    return bits.detach(), [x.grad for x in leaves if x is not None and x.grad is not None]


def off(ours: Tensor | None, right: Tensor) -> float:
    """Of all entries together; NaN, which fails every comparison, if there is one."""
    assert ours is not None
    return float((ours.double() - right).norm() / right.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Fails if a tile of the tables is wrong where all of it is used."""
    hidden, weight, targets = example(*shape, dtype)
    right, gradients = exact(targets, hidden, weight)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    bits = fastmem.token_bits(hidden, weight, targets)
    bits.sum().backward()  # type: ignore[no-untyped-call]
    worst = (bits.double() - right).abs().max().item()
    assert worst <= (2 * LIMIT if shape in WIDE_16_BITS and dtype != torch.float32 else LIMIT)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert off(leaf.grad, gradient) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(300, 64, 2048), (100, 528, 777)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"bias": True}, {"softcap": 5.0}, {"temperature": 0.7}, {"bias": True, "softcap": 30.0}],
    ids=lambda o: "+".join(o),
)
def test_statistics(options: dict[str, Any], shape: tuple[int, int, int], dtype: Any) -> None:
    """Fails if a statistic or an option is another than the definition's."""
    hidden, weight, targets = example(*shape, dtype)
    options = dict(options)
    bias = torch.randn(shape[2], device="cuda") if options.pop("bias", False) else None
    log_p = log2_p(hidden, weight, bias, **options)
    p = log_p.exp2()
    targets[::2] = log_p.argmax(-1)[::2]
    flags = dict.fromkeys(("entropy", "second_moment", "greedy", "lse", "variance"), True)
    found = fastmem.token_stats(hidden, weight, targets, bias, **options, **flags)
    right, gradients = exact(targets, hidden, weight, bias, **options)
    moment = (p * log_p**2).sum(-1)
    assert (found.bits - right).abs().max() <= LIMIT
    assert (found.entropy_bits + (p * log_p).sum(-1)).abs().max() <= LIMIT
    assert ((found.second_moment - moment) / moment.clamp_min(1)).abs().max() <= LIMIT
    apart = log_p - (p * log_p).sum(-1, keepdim=True)
    assert (found.variance - (p * apart**2).sum(-1)).abs().max() <= LIMIT
    assert torch.equal(found.is_greedy, log_p.argmax(-1) == targets)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    fastmem.token_bits(hidden, weight, targets, bias, **options).sum().backward()  # type: ignore[no-untyped-call]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert off(leaf.grad, gradient) < 2 * ROUNDING[dtype]


def test_bad_targets_and_rows() -> None:
    """Fails if a row without bits has some, changes another, or check=True lets it pass."""
    hidden, weight, targets = example(50, 32, 100)
    right, _ = exact(targets, hidden, weight)
    targets[3], targets[7], targets[9] = 100, -5, -100
    hidden[11, 0], hidden[12, 0] = torch.nan, torch.inf
    bits = fastmem.token_bits(hidden, weight, targets)
    assert bits.isnan().nonzero().flatten().tolist() == [3, 7, 11, 12]
    assert bits[9] == 0
    kept = [i for i in range(50) if i not in (3, 7, 9, 11, 12)]
    assert (bits - right)[kept].abs().max() <= LIMIT
    with pytest.raises(ValueError, match="100"):
        fastmem.token_bits(hidden, weight, targets, check=True)


def loss_and_gradients(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    loss = fastmem.token_bits(hidden, weight, targets).mean()
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("shape", [(4096, 64, 2048), (4096, 256, 2048), (100, 1600, 50257)])
def test_the_same_bytes_thrice(shape: tuple[int, int, int]) -> None:
    """Fails if an order of summation is left to chance."""
    hidden, weight, targets = example(*shape)
    inputs = hidden.requires_grad_(), weight.requires_grad_(), targets
    first, *others = (loss_and_gradients(*inputs) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_a_cuda_graph() -> None:
    """Fails if a call waits for the device, or a replay reads what was there at the capture."""
    hidden, weight, targets = example(1024, 64, 2048)
    inputs = hidden.requires_grad_(), weight.requires_grad_(), targets
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loss_and_gradients(*inputs)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = loss_and_gradients(*inputs)
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    right = loss_and_gradients(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_torch_compile_and_autocast() -> None:
    """Fails if the operator breaks a graph, or autocast leaves it float32."""
    hidden, weight, targets = example(1024, 64, 2048)
    compiled = torch.compile(lambda *x: fastmem.token_bits(*x).mean(), fullgraph=True)
    right = fastmem.token_bits(hidden, weight, targets)
    assert torch.equal(compiled(hidden, weight, targets), right.mean())
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(fastmem.token_bits(hidden.float(), weight.float(), targets), right)


def test_the_operator() -> None:
    """Fails if what is registered disagrees with what it does."""
    hidden, weight, targets = example(20, 16, 40)
    problem = (hidden.requires_grad_(), weight, targets, None, None, 1.0, -100, [False] * 3)
    assert set(opcheck(operators.BITS, problem).values()) == {"SUCCESS"}


def attended(function: Any, qkv: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = function(leaf)
    return out.detach(), *torch.autograd.grad(out, leaf, dout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(512, 63, 16, 2), (64, 63, 128, 2), (64, 255, 16, 2), (99, 128, 13, 5)], ids=str
)
def test_attention(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Fails if it is off by over twice PyTorch's error, left to chance, or other in a CUDA graph or
    under torch.compile."""
    draw = torch.Generator("cuda").manual_seed(0)
    N, T, H, W = shape
    qkv = (2 * torch.randn(N, T, 3, H, W, generator=draw, device="cuda")).to(dtype)
    dout = torch.randn(shape, generator=draw, device="cuda").to(dtype)
    assert attention.is_fused(qkv)
    found = attended(attention.attention, qkv, dout)
    few = slice(0, 8)  # sequences, in float64
    right = attended(reference.attention, qkv[few].double(), dout[few].double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "DEVICES", [])
        theirs = attended(attention.attention, qkv, dout)
    for ours, torchs, exact in zip(found, theirs, right, strict=True):
        assert off(ours[few], exact) <= 2 * off(torchs[few], exact) + 1e-6
    compiled = torch.compile(attention.attention, fullgraph=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attended(attention.attention, qkv, dout)
    graph.replay()
    for again in (captured, attended(compiled, qkv, dout)):
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("vocab", [128, 2048, 50257, 2**31])
def test_tokens_are_those_of_the_cpu(vocab: int) -> None:
    """Fails if a set has other tokens on a GPU."""
    weights = fastmem.zipf(min(vocab, 50257))
    for sequences in (
        UniformSequences(1 << 40, 33, vocab, seed=2**63),
        fastmem.WeightedSequences(1 << 40, 33, weights, seed=1),
        fastmem.repeated(UniformSequences(5000, 33, vocab, seed=3), 0.2, 3),
    ):
        for indices in (slice(7, 1007), torch.randint(5000, (500,)).numpy()):
            ours, right = (sequences.to_torch(device, indices) for device in ("cuda", "cpu"))
            assert torch.equal(ours.cpu().to(torch.int64), right.to(torch.int64))


SHAPE = GPTConfig(layers=1, width=32, heads=16, vocab=128, length=16)
SET = UniformSequences(256, 16, 128, seed=1)


def trained(way: str, precision: Any, device: str, **more: Any) -> GPT:
    before, engine.STEP = engine.STEP, way
    try:
        model = GPT(SHAPE, device=device)
        config = TrainConfig(steps=300, batch=128, precision=precision)
        fastmem.train(model, SET, config, progress=False)
        return model
    finally:
        engine.STEP = before


@pytest.mark.filterwarnings("error:CUDA graph capture failed")
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-true", "bf16-stochastic"])
def test_training(precision: Any) -> None:
    """Fails if a graph is not the step that was captured, or a GPU learns less than a CPU."""
    learnt = [
        fastmem.memorized_bits(fastmem.sequence_bits(trained(way, precision, "cuda"), SET), SET)
        for way in ("eager", "graph")
    ]
    on_cpu = fastmem.sequence_bits(trained("eager", "fp32", "cpu"), SET)
    right = fastmem.memorized_bits(on_cpu, SET).strict
    eager, graph = (bits.strict for bits in learnt)
    assert math.isclose(eager, graph, rel_tol=1e-3)
    assert math.isclose(graph, right, rel_tol=0.05 if precision == "fp32" else 0.15)


def test_scores_are_those_of_the_cpu() -> None:
    """Fails if a model, quantized or not, has other scores on a GPU."""
    model = trained("graph", "fp32", "cuda")
    twin = GPT(SHAPE)
    twin.load_state_dict(model.state_dict())
    for ours, right in ((model, twin), (fastmem.quantized(model, 8), fastmem.quantized(twin, 8))):
        bits = fastmem.sequence_bits(ours, SET), fastmem.sequence_bits(right, SET)
        assert abs(bits[0] - bits[1]).max() < 16 * LIMIT


def test_models_together() -> None:
    """Fails if models trained at once are not those trained alone."""
    sets = [UniformSequences(256, 16, 128, seed=e) for e in range(3)]
    configs = [TrainConfig(steps=50, batch=128, seed=e) for e in range(3)]

    def models() -> list[GPT]:
        return [GPT(SHAPE, seed=e, device="cuda") for e in range(3)]

    together = fastmem.train_many(models(), sets, configs, progress=False)
    for model, sequences, config, result in zip(models(), sets, configs, together, strict=True):
        alone = fastmem.train(model, sequences, config, progress=False)
        entropy = sequences.coded_entropy_bits
        costs = [entropy - r.memorized_bits for r in (alone, result)]
        assert math.isclose(*costs, rel_tol=1e-2)
