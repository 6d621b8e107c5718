"""Training several models together: each gets the result of training alone, and fails alone."""

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.train_cases import SET, SHAPE, run, timeless, weights

from fastmem import GPT, TrainConfig, TrainResult, UniformSequences, train, train_many
from fastmem.models.engine import flat
from fastmem.training.group import Group
from fastmem.training.run_state import Diverged, RunState


def different(config: TrainConfig, seeds: tuple[int, ...] = (0, 1, 2)) -> Any:
    """Models, data sets and configs that differ in everything that may differ in a group."""
    models = [GPT(SHAPE, seed) for seed in seeds]
    sets = [UniformSequences(20 + 4 * seed, 8, 32, seed) for seed in seeds]
    configs = [
        replace(config, seed=seed, lr=0.02 / (1 + seed), beta1=0.9 - 0.1 * seed, clip=1 + seed)
        for seed in seeds
    ]
    return models, sets, configs


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_gets_what_it_gets_alone(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if runs share a batch, a rate, a moment or a limit, or a run that ends takes the place
    of another: budgets are 30 epochs of 20, 24 and 28 sequences, so 75, 90 and 105 steps.
    """
    monkeypatch.setattr("fastmem.models.engine.FUSED", fused)
    together, sets, configs = different(TrainConfig(epochs=30, batch=8))
    results = train_many(together, sets, configs, progress=False)
    assert [result.steps for result in results] == [75, 90, 105]
    for model, alone, *how, result in zip(
        together, *different(TrainConfig(epochs=30, batch=8)), results, strict=True
    ):
        single = train(alone, *how, progress=False)
        assert isinstance(result, TrainResult)
        assert [point.step for point in result.curve] == [point.step for point in single.curve]
        assert result.memorized_bits == pytest.approx(single.memorized_bits, rel=1e-3)
        # Softmax ignores the keys' bias: its gradient is rounding alone, which AdamW scales up.
        for name, ours in model.named_parameters():
            theirs = alone.get_parameter(name)
            if name.endswith("qkv.bias"):
                ours, theirs = (torch.cat([x[:16], x[32:]]) for x in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-3)


def test_weights_leave_the_common_tensor_at_the_end() -> None:
    """Fails if training one model again changes another, or each model keeps the memory of all."""
    models, sets, configs = different(TrainConfig(steps=5, batch=8))
    train_many(models, sets, configs, progress=False)
    for model in models:
        (storage,) = {p.untyped_storage().data_ptr(): p for p in model.parameters()}.values()
        assert storage.untyped_storage().nbytes() == 4 * SHAPE.parameter_count
    before = weights(models[1])
    train(models[0], sets[0], TrainConfig(steps=5), progress=False)
    assert weights(models[1]) == before


def test_one_that_diverges_fails_alone() -> None:
    """Fails if a run that diverged ends other runs, or is returned as a result."""
    models, sets, configs = different(TrainConfig(steps=60, batch=8))
    configs[1] = replace(configs[1], lr=100.0)
    first, failure, last = train_many(models, sets, configs, progress=False)
    assert isinstance(failure, Diverged)
    assert "try --lr 33" in str(failure)
    alone, sets, configs = different(TrainConfig(steps=60, batch=8))
    for e, result in ((0, first), (2, last)):
        single = train(alone[e], sets[e], configs[e], progress=False)
        assert isinstance(result, TrainResult)
        assert result.memorized_bits == pytest.approx(single.memorized_bits, rel=1e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_runs_go_on_from_different_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    """Fails if a group cannot resume after a kill between two checkpoints: one run is at step 20,
    one at its end, one without a checkpoint. Alone, so that the bytes can be the same."""
    monkeypatch.setattr("fastmem.models.engine.FUSED", fused)
    config = TrainConfig(steps=60, batch=8)
    models, sets, configs = different(config)
    paths = [tmp_path / f"{e}.pt" for e in range(3)]
    for e, steps in ((0, 20), (1, 60)):
        group = Group([RunState(models[e], sets[e], configs[e], paths[e])])
        with group.bar(False) as bar:
            for _ in range(steps):
                group.step(bar)
        if group.runs:
            group.save()
    resumed, sets, configs = different(config)
    results = train_many(resumed, sets, configs, paths, progress=False)
    alone, sets, configs = different(config)
    for e, result in enumerate(results):
        single = train(alone[e], sets[e], configs[e], progress=False)
        assert isinstance(result, TrainResult)
        assert result.steps == 60
        assert [point.step for point in result.curve] == [point.step for point in single.curve]
        assert result.memorized_bits == pytest.approx(single.memorized_bits, rel=1e-3)
    assert weights(resumed[1]) == weights(alone[1])


def test_a_group_resumes_with_the_same_bytes(tmp_path: Path) -> None:
    """Fails if a checkpoint of a group holds another row, or lacks part of its own."""
    config = TrainConfig(steps=60, batch=8)
    whole, sets, configs = different(config)
    expected = train_many(whole, sets, configs, progress=False)
    models, sets, configs = different(config)
    paths = [tmp_path / f"{e}.pt" for e in range(3)]
    group = Group([RunState(*run) for run in zip(models, sets, configs, paths, strict=True)])
    with group.bar(False) as bar:
        for _ in range(37):
            group.step(bar)
    group.save()
    assert max(path.stat().st_size for path in paths) < 4 * 4 * SHAPE.parameter_count + 20000
    resumed, sets, configs = different(config)
    results = train_many(resumed, sets, configs, paths, progress=False)
    assert [weights(model) for model in resumed] == [weights(model) for model in whole]
    for result, other in zip(results, expected, strict=True):
        assert isinstance(result, TrainResult)
        assert isinstance(other, TrainResult)
        assert timeless(result) == timeless(other)


def test_seconds_of_runs_share_the_clock() -> None:
    """Fails if each run counts the whole time of its group: then rows would not add up."""
    models, sets, configs = different(TrainConfig(seconds=0.2, batch=8))
    begin = time.perf_counter()
    results = train_many(models, sets, configs, progress=False)
    spent = time.perf_counter() - begin
    for result in results:
        assert isinstance(result, TrainResult)
        assert result.seconds >= 0.2
        assert result.stopped_by == "budget"
        assert result.curve[-1].step == result.steps
    assert sum(result.seconds for result in results) <= spent  # type: ignore[union-attr]


def test_the_curves_of_both_engines_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the fused engine and plain PyTorch learn differently at a mark of the curve:
    memorized bits agree to 1 % of the final bits."""
    curves = []
    for fused in (True, False):
        monkeypatch.setattr("fastmem.models.engine.FUSED", fused)
        curves.append([p.memorized_bits for p in run(TrainConfig(steps=200, batch=10))[1].curve])
    assert curves[0] != curves[1]
    np.testing.assert_allclose(curves[0], curves[1], rtol=0, atol=0.01 * curves[0][-1])


def test_a_trained_model_is_a_model(tmp_path: Path) -> None:
    """Fails if a model of views cannot be saved, copied, moved, written for transformers, or
    trained by another loop."""
    model, _ = run(TrainConfig(steps=5))
    before = weights(model)
    model.to_hf(tmp_path)
    assert weights(GPT.from_hf(tmp_path)) == before
    assert weights(copy.deepcopy(model)) == before
    other = GPT(SHAPE, seed=5)
    other.load_state_dict(model.state_dict())
    assert weights(other) == before
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.token_bits(SET.to_torch()).mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert weights(model) != before
    assert weights(other) == before
    assert model.double().head.dtype == torch.float64


def test_stochastic_rounding_trains_and_resumes(tmp_path: Path) -> None:
    """Fails if the random numbers restart after a stop, or do not depend on the seed."""
    config = TrainConfig(steps=40, batch=8, precision="bf16-stochastic")

    def of(config: TrainConfig, path: Path | None = None) -> list[Any]:
        model = GPT(SHAPE)
        result = train(model, SET, config, path, progress=False)
        assert model.head.dtype == torch.bfloat16
        return [flat(model).tolist(), timeless(result)]

    expected = of(config)
    group = Group([RunState(GPT(SHAPE), SET, config, tmp_path / "c.pt")])
    with group.bar(False) as bar:
        for _ in range(17):
            group.step(bar)
    group.save()
    assert of(config, tmp_path / "c.pt") == expected
    assert of(replace(config, precision="bf16-true")) != expected
    assert of(replace(config, seed=1)) != expected


def test_models_that_cannot_be_trained_together() -> None:
    """Fails if models of different shapes, lengths or batches get into one tensor, or lists of
    different lengths are cut to the shortest."""
    models, sets, configs = different(TrainConfig(steps=5, batch=8))
    for change, message in (
        ((models[:2], sets, configs), "2 models, 3 sets, 3 configs and 3 checkpoints"),
        (([models[0]] * 3, sets, configs), "a model is there twice"),
        (([*models[:2], torch.nn.Linear(2, 2)], sets, configs), "must be a fastmem.GPT, not Lin"),
        (([*models[:2], GPT(replace(SHAPE, heads=2))], sets, configs), "need the same model, not"),
        (([*models[:2], GPT(SHAPE).double()], sets, configs), "need the same dtype"),
        (
            (models, [*sets[:2], UniformSequences(9, 7, 32)], configs),
            "the same length, not 8 and 7",
        ),
        ((models, [*sets[:2], UniformSequences(5, 8, 32)], configs), "the same batch, not 8 and 5"),
        (
            (models, sets, [*configs[:2], TrainConfig(precision="bf16-mixed", batch=8)]),
            "the same precision, not fp32 and bf16-mixed",
        ),
    ):
        checkpoints = [None] * 3
        with pytest.raises(ValueError, match=message):
            train_many(*change, checkpoints, progress=False)
    for single, name, kind in (
        ((models[0], sets, configs), "models", "GPT"),
        ((None, sets, configs), "models", "NoneType"),
        ((models, sets[0], configs), "sets", "UniformSequences"),
        ((models, sets, configs[0]), "configs", "TrainConfig"),
        ((models, sets, configs, "a"), "checkpoints", "str"),
        ((models, sets, configs, Path("a")), "checkpoints", "PosixPath"),
    ):
        message = f"{name} must be a list with an entry for each model, not a {kind}"
        with pytest.raises(ValueError, match=message):
            train_many(*single)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two models have the same checkpoint"):
        train_many(models, sets, configs, [Path("a"), Path("./a"), None], progress=False)
    models[0].blocks[0].up_proj = torch.nn.Identity()  # type: ignore[index, assignment]
    with pytest.raises(ValueError, match=r"would ignore the class Identity of blocks\.0\.up_proj"):
        train(models[0], sets[0], configs[0])
    assert train_many([], []) == []
