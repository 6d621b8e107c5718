"""Each benchmark of training once, with tiny shapes: it runs, compares and writes its rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=BENCH.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "GOMP_SPINCOUNT": "1000"},
    )


def test_train(tmp_path: Path) -> None:
    """Fails if bench/train.py does not run, or a row lacks what its table is made of."""
    out = tmp_path / "train.json"
    ran = bench(BENCH / "train.py", "--quick", "--json", out)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(out.read_text())
    assert found["device"].startswith("cpu: ")
    assert [row["case"] for row in found["rows"]] == ["L2 D8 train batch 16", "L2 D8 score"]
    for row in found["rows"]:
        speeds = row["tokens_per_second"]
        assert row["ratio"] == speeds["ours"] / speeds["eager"]
        assert 0 < speeds["ours"] < row["floor"]
        assert f"{row['ratio']:.2f}x" in ran.stdout


def test_race(tmp_path: Path) -> None:
    """Fails if the race does not run, or its verdict is not that of its numbers."""
    out = tmp_path / "race.json"
    ran = bench(BENCH / "train.py", "--quick", "--race", "--minutes", 0.02, "--json", out)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(out.read_text())
    assert found["peer_rate"] == float(max(found["scan"], key=found["scan"].get))
    reached = [
        point["seconds"]
        for point in found["ours"][-1]["curve"]
        if point["memorized_bits"] >= found["peer_memorized_bits"]
    ]
    assert found["seconds_to_peer"] == (min(reached) if reached else None)
    assert found["met"] == (bool(reached) and min(reached) <= found["bar"] * found["peer_seconds"])


def test_gpu_by_the_cpu(tmp_path: Path) -> None:
    """Fails if a part of bench/gpu.py does not run, or leaves out its file."""
    ran = bench(BENCH / "gpu.py", "--device", "cpu", "--quick", "--rounds", 2, "--folder", tmp_path)
    assert ran.returncode == 0, ran.stderr
    train = json.loads((tmp_path / "train.json").read_text())
    assert 0 < train["mfu"]["ours"] < 1
    rows = json.loads((tmp_path / "token_bits.json").read_text())["rows"]
    assert [row["cold"] for row in rows] == [False, True]
    for row in rows:
        assert row["seconds"].keys() >= {"token_bits", "eager"}
        assert not row["not_timed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_one(tmp_path: Path) -> None:
    """Fails if a machine without a GPU gets a traceback, or rows."""
    ran = bench(BENCH / "gpu.py", "--folder", tmp_path / "rows")
    assert ran.returncode == 2
    assert ran.stderr.splitlines() == ["no CUDA device here: this bench needs one"]
    assert not (tmp_path / "rows").exists()
