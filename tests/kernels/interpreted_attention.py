"""kernels/attention.py, interpreted: against float64, and as models and torch.compile call it."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.triton_interpreted import BACKEND, NATIVE, untouched
from fastmem.kernels import attention as kernels, reference
from torch import Tensor
from torch.library import opcheck

from fastmem import GPT, GPTConfig
from fastmem.models import attention
from fastmem.models.engine import PlainEngine, stacked

DTYPES = [torch.float32, torch.bfloat16]
RUN: list[str] = []

if not NATIVE:

    @attention.fused_attention.register_kernel("cpu")
    def forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
        RUN.append("forward")
        return attention.fused_attention._init_fn(qkv)  # type: ignore[no-any-return]

    @attention.fused_backward.register_kernel("cpu")
    def backward(*inputs: Tensor) -> Tensor:
        RUN.append("backward")
        return attention.fused_backward._init_fn(*inputs)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not NATIVE:
        monkeypatch.setattr(attention, "DEVICES", ["cpu"])
    torch.manual_seed(0)
    RUN.clear()


def have_run(*names: str) -> bool:
    """Whether these kernels did, in this order; not seen on a GPU."""
    return NATIVE or list(names) == RUN


def example(N: int, T: int, H: int, W: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """qkv with sharp attention, and the gradient of the output."""
    return 2 * torch.randn(N, T, 3, H, W).to(dtype), torch.randn(N, T, H, W).to(dtype)


def ours(qkv: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = kernels.forward(qkv)
    return out, kernels.backward(dout, qkv, out, lse)


def plain(function: Any, qkv: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, dout)[0]


def exact(qkv: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    return plain(reference.attention, qkv.double(), dout.double())


def pytorchs(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def check(qkv: Tensor, dout: Tensor) -> None:
    """Fails if the output, or a gradient of q, k or v, is off by over twice PyTorch's own error."""
    right, theirs = exact(qkv, dout), plain(pytorchs, qkv, dout)
    for found, torchs, wanted in zip(ours(qkv, dout), theirs, right, strict=True):
        assert (found.dtype, found.shape) == (qkv.dtype, wanted.shape)
        parts = zip(*(x.double().reshape(*wanted.shape[:2], -1, *wanted.shape[-2:]).unbind(2)
                      for x in (found, torchs, wanted)), strict=True)  # fmt: skip
        for part, torchs_part, right_part in parts:
            error, torchs_error = ((x - right_part).norm() for x in (part, torchs_part))
            assert error <= 2 * torchs_error + 1e-6 * (1 + right_part.norm())


# Each with an edge: T, a panel's 64 rows; H, which programs divide unevenly; W, odd or wide.
SHAPES = [
    (2, 63, 16, 2), (1, 1, 1, 1), (3, 5, 3, 1), (2, 64, 2, 16), (1, 65, 5, 3), (1, 130, 4, 4),
    (1, 256, 9, 2), (1, 128, 2, 10), (2, 17, 13, 5), (1, 33, 3, 12), (1, 2, 11, 1), (2, 40, 3, 64),
    (1, 64, 2, 33),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_twice_pytorch(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Fails if a row, head, panel or gradient is wrong, or not written."""
    check(*example(*shape, dtype))


@pytest.mark.parametrize("W", range(1, 17))
def test_any_number_of_heads(W: int) -> None:
    """Fails if a head of a program that is not full is lost, or read from its neighbour."""
    for H in (1, 2, 5, 9, 16):
        check(*example(1, 3, H, W, torch.bfloat16))


def test_large_scores() -> None:
    """Fails if a score overflows, or the peak of a later panel is ignored."""
    qkv, dout = example(1, 150, 2, 4, torch.float32)
    qkv[:, :, 0] *= 20
    qkv[:, :, 1] *= torch.linspace(0, 1, 150)[:, None, None]
    check(qkv, dout)


@pytest.mark.parametrize("T", [9, 70])
def test_a_sequence_that_is_not_finite(T: int) -> None:
    """Fails if it changes another sequence, or a token before it."""
    qkv, dout = example(3, T, 4, 2, torch.bfloat16)
    expected = ours(qkv, dout)
    qkv[1, T - 2] = torch.nan
    for found, right in zip(ours(qkv, dout), expected, strict=True):
        assert torch.equal(found[[0, 2]], right[[0, 2]])
        assert found[1, T - 2 :].isnan().any()


def test_the_same_bytes_twice() -> None:
    """Fails if an order of summation is left to chance."""
    qkv, dout = example(2, 130, 9, 2, torch.bfloat16)
    first, second = ours(qkv, dout), ours(qkv, dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sequences_more_than_2_31_elements_apart() -> None:
    """Fails if an offset has 32 bits. The kernels get a length of which they read one panel."""
    N, T, H, W = 2, 64, 16, 2
    qkv, dout = example(N, T, H, W, torch.bfloat16)
    out, dqkv = ours(qkv, dout)
    length, D = 2**25, H * W
    assert length * 3 * D > 2**31

    def apart(x: Tensor) -> Tensor:
        stride = x[0, 0].numel()
        memory = untouched((length + T) * stride, torch.bfloat16)
        return memory.as_strided((N, T, stride), (length * stride, stride, 1)).copy_(x.flatten(2))

    far = [apart(x) for x in (qkv, torch.zeros_like(out), dout, torch.zeros_like(dqkv))]
    lse = untouched(2 * (length + T) * H, torch.bfloat16).view(torch.float32)
    arguments = (math.log2(math.e) * W**-0.5, length, D, H)
    constants = kernels.constants(T, H, W, kernels.fastest_tile(H, W, 2), "ieee")
    kernels.forward_kernel[(N, 2, 1)](far[0], far[1], lse, *arguments, **constants)
    constants["OWNS_QUERIES"] = False
    kernels.backward_kernel[(N, 2, 1)](*far[:3], lse, far[3], *arguments, **constants)
    assert torch.equal(far[1], out.flatten(2))
    assert torch.equal(far[3], dqkv.flatten(2))


@pytest.mark.parametrize(("N", "T"), [(0, 3), (2, 0)])
def test_nothing_to_do(N: int, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an empty grid is launched."""
    monkeypatch.setattr(kernels, "forward_kernel", None)
    monkeypatch.setattr(kernels, "backward_kernel", None)
    qkv, dout = example(N, T, 2, 2, torch.float32)
    out, dqkv = ours(qkv, dout)
    assert (out.shape, dqkv.shape) == (dout.shape, qkv.shape)


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


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-true"])
def test_models_train_by_the_kernels(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if models together do not use the kernels, or use them on other data."""
    kind = torch.bfloat16 if precision == "bf16-true" else torch.float32
    losses, found = gradients(precision, kind)
    assert have_run("forward", "forward", "backward", "backward")
    monkeypatch.setattr(attention, "DEVICES", [])
    torchs_losses, torchs = gradients(precision, kind)
    assert have_run("forward", "forward", "backward", "backward")
    right_losses, right = gradients("fp32", torch.float64, kind)
    for e in range(3):
        error, torchs_error = ((x[e].double() - right[e]).norm() for x in (found, torchs))
        assert error <= 2 * torchs_error + 1e-6 * right[e].norm()
    error, torchs_error = ((x.double() - right_losses).norm() for x in (losses, torchs_losses))
    assert error <= 2 * torchs_error + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator(dtype: torch.dtype) -> None:
    """Fails if what is registered (shapes, strides, gradient) disagrees with what it does."""
    qkv, _ = example(2, 5, 3, 2, dtype)
    strided = qkv.flip(0).transpose(0, 1).contiguous().transpose(0, 1).flip(0)
    for x in (qkv, strided):
        found = opcheck(attention.fused_attention, (x.detach().requires_grad_(),))
        assert set(found.values()) == {"SUCCESS"}


def test_any_strides() -> None:
    """Fails if the operator takes the strides of an input for those of a contiguous one."""
    qkv, dout = example(2, 5, 3, 2, torch.float32)
    right = ours(qkv, dout)
    strided = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    found = plain(attention.attention, strided, dout[..., :1].expand(dout.shape))
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[1], ours(qkv, dout[..., :1].expand(dout.shape).contiguous())[1])


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # of torch itself
def test_torch_compile() -> None:
    """Fails if the operator breaks a graph."""
    qkv, dout = example(2, 70, 3, 2, torch.float32)
    compiled = torch.compile(attention.attention, fullgraph=True, backend=BACKEND)
    found = plain(compiled, qkv, dout)
    assert have_run("forward", "backward")
    assert all(torch.equal(a, b) for a, b in zip(found, ours(qkv, dout), strict=True))


def test_one_derivative() -> None:
    """Fails if a second derivative is silently wrong."""
    qkv, dout = example(1, 5, 3, 2, torch.float32)
    leaf = qkv.requires_grad_()
    (grad,) = torch.autograd.grad(attention.attention(leaf), leaf, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()  # type: ignore[no-untyped-call]
