"""kernels/embedding.py, interpreted: against float64, and as models and torch.compile call it."""

import pytest
import torch
from cases.triton_interpreted import NATIVE, planted
from fastmem.kernels import embedding as kernels
from torch import Tensor
from torch.library import opcheck

from fastmem import GPT, GPTConfig
from fastmem.models import embedding
from fastmem.models.engine import PlainEngine, stacked

RUN: list[str] = []

if not NATIVE:

    @embedding.fused_embedding.register_kernel("cpu")
    def forward(tokens: Tensor, weight: Tensor) -> Tensor:
        return embedding.fused_embedding._init_fn(tokens, weight)  # type: ignore[no-any-return]

    @embedding.fused_backward.register_kernel("cpu")
    def backward(dx: Tensor, tokens: Tensor, V: int) -> Tensor:
        RUN.append("backward")
        return embedding.fused_backward._init_fn(dx, tokens, V)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not NATIVE:
        monkeypatch.setattr(embedding, "DEVICES", ["cpu"])
    torch.manual_seed(0)
    RUN.clear()


def exact(dx: Tensor, tokens: Tensor, V: int) -> Tensor:
    out = torch.zeros(len(dx), V, dx.shape[2], dtype=torch.float64)
    for row, t, x in zip(out, tokens, dx.double(), strict=True):
        row.index_add_(0, t, x)
    return out


def example(E: int, N: int, V: int, D: int) -> tuple[Tensor, Tensor]:
    return torch.randn(E, N, D), torch.randint(V, (E, N))


SHAPES = [(1, 1, 1, 1), (2, 300, 7, 5), (3, 129, 40, 33), (1, 128, 5, 70), (2, 17, 90, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_twice_pytorch(
    shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a position, token, model or column is lost or read before it is written, or if two
    runs differ, by pieces fewer and more than a program sums at a time."""
    dx, tokens = example(*shape)
    dx, V = dx.to(dtype), shape[2]
    right = exact(dx, tokens, V)
    theirs = torch.stack(
        [
            torch.zeros(V, shape[3], dtype=dtype).index_add_(0, t, x)
            for t, x in zip(tokens, dx, strict=True)
        ]
    )
    empty, found = torch.empty, []
    for pieces in (kernels.PIECES, 2):
        monkeypatch.setattr(kernels, "PIECES", pieces)
        monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(99))
        found.append(kernels.gradient(dx, tokens, V))
        monkeypatch.setattr(torch, "empty", empty)
    assert found[0].dtype == dtype
    assert torch.equal(*found)
    error, torchs = ((x.double() - right).norm() for x in (found[0], theirs))
    assert error <= 2 * torchs + 1e-6 * right.norm()


def test_one_token_many_times_and_none() -> None:
    """Fails if a count overflows its piece, or nothing is not accepted."""
    dx, tokens = example(1, 1000, 3, 4)
    tokens.fill_(2)
    right = exact(dx, tokens, 3)
    torch.testing.assert_close(
        kernels.gradient(dx, tokens, 3).double(), right, rtol=1e-5, atol=1e-4
    )
    assert torch.equal(kernels.gradient(dx[:, :0], tokens[:, :0], 3), torch.zeros(1, 3, 4))


def test_a_position_that_is_not_finite() -> None:
    """Fails if it changes another token."""
    dx, tokens = example(2, 200, 20, 8)
    right = kernels.gradient(dx, tokens, 20)
    dx[1, 50, 3] = torch.nan
    found = kernels.gradient(dx, tokens, 20)
    changed = (found != right).nonzero().tolist()
    assert changed == [[1, int(tokens[1, 50]), 3]]


PLANTED = {
    "a rank too low": ("j[None, :] < j[:, None]", "j[None, :] < j[:, None] - 1"),
    "pieces before left out": ("before[None, :] + tl.cumsum", "tl.cumsum"),
    "another model's list": ("list_ptr + e * N + k", "list_ptr + k"),
    "the last position left out": ("(k < end)[:, None]", "(k < end - 1)[:, None]"),
    "the last columns left out": ("cdiv(D, block)", "D // block"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(
    name: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a kernel with an error is as near to float64."""
    monkeypatch.setattr(torch, "empty", torch.zeros)  # wrong places leave gaps in the list
    module = planted("embedding.py", *PLANTED[name], tmp_path).embedding  # type: ignore[arg-type]
    module.PIECES = 1
    dx, tokens = example(2, 300, 7, 70)
    right = exact(dx, tokens, 7)
    assert (kernels.gradient(dx, tokens, 7).double() - right).norm() <= 1e-6 * right.norm()
    error = (module.gradient(dx, tokens, 7).double() - right).norm()
    assert not error <= 1e-4 * right.norm()


def test_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an engine's gradients change, or the kernels are not taken; and the operators are
    as torch.compile expects."""
    models = [GPT(GPTConfig(layers=1, width=8, heads=2, vocab=17, length=6)) for _ in range(2)]
    engine, tokens = PlainEngine(models[0], stacked(models)), torch.randint(17, (2, 5, 6))
    engine.compute(tokens)
    ours = engine.gradients.clone()
    assert NATIVE or RUN == ["backward"]
    monkeypatch.setattr(embedding, "DEVICES", [])
    engine.compute(tokens)
    torch.testing.assert_close(ours, engine.gradients)
    opcheck(embedding.fused_embedding, (tokens, torch.randn(2, 17, 8, requires_grad=True)))
