"""The grid of a sweep: its runs, and what it refuses."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from cases.sweep_rows import TINY, finish

from fastmem import SweepConfig
from fastmem.sweeps.config import PAPER, default_heads


def test_the_grid() -> None:
    """Fails if the grid lacks an axis, or a seed does not change data, initialization and order."""
    runs = TINY.runs()
    assert len(runs) == 2 * 2 * 2
    assert len({run.key for run in runs}) == 8
    assert {(run.sequences.seed, run.train.seed) for run in runs} == {(0, 0), (1, 1)}
    assert len(replace(TINY, precision=("fp32", "bf16-true"), layers=(1, 2)).runs()) == 32


def test_the_published_grid() -> None:
    """Fails if the preset is not 16 shapes with the published parameter counts."""
    runs = replace(PAPER, device="cpu").runs()
    counts = {run.model.parameter_count for run in runs}
    assert len(counts) == 16
    assert {80_352, 6_859_264} <= counts
    assert {(run.model.vocab, run.model.length, run.train.steps) for run in runs} == {
        (2048, 64, 1_000_000)
    }


def test_loads_are_bits_per_parameter() -> None:
    """Fails if data set sizes are not loads in bits per parameter, to two digits."""
    config = SweepConfig(width=(32,), loads=(1.0, 4.0), seeds=(0,))
    for run, load in zip(config.runs(), config.loads, strict=True):
        found = run.sequences.coded_entropy_bits / run.model.parameter_count
        assert found == pytest.approx(load, rel=0.05)


def test_default_heads_are_two_wide() -> None:
    """Fails if the default number of heads does not divide the width."""
    assert [default_heads(w) for w in (32, 24, 16, 6, 2, 13)] == [16, 12, 8, 3, 1, 1]
    for width in range(1, 100):
        assert width % default_heads(width) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": (15,)}, "width 15 is not divisible by heads 2: try heads 1"),
        ({"counts": (0,)}, "count must be from 1 to"),
        ({"counts": (-3,)}, "count must be from 1 to"),
        ({"vocab": 0}, "vocab must be an integer from 1 up, not 0"),
        ({"vocab": 2**31 + 1}, "vocab must be at most"),
        ({"length": 1}, "length is 1: only tokens after the first are coded"),
        ({"length": 1, "counts": None}, "sequences without entropy"),
        ({"seeds": (2**64,)}, "seed must be from 0 to"),
        ({"seeds": (0, 0)}, r"seeds needs one or more different values, not \(0, 0\)"),
        ({"layers": ()}, r"layers needs one or more different values, not \(\)"),
        ({"loads": (-1.0,), "counts": None}, r"loads must be above 0 and finite, not \(-1.0,\)"),
        ({"loads": (math.nan,), "counts": None}, r"loads must be above 0 and finite, not \(nan,\)"),
        ({"vocab": 1}, "vocab is 1: a token that is always the same has no bits"),
        ({"device": "meta"}, "device meta holds shapes, not numbers"),
        ({"device": "cuda:99"}, "device cuda:99 is unavailable"),
        ({"steps": 5, "seconds": 5.0}, "the budget is one of steps, epochs and seconds"),
        ({"steps": 0}, "steps must be above 0 and finite, not 0"),
        ({"steps": None, "epochs": 0.0}, "epochs must be above 0 and finite, not 0.0"),
        ({"steps": None, "seconds": 0.0}, "seconds must be above 0 and finite, not 0.0"),
        ({"precision": ("fp8",)}, "precision must be one of"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """Fails if an invalid grid starts, or leaves a folder behind."""
    out = tmp_path / "new"
    with pytest.raises(ValueError, match=message):
        finish(replace(TINY, out=out, **change))
    assert not out.exists()


@pytest.mark.parametrize("name", [field.name for field in fields(SweepConfig)])
def test_each_field_of_a_sweep_refuses_what_it_is_not(name: str) -> None:
    """Fails if a wrong type raises anything but a ValueError that names the field."""
    optional = {"steps", "epochs", "seconds", "heads", "counts", "lr", "embedding_lr", "ray"}
    for bad in ("x", math.nan, [], {}, 1j, b"1", object(), ("x",), (True,), (math.nan,), None):
        if (bad is None and name in optional) or (name, bad) in (
            ("precision", ("x",)),
            ("ray", "x"),  # checked by fastmem.sweeps.ray
            ("out", "x"),
        ):
            continue
        change = {name: bad} | ({"counts": None} if name == "loads" else {})
        with pytest.raises(ValueError, match=name):
            replace(TINY, **change).runs()


def test_precisions_are_checked_where_the_devices_are(tmp_path: Path) -> None:
    """Fails if a machine without a GPU cannot send runs to GPUs, or sends an unknown precision."""
    config = replace(TINY, ray="local", device="cuda", precision=("bf16-mixed",), out=tmp_path)
    assert len(config.runs()) == 8
    with pytest.raises(ValueError, match="precision must be one of"):
        replace(config, precision=("fp8",)).runs()  # type: ignore[arg-type]
