"""Stopping when a run has converged: known curves, the schedule, and runs that stop by it."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmem import GPT, GPTConfig, SweepConfig, TrainConfig, UniformSequences, load_rows, sweep
from fastmem import train as train_one
from fastmem.convergence import RATIOS, extrapolated, has_converged, in_stage, stage_ends
from fastmem.member import CURVE, Member, TrainResult
from fastmem.train import Group, train_many

SHAPE = GPTConfig(layers=1, width=16, heads=4, vocab=32, length=8)
SET = UniformSequences(count=12, length=8, vocab=32)
CONFIG = TrainConfig(steps=1600, until="converged", batch=8)


def run(config: TrainConfig, **more: object) -> tuple[GPT, TrainResult]:
    model = GPT(SHAPE)
    return model, train_one(model, SET, config, progress=False, **more)


def timeless(result: TrainResult) -> dict[str, object]:
    facts = asdict(result)
    del facts["seconds"], facts["tokens_per_second"]
    for point in facts["curve"] + facts["stages"]:
        point.pop("seconds", None)
    return facts


@pytest.mark.parametrize("steps", [None, 1, 99, 100, 199, 200, 1000, 10**6, 2**70])
def test_stages_double_and_end_at_marks_of_the_curve(steps: int | None) -> None:
    """Fails if a stage ends where the set is not scored, is not twice the one before, or the first
    is shorter than it must be to learn anything."""
    ends = stage_ends(steps)
    assert ends[-1] == 1.0
    assert all(2 * a == b for a, b in zip(ends, ends[1:], strict=False))
    assert set(ends) <= set(CURVE)
    if steps is not None:
        assert ends[0] * steps >= 100 or len(ends) == 1
        assert ends[0] * steps < 200 or len(ends) == 10
    begins = [0.0, *ends[:-1]]
    for begin, end in zip(begins, ends, strict=True):
        assert in_stage(begin, steps) == (begin, end)
        assert in_stage(math.nextafter(end, 0), steps) == (begin, end)
    assert in_stage(1.0, steps)[1] == 1.0


def test_the_rate_falls_to_zero_in_each_stage() -> None:
    """Fails if a stage is not the schedule of a whole run, or a budget has another than before."""
    stop, plain = TrainConfig(until="converged", warmup=0.1, lr=0.5), TrainConfig(lr=0.5)
    rates = np.array([stop.rate(step / 1000, 1000) for step in range(1000)])
    for begin, end in ((0, 125), (125, 250), (250, 500), (500, 1000)):
        stage = rates[begin:end]
        places = (np.arange(end - begin) + 0.5) / (end - begin)
        np.testing.assert_allclose(stage, 0.5 * np.minimum(places / 0.1, (1 - places) / 0.9))
    assert plain.rate(0.5, 1000) == pytest.approx(0.5 * (1 - 0.5005) / 0.98)
    timed = [stop.rate(share, None) for share in np.linspace(0, 0.9999, 5000)]
    assert min(timed) > 0
    assert sum(b > a for a, b in zip(timed, timed[1:], strict=False)) > 100  # rises again


def test_a_power_law_is_found_exactly() -> None:
    """Fails if the sum of the gains to come is not the limit of b - a · n^-c, or a bound not one of
    the extreme exponents."""
    for c in (0.2, 0.5, 1.0):
        n = 100 * 2.0 ** np.arange(5)
        bits = 5000 - 9000 * n**-c
        found = extrapolated(bits, entropy=1e9)
        assert found.estimate == pytest.approx(5000)
        later = 5000 - 9000 * (n[-1] * 8) ** -c
        assert extrapolated(bits, 1e9, doublings=3).estimate == pytest.approx(later)
        gain = bits[-1] - bits[-2]
        for bound, r in ((found.low, RATIOS[0]), (found.high, RATIOS[1])):
            assert bound == pytest.approx(bits[-1] + gain * sum(r**k for k in range(1, 2000)))
    assert extrapolated(bits, 1e9, doublings=0).high == bits[-1]


def test_no_more_than_the_entropy_and_no_less_than_was_measured() -> None:
    """Fails if bits are foretold that the data does not have, or fewer than are there."""
    assert extrapolated([600.0, 800.0, 950.0], entropy=1000.0).high == 1000.0
    falling = extrapolated([600.0, 800.0, 790.0], entropy=1000.0)
    assert (falling.estimate, falling.low, falling.high) == (790.0, 790.0, 790.0)
    two = extrapolated([80.0, 90.0], entropy=1e6)
    assert two.low is not None
    assert two.high is not None
    assert 90 < two.low < two.estimate < two.high


@pytest.mark.parametrize(
    ("bits", "converged"),
    [
        ([100.0, 150.0, 152.0], True),
        ([100.0, 150.0, 154.0], False),  # 2.6 % of 154
        ([150.0, 152.0], False),  # two stages show no trend
        ([1.0, 1.001, 1.01], False),  # gains grow: it has only begun
        ([-5.0, -5.0, -5.0], False),
        ([100.0, 150.0, 149.0], True),
        ([math.nan] * 3, False),  # of unknown entropy
        ([], False),
    ],
)
def test_when_a_run_has_converged(bits: list[float], converged: bool) -> None:
    """Fails if a run stops that still gains 2 % a doubling, before it has begun, or never."""
    assert has_converged(bits, 0.02) is converged
    assert not has_converged(bits, 0.0)


def test_a_run_stops_by_itself() -> None:
    """Fails if a run goes on after a doubling that added nothing, stops within a stage, or says
    that it stopped by something else."""
    _, result = run(replace(CONFIG, steps=12800))
    assert result.stopped_by == "converged"
    assert result.steps in [100 * 2**k for k in range(2, 7)]
    assert [point.step for point in result.stages] == [
        100 * 2**k for k in range(len(result.stages))
    ]
    assert result.stages[-1].step == result.steps == result.curve[-1].step
    held = [point.memorized_bits for point in result.stages]
    assert result.memorized_bits == held[-1]
    assert [has_converged(held[: k + 1], 0.02) for k in range(len(held))].index(True) == (
        len(held) - 1
    )
    assert extrapolated(held, SET.coded_entropy_bits).estimate <= SET.coded_entropy_bits


def test_a_budget_is_the_upper_limit() -> None:
    """Fails if a run without convergence goes on past its budget, or stops before it."""
    _, result = run(replace(CONFIG, steps=400, tolerance=0.0))
    assert (result.stopped_by, result.steps) == ("budget", 400)
    assert [point.step for point in result.stages] == [100, 200, 400]
    _, timed = run(replace(CONFIG, steps=None, seconds=0.3, tolerance=0.0))
    assert timed.stopped_by == "budget"
    assert timed.seconds >= 0.3
    assert 2 <= len(timed.stages) <= 7
    _, plain = run(TrainConfig(steps=20))
    assert (plain.stopped_by, plain.stages) == ("budget", [])


def test_stopped_and_resumed_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Fails if a checkpoint forgets the stages, and with them when to stop."""
    whole, expected = run(CONFIG)
    for stop in (1, 150, 399):
        model = GPT(SHAPE)
        member = Member(model, SET, CONFIG, tmp_path / f"{stop}.pt")
        group = Group([member])
        with group.bar(False) as bar:
            for _ in range(stop):
                group.step(bar)
        group.save()
        model, result = run(CONFIG, checkpoint=tmp_path / f"{stop}.pt")
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert timeless(result) == timeless(expected)


def test_each_member_of_a_group_decides_alone() -> None:
    """Fails if one that converged stops another, or goes on for its sake."""
    configs = [replace(CONFIG, tolerance=t) for t in (0.0, 0.9)]
    models = [GPT(SHAPE) for _ in configs]
    slow, quick = train_many(models, [SET] * 2, configs, progress=False)
    assert isinstance(slow, TrainResult)
    assert isinstance(quick, TrainResult)
    assert (slow.stopped_by, slow.steps) == ("budget", 1600)
    assert (quick.stopped_by, quick.steps) == ("converged", 400)
    alone = run(configs[1])[1]
    assert quick.memorized_bits == pytest.approx(alone.memorized_bits, rel=1e-3)


def test_rows_say_what_stopped_them(tmp_path: Path) -> None:
    """Fails if a row lacks what stopped it or what is to come, or a sweep forgets the flags."""
    config = SweepConfig(
        width=(8,), vocab=16, length=4, counts=(4, 8), seeds=(0,), heads=(2,), steps=800,
        until="converged", tolerance=0.05, out=tmp_path / "s",
    )  # fmt: skip
    list(sweep(config, progress=False))
    for row in load_rows(tmp_path / "s"):
        held = [stage["memorized_bits"] for stage in row["stages"]]
        reached = extrapolated(held, row["coded_entropy_bits"])
        assert row["extrapolated_bits"] == reached.to_dict()
        assert row["stopped_by"] == ("converged" if has_converged(held, 0.05) else "budget")
    list(sweep(replace(config, until="budget", steps=9, out=tmp_path / "b"), progress=False))
    for row in load_rows(tmp_path / "b"):
        assert (row["stopped_by"], row["extrapolated_bits"], row["stages"]) == ("budget", None, [])
    with pytest.raises(ValueError, match="holds another sweep .until is converged there, budget"):
        list(sweep(replace(config, until="budget"), progress=False))


def test_bad_input() -> None:
    """Fails if what is no curve or no config gives an answer."""
    with pytest.raises(ValueError, match="a gain takes the bits of two stages, not 1"):
        extrapolated([5.0], 10.0)
    with pytest.raises(ValueError, match="doublings must be at least 0, not -1"):
        extrapolated([5.0, 6.0], 10.0, doublings=-1)
    with pytest.raises(ValueError, match=r"one number a stage, not of shape \(2, 2\)"):
        has_converged(np.ones((2, 2)), 0.02)
    with pytest.raises(ValueError, match="until must be one of .*, not 'forever'"):
        TrainConfig(until="forever")  # type: ignore[arg-type]
    for tolerance in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance must be from 0 to below 1"):
            TrainConfig(tolerance=tolerance)
