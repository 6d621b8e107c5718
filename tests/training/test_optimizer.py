"""AdamW by row, and stochastic rounding."""

import copy
import math

import pytest
import torch

from fastmem import TrainConfig
from fastmem.training.optimizer import RowAdamW, stochastically_rounded


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.25, 0.5, 0.9, 1 - 2**-16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_has_the_right_mean(fraction: float, sign: float) -> None:
    """Fails if the probability of a neighbour is not the distance to the other neighbour, within
    six standard deviations of the binomial count, or a third value occurs."""
    below, above = torch.tensor([1.5, 1.5 + 2**-7]) * sign
    n = 1 << 18
    x = torch.full((n,), float(below) + fraction * float(above - below))
    rounded = stochastically_rounded(x, generator())
    assert rounded.dtype == torch.bfloat16
    up = int((rounded == above).sum())
    assert up + int((rounded == below).sum()) == n
    assert abs(up - n * fraction) <= 6 * math.sqrt(n * fraction * (1 - fraction))


def test_what_bfloat16_has_stays() -> None:
    """Fails if a bfloat16 number is changed, or a value that is not finite becomes a number."""
    patterns = torch.arange(1 << 16, dtype=torch.int32) << 16
    every = patterns.view(torch.float32)
    rounded = stochastically_rounded(every, generator()).float()
    finite = every.isfinite()
    assert torch.equal(rounded[finite], every[finite])
    assert torch.equal(rounded[every.isinf()], every[every.isinf()])
    # Among them the NaN of an NVIDIA GPU, 0x7fffffff, which a carry would make -0.
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32)
    assert stochastically_rounded(nans.view(torch.float32), generator()).isnan().all()


def test_rows_are_updated_as_by_optimizers_of_their_own() -> None:
    """Fails if a row gets the rate, betas, decay, clip or moments of another row, the first 20 of a
    row are not updated at the embeddings' rate, or a state does not resume: after three steps the
    second row alone moves to another optimizer."""
    configs = [
        TrainConfig(beta1=0.9, clip=1.0, weight_decay=0.1, lr=0.02, embedding_lr=0.06),
        TrainConfig(beta1=0.5, beta2=0.9, clip=0.01),
    ]
    rates = (0.1, 0.02)
    begin = torch.randn(2, 50, generator=generator())
    steps = torch.randn(6, 2, 50, generator=generator(1))
    expected = []
    for e, config in enumerate(configs):
        first, rest = (part.clone().requires_grad_() for part in begin[e].split([20, 30]))
        parts = [
            {"params": [first], "lr": rates[e] * (3 if e == 0 else 1)},
            {"params": [rest], "lr": rates[e]},
        ]
        betas = config.beta1, config.beta2
        adamw = torch.optim.AdamW(parts, betas=betas, weight_decay=config.weight_decay)
        for gradients in steps:
            first.grad, rest.grad = (part.clone() for part in gradients[e].split([20, 30]))
            torch.nn.utils.clip_grad_norm_([first, rest], config.clip)
            adamw.step()
        expected.append(torch.cat([first, rest]).detach())
    parameters, gradients = begin.clone(), torch.empty(2, 50)
    optimizer = RowAdamW(parameters, gradients, configs, [None, None], embeddings=20)
    for step in steps[:3]:
        gradients.copy_(step)
        optimizer.step(rates)
    second, its = parameters[1:].clone(), torch.empty(1, 50)
    state = copy.deepcopy(optimizer.state(1))
    moved = RowAdamW(second, its, configs[1:], [state], embeddings=20)
    for step in steps[3:]:
        gradients.copy_(step)
        optimizer.step(rates)
        its.copy_(step[1:])
        moved.step(rates[1:])
    torch.testing.assert_close(parameters[0], expected[0])
    torch.testing.assert_close(second[0], expected[1])


def test_rows_of_one_schedule_are_updated_as_alone() -> None:
    """Fails if rows that are updated in one call get the moments or the rate of another row: three
    rows, the first and the last of one schedule."""
    configs = [TrainConfig(), TrainConfig(beta1=0.5), TrainConfig()]
    begin = torch.randn(3, 50, generator=generator())
    steps = torch.randn(4, 3, 50, generator=generator(1))
    found = []
    for schedules in (["a", "b", "a"], None):
        parameters, gradients = begin.clone(), torch.empty(3, 50)
        optimizer = RowAdamW(parameters, gradients, configs, [None] * 3, schedules)
        for step in steps:
            gradients.copy_(step)
            optimizer.step([0.1, 0.02, 0.1])
        found.append(parameters)
    assert torch.equal(*found)


def test_small_updates_are_not_lost_to_stochastic_rounding() -> None:
    """Fails if updates below half a unit in the last place vanish, as with rounding to the nearest:
    100 steps of 0.001 from 1 give 0.9."""
    moved = {}
    for rounding in (True, False):
        config = TrainConfig(precision="bf16-stochastic" if rounding else "bf16-true")
        parameters = torch.ones(1, 4096, dtype=torch.bfloat16)
        gradients = torch.ones_like(parameters)
        optimizer = RowAdamW(parameters, gradients, [config], [None])
        for _ in range(100):
            gradients.fill_(1e-3)
            optimizer.step([0.001])
        moved[rounding] = parameters.double().mean().item()
        moments = optimizer.state(0)["parts"][1]["exp_avg"].dtype
        assert moments == (torch.float32 if rounding else torch.bfloat16)
    assert moved[True] == pytest.approx(0.9, abs=0.002)
    assert moved[False] == 1.0


def test_the_seed_decides_which_way_weights_are_rounded() -> None:
    """Fails if all models round by the same random numbers, for any seed."""
    found = []
    for seed in (0, 1, 1):
        config = TrainConfig(precision="bf16-stochastic", seed=seed)
        parameters = torch.ones(1, 4096, dtype=torch.bfloat16)
        gradients = torch.full_like(parameters, 1e-3)
        RowAdamW(parameters, gradients, [config], [None]).step([0.001])
        found.append(parameters)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_the_rounding_of_another_device() -> None:
    """Fails if the state of a GPU's generator, of 16 bytes, stops a run that goes on on a CPU."""
    config = TrainConfig(precision="bf16-stochastic")
    parameters = torch.ones(1, 4, dtype=torch.bfloat16)
    rows = parameters, torch.ones_like(parameters)
    state = RowAdamW(*rows, [config], [None]).state(0)
    state["rounding"] = torch.zeros(16, dtype=torch.uint8)
    RowAdamW(*rows, [config], [state]).step([0.1])
    assert (parameters < 1).all()
