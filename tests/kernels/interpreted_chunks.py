"""Gradients of wide models in chunks of rows, interpreted, against float64 and PyTorch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.likelihood_cases import example
from cases.triton_interpreted import LIMIT, NATIVE, exact_bits, gradients, worst
from fastmem.kernels import chunks, likelihood, likelihood_backward, reduced, tiles
from fastmem.kernels.logits import bias_shift
from fastmem.kernels.tiles import Tile
from torch import Tensor
from torch.library import opcheck

from fastmem import linear_cross_entropy
from fastmem.likelihood import reduced as ahead

RUN: list[str] = []

if not NATIVE:

    @ahead.made_ahead.register_kernel("cpu")
    def made(*inputs: Any) -> Any:
        RUN.append("made")
        return ahead.made_ahead._init_fn(*inputs)


WIDE = [torch.bfloat16, torch.float32]
DTYPES = [*WIDE, torch.float16]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every width is wide, and tiles are small: the interpreter takes seconds."""
    monkeypatch.setattr(tiles, "CHUNKED_ABOVE", {2: 0, 4: 0})
    monkeypatch.setattr(ahead, "DEVICES", ["cuda" if NATIVE else "cpu"])
    RUN.clear()
    monkeypatch.setattr(chunks, "streamed_tile", lambda *_: Tile(16, 32, 16, 4, 2))
    if not NATIVE:  # a program has several tiles
        monkeypatch.setattr(chunks, "multiprocessors", lambda _: 3)


def limit_memory(
    monkeypatch: pytest.MonkeyPatch, rows: int, D: int, V: int, dtype: torch.dtype
) -> None:
    """So that a chunk has at most so many rows."""
    size = dtype.itemsize
    row = size * chunks.padded(V) + 8 * -(-V // 32) + (4 + size) * D
    fixed = 4 * chunks.padded(V) + (4 * V * D + 6 * 64 * D if size == 2 else 0)
    monkeypatch.setattr(chunks, "WORKSPACE", fixed + rows * row)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"temperature": 0.7}], ids=str)
@pytest.mark.parametrize(("N", "D", "V"), [(64, 32, 128), (50, 40, 101), (37, 13, 70), (1, 1, 1)])
def test_no_worse_than_twice_pytorch(
    N: int,
    D: int,
    V: int,
    options: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if a gradient is not the derivative, or a chunk of rows is left out or added twice. In
    float32 the rounding of one number is the largest error: the worst of three draws is compared.
    """
    limit_memory(monkeypatch, 20, D, V, dtype)
    bias = torch.linspace(-1, 1, V).to(dtype)
    upstream = torch.linspace(-2, 1, N)
    errors = []
    for seed in range(3 if dtype == torch.float32 else 1):
        hidden, weight, targets = example(N, D, V, dtype, seed)
        hidden = hidden / D**0.5
        inputs: list[Tensor | None] = [hidden, weight, bias]
        state = likelihood.forward(hidden, weight, targets, bias, **options).state
        found = likelihood_backward.backward(
            upstream, hidden, weight, targets, state, bias, want_bias=True, **options
        )
        exact = gradients(torch.float64, upstream, inputs, targets, **options)
        torchs = gradients(dtype, upstream, inputs, targets, **options)
        assert all(ours.dtype == dtype for ours in found)
        each = zip(found, torchs, exact, strict=True)
        errors.append([(worst(x[0], right), worst(y, right)) for x, y, right in each])
    for each in zip(*errors, strict=True):
        ours, theirs = (max(draws) for draws in zip(*each, strict=True))
        assert ours <= 2 * theirs + 1e-7


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("spread", [1.0, 40.0, 500.0])
@pytest.mark.parametrize(("N", "D", "V"), [(64, 32, 128), (50, 40, 101), (1, 1, 1)])
def test_reduced(
    N: int, D: int, V: int, spread: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if bits or gradients of three products are off, above all where the logits of two tiles
    are far apart, or where targets are almost certain."""
    limit_memory(monkeypatch, 20, D, V, dtype)
    hidden, weight, targets = example(N, D, V, dtype)
    hidden = (hidden.float() * spread / D**0.5).to(dtype)
    if spread > 1:  # every second target is the greatest logit
        greatest = (hidden.double() @ weight.double().mT).argmax(1)
        targets = torch.where(torch.arange(N) % 2 == 0, greatest, targets)
    bias = torch.linspace(-1, 1, V).to(dtype)
    upstream = torch.linspace(0.5, 1, N)
    shift = bias_shift(bias, None)[0]
    bits, found = reduced.reduced(
        upstream, hidden, weight, targets, bias, shift, 1.0, -100, (True, True, True)
    )
    right = exact_bits(hidden, weight, targets, bias=bias)
    assert worst(bits, right) <= LIMIT + 2e-6 * right.abs().max().item()
    inputs: list[Tensor | None] = [hidden, weight, bias]
    exact = gradients(torch.float64, upstream, inputs, targets)
    torchs = gradients(dtype, upstream, inputs, targets)
    for ours, theirs, truth in zip(found, torchs, exact, strict=True):
        assert ours.dtype == dtype
        assert worst(ours, truth) <= 2 * worst(theirs, truth) + 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_gradient(dtype: torch.dtype) -> None:
    """Fails if an ignored row, or a row with a target outside [0, V), changes a gradient."""
    hidden, weight, targets = example(40, 16, 70, dtype)
    targets[3], targets[39], targets[20] = 70, -1, 11
    upstream = torch.ones(40)
    upstream[3], upstream[20] = torch.nan, torch.inf
    kept = (targets >= 0) & (targets < 70) & (targets != 11)
    state = likelihood.forward(hidden, weight, targets, ignore_index=11).state
    found = likelihood_backward.backward(upstream, hidden, weight, targets, state, ignore_index=11)
    exact = gradients(
        torch.float64, torch.ones(int(kept.sum())), [hidden[kept], weight, None], targets[kept]
    )
    several = [found]
    if dtype in WIDE:
        bits, ours = reduced.reduced(
            torch.ones(40), hidden, weight, targets, None, None, 1.0, 11, (True, True, False)
        )
        assert bits.isnan().sum() == 2
        assert bits[20] == 0
        several.append(ours)
    for gradient in several:
        dhidden, dweight = (x.view(-1, 16) for x in gradient[:2])
        assert torch.equal(dhidden[~kept], torch.zeros_like(dhidden[~kept]))
        assert worst(dhidden[kept], exact[0]) <= 16 * torch.finfo(dtype).eps
        assert worst(dweight, exact[1]) <= 64 * torch.finfo(dtype).eps


def test_a_bad_row_is_bad_alone() -> None:
    """Fails if a hidden row that is not finite changes the hidden gradient of another row."""
    hidden, weight, targets = example(40, 16, 70, torch.bfloat16)
    arguments = (weight, targets, None, None, 1.0, -100, (True, False, False))
    _, clean = reduced.reduced(torch.ones(40), hidden, *arguments)
    hidden[7] = torch.nan
    bits, found = reduced.reduced(torch.ones(40), hidden, *arguments)
    assert bits.isnan().nonzero().tolist() == [[7]]
    assert found.hidden[7].isnan().all()
    others = torch.arange(40) != 7
    assert torch.equal(found.hidden[others], clean.hidden[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_models(dtype: torch.dtype) -> None:
    """Fails if models share a gradient."""
    hidden, weight, targets = example(60, 16, 60, dtype)
    hidden, weight, targets = (
        hidden.view(3, 20, 16),
        weight.view(3, 20, 16),
        targets.view(3, 20) % 20,
    )
    bias = torch.linspace(-1, 1, 60, dtype=dtype).view(3, 20)
    state = likelihood.forward(hidden, weight, targets, bias).state
    arguments = (torch.ones(3, 20), hidden, weight, targets, state, bias)
    fresh = likelihood_backward.backward(*arguments, want_bias=True)
    for e in range(3):
        alone = likelihood_backward.backward(
            torch.ones(20), hidden[e], weight[e], targets[e], state[:, e : e + 1], bias[e],
            want_bias=True,
        )  # fmt: skip
        for one, all_models in zip(alone, fresh, strict=True):
            assert torch.equal(one[0], all_models[e])


@pytest.mark.parametrize("workspace", [0, -1, "many", 4800])
def test_workspace_that_cannot_be(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a workspace of nothing, or too small for one row, ends in another error."""
    monkeypatch.setattr(chunks, "WORKSPACE", workspace)
    hidden, weight, targets = example(40, 16, 70, torch.bfloat16)
    state = likelihood.forward(hidden, weight, targets).state
    with pytest.raises(ValueError, match=f"(?s){workspace}.*|one row"):
        likelihood_backward.backward(torch.ones(40), hidden, weight, targets, state)


def test_memory_of_the_default() -> None:
    """Fails if the head of GPT-2 XL, 65,536 rows, takes more than a GiB or leaves much of it."""
    fixed, row = 4 * 50257 * 1600 + 6 * 64 * 1600, 2 * chunks.padded(50257) + 8 * 197 + 6 * 1600
    rows = chunks.rows_of_a_chunk(65536, row, fixed, 128)
    assert rows % 128 == 0
    assert 0.9 * 2**30 < fixed + rows * row <= 2**30


def test_memory_of_the_largest_heads() -> None:
    """Fails if heads whose gradient in float32 takes more than a GiB are refused, have chunks of a
    few rows, or a matrix of more than a GiB: that of Llama 3 8B, on a device without memory."""
    weight = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    for N, least in ((40, 40), (65536, 3200)):
        hidden = torch.empty(N, 4096, dtype=torch.bfloat16, device="meta")
        sums = chunks.Sums(hidden, weight, chunks.Gradients(hidden, weight, None))
        assert least <= sums.rows <= N
        assert sums.matrix.nbytes <= 2**30


def test_the_same_bytes_twice() -> None:
    """Fails if a sum depends on the order of programs."""
    hidden, weight, targets = example(40, 16, 70, torch.bfloat16)
    arguments = (hidden, weight, targets, None, None, 1.0, -100, (True, True, False))
    first, second = (reduced.reduced(torch.ones(40), *arguments) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].weight, second[1].weight)


def plain(
    input: Tensor, matrix: Tensor, target: Tensor, bias: Tensor, reduction: str, **weights: Any
) -> Tensor:
    """The definition, in the dtype of the inputs."""
    nats = F.cross_entropy(
        F.linear(input, matrix, bias).to(torch.promote_types(input.dtype, torch.float32)),
        target,
        reduction="none",
    )
    factor = torch.ones_like(nats)
    for name, weight in weights.items():
        factor = factor * (weight if name == "token_weight" else weight[target.clamp_min(0)])
    factor = torch.where(target == -100, 0, factor)
    total = (nats * factor).sum()
    return total if reduction == "sum" else total / factor.sum()


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("named", ["", "token_weight", "weight", "token_weight weight"])
def test_linear_cross_entropy(reduction: str, named: str, dtype: torch.dtype) -> None:
    """Fails if the reduced loss or its gradients differ from the definition, if rows that are
    ignored count, or if the three products are not used."""
    hidden, matrix, target = example(60, 40, 101, dtype)
    hidden, bias = hidden / 6, torch.linspace(-1, 1, 101).to(dtype)
    target[::7] = -100
    values = {"token_weight": torch.linspace(-0.5, 2, 60), "weight": torch.linspace(0.5, 2, 101)}
    weights = {name: values[name] for name in named.split()}

    def run(function: Any, kind: torch.dtype, **more: Any) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in (hidden, matrix, bias)]
        more = {name: x.to(torch.promote_types(kind, torch.float32)) for name, x in more.items()}
        loss = function(*leaves, more)
        return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]

    def ours(h: Tensor, w: Tensor, b: Tensor, more: dict[str, Tensor]) -> Tensor:
        return linear_cross_entropy(h, w, target, linear_bias=b, reduction=reduction, **more)

    def definition(h: Tensor, w: Tensor, b: Tensor, more: dict[str, Tensor]) -> Tensor:
        return plain(h, w, target, b, reduction, **more)

    found = run(ours, dtype, **weights)
    assert NATIVE or RUN == ["made"]
    theirs, right = (run(definition, kind, **weights) for kind in (dtype, torch.float64))
    assert abs(found[0] - right[0]) <= 1e-5 * abs(right[0]) + 1e-5
    for mine, other, truth in zip(found[1:], theirs[1:], right[1:], strict=True):
        assert mine.dtype == dtype
        # By norm: the factor 3 rounds each gradient once more.
        assert (mine.double() - truth).norm() <= 2 * (other.double() - truth).norm() + 1e-7


def test_what_three_products_do_not_take() -> None:
    """Fails if a loss that needs the bits of rows, or no gradient, takes the reduced way."""
    hidden, matrix, target = example(20, 16, 30, torch.bfloat16)
    leaf = hidden.clone().requires_grad_()
    learned = torch.ones(20, requires_grad=True)
    linear_cross_entropy(hidden, matrix, target)
    linear_cross_entropy(leaf, matrix, target, reduction="none")
    linear_cross_entropy(leaf, matrix, target, softcap=3.0)
    linear_cross_entropy(leaf, matrix, target, token_weight=learned).backward()
    assert learned.grad is not None
    assert RUN == []


def test_the_operator() -> None:
    """Fails if the fake implementation or autograd's registration is wrong."""
    hidden, matrix, target = example(20, 16, 30, torch.bfloat16)
    hidden.requires_grad_()
    arguments = (hidden, matrix, target, None, torch.ones(20), 1.0, -100, [True, False, False])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    opcheck(ahead.made_ahead, arguments, test_utils=checks)


@pytest.mark.parametrize("V", [70, 64, 5])
def test_products_have_even_sizes(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a product has an odd size: V = 50257 instead of 50304 makes it 6 times as slow."""
    sizes: list[int] = []

    def told(function: Any) -> Any:
        def call(out: Tensor, a: Tensor, b: Tensor) -> None:
            sizes.extend((*a.shape, b.shape[1]))
            function(out, a, b)

        return call

    for name in ("product", "add_product"):
        monkeypatch.setattr(chunks, name, told(getattr(chunks, name)))
    hidden, weight, targets = example(128, 64, V, torch.bfloat16)
    bias = torch.zeros(V).bfloat16()
    arguments = (bias, torch.zeros(()), 1.0, -100, (True, True, True))
    reduced.reduced(torch.ones(128), hidden, weight, targets, *arguments)
    state = likelihood.forward(hidden, weight, targets).state
    likelihood_backward.backward(torch.ones(128), hidden, weight, targets, state)
    assert sizes
    assert {size % 64 for size in sizes if size > 1} <= {0}


def test_a_second_derivative_is_refused() -> None:
    """Fails if a penalty of gradients is left out of the gradients, in silence."""
    hidden, weight, targets = example(20, 16, 60, torch.bfloat16)
    leaf = hidden.requires_grad_()
    loss = linear_cross_entropy(leaf, weight, targets)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(loss, leaf, create_graph=True)
