"""Stopping at convergence: known curves, the schedule, and runs that stop."""

import math
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmem import (
    GPT,
    GPTConfig,
    SweepConfig,
    TrainConfig,
    UniformSequences,
    load_rows,
    sweep,
    train as train_one,
)
from fastmem.memorization.capacity import _late_gain
from fastmem.memorization.convergence import (
    NOISE,
    RATIOS,
    extrapolated,
    has_converged,
    in_stage,
    stage_ends,
)
from fastmem.training.curve import CURVE
from fastmem.training.group import Group
from fastmem.training.run_state import RunState, TrainResult
from fastmem.training.trainer import train_many

SHAPE = GPTConfig(layers=1, width=16, heads=4, vocab=32, length=8)
SET = UniformSequences(count=12, length=8, vocab=32)
CONFIG = TrainConfig(steps=1600, until="converged", batch=8)


def run(config: TrainConfig, **more: object) -> tuple[GPT, TrainResult]:
    model = GPT(SHAPE)
    return model, train_one(model, SET, config, progress=False, **more)


def timeless(result: TrainResult) -> dict[str, object]:
    facts = asdict(result)
    for name in ("seconds", "tokens_per_second", "flops_per_second", "mfu"):
        del facts[name]
    for point in facts["curve"] + facts["stages"]:
        point.pop("seconds", None)
    return facts


@pytest.mark.parametrize("steps", [None, 1, 99, 100, 199, 200, 1000, 10**6, 2**70])
def test_stages_double_and_end_at_marks_of_the_curve(steps: int | None) -> None:
    """Fails if a stage ends where the data set is not scored, is not twice the stage before, or the
    first stage is too short."""
    ends = stage_ends(steps)
    assert ends[-1] == 1.0
    assert all(2 * a == b for a, b in pairwise(ends))
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
    """Fails if a stage has another schedule than a whole run, or a plain budget changed."""
    stop, plain = TrainConfig(until="converged", warmup=0.1, lr=0.5), TrainConfig(lr=0.5)
    rates = np.array([stop.rate(step / 1000, 1000) for step in range(1000)])
    for begin, end in ((0, 125), (125, 250), (250, 500), (500, 1000)):
        stage = rates[begin:end]
        places = (np.arange(end - begin) + 0.5) / (end - begin)
        np.testing.assert_allclose(stage, 0.5 * np.minimum(places / 0.1, (1 - places) / 0.9))
    assert plain.rate(0.5, 1000) == pytest.approx(0.5 * (1 - 0.5005) / 0.98)
    timed = [stop.rate(spent, None) for spent in np.linspace(0, 0.9999, 5000)]
    assert min(timed) > 0
    assert sum(b > a for a, b in pairwise(timed)) > 100  # rises again


@pytest.mark.parametrize("steps", [1234, 5000, 30000])
def test_no_rate_is_below_zero(steps: int) -> None:
    """Fails if the rate is negative in the last step of a stage that ends between two steps."""
    config = TrainConfig(until="converged", steps=steps, lr=0.02)
    assert min(config.rate(step / steps, steps) for step in range(steps)) >= 0


@pytest.mark.parametrize("ratio", [0.5, 0.62, 0.8])
def test_a_power_law_is_found_exactly(ratio: float) -> None:
    """Fails if the limit of b - a · n^-c is missed, or lies outside the interval."""
    n = 100 * 2.0 ** np.arange(5)
    exponent = -math.log2(ratio)
    bits = 5000 - 9000 * (n / 100) ** -exponent
    found = extrapolated(bits, entropy=1e9)
    assert found.estimate == pytest.approx(5000)
    later = 5000 - 9000 * (n[-1] * 8 / 100) ** -exponent
    three = extrapolated(bits, 1e9, doublings=3)
    assert three.estimate == pytest.approx(later)
    assert found.low < 5000 < found.high
    assert three.high - three.low < found.high - found.low
    now = extrapolated(bits, 1e9, doublings=0)
    assert now.estimate == pytest.approx(bits[-1])
    assert now.low <= bits[-1] * (1 - 2 * NOISE)
    assert now.high >= bits[-1] * (1 + 2 * NOISE)


def test_against_least_squares_by_numpy() -> None:
    """Fails if a bound is not the extreme of the likely fits to the last four stages."""
    bits = np.array([-900.0, 1010.0, 1395.0, 1600.0, 1685.0])
    places = np.arange(4)
    left, reached = [], []
    for ratio in RATIOS:
        slope, level = np.polyfit(ratio**places, bits[1:], 1)
        left.append(((level + slope * ratio**places - bits[1:]) ** 2).sum())
        reached.append(level + slope * ratio**5)
    noise = max(math.sqrt(min(left) / 2), NOISE * 1685)
    likely = [
        at for at, more in zip(reached, left, strict=True) if more <= min(left) + 9 * noise**2
    ]
    assert 3 < len(likely) < len(RATIOS)
    found = extrapolated(bits, 1e9, doublings=2)
    assert found.estimate == pytest.approx(reached[int(np.argmin(left))])
    assert found.low == pytest.approx(min(likely) - 2 * noise)
    assert found.high == pytest.approx(max(likely) + 2 * noise)


def test_it_covers_later_stages_of_noisy_power_laws() -> None:
    """Fails if the interval leaves noise out: then it covers the next stage far less often."""
    rng = np.random.default_rng(0)
    covered = {True: 0, False: 0}
    for _ in range(300):
        ratio = rng.uniform(RATIOS[0], RATIOS[-1])
        true = 5000 - 300 * ratio ** np.arange(6)
        seen = true * (1 + rng.normal(0, 0.005, 6))
        found = extrapolated(seen[:5], 1e9, doublings=1)
        assert found.low is not None
        assert found.high is not None
        margin = 2 * NOISE * seen[4]
        covered[True] += found.low <= seen[5] <= found.high
        covered[False] += found.low + margin <= seen[5] <= found.high - margin
    assert covered[True] >= 0.95 * 300
    assert covered[False] < 0.8 * 300


def test_no_more_than_the_entropy_and_nothing_from_a_fall() -> None:
    """Fails if more bits are predicted than the data has, or a falling curve counts as a trend."""
    assert extrapolated([600.0, 800.0, 950.0], entropy=1000.0).high == 1000.0
    falling = extrapolated([800.0, 795.0, 790.0], entropy=1000.0)
    assert falling.estimate == pytest.approx(795.0)
    assert falling.low is not None
    assert falling.low > 780


@pytest.mark.parametrize(
    ("bits", "converged"),
    [
        ([100.0, 150.0, 152.0], True),
        ([100.0, 150.0, 154.0], False),  # 2.6 % of 154
        ([150.0, 152.0], False),  # two stages show no trend
        ([1.0, 1.001, 1.01], False),  # gains grow: it has only begun
        ([-5.0, -5.0, -5.0], False),
        ([100.0, 150.0, 149.0], True),
        ([100.0, 150.0, 140.0], False),  # fell by 7 %: noise
        ([math.nan] * 3, False),  # of unknown entropy
        ([], False),
    ],
)
def test_when_a_run_has_converged(bits: list[float], converged: bool) -> None:
    """Fails if a run stops while it gains 2 % per doubling, before it has begun to learn, or
    never."""
    assert has_converged(bits, 0.02) is converged
    assert not has_converged(bits, 0.0)


def test_a_run_stops_by_itself() -> None:
    """Fails if a run goes on after a doubling that added nothing, stops within a stage, or reports
    another reason."""
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
    """Fails if a run that does not converge trains more or less than its budget."""
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
    """Fails if a checkpoint lacks the stages, which decide when to stop."""
    whole, expected = run(CONFIG)
    for stop in (1, 150, 399):
        model = GPT(SHAPE)
        state = RunState(model, SET, CONFIG, tmp_path / f"{stop}.pt")
        group = Group([state])
        with group.bar(False) as bar:
            for _ in range(stop):
                group.step(bar)
        group.save()
        model, result = run(CONFIG, checkpoint=tmp_path / f"{stop}.pt")
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert timeless(result) == timeless(expected)


def test_each_run_of_a_group_decides_alone() -> None:
    """Fails if a converged run stops another run, or goes on with it."""
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
    """Fails if a row lacks the reason it stopped or the extrapolation, or a sweep ignores the
    flags."""
    config = SweepConfig(
        width=(8,), vocab=16, length=4, counts=(4, 8), seeds=(0,), heads=(2,), steps=800,
        until="converged", tolerance=0.05, out=tmp_path / "s",
    )  # fmt: skip
    list(sweep(config, progress=False))
    for row in load_rows(tmp_path / "s"):
        assert (row["train"]["until"], row["train"]["tolerance"]) == ("converged", 0.05)
        held = [stage["memorized_bits"] for stage in row["stages"]]
        reached = extrapolated(held, row["coded_entropy_bits"])
        assert row["extrapolated_bits"] == reached.to_dict()
        assert row["stopped_by"] == ("converged" if has_converged(held, 0.05) else "budget")
    list(sweep(replace(config, until="budget", steps=9, out=tmp_path / "b"), progress=False))
    for row in load_rows(tmp_path / "b"):
        assert (row["stopped_by"], row["extrapolated_bits"], row["stages"]) == ("budget", None, [])
    with pytest.raises(ValueError, match=r"holds another sweep .until is converged there, budget"):
        list(sweep(replace(config, until="budget"), progress=False))


def test_a_converged_run_is_not_still_gaining() -> None:
    """Fails if the rise within the last stage, where the rate falls to zero, makes a converged run
    not saturated, or if a run that ended by its budget is not checked."""
    curve = [{"memorized_bits": 80.0}, {"memorized_bits": 100.0}]
    assert _late_gain({"stopped_by": "converged", "curve": curve}) == 0
    assert _late_gain({"stopped_by": "budget", "curve": curve}) == pytest.approx(0.2)
    assert _late_gain({"curve": curve}) == pytest.approx(0.2)  # a row of an older version


def test_bad_input() -> None:
    """Fails if an invalid curve or config gives an answer."""
    with pytest.raises(ValueError, match="a trend takes the bits of three stages, not 2"):
        extrapolated([5.0, 6.0], 10.0)
    with pytest.raises(ValueError, match="doublings must be at least 0, not -1"):
        extrapolated([5.0, 6.0, 7.0], 10.0, doublings=-1)
    with pytest.raises(ValueError, match=r"one number a stage, not of shape \(2, 2\)"):
        has_converged(np.ones((2, 2)), 0.02)
    bits = [5.0, 6.0, 7.0]
    for call, message in (
        (lambda: has_converged("x", 0.02), r"memorized must be numbers, got 'x' \(str\)"),
        (lambda: has_converged([object()] * 3, 0.02), "memorized must be numbers"),
        (lambda: has_converged(bits, "x"), r"tolerance must be a number, got 'x' \(str\)"),
        (lambda: has_converged(bits, math.nan), "tolerance must be at least 0, not nan"),
        (lambda: extrapolated([5.0, math.nan, 7.0], 10.0), r"finite, not \[5.0, nan, 7.0\]"),
        (lambda: extrapolated(bits, math.nan), "entropy must be above 0 bits, not nan"),
        (lambda: extrapolated(bits, None), r"entropy must be a number, got None"),
        (lambda: extrapolated(bits, 10.0, True), "doublings must be a number, got True"),
        (lambda: stage_ends(0), "total_steps must be an int from 1 up, or None, not 0"),
        (lambda: stage_ends(1.5), "total_steps must be an int from 1 up, or None, not 1.5"),
        (lambda: in_stage(math.nan, 100), "spent must be at least 0 and finite, not nan"),
        (lambda: in_stage("x", 100), "spent must be a number, got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"until must be one of .*, not 'forever'"):
        TrainConfig(until="forever")  # type: ignore[arg-type]
    for tolerance in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance must be from 0 to below 1"):
            TrainConfig(tolerance=tolerance)
