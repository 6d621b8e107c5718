"""kernels/likelihood.py, interpreted: bits and statistics against float64."""

import math
from typing import Any

import pytest
import torch
from cases.likelihood_cases import example
from cases.triton_interpreted import (
    DTYPES,
    LIMIT,
    exact_bits,
    exact_log2_p,
    far_apart,
    quick,
    worst,
)
from fastmem.kernels import likelihood, reference, tiles
from torch import Tensor

# N, D, V, with tiles of 64 rows × 128 logits where D is 32 and the inputs are 16 bits wide.
SHAPES = [
    (64, 32, 128),  # aligned
    (63, 32, 128),  # an odd number of rows
    (64, 31, 128),  # rows that no vector load can read
    (64, 32, 127),  # a ragged vocabulary
    (37, 13, 101),  # all odd
    (1, 1, 1),  # one of each: scalars of 1 are compiled into the kernel
    (129, 16, 257),  # one row and one column more than whole tiles
    (5, 528, 300),  # above 512, hidden is streamed, the last piece is masked, V is split
    (7, 48, 65),  # between the widths of the table: streamed too
    (65, 64, 128),  # each other width of the table, with one row more than whole tiles
    (129, 128, 257),
    (65, 256, 192),
    (7, 512, 384),  # streamed in tiles of 256 columns, the last of them ragged
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
def test_bits_match_float64(N: int, D: int, V: int, dtype: torch.dtype) -> None:
    """Fails if products are rounded to 16 bits, or an edge of a tile is wrong."""
    hidden, weight, targets = example(N, D, V, dtype)
    found = likelihood.forward(hidden, weight, targets)
    assert found.bits.shape == (1, N)
    assert found.bits.dtype == torch.float32
    assert worst(found.bits[0], exact_bits(hidden, weight, targets)) <= LIMIT


def test_rows_without_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if rows that a GPU's copy engine cannot read are left to it, or others are not."""
    hidden, weight, targets = example(7, 528, 300, torch.bfloat16)
    made: list[Tensor] = []
    make = likelihood.descriptor
    monkeypatch.setattr(likelihood, "descriptor", lambda x, *a: made.append(x) or make(x, *a))
    wide = torch.zeros(7, 544, dtype=torch.bfloat16)
    wide[:, :528] = hidden
    odd = torch.zeros(7, 529, dtype=torch.bfloat16)[:, 1:].copy_(hidden)
    repeated = hidden[:1].expand(7, 528)
    overlapping = torch.randn(6 * 16 + 528).bfloat16().as_strided((7, 528), (16, 1))
    hopper = tiles.capability(hidden.device) // 10 == 9
    for x, w, read in (
        (hidden, weight, 2), (hidden[None], weight[None], 2), (wide[:, :528], weight, 2),
        (wide[:1, :528], weight, 2),
        (odd, weight, 0), (repeated, weight, 0), (overlapping, weight, 0),
        (torch.stack([hidden, -hidden]), torch.stack([weight, weight]), 0),
    ):  # fmt: skip
        made.clear()
        found = likelihood.forward(x, w, targets[: x.shape[-2]].expand(x.shape[:-1])).bits
        right = [exact_bits(h, weight, targets[: len(h)]) for h in (x if x.ndim == 3 else x[None])]
        assert worst(found, torch.stack(right)) <= LIMIT
        assert len(made) == read * hopper
    row, matrix = wide[:1, :530], torch.zeros(300, 544, dtype=torch.bfloat16)[:, :530]
    matrix[:, :528] = weight  # strides are multiples of 16 bytes, 530 columns are not
    found = likelihood.forward(row, matrix, targets[:1]).bits
    assert worst(found[0], exact_bits(row, matrix, targets[:1])) <= LIMIT


def peaked(D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden and weight whose greatest logits are near 500, and the logits in float64."""
    hidden, weight, _ = example(70, D, 150, dtype)
    greatest = (hidden.double() @ weight.double().T).amax(-1).mean().item()
    weight = (weight.double() * (500 / greatest)).to(dtype)
    return hidden, weight, hidden.double() @ weight.double().T


# float32 in one piece and in several; bfloat16 resident, the target's logit in pieces; streamed.
PEAKED = [
    (16, torch.float32), (528, torch.float32), (16, torch.bfloat16), (256, torch.bfloat16),
    (528, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("D", "dtype"), PEAKED)
def test_peaked(D: int, dtype: torch.dtype, splits: int) -> None:
    """Fails if the target's logit, here the greatest, is not rounded as in the walk: sums in two
    orders differ by 3e-4, which makes bits negative."""
    hidden, weight, logits = peaked(D, dtype)
    targets = logits.argmax(-1)
    bits = likelihood.forward(hidden, weight, targets, splits=splits).bits[0]
    assert (bits >= 0).all()
    assert worst(bits, exact_bits(hidden, weight, targets)) <= LIMIT


@pytest.mark.parametrize(("D", "dtype"), PEAKED)
def test_improbable_targets(D: int, dtype: torch.dtype) -> None:
    """Fails if the error at 1000 bits is more than twice that of PyTorch's float32 products and
    sums: near 2e-4, since one unit in the last place of 1000 bits is 6e-5."""
    hidden, weight, logits = peaked(D, dtype)
    targets = logits.argmin(-1)
    exact = exact_bits(hidden, weight, targets)
    theirs = worst(reference.token_bits(hidden, weight, targets), exact)
    assert worst(likelihood.forward(hidden, weight, targets).bits[0], exact) <= 2 * theirs


def test_the_largest_vocabulary() -> None:
    """Fails if a column, an offset or is_greedy's column loses digits at V = 2**20, ragged or not.
    Few rows in wide tiles save time."""
    tile = quick(likelihood.Tile(2, 2**14, 2, 4, 1))
    for V, splits in ((2**20 - 1, 3), (2**20, 1)):
        weight = torch.full((V, 1), -8.0)
        weight[[5, V - 1, V - 2]] = torch.tensor([[8.0], [9.0], [8.5]])
        hidden = torch.ones(2, 1)
        targets = torch.tensor([5, V - 1])
        found = likelihood.forward(hidden, weight, targets, greedy=True, tile=tile, splits=splits)
        assert found.is_greedy is not None
        assert found.is_greedy[0].tolist() == [False, True]
        assert worst(found.bits[0], exact_bits(hidden, weight, targets)) <= LIMIT


@pytest.mark.parametrize(("D", "dtype"), [(8191, torch.float32), (8192, torch.bfloat16)])
def test_the_largest_width(D: int, dtype: torch.dtype) -> None:
    """Fails if a piece of a row is left out or read twice. A small tile saves time."""
    hidden, weight, targets = example(3, D, 40, dtype)
    hidden /= 64
    tile = quick(likelihood.Tile(16, 64, 64, 4, 1))
    bits = likelihood.forward(hidden, weight, targets, tile=tile).bits[0]
    assert worst(bits, exact_bits(hidden, weight, targets)) <= LIMIT


def test_rows_more_than_2_31_elements_apart() -> None:
    """Fails if an offset has 32 bits."""
    hidden, weight, targets = example(2, 16, 2, torch.bfloat16)
    plain = likelihood.forward(hidden, weight, targets).bits
    assert torch.equal(likelihood.forward(far_apart(hidden), weight, targets).bits, plain)
    assert torch.equal(likelihood.forward(hidden, far_apart(weight), targets).bits, plain)


@pytest.mark.parametrize(("D", "splits"), [(528, 2), (32, 1)])
def test_memory_beside_the_bits(monkeypatch: pytest.MonkeyPatch, D: int, splits: int) -> None:
    """Fails if a token takes more than 16 bytes of memory besides its bits, state included."""
    hidden, weight, targets = example(50, D, 300, torch.bfloat16)
    made: list[Tensor] = []
    empty = torch.empty

    def counted(*arguments: Any, **options: Any) -> Tensor:
        made.append(empty(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(torch, "empty", counted)
    found = likelihood.forward(hidden, weight, targets, splits=splits)
    assert found.bits.nbytes == 200
    assert sum(tensor.nbytes for tensor in made) == 200 + splits * 400


@pytest.mark.parametrize("order", ["rising", "falling", "late"])
def test_adversarial_order(order: str) -> None:
    """Fails if a new maximum does not rescale the sums so far."""
    ramp = torch.linspace(-60, 60, 300)
    ramp = {"rising": ramp, "falling": ramp.flip(0), "late": torch.zeros(300)}[order]
    if order == "late":
        ramp[-1] = 100.0  # alone in the ragged tile's last column
    hidden, weight = torch.ones(300, 16) / 16, ramp[:, None].repeat(1, 16)
    targets = torch.arange(300)
    for splits in (1, 3):
        bits = likelihood.forward(hidden, weight, targets, splits=splits).bits[0]
        assert worst(bits, exact_bits(hidden, weight, targets)) <= LIMIT


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_in_the_bias_changes_nothing(offset: float) -> None:
    """Fails if a logit near 1e4, a multiple of 2**-10, is ever formed."""
    hidden, weight, targets = example(64, 16, 130)
    bias = torch.randint(-8, 8, (130,)) + offset  # exact in float32
    found = likelihood.forward(hidden, weight, targets, bias, lse=True, entropy=True)
    log2_p = exact_log2_p(hidden, weight, bias)
    assert worst(found.bits[0], exact_bits(hidden, weight, targets, bias=bias)) <= LIMIT
    assert worst(found.entropy_bits[0], -(log2_p.exp2() * log2_p).sum(-1)) <= LIMIT
    logits = hidden.double() @ weight.double().T + bias.double()
    lse_bits = torch.logsumexp(logits, -1) / math.log(2)
    assert worst(found.lse_bits[0], lse_bits) <= 2**-9  # two units of float32 near 14427


def test_an_offset_in_the_products_costs_no_more_than_in_pytorch() -> None:
    """Fails if the target's logit and the sum round an offset of 1e4 differently."""
    hidden, weight, targets = example(256, 16, 130)
    hidden[:, 0], weight[:, 0] = 100, 100
    exact = exact_bits(hidden, weight, targets)
    theirs = worst(reference.token_bits(hidden, weight, targets), exact)
    assert worst(likelihood.forward(hidden, weight, targets).bits[0], exact) <= 2 * theirs


OPTIONS: list[dict[str, Any]] = [
    {"bias": torch.linspace(-3, 3, 101)},
    {"softcap": 2.0},
    {"softcap": 1e4},  # where tanh is its argument
    {"temperature": 0.7},
    {"bias": torch.linspace(-3, 3, 101), "softcap": 3.0, "temperature": 1.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o))
def test_options(options: dict[str, Any]) -> None:
    """Fails if an option is dropped, or applied in another order."""
    hidden, weight, targets = example(37, 13, 101)
    for splits in (1, 2):
        bits = likelihood.forward(hidden, weight, targets, splits=splits, **options).bits[0]
        assert worst(bits, exact_bits(hidden, weight, targets, **options)) <= LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_statistics_match_float64(splits: int, dtype: torch.dtype) -> None:
    """Fails if a moment is not rescaled with the sum, or a part is combined twice or not at all."""
    hidden, weight, targets = example(37, 32, 500, dtype)
    targets[::2] = (hidden.double() @ weight.double().T).argmax(-1)[::2]
    found = likelihood.forward(
        hidden, weight, targets, splits=splits,
        lse=True, entropy=True, variance=True, greedy=True,
    )  # fmt: skip
    log2_p = exact_log2_p(hidden, weight)
    p = log2_p.exp2()
    logits = hidden.double() @ weight.double().T
    assert found.is_greedy is not None
    assert worst(found.bits[0], exact_bits(hidden, weight, targets)) <= LIMIT
    assert worst(found.entropy_bits[0], -(p * log2_p).sum(-1)) <= LIMIT
    mean = (p * log2_p).sum(-1, keepdim=True)
    assert worst(found.variance[0], (p * (log2_p - mean) ** 2).sum(-1)) <= LIMIT
    assert worst(found.lse_bits[0], torch.logsumexp(logits, -1) / math.log(2)) <= LIMIT
    assert torch.equal(found.is_greedy[0], logits.argmax(-1) == targets)


@pytest.mark.parametrize("splits", [1, 3])
def test_equal_logits_are_greedy_at_the_lowest_index(splits: int) -> None:
    """Fails if a later tile, thread or part wins a tie. All logits are exact."""
    weight = torch.zeros(300, 16)
    weight[[40, 41, 200, 299], 0] = 1.0
    targets = torch.tensor([39, 40, 41, 200, 299, 0])
    hidden = torch.zeros(6, 16)
    hidden[:5, 0] = 1.0  # the last row's logits are all 0
    found = likelihood.forward(hidden, weight, targets, greedy=True, splits=splits)
    assert found.is_greedy is not None
    assert found.is_greedy[0].tolist() == [False, True, False, False, False, True]


def test_what_is_not_asked_for_is_not_made() -> None:
    """Fails if a statistic is computed without its flag."""
    found = likelihood.forward(*example(3, 4, 5))
    assert [name for name in found._fields if getattr(found, name) is not None] == ["bits", "state"]


def test_the_same_bits_twice() -> None:
    """Fails if an order of summation is not fixed."""
    hidden, weight, targets = example(37, 32, 500)
    for splits in (1, 4):
        first, second = (
            likelihood.forward(hidden, weight, targets, splits=splits) for _ in range(2)
        )
        assert torch.equal(first.bits, second.bits)
        assert torch.equal(first.state, second.state)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("splits", [1, 2])
def test_targets_outside_the_vocabulary(splits: int, dtype: torch.dtype) -> None:
    """Fails if a target outside [0, V) is read or has finite bits, or an ignored one has bits."""
    hidden, weight, _ = example(5, 8, 100)
    wrong = 255 if dtype == torch.uint8 else -1
    targets = torch.tensor([3, 100, wrong, 7, 99]).to(dtype)
    found = likelihood.forward(hidden, weight, targets, ignore_index=7, greedy=True, splits=splits)
    bits = found.bits[0]
    inside = [0, 4]
    assert worst(bits[inside], exact_bits(hidden[inside], weight, targets[inside])) <= LIMIT
    assert bits[[1, 2]].isnan().all()
    assert bits[3] == 0
    assert found.is_greedy is not None
    assert not found.is_greedy[0, 1:4].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_bad_row_is_bad_alone(softcap: float | None, bad: float, dtype: torch.dtype) -> None:
    """Fails if a NaN is lost in a maximum, an infinity in a softcap, or either leaks into another
    row."""
    hidden, weight, targets = example(9, 16, 130, dtype)
    exact = exact_bits(hidden, weight, targets, softcap=softcap)
    hidden[4, 3] = bad
    flags = {"lse": True, "entropy": True, "variance": True, "greedy": True}
    for splits in (1, 2):
        found = likelihood.forward(hidden, weight, targets, softcap=softcap, splits=splits, **flags)
        rows = torch.arange(9) != 4
        for x in (found.bits, found.entropy_bits, found.variance, found.lse_bits):
            assert x is not None
            assert torch.equal(x[0].isnan(), ~rows)
        assert found.is_greedy is not None
        assert not found.is_greedy[0, 4]
        assert worst(found.bits[0, rows], exact[rows]) <= LIMIT


def test_one_great_bias_rounds_no_other() -> None:
    """Fails if the largest bias is subtracted although all other biases are tiny beside it: their
    tokens would be wrong by 2**-11 nats."""
    hidden, weight, targets = torch.ones(50, 16), torch.randn(50, 16) / 4, torch.arange(50)
    weight[0], bias = 0.0, torch.randn(50)
    weight[0, 0], bias[0] = -2e4, 1e4
    bits = likelihood.forward(hidden, weight, targets, bias).bits[0]
    exact = exact_bits(hidden, weight, targets, bias=bias)
    assert worst(bits[1:], exact[1:]) <= 1e-5


def test_forbidden_tokens() -> None:
    """Fails if a logit of -inf makes NaN: a bias may forbid tokens, even a whole tile."""
    hidden, weight, _ = example(6, 8, 400)
    bias = torch.zeros(400)
    bias[:300] = -torch.inf
    targets = torch.tensor([300, 399, 350, 301, 302, 0])
    found = likelihood.forward(
        hidden, weight, targets, bias, entropy=True, variance=True, greedy=True
    )
    exact = exact_bits(hidden, weight, targets, bias=bias)
    assert worst(found.bits[0, :5], exact[:5]) <= LIMIT
    assert found.bits[0, 5] == torch.inf
    allowed = exact_log2_p(hidden, weight[300:])
    assert worst(found.entropy_bits[0], -(allowed.exp2() * allowed).sum(-1)) <= LIMIT
    apart = allowed - (allowed.exp2() * allowed).sum(-1, keepdim=True)
    assert worst(found.variance[0], (allowed.exp2() * apart**2).sum(-1)) <= LIMIT


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("steep", "gap"), [(1e-3, 0), (0, 1e-3), (0, 1), (1, 30), (0, 60)])
def test_variance_of_flat_and_sure_rows(steep: float, gap: float, splits: int) -> None:
    """Fails if the variance is a difference of two sums, in a tile, between tiles, lanes or parts:
    it would be rounding where tokens are nearly alike, or one is nearly sure."""
    hidden, weight, targets = example(6, 16, 2001)
    weight = steep * weight
    for place in (0, 777, 2000):
        bias = torch.zeros(2001)
        bias[place] = gap
        found = likelihood.forward(hidden, weight, targets, bias, variance=True, splits=splits)
        log2_p = exact_log2_p(hidden, weight, bias)
        apart = log2_p - (log2_p.exp2() * log2_p).sum(-1, keepdim=True)
        exact = (log2_p.exp2() * apart**2).sum(-1)
        assert found.variance is not None
        assert ((found.variance[0] - exact).abs() <= 1e-4 * exact).all()
