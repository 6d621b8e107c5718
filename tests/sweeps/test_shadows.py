"""Shadow models: their halves, their groups, and what is refused."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmem
from fastmem.sweeps import job, shadows
from fastmem.training.config import TrainConfig

SHAPE = {"layers": 1, "width": 8, "heads": 4, "vocab": 16, "length": 8}
TOKENS = fastmem.UniformSequences(41, 8, 16).tokens(slice(None))


def target(**train: Any) -> dict[str, Any]:
    config = TrainConfig(**({"steps": 30, "batch": 8} | train))
    return {"model": SHAPE, "train": asdict(config), "seed": 3, "epochs": 12.0}


def test_halves_are_random_and_complementary() -> None:
    """Fails if a sequence is not in half of the models, two pairs share their halves, or a half
    depends on the number of models."""
    found = shadows.halves(8, 41, seed=2)
    assert (found.sum(0) == 4).all()
    assert found.sum(1).tolist() == [20, 21] * 4
    assert (found[0] == ~found[1]).all()
    assert 5 < (found[0] != found[2]).sum() < 36
    assert (shadows.halves(2, 41, seed=2) == found[:2]).all()
    assert (shadows.halves(2, 41, seed=3) != found[:2]).any()


def test_the_budget_is_the_targets_epochs(tmp_path: Path) -> None:
    """Fails if the shadow models of a target that stopped early, or trained for seconds, are
    trained another number of epochs, or from the target's seed."""
    row = target(steps=None, seconds=5.0, until="converged")
    found = shadows.shadow_models(row, TOKENS[:40], 2, tmp_path)
    train = found.settings["train"]
    assert (train["steps"], train["seconds"], train["until"], train["seed"]) == (
        30,
        None,
        "budget",
        4,
    )
    assert found.bits.shape == (2, 40)
    assert found.bits[found.is_member].mean() < found.bits[~found.is_member].mean()


def test_as_many_together_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if shadow models do not train in groups that memory has room for, or groups change the
    bits beyond rounding, or halves of different sizes end the study."""
    whole = shadows.shadow_models(target(batch=64), TOKENS, 4, tmp_path / "whole")
    sizes = []
    trained = job.train_group

    def counted(runs: Any, *more: Any) -> Any:
        sizes.append(len(runs))
        return None if len(runs) > 1 else trained(runs, *more)

    monkeypatch.setattr(shadows, "train_group", counted)
    single = shadows.shadow_models(target(batch=64), TOKENS, 4, tmp_path / "single")
    assert sizes == [2, 1, 1, 1, 1]
    assert single.bits == pytest.approx(whole.bits, abs=0.05)
    sizes.clear()
    monkeypatch.setattr(shadows, "free_bytes", lambda _: 1)
    shadows.shadow_models(target(), TOKENS[:40], 4, tmp_path / "small")
    assert sizes == [1, 1, 1, 1]


def test_more_models_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if models that are finished are trained again when more are asked for."""
    first = shadows.shadow_models(target(), TOKENS[:40], 2, tmp_path)
    more = shadows.shadow_models(target(), TOKENS[:40], 4, tmp_path)
    assert np.array_equal(more.bits[:2], first.bits)
    monkeypatch.setattr(shadows, "train_group", None)
    again = shadows.shadow_models(target(), TOKENS[:40], 4, tmp_path)
    assert np.array_equal(again.bits, more.bits)
    assert not list(tmp_path.glob("*.pt"))


def test_refused(tmp_path: Path) -> None:
    """Fails if shadow models of another target or of other data, a damaged file, or a model that
    diverged is taken."""
    folder = tmp_path / "shadows"
    shadows.shadow_models(target(), TOKENS[:40], 2, folder)
    with pytest.raises(ValueError, match=r"shadow models of another target \(train\): give"):
        shadows.shadow_models(target(lr=0.01), TOKENS[:40], 2, folder)
    with pytest.raises(ValueError, match="shadow models of other data: give another --out"):
        shadows.shadow_models(target(), TOKENS[1:], 2, folder)
    path = folder / "001.bits"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"001\.bits is damaged: delete it"):
        shadows.shadow_models(target(), TOKENS[:40], 2, folder)
    shadows.shadow_models(target(lr=0.01), TOKENS[:40], 2, folder, overwrite=True)
    with pytest.raises(ValueError, match=r"shadow model 1: Diverged: diverged at step"):
        shadows.shadow_models(target(lr=1e4, clip=1e9), TOKENS[:40], 2, tmp_path / "high")
    with pytest.raises(ValueError, match="3 shadow models: give an even number"):
        shadows.shadow_models(target(), TOKENS[:40], 3, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(ValueError, match="not the folder of a group of shadow models"):
        shadows.shadow_models(target(), TOKENS[:40], 2, tmp_path / "mine")
