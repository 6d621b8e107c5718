"""kernels/embedding.py, interpreted: against float64, and as models and torch.compile call it."""

from typing import Any

import pytest
import torch
from cases.triton_interpreted import BACKEND, NATIVE, planted
from fastmem.kernels import embedding as kernels
from torch import Tensor
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch.library import opcheck

from fastmem import GPT, GPTConfig
from fastmem.models import embedding
from fastmem.models.engine import PlainEngine, stacked

RUN: list[str] = []
get_torch_obj_rule_map()  # Dynamo traces torch.empty only if it knows it from before `poisoned`

if not NATIVE:

    @embedding.fused_embedding.register_kernel("cpu")
    def forward(*inputs: Any) -> Tensor:
        RUN.append("forward")
        return embedding.fused_embedding._init_fn(*inputs)  # type: ignore[no-any-return]

    @embedding.fused_backward.register_kernel("cpu")
    def backward(*inputs: Any) -> None:
        RUN.append("backward")
        embedding.fused_backward._init_fn(*inputs)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not NATIVE:
        monkeypatch.setattr(embedding, "DEVICES", ["cpu"])
    torch.manual_seed(0)
    RUN.clear()


def summed(dx: Tensor, tokens: Tensor, T: int, V: int, S: int) -> Tensor:
    """The gradient by PyTorch, in the dtype of dx."""
    out = torch.zeros(len(dx), V + S, dx.shape[2], dtype=dx.dtype)
    places = V + torch.arange(dx.shape[1]) % T
    for row, t, x in zip(out, tokens, dx, strict=True):
        row.index_add_(0, t, x).index_add_(0, places, x)
    return out


def written(module: Any, dx: Tensor, tokens: Tensor, T: int, V: int, S: int) -> Tensor:
    """The gradient by the kernels, in a part of a larger tensor."""
    E, _, D = dx.shape
    flat = torch.full((E, (V + S) * D + 5), 99.0, dtype=dx.dtype)
    module.backward(dx, None, tokens, T, V, S, flat[:, 2:-3])
    assert (torch.cat([flat[:, :2], flat[:, -3:]], 1) == 99).all()
    return flat[:, 2:-3].reshape(E, V + S, D)


def example(E: int, B: int, T: int, V: int, D: int) -> tuple[Tensor, Tensor]:
    return torch.randn(E, B * T, D), torch.randint(V, (E, B * T))


SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 100, 3, 7, 5),
    (3, 3, 43, 40, 33),
    (1, 1, 128, 5, 70),
    (2, 17, 1, 90, 16),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_twice_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a row, token, position, model or column is lost or read before it is written, or if
    two runs differ, by pieces fewer and more than a program sums at a time."""
    _, _, T, V, _ = shape
    dx, tokens = example(*shape)
    dx, sizes = dx.to(dtype), (T, V, T + 2)
    right, theirs = summed(dx.double(), tokens, *sizes), summed(dx, tokens, *sizes)
    empty, found = torch.empty, []
    for pieces in (kernels.PIECES, 2):
        monkeypatch.setattr(kernels, "PIECES", pieces)
        monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(99))
        found.append(written(kernels, dx, tokens, *sizes))
        monkeypatch.setattr(torch, "empty", empty)
    assert found[0].dtype == dtype
    assert torch.equal(*found)
    error, torchs = ((x.double() - right).norm() for x in (found[0], theirs))
    assert error <= 2 * torchs + 1e-6 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if one byte differs: a sum of two numbers has one rounding."""
    E, B, T, V, D = shape
    tokens = torch.randint(V, (E, B, T + 1))[..., :-1]  # as the engine's, not contiguous
    flat = torch.randn(E, (V + T + 2) * D + 3).to(dtype)
    weight, positions, _ = flat.split([V * D, (T + 2) * D, 3], 1)
    inputs = tokens, weight.view(E, V, D), positions.view(E, T + 2, D)
    found, _ = embedding.embedding(*inputs)
    assert NATIVE or RUN == ["forward"]
    monkeypatch.setattr(embedding, "DEVICES", [])
    assert torch.equal(found, embedding.embedding(*inputs)[0])


@pytest.mark.parametrize("used", [[0], [1], [0, 1]], ids=str)
@pytest.mark.parametrize("T", [0, 4])
def test_a_tied_head(T: int, used: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the gradient of the head is left out, added twice or given to another model."""
    tokens, douts = torch.randint(7, (2, 3, T)), [torch.randn(2, 3 * T, 5), torch.randn(2, 7, 5)]
    leaves = [torch.randn(2, rows, 5, requires_grad=True) for rows in (7, 6)]
    found = []
    for devices in (embedding.DEVICES, []):
        monkeypatch.setattr(embedding, "DEVICES", devices)
        outs = embedding.embedding(tokens, *leaves)
        outs, given = [outs[i] for i in used], [douts[i] for i in used]
        found.append(torch.autograd.grad(outs, leaves, given, allow_unused=True))
    assert NATIVE or ["forward", *["backward"] * (0 in used)] == RUN
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_one_token_many_times_and_none() -> None:
    """Fails if a count overflows its piece, or nothing is not accepted."""
    dx, tokens = example(1, 100, 10, 3, 4)
    tokens.fill_(2)
    right = summed(dx.double(), tokens, 10, 3, 10)
    found = written(kernels, dx, tokens, 10, 3, 10).double()
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-4)
    found = written(kernels, dx[:, :0], tokens[:, :0], 10, 3, 10)
    assert torch.equal(found, torch.zeros(1, 13, 4))
    weight = torch.randn(1, 3, 4)
    assert kernels.forward(tokens[:, :0], weight, weight, 10).shape == (1, 0, 4)


def test_a_row_that_is_not_finite() -> None:
    """Fails if it changes another token or position."""
    dx, tokens = example(2, 20, 10, 20, 8)
    right = written(kernels, dx, tokens, 10, 20, 12)
    dx[1, 53, 3] = torch.nan
    found = written(kernels, dx, tokens, 10, 20, 12)
    changed = (found != right).nonzero().tolist()
    assert changed == [[1, int(tokens[1, 53]), 3], [1, 20 + 3, 3]]


PLANTED = {
    "a rank too low": ("j[None, :] < j[:, None]", "j[None, :] < j[:, None] - 1"),
    "pieces before left out": ("before[None, :] + tl.cumsum", "tl.cumsum"),
    "another model's list": ("list_ptr + e * N + k", "list_ptr + k"),
    "the last row left out": ("(k < end)[:, None]", "(k < end - 1)[:, None]"),
    "rows of another position": ("v - V + k * T", "v - V + k"),
    "a position that is not used": ("v - V < T", "v - V < T + 1"),
    "the last columns left out": ("(V + S, E, cdiv(D, block))", "(V + S, E, D // block)"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(
    name: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a kernel with an error is as near to float64."""
    monkeypatch.setattr(torch, "empty", torch.zeros)  # wrong places leave gaps in the list
    module = planted("embedding.py", *PLANTED[name], tmp_path).embedding  # type: ignore[arg-type]
    module.PIECES = 1
    (dx, tokens), sizes = example(2, 30, 10, 7, 70), (10, 7, 12)
    right = summed(dx.double(), tokens, *sizes)
    assert (written(kernels, dx, tokens, *sizes).double() - right).norm() <= 1e-6 * right.norm()
    error = (written(module, dx, tokens, *sizes).double() - right).norm()
    assert not error <= 1e-4 * right.norm()


def test_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an engine's gradients change, or the kernels are not taken; and the operators are
    as torch.compile expects."""
    models = [GPT(GPTConfig(layers=1, width=8, heads=2, vocab=17, length=6)) for _ in range(2)]
    engine, tokens = PlainEngine(models[0], stacked(models)), torch.randint(17, (2, 5, 6))
    engine.compute(tokens)
    ours = engine.gradients.clone()
    assert NATIVE or RUN == ["forward", "backward"]
    monkeypatch.setattr(embedding, "DEVICES", [])
    engine.compute(tokens)
    torch.testing.assert_close(ours, engine.gradients)
    tokens, dx, *weights = tokens.flatten(1), *(torch.randn(2, n, 8) for n in (30, 17, 6))
    opcheck(embedding.fused_embedding, (tokens, *weights, 6))
    for into in (torch.empty(len(dx), 184), ours[:, 3:187]):
        opcheck(embedding.fused_backward, (dx, weights[0], tokens, 6, 17, 6, into))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch.compile does
@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # of torch itself
def test_torch_compile() -> None:
    """Fails if an operator breaks a graph, or the head's gradient is lost in one."""
    tokens, leaves = torch.randint(7, (2, 3, 4)), [torch.randn(2, n, 5) for n in (7, 6)]
    douts, found = [torch.randn(2, 12, 5), torch.randn(2, 7, 5)], []
    compiled = torch.compile(embedding.embedding, fullgraph=True, backend=BACKEND)
    for function in (compiled, embedding.embedding):
        inputs = [leaf.requires_grad_() for leaf in leaves]
        outs = function(tokens, *inputs)
        found.append([*outs, *torch.autograd.grad(outs, inputs, douts)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert NATIVE or RUN == ["forward", "backward"] * 2
