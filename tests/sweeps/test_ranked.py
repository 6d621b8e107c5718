"""One model of a sweep on several ranks: the row of one process, lost ranks, and bad input."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.sweep_rows import TINY, finish, serial

from fastmem import load_rows
from fastmem.sweeps.job import checkpoint_of
from fastmem.sweeps.store import read_sequence_bits
from fastmem.training.checkpoint import read_record, shards_of

RANKED = replace(
    TINY, width=(8,), counts=(8,), seeds=(0,), steps=300, gpus_per_run=2, sequence_bits=True
)
WAIT_SECONDS = 60.0


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench/kills.py, which finds the processes of a sweep; checkpoints are written often."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    monkeypatch.setenv("FASTMEM_CHECKPOINT_SECONDS", "0.05")
    import kills

    return kills


def curve_of_checkpoint(folder: Path) -> list[dict[str, Any]]:
    """The curve in the checkpoint of the run, once it has a point."""
    shards = shards_of(checkpoint_of(folder, RANKED.runs()[0].key))
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        for path in shards.glob("step-*/run.pt"):
            try:
                curve = read_record(path)["result"]["curve"]
            except (OSError, ValueError):  # replaced meanwhile
                continue
            if curve:
                return list(curve)
        time.sleep(0.02)
    raise TimeoutError(f"no checkpoint in {shards}")


def ranks_of(kills: Any, pid: int) -> set[int]:
    return {
        p for p, command in kills.descendants(pid).items() if "multiprocessing.spawn" in command
    }


def kill_a_rank(kills: Any, folder: Path) -> set[int]:
    """Kills a rank that trains; returns the ranks that ran."""
    found = ranks_of(kills, os.getpid())
    while len(found) < 2:
        time.sleep(0.02)
        found = ranks_of(kills, os.getpid())
    curve_of_checkpoint(folder)
    os.kill(max(found), signal.SIGKILL)
    return found


def test_killed_and_resumed(tmp_path: Path, kills: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Fails if a killed driver leaves a rank alive; if a killed rank is not an outcome of its job,
    or the run does not go on from its checkpoint; if the row or the bits of sequences differ from
    those of one process by more than rounding; or if a checkpoint is left, or ranks print."""
    config = replace(RANKED, out=tmp_path / "two")
    words = ["--width=8", "--vocab=16", "--length=4", "--counts=8", "--seeds=0", "--heads=2"]
    words += ["--steps=300", "--gpus-per-run=2", "--device=cpu", f"--out={config.out}"]
    with subprocess.Popen(
        [sys.executable, "-m", "fastmem", "capacity", "--sequence-bits", *words],
        stderr=subprocess.DEVNULL,
    ) as driver:
        before = curve_of_checkpoint(config.out)
        ranks = ranks_of(kills, driver.pid)
        driver.kill()
    assert len(ranks) == 2
    kills.gone(ranks)

    capfd.readouterr()
    with ThreadPoolExecutor(1) as thread:
        killed = thread.submit(kill_a_rank, kills, config.out)
        (row,) = finish(config)
    kills.gone(killed.result() | ranks_of(kills, os.getpid()))
    assert capfd.readouterr() == ("", "")
    assert (row["status"], row["ranks"], row["mesh"]) == ("done", 2, {"shard": 2})
    for ours, theirs in zip(row["curve"], before, strict=False):
        assert ours["seconds"] == theirs["seconds"]
    assert not list((config.out / "checkpoints").iterdir())

    (alone,) = load_rows(serial(replace(config, gpus_per_run=1, out=tmp_path / "one")))
    assert row["memorized_bits"] == pytest.approx(alone["memorized_bits"], rel=1e-3)
    assert (row["steps"], row["epochs"]) == (alone["steps"], alone["epochs"])
    for ours, theirs in zip(
        *(read_sequence_bits(tmp_path / name, row["key"]) for name in ("two", "one")), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-2, atol=1e-2)
