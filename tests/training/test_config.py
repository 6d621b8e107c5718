"""The learning rates that follow from a shape, and that training uses them."""

import json

import numpy as np
import pytest
import torch

from fastmem import GPT, GPTConfig, TrainConfig, UniformSequences, train
from fastmem.models.engine import flat


@pytest.mark.parametrize(
    ("layers", "width", "vocab", "lr", "embedding_lr"),
    [
        (1, 8, 16, 0.04, 0.04),
        (1, 32, 128, 0.04, 0.04),
        (1, 64, 128, 0.01, 0.04),
        (4, 32, 1024, 0.01, 0.08),
        (2, 64, 2048, 0.005, 0.1),
        (48, 1600, 50257, 0.04 * 12288 / (12 * 48 * 1600**2), 0.1),
    ],
)
def test_rates_of_shapes(
    layers: int, width: int, vocab: int, lr: float, embedding_lr: float
) -> None:
    """Fails if the rule differs from the rule measured and stated in docs/lab.md."""
    found = TrainConfig().for_shape(GPTConfig(layers, width, 1, vocab, 16))
    assert found.lr == pytest.approx(lr)
    assert found.embedding_lr == pytest.approx(embedding_lr)


def test_rates_that_are_given_stay() -> None:
    """Fails if the rule overrides a given rate, or a given lr does not set both rates."""
    shape = GPTConfig(1, 64, 1, 1024, 16)
    for given, expected in (
        ({"lr": 0.5}, (0.5, 0.5)),
        ({"embedding_lr": 0.5}, (0.01, 0.5)),
        ({"lr": 0.5, "embedding_lr": 0.25}, (0.5, 0.25)),
    ):
        found = TrainConfig(**given).for_shape(shape)
        assert (found.lr, found.embedding_lr) == expected
        assert found.for_shape(GPTConfig(1, 8, 1, 16, 4)) == found


@pytest.mark.parametrize("fused", [True, False])
def test_training_moves_embeddings_at_their_own_rate(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a rate goes to the wrong weights: AdamW's first step moves each weight with a
    gradient by its rate."""
    monkeypatch.setattr("fastmem.models.engine.FUSED", fused)
    model = GPT(GPTConfig(2, 8, 2, vocab=8, length=8))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert torch.equal(flat(model)[:64], before["token_embedding.weight"].flatten())
    config = TrainConfig(steps=1, warmup=0.0, lr=0.001, embedding_lr=0.004)
    train(model, UniformSequences(32, 8, 8), config, progress=False)
    for name, after in model.named_parameters():
        moved = (after - before[name]).abs().max().item()
        # Half of the schedule's fall is behind the middle of its only step.
        assert moved == pytest.approx(0.002 if "embedding" in name else 0.0005, rel=0.01), name


def test_numbers_of_numpy() -> None:
    """Fails if a NumPy number is refused, or stays one where a row or a checkpoint writes it."""
    config = TrainConfig(
        steps=np.int64(5), batch=np.uint8(8), lr=np.float32(0.5), embedding_lr=np.float16(0.25),
        warmup=np.float64(0.5), clip=np.int32(2), seed=np.uint64(2**64 - 1),
    )  # fmt: skip
    assert config == TrainConfig(5, None, None, batch=8, lr=0.5, embedding_lr=0.25, warmup=0.5,
                                 clip=2, seed=2**64 - 1)  # fmt: skip
    assert not any(isinstance(value, np.generic) for value in vars(config).values())
    assert json.loads(json.dumps(vars(config))) == vars(config)
    assert TrainConfig(epochs=np.float32(2)).total_steps(128) == 2
    for bad in (
        {"steps": np.float64(5)}, {"batch": np.bool_(True)}, {"lr": np.float32("nan")},
        {"seed": np.int64(-1)}, {"lr": np.str_("1")}, {"clip": np.float32(0)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            TrainConfig(**bad)  # type: ignore[arg-type]
