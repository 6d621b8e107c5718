"""Training: what it reaches, that it resumes exactly, and how it fails."""

import io
import math
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.train_cases import SET, SHAPE, run, timeless, weights

import fastmem
from fastmem import (
    GPT,
    PrefixedSequences,
    Sequences,
    TrainConfig,
    UniformSequences,
    memorized_bits,
    train,
)
from fastmem.base.storage import write_sealed
from fastmem.data.order import batch_indices
from fastmem.models.flops import flops_per_token, matmul_rate
from fastmem.training import group as groups
from fastmem.training.curve import CURVE
from fastmem.training.group import Group
from fastmem.training.run_state import RunState


def test_an_overfitted_model_holds_the_entropy() -> None:
    """Fails if training cannot memorize: first tokens differ, so all other S - 1 tokens can be
    memorized."""
    sequences = UniformSequences(count=8, length=8, vocab=256, seed=1)
    assert len(set(sequences[:][:, 0])) == 8
    model = GPT(replace(SHAPE, vocab=256))
    result = train(model, sequences, TrainConfig(steps=500), progress=False)
    assert result.memorized_bits >= 0.99 * sequences.coded_entropy_bits
    bits = fastmem.sequence_bits(model, sequences)
    assert result.memorized_bits == pytest.approx(sequences.coded_entropy_bits - bits.sum())


@pytest.mark.parametrize(
    "sequences",
    [
        fastmem.repeated(UniformSequences(8, 8, 256, seed=1), 0.5, times=9),
        fastmem.CanarySequences(
            UniformSequences(6, 8, 256, seed=1), UniformSequences(2, 8, 256, seed=5), times=9
        ),
        PrefixedSequences(UniformSequences(12, 8, 256, seed=6), 3),
    ],
    ids=lambda sequences: sequences.kind,
)
def test_what_is_there_twice_is_counted_once(sequences: Sequences) -> None:
    """Fails if repeated sequences or a shared prefix count as more bits than their entropy: nine
    copies of the canaries would exceed the entropy several times, and a prefix in each row would be
    far below 0."""
    model = GPT(replace(SHAPE, vocab=256))
    state = RunState(model, sequences, TrainConfig(steps=400))
    group = Group([state])
    with group.bar(False) as bar:
        group.step(bar)
        assert abs(state.score(0.0).estimate) < 0.1 * sequences.coded_entropy_bits
        while group.runs:
            group.step(bar)
    held = state.result.memorized_bits / sequences.coded_entropy_bits
    assert 0.9 < held <= 1
    bits = fastmem.sequence_bits(model, sequences)
    rows, first = np.unique(sequences[:], axis=0, return_index=True)
    assert len(rows) < sequences.count or sequences.kind == "prefixed"
    right = sequences.coded_entropy_bits - bits[first].sum()
    assert state.result.memorized_bits == pytest.approx(right, rel=1e-6)
    assert state.result.curve[-1].memorized_bits == state.result.memorized_bits


def test_a_set_of_unknown_entropy_trains() -> None:
    """Fails if training refuses a foreign data set, or invents memorized bits for it."""
    model = GPT(SHAPE)
    result = train(model, Foreign(SET), TrainConfig(steps=20), progress=False)
    assert math.isnan(result.memorized_bits)
    assert all(math.isnan(point.memorized_bits) for point in result.curve)
    twin = GPT(SHAPE)
    train(twin, SET, TrainConfig(steps=20), progress=False)
    assert weights(model) == weights(twin)
    assert math.isnan(memorized_bits(np.ones(20), Foreign(SET)).fraction)
    for call in (lambda: Foreign(SET).held_out(3), lambda: PrefixedSequences(Foreign(SET), 3)):
        with pytest.raises(ValueError, match="Foreign"):
            call()


class Foreign(Sequences):
    """The rows of another data set, with unknown entropy, as from a file of text."""

    def __init__(self, base: Sequences) -> None:
        self.count, self.length, self.vocab, self.base = base.count, base.length, base.vocab, base

    def description(self) -> dict[str, Any]:
        return {"kind": "foreign"}

    @classmethod
    def _described(cls, description: dict[str, Any]) -> Sequences:
        raise NotImplementedError

    def _fill(self, out: Any, rows: Any, threads: int) -> None:
        self.base._fill(out, rows, threads)


def test_bf16_mixed_memorizes_as_fp32_does() -> None:
    """Fails if bfloat16 copies of the weights are made once and become stale."""
    full = run(TrainConfig(steps=200))[1].memorized_bits
    mixed = run(TrainConfig(steps=200, precision="bf16-mixed"))[1].memorized_bits
    assert mixed == pytest.approx(full, rel=0.1)
    assert mixed != full


def test_steps_epochs_and_the_curve() -> None:
    """Fails if budgets are miscounted, or the curve skips marks that the verdict reads."""
    _, by_steps = run(TrainConfig(steps=100, batch=10))
    assert (by_steps.steps, by_steps.epochs) == (100, 50.0)
    _, by_epochs = run(TrainConfig(epochs=50, batch=10))
    assert timeless(by_epochs) == timeless(by_steps)
    steps = [point.step for point in by_steps.curve]
    assert steps == sorted({math.ceil(100 * share) for share in CURVE})
    assert {90, 100} <= set(steps)
    assert by_steps.curve[-1].memorized_bits == by_steps.memorized_bits
    assert by_steps.tokens_per_second == pytest.approx(100 * 10 * 8 / by_steps.seconds)
    flops = by_steps.tokens_per_second * flops_per_token(SHAPE)
    assert by_steps.flops_per_second == pytest.approx(flops)
    assert by_steps.mfu == pytest.approx(flops / matmul_rate())


def test_a_budget_of_seconds_ends() -> None:
    """Fails if the clock is ignored, or the schedule does not end at the budget."""
    _, result = run(TrainConfig(seconds=0.5))
    assert result.seconds >= 0.5
    assert result.steps > 1
    assert result.curve[-1].step == result.steps


def test_a_batch_larger_than_the_set_is_the_set() -> None:
    """Fails if sequences are repeated within a step, which would count epochs too high."""
    _, result = run(TrainConfig(steps=3, batch=1000))
    assert result.epochs == 3.0


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    """Fails if the first or the last step has a rate of zero, or the peak is missed."""
    config = TrainConfig(steps=100, warmup=0.1, lr=0.5)
    state = RunState(GPT(SHAPE), SET, config)
    rates = []
    for state.result.steps in range(100):
        rates.append(state.rate)
    assert rates[0] == pytest.approx(0.5 * 0.05)
    assert max(rates) == pytest.approx(0.5, rel=0.01)
    assert 9 <= int(np.argmax(rates)) <= 10
    assert rates[-1] == pytest.approx(0.5 * 0.005 / 0.9)


def test_same_bytes_twice_and_seeds_apart() -> None:
    """Fails if anything random is not seeded, or the order ignores its seed."""
    config = TrainConfig(steps=20, batch=5)
    assert weights(run(config)[0]) == weights(run(config)[0])
    assert weights(run(config)[0]) != weights(run(replace(config, seed=1))[0])


def test_generated_batches_are_the_kept_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a data set that is generated batch by batch trains on other tokens than a resident
    one."""
    kept = weights(run(TrainConfig(steps=20, batch=5))[0])
    monkeypatch.setattr(groups, "RESIDENT_BYTES", 0)
    assert weights(run(TrainConfig(steps=20, batch=5))[0]) == kept


def test_a_fraction_of_a_gpu_keeps_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the limit on a GPU is the limit of a CPU, or depends on the memory that is free
    now."""
    asked = []

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 5, 80 << 30

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    cuda = torch.device("cuda:3")
    assert groups.resident_bytes(cuda) == pytest.approx(8 << 30)
    assert asked == [cuda]
    assert groups.resident_bytes(torch.device("cpu")) == 1 << 30


def test_batches_are_made_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a data set that is not resident is not made by to_torch, on the device of the model,
    from the sequences of the step alone."""
    asked = []

    def to_torch(self: Sequences, device: torch.device, indices: Any = None) -> torch.Tensor:
        asked.append((device, indices))
        return torch.zeros(len(indices), 8, dtype=torch.int64)

    monkeypatch.setattr(UniformSequences, "to_torch", to_torch)
    monkeypatch.setattr(groups, "RESIDENT_BYTES", 0)
    group = Group([RunState(GPT(SHAPE), SET, TrainConfig(batch=8))])
    assert asked == []
    group.runs[0].result.steps = 2
    group._gather()
    ((device, indices),) = asked
    assert device == torch.device("cpu")
    np.testing.assert_array_equal(indices, batch_indices(0, 2, 8, 20))


def test_every_sequence_is_seen_once_an_epoch() -> None:
    """Fails if batches repeat or skip sequences, also in a batch that ends one epoch and begins the
    next."""
    group = Group([RunState(GPT(SHAPE), SET, TrainConfig(batch=8))])
    seen = []
    for group.runs[0].result.steps in range(5):  # 40 sequences: two epochs, batches of 8
        group._gather()
        seen.append(group._tokens[0].clone())
    epochs = torch.cat(seen).reshape(2, 20, 8)
    expected = sorted(SET[:].tolist())
    for epoch in epochs:
        assert sorted(epoch.tolist()) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-true"])
def test_stopped_and_resumed_ends_with_the_same_bytes(tmp_path: Path, precision: str) -> None:
    """Fails if a checkpoint lacks weights, moments, order or curve."""
    config = TrainConfig(steps=60, batch=8, precision=precision)
    whole, expected = run(config)
    for stop in (1, 29, 59):
        group = Group([RunState(GPT(SHAPE), SET, config, tmp_path / f"{stop}.pt")])
        with group.bar(False) as bar:
            for _ in range(stop):
                group.step(bar)
        group.save()
        model, result = run(config, checkpoint=tmp_path / f"{stop}.pt")
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert timeless(result) == timeless(expected)


def test_killed_and_resumed_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Fails if kill -9 leaves a torn or wrong checkpoint. The child saves every 10 ms."""
    config = TrainConfig(steps=1000, batch=8)
    path = tmp_path / "run.pt"
    program = (
        "import sys, torch, fastmem, fastmem.training.group\n"
        "from pathlib import Path\n"
        "from fastmem import *\n"
        "torch.set_num_threads(1)\n"
        "fastmem.training.group.CHECKPOINT_SECONDS = 0.01\n"
        f"train(GPT({SHAPE}), {SET}, {config}, Path(sys.argv[1]), progress=False)"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(2):
        before = path.stat().st_mtime_ns if path.exists() else None
        with subprocess.Popen([sys.executable, "-c", program, str(path)]) as child:
            while not path.exists() or path.stat().st_mtime_ns == before:
                assert child.poll() is None
                time.sleep(0.001)
            child.kill()
    model, result = run(config, checkpoint=path)
    whole, expected = run(config)
    torch.set_num_threads(threads)
    assert weights(model) == weights(whole)
    assert timeless(result) == timeless(expected)


def test_a_finished_checkpoint_ends_at_once(tmp_path: Path) -> None:
    """Fails if a run that ended before its row was written trains again, or past its budget."""
    config = TrainConfig(steps=10)
    model, first = run(config, checkpoint=tmp_path / "c.pt")
    again, second = run(config, checkpoint=tmp_path / "c.pt")
    assert second == first
    assert weights(again) == weights(model)


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    """Fails if a damaged checkpoint, or one of another run, is used."""
    path = tmp_path / "c.pt"
    run(TrainConfig(steps=4), checkpoint=path)
    with pytest.raises(ValueError, match=r"another run \(train lr is 0.04 there, 0.01 here\)"):
        run(TrainConfig(steps=4, lr=0.01), checkpoint=path)
    weighted = fastmem.WeightedSequences(20, 8, fastmem.zipf(32))
    with pytest.raises(ValueError, match=r"\(sequences kind is uniform there, weighted here\)"):
        train(GPT(SHAPE), weighted, TrainConfig(steps=4), path, progress=False)
    for damage in (b"", path.read_bytes()[:-7], b"x" + path.read_bytes()[1:]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"c.pt is damaged: delete it"):
            run(TrainConfig(steps=4), checkpoint=path)
    buffer = io.BytesIO()
    torch.save({"identity": {}}, buffer)
    write_sealed(path, buffer.getvalue())
    with pytest.raises(ValueError, match=r"c.pt is a checkpoint of another version"):
        run(TrainConfig(steps=4), checkpoint=path)


def test_seconds_hold_the_last_score_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the time of a score does not count for the run: then rows add up to less than the
    time spent."""
    score = RunState.score
    monkeypatch.setattr(RunState, "score", lambda *a: time.sleep(0.1) or score(*a))
    _, result = run(TrainConfig(steps=1))
    assert result.seconds >= 0.1
    assert result.curve[-1].seconds == result.seconds


def test_the_line_of_a_progress_bar() -> None:
    """Fails if the bits of a repeated sequence count twice, or bits are shown for a data set of
    unknown entropy."""
    sequences = fastmem.repeated(UniformSequences(8, 8, 256, seed=1), 0.5, times=9)
    line = RunState(GPT(replace(SHAPE, vocab=256)), sequences, TrainConfig()).line(4.0)
    # 8 · 7 · (8 - 4) bits
    assert line == "0.03 bits/parameter, 4.000 bits/token, 0 tokens/s, 224 bits memorized"
    foreign = RunState(GPT(SHAPE), Foreign(SET), TrainConfig()).line(4.0)
    assert foreign == "4.000 bits/token, 0 tokens/s"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be above 0"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"seconds": 0}, "seconds must be above 0"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"epochs": -1}, "epochs must be above 0"),
        ({"seconds": math.inf}, "seconds must be above 0 and finite"),
        ({"steps": 5, "epochs": 5}, "the budget is one of steps, epochs and seconds"),
        ({"batch": 0}, "batch must be a whole number from 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": math.nan}, "lr must be above 0 and finite"),
        ({"beta2": 1.0}, "beta2 must be from 0 to below 1"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"seed": 2**64}, "seed must be an integer from 0"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"embedding_lr": -1.0}, "embedding_lr must be above 0"),
        ({"lr": "x"}, r"lr must be a number, got 'x' \(str\); pass a float"),
        ({"steps": True}, "steps must be a whole number, not True: pass an int"),
        ({"lr": 10**400}, "lr must be above 0 and finite"),
    ],
)
def test_bad_config(change: dict[str, float], message: str) -> None:
    """Fails if an invalid config is accepted, or fails late."""
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


@pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig)])
def test_each_field_of_a_config_refuses_what_it_is_not(name: str) -> None:
    """Fails if a config accepts a wrong type, or raises anything but a ValueError that names the
    field."""
    may_be_none = name in ("steps", "epochs", "seconds", "lr", "embedding_lr")
    for bad in (True, "x", math.nan, math.inf, -math.inf, [], {}, 1j, b"1", object(), None):
        if may_be_none and bad is None:
            continue
        with pytest.raises(ValueError, match=name):
            TrainConfig(**{name: bad})  # type: ignore[arg-type]


def test_arguments_of_another_type() -> None:
    """Fails if a wrong type of data set, config or path raises an AttributeError later."""
    model = GPT(SHAPE)
    for arguments, message in (
        (([1, 2],), r"a data set must be a fastmem.Sequences, not \[1, 2\] \(list\)"),
        ((SET, {"steps": 3}), r"a config must be a fastmem.TrainConfig, not .* \(dict\)"),
        ((SET, TrainConfig(steps=3), 7), r"a checkpoint must be a path or None, not 7 \(int\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train(model, *arguments, progress=False)  # type: ignore[arg-type]


def test_checkpoints_at_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an invalid environment variable raises an error in the middle of a run, or never."""
    for value in ("often", "nan", "-1"):
        monkeypatch.setattr(groups, "CHECKPOINT_SECONDS", value)
        with pytest.raises(ValueError, match=f"must be seconds, at least 0, not {value!r}"):
            train(GPT(SHAPE), SET, TrainConfig(steps=1))


def test_sets_that_do_not_fit_the_model() -> None:
    """Fails if a token or a position is read outside the model, or nothing is coded."""
    for sequences, message in (
        (UniformSequences(4, 1, 32), "length is 1: only tokens after the first are coded"),
        (UniformSequences(4, 9, 32), "sequences of length 9 for a model of length 8"),
        (UniformSequences(4, 8, 33), "a vocabulary of 33 for a model of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            train(GPT(SHAPE), sequences, TrainConfig(steps=1))
