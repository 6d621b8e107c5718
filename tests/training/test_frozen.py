"""Weights with requires_grad False, and weights of another type than the precision."""

import copy
from pathlib import Path

import pytest
import torch
from cases.train_cases import SET, SHAPE

from fastmem import GPT, TrainConfig, sequence_bits, train, train_many
from fastmem.models.engine import Precision
from fastmem.training import group as groups
from fastmem.training.optimizer import RowAdamW

PRECISIONS: list[Precision] = ["fp32", "bf16-mixed", "bf16-true", "bf16-stochastic"]
FROZEN = [("blocks",), ("token_embedding",), ("embedding", "norm", "bias"), ("blocks.0.qkv",)]


def frozen(parts: tuple[str, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    model = GPT(SHAPE, seed).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in parts))
    return model


def by_torch(model: GPT, steps: int, config: TrainConfig) -> None:
    """The same training with autograd and torch.optim, of the weights that are not frozen."""
    config = config.for_shape(SHAPE)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [
        {
            "params": [p for n, p in trained.items() if ("embedding" in n) == embeds],
            "factor": factor,
        }
        for embeds, factor in ((True, config.embedding_factor), (False, 1.0))
    ]
    adamw = torch.optim.AdamW(
        groups, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    for step in range(steps):
        for group in adamw.param_groups:
            group["lr"] = group["factor"] * config.rate(step / steps, steps)
        adamw.zero_grad()
        model.token_bits(SET.to_torch()).mean().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained.values(), config.clip)
        adamw.step()


@pytest.mark.parametrize("parts", FROZEN, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_frozen_weights_stay(parts: tuple[str, ...], precision: Precision) -> None:
    """Fails if a frozen weight changes in any bit, or a weight that is not frozen stays."""
    dtype = torch.bfloat16 if precision in ("bf16-true", "bf16-stochastic") else torch.float32
    model = frozen(parts, dtype=dtype)
    before = copy.deepcopy(model)
    config = TrainConfig(steps=20, precision=precision, weight_decay=0.1)
    train(model, SET, config, progress=False)
    for name, parameter in model.named_parameters():
        kept = torch.equal(parameter, before.get_parameter(name))
        assert kept != parameter.requires_grad, name
        assert parameter.requires_grad == before.get_parameter(name).requires_grad


@pytest.mark.parametrize("parts", FROZEN, ids=str)
def test_as_with_an_optimizer_of_torch(parts: tuple[str, ...]) -> None:
    """Fails if frozen weights count in the norm that is clipped, or rates and moments land on other
    weights: five steps against autograd and torch.optim.AdamW."""
    config = TrainConfig(steps=5, batch=SET.count, weight_decay=0.1, clip=0.3)
    # In float64, since the mean gradient of a key's bias is zero up to rounding.
    model, theirs = (frozen(parts, dtype=torch.float64) for _ in range(2))
    train(model, SET, config, progress=False)
    by_torch(theirs, 5, config)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name))


def test_a_run_with_frozen_weights_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if moments of a resumed run land on other weights, or the same checkpoint continues a
    run that freezes others."""
    config, path = TrainConfig(steps=30), tmp_path / "run"
    whole = frozen(("blocks",))
    train(whole, SET, config, progress=False)

    class Stop(Exception):
        pass

    def stops(self: groups.Group) -> None:
        if self.runs and self.runs[0].result.steps == 11:
            self.save()
            raise Stop

    gather = groups.Group._gather
    monkeypatch.setattr(groups.Group, "_gather", lambda self: (stops(self), gather(self)))
    with pytest.raises(Stop):
        train(frozen(("blocks",)), SET, config, path, progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"another run \(model frozen is \['blocks"):
        train(GPT(SHAPE), SET, config, path, progress=False)
    resumed = frozen(("blocks",))
    train(resumed, SET, config, path, progress=False)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_refused() -> None:
    """Fails if nothing is trained, models that freeze different weights are trained as one, or a
    frozen weight is rounded."""
    config = TrainConfig(steps=3, batch=4)
    with pytest.raises(ValueError, match="every weight is frozen: call requires_grad_"):
        train(frozen(("",)), SET, config, progress=False)
    with pytest.raises(ValueError, match=r"need the same frozen weights, not \[\] and \['blocks"):
        train_many([GPT(SHAPE, 1), frozen(("blocks",))], [SET, SET], [config] * 2, progress=False)
    with pytest.raises(
        ValueError, match=r"round the frozen token_embedding.weight from torch.floa"
    ):
        train(frozen(("token",)), SET, TrainConfig(steps=3, precision="bf16-true"), progress=False)
    models = [frozen(("blocks",), seed) for seed in (1, 2)]
    before = copy.deepcopy(models)
    train_many(models, [SET, SET], [config] * 2, progress=False)
    for model, first in zip(models, before, strict=True):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, first.get_parameter(name)) != parameter.requires_grad


def test_the_norm_of_trained_gradients_is_clipped() -> None:
    """Fails if a gradient of a frozen weight, even one that is not finite, counts in the norm."""
    parameters, gradients = torch.ones(1, 10), torch.ones(1, 10)
    gradients[0, 3:7] = torch.nan
    spans = [(0, 3), (7, 10)]
    config = TrainConfig()
    optimizer = RowAdamW(parameters, gradients, [config], [None], embeddings=2, trained=spans)
    optimizer.step([0.1])
    assert torch.equal(parameters[0, 3:7], torch.ones(4))
    trained = torch.cat([parameters[0, :3], parameters[0, 7:]])
    assert torch.all(trained < 1)
    assert torch.isfinite(trained).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_the_type_of_the_precision(precision: Precision, dtype: torch.dtype) -> None:
    """Fails if bfloat16 weights are trained in bfloat16 under the name fp32 or bf16-mixed."""
    model, config = GPT(SHAPE).to(dtype), TrainConfig(steps=10, precision=precision)
    result = train(model, SET, config, progress=False)
    wanted = torch.float32 if precision in ("fp32", "bf16-mixed") else torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {wanted}
    plain = GPT(SHAPE).to(dtype).to(wanted)
    assert train(plain, SET, config, progress=False).memorized_bits == result.memorized_bits
    bits = sequence_bits(model, SET, precision).sum()
    assert result.memorized_bits == pytest.approx(SET.coded_entropy_bits - bits)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_autocast_of_the_caller_changes_nothing(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a run in fp32 computes in bfloat16 because the caller is inside autocast, or one in
    bf16-mixed is scored with weights that autocast kept from before."""
    monkeypatch.setattr("fastmem.models.engine.FUSED", False)
    found, config = [], TrainConfig(steps=10, precision=precision)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(train(GPT(SHAPE), SET, config, progress=False))
    curves = [[point.memorized_bits for point in result.curve] for result in found]
    assert curves[0] == curves[1]
