"""token_bits, token_stats and linear_cross_entropy of DTensors on two and on four ranks.

The ranks start once for each number and compute everything; the tests look at what they saved.
"""

import multiprocessing
import re
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
from cases.distributed_likelihood import (
    ALL,
    CASES,
    ROWS,
    WORDS,
    Case,
    Tied,
    on_ranks,
    tied_gradients,
    tied_tokens,
)
from fastmem.kernels import reference
from torch import Tensor

import fastmem

EPSILON = torch.finfo(torch.float32).eps
N, D, V = WORDS.shape


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the ranks saved, by their number. If they fail, no test starts them again."""
    folder = tmp_path_factory.mktemp("ranks")
    # A process without threads imports these once, then forks the ranks.
    multiprocessing.set_forkserver_preload(
        ["torch._dynamo", "torch.distributed.fsdp", "fastmem.likelihood.distributed"]
    )
    for ranks in CASES:
        torch.multiprocessing.start_processes(
            on_ranks, (ranks, folder), nprocs=ranks, start_method="forkserver"
        )
    return {ranks: torch.load(folder / f"{ranks}.pt", weights_only=False) for ranks in CASES}


def by_one(case: Case, stats: Any, bits: Any, double: bool) -> dict[str, Tensor]:
    """What `computed` saves, by one process."""
    full = case.inputs()
    leaves = {
        f"d{name}": (x.double() if double else x).requires_grad_()
        for name, x in full.items()
        if x is not None and name in ("hidden", "weight", "bias")
    }
    arguments = (leaves["dhidden"], leaves["dweight"], full["targets"], leaves.get("dbias"))
    found = {"bits": bits(*arguments, **case.settings)}
    found["bits"].backward(full["upstream"].to(found["bits"].dtype))
    moments = stats(*arguments, **case.settings)
    found |= {f"stats_{name}": x for name, x in zip(moments._fields, moments, strict=True)}
    found |= {name: x.grad for name, x in leaves.items()}
    return {name: x.detach().double() for name, x in found.items()}


def ours(*arguments: Any, **settings: Any) -> Any:
    return fastmem.token_stats(*arguments, **settings, **ALL)


@pytest.mark.parametrize(("ranks", "name"), [(n, name) for n in CASES for name in CASES[n]])
def test_results_are_those_of_one_rank(saved: Any, ranks: int, name: str) -> None:
    """Fails if a result is further from float64 than one rank's, by more than rounding."""
    case = CASES[ranks][name]
    right = by_one(case, reference.token_stats, reference.token_bits, double=True)
    alone = by_one(case, ours, fastmem.token_bits, double=False)
    found = saved[ranks][name]
    assert set(found) == {*right, "forward", "backward"}
    # A divided vocabulary adds up log-sum-exps that were rounded to float32.
    divided = any(operator == "allreduce" for operator, _ in found["forward"])
    lse = largest(right["stats_lse_bits"]) if divided else 0.0
    for key, exact in right.items():
        assert found[key].shape == exact.shape
        assert torch.equal(found[key].double().isnan(), exact.isnan()), key
        off, off_alone = (largest(x.double() - exact) for x in (found[key], alone[key]))
        allowed = 2 * off_alone + EPSILON * (4 * largest(exact) + lse)
        assert off <= allowed, (key, off, off_alone, allowed)


def largest(x: Tensor) -> float:
    """The greatest magnitude of finite numbers, 0 without one."""
    return max([0.0, *x[x.isfinite()].abs().tolist()])


@pytest.mark.parametrize("ranks", CASES)
def test_a_divided_vocabulary_moves_no_logits(saved: Any, ranks: int) -> None:
    """Fails if the ranks exchange more than N numbers three times, and N · D once."""
    for name in ("vocabulary", "few_tokens", "vocabulary_masked"):
        found = saved[ranks][name]
        assert found["forward"] == [("allreduce", N)] * 3, name
        assert found["backward"] == [("all_reduce", N * D)], name


def test_a_weight_is_gathered_once(saved: Any) -> None:
    """Fails if weight is gathered for each result, or its gradient is not scattered."""
    found = saved[2]["rows_and_weight"]
    padded = -(-V // 2)
    assert found["forward"] == [("all_gather_into_tensor", x) for x in (padded * D, padded)]
    scattered = [("reduce_scatter_tensor", 2 * x) for x in (padded, padded * D)]
    assert sorted(found["backward"]) == sorted(scattered)
    found = saved[2]["rows"]
    assert found["forward"] == []
    assert sorted(found["backward"]) == sorted(("all_reduce", x) for x in (V, V * D))


@pytest.mark.parametrize("ranks", CASES)
def test_ties_go_to_the_lowest_token(saved: Any, ranks: int) -> None:
    """Fails if a rank takes its own first token, or the last rank's, for the greedy one."""
    tied, flat, negative = saved[ranks]["ties"]["greedy"]
    assert tied.nonzero().flatten().tolist() == [3]
    assert flat.nonzero().flatten().tolist() == [0]
    assert negative.nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("ranks", CASES)
def test_a_row_that_is_not_finite_stays_alone(saved: Any, ranks: int) -> None:
    """Fails if NaN reaches another row or the weight, or a reduction drops it."""
    found = saved[ranks]["not_finite"]
    full = WORDS.inputs()
    bad = torch.tensor([False, True, False, False, False, True, False])
    rest = full["hidden"][~bad].clone().requires_grad_()
    weight = full["weight"].clone().requires_grad_()
    stats = ours(rest, weight, full["targets"][~bad])
    fastmem.token_bits(rest, weight, full["targets"][~bad]).sum().backward()
    for name, x in zip(stats._fields, stats, strict=True):
        torch.testing.assert_close(found[name][~bad], x, equal_nan=True, rtol=1e-5, atol=1e-5)
        wrong = found[name][bad]
        assert not wrong.any() if name == "is_greedy" else wrong.isnan().all()
    torch.testing.assert_close(found["dhidden"][~bad], rest.grad, equal_nan=True)
    assert found["dhidden"][bad].isnan().all()
    torch.testing.assert_close(found["dweight"], weight.grad)
    everywhere = saved[ranks]["not_finite"]["by the last token"]
    assert everywhere.bits[full["targets"] != -100].isnan().all()
    assert everywhere.entropy_bits.isnan().all()
    assert not everywhere.is_greedy.any()


@pytest.mark.parametrize(("ranks", "kind"), [*product(CASES, ["rows", "vocabulary"]), (4, "plane")])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_losses(saved: Any, ranks: int, kind: str, weighted: bool, reduction: str) -> None:
    """Fails if a mean counts a rank's rows, a weight is of another row, or a gradient is lost."""
    full = ROWS.inputs()
    hidden, weight, tokens = (full[x].requires_grad_() for x in ("hidden", "weight", "upstream"))
    more = {"weight": full["bias"].exp(), "token_weight": tokens} if weighted else {}
    loss = fastmem.linear_cross_entropy(
        hidden, weight, full["targets"] % V, reduction=reduction, **more
    )
    loss.sum().backward()
    right = [loss, *(x.grad for x in (hidden, weight, tokens) if x.grad is not None)]
    found = saved[ranks]["losses"][f"{kind} {weighted} {reduction}"]
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, y.detach(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("ranks", CASES)
def test_plain_rows(saved: Any, ranks: int) -> None:
    """Fails if the gradient of weight is not the sum over the ranks' rows."""
    right = by_one(WORDS, ours, fastmem.token_bits, double=False)
    for kind in ("divided", "whole"):
        for x, name in zip(
            saved[ranks]["plain_rows"][kind], ("dhidden", "dweight", "dbias"), strict=True
        ):
            torch.testing.assert_close(x.double(), right[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", CASES)
@pytest.mark.parametrize("inside", [True, False])
def test_tied_embeddings_under_fully_shard(saved: Any, ranks: int, inside: bool) -> None:
    """Fails if a head that is read outside of its module loses a rank's gradient, or if the core
    keeps fully_shard from freeing a weight."""
    right = tied_gradients(Tied(), *tied_tokens(), inside)
    found = saved[ranks]["fsdp"][f"inside {inside}"]
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", CASES)
def test_operators(saved: Any, ranks: int) -> None:
    """Fails if an operator has no sharding strategy, or one that divides what it must not."""
    full = ROWS.inputs()
    hidden, weight = (full[x].requires_grad_() for x in ("hidden", "weight"))
    targets = full["targets"] % V
    bits = fastmem.token_bits(hidden, weight, targets)
    bits.sum().backward()
    stats = ours(hidden, weight, targets)
    right = (
        bits, hidden.grad, weight.grad,
        stats.entropy_bits, stats.variance, stats.is_greedy, stats.lse_bits,
    )  # fmt: skip
    for kind, found in saved[ranks]["operators"].items():
        for x, y in zip(found, right, strict=True):
            torch.testing.assert_close(x, y.detach(), rtol=1e-5, atol=1e-5, msg=kind)


@pytest.mark.parametrize("ranks", CASES)
def test_autocast(saved: Any, ranks: int) -> None:
    """Fails if a divided vocabulary is not cast, or its gradients are not those of autocast."""
    full = WORDS.inputs()
    hidden, weight = (full[x].requires_grad_() for x in ("hidden", "weight"))
    with torch.autocast("cpu", torch.bfloat16):
        bits = fastmem.token_bits(hidden, weight, full["targets"] % V)
    bits.sum().backward()
    ours, *grads = saved[ranks]["autocast"]["found"]
    torch.testing.assert_close(ours, bits.detach(), rtol=1e-5, atol=1e-5)
    for x, y in zip(grads, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("ranks", CASES)
def test_other_ways(saved: Any, ranks: int) -> None:
    """Fails if a sum is not added up, a collective not waited for, or torch.compile fails."""
    full = WORDS.inputs()
    bits = fastmem.token_bits(full["hidden"], full["weight"], full["targets"])
    assert len(saved[ranks]["others"]) == 2 + (ranks == 2)
    for way, found in saved[ranks]["others"].items():
        torch.testing.assert_close(found, bits, rtol=1e-5, atol=1e-5, equal_nan=True, msg=way)


MESSAGES = {
    "meshes": r"hidden is on DeviceMesh\(.*, weight on DeviceMesh\(.*: distribute both over one",
    "models": r"weight is \(1, 13, 5\): with DTensors pass one model at a time, \(V, D\)",
    "targets of plain rows": r"targets is a DTensor, .*, hidden a plain .*: pass .*to_local\(\)",
    "only targets": r"targets is a DTensor, .*: pass full_tensor\(\) or to_local\(\) of it",
    "head": r"the head's weight is a DTensor, \(Shard\(dim=0\),\): pass a model whose head is",
    "shapes": r"hidden \(7, 5\), weight \(13, 4\): expected .* with the same D",
    "lengths": r"targets \(6,\) with hidden \(7, 5\), .*: expected one target for each row",
    "types": r"hidden is torch.float32, weight torch.float64: cast one",
    "token_bits": r"the target at \(3,\) is 13: expected 0 to 12",
    "token_stats": r"the target at \(3,\) is 13: expected 0 to 12",
}


@pytest.mark.parametrize("ranks", CASES)
def test_refusals(saved: Any, ranks: int) -> None:
    """Fails if bad input is accepted, leaves ranks waiting, or is not named with the fix."""
    found = saved[ranks]["refusals"]
    assert set(found) == set(MESSAGES)
    for name, message in MESSAGES.items():
        assert re.match(message, found[name]), (name, found[name])


def test_import_leaves_dtensor_alone() -> None:
    """Fails if `import fastmem` and a plain call pay for the import of DTensor."""
    code = (
        "import sys, torch, fastmem; fastmem.token_bits(torch.ones(2, 3), torch.ones(4, 3), "
        "torch.zeros(2).long()); print('torch.distributed.tensor' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
