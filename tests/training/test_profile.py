"""The profile of a step loop: exclusive times, the trace, and no cost outside a profile."""

import json
from pathlib import Path

import pytest
import torch

from fastmem.training.profile import TRACED, WARMUP, Profile, phase, profiled

CPU = torch.device("cpu")


def loop(steps: int) -> None:
    for _ in range(steps):
        with phase("step"):
            with phase("data"):
                tokens = torch.ones(3)
            with phase("gradients"):
                tokens.exp()


def test_a_phase_has_its_own_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if inner phases count twice, or the times of a phase do not add up."""
    now = 0.0
    monkeypatch.setattr("fastmem.training.profile.time.perf_counter", lambda: now)
    with profiled(tmp_path / "trace.json", CPU) as profile:
        for _ in range(2):
            with phase("step"):
                with phase("score"):
                    now += 4.0
                    with phase("data"):
                        now += 2.0
                now += 1.0
                with phase("data"):
                    now += 3.0
        now += 100.0  # between steps: of no phase
    assert profile.seconds == {"score": 8.0, "data": 10.0, "step": 2.0}
    assert profile.steps == 2
    assert profile.table().splitlines() == [
        "where the time went, 2 steps (last column: a step)",
        "data    50.0%     10.00 s  5000.000 ms",
        "score   40.0%      8.00 s  4000.000 ms",
        "rest    10.0%      2.00 s  1000.000 ms",
    ]


def test_the_trace_has_the_phases_of_its_window(tmp_path: Path) -> None:
    """Fails if the trace is not JSON, lacks the phases or their operators, or does not end."""
    with profiled(tmp_path / "trace.json", CPU):
        loop(WARMUP + TRACED + 5)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    for name in ("step", "data", "gradients"):
        assert names.count(name) == TRACED
    assert any(event.get("name") == "aten::exp" for event in events)


def test_a_short_loop_has_a_table_and_no_trace(tmp_path: Path) -> None:
    """Fails if a loop that ends in the warm-up raises an error."""
    with profiled(tmp_path / "trace.json", CPU) as profile:
        loop(3)
    assert profile.steps == 3
    assert not (tmp_path / "trace.json").exists()
    with profiled(tmp_path / "trace.json", CPU) as profile:
        pass
    assert profile.table().splitlines()[0].startswith("where the time went, 0 steps")


def test_nothing_is_timed_outside(tmp_path: Path) -> None:
    """Fails if a phase still counts after the block, also after an error."""
    with (
        pytest.raises(RuntimeError, match="planted"),
        profiled(tmp_path / "trace.json", CPU) as profile,
        phase("step"),
    ):
        raise RuntimeError("planted")
    before = dict(profile.seconds)
    loop(2)
    assert profile.seconds == before
    assert profile.steps == 0


def test_one_profile_at_a_time(tmp_path: Path) -> None:
    """Fails if an inner profile silently takes the phases of the outer one."""
    with (
        profiled(tmp_path / "a", CPU) as outer,
        pytest.raises(ValueError, match="already"),
        profiled(tmp_path / "b", CPU),
    ):
        pass
    assert isinstance(outer, Profile)
