"""token_stats against closed forms and a float64 oracle written out here.

N rows, D width, V vocabulary, E models.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.likelihood_cases import SHAPES, example
from torch import Tensor

import fastmem
from fastmem.likelihood import local

ALL = {"entropy": True, "second_moment": True, "greedy": True, "lse": True, "variance": True}
FIELDS = ("bits", "entropy_bits", "second_moment", "is_greedy", "lse_bits", "variance")


def oracle(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    change: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> tuple[Tensor, ...]:
    """Returns the fields of token_stats in float64, one token at a time, from the definitions."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    rows = []
    for z, target in zip(change(logits).tolist(), targets.tolist(), strict=True):
        peak = max(z)
        total = math.fsum(math.exp(x - peak) for x in z)
        lse = (peak + math.log(total)) / math.log(2)
        costs = [lse - x / math.log(2) for x in z if x > -math.inf]
        entropy = math.fsum(2**-c * c for c in costs)
        rows.append(
            (
                lse - z[target] / math.log(2),
                entropy,
                math.fsum(2**-c * c * c for c in costs),
                z.index(peak) == target,
                lse,
                math.fsum(2**-c * (c - entropy) ** 2 for c in costs),
            )
        )
    columns = zip(*rows, strict=True)
    return tuple(
        torch.tensor(column, dtype=torch.bool if name == "is_greedy" else torch.float64)
        for name, column in zip(FIELDS, columns, strict=True)
    )


def assert_right(found: fastmem.TokenStats, right: tuple[Tensor, ...]) -> None:
    for name, ours, exact in zip(FIELDS, found, right, strict=True):
        assert ours is not None
        if name == "is_greedy":
            assert ours.dtype == torch.bool
            assert torch.equal(ours, exact), name
        else:
            assert ours.dtype == torch.float32
            error = (ours.double() - exact).abs()
            # Relative too, for squares and for logits with an offset.
            assert (error <= 1e-4 + 1e-5 * exact.abs()).all(), (name, error.max())


def test_uniform() -> None:
    """Fails if a moment is in nats or the lowest index does not win a tie: p = 1/8."""
    hidden, weight = torch.zeros(3, 4), torch.zeros(8, 4)
    found = fastmem.token_stats(hidden, weight, torch.tensor([0, 3, 7]), **ALL)
    assert found._fields == FIELDS
    assert [x.tolist() for x in found if x is not None] == [
        *([3.0] * 3, [3.0] * 3, [9.0] * 3, [True, False, False], [3.0] * 3, [0.0] * 3)
    ]


def test_two_tokens_by_hand() -> None:
    """Fails if moments are not weighted by p: 1/4 and 3/4."""
    weight = torch.tensor([[0.0], [math.log(3)]])
    found = fastmem.token_stats(torch.ones(2, 1), weight, torch.tensor([0, 1]), **ALL)
    c = 2 - math.log2(3)
    row = torch.tensor
    right = (row([2, c]), row([0.5 + 0.75 * c] * 2), row([1 + 0.75 * c * c] * 2))
    apart = 3 / 16 * math.log2(3) ** 2
    assert_right(found, (*right, row([False, True]), row([2.0, 2.0]), row([apart] * 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
def test_matches_float64(N: int, D: int, V: int, dtype: torch.dtype) -> None:
    """Fails if half precision inputs are multiplied or summed in half precision, or an edge is
    wrong."""
    hidden, weight, targets = example(N, D, V, dtype)
    targets[::3] = (hidden.double() @ weight.double().T).argmax(-1)[::3]
    right = oracle(hidden, weight, targets)
    assert right[3].any()
    assert_right(fastmem.token_stats(hidden, weight, targets, **ALL), right)


def test_bias_softcap_and_temperature() -> None:
    """Fails if a statistic lacks bias, softcap or temperature, or applies them in another order."""
    hidden, weight, targets = example(37, 13, 101)
    bias = torch.linspace(-1, 1, 101)
    right = oracle(hidden, weight, targets, bias, lambda z: 3 * torch.tanh(z / 3) / 0.7)
    settings: dict[str, Any] = {"softcap": 3.0, "temperature": 0.7, **ALL}
    assert_right(fastmem.token_stats(hidden, weight, targets, bias, **settings), right)


@pytest.mark.parametrize("kind", ["peaked", "forbidden", "offset"])
def test_hard_inputs(kind: str) -> None:
    """Fails if 0 log 0 is not 0, if a sum cancels where p is almost 1, or if an offset that all
    logits share costs the precision of any result but the log-sum-exp."""
    hidden, weight, targets = example(40, 24, 300)
    bias = torch.zeros(300)
    if kind == "peaked":
        hidden = 30 * weight[targets]
    elif kind == "forbidden":
        bias[torch.arange(300) % 3 > 0], targets = -math.inf, targets // 3 * 3
    else:
        bias += 1e4
    right = oracle(hidden, weight, targets, bias)
    found = fastmem.token_stats(hidden, weight, targets, bias, **ALL)
    assert_right(found, right)
    plain = fastmem.token_stats(hidden.double(), weight.double(), targets, bias.double(), **ALL)
    for ours, exact in zip(plain, right, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
    for ours, exact in ((found.entropy_bits, right[1]), (found.second_moment, right[2])):
        assert ours is not None
        assert (ours >= -1e-12).all()
        assert (ours.double() - exact).abs().max() <= 1e-4 * max(1.0, exact.max().item())


def test_what_min_k_plus_plus_divides() -> None:
    """Fails if mean and deviation are not of log p under p: the score in the form of the authors of
    Min-K%++ is the same."""
    hidden, weight, targets = example(37, 13, 101)
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
    p = log_p.exp()
    mu = (p * log_p).sum(-1)
    sigma = (p * log_p.square()).sum(-1) - mu.square()
    theirs = (log_p.gather(-1, targets[:, None])[:, 0] - mu) / sigma.sqrt()
    assert (min_k_plus_plus(hidden, weight, targets) - theirs).abs().max() <= 1e-4


def min_k_plus_plus(*problem: Tensor) -> Tensor:
    """The recipe of docs/method.md."""
    stats = fastmem.token_stats(*problem, entropy=True, variance=True)
    assert stats.entropy_bits is not None
    assert stats.variance is not None
    deviation = torch.maximum(stats.variance.sqrt(), 1e-6 * stats.entropy_bits + 1e-10)
    return (stats.entropy_bits - stats.bits) / deviation


def exact_variance(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    logits = hidden.double() @ weight.double().T + bias.double()
    log2_p = logits.log_softmax(-1) / math.log(2)
    p = log2_p.exp2()
    return (p * (log2_p - (p * log2_p).sum(-1, keepdim=True)) ** 2).sum(-1)


# (The hidden states' factor, the weights' factor, a logit that one token has more than all others.)
@pytest.mark.parametrize("place", [0, 4099, 20001])
@pytest.mark.parametrize(
    ("steep", "gap"),
    [(1, 0), (1e-3, 0), (1e-5, 0), (0, 1e-3), (0, 1), (1e-3, 1), (0, 9), (1, 30), (0, 60), (1, 70)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variance_of_flat_and_sure_rows(
    dtype: torch.dtype, steep: float, gap: float, place: int
) -> None:
    """Fails if the variance is a difference of two sums: it would be rounding, or below 0, where
    tokens are nearly alike, or all but one are, or one is nearly sure."""
    hidden, weight, targets = example(5, 16, 20003, dtype)
    weight, bias = steep * weight, torch.zeros(20003)
    bias[place] = gap
    exact = exact_variance(hidden, weight, bias)
    found = fastmem.token_stats(hidden, weight, targets, bias, entropy=True, variance=True)
    assert found.variance is not None
    assert ((found.variance - exact).abs() <= 1e-4 * exact).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variance_of_equal_and_sure_tokens(dtype: torch.dtype) -> None:
    """Fails if equal logits have a variance, or docs/method.md's score is not 0 where it is 0 / 0
    by its formula, or is NaN."""
    hidden, weight, targets = example(40, 16, 20003, dtype)
    for equal in (0 * weight, weight[:1].expand(20003, -1).contiguous()):
        found = fastmem.token_stats(hidden, equal, targets, variance=True)
        assert found.variance is not None
        assert (found.variance <= 1e-30).all()  # float64 products may differ in their last bit
        assert (min_k_plus_plus(hidden, equal, targets).abs() <= 1e-6).all()
    weight.zero_()[7, 0] = 1
    hidden.zero_()[:, 0] = torch.linspace(20, 400, 40)
    score = min_k_plus_plus(hidden, weight, torch.full((40,), 7))
    assert (score.abs() <= 0.01).all()
    rows = (hidden[:5], weight, targets[:5] * 0)  # improbable tokens of rows that grow sure
    exact = (torch.log_softmax(rows[0].double() @ weight.double().T, -1) / math.log(2))[:, 0]
    deviation = exact_variance(*rows[:2], torch.zeros(20003)).sqrt()
    assert (min_k_plus_plus(*rows) / (exact / deviation) - 1).abs().max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_what_is_asked_for(dtype: torch.dtype) -> None:
    """Fails if a statistic is made unasked, changes with other flags, or has a gradient."""
    hidden, weight, targets = example(9, 4, 11)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    together = fastmem.token_stats(hidden, weight, targets, **ALL)
    bits = fastmem.token_bits(hidden, weight, targets).detach()
    torch.testing.assert_close(together.bits, bits, rtol=0, atol=1e-5)
    assert fastmem.token_stats(hidden, weight, targets)[1:] == (None,) * 5
    for flag, name in zip(ALL, FIELDS[1:], strict=True):
        alone = fastmem.token_stats(hidden, weight, targets, **{flag: True})
        # Each set of flags may have its own loops, and so its own rounding.
        torch.testing.assert_close(
            getattr(alone, name), getattr(together, name), rtol=1e-6, atol=1e-5
        )
        assert sum(x is not None for x in alone) == 2
        assert not any(x.requires_grad for x in alone if x is not None)


def test_rows_without_bits() -> None:
    """Fails if a target that is ignored or outside [0, V) changes the softmax's statistics or is
    greedy, or if a row that is not finite reaches another row or has statistics."""
    hidden, weight, targets = example(7, 4, 11)
    right = fastmem.token_stats(hidden, weight, targets, **ALL)
    hidden[4, 1], hidden[5, 1], hidden[6, 1] = math.nan, math.inf, -math.inf
    targets[:4] = torch.tensor([-100, 11, -1, targets[3]])
    for dtype in (torch.float32, torch.float64):
        found = fastmem.token_stats(hidden.to(dtype), weight.to(dtype), targets, **ALL)
        assert found.bits[0] == 0
        assert found.bits.isnan().tolist() == [False, True, True, False, True, True, True]
        assert found.is_greedy is not None
        assert right.is_greedy is not None
        assert found.is_greedy.tolist() == [*[False] * 3, bool(right.is_greedy[3]), *[False] * 3]
        for name in ("entropy_bits", "second_moment", "lse_bits", "variance"):
            ours = getattr(found, name)
            torch.testing.assert_close(ours[:4].float(), getattr(right, name)[:4])
            assert ours[4:].isnan().all()


def test_models_side_by_side() -> None:
    """Fails if a model reads another model's tensors, or leading axes are lost."""
    parts = [example(9, 4, 11) for _ in range(6)]
    hidden = torch.stack([p[0] * (i + 1) for i, p in enumerate(parts)])
    weight, targets = torch.stack([p[1] for p in parts]), parts[0][2]
    bias = torch.randn(6, 11)
    together = fastmem.token_stats(hidden, weight, targets, bias, **ALL)
    folded = fastmem.token_stats(
        hidden.view(2, 3, 9, 4), weight.view(2, 3, 11, 4), targets, bias.view(2, 3, 11), **ALL
    )
    for i in range(6):
        alone = fastmem.token_stats(hidden[i], weight[i], targets, bias[i], **ALL)
        for name, one, many, deep in zip(FIELDS, alone, together, folded, strict=True):
            assert one is not None
            assert many is not None
            assert deep is not None
            assert torch.equal(many[i], one), name
            assert torch.equal(deep[i // 3, i % 3], one), name


@pytest.mark.parametrize("limit", [1, 101, 1010])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Fails if a chunk of the reference is dropped or swapped: 1, 1, 10 rows."""
    hidden, weight, targets = example(37, 13, 101, torch.float64)
    whole = fastmem.token_stats(hidden, weight, targets, **ALL)
    monkeypatch.setattr(local, "MAX_LOGITS", limit)
    for ours, right in zip(fastmem.token_stats(hidden, weight, targets, **ALL), whole, strict=True):
        assert ours is not None
        assert right is not None
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_and_strided(dtype: torch.dtype) -> None:
    """Fails if N = 0 or E = 0 breaks, or strides are taken for contiguous."""
    hidden, weight, targets = example(12, 4, 11)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    for empty in (
        fastmem.token_stats(hidden[:0], weight, targets[:0], **ALL),
        fastmem.token_stats(hidden[None][:0], weight[None][:0], targets, **ALL),
    ):
        assert all(x is not None and x.numel() == 0 for x in empty)
    strided = fastmem.token_stats(
        hidden.T.contiguous().T[::2], weight.T.contiguous().T, targets.int()[::2], **ALL
    )
    plain = fastmem.token_stats(hidden, weight, targets, **ALL)
    for ours, right in zip(strided, plain, strict=True):
        assert ours is not None
        assert right is not None
        torch.testing.assert_close(ours, right[::2])


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64]
)
@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
def test_integer_types(compute: torch.dtype, dtype: torch.dtype) -> None:
    """Fails if a target's type changes its meaning: as uint8, ignore_index -100 would be 156."""
    weight = torch.eye(200, dtype=compute)
    found = fastmem.token_stats(weight[[156, 5]], weight, torch.tensor([156, 6]).to(dtype), **ALL)
    assert found.is_greedy is not None
    assert found.is_greedy.tolist() == [True, False]
