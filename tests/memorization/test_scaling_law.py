"""The scaling law on known lines and power laws."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.study_rows import counts, study_row, study_rows, write_rows
from cases.sweep_rows import row

from fastmem import bits_per_parameter, law_of_rows, scaling_law
from fastmem.base.storage import write_json
from fastmem.cli.main import main
from fastmem.memorization.scaling_law import PUBLISHED, Law
from fastmem.models.gpt import GPTConfig
from fastmem.sweeps.rows import report

LAYERS = [1, 1, 2, 2, 4, 4, 8, 8]
WIDTHS = [32, 64, 32, 64, 32, 64, 32, 64]
SIZES = [GPTConfig(L, D, 1, 128, 16).parameter_count for L, D in zip(LAYERS, WIDTHS, strict=True)]


def law_of(capacities: Any, sizes: Any = SIZES) -> Law:
    """The law of models with one run each, whose bits are the capacity."""
    runs = [([4], [float(bits)]) for bits in capacities]
    return scaling_law(sizes, runs, LAYERS[: len(sizes)], WIDTHS[: len(sizes)])


def test_a_line_through_the_origin() -> None:
    """Fails if a fit of an exact line differs from the line, or its interval has a width."""
    law = law_of([3.6 * P for P in SIZES])
    for interval, known in ((law.slope, 3.6), (law.line_slope, 3.6), (law.exponent, 1.0)):
        found = (interval.estimate, interval.low, interval.high)
        assert found == pytest.approx((known, known, known), rel=1e-9)
    assert law.line_intercept.estimate == pytest.approx(0, abs=1e-6)
    assert all(abs(residual.fraction) < 1e-9 for residual in law.residuals)
    big = law.predict(1_556_075_200)
    for interval in (big.proportional, big.power):
        found = (interval.estimate, interval.low, interval.high)
        assert found == pytest.approx((5.60187072e9,) * 3, rel=1e-6)


def test_a_line_with_an_intercept() -> None:
    """Fails if the intercept is not fitted, or the slope belongs to the line through the origin."""
    law = law_of([1000 + 2.0 * P for P in SIZES])
    assert law.line_slope.estimate == pytest.approx(2.0)
    assert law.line_intercept.estimate == pytest.approx(1000)
    P, bits = np.array(SIZES, float), 1000 + 2.0 * np.array(SIZES)
    assert law.slope.estimate == pytest.approx(np.linalg.lstsq(P[:, None], bits)[0][0])


def test_a_power_law() -> None:
    """Fails if the log-log slope or the prediction misses the power law."""
    law = law_of([5.0 * P**0.9 for P in SIZES])
    assert law.exponent.estimate == pytest.approx(0.9)
    power = law.predict(10**9).power
    found = (power.estimate, power.low, power.high)
    assert found == pytest.approx((5.0 * 10**8.1,) * 3, rel=1e-6)
    assert law.line_slope.estimate < law.slope.estimate * 1.0001  # it bends down


def test_residuals_by_depth_and_width() -> None:
    """Fails if a residual belongs to another model, or the mean of a depth includes other
    depths."""
    off = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0]  # 8 × 32 is held back
    law = law_of([3.0 * P * o for P, o in zip(SIZES, off, strict=True)])
    (worst,) = [residual for residual in law.residuals if residual.fraction < -0.4]
    assert (worst.layers, worst.width) == (8, 32)
    assert worst.capacity_bits == 1.5 * worst.parameters
    assert worst.fraction == pytest.approx(1.5 / law.slope.estimate - 1)
    by_layers, by_width = law.mean_residuals("layers"), law.mean_residuals("width")
    assert list(by_layers) == [1, 2, 4, 8]
    assert min(by_layers, key=lambda depth: by_layers[depth]) == 8
    assert by_width[32] < by_width[64]
    assert [r.parameters for r in law.residuals] == sorted(SIZES)
    in_json = law.to_dict()["residuals"]  # with the names of 0.1.0
    assert [r["share"] for r in in_json] == [r.share for r in law.residuals]
    assert worst.share == worst.fraction


def studies(seed: int, models: int, scatter: float) -> Law:
    """A law over capacities of 3 bits per parameter, scattered by shape and by seed; three
    seeds."""
    rng = np.random.default_rng(seed)
    sizes = [int(P) for P in np.geomspace(1e4, 1e5, models)]
    shape = np.exp(rng.normal(0, scatter, models))
    runs = [
        ([4] * 3, 3.0 * P * off * np.exp(rng.normal(0, 0.01, 3)))
        for P, off in zip(sizes, shape, strict=True)
    ]
    return scaling_law(sizes, runs, [1] * models, list(range(models)))


@pytest.mark.parametrize(("models", "least", "most"), [(8, 0.80, 0.95), (24, 0.88, 0.98)])
def test_the_intervals_cover_the_truth(models: int, least: float, most: float) -> None:
    """Fails if the bootstrap over shapes is left out (coverage under 0.5), or is far too wide.

    200 studies each; docs/method.md states what was found.
    """
    slopes = exponents = new = by_power = 0
    rng = np.random.default_rng(99)
    for seed in range(200):
        law = studies(seed, models, 0.05)
        assert law.slope.low is not None
        assert law.slope.high is not None
        assert law.exponent.low is not None
        assert law.exponent.high is not None
        slopes += law.slope.low <= 3.0 * np.exp(0.05**2 / 2) <= law.slope.high
        exponents += law.exponent.low <= 1.0 <= law.exponent.high
        other, power = law.predict(50_000).proportional, law.predict(50_000).power
        assert other.low is not None
        assert other.high is not None
        assert power.low is not None
        assert power.high is not None
        truth = 150_000 * np.exp(rng.normal(0, 0.05))
        new += other.low <= truth <= other.high
        by_power += power.low <= truth <= power.high
    assert least <= slopes / 200 <= most
    assert least <= exponents / 200 <= most
    assert least <= new / 200 <= most
    assert least <= by_power / 200 <= most


def test_the_slope_is_that_of_bits_per_parameter() -> None:
    """Fails if the interval of the law differs from the interval of capacity.json."""
    rng = np.random.default_rng(5)
    runs = [([4, 4, 8], 3.0 * P * np.exp(rng.normal(0, 0.05, 3))) for P in (100, 200, 400)]
    law = scaling_law([100, 200, 400], runs, [1, 1, 1], [2, 4, 8])
    assert law.slope == bits_per_parameter([100, 200, 400], runs)


def test_doubt_grows_with_distance() -> None:
    """Fails if the interval of the power law at 1.5 billion parameters is as narrow as at the
    measured sizes."""
    law = studies(0, 8, 0.05)

    def width(parameters: int) -> float:
        power = law.predict(parameters).power
        assert power.low is not None
        assert power.high is not None
        return power.high / power.low

    assert width(30_000) < width(10**6) < width(1_556_075_200)
    assert law.predict(30_000) == law.predict(30_000)


def test_two_models_leave_the_power_law_without_bounds() -> None:
    """Fails if a power law through two points has an interval for a third."""
    law = law_of([100.0, 250.0], [40, 80])
    assert law.predict(1000).power.low is None
    assert law.predict(1000).proportional.low is not None


def test_the_published_points_have_the_published_slope() -> None:
    """Fails if a published number is mistyped: the printed line has 3.64 bits per parameter."""
    sizes = [p.parameters for p in PUBLISHED]
    for p in PUBLISHED:
        assert p.parameters == GPTConfig(p.layers, p.width, 1, 2048, 64).parameter_count
    law = scaling_law(
        sizes,
        [([1], [p.bf16_bits]) for p in PUBLISHED],
        [p.layers for p in PUBLISHED],
        [p.width for p in PUBLISHED],
    )
    assert law.slope.estimate == pytest.approx(3.64, abs=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": [10, 10]}, "no law from models of one size.*10 parameters.*add a --width"),
        ({"parameters": [10]}, "1 parameter counts, 2 lists of runs, 2 depths and 2 widths"),
        ({"parameters": [10, 0]}, "numbers from 1 up"),
        ({"parameters": [10, float("nan")]}, "numbers from 1 up"),
        ({"runs": [([4], [30.0]), ([], [])]}, "at least one run"),
        ({"runs": [([4], [30.0]), ([4], [-3.0])]}, "20 parameters.*capacity of -3 bits"),
        ({"runs": [([4], [30.0]), ([4], [np.nan])]}, "capacity of nan bits"),
        ({"runs": [([4], [30.0]), ([4, 8], [1.0])]}, "at least one run"),
        ({"runs": [([4], [30.0]), ([4], ["x"])]}, r"values must be numbers, got \['x'\]"),
        ({"runs": [([4], [30.0]), ([np.nan], [1.0])]}, r"numbers of sequences, not \[nan\]"),
        ({"runs": [([4], [30.0]), ([4],)]}, "pairs of counts and memorized bits"),
        ({"parameters": 10}, "parameters must be one number for each model, not 10"),
        ({"parameters": ["a", "b"]}, "parameters must be numbers"),
        ({"layers": None}, "layers must be"),
        ({"width": [[2], [4]]}, "width must be one number for each model"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    """Fails if data without a law gives one."""
    given = {
        "parameters": [10, 20],
        "runs": [([4], [30.0]), ([4], [60.0])],
        "layers": [1, 1],
        "width": [2, 4],
    }
    with pytest.raises(ValueError, match=message):
        scaling_law(**given | change)
    with pytest.raises(ValueError, match=r"parameters must be from 1 to .*, got 0"):
        scaling_law(**given).predict(0)
    for other in (True, "x", None, 2.5, float("nan")):
        with pytest.raises(ValueError, match="parameters must be an integer from 1 to"):
            scaling_law(**given).predict(other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="axis must be layers or width, not 'heads'"):
        scaling_law(**given).mean_residuals("heads")  # type: ignore[arg-type]


def test_no_models() -> None:
    """Fails if an empty list gives a law or a traceback."""
    with pytest.raises(ValueError, match=r"no law from models of one size \(none\)"):
        scaling_law([], [], [], [])


def test_a_law_of_rows() -> None:
    """Fails if failed rows count, precisions mix, or the convention is another."""
    rows = [row(w, n, 0, bits=b) for w in (8, 16, 32) for n, b in ((4, 1.0), (8, 2.5))]
    rows += [row(w, 8, 0, "bf16-mixed", 2.0) for w in (8, 16)]
    rows.append(row(64, 8, 0, bits=9.0) | {"status": "failed"})
    assert law_of_rows(rows).slope.estimate == pytest.approx(2.5)
    assert law_of_rows(rows, "bf16-mixed").slope.estimate == pytest.approx(2.0)
    assert law_of_rows(rows, convention="published").slope.estimate == pytest.approx(2.5 * 4 / 3)
    with pytest.raises(ValueError, match="no finished run at 'fp8': use one of fp32, bf16-mixed"):
        law_of_rows(rows, "fp8")
    with pytest.raises(ValueError, match="convention must be one of"):
        law_of_rows(rows, convention="loose")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no finished run among 1 rows"):
        law_of_rows(rows[-1:])


def test_capacity_json_has_the_law(tmp_path: Path) -> None:
    """Fails if the report leaves the law out, or one model stops it."""
    one = row(width=8)
    write_json(tmp_path / "rows" / f"{one['key']}.json", one)
    alone = report(tmp_path)["law"]
    assert alone["strict"] is None
    assert "no law from models of one size" in alone["why_not"]
    other = row(width=16)
    write_json(tmp_path / "rows" / f"{other['key']}.json", other)
    both = report(tmp_path)["law"]
    assert both["strict"]["slope"]["estimate"] == pytest.approx(2.5)
    assert both["published"]["by_width"] == pytest.approx({8: 0.0, 16: 0.0})
    assert json.loads(json.dumps(both, allow_nan=False))["strict"]["residuals"][0]["width"] == 8


def predict(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["predict", *map(str, arguments)])
    return int(stop.value.code or 0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the command predicts another shape than asked, or hides bad input."""
    for width in (8, 16, 32):
        one = row(width, 8, 0)
        write_json(tmp_path / "rows" / f"{one['key']}.json", one)
    assert predict(tmp_path, "--layers", 48, "--width", 1600, "--vocab", 50257, "--length", 64) == 0
    told = capsys.readouterr().out
    assert "1,556,075,200 parameters" in told
    assert "3.89e+09 [3.89e+09, 3.89e+09]" in told  # 2.5 times that
    assert "8 × 256    6,859,264   2.71e+07   2.51e+07   2.29e+07" in told
    assert predict(tmp_path) == 0
    assert "for one such model" not in capsys.readouterr().out
    for flags, line in (
        (["--layers", 2], "give --width too"),
        (["--layers", 0, "--width", 8], "layers must be an integer from 1 up, not 0"),
        (["--precision", "bf16-true"], "no finished run at 'bf16-true'"),
    ):
        assert predict(tmp_path, *flags) == 2
        assert line in capsys.readouterr().err
    assert predict(tmp_path / "none") == 2


def test_a_law_of_lower_bounds_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if models that are not saturated are extrapolated without a warning, or the warning
    names saturated models or models of another precision."""
    write_rows(tmp_path / "whole", list(study_rows()))
    assert predict(tmp_path / "whole") == 0
    told = capsys.readouterr().out
    assert "warning" not in told
    assert "capacities are at 100 steps: what more training would add is not measured" in told
    few = [
        one for one in study_rows() if one["model"]["width"] == 8 or one["sequences"]["count"] < 999
    ]
    half = study_row(8, counts(8)[0], precision="bf16-mixed")
    write_rows(tmp_path / "few", [*few, half])
    assert predict(tmp_path / "few", "--layers", 2, "--width", 32) == 0
    told = capsys.readouterr().out
    assert "warning: 1 of these 2 models does not show a plateau yet" in told
    assert "warning" in told.split("for one such model")[0]


def test_one_model_has_no_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a folder of one model is given a law."""
    one = row(8, 8, 0)
    write_json(tmp_path / "rows" / f"{one['key']}.json", one)
    assert predict(tmp_path, "--layers", 2, "--width", 8) == 2
    assert "no law from models of one size" in capsys.readouterr().err
