"""kernels/likelihood_ahead.py, interpreted: bits and dhidden of one walk, against float64."""

from typing import Any
from unittest import mock

import pytest
import torch
from cases.likelihood_cases import example
from cases.triton_interpreted import DTYPES, LIMIT, exact_bits, far_apart, gradients, worst
from fastmem.kernels import likelihood, likelihood_ahead, likelihood_backward, tiles
from fastmem.kernels.likelihood_ahead import Ahead
from fastmem.kernels.tiles import GradientTile, ahead_tile, capability
from torch import Tensor

import fastmem
from fastmem.likelihood import operators


def tile_of(D: int, dtype: torch.dtype) -> GradientTile | None:
    return ahead_tile(D, dtype.itemsize, capability(torch.get_default_device()))


def walk(*inputs: Any, **options: Any) -> Ahead:
    """Also where the package takes two walks, as it does where it splits the vocabulary."""
    tile = tile_of(inputs[0].shape[-1], inputs[0].dtype)
    likelihood_ahead.plan.cache_clear()
    with mock.patch.object(likelihood_ahead, "split_count", return_value=1):
        found = likelihood_ahead.forward(*inputs, **options, tile=tile)
    assert found is not None
    return found


def dhidden_of(
    found: Ahead, upstream: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> Tensor:
    hidden = found.made.to(weight.dtype)  # of no other use
    grads = likelihood_backward.backward(
        upstream, hidden, weight, targets, found.state, made=found.made, want_weight=False,
        as_inputs=True, **options,
    )  # fmt: skip
    assert grads.hidden is not None
    return grads.hidden


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("N", "D", "V"),
    [
        (64, 32, 128),
        (150, 31, 127),
        (37, 13, 101),
        (1, 1, 1),
        (65, 64, 97),
        (65, 128, 66),
        (20, 48, 300),
        (130, 200, 70),
        (20, 256, 130),
    ],
)
def test_no_worse_than_twice_pytorch(
    N: int, D: int, V: int, biased: bool, dtype: torch.dtype
) -> None:
    """Fails if bits or any gradient is wrong, or loses more digits than its dtype requires."""
    if tile_of(D, dtype) is None:
        pytest.skip("float32 above D = 128 takes chunks")
    hidden, weight, targets = example(N, D, V, dtype)
    bias = torch.linspace(-1, 1, V).to(dtype) if biased else None
    options: dict[str, Any] = {"temperature": 0.7} if biased else {}
    upstream = torch.linspace(-2, 1, N)
    found = walk(hidden, weight, targets, bias, **options)
    exact = exact_bits(hidden, weight, targets, bias=bias, **options)
    plain = likelihood.forward(hidden, weight, targets, bias, **options).bits
    assert worst(found.bits[0], exact) <= max(LIMIT, 2 * worst(plain[0], exact))
    rest = likelihood_backward.backward(
        upstream, hidden, weight, targets, found.state, bias, want_hidden=False,
        want_bias=biased, **options,
    )  # fmt: skip
    ours = [dhidden_of(found, upstream, weight, targets, **options), *rest[1:]]
    inputs: list[Tensor | None] = [hidden, weight, bias]
    right = gradients(torch.float64, upstream, inputs, targets, **options)
    theirs = gradients(dtype, upstream, inputs, targets, **options)
    for got, its, torchs in zip(ours, right, theirs, strict=True):
        if its is None or got is None or torchs is None:
            assert not biased
            continue
        assert got.dtype == dtype
        got = got.view_as(its)
        assert worst(got, its) <= 2 * worst(torchs, its) + 1e-7
        assert (got - its).norm() <= 2 * (torchs - its).norm() + 1e-6


def rising(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of row n rise from -n to n, but for rounding: up to 100 bits for a target."""
    hidden = torch.arange(70)[:, None].repeat(1, 16) / 16 * scale
    weight = torch.linspace(-1, 1, 201)[:, None].repeat(1, 16)
    targets = torch.arange(70) * 7 % 201
    return hidden.to(dtype), weight.to(dtype), targets


@pytest.mark.parametrize("dtype", DTYPES)
def test_improbable_targets(dtype: torch.dtype) -> None:
    """Fails if powers of a target's base overflow, or a repaired row is not as one alone, or
    another row is repaired too."""
    hidden, weight, targets = rising(dtype, 2.0)
    targets[::3] = 0
    exact = exact_bits(hidden, weight, targets)
    assert ((exact > 60) & (exact < 300)).sum() > 9
    found = walk(hidden, weight, targets)
    # Logits are up to 140, and rounded in either kernel.
    plain = worst(likelihood.forward(hidden, weight, targets).bits[0], exact)
    assert worst(found.bits[0], exact) <= max(LIMIT, 2 * plain)
    upstream = torch.linspace(-1, 2, 70)
    right = gradients(torch.float64, upstream, [hidden, weight, None], targets)[0]
    theirs = gradients(dtype, upstream, [hidden, weight, None], targets)[0]
    assert right is not None
    assert theirs is not None
    assert worst(dhidden_of(found, upstream, weight, targets), right) <= 2 * worst(theirs, right)
    for n in (1, 2, 60, 69):
        part = slice(n, n + 1)
        alone = walk(hidden[part], weight, targets[part])
        assert torch.equal(alone.bits[0], found.bits[0, part])
        assert torch.equal(alone.made, found.made[part])
        assert torch.equal(alone.state[:, 0], found.state[:, 0, part])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logit", [15.0, 25.0])
def test_memorized_tokens(dtype: torch.dtype, logit: float) -> None:
    """Fails if the target's power is in a sum from which it is subtracted: p is 1 - 2e-5, or
    1 - 1e-9, which float32 rounds to 1."""
    weight = torch.zeros(64, 16, dtype=dtype)
    weight[5] = 1.0
    weight[:, 1] = torch.linspace(-1, 1, 64)
    hidden = torch.full((3, 16), logit / 16, dtype=dtype)
    targets = torch.full((3,), 5)
    upstream = torch.ones(3)
    found = walk(hidden, weight, targets)
    right = gradients(torch.float64, upstream, [hidden, weight, None], targets)[0]
    assert right is not None
    ours = dhidden_of(found, upstream, weight, targets)
    floor = 2**-25 if dtype == torch.float16 else 0.0  # half of its smallest
    assert worst(ours, right) <= 0.01 * right.abs().max().item() + floor


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_gradient(dtype: torch.dtype) -> None:
    """Fails if an ignored row, a row with a target outside [0, V) or a row that is not finite
    changes another row's bits or gradient."""
    hidden, weight, targets = example(130, 16, 70, dtype)
    expected = walk(hidden, weight, targets)
    upstream = torch.linspace(-1, 1, 130)
    whole = dhidden_of(expected, upstream, weight, targets)
    poisoned, broken = hidden.clone(), targets.clone()
    poisoned[7, 3], poisoned[100, 0] = torch.nan, torch.inf
    broken[3], broken[129], broken[64] = 70, -1, -100
    upstream[3], upstream[64] = torch.nan, torch.inf  # as of NaN bits, and of an ignored row
    found = walk(poisoned, weight, broken)
    ours = dhidden_of(found, upstream, weight, broken)
    other = torch.ones(130, dtype=torch.bool)
    other[[3, 7, 64, 100, 129]] = False
    assert torch.equal(found.bits[0, other], expected.bits[0, other])
    assert torch.equal(ours[other], whole[other])
    assert found.bits[0, [3, 7, 100, 129]].isnan().all()
    assert found.bits[0, 64] == 0
    assert torch.equal(ours[[3, 64, 129]], torch.zeros(3, 16, dtype=dtype))
    assert ours[[7, 100]].isnan().any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_infinite_logits(dtype: torch.dtype) -> None:
    """Fails if a bias of -inf, of the target, of others or of all, differs from the plain walk."""
    hidden, weight, _ = example(8, 16, 70, dtype)
    targets = torch.tensor([3, 3, 4, 5, 69, 0, 1, 2])
    bias = torch.zeros(70)
    for places in ([3], [4, 69], list(range(70))):
        bias[places] = -torch.inf
        plain = likelihood.forward(hidden, weight, targets, bias).bits
        found = walk(hidden, weight, targets, bias)
        assert torch.equal(found.bits.isnan(), plain.isnan())
        assert torch.equal(found.bits.isinf(), plain.isinf())
        finite = plain.isfinite()
        assert worst(found.bits[finite], plain[finite].double()) <= 1e-5 if finite.any() else True


@pytest.mark.parametrize("shared", [True, False])
def test_models_side_by_side(shared: bool) -> None:
    """Fails if a model reads another model's rows: results must equal the model's alone."""
    E, N, D, V = 2, 37, 16, 140
    hidden, weight, bias = torch.randn(E, N, D), torch.randn(E, V, D), torch.randn(E, V)
    targets = torch.randint(V, (N,) if shared else (E, N))
    upstream = torch.randn(E, N)
    found = walk(hidden, weight, targets, bias)
    together = dhidden_of(found, upstream, weight, targets)
    for e in range(E):
        t = targets if shared else targets[e]
        alone = walk(hidden[e], weight[e], t, bias[e])
        assert torch.equal(found.bits[e], alone.bits[0])
        assert torch.equal(together[e], dhidden_of(alone, upstream[e], weight[e], t))


def test_any_strides() -> None:
    """Fails if a stride is assumed, or an upstream gradient of stride 0 is read as another."""
    hidden, weight, targets = example(40, 16, 130)
    bias = torch.linspace(-1, 1, 130)
    strided = (
        torch.stack([hidden.T, hidden.T], -1)[..., 0].T,
        weight.T.contiguous().T,
        targets.repeat_interleave(2)[::2],
        bias.repeat_interleave(2)[::2],
    )
    plain, found = walk(hidden, weight, targets, bias), walk(*strided)
    assert torch.equal(found.bits, plain.bits)
    ones = torch.ones(()).expand(40)
    ours = dhidden_of(found, ones, strided[1], strided[2])
    assert torch.equal(ours, dhidden_of(plain, torch.ones(40), weight, targets))


def test_rows_more_than_2_31_elements_apart() -> None:
    """Fails if an offset of a load has 32 bits."""
    hidden, weight, targets = example(2, 16, 2, torch.bfloat16)
    plain = walk(hidden, weight, targets)
    upstream = torch.ones(2)
    dhidden = dhidden_of(plain, upstream, weight, targets)
    for far in (0, 1):
        matrices = [hidden, weight]
        matrices[far] = far_apart(matrices[far])
        found = walk(*matrices, targets)
        assert torch.equal(found.bits, plain.bits)
        assert torch.equal(dhidden_of(found, upstream, matrices[1], targets), dhidden)


@pytest.mark.parametrize("temperature", [0.05, 1e-3, 30.0])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_any_size_in_float16(temperature: float, size: float) -> None:
    """Fails if a number in float16 leaves its range before the last rounding."""
    hidden, weight, targets = example(40, 16, 30, torch.float16)
    hidden *= temperature / 16
    upstream = torch.linspace(-2, 1, 40) * size
    found = walk(hidden, weight, targets, temperature=temperature)
    ours = dhidden_of(found, upstream, weight, targets, temperature=temperature)
    right = gradients(
        torch.float64, upstream, [hidden, weight, None], targets, temperature=temperature
    )[0]
    assert right is not None
    assert worst(ours, right) <= 2e-3 * right.abs().max().item()


def test_where_two_walks_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a shape without a tile, no rows, or a split vocabulary is walked once."""
    for N, D, dtype in (
        (40, 272, torch.bfloat16), (40, 31, torch.bfloat16), (40, 160, torch.float32),
        (0, 16, torch.float32),
    ):  # fmt: skip
        hidden, weight, targets = example(N, D, 30, dtype)
        assert likelihood_ahead.forward(hidden, weight, targets) is None
    hidden, weight, targets = example(40, 16, 30)
    assert likelihood_ahead.forward(hidden, weight, targets) is not None
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 132)
    assert likelihood_ahead.forward(*example(40, 16, 5000)) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_public_function(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the products of dhidden are made twice, gradients alone or with retain_graph
    differ, or a second backward pass reads what the first overwrote."""
    monkeypatch.setattr(operators, "DIRECT", dict.fromkeys(("cpu", "cuda"), operators.of_gpu))
    hidden, weight, targets = example(70, 32, 130, dtype)
    backward, made = likelihood_backward.backward, []

    def watched(*inputs: Any, **flags: Any) -> Any:
        made.append(flags["made"] is not None)
        return backward(*inputs, **flags)

    monkeypatch.setattr(likelihood_backward, "backward", watched)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = fastmem.token_bits(leaves[0], leaves[1], targets).mean()
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, leaves)
    alone = torch.autograd.grad(fastmem.token_bits(leaves[0], weight, targets).mean(), leaves[0])
    assert all(map(torch.equal, once, twice))
    assert torch.equal(alone[0], once[0])
    assert made == [True] * 3
    capped = fastmem.token_bits(leaves[0], weight, targets, softcap=3.0)
    capped.mean().backward()  # type: ignore[no-untyped-call]
    assert made[3:] == [False]
