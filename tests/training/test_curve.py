"""Scores during training: of the whole data set, or of a fixed sample of a large one."""

import io
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.train_cases import SET, SHAPE, run, timeless, weights

import fastmem
from fastmem import (
    GPT,
    CanarySequences,
    PrefixedSequences,
    Sequences,
    TrainConfig,
    TrainResult,
    UniformSequences,
    sequence_bits,
    train,
)
from fastmem.memorization.capacity import late_gain
from fastmem.sweeps.rows import RunSpec, make_row
from fastmem.training import curve, group as groups
from fastmem.training.curve import CountedSubset, estimated, sample, sample_size, score_sizes
from fastmem.training.group import Group
from fastmem.training.run_state import RunState

LARGE = UniformSequences(count=300, length=8, vocab=32, seed=1)
FEW = TrainConfig(epochs=12, batch=30)
"""So few epochs that a set above MIN_SAMPLE is scored on a sample."""

STAGED = [TrainConfig(steps=1600, until="converged", tolerance=t) for t in (0.0, 0.9)]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each score; sets above 50 are large."""
    sizes: list[int] = []
    bits = fastmem.models.score.sequence_bits
    monkeypatch.setattr(curve, "MIN_SAMPLE", 50)
    monkeypatch.setattr(
        fastmem.training.run_state,
        "sequence_bits",
        lambda model, sequences, precision: (
            sizes.append(sequences.count) or bits(model, sequences, precision)
        ),
    )
    return sizes


def trained(sequences: Sequences, config: TrainConfig, **more: Any) -> tuple[GPT, TrainResult]:
    model = GPT(SHAPE)
    return model, train(model, sequences, config, progress=False, **more)


@pytest.mark.parametrize(
    ("config", "count", "size"),
    [
        (TrainConfig(epochs=2), 4096, 4096),
        (TrainConfig(epochs=2), 1_000_000, 33_333),
        (TrainConfig(epochs=59), 1_000_000, 983_334),
        (TrainConfig(epochs=60), 1_000_000, 1_000_000),
        (TrainConfig(epochs=2), 10_000, 4096),
        (TrainConfig(), 400, 400),
        (TrainConfig(seconds=60), 1_000_000, 4096),
        (TrainConfig(seconds=60), 4096, 4096),
    ],
)
def test_scores_take_at_most_a_tenth_of_the_steps(
    config: TrainConfig, count: int, size: int
) -> None:
    """Fails if a million sequences in two epochs are scored whole each time, or small sets are
    not."""
    assert sample_size(config, count) == size
    sizes = score_sizes(config, count)
    assert sizes[:-1] == [size] * (len(sizes) - 1)
    assert sizes[-1] == count
    steps = config.total_steps(count)
    if steps is not None and 4096 < size < count:
        assert sum(sizes[:-1]) / 3 <= steps * 128 / 10 < sum(sizes[:-1]) / 3 * 1.1


def test_a_large_set_is_scored_on_a_sample_and_whole_at_the_end(scored: list[int]) -> None:
    """Fails if each score takes the whole set, the last a part, or scores change the training."""
    model, result = trained(LARGE, FEW)
    assert scored == [60] * (len(result.curve) - 1) + [300]
    assert [point.sampled for point in result.curve] == [60] * (len(scored) - 1) + [None]
    assert (result.curve[-1].low, result.curve[-1].high) == (None, None)
    held = LARGE.coded_entropy_bits - sequence_bits(model, LARGE).sum()
    assert result.memorized_bits == pytest.approx(held)
    assert (result.stopped_by, result.steps) == ("budget", 120)


def test_samples_estimate_the_whole(monkeypatch: pytest.MonkeyPatch, scored: list[int]) -> None:
    """Fails if an estimate or its interval is wrong, also where sequences repeat or share a
    prefix."""
    repeated = fastmem.repeated(UniformSequences(200, 8, 32, seed=1), 0.3, times=3)
    canaries = CanarySequences(
        UniformSequences(200, 8, 32, seed=1), UniformSequences(20, 8, 32, seed=5), times=5
    )
    prefixed = PrefixedSequences(LARGE, 3)
    for sequences in (LARGE, repeated, canaries, prefixed):
        model, result = trained(sequences, FEW)
        with monkeypatch.context() as patched:
            patched.setattr(curve, "MIN_SAMPLE", 10_000)
            whole_model, whole = trained(sequences, FEW)
        assert weights(model) == weights(whole_model)
        assert [p.step for p in result.curve] == [p.step for p in whole.curve]
        assert result.curve[-1].memorized_bits == whole.curve[-1].memorized_bits
        off = []
        for ours, exact in zip(result.curve[:-1], whole.curve[:-1], strict=True):
            assert ours.low is not None
            assert ours.high is not None
            half = (ours.high - ours.low) / 2
            assert ours.memorized_bits == pytest.approx((ours.low + ours.high) / 2)
            off.append((ours.memorized_bits - exact.memorized_bits) / half)
        # All points have the same sample, so their errors are much alike.
        assert max(map(abs, off)) < 1.6


def test_the_interval_holds_the_truth() -> None:
    """Fails if the interval ignores the size of the sample, the fraction of the set that it is, or
    the factor of 95 %."""
    sequences = UniformSequences(count=400, length=8, vocab=32)
    bits = np.random.default_rng(0).gamma(4.0, 8.0, 400)
    truth = sequences.coded_entropy_bits - bits.sum()
    for size in (40, 300):
        held = 0
        for seed in range(1000):
            indices = fastmem.permutation(seed, curve._ORDER, 400, 0, size)
            found = estimated(bits[indices], sequences)
            assert found.low is not None
            assert found.high is not None
            held += found.low <= truth <= found.high
        assert 925 <= held <= 970, size


def test_the_sample_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the sample depends on the step, the threads, the model or the batch, is not random,
    or is the same for another seed."""
    first = sample(FEW, 10**6)
    assert first is not None
    assert len(set(first.tolist())) == len(first) == 200_000
    assert (np.diff(first.astype(np.int64)) > 0).all()
    assert abs(first.mean() - 5e5) < 3 * 1e6 / math.sqrt(12 * len(first))
    monkeypatch.setattr(fastmem.data.order, "threads_or_all", lambda _: 1)
    np.testing.assert_array_equal(sample(replace(FEW, lr=0.1), 10**6), first)
    assert not np.array_equal(sample(replace(FEW, seed=1), 10**6), first)
    assert sample(TrainConfig(), 8533) is None


def test_a_gpu_makes_its_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if other sequences of the sample are made on a GPU than on a CPU."""
    asked: list[Any] = []
    monkeypatch.setattr(UniformSequences, "_on_gpu", lambda self, rows, *_: asked.append(rows))
    indices = sample(replace(FEW, steps=None, epochs=2), 10**6)
    assert indices is not None
    device, read = torch.device("cuda"), [0]
    part = CountedSubset(UniformSequences(10**6, 8, 32), indices, read.append)
    part._on_gpu(range(5, 9), torch.int64, device)
    part._on_gpu(np.array([7, 2], np.uint64), torch.int64, device)
    CountedSubset(LARGE, None, read.append)._on_gpu(range(3), torch.int64, device)
    assert [list(rows) for rows in asked] == [
        indices[5:9].tolist(), [indices[7], indices[2]], [0, 1, 2]
    ]  # fmt: skip
    assert read == [0, 0, 4, 0]


def test_a_subset_has_no_known_entropy() -> None:
    """Fails if a part of a data set has the entropy of the whole set, or the whole set none."""
    base, indices = UniformSequences(100, 8, 32), np.array([3, 5], np.uint64)
    assert math.isnan(CountedSubset(base, indices, lambda _: None).coded_entropy_bits)
    whole = CountedSubset(base, None, lambda _: None)
    assert whole.coded_entropy_bits == base.coded_entropy_bits == 3500


def test_stopped_and_resumed_ends_with_the_same_bytes(tmp_path: Path, scored: list[int]) -> None:
    """Fails if a resumed run takes another sample, or its checkpoint does not say which points are
    estimates."""
    whole, expected = trained(LARGE, FEW)
    for stop in (1, 61, 119):
        group = Group([RunState(GPT(SHAPE), LARGE, FEW, tmp_path / f"{stop}.pt")])
        with group.bar(False) as bar:
            for _ in range(stop):
                group.step(bar)
        group.save()
        model, result = trained(LARGE, FEW, checkpoint=tmp_path / f"{stop}.pt")
        assert weights(model) == weights(whole)
        assert timeless(result) == timeless(expected)


def test_stages_are_scored_whole(monkeypatch: pytest.MonkeyPatch, scored: list[int]) -> None:
    """Fails if the error of a sample decides whether a run has converged."""
    exact = [trained(SET, config)[1] for config in STAGED]
    del scored[:]
    monkeypatch.setattr(curve, "sample_size", lambda _, count: min(count, 10))
    result, early = (trained(SET, config)[1] for config in STAGED)
    sizes = score_sizes(STAGED[0], 20)
    assert scored[: len(sizes)] == sizes
    assert [p.step for p in result.curve if p.sampled is None] == [100, 200, 400, 800, 1600]
    assert {p.sampled for p in result.curve} == {10, None}
    for found, expected in zip((result, early), exact, strict=True):
        assert timeless(replace(found, curve=[])) == timeless(replace(expected, curve=[]))
    assert [result.stopped_by, early.stopped_by] == ["budget", "converged"]


@pytest.mark.parametrize("until", ["budget", "converged"])
def test_a_budget_of_seconds_ends_whole(
    monkeypatch: pytest.MonkeyPatch, scored: list[int], until: str
) -> None:
    """Fails if the time of a sampled score ends a run, or a stage, without a whole score."""
    score = RunState.score
    monkeypatch.setattr(RunState, "score", lambda *a: time.sleep(0.07) or score(*a))
    config = TrainConfig(seconds=0.6, until=until, tolerance=0.0)  # type: ignore[arg-type]
    _, result = trained(LARGE, config)
    assert result.stopped_by == "budget"
    assert result.curve[-1].sampled is None
    assert scored[-1] == 300
    assert 50 in scored
    assert {point.sampled for point in result.stages} <= {None}
    assert bool(result.stages) is (until == "converged")


def test_rows_say_which_points_are_estimates(tmp_path: Path, scored: list[int]) -> None:
    """Fails if a row does not say what was scored, changes for a small set, or a late gain is the
    error of a sample."""
    _, result = trained(LARGE, FEW)
    spec = RunSpec(SHAPE, LARGE, FEW)
    row = make_row(spec, torch.device("cpu"), result)
    first, last = row["curve"][0], row["curve"][-1]
    assert first["low"] < first["memorized_bits"] < first["high"]
    assert first["sampled"] == 60
    assert last.keys() == {"step", "seconds", "memorized_bits"}
    assert row["memorized_bits"]["strict"] == last["memorized_bits"]
    small = make_row(spec, torch.device("cpu"), run(TrainConfig(steps=20))[1])
    assert all(point.keys() == last.keys() for point in small["curve"])
    before = {"memorized_bits": 90.0, "low": 80.0, "high": 99.0, "sampled": 60}
    assert late_gain([before, {"memorized_bits": 100.0}]) == pytest.approx(0.01)
    unknown = replace(result.curve[0], memorized_bits=math.nan, low=math.nan, high=math.nan)
    point = fastmem.sweeps.rows._point(unknown)
    assert (point["memorized_bits"], point["low"], point["high"]) == (None, None, None)


def test_a_score_is_shown(monkeypatch: pytest.MonkeyPatch, scored: list[int]) -> None:
    """Fails if a long score looks like a hung run, on a terminal or in a log."""
    monkeypatch.setattr(groups, "DISPLAY_SECONDS", -1.0)
    for is_terminal in (True, False):
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda answer=is_terminal: answer)
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(fastmem.base.terminal, "LINE_SECONDS", 0.0)
        train(GPT(SHAPE), UniformSequences(2500, 8, 32), TrainConfig(steps=1))
        assert "scoring 0%, " in screen.getvalue()
        assert "scoring 41%, " in screen.getvalue()  # batches of 1024


def test_the_time_left_has_the_scores(monkeypatch: pytest.MonkeyPatch, scored: list[int]) -> None:
    """Fails if the scores that are left, or the part of a score that is done, do not count."""
    state = RunState(GPT(SHAPE), LARGE, FEW)  # 120 steps of 30
    group = Group([state])
    assert group.seconds_left is None
    state.result.steps, group._trained = 30, [30 * 30 * 8, 9.0]  # 10 ms a sequence
    state._scored = 0.25
    rest = 7 * 60 + 300  # at 0.3, 0.4, …, 0.9 and 1
    assert group.seconds_left == pytest.approx(90 * 30 * 0.01 + rest * 0.01 / 3)
    group._scored = [60 * 8, 1.2]  # 20 ms
    assert group.seconds_left == pytest.approx(90 * 30 * 0.01 + rest * 0.02)
    now = group._tick + 1.2
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    group._read_tokens = 30 * 8  # half of a score, in another 1.2 s
    assert group.seconds_left == pytest.approx(27 + (rest - 30) * 2.4 / 90)
    timed = RunState(GPT(SHAPE), LARGE, TrainConfig(seconds=60))
    group = Group([timed])
    group._trained, timed.result.seconds = [800.0, 1.0], 20.0
    assert group.seconds_left == pytest.approx(40 + 300 * 8 / 800 / 3)


def test_a_label_moves_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the label of a bar is made once, or not from the time left."""
    monkeypatch.setattr(groups, "DISPLAY_SECONDS", -1.0)
    asked: list[float | None] = []
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)

    def label(left: float | None) -> str:
        asked.append(left)
        return f"call {len(asked)}"

    train(GPT(SHAPE), SET, TrainConfig(steps=20), progress=label)
    assert asked[0] is None
    assert all(left is not None for left in asked[1:])
    assert len(asked) > 20
    assert asked[-1] == 0
    assert "call 9 |" in screen.getvalue()
