"""kernels/block.py, interpreted: against float64, and as models and torch.compile call it."""

from typing import Any

import pytest
import torch
from cases.triton_interpreted import BACKEND, NATIVE
from fastmem.kernels import block as kernels
from torch import Tensor
from torch.library import opcheck

from fastmem import GPT, GPTConfig
from fastmem.models import block, embedding
from fastmem.models.engine import PlainEngine, stacked

RUN: list[str] = []

if not NATIVE:

    @block.fused_block.register_kernel("cpu")
    def forward(*inputs: Any, **options: Any) -> Tensor:
        RUN.append("forward")
        return block.fused_block._init_fn(*inputs, **options)  # type: ignore[no-any-return]

    @embedding.fused_embedding.register_kernel("cpu")
    def embed(*inputs: Any) -> Tensor:
        return embedding.fused_embedding._init_fn(*inputs)  # type: ignore[no-any-return]

    @embedding.fused_backward.register_kernel("cpu")
    def embed_backward(*inputs: Any) -> None:
        embedding.fused_backward._init_fn(*inputs)

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
KINDS = ["mlp", "norm_linear", "norm"]


def example(
    E: int, N: int, D: int, kind: str, precision: str = "fp32"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Rows (of an MLP those of attention too), weights as views of one tensor as in the engine, and
    the gradients of the outputs."""
    U = {"mlp": 4 * D, "norm_linear": 3 * D, "norm": D}[kind]
    shapes = [(D, D), (D,), (D,), (D,), (U, D), (U,), (D, U), (D,)]
    first, last = {"mlp": (0, 8), "norm_linear": (2, 6), "norm": (2, 4)}[kind]
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    product = torch.float32 if precision == "fp32" else torch.bfloat16
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.randn(E, sum(sizes) + 3)
    weights = [
        p.view(E, *shape) for p, shape in zip(flat.split([*sizes, 3], 1), shapes, strict=False)
    ]
    weights[2].mul_(0.2).add_(1)
    for matrix in weights[::2]:
        if matrix.ndim == 3:
            matrix /= D**0.5
    flat = flat.to(dtype)
    pieces = flat.split([*sizes, 3], 1)[:-1]
    weights = [p.view(E, *shape) for p, shape in zip(pieces, shapes, strict=True)][first:last]
    rows = [(2 * torch.randn(E, N, D) + 1).to(dtype), torch.randn(E, N, D).to(product)]
    dx, dout = torch.randn(E, N, D).to(dtype), torch.randn(E, N, U if kind != "mlp" else D)
    if kind == "mlp":
        return rows, weights, [dout.to(dtype)]
    return rows[:1], weights, [dx, dout.to(product)][kind == "norm" :]


def differentiated(
    kind: str,
    rows: list[Tensor],
    weights: list[Tensor],
    douts: list[Tensor],
    half: bool = False,
    function: Any = None,
) -> list[Tensor]:
    """Returns the outputs and the gradients of rows and weights."""
    leaves = [t.detach().requires_grad_() for t in (*rows, *weights)]
    device = torch.get_default_device().type
    count = len(rows)
    with torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=False):
        outs = (function or getattr(block, kind))(*leaves[:count], leaves[count:])
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    douts = [d.to(out.dtype) for d, out in zip(douts, outs, strict=True)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, douts)]


def check(
    kind: str,
    case: tuple[list[Tensor], list[Tensor], list[Tensor]],
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if an output or a gradient is off by over twice PyTorch's own error."""
    half = precision == "bf16-mixed"
    found = differentiated(kind, *case, half)
    assert have_run("forward", "backward")
    with monkeypatch.context() as patch:
        patch.setattr(block, "DEVICES", [])
        theirs = differentiated(kind, *case, half)
        right = differentiated(kind, *([t.double() for t in tensors] for tensors in case))
    if kind == "norm":  # PyTorch's is rounded where the likelihood reads it
        theirs[0] = theirs[0].to(found[0].dtype)
    for ours, torchs, wanted in zip(found, theirs, right, strict=True):
        assert (ours.dtype, ours.shape) == (torchs.dtype, torchs.shape)
        error, torchs_error = ((t.double() - wanted).norm() for t in (ours, torchs))
        assert error <= 2 * torchs_error + 1e-6 * (1 + wanted.norm())


# Each with an edge: N, a program's 64 rows; D, a power of two; E, the axis of models.
SHAPES = [(1, 63, 32), (2, 130, 24), (3, 7, 40), (1, 1, 8), (1, 65, 56), (2, 64, 16), (1, 33, 1)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_twice_pytorch(
    shape: tuple[int, int, int], kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a row, column, model or gradient is wrong, or not written."""
    check(kind, example(*shape, kind, precision), precision, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_the_widest_tile(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a tile of the largest size, 256 columns, loses a piece."""
    precision = "fp32" if kind == "norm" else "bf16-mixed"
    check(kind, example(1, 33, 130, kind, precision), precision, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a part of the rows is lost, or the parts of a model reach another."""
    monkeypatch.setattr(kernels, "PROGRAMS", 12)
    check(kind, example(2, 700, 8, kind), "fp32", monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite(kind: str) -> None:
    """Fails if it changes another row of outputs or of the gradients of rows, or another model."""
    case = example(2, 9, 8, kind, "bf16-mixed")
    expected = differentiated(kind, *case, True)
    case[0][-1][1, 4] = torch.nan
    rowwise = len(expected) - len(case[1])
    for i, (found, right) in enumerate(
        zip(differentiated(kind, *case, True), expected, strict=True)
    ):
        assert torch.equal(found[0], right[0])
        if i < rowwise:
            others = [n for n in range(9) if n != 4]
            assert torch.equal(found[1, others], right[1, others])
            assert found[1, 4].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_large_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if GELU overflows, or a mean far from 0 costs LayerNorm its digits."""
    rows, weights, douts = example(1, 40, 16, kind)
    for matrix in weights[-4:]:
        if matrix.ndim == 3:
            matrix *= 100
    check(kind, ([rows[0] + 1000, *rows[1:]], weights, douts), "fp32", monkeypatch)


def test_the_same_bytes_twice() -> None:
    """Fails if an order of summation is left to chance."""
    case = example(2, 130, 24, "mlp", "bf16-mixed")
    first, second = (differentiated("mlp", *case, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N", [0, 5])
def test_nothing_to_do(N: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an empty grid is launched, or the gradients of the weights are not 0 then."""
    rows, weights, douts = example(2 if N == 0 else 0, N, 8, kind)
    for name in ("forward", "rows", "weights", "sum"):
        monkeypatch.setattr(kernels, f"{name}_kernel", None)
    found = differentiated(kind, rows, weights, douts)
    shapes = [t.shape for t in (*douts, *rows, *weights)]
    assert [t.shape for t in found] == shapes
    assert not any(g.any() for g in found[-len(weights) :])


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_outputs(used: int) -> None:
    """Fails if an output that the loss does not use gets a gradient, or none where it does."""
    (x,), weights, douts = example(2, 9, 8, "norm_linear")
    expected = differentiated(
        "norm_linear", [x], weights, [d * (i == used) for i, d in enumerate(douts)]
    )
    leaf = x.requires_grad_()
    (found,) = torch.autograd.grad(block.norm_linear(leaf, weights)[used], leaf, douts[used])
    assert torch.equal(found, expected[2])


# As models call it.

SHAPE = GPTConfig(layers=2, width=12, heads=6, vocab=40, length=9)


def gradients(
    precision: Any, dtype: torch.dtype, kind: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Bits of each token and gradients of three models with noisy weights."""
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
    losses, bits = engine.compute(tokens.to(device)), engine.bits(tokens.to(device))
    torch.testing.assert_close(losses, bits.mean((1, 2)))
    return bits, engine.gradients


@pytest.mark.parametrize("precision", PRECISIONS)
def test_models_train_by_the_kernels(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if models together do not use the kernels, or use them on other data."""
    kind = torch.bfloat16 if precision == "bf16-true" else torch.float32
    bits, found = gradients(precision, kind)
    launched = [*["forward"] * 5, *["backward"] * 5, *["forward"] * 5]
    assert have_run(*launched)
    monkeypatch.setattr(block, "DEVICES", [])
    torchs_bits, torchs = gradients(precision, kind)
    assert have_run(*launched)
    right_bits, right = gradients("fp32", torch.float64, kind)
    for e in range(3):
        error, torchs_error = ((x[e].double() - right[e]).norm() for x in (found, torchs))
        assert error <= 2 * torchs_error + 1e-6 * right[e].norm()
    error, torchs_error = ((x.double() - right_bits).norm() for x in (bits, torchs_bits))
    assert error <= 2 * torchs_error + 1e-6


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_go_to_their_places(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if kernels leave a place as it was, or gradients are copied that are in place."""
    kind = torch.bfloat16 if precision == "bf16-true" else torch.float32
    _, torchs = gradients(precision, kind)
    if not NATIVE:
        monkeypatch.setattr(embedding, "DEVICES", ["cpu"])
    copied, cat, zeros = [], torch.cat, torch.zeros_like

    def watched(tensors: Any, dim: int = 0, **out: Any) -> Tensor:
        copied.append(out)
        return cat(tensors, dim, **out)

    monkeypatch.setattr(torch, "cat", watched)
    monkeypatch.setattr(torch, "zeros_like", lambda t: zeros(t).fill_(torch.nan))
    _, found = gradients(precision, kind)
    assert not any(copied)
    error = (found.double() - torchs.double()).norm() / torchs.double().norm()
    assert error < (1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [True, False])
def test_the_operators(half: bool, kind: str) -> None:
    """Fails if what is registered (shapes, strides) disagrees with what the operators do."""
    rows, weights, douts = example(2, 5, 8, kind, "bf16-mixed" if half else "fp32")
    for change in (lambda t: t, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)):
        x, mixed, residual, dout = (
            None if t is None else change(t) for t in (*(*rows, None)[:2], *(None, *douts)[-2:])
        )
        for inputs in ((x, mixed), (dout, residual, x, mixed)):
            flat = torch.empty(2, sum(w[0].numel() for w in weights) + 5, dtype=x.dtype)
            into = None if x.is_contiguous() else flat[:, 2:-3]
            forward = len(inputs) == 2
            operator = block.fused_block if forward else block.fused_backward
            found = opcheck(operator, (*inputs, weights, half, *([] if forward else [into])))
            assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind: str) -> None:
    """Fails if the operator takes the strides of an input for those of a view of (E, P)."""
    case = example(2, 5, 8, kind)
    right = differentiated(kind, *case)
    apart = [[w.transpose(0, -1).contiguous().transpose(0, -1) for w in part] for part in case]
    found = differentiated(kind, *apart)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    expanded = [dout[..., :1].expand(dout.shape) for dout in case[2]]
    found = differentiated(kind, *case[:2], expanded)
    right = differentiated(kind, *case[:2], [d.clone() for d in expanded])
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch.compile does
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # of torch itself
def test_torch_compile(half: bool, kind: str) -> None:
    """Fails if an operator breaks a graph."""
    case = example(2, 5, 8, kind, "bf16-mixed" if half else "fp32")
    compiled = torch.compile(getattr(block, kind), fullgraph=True, backend=BACKEND)
    found = differentiated(kind, *case, half, compiled)
    assert have_run("forward", "backward")
    right = differentiated(kind, *case, half)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_what_is_fused() -> None:
    """Fails if a width, dtype or device goes to kernels that cannot compute it."""
    (x, _), weights, _ = example(1, 3, 8, "mlp")
    assert block.is_fused(x, weights)
    assert not block.is_fused(x.double(), [w.double() for w in weights])
    assert not block.is_fused(x, [*weights[:-1], weights[-1].bfloat16()])
    assert not block.is_fused(torch.empty(1, 3, 65), weights)
    assert block.is_fused(torch.empty(1, 3, 256), weights[:2])
    assert not block.is_fused(torch.empty(1, 3, 257), weights[:2])
    with torch.autocast(x.device.type, torch.bfloat16):
        assert block.is_fused(torch.empty(1, 3, 256), weights)
        assert not block.is_fused(torch.empty(1, 3, 257), weights)
    with torch.autocast(x.device.type, torch.float16):
        assert not block.is_fused(x, weights)
    assert not block.is_fused(x.to("meta"), weights)
