"""The public functions on the operators' CUDA kernels, interpreted.

The operators send CPU tensors to the kernels registered for CUDA, so that checks, shapes, autograd
and vmap run as on a GPU.
"""

import warnings
from typing import Any

import pytest
import torch
from cases.likelihood_cases import example
from cases.triton_interpreted import LIMIT, NATIVE, gradients, worst
from fastmem.kernels import reference, tiles
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastmem
from fastmem.likelihood import operators
from fastmem.likelihood.operators import BACKWARD, BITS, STATS

LIBRARY = torch.library.Library("fastmem", "IMPL")
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
USED: list[str] = []


def send_to_cuda(op: Any) -> None:
    name = op._schema.name

    def kernel(*inputs: Any) -> Any:
        USED.append(name)
        return op.redispatch(CUDA, *inputs)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        LIBRARY.impl(name, kernel, "CPU", allow_override=True)


if not NATIVE:
    for operator in (BITS, BACKWARD, STATS):
        send_to_cuda(operator)


def have_run(*names: str) -> bool:
    """Whether these operators did, in this order; not seen on a GPU, where none is replaced, and
    in direct calls."""
    return NATIVE or bool(operators.DIRECT) or [f"fastmem::{name}" for name in names] == USED


@pytest.fixture(autouse=True, params=[False, True], ids=["", "direct"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls the operators, then their functions directly, as a GPU does by default."""
    direct = dict.fromkeys(("cpu", "cuda"), operators.of_gpu) if request.param else {}
    monkeypatch.setattr(operators, "DIRECT", direct)
    torch.manual_seed(0)
    USED.clear()


def test_direct_calls_are_direct() -> None:
    """Fails if the dispatcher costs its time in a plain call, or the function is called directly
    where a mode must see the operator."""
    hidden, weight, targets = example(N, D, V)
    leaf = torch.nn.Parameter(hidden)
    bits = fastmem.token_bits(leaf, weight, targets)
    bits.sum().backward()  # type: ignore[no-untyped-call]
    bits += 1  # not a view
    assert NATIVE or bool(operators.DIRECT) == (not USED)
    USED.clear()
    with FakeTensorMode() as mode:
        fake = fastmem.token_bits(*map(mode.from_tensor, (hidden, weight, targets)))
    assert isinstance(fake, FakeTensor)


def test_one_derivative() -> None:
    """Fails if a second derivative is not an error, or the first needs more than create_graph."""
    hidden, weight, targets = example(N, D, V)
    hidden.requires_grad_()
    bits = fastmem.token_bits(hidden, weight, targets)
    (first,) = torch.autograd.grad(bits.sum(), hidden)
    bits = fastmem.token_bits(hidden, weight, targets)
    (same,) = torch.autograd.grad(bits.sum(), hidden, create_graph=True)
    assert torch.equal(first, same)
    with pytest.raises(RuntimeError, match="differentiable once"):
        same.sum().backward()  # type: ignore[no-untyped-call]


def test_tiles_of_all_gpus() -> None:
    """Fails if a GPU with 99 KiB of shared memory a program takes the tiles of one with 227."""
    capabilities = [75, 80, 86, 89, 90, 100, 103, 110, 120, 121]
    found = [tiles.generation(capability) for capability in capabilities]
    assert found == [80, 80, 80, 80, 90, 100, 100, 100, 80, 80]


E, N, D, V = 3, 37, 16, 70


def models(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, targets = example(E * N, D, E * V, dtype)
    targets = targets.view(E, N) % V
    return hidden.view(E, N, D), weight.view(E, V, D), targets, torch.randn(E, V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=["", "softcap"])
@pytest.mark.parametrize("shared", [True, False])
def test_bits_and_gradients(shared: bool, options: dict[str, float], dtype: torch.dtype) -> None:
    """Fails if the kernels get another problem than the caller's, or gradients have another place,
    shape or type."""
    hidden, weight, targets, bias = models(dtype)
    targets = targets[0] if shared else targets
    upstream = torch.randn(E, N)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    bits = fastmem.token_bits(leaves[0], leaves[1], targets, leaves[2], **options)
    (bits * upstream).sum().backward()  # type: ignore[no-untyped-call]
    assert have_run("token_bits", "token_bits_backward")
    for e in range(E):
        t = targets if shared else targets[e]
        inputs: list[Tensor | None] = [hidden[e], weight[e], bias[e]]
        double = [x.double() for x in inputs if x is not None]
        exact_bits = reference.token_bits(double[0], double[1], t, double[2], **options)
        assert worst(bits[e], exact_bits) <= LIMIT
        exact = gradients(torch.float64, upstream[e], inputs, t, **options)
        theirs = gradients(dtype, upstream[e], inputs, t, **options)
        for leaf, right, torchs in zip(leaves, exact, theirs, strict=True):
            assert leaf.grad is not None
            assert right is not None
            assert torchs is not None
            assert leaf.grad.dtype == leaf.dtype
            # The norm of all entries: the worst entry alone is luck.
            error, torchs_error = ((x - right).norm() for x in (leaf.grad[e], torchs))
            assert error <= 2 * torchs_error + 1e-6


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_each_gradient_alone(wanted: int) -> None:
    """Fails if a gradient is made only together with another, or (B, T, D) is not B * T rows."""
    hidden, weight, targets, bias = models()
    inputs = [hidden, weight[0], bias[0]]
    leaf = inputs[wanted] = inputs[wanted].clone().requires_grad_()
    fastmem.token_bits(inputs[0], inputs[1], targets, inputs[2]).mean().backward()  # type: ignore[no-untyped-call]
    double = [x.detach().double().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    reference.token_bits(double[0], double[1], targets, double[2]).mean().backward()  # type: ignore[no-untyped-call]
    right = double[wanted].grad
    assert leaf.grad is not None
    assert right is not None
    assert worst(leaf.grad, right) <= 1e-6


@pytest.mark.parametrize("models_of_weight", [True, False])
def test_statistics(models_of_weight: bool) -> None:
    """Fails if statistics are swapped, made unasked, or in another shape."""
    hidden, weight, targets, bias = models()
    if not models_of_weight:
        weight, bias = weight[0], bias[0]
    targets[0, 0], targets[1, 1] = -100, V
    targets[2] = (hidden @ weight.mT + bias.unsqueeze(-2))[2].argmax(-1)
    flags = dict.fromkeys(("entropy", "second_moment", "greedy", "lse", "variance"), True)
    found = fastmem.token_stats(hidden, weight, targets, bias, **flags)
    assert have_run("token_stats")
    exact = reference.token_stats(hidden.double(), weight.double(), targets, bias.double())
    assert exact.is_greedy is not None
    assert 0 < exact.is_greedy.sum() < E * N
    for name, ours, right in zip(found._fields, found, exact, strict=True):
        assert ours is not None
        assert right is not None
        assert torch.equal(ours.isnan(), right.isnan()), name
        assert worst(ours.nan_to_num(), right.double().nan_to_num()) <= LIMIT, name
    for flag, name in zip(flags, found._fields[1:], strict=True):
        alone = fastmem.token_stats(hidden, weight, targets, bias, **{flag: True})
        for other in found._fields[1:]:
            assert (getattr(alone, other) is not None) == (other == name)
        # Each set of flags may have its own tiles, and so its own rounding.
        assert worst(getattr(alone, name).double(), getattr(found, name).double()) <= 1e-5


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_without_bits(poison: float) -> None:
    """Fails if a row that is not finite, or whose target is ignored or outside [0, V), changes
    another row's bits or gradient."""
    hidden, weight, targets = example(N, D, V)
    # Bits without a gradient come from another kernel, which rounds differently.
    expected = fastmem.token_bits(hidden.clone().requires_grad_(), weight, targets).detach()
    hidden[3, 2] = poison
    targets[5], targets[6] = V, -100
    leaf = hidden.clone().requires_grad_()
    bits = fastmem.token_bits(leaf, weight, targets)
    kept = torch.ones(N, dtype=torch.bool)
    kept[[3, 5, 6]] = False
    assert torch.equal(bits[kept], expected[kept])
    assert bits[[3, 5]].isnan().all()
    assert bits[6] == 0
    bits[kept].sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert leaf.grad[kept].isfinite().all()


def test_empty() -> None:
    """Fails if a kernel is launched without rows or models, or a gradient is not 0 then."""
    for hidden, weight in ((torch.ones(0, D), torch.ones(V, D)), (torch.ones(0, N, D),) * 2):
        weight.requires_grad_()
        bits = fastmem.token_bits(hidden, weight, torch.zeros(hidden.shape[:-1]).long())
        assert bits.shape == hidden.shape[:-1]
        bits.sum().backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        assert (weight.grad == 0).all()


def test_vmap_is_the_axis_of_models() -> None:
    """Fails if vmap, under torch.func.grad too, launches once for each entry, or mixes entries."""
    hidden, weight, targets, bias = models()

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor) -> Tensor:
        return fastmem.token_bits(hidden, weight, targets, bias).mean()

    grads = torch.func.vmap(torch.func.grad(loss, (0, 1, 3)))(hidden, weight, targets, bias)
    assert have_run("token_bits", "token_bits_backward")
    for e in range(E):
        double = [x[e].double().requires_grad_() for x in (hidden, weight, bias)]
        reference.token_bits(double[0], double[1], targets[e], double[2]).mean().backward()  # type: ignore[no-untyped-call]
        for ours, leaf in zip(grads, double, strict=True):
            assert leaf.grad is not None
            assert worst(ours[e], leaf.grad) <= 1e-6


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_have_the_strides_of_the_fake_ones(shared: bool) -> None:
    """Fails if a gradient keeps its input's strides: torch.compile expects contiguous gradients."""
    hidden, weight, targets, bias = models()
    inputs = [hidden.mT.contiguous().mT, weight.mT.contiguous().mT, bias.mT.contiguous().mT]
    if shared:
        inputs, targets = [x[0] for x in inputs], targets[0]
    problem = (inputs[0], inputs[1], targets, inputs[2], None, 1.0, -100)
    outputs = BITS(*problem, [False] * 3)
    arguments = (torch.ones(targets.shape), *outputs[1:], *problem, [True] * 3)
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
    ours = BACKWARD(*arguments)
    assert [x.stride() for x in ours] == [x.stride() for x in BACKWARD(*meta)]
