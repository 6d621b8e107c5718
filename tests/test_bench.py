"""Runs each benchmark once with tiny shapes: it compares and writes its rows."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def beside_the_benches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds the folder that `python bench/NAME.py` searches first."""
    monkeypatch.syspath_prepend(BENCH)


def bench(name: str, *arguments: object) -> int:
    return int(importlib.import_module(name).main([str(argument) for argument in arguments]))


def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if bench/train.py does not run, or a row lacks a number of its table."""
    out = tmp_path / "train.json"
    assert bench("train", "--quick", "--json", out) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["device"].startswith("cpu: ")
    assert [row["case"] for row in found["rows"]] == ["L2 D8 train batch 16", "L2 D8 score"]
    for row in found["rows"]:
        speeds = row["tokens_per_second"]
        assert row["ratio"] == speeds["ours"] / speeds["eager"]
        # Not judged: on a busy machine the scores may take longer than the steps.
        assert all(math.isfinite(x) for x in (*speeds.values(), row["floor"]))
        assert f"{row['ratio']:.2f}x" in printed


def test_race(tmp_path: Path) -> None:
    """Fails if the race does not run, or its verdict contradicts its numbers."""
    out = tmp_path / "race.json"
    assert bench("train", "--quick", "--race", "--minutes", 0.01, "--json", out) == 0
    found = json.loads(out.read_text())
    assert found["peer_rate"] == float(max(found["scan"], key=found["scan"].get))
    reached = [
        point["seconds"]
        for point in found["ours"][-1]["curve"]
        if point["memorized_bits"] >= found["peer_memorized_bits"]
    ]
    assert found["seconds_to_peer"] == (min(reached) if reached else None)
    assert found["met"] == (bool(reached) and min(reached) <= found["bar"] * found["peer_seconds"])


def test_gpu_by_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a part of bench/gpu.py does not run, or leaves out a row."""
    out = tmp_path / "gpu.json"
    assert bench("gpu", "--quick", "--json", out) == 0
    found = json.loads(out.read_text())
    assert {part["ended"] for part in found["parts"].values()} == {"in time"}
    assert [(row["part"], row["side"]) for row in found["rows"]] == [
        ("likelihood", "token_bits"),
        ("likelihood", "token_bits"),
        ("likelihood", "linear_cross_entropy"),
        ("likelihood", "linear_cross_entropy"),
        ("likelihood", "eager"),
        ("likelihood", "eager"),
        ("training", "eager"),
        ("training", "transformers, compiled"),
        ("together", "together"),
        ("together", "one by one"),
    ]
    assert all(row["call_ms"] > 0 and row["kernels_ms"] is None for row in found["rows"])
    assert "| training | 2 x 8, 2 heads, B 16, fp32 | eager |" in capsys.readouterr().out


def test_gpu_ends_in_twelve_minutes() -> None:
    """Fails if the parts take longer together, one gets next to nothing, or its end is not told."""
    gpu = importlib.import_module("gpu")
    elapsed = gpu.COMPILE_SECONDS
    for later in (2, 1, 0):
        seconds = gpu.seconds_of_part(elapsed, later)
        assert gpu.LEAST_SECONDS <= seconds <= 240
        elapsed += seconds
    assert elapsed <= 720
    given = "likelihood", gpu.QUICK["likelihood"], True
    rows, part = gpu.run_part(gpu.rows_of_part, given, 0, gpu.show)
    assert (rows, part["ended"]) == ([], "no time left")


def test_large(tmp_path: Path) -> None:
    """Fails if bench/large.py does not run, or leaves out a row."""
    out = tmp_path / "large.json"
    assert bench("large", "--quick", "--json", out) == 0
    found = json.loads(out.read_text())
    assert [row["side"] for row in found["rows"]] == ["sharded", "score", "plain", "sharded"]
    assert all(0 < row["mfu"] < 1 for row in found["rows"])
    assert math.isfinite(found["overhead"])


def test_calls(tmp_path: Path) -> None:
    """Fails if bench/calls.py does not run, a repeated launch passes other arguments than Triton,
    or a short call has more launches than passes. It replaces the driver: a process of its own."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    out = tmp_path / "calls.json"
    command = [sys.executable, BENCH / "calls.py", "--quick", "--json", out]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    rows = json.loads(out.read_text())["rows"]
    assert [row["launches"] for row in rows] == [1, 4, 0, 0, 2, 3, 0, 0]
    assert all(row["microseconds"] > 0 for row in rows)


@pytest.mark.parametrize("D", [32, 64])
def test_tf32_products_keep_gradients(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the depth of float32 tiles makes gradients worse than twice PyTorch's error, in the
    emulation of TF32, or the emulation has another depth than the kernels."""
    tiles = pytest.importorskip("fastmem.kernels.tiles")
    monkeypatch.syspath_prepend(BENCH / "lab")
    emulated = importlib.import_module("tf32x3")
    depth = tiles.tf32_tile(D, True, 90).depth
    assert emulated.DEPTHS[D] == depth
    for _, _, bits, gradients in emulated.errors(D, depth, seed=1):
        assert gradients[2] <= 2
        assert bits[1] <= 2 * bits[2] + 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a machine without a GPU gets a traceback, or rows."""
    assert bench("gpu", "--json", tmp_path / "rows.json") == 2
    assert capsys.readouterr().err.splitlines() == ["no CUDA device here: this bench needs one"]
    assert not (tmp_path / "rows.json").exists()


def test_kills(tmp_path: Path) -> None:
    """Fails if a sweep that loses its driver or its workers has other rows than a sweep that does
    not, or leaves a process behind; or if bench/kills.py miscounts kills, sweeps or rows."""
    out = tmp_path / "kills.json"
    how = ("--driver", 1, "--worker", 1, "--steps", 300, "--seed", 8, "--json", out)
    assert bench("kills", *how) == 0  # this seed gives two workers
    found = json.loads(out.read_text())
    assert found["kills"] == {"driver": 1, "worker": 1}
    assert (found["sweeps"], found["rows"]) == (2, 2 * 8)


def test_overhead(tmp_path: Path) -> None:
    """Fails if bench/overhead.py does not run, or its numbers contradict each other."""
    out = tmp_path / "overhead.json"
    way = "this process"
    assert bench("overhead", "--runs", 3, "--repeats", 1, "--ways", way, "--json", out) == 0
    found = json.loads(out.read_text())
    assert list(found["ways"]) == [way]
    (only,) = found["ways"][way]["tries_ms"]
    assert (
        found["ways"][way]["overhead_ms"] == only < 1000 * found["ways"][way]["first_row_after_s"]
    )
    out.unlink()
    for workers in (1, 2):
        options = ("--runs", 2, "--steps", 5, "--repeats", 1, "--json", out)
        assert bench("overhead", "--scaling", workers, *options) == 0
    found = json.loads(out.read_text())
    ((one, trained),), ((two, beside),) = found["tries"]["1"], found["tries"]["2"]
    assert 0 < trained < one
    assert found["speedup"] == one / two > 0
    assert found["speedup_of_runs"] == 2 * trained / beside > 0


def test_recipe(tmp_path: Path) -> None:
    """Fails if bench/recipe.py does not run, loses earlier recipes, or mixes two recipes."""
    out = tmp_path / "recipe.json"
    flags = ("--epochs", 0.5, "--out", out, "--figure", tmp_path / "recipe")
    assert bench("recipe", *flags, "--recipes", "default") == 0
    first = json.loads(out.read_text())["recipes"]["default"]
    assert bench("recipe", *flags, "--recipes", "default", "batch 64") == 0
    found = json.loads(out.read_text())["recipes"]
    assert found["default"] == first
    assert [recipe["steps"] for recipe in found.values()] == [2, 4]
    assert found["batch 64"]["settings"]["train"]["batch"] == 64
    assert [path.name for path in tmp_path.glob("*.png")] == ["recipe.png"]


def test_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if bench/heads.py does not run, or a stage's bits are not the mean over its runs."""
    flags = ("--steps", 4, "--shapes", "1x16", "--figure", tmp_path / "heads")
    assert bench("heads", tmp_path, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"1x16, {h} heads" for h in (1, 2, 4, 8)]
    for line in lines:
        assert line.split(": ")[1].split(";")[0] == line.split()[-2]  # one stage: the end
    assert (tmp_path / "heads.png").exists()


@pytest.mark.parametrize("name", ["attention", "mlp", "three_products"])
def test_prototypes(name: str, tmp_path: Path) -> None:
    """Fails if a prototype of a kernel, interpreted at tiny shapes, has a wrong answer."""
    pytest.importorskip("triton", reason="needs Triton")
    command = [sys.executable, BENCH / "lab" / f"{name}.py", tmp_path]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_trainer(tmp_path: Path) -> None:
    """Fails if bench/trainer.py does not run, or compares other losses than those of each step."""
    out = tmp_path / "trainer.json"
    assert bench("trainer", "--quick", "--json", out) == 0
    found = json.loads(out.read_text())
    assert found["steps"] == 3
    assert found["largest_difference_of_losses"] < 1e-4
    assert found["peak_bytes_ratio"] == (
        found["patched"]["peak_bytes"] / found["plain"]["peak_bytes"]
    )


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if bench/text.py does not run, or a row lacks a number."""
    pytest.importorskip("tokenizers")
    out = tmp_path / "text.json"
    assert bench("text", "--quick", "--folder", tmp_path, "--json", out) == 0
    found = json.loads(out.read_text())
    assert len(found["rows"]) == len(capsys.readouterr().out.splitlines()) - 1 == 3
    for row in found["rows"]:
        assert row["bytes"] >= 2e6
        assert row["megabytes_per_second"] == row["bytes"] / 1e6 / row["seconds"]
        assert 0 < row["import_megabytes"] <= row["peak_megabytes"]
    assert found["rows"][2]["ratio"] > 0


def test_membership(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if bench/membership.py does not run, or a ratio or a mean is not of its numbers."""
    out = tmp_path / "membership.json"
    assert bench("membership", "--quick", "--json", out) == 0
    found = json.loads(out.read_text())
    for part, (first, second) in {
        "cost": ("all scores", "fastmem score"),
        "shadows": ("together", "alone"),
    }.items():
        times = {name: each[0][0] for name, each in found[part]["seconds"].items()}
        assert found[part]["ratio_of_clock"] == times[first] / times[second]
    assert [row["count"] for row in found["quality"]] == [20, 40]
    lines = capsys.readouterr().out.splitlines()
    (loss,) = [line for line in lines if line.startswith("| loss |")]
    for row, cell in zip(found["quality"], loss.split("|")[2:], strict=False):
        assert {"lira_online", "rmia", "min_k_plus_plus"} < row["scores"].keys()
        assert cell.split(",")[0].strip() == f"{row['scores']['loss']['auc']:.3f}"


def test_extraction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if bench/extraction.py does not run, or a row lacks a rate of its line."""
    out = tmp_path / "extraction.json"
    assert bench("extraction", "--quick", "--json", out) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["sequences"] for row in rows] == [20, 200]
    for row in rows:
        assert [entry["prefix"] for entry in row["prefixes"]] == [4, 8, 16]
        assert [entry["test"]["sequences"] for entry in row["prefixes"]] == [50] * 3
    assert "prefix 16: " in capsys.readouterr().out
