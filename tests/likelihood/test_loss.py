"""linear_cross_entropy against plain PyTorch in float64, and its bad input."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastmem
from fastmem.likelihood import reduced
from fastmem.likelihood.loss import LinearCrossEntropyLoss, linear_cross_entropy

N, D, V = 37, 12, 50
IGNORED = 3


def case(seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    made = {
        "input": torch.randn(N, D, generator=rng, dtype=torch.float64),
        "linear_weight": torch.randn(V, D, generator=rng, dtype=torch.float64),
        "linear_bias": torch.randn(V, generator=rng, dtype=torch.float64),
        "weight": torch.rand(V, generator=rng, dtype=torch.float64),
        "token_weight": torch.randn(N, generator=rng, dtype=torch.float64),
        "target": torch.randint(V, (N,), generator=rng),
    }
    made["target"][::5] = IGNORED
    return made


def plain(
    made: dict[str, Tensor | None], reduction: str, softcap: float | None, temperature: float
) -> Tensor:
    """The definition, row by row."""
    logits = F.linear(made["input"], made["linear_weight"], made["linear_bias"])  # type: ignore[arg-type]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    nats = F.cross_entropy(
        logits / temperature, made["target"], reduction="none", ignore_index=IGNORED  # type: ignore[arg-type]
    )  # fmt: skip
    factor = torch.ones(N, dtype=torch.float64)
    if made["weight"] is not None:
        factor = factor * made["weight"][made["target"]]
    if made["token_weight"] is not None:
        factor = factor * made["token_weight"]
    factor = factor * (made["target"] != IGNORED)
    losses = nats * factor
    if reduction == "none":
        return losses
    return losses.sum() / (factor.sum() if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("given", ["", "linear_bias", "weight", "token_weight", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_the_definition(reduction: str, given: str, dtype: torch.dtype) -> None:
    """Fails if a loss or a gradient differs from plain PyTorch's in float64 by more than twice what
    plain PyTorch itself differs in this dtype."""
    names = ("linear_bias", "weight", "token_weight")
    settings: dict[str, Any] = {"softcap": 4.0, "temperature": 0.7} if given == "all" else {}
    made = {n: x for n, x in case().items() if n not in names or given in (n, "all")}
    made = {n: x if n == "target" else x.to(dtype) for n, x in made.items()}
    learned = [n for n in made if n not in ("target", "weight")]
    upstream = torch.randn(N, dtype=torch.float64)

    def answer(function: Any, as_dtype: torch.dtype) -> list[Tensor]:
        leaves = {n: x if n == "target" else x.to(as_dtype).clone() for n, x in made.items()}
        for name in learned:
            leaves[name].requires_grad_()
        loss = function(leaves)
        loss.backward(upstream.to(loss.dtype) if reduction == "none" else None)
        grads = [leaves[n].grad for n in learned]
        return [loss.detach(), *(g for g in grads if g is not None)]

    def ours(leaves: dict[str, Tensor]) -> Tensor:
        return linear_cross_entropy(**leaves, reduction=reduction, ignore_index=IGNORED, **settings)

    def theirs(leaves: dict[str, Tensor]) -> Tensor:
        whole: dict[str, Any] = {**dict.fromkeys(names), **leaves}
        return plain(whole, reduction, settings.get("softcap"), settings.get("temperature", 1.0))

    right, found = answer(theirs, torch.float64), answer(ours, dtype)
    usual = answer(theirs, dtype)
    assert len(right) == len(found) == len(learned) + 1
    for exact, one, other in zip(right, found, usual, strict=True):
        scale = float(exact.abs().max())
        bound = 2 * float((other.double() - exact).abs().max()) + 2e-6 * scale
        if dtype == torch.float64:
            bound = 1e-12 * scale
        assert float((one.double() - exact).abs().max()) <= bound


def test_is_that_of_pytorch() -> None:
    """Fails if an argument of PyTorch 2.13's function means something else here."""
    theirs = getattr(F, "linear_cross_entropy", None)
    made = case()
    kept = {"linear_bias": made["linear_bias"], "weight": made["weight"]}
    for reduction in ("none", "mean", "sum"):
        for index in (None, IGNORED):
            values = (made["input"], made["linear_weight"], made["target"])
            settings: dict[str, Any] = {"reduction": reduction, "ignore_index": index}
            found = linear_cross_entropy(*values, **kept, **settings)
            if theirs is not None:
                right = theirs(*values, **kept, **settings)
            else:  # PyTorch 2.11
                logits = F.linear(values[0], values[1], made["linear_bias"])
                right = F.cross_entropy(
                    logits, values[2], made["weight"], reduction=reduction,
                    ignore_index=-100 if index is None else index,
                )  # fmt: skip
            torch.testing.assert_close(found, right)
    one = linear_cross_entropy(made["input"][1], made["linear_weight"], made["target"][1])
    assert one.shape == ()
    nothing = linear_cross_entropy(made["input"][:0], made["linear_weight"], made["target"][:0])
    assert nothing.isnan()


def test_a_mean_makes_its_gradients_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the backward pass of a mean or a sum on a CPU computes logits again."""
    monkeypatch.setattr("fastmem._core.token_bits_backward", None)
    made = {n: x.float() for n, x in case().items()}
    hidden = made["input"].requires_grad_()
    for reduction in ("mean", "sum"):
        loss = linear_cross_entropy(
            hidden, made["linear_weight"], made["target"].long(), reduction=reduction
        )
        loss.backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None


def test_autocast_casts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a loss that the reduced way refuses is cast again for the other way."""
    casts = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            casts.append((kwargs or {}).get("dtype") == torch.bfloat16)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(reduced, "DEVICES", ["cpu"])
    hidden, weight = torch.randn(6, 4), torch.randn(8, 4)
    with torch.autocast("cpu", torch.bfloat16), Count():
        linear_cross_entropy(hidden, weight, torch.arange(6))
    assert sum(casts) == 2


def test_a_factor_that_is_nan_or_negative() -> None:
    """Fails if a NaN factor reaches another row, or an ignored row."""
    made = case()
    factor = torch.full((N,), -2.0, dtype=torch.float64)
    factor[1] = factor[0] = math.nan  # row 0 is ignored
    hidden = made["input"].requires_grad_()
    losses = linear_cross_entropy(
        hidden, made["linear_weight"], made["target"], reduction="none", token_weight=factor,
        ignore_index=IGNORED,
    )  # fmt: skip
    assert losses.isnan().nonzero().flatten().tolist() == [1]
    assert (losses[2:] <= 0).all()
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert hidden.grad.isnan().any(1).nonzero().flatten().tolist() == [1]


def test_a_target_outside_of_the_vocabulary() -> None:
    """Fails if such a target reads another class's weight, an error is raised, or NaN spreads."""
    made = case()
    for outside in (-1, V, 1 << 40):
        target = made["target"].clone()
        target[1] = outside
        losses = linear_cross_entropy(
            made["input"], made["linear_weight"], target, weight=made["weight"], reduction="none"
        )
        assert losses.isnan().nonzero().flatten().tolist() == [1]


def test_module() -> None:
    """Fails if the module's layer or settings do not reach the function."""
    made = case()
    loss = LinearCrossEntropyLoss(
        D, V, bias=True, dtype=torch.float64, weight=made["weight"], reduction="sum", softcap=2.0
    )
    found = loss(made["input"], made["target"], made["token_weight"])
    assert loss.linear.bias is not None
    right = linear_cross_entropy(
        made["input"], loss.linear.weight, made["target"], linear_bias=loss.linear.bias,
        weight=made["weight"], token_weight=made["token_weight"], reduction="sum", softcap=2.0,
    )  # fmt: skip
    assert torch.equal(found, right)
    assert set(loss.state_dict()) == {"linear.weight", "linear.bias", "weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "avg"}, "one of none, mean, sum, not 'avg'"),
        ({"label_smoothing": 0.1}, "label_smoothing must be 0, not 0.1"),
        ({"options": "auto"}, "options must be None, not 'auto'"),
        ({"target": torch.rand(N, V)}, "not probabilities of torch.float32"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, r"target \(4,\) with input \(37, 12\)"),
        ({"target": [1]}, "target must be a torch.Tensor, not list"),
        ({"linear_weight": torch.zeros(V, 2, D).double()}, r"must be \(V, D\), not \(50, 2, 12\)"),
        ({"weight": torch.ones(4)}, r"weight is torch.float32 of shape \(4,\): .* \(50,\)"),
        ({"weight": torch.ones(V, dtype=torch.int64)}, "weight is torch.int64"),
        ({"token_weight": torch.ones(1)}, r"token_weight is .*\(1,\): expected .* \(37,\)"),
        ({"token_weight": torch.ones(N, device="meta")}, "token_weight is on meta, input on cpu"),
        ({"ignore_index": 1.5}, "ignore_index must be an int64, not 1.5"),
        ({"softcap": 0.0}, "softcap must be above 0"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    """Fails if a wrong argument gets another error, or none."""
    made = case()
    values = {n: made[n] for n in ("input", "linear_weight", "target")} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**values)


def test_public() -> None:
    """Fails if the package does not offer the loss by its name."""
    assert fastmem.linear_cross_entropy is linear_cross_entropy
    assert fastmem.LinearCrossEntropyLoss is LinearCrossEntropyLoss


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_arguments_are_checked_before_they_are_reshaped(reduction: str) -> None:
    """Fails if D = 0 is an error, or a sparse or scalar input is another error than ValueError."""
    targets = torch.tensor([0, 1, 2])
    nats = linear_cross_entropy(torch.zeros(3, 0), torch.zeros(4, 0), targets, reduction=reduction)
    assert torch.allclose(nats, torch.tensor(math.log(4) * (3 if reduction == "sum" else 1)))
    bad = ((torch.zeros(3, 4).to_sparse(), targets, "to_dense"), (torch.zeros(()), targets[0], "D"))
    for input, target, message in bad:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(input, torch.zeros(4, 4), target, reduction=reduction)
