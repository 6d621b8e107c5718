"""token_bits of the C++ core: statistics, models side by side, and bad arguments.

Results start as NaN, so that a skipped entry shows. N rows, D width, V vocabulary, E models.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases.likelihood_cases import BIT, random_case
from fastmem.kernels import reference
from numpy.typing import NDArray
from torch import Tensor

from fastmem import _core

ISAS = [isa for isa in ("portable", "avx2", "avx512") if _core.has_isa(isa)]
STATISTICS = ("entropy_bits", "variance", "lse_bits", "is_greedy")


def as_array(x: Tensor) -> NDArray[Any]:
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def problem(
    hidden: Tensor,  # (E, N, D)
    weight: Tensor,  # (E, V, D)
    targets: Tensor,  # (E, N)
    bias: Tensor | None,  # (E, V)
    softcap: float = 0.0,
    temperature: float = 1.0,
    threads: int = 1,
) -> dict[str, Any]:
    return {
        "hidden": as_array(hidden),
        "weight": as_array(weight),
        "targets": targets.numpy(),
        "bias": None if bias is None else bias.numpy(),
        "softcap": softcap,
        "temperature": temperature,
        "ignore_index": -100,
        "threads": threads,
    }


def poison(shape: tuple[int, ...], dtype: type = np.float32) -> NDArray[Any]:
    return np.full(shape, np.nan, dtype)


def statistics(
    given: dict[str, Any], isa: str = "best", asked: tuple[str, ...] = STATISTICS
) -> Any:
    """Returns bits and the statistics `asked` for."""
    shape = given["hidden"].shape[:2]
    bits, lse = poison(shape), poison(shape, np.float64)
    results = {name: poison(shape) for name in asked}
    if "is_greedy" in asked:
        results["is_greedy"] = np.full(shape, 2, np.uint8).view(np.bool_)
    _core.token_bits(bits, lse, None, None, None, **given, **results, isa=isa)
    return {"bits": bits} | results


def right(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Returns the statistics in float64, from all logits."""
    logits = hidden.double() @ weight.double().mT
    if bias is not None:
        logits = logits + bias.double()[:, None]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    z = logits / temperature / math.log(2)
    lse = torch.logsumexp(z * math.log(2), -1) / math.log(2)
    log2_p = z - lse[..., None]
    p = log2_p.exp2()
    log2_p = torch.where(p > 0, log2_p, 0.0)
    mean = (p * log2_p).sum(-1, keepdim=True)
    return {
        "entropy_bits": -mean.squeeze(-1),
        "variance": (p * (log2_p - mean) ** 2).sum(-1),
        "lse_bits": lse,
        "is_greedy": logits.argmax(-1) == targets,
    }


def models(e: int, n: int, d: int, v: int, dtype: torch.dtype = torch.float32) -> Any:
    """Stacks a random_case for each model."""
    each = [random_case(n, d, v, dtype, seed) for seed in range(e)]
    return [torch.stack([case[i] for case in each]) for i in range(4)]  # type: ignore[misc]


def assert_statistics(ours: dict[str, NDArray[Any]], truth: dict[str, Tensor]) -> None:
    """Allows the error of bits, and for the variance a relative error too: its error grows
    with its square root times the error of bits."""
    for name in ours.keys() & truth.keys():
        mine, other = torch.from_numpy(ours[name].copy()), truth[name]
        if name == "is_greedy":
            assert torch.equal(mine.view(torch.uint8), other.to(torch.uint8))
            continue
        assert torch.equal(mine.isnan(), other.isnan())
        error = (mine.double() - other).nan_to_num().abs()
        size = other.nan_to_num().abs()
        limit = BIT + size * (BIT if name == "variance" else 2**-23)
        assert (error <= limit).all(), f"{name} is off by {error.max()}"


# (E, N, D, V): one row; odd sizes around the tiles; a vocabulary that threads share; a vocabulary
# longer than a block.
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (1, 15, 65, 33), (3, 13, 7, 31), (2, 40, 20, 300), (1, 9, 30, 4099)],
    ids=str,
)
@pytest.mark.parametrize("settings", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_statistics(isa: str, settings: dict[str, float], shape: tuple[int, int, int, int]) -> None:
    """Fails if a statistic misses a token, a rescale or the bias, or includes a padded token."""
    for dtype in (torch.float32, torch.bfloat16):
        case = models(*shape, dtype)
        best = (case[0].double() @ case[1].double().mT + case[3].double()[:, None]).argmax(-1)
        case[2][:, ::2] = best[:, ::2]
        truth = right(*case, **settings)
        assert truth["is_greedy"].any()
        for threads in (1, 2, 5):
            given = problem(*case, **settings, threads=threads)
            ours = statistics(given, isa)
            assert_statistics(ours, truth)
            for name in STATISTICS:
                alone = statistics(given, isa, (name,))
                np.testing.assert_allclose(alone["bits"], ours["bits"], rtol=0, atol=2e-5)
                assert_statistics({name: alone[name]}, truth)


@pytest.mark.parametrize("isa", ISAS)
def test_statistics_of_a_million_tokens(isa: str) -> None:
    """Fails if exp_logits, or their moments, are summed one after another: 6e-3 bits of entropy.
    The last logit is the greatest, so that all earlier sums are rescaled."""
    hidden, weight, targets, bias = models(1, 3, 1, 2**20)
    bias[0, -1] = 40
    case = (hidden, weight, targets, bias)
    assert_statistics(statistics(problem(*case), isa), right(*case))
    case = (hidden, weight, targets, torch.zeros_like(bias))
    assert_statistics(statistics(problem(*case, threads=2), isa), right(*case))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["rising", "falling", "offset", "forbidden", "peaked", "tied"])
def test_statistics_of_hard_inputs(isa: str, kind: str) -> None:
    """Fails if moments are not rescaled when the greatest logit rises, if 0 log 0 is not 0, if
    lse_bits lacks the constant that centring subtracts, or if the lowest index loses a tie."""
    hidden, weight, targets, bias = models(2, 40, 24, 300)
    steps = torch.arange(300).float().expand(2, -1)
    if kind == "rising":
        bias = 2 * steps
    elif kind == "falling":
        bias = -2 * steps
    elif kind == "offset":
        hidden[..., 0], weight[..., 0], bias = 1, 1e4, bias + 1e3
    elif kind == "forbidden":
        bias = torch.where(steps % 3 == 0, 0.0, -torch.inf)
        targets = targets // 3 * 3
    elif kind == "peaked":
        hidden = 30 * weight.gather(1, targets[..., None].expand(-1, -1, 24))
    else:
        hidden, weight = hidden.round(), weight.round()
        weight[:, 7] = weight[:, 290] = weight[:, 161] = 9 * hidden[:, 0].sign()
        bias = torch.zeros(2, 300)
        targets[:, :20], targets[:, 20:] = 7, 161
    case = (hidden, weight, targets, bias)
    truth = right(*case)
    if kind == "tied":
        assert truth["is_greedy"][:, :20].any()
        assert not truth["is_greedy"][:, 20:].any()
    assert_statistics(statistics(problem(*case), isa), truth)


@pytest.mark.parametrize("isa", ISAS)
def test_statistics_without_bits(isa: str) -> None:
    """Fails if an ignored or bad target changes a statistic that does not depend on it, or is
    greedy; if a row that is not finite lacks NaN and False, or changes another row."""
    hidden, weight, targets, bias = models(2, 20, 12, 70)
    truth = right(hidden, weight, targets, bias)
    hidden[0, 3, 5], hidden[1, 4, 0] = math.nan, math.inf
    targets[:, 6], targets[:, 7], targets[:, 8] = -100, 70, -1
    for name in STATISTICS:
        if name == "is_greedy":
            truth[name][:, 6:9] = truth[name][0, 3] = truth[name][1, 4] = False
        else:
            truth[name][0, 3] = truth[name][1, 4] = math.nan
    assert_statistics(statistics(problem(hidden, weight, targets, bias), isa), truth)


def results(given: dict[str, Any], ahead: bool, isa: str) -> list[NDArray[Any]]:
    """Returns bits, log-sum-exp and three gradients: of the sum, or for an upstream gradient."""
    (e, n, d), v = given["hidden"].shape, given["weight"].shape[1]
    bits, lse = poison((e, n)), poison((e, n), np.float64)
    grads = [poison(shape) for shape in ((e, n, d), (e, v, d), (e, v))]
    _core.token_bits(bits, lse, *(grads if ahead else [None] * 3), **given, isa=isa)
    if not ahead:
        upstream = np.linspace(-1, 2, e * n, dtype=np.float32).reshape(e, n)
        _core.token_bits_backward(*grads, upstream=upstream, lse=lse, **given, isa=isa)
    return [bits, lse, *grads]


# As many models as threads, fewer and more; split by rows (N ≥ V) and by tokens; rows whose
# gradients seven threads hold in two chunks; no models; no rows.
@pytest.mark.parametrize(
    "shape",
    [
        *[(3, 150, 20, 60), (2, 60, 20, 150), (5, 7, 33, 9), (1, 90, 5, 40)],
        *[(1, 150, 4096, 170), (0, 4, 3, 5), (2, 0, 3, 5)],
    ],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("isa", ISAS)
def test_models(isa: str, threads: int, shape: tuple[int, int, int, int]) -> None:
    """Fails if a model reads or writes another model's arrays, if a cut between threads skips or
    doubles rows, or if the same call gives other bytes."""
    if shape[0] == 0:
        hidden, weight, targets, bias = (x[:0] for x in models(1, *shape[1:]))
    else:
        hidden, weight, targets, bias = models(*shape)
    for ahead in (False, True):
        upstream = torch.linspace(-1, 2, hidden[..., 0].numel()).view(targets.shape)
        given = problem(hidden, weight, targets, bias, threads=threads)
        all_models = results(given, ahead, isa)
        for x, y in zip(all_models, results(given, ahead, isa), strict=True):
            np.testing.assert_array_equal(x, y)
        for e in range(shape[0]):
            leaves = [x[e].double().requires_grad_() for x in (hidden, weight, bias)]
            bits = reference.token_bits(leaves[0], leaves[1], targets[e], leaves[2])
            (bits if ahead else bits * upstream[e]).sum().backward()  # type: ignore[no-untyped-call]
            truth = [bits, *(leaf.grad for leaf in leaves)]
            ours = [x[e] for i, x in enumerate(all_models) if i != 1]
            for mine, other in zip(ours, truth, strict=True):
                assert other is not None
                close = {"rtol": 1e-5, "atol": 2e-5}
                np.testing.assert_allclose(mine, other.detach().numpy(), **close)


def core_call(**changes: Any) -> None:
    hidden, weight, targets, bias = models(1, 4, 3, 5)
    results = {name: changes.pop(name, None) for name in ("dhidden", "dweight", "dbias")}
    bits = changes.pop("bits", np.empty((1, 4), np.float32))
    lse = changes.pop("lse", np.empty((1, 4)))
    given = problem(hidden, weight, targets, bias) | changes
    _core.token_bits(bits, lse, *results.values(), **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": np.zeros((1, 4, 3))}, "hidden must be float32"),
        ({"hidden": np.zeros((1, 4, 3), np.uint16)}, "weight must be uint16"),
        (
            {"hidden": np.zeros((1, 3, 4), np.float32).transpose(0, 2, 1)},
            "hidden must be C-contiguous",
        ),
        ({"hidden": np.zeros((1, 4, 0), np.float32)}, "the width, must be from 1"),
        ({"weight": np.zeros((1, 5, 2), np.float32)}, "weight must have the shape"),
        ({"weight": np.zeros((1, 0, 3), np.float32)}, "the vocabulary, must be from 1"),
        ({"targets": np.zeros((1, 3), np.int64)}, "targets must have the shape"),
        ({"targets": np.zeros((1, 4), np.int32)}, "targets must be int64"),
        ({"bias": np.zeros((1, 4), np.float32)}, "bias must have the shape"),
        ({"bits": np.zeros((1, 5), np.float32)}, "bits must have the shape"),
        ({"lse": np.zeros((1, 4), np.float32)}, "lse must be float64"),
        ({"dweight": np.zeros((1, 4, 3), np.float32)}, "dweight must have the shape"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"softcap": math.nan}, "softcap must be at least 0"),
        ({"entropy_bits": np.zeros((1, 3), np.float32)}, "entropy_bits must have the shape"),
        ({"lse_bits": np.zeros((1, 4))}, "lse_bits must be float32"),
        ({"is_greedy": np.zeros((1, 4), np.uint8)}, "is_greedy must be bool"),
        (
            {"lse_bits": np.zeros((1, 4), np.float32), "dbias": np.zeros((1, 5), np.float32)},
            "arrays for statistics or for gradients, got both",
        ),
        ({"threads": 0}, "threads must be from 1"),
        ({"isa": "mmx"}, "isa must be best"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_core_refuses(changes: dict[str, Any], message: str) -> None:
    """Fails if a wrong array reaches the loops."""
    core_call()
    with pytest.raises(ValueError, match=message):
        core_call(**changes)


def test_the_core_refuses_shared_memory() -> None:
    """Fails if a result may share memory with an input or another result."""
    shared = np.zeros((1, 4, 3), np.float32)
    with pytest.raises(ValueError, match="dhidden must not share memory"):
        core_call(hidden=shared, dhidden=shared)
    both = np.zeros((1, 5, 3), np.float32)
    with pytest.raises(ValueError, match="dweight must not share memory"):
        core_call(dhidden=both[:, :4], dweight=both)
