"""kernels/mlp.py, interpreted: against float64, and as models and torch.compile call it."""

from typing import Any

import pytest
import torch
from cases.triton_interpreted import NATIVE
from fastmem.kernels import mlp as kernels
from torch import Tensor
from torch.library import opcheck

from fastmem import GPT, GPTConfig
from fastmem.models import block
from fastmem.models.engine import PlainEngine, stacked

RUN: list[str] = []

if not NATIVE:

    @block.fused_block.register_kernel("cpu")
    def forward(*inputs: Any, **options: Any) -> Tensor:
        RUN.append("forward")
        return block.fused_block._init_fn(*inputs, **options)  # type: ignore[no-any-return]

    @block.fused_backward.register_kernel("cpu")
    def backward(*inputs: Any, **options: Any) -> Any:
        RUN.append("backward")
        return block.fused_backward._init_fn(*inputs, **options)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not NATIVE:
        monkeypatch.setattr(block, "DEVICES", ["cpu"])
    torch.manual_seed(0)
    RUN.clear()


def have_run(*names: str) -> bool:
    """Whether these kernels did, in this order; not seen on a GPU."""
    return NATIVE or list(names) == RUN


PRECISIONS = ["fp32", "bf16-mixed", "bf16-true"]


def example(
    E: int, N: int, D: int, has_down: bool, precision: str = "fp32"
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Rows with a mean, weights as views of one tensor as in the engine, the output's gradient."""
    U = 4 * D if has_down else 3 * D
    shapes = [(D,), (D,), (U, D), (U,), *([(D, U), (D,)] if has_down else [])]
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.randn(E, sum(sizes) + 3)
    flat[:, :D] = 1 + 0.2 * flat[:, :D]
    start = 2 * D
    flat[:, start : start + U * D] /= D**0.5
    if has_down:
        start += U * D + U
        flat[:, start : start + U * D] /= D**0.5
    pieces = flat.to(dtype).split([*sizes, 3], 1)[:-1]
    weights = [p.view(E, *shape) for p, shape in zip(pieces, shapes, strict=True)]
    x = (2 * torch.randn(E, N, D) + 1).to(dtype)
    kind = torch.float32 if precision == "fp32" or has_down else torch.bfloat16
    dout = torch.randn(E, N, D if has_down else U).to(dtype if has_down else kind)
    return x, weights, dout


def differentiated(
    function: Any, x: Tensor, weights: list[Tensor], dout: Tensor, half: bool = False
) -> list[Tensor]:
    """Returns the output and the gradients of x and the weights."""
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    device = torch.get_default_device().type
    with torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=False):
        out = function(leaves[0], leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def function_of(weights: list[Tensor]) -> Any:
    return block.mlp if len(weights) == 6 else block.norm_linear


def check(
    x: Tensor, weights: list[Tensor], dout: Tensor, precision: str, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """Fails if the output or a gradient is off by over twice PyTorch's own error."""
    function, half = function_of(weights), precision == "bf16-mixed"
    found = differentiated(function, x, weights, dout, half)
    assert have_run("forward", "backward")
    with monkeypatch.context() as patch:
        patch.setattr(block, "DEVICES", [])
        theirs = differentiated(function, x, weights, dout, half)
        wide = [w.double() for w in weights]
        right = differentiated(function, x.double(), wide, dout.double())
    for ours, torchs, wanted in zip(found, theirs, right, strict=True):
        assert (ours.dtype, ours.shape) == (torchs.dtype, torchs.shape)
        error, torchs_error = ((t.double() - wanted).norm() for t in (ours, torchs))
        assert error <= 2 * torchs_error + 1e-6 * (1 + wanted.norm())
    return found


# Each with an edge: N, a program's 64 rows; D, a power of two; E, the axis of models.
SHAPES = [(1, 63, 32), (2, 130, 24), (3, 7, 40), (1, 1, 8), (1, 65, 56), (2, 64, 16), (1, 33, 1)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("has_down", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_twice_pytorch(
    shape: tuple[int, int, int], has_down: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a row, column, model or gradient is wrong, or not written."""
    check(*example(*shape, has_down, precision), precision, monkeypatch)


@pytest.mark.parametrize("has_down", [True, False])
def test_the_widest_tile(has_down: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a tile of the largest size, 256 columns, loses a piece."""
    check(*example(1, 33, 130, has_down, "bf16-mixed"), "bf16-mixed", monkeypatch)


@pytest.mark.parametrize("has_down", [True, False])
def test_many_rows(has_down: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a part of the rows is lost, or the parts of a model reach another."""
    monkeypatch.setattr(kernels, "PROGRAMS", 12)
    check(*example(2, 700, 8, has_down), "fp32", monkeypatch)


@pytest.mark.parametrize("has_down", [True, False])
def test_a_row_that_is_not_finite(has_down: bool) -> None:
    """Fails if it changes another row of the output or of the gradient of x, or another model."""
    x, weights, dout = example(2, 9, 8, has_down, "bf16-mixed")
    function = function_of(weights)
    expected = differentiated(function, x, weights, dout, True)
    x[1, 4] = torch.nan
    for i, (found, right) in enumerate(
        zip(differentiated(function, x, weights, dout, True), expected, strict=True)
    ):
        assert torch.equal(found[0], right[0])
        if i < 2:
            others = [n for n in range(9) if n != 4]
            assert torch.equal(found[1, others], right[1, others])
            assert found[1, 4].isnan().all()


@pytest.mark.parametrize("has_down", [True, False])
def test_large_numbers(has_down: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if GELU overflows, or a mean far from 0 costs LayerNorm its digits."""
    x, weights, dout = example(1, 40, 16, has_down)
    weights[2] *= 100
    check(x + 1000, weights, dout, "fp32", monkeypatch)


def test_the_same_bytes_twice() -> None:
    """Fails if an order of summation is left to chance."""
    x, weights, dout = example(2, 130, 24, True, "bf16-mixed")
    first, second = (differentiated(block.mlp, x, weights, dout, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("has_down", [True, False])
@pytest.mark.parametrize("N", [0, 5])
def test_nothing_to_do(N: int, has_down: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an empty grid is launched, or the gradients of the weights are not 0 then."""
    x, weights, dout = example(2 if N == 0 else 0, N, 8, has_down)
    for name in ("forward", "rows", "weights", "sum"):
        monkeypatch.setattr(kernels, f"{name}_kernel", None)
    out, dx, *gradients = differentiated(function_of(weights), x, weights, dout)
    assert (out.shape, dx.shape) == (dout.shape, x.shape)
    assert not any(g.any() for g in gradients)


# As models call it.

SHAPE = GPTConfig(layers=2, width=12, heads=6, vocab=40, length=9)


def gradients(
    precision: Any, dtype: torch.dtype, kind: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Losses and gradients of three models with noisy weights."""
    draw = torch.Generator().manual_seed(1)
    with torch.device("cpu"):
        models = [GPT(SHAPE, seed) for seed in range(3)]
        tokens = torch.randint(SHAPE.vocab, (3, 2, SHAPE.length), generator=draw)
        for parameter in (p for model in models for p in model.parameters()):
            noise = torch.empty(parameter.shape).normal_(0, 0.2, generator=draw)
            parameter.data.add_(noise)
            parameter.data = parameter.data.to(kind).to(dtype)
    device = torch.get_default_device()
    engine = PlainEngine(models[0], stacked(models).to(device), precision)
    return engine.compute(tokens.to(device)).clone(), engine.gradients


@pytest.mark.parametrize("precision", PRECISIONS)
def test_models_train_by_the_kernels(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if models together do not use the kernels, or use them on other data."""
    kind = torch.bfloat16 if precision == "bf16-true" else torch.float32
    losses, found = gradients(precision, kind)
    assert have_run(*["forward"] * 4, *["backward"] * 4)
    monkeypatch.setattr(block, "DEVICES", [])
    torchs_losses, torchs = gradients(precision, kind)
    assert have_run(*["forward"] * 4, *["backward"] * 4)
    right_losses, right = gradients("fp32", torch.float64, kind)
    for e in range(3):
        error, torchs_error = ((x[e].double() - right[e]).norm() for x in (found, torchs))
        assert error <= 2 * torchs_error + 1e-6 * right[e].norm()
    error, torchs_error = ((x.double() - right_losses).norm() for x in (losses, torchs_losses))
    assert error <= 2 * torchs_error + 1e-6


@pytest.mark.parametrize("has_down", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_the_operator(half: bool, has_down: bool) -> None:
    """Fails if what is registered (shapes, strides, gradient) disagrees with what it does."""
    x, weights, _ = example(2, 5, 8, has_down)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    missing = [] if has_down else [None, None]
    for rows in (x, strided):
        inputs = [t.detach().requires_grad_() for t in (rows, *weights)]
        found = opcheck(block.fused_block, (*inputs, *missing, half))
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("has_down", [True, False])
def test_any_strides(has_down: bool) -> None:
    """Fails if the operator takes the strides of an input for those of a view of (E, P)."""
    x, weights, dout = example(2, 5, 8, has_down)
    function = function_of(weights)
    right = differentiated(function, x, weights, dout)
    apart = [w.transpose(0, -1).contiguous().transpose(0, -1) for w in (x, *weights)]
    found = differentiated(function, apart[0], apart[1:], dout)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    expanded = dout[..., :1].expand(dout.shape)
    found, right = (differentiated(function, x, weights, d) for d in (expanded, expanded.clone()))
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("half", [True, False])
def test_torch_compile(half: bool) -> None:
    """Fails if the operator breaks a graph."""
    x, weights, dout = example(2, 5, 8, True)
    compiled = torch.compile(block.mlp, fullgraph=True, backend="aot_eager")
    found = differentiated(compiled, x, weights, dout, half)
    assert have_run("forward", "backward")
    right = differentiated(block.mlp, x, weights, dout, half)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_what_is_fused() -> None:
    """Fails if a width, dtype or device goes to kernels that cannot compute it."""
    x, weights, _ = example(1, 3, 8, True)
    assert block.is_fused(x, weights)
    assert not block.is_fused(x.double(), [w.double() for w in weights])
    assert not block.is_fused(x, [*weights[:-1], weights[-1].bfloat16()])
    assert not block.is_fused(torch.empty(1, 3, 65), weights)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert block.is_fused(torch.empty(1, 3, 256), weights)
        assert not block.is_fused(torch.empty(1, 3, 257), weights)
    with torch.autocast(x.device.type, torch.float16):
        assert not block.is_fused(x, weights)
    assert not block.is_fused(x.to("meta"), weights)
