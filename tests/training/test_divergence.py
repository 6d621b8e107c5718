"""Which runs diverge, and what is reported and saved."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cases.train_cases import SET, SHAPE, run

from fastmem import GPT, TrainConfig, train
from fastmem.training import group as groups
from fastmem.training.group import Group
from fastmem.training.run_state import PATIENCE, Diverged, RunState


def test_a_jump_is_no_divergence() -> None:
    """Fails if a loss that comes back ends a run, or a loss that stays high or is huge does not."""
    state = RunState(GPT(SHAPE), SET, TrainConfig(steps=100))
    for step, loss in enumerate((5.0, *[12.0] * PATIENCE, 5.0, *[12.0] * PATIENCE)):
        state.check(loss, 0.1, step)
    with pytest.raises(Diverged, match=r"at step 77.*12 bits per token"):
        state.check(12.0, 0.1, 77)
    calm = RunState(GPT(SHAPE), SET, TrainConfig(steps=100))
    calm.check(5.0, 0.1, 1)
    with pytest.raises(Diverged, match="56 bits per token"):
        calm.check(56.0, 0.1, 2)


@pytest.mark.parametrize(("first", "limit"), [(1.0, 11.0), (8.0, 17.0)])
def test_what_is_high_follows_the_first_loss_and_the_vocabulary(first: float, limit: float) -> None:
    """Fails if a model that begins with a low loss may not lose it, or a model that begins with a
    high loss may not go on: V is 32, so uniform bits are 5."""
    state = RunState(GPT(SHAPE), SET, TrainConfig(steps=100))
    state.check(first, 0.1, 1)
    for step in range(2, 99):
        state.check(limit, 0.1, step)
    for step in range(99, 99 + PATIENCE):
        state.check(limit + 0.1, 0.1, step)
    with pytest.raises(Diverged, match="at step 150"):
        state.check(limit + 0.1, 0.1, 150)


def test_divergence_names_step_and_rate() -> None:
    """Fails if a diverged run returns numbers."""
    with pytest.raises(Diverged, match=r"diverged at step \d+, learning rate .*; try --lr 33"):
        run(TrainConfig(steps=200, lr=100.0))
    model = GPT(SHAPE)
    with torch.no_grad():
        model.head[3] = math.nan
    with pytest.raises(Diverged, match=r"diverged at step 1, .*nan bits per token"):
        train(model, SET, TrainConfig(steps=5), progress=False)


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([5.0] * 56 + [1e3] + [5.0] * 93, 57),
        ([5.0] * 2 + [math.nan] + [5.0] * 147, 3),
        ([5.0] * 57 + [12.0] * 93, 108),  # the 51st that is high
        ([5.0] * 57 + [12.0] * 50 + [5.0] * 43, None),
        ([5.0] * 149 + [1e3], 150),  # the last, at which the set is scored too
    ],
)
def test_divergence_does_not_depend_on_when_losses_are_read(
    losses: list[float], step: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the step at which a run fails depends on when its losses are read, which on a GPU
    depends on the clock."""
    for read_steps, display in ((1, 1e9), (7, 1e9), (50, 1e9), (50, 0.0)):
        monkeypatch.setattr(groups, "READ_STEPS", read_steps)
        monkeypatch.setattr(groups, "DISPLAY_SECONDS", display)
        group = planted_group(losses)
        (state,) = group.runs
        take(group, 150)
        assert state.finished is (step is None)
        if step is not None:
            assert str(group.failures[state]).startswith(told_at(state, step))


def planted_group(*losses: list[float], paths: Sequence[Path | None] = (None, None)) -> Group:
    """A group with a run for each list of losses, which the engine then returns."""
    group = Group(
        [
            RunState(GPT(SHAPE), SET, TrainConfig(steps=150, lr=0.01 * 2**e), path)
            for e, (_, path) in enumerate(zip(losses, paths, strict=False))
        ]
    )
    planted = zip(*losses, strict=True)
    group._step._engine.compute = lambda _: torch.tensor(next(planted))  # type: ignore[method-assign]
    return group


def take(group: Group, steps: int) -> None:
    with group.bar(False) as bar:
        for _ in range(steps):
            if group.runs:
                group.step(bar)


def told_at(state: RunState, step: int) -> str:
    rate = state.config.rate((step - 1) / 150, 150)
    return f"diverged at step {step}, learning rate {rate:.3g}: "


def test_divergence_is_counted_on_after_a_stop(tmp_path: Path) -> None:
    """Fails if a checkpoint lacks the limit, or the number of steps above the limit, including
    losses that were not read yet."""
    losses, path = [5.0] * 57 + [12.0] * 93, tmp_path / "c.pt"
    group = planted_group(losses, paths=[path])
    take(group, 71)
    group.save()
    resumed = planted_group(losses[71:], paths=[path])
    (state,) = resumed.runs
    take(resumed, 150)
    assert str(resumed.failures[state]).startswith(told_at(state, 108))


def test_a_run_that_diverged_fails_alone_and_is_not_saved(tmp_path: Path) -> None:
    """Fails if the step, rate or loss of another run is reported, a later step than the first, or
    diverged weights are saved: the loss of the second run is NaN from step 6 on, and steps 6 to 9
    are not scored."""
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    group = planted_group([5.0] * 150, [5.0] * 5 + [math.nan] * 145, paths=paths)
    calm, lost = group.runs
    take(group, 8)
    group.save()
    assert [path.exists() for path in paths] == [True, False]
    take(group, 1)
    assert group.runs == [calm]
    assert list(group.failures) == [lost]
    assert str(group.failures[lost]).startswith(told_at(lost, 6) + "the loss is nan")
