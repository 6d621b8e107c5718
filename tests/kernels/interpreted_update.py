"""kernels/adamw.py, interpreted: against float64, PyTorch's AdamW, and as a step calls it."""

import copy
from typing import Any

import pytest
import torch
from cases.triton_interpreted import DEVICE, NATIVE, planted
from fastmem.kernels import adamw
from torch import Tensor

from fastmem import GPT, GPTConfig, TrainConfig
from fastmem.models.engine import make_engine, stacked
from fastmem.training import fused_optimizer
from fastmem.training.fused_optimizer import FusedAdamW, make_optimizer
from fastmem.training.optimizer import RowAdamW

CONFIGS = [
    TrainConfig(beta1=0.9, clip=1.0, weight_decay=0.1, lr=0.02, embedding_lr=0.06),
    TrainConfig(beta1=0.5, beta2=0.9, clip=0.01),
    TrainConfig(beta1=0.0, clip=100.0, weight_decay=0.01, seed=2**64 - 1),
]
RATES = [(0.02, 0.01 / (step + 1), 0.001 * step) for step in range(20)]
FROZEN = [(3, 30), (41, 42), (1000, 1500)]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not NATIVE:
        monkeypatch.setattr(fused_optimizer, "DEVICES", ["cpu"])
    torch.manual_seed(0)


def example(P: int, steps: int = 20) -> tuple[Tensor, Tensor]:
    """Weights of three models, and their gradients of each step."""
    scales = torch.logspace(-3, 3, steps)[:, None, None]
    return torch.randn(3, P), torch.randn(steps, 3, P) * scales


def trained(
    kind: Any,
    begin: Tensor,
    gradients: Tensor,
    configs: Any = None,
    states: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Weights and optimizer after the steps."""
    parameters, now = begin.clone(), torch.empty_like(begin)
    configs = configs or CONFIGS[: len(begin)]
    optimizer = kind(parameters, now, configs, states or [None] * len(begin), **kwargs)
    for rates, step in zip(RATES, gradients, strict=False):
        now.copy_(step)
        optimizer.step(rates[: len(begin)])
    return parameters, optimizer


def exact(begin: Tensor, gradients: Tensor, embeddings: int, spans: Any) -> Tensor:
    """The recipe in float64."""
    w, mask = begin.double(), torch.zeros(begin.shape[1], dtype=torch.bool)
    for a, b in spans or [(0, begin.shape[1])]:
        mask[a:b] = True
    for e, c in enumerate(CONFIGS):
        m = v = torch.zeros(1, dtype=torch.float64)
        for t, (rates, step) in enumerate(zip(RATES, gradients, strict=False), 1):
            g = step[e].double() * mask
            g = g * min(1.0, c.clip / (float(g.norm()) + 1e-6))
            m, v = c.beta1 * m + (1 - c.beta1) * g, c.beta2 * v + (1 - c.beta2) * g * g
            rate = torch.full(mask.shape, rates[e], dtype=torch.float64)
            rate[:embeddings] *= c.embedding_factor
            change = m / (1 - c.beta1**t) / ((v / (1 - c.beta2**t)).sqrt() + 1e-8)
            w[e] -= mask * rate * (c.weight_decay * w[e] + change)
    return w


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize(("P", "embeddings", "spans"), [
    (1, 0, None), (1, 1, None), (1500, 37, None), (1024, 1024, None), (1500, 20, FROZEN),
])  # fmt: skip
def test_no_worse_than_twice_pytorch(P: int, embeddings: int, spans: Any) -> None:
    """Fails if a weight, a row's rate, betas, decay or clip is wrong over 20 steps of three
    rows."""
    begin, gradients = example(P)
    kwargs: Any = {"embeddings": embeddings, "trained": spans}
    ours, _ = trained(make_optimizer, begin, gradients, **kwargs)
    theirs, _ = trained(RowAdamW, begin, gradients, **kwargs)
    right = exact(begin, gradients, embeddings, spans)
    for found, torchs, wanted in zip(ours, theirs, right, strict=True):
        assert error(found, wanted) <= 2 * error(torchs, wanted) + 1e-7


def test_frozen_weights_keep_their_bytes() -> None:
    """Fails if a weight outside the trained ranges changes, or its gradient, NaN here, counts."""
    begin, gradients = example(1500, 5)
    frozen = torch.ones(1500, dtype=torch.bool)
    for a, b in FROZEN:
        frozen[a:b] = False
    begin[:, frozen] = torch.nan
    gradients[:, :, frozen] = torch.nan
    ours, optimizer = trained(make_optimizer, begin, gradients, embeddings=20, trained=FROZEN)
    assert torch.equal(ours.view(torch.int32)[:, frozen], begin.view(torch.int32)[:, frozen])
    assert ours[:, ~frozen].isfinite().all()
    assert not torch.equal(ours[:, ~frozen], begin[:, ~frozen])
    assert type(optimizer) is FusedAdamW


@pytest.mark.parametrize("P", [1, 700, 3001])
def test_the_same_bytes_twice_from_poisoned_memory(P: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an order of summation is left to chance, or memory is read before it is written."""
    begin, gradients = example(P, 5)
    first, _ = trained(make_optimizer, begin, gradients)
    empty = torch.empty
    poison = lambda *a, **k: empty(*a, **k).fill_(torch.nan)  # noqa: E731
    monkeypatch.setattr("fastmem.kernels.adamw.torch.empty", poison)
    assert torch.equal(first, trained(make_optimizer, begin, gradients)[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_alone(value: float) -> None:
    """Fails if it changes another row, or its NaN is clipped to a number."""
    begin, gradients = example(2000, 5)
    right, _ = trained(make_optimizer, begin, gradients)
    gradients[3, 1, 1234] = value
    found, _ = trained(make_optimizer, begin, gradients)
    assert torch.equal(found[[0, 2]], right[[0, 2]])
    assert found[1, 1234].isnan()
    assert found[1].isnan().all() == (value != value)


@pytest.mark.parametrize("precision", ["fp32", "bf16-true", "bf16-stochastic"])
@pytest.mark.parametrize(("first", "second"), [(RowAdamW, FusedAdamW), (FusedAdamW, RowAdamW),
                                               (FusedAdamW, FusedAdamW)])  # fmt: skip
def test_states_move_both_ways(first: Any, second: Any, precision: Any) -> None:
    """Fails if an optimizer cannot go on from the other's state, or from none of a first step, or
    not as itself: to the byte for the kernels, in every precision."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    begin, gradients = (x[..., 1:, :].to(dtype) for x in example(300, 9))
    configs = [TrainConfig(precision=precision, seed=seed, weight_decay=0.1) for seed in (3, 4)]
    kwargs: Any = {"embeddings": 20, "trained": [(5, 200), (250, 290)]}
    whole, _ = trained(second, begin, gradients, configs, **kwargs)
    for stop in (0, 4):
        half, optimizer = trained(first, begin, gradients[:stop], configs, **kwargs)
        states = [copy.deepcopy(optimizer.state(e)) for e in (0, 1)]
        now = torch.empty_like(half)
        moved = second(half, now, configs, states, **kwargs)
        for rates, step in list(zip(RATES, gradients, strict=False))[stop:]:
            now.copy_(step)
            moved.step(rates[:2])
        if first is second:
            assert torch.equal(half, whole)
        near = {"fp32": 1e-6, "bf16-true": 0.02, "bf16-stochastic": 0.02}[precision]
        assert error(half, whole.double()) <= near
        keys = set(optimizer.state(0))
        assert keys == set(moved.state(0))
        shapes = [[p["exp_avg"].shape for p in o.state(0)["parts"]] for o in (moved,)]
        assert shapes == [[(15,), (180,), (0,), (40,)]]


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.9])
def test_stochastic_rounding_has_the_right_mean(fraction: float) -> None:
    """Fails if the probability of a neighbour is not the distance to the other one, within six
    standard deviations, the noise of two seeds, steps or neighbours is the same, or a third value
    occurs. The rate makes one step of -fraction * 2**-7 from 1.5 + 2**-7."""
    n = 1 << 14
    begin = torch.full((2, n), 1.5 + 2**-7, dtype=torch.bfloat16)
    configs = [TrainConfig(precision="bf16-stochastic", seed=s, clip=1e9) for s in (0, 2**63)]
    rows = []
    for steps in (0.0, 6.0):
        parameters = begin.clone()
        state = {
            "step": torch.tensor(steps),
            "exp_avg": torch.zeros(n),
            "exp_avg_sq": torch.zeros(n),
        }
        states: Any = [{"parts": [{}, state]}] * 2 if steps else [None] * 2
        optimizer = FusedAdamW(parameters, torch.ones_like(parameters), configs, states)
        change = 1.0 if not steps else 0.2 / (1 - 0.8**7) / (0.01 / (1 - 0.99**7)) ** 0.5
        optimizer.step([fraction * 2**-7 / change] * 2)
        assert ((parameters == 1.5) | (parameters == begin)).all()
        rows += list(parameters == 1.5)
    for row in rows:
        down = int(row.sum())
        assert abs(down - n * fraction) <= 6 * (n * fraction * (1 - fraction)) ** 0.5
        both = int((row[1:] & row[:-1]).sum())
        assert abs(both - n * fraction**2) <= 8 * (n * fraction**2) ** 0.5 + 8
    for a in range(4):
        for b in range(a):
            assert int((rows[a] & rows[b]).sum()) < n * (fraction**2 + fraction) / 2


def test_models_without_weights() -> None:
    """Fails if a launch of no programs is tried."""
    rows = torch.zeros(2, 0)
    FusedAdamW(rows, rows.clone(), CONFIGS[:2], [None, None]).step([0.1, 0.1])


def test_pieces_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a block of a piece is lost where P needs more than MOST_PIECES blocks."""
    begin, gradients = example(3001, 5)
    right = exact(begin, gradients, 0, None)
    monkeypatch.setattr(adamw, "MOST_PIECES", 2)
    assert error(trained(make_optimizer, begin, gradients)[0], right) <= 1e-6


PLANTED = {
    "no correction": ("(rates / correction1)", "rates"),
    "decay of another rate": ("w -= rates * decay", "w -= rate * decay"),
    "a piece left out": ("piece < pieces", "piece < pieces - 1"),
    "the last weights left out": ("grid = (cdiv(P, BLOCK), E)", "grid = (P // BLOCK, E)"),
    "a rate of another row": ("rates_ptr + e)", "rates_ptr)"),
    "embeddings off by one": ("i < embeddings", "i <= embeddings"),
    "steps not counted": ("tl.store(steps_ptr + e, step)", "pass"),
    "minimum of the clip lost": ("tl.where(scale > 1, 1.0, scale)", "scale"),
    "frozen weights counted": ("g = tl.load(gradients_ptr + e * P + i, mask=mask",
                               "g = tl.load(gradients_ptr + e * P + i, mask=i < P"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a kernel with an error is as near to float64 as ten times the limit."""
    begin, gradients = example(1500, 5)
    kwargs: Any = {"embeddings": 20, "trained": FROZEN}
    right = exact(begin, gradients, 20, FROZEN)
    module = planted("adamw.py", *PLANTED[name], tmp_path).adamw
    assert error(trained(make_optimizer, begin, gradients, **kwargs)[0], right) <= 1e-6
    monkeypatch.setattr(adamw, "update", module.update)
    assert error(trained(make_optimizer, begin, gradients, **kwargs)[0], right) > 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16-stochastic"])
def test_a_model_learns(precision: Any) -> None:
    """Fails if steps as a group takes them do not lower the loss of the model."""
    shape = GPTConfig(layers=1, width=8, heads=2, vocab=17, length=5)
    models = [GPT(shape).to(DEVICE) for _ in range(2)]
    if precision != "fp32":
        models = [model.bfloat16() for model in models]
    engine = make_engine(models[0], stacked(models), precision)
    config = TrainConfig(precision=precision)
    optimizer = make_optimizer(engine.parameters, engine.gradients, [config] * 2, [None] * 2)
    tokens = torch.randint(17, (2, 8, 5))
    losses = []
    for _ in range(10):
        losses.append(engine.compute(tokens).clone())
        optimizer.step([0.01, 0.01])
    assert type(optimizer) is FusedAdamW
    assert (losses[-1] < losses[0] - 0.2).all()
