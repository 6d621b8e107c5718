"""kernels/likelihood_backward.py, interpreted: gradients against float64; both passes together."""

from typing import Any

import pytest
import torch
from cases.likelihood_cases import example
from cases.triton_interpreted import DTYPES, far_apart, gradients, quick, untouched, worst
from fastmem.kernels import likelihood, likelihood_backward
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def test_any_strides() -> None:
    """Fails if a pass assumes a stride."""
    hidden, weight, targets = example(40, 16, 130)
    bias = torch.linspace(-1, 1, 130)
    upstream = torch.linspace(-1, 1, 40)
    strided = (
        torch.stack([hidden.T, hidden.T], -1)[..., 0].T,  # transposed, every second element
        weight.flip(0).repeat_interleave(3, 0)[::3].contiguous().flip(0).T.contiguous().T,
        targets.repeat_interleave(2)[::2],
    )
    spread = bias.repeat_interleave(2)[::2]
    plain = likelihood.forward(hidden, weight, targets, bias)
    found = likelihood.forward(*strided, spread)
    assert strided[0].stride(-1) != 1
    assert worst(found.bits, plain.bits.double()) <= 1e-5
    expected = likelihood_backward.backward(
        upstream, hidden, weight, targets, plain.state, bias, want_bias=True
    )
    ours = likelihood_backward.backward(
        upstream.repeat_interleave(2)[::2], *strided, found.state, spread, want_bias=True
    )
    for got, wanted in zip(ours, expected, strict=True):
        assert got is not None
        assert wanted is not None
        assert worst(got, wanted.double()) <= 1e-5
    # One upstream gradient for all rows, as from sum(): a stride of 0.
    ones = likelihood_backward.backward(
        torch.ones(()).expand(40), hidden, weight, targets, found.state
    )
    assert ones.hidden is not None
    assert ones.hidden.isfinite().all()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("splits", [1, 2])
def test_models_side_by_side(splits: int, shared: bool) -> None:
    """Fails if a model reads another model's rows: bits must equal the model's bits alone."""
    E, N, D, V = 2, 37, 16, 140
    hidden, weight, bias = torch.randn(E, N, D), torch.randn(E, V, D), torch.randn(E, V)
    targets = torch.randint(V, (N,) if shared else (E, N))
    upstream = torch.randn(E, N)
    flags: dict[str, Any] = {"lse": True, "entropy": True, "greedy": True, "splits": splits}
    found = likelihood.forward(hidden, weight, targets, bias, **flags)
    grads = likelihood_backward.backward(
        upstream, hidden, weight, targets, found.state, bias, want_bias=True, splits=splits
    )
    for e in range(E):
        t = targets if shared else targets[e]
        alone = likelihood.forward(hidden[e], weight[e], t, bias[e], **flags)
        for name in ("bits", "lse_bits", "entropy_bits", "is_greedy"):
            assert torch.equal(getattr(found, name)[e], getattr(alone, name)[0]), name
        single = likelihood_backward.backward(
            upstream[e], hidden[e], weight[e], t, alone.state, bias[e],
            want_bias=True, splits=splits,
        )  # fmt: skip
        for together, own in zip(grads, single, strict=True):
            assert together is not None
            assert own is not None
            assert torch.equal(together[e], own[0])


@pytest.mark.parametrize(("E", "N"), [(1, 0), (0, 3)])
def test_nothing_to_do(E: int, N: int) -> None:
    """Fails if an empty grid is launched, or a gradient without rows is not 0."""
    hidden, weight = torch.randn(E, N, 4), torch.randn(E, 5, 4)
    targets = torch.zeros(E, N, dtype=torch.int64)
    found = likelihood.forward(hidden, weight, targets, entropy=True)
    assert found.bits.shape == (E, N)
    grads = likelihood_backward.backward(torch.ones(E, N), hidden, weight, targets, found.state)
    assert grads.weight is not None
    assert torch.equal(grads.weight, torch.zeros(E, 5, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=["", "softcap"])
@pytest.mark.parametrize(
    ("N", "D", "V", "splits"),
    [
        (64, 32, 128, 1),
        (150, 31, 127, 3),
        (37, 13, 101, 1),
        (1, 1, 1, 1),
        (12, 528, 30, 1),
        (65, 64, 97, 1),
        (65, 128, 66, 2),
    ],
)
def test_gradients_no_worse_than_twice_pytorch(
    N: int, D: int, V: int, splits: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Fails if a gradient is not the derivative, or loses more digits than its dtype requires.

    With float32 logits of 528 terms, the rounding of one logit is the largest error of either
    implementation: the worst of three draws is compared.
    """
    ours, theirs = [], []
    for seed in range(3 if (D, dtype) == (528, torch.float32) else 1):
        hidden, weight, targets = example(N, D, V, dtype, seed)
        bias = torch.linspace(-1, 1, V).to(dtype)
        upstream = torch.linspace(-2, 1, N)
        inputs: list[Tensor | None] = [hidden, weight, bias]
        state = likelihood.forward(hidden, weight, targets, bias, **options).state
        found = likelihood_backward.backward(
            upstream, hidden, weight, targets, state, bias, want_bias=True, splits=splits, **options
        )
        exact = gradients(torch.float64, upstream, inputs, targets, **options)
        torchs = gradients(dtype, upstream, inputs, targets, **options)
        assert all(gradient is not None and gradient.dtype == dtype for gradient in found)
        ours.append([worst(g[0], e) for g, e in zip(found, exact, strict=True)])
        theirs.append([worst(g, e) for g, e in zip(torchs, exact, strict=True)])
    for i, name in enumerate(found._fields):
        limit = 2 * max(errors[i] for errors in theirs) + 1e-7
        assert all(errors[i] <= limit for errors in ours), name


def test_gradients_of_the_largest_vocabulary() -> None:
    """Fails if a column or an offset loses digits at V = 2**20. Wide tiles save time."""
    V = 2**20 - 1
    hidden, weight, _ = example(2, 1, V)
    targets = torch.tensor([V - 1, 2**19])
    upstream = torch.tensor([1.0, -0.5])
    state = likelihood.forward(
        hidden, weight, targets, tile=quick(likelihood.Tile(2, 2**14, 2, 4, 1))
    ).state
    exact = gradients(torch.float64, upstream, [hidden, weight, None], targets)
    theirs = gradients(torch.float32, upstream, [hidden, weight, None], targets)
    wide = quick(likelihood_backward.GradientTile(2, 2**14, 2, 2, 4, 1))
    tall = quick(likelihood_backward.GradientTile(2**14, 2, 2, 2, 4, 1))
    arguments = (upstream, hidden, weight, targets, state)
    dhidden = likelihood_backward.backward(*arguments, want_weight=False, tile=wide).hidden
    dweight = likelihood_backward.backward(*arguments, want_hidden=False, tile=tall).weight
    assert worst(dhidden[0], exact[0]) <= 2 * worst(theirs[0], exact[0]) + 1e-7
    assert worst(dweight[0], exact[1]) <= 2 * worst(theirs[1], exact[1]) + 1e-7


def test_gradients_of_the_largest_width() -> None:
    """Fails if a piece of a row is left out."""
    hidden, weight, targets = example(3, 8192, 40, torch.bfloat16)
    hidden /= 64
    upstream = torch.linspace(-2, 1, 3)
    small = quick(likelihood.Tile(16, 64, 256, 4, 1))
    state = likelihood.forward(hidden, weight, targets, tile=small).state
    ours = likelihood_backward.backward(upstream, hidden, weight, targets, state)
    exact = gradients(torch.float64, upstream, [hidden, weight, None], targets)
    theirs = gradients(torch.bfloat16, upstream, [hidden, weight, None], targets)
    for got, right, torchs in zip(ours[:2], exact[:2], theirs[:2], strict=True):
        assert worst(got[0], right) <= 2 * worst(torchs, right)


def test_gradients_of_rows_more_than_2_31_elements_apart() -> None:
    """Fails if an offset of a load has 32 bits."""
    hidden, weight, targets = example(2, 16, 2, torch.bfloat16)
    upstream = torch.ones(2)
    state = likelihood.forward(hidden, weight, targets).state
    plain = likelihood_backward.backward(upstream, hidden, weight, targets, state)
    for far in (0, 1):
        matrices = [hidden, weight]
        matrices[far] = far_apart(matrices[far])
        ours = likelihood_backward.backward(upstream, *matrices, targets, state)
        assert torch.equal(ours.hidden, plain.hidden)
        assert torch.equal(ours.weight, plain.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_memorized_tokens(dtype: torch.dtype) -> None:
    """Fails if p is rounded before 1 is subtracted: p is 1 - 2e-5, and the gradient is 2e-5."""
    weight = torch.zeros(64, 16, dtype=dtype)
    weight[5] = 1.0
    hidden = torch.full((3, 16), 15 / 16, dtype=dtype)
    targets = torch.full((3,), 5)
    upstream = torch.ones(3)
    state = likelihood.forward(hidden, weight, targets).state
    ours = likelihood_backward.backward(upstream, hidden, weight, targets, state)
    exact = gradients(torch.float64, upstream, [hidden, weight, None], targets)
    assert ours.hidden is not None
    assert exact[0] is not None
    assert worst(ours.hidden[0], exact[0]) <= 0.01 * exact[0].abs().max().item()


def test_small_upstream_gradients_survive_float16() -> None:
    """Fails if a gradient is rounded to float16 unscaled: 1e-8 would be 0."""
    hidden, weight, targets = example(70, 16, 130, torch.float16)
    upstream = torch.full((70,), 1e-3)
    state = likelihood.forward(hidden, weight, targets).state
    ours = likelihood_backward.backward(upstream, hidden, weight, targets, state)
    exact = gradients(torch.float64, upstream, [hidden, weight, None], targets)
    for got, right in zip(ours[:2], exact[:2], strict=True):
        assert got is not None
        assert right is not None
        assert worst(got[0], right) <= 2e-3 * right.abs().max().item()


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_each_gradient_alone(wanted: str) -> None:
    """Fails if a gradient is made only together with another, or differs alone."""
    hidden, weight, targets = example(40, 48, 130)
    bias = torch.linspace(-1, 1, 130)
    upstream = torch.linspace(-1, 1, 40)
    state = likelihood.forward(hidden, weight, targets, bias).state
    arguments = (upstream, hidden, weight, targets, state, bias)
    flags = {f"want_{name}": name == wanted for name in ("hidden", "weight", "bias")}
    alone = likelihood_backward.backward(*arguments, **flags)
    together = likelihood_backward.backward(*arguments, want_bias=True)
    for name in alone._fields:
        if name == wanted:
            assert torch.equal(getattr(alone, name), getattr(together, name))
        else:
            assert getattr(alone, name) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("splits", [1, 2])
def test_rows_without_a_gradient(splits: int, dtype: torch.dtype) -> None:
    """Fails if an ignored row, or a row with a target outside [0, V), changes a gradient."""
    hidden, weight, targets = example(130, 16, 70, dtype)
    targets[3], targets[129], targets[64] = 70, -1, 11
    upstream = torch.ones(130)
    upstream[3], upstream[64] = torch.nan, torch.inf  # as of NaN bits, and of an ignored row
    kept = (targets >= 0) & (targets < 70) & (targets != 11)
    found = likelihood.forward(hidden, weight, targets, ignore_index=11)
    ours = likelihood_backward.backward(
        upstream, hidden, weight, targets, found.state, ignore_index=11, splits=splits
    )
    assert ours.hidden is not None
    assert ours.weight is not None
    assert torch.equal(ours.hidden[0, ~kept], torch.zeros(int((~kept).sum()), 16))
    exact = gradients(torch.float64, upstream[kept], [hidden[kept], weight, None], targets[kept])
    assert exact[0] is not None
    assert exact[1] is not None
    rounding = torch.finfo(dtype).eps
    assert worst(ours.hidden[0, kept], exact[0]) <= 1e-5 + 8 * rounding
    assert worst(ours.weight[0], exact[1]) <= 1e-4 + 64 * rounding


def test_columns_more_than_2_31_elements_apart() -> None:
    """Fails if a column's offset has 32 bits: the last column is over 2**31 elements away."""
    stride, V, D = 2**22 + 16, 4, 528
    hidden, weight, targets = example(4, D, V, torch.float16)
    hidden /= 64
    memory = untouched(stride * (D - 1) + V, torch.float16)
    apart = memory.as_strided((V, D), (1, stride)).copy_(weight)
    state = likelihood.forward(
        hidden, weight, targets, tile=quick(likelihood.Tile(16, 16, 512, 4, 2))
    ).state
    for tile in (
        likelihood_backward.GradientTile(16, 16, 512, 512, 4, 1),
        likelihood_backward.GradientTile(16, 16, 1024, 1024, 4, 1),
    ):
        plain, ours = (
            likelihood_backward.backward(
                torch.ones(4), hidden, matrix, targets, state, want_weight=False, tile=quick(tile)
            )
            for matrix in (weight, apart)
        )
        assert torch.equal(ours.hidden, plain.hidden)


@pytest.mark.parametrize("temperature", [0.05, 1e-3, 30.0])
def test_any_temperature_in_float16(temperature: float) -> None:
    """Fails if a number rounded to float16 leaves its range: it has a factor of 1 / temperature."""
    hidden, weight, targets = example(40, 16, 30, torch.float16)
    hidden *= temperature / 16
    upstream = torch.linspace(-2, 1, 40)
    state = likelihood.forward(hidden, weight, targets, temperature=temperature).state
    ours = likelihood_backward.backward(
        upstream, hidden, weight, targets, state, temperature=temperature
    )
    exact = gradients(
        torch.float64, upstream, [hidden, weight, None], targets, temperature=temperature
    )
    for got, right in zip(ours[:2], exact[:2], strict=True):
        assert got is not None
        assert right is not None
        assert worst(got[0], right) <= 2e-3 * right.abs().max().item()


def test_models_that_are_their_own_weight() -> None:
    """Fails if passing one tensor as both hidden and weight changes a gradient."""
    both, targets = torch.randn(1, 20, 16), torch.arange(20)
    state = likelihood.forward(both, both, targets).state
    ours = likelihood_backward.backward(torch.ones(20), both, both, targets, state)
    apart = likelihood_backward.backward(torch.ones(20), both, both.clone(), targets, state)
    assert torch.equal(ours.hidden, apart.hidden)
    assert torch.equal(ours.weight, apart.weight)


def test_the_workspace_is_made_once() -> None:
    """Fails if the parts of a split walk are also allocated in the inputs' dtype."""
    hidden, weight, targets = example(200, 16, 30, torch.bfloat16)
    state = likelihood.forward(hidden, weight, targets).state
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape == (2, 30, 16):
                made.append((out.untyped_storage().data_ptr(), out.dtype))
            return out

    with Watch():
        likelihood_backward.backward(
            torch.ones(200), hidden, weight, targets, state, want_hidden=False, splits=2
        )
    assert {dtype for _, dtype in made} == {torch.float32}
    assert len({place for place, _ in made}) == 1
