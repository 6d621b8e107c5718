"""Sweeps: what they train, and how they resume after failures, kills and damaged files."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from cases.sweep_rows import TINY, command, constant, finish

import fastmem
from fastmem import SweepConfig, load_rows, sweep
from fastmem.base.storage import read_json, write_json
from fastmem.sweeps import driver
from fastmem.sweeps.rows import report


def test_finished_rows_are_skipped_and_failed_ones_tried_again(tmp_path: Path) -> None:
    """Fails if a finished run is trained again, or a failed run is not."""
    config = replace(TINY, out=tmp_path)
    first = finish(config)
    assert finish(config) == []
    failed = first[3] | {"status": "failed", "error": "lost"}
    write_json(tmp_path / "rows" / f"{failed['key']}.json", failed)
    (again,) = finish(config)
    assert constant(again) == constant(first[3])


def test_axes_can_grow(tmp_path: Path) -> None:
    """Fails if added counts, which the verdict advises, are refused or repeat finished runs."""
    finish(replace(TINY, out=tmp_path))
    added = finish(replace(TINY, out=tmp_path, counts=(8, 16)))
    assert {row["sequences"]["count"] for row in added} == {16}
    assert len(report(tmp_path)["models"][0]["runs"]) == 6


def test_another_study_is_refused(tmp_path: Path) -> None:
    """Fails if a folder mixes rows that cannot be compared."""
    config = replace(TINY, out=tmp_path)
    finish(config)
    with pytest.raises(ValueError, match=r"another sweep \(lr is None there, 0.5 here\).*--lr"):
        finish(replace(config, lr=0.5))
    path = next((tmp_path / "rows").iterdir())
    row = read_json(path)
    row["train"]["beta1"] = 0.5
    write_json(path, row)
    with pytest.raises(ValueError, match=r"beta1 is 0.5 there, 0.8 here\).* the same --beta1"):
        finish(config)
    for config in (TINY, replace(TINY, steps=None, epochs=3.0)):
        train = config.train_config()
        assert (train.steps is None) is (train.epochs is not None)


def counting(calls: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        calls[name] += 1
        return function(*arguments, **named)

    return counted


def test_a_sweep_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a sweep expands its grid, makes its workers or reads its folder a second time."""
    calls: Counter[str] = Counter()
    for owner, name in ((SweepConfig, "runs"), (driver, "make_workers"), (driver, "read_study")):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, counting(calls, name, function))
    flags = "--width 8 --vocab 16 --length 4 --counts 4 8 --steps 10 --seeds 0 --out"
    monkeypatch.setattr("fastmem.cli.capacity.write_report", lambda *_: 0)
    assert command("capacity", *flags.split(), tmp_path) == 0
    assert calls == {"runs": 1, "make_workers": 1, "read_study": 1}


def test_two_sweeps_in_one_folder(tmp_path: Path) -> None:
    """Fails if two sweeps train the same runs at once, or a lock outlives its sweep."""
    config = replace(TINY, out=tmp_path)
    first = sweep(config, progress=False)
    next(first)
    with pytest.raises(ValueError, match="another fastmem is at work in"):
        finish(config)
    first.close()
    assert len(finish(config)) == 7


def test_a_diverged_run_is_a_failed_row(tmp_path: Path) -> None:
    """Fails if a divergence stops the sweep, or the row of a diverged run has bits."""
    rows = finish(replace(TINY, out=tmp_path, lr=1e4, steps=200, width=(8,), seeds=(0,)))
    assert {row["status"] for row in rows} == {"failed"}
    assert "Diverged: diverged at step" in rows[0]["error"]
    assert rows[0]["memorized_bits"] == {"strict": None, "published": None}
    model = report(tmp_path)["models"][0]
    assert model["why_not"] == "no run finished: see the errors in its rows"
    assert model["capacity_bits"] == {"strict": None, "published": None}


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    """Fails if a damaged row, or a row of a newer version, is read as a result or deleted."""
    finish(replace(TINY, out=tmp_path, width=(8,), seeds=(0,)))
    path = sorted((tmp_path / "rows").iterdir())[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=rf"{path.name} is not a whole file"):
        finish(replace(TINY, out=tmp_path, width=(8,), seeds=(0,)))
    assert path.read_bytes() == whole[:100]
    path.write_bytes(whole)
    write_json(path, read_json(path) | {"schema": 99})
    with pytest.raises(ValueError, match="has schema 99, this version reads 1 and 2"):
        load_rows(tmp_path)


@pytest.mark.parametrize("together", [1, 3])
def test_killed_twenty_times_and_finished_is_the_undisturbed_sweep(
    tmp_path: Path, together: int
) -> None:
    """Fails if kill -9 at any moment loses, doubles or changes a row.

    A kill may leave the runs of a group with checkpoints of different steps: then sums are taken in
    another order, and rows agree only up to the rounding of a thousand steps. One process loads
    torch once and forks a child for each attempt; the child writes a checkpoint every 10 ms.
    """
    flags = "--layers 1 --width 8 12 --heads 2 --vocab 16 --length 4 --counts 4 8 --steps 1000"
    program = (
        "import importlib, os, signal, sys, torch; torch.set_num_threads(1)\n"
        "from fastmem.cli.main import main\n"
        "importlib.import_module('fastmem.training.group').CHECKPOINT_SECONDS = 0.01\n"
        "workers = importlib.import_module('fastmem.sweeps.workers')\n"
        f"workers.group_size = lambda runs, device: {together}\n"
        "for _ in sys.stdin:\n"
        "    child = os.fork()\n"
        "    if not child: os.setpgid(0, 0); main(sys.argv[1:])\n"
        "    print(child, flush=True)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
    )

    def start(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, "capacity", *flags.split(), "--out", str(out)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, **pipes)  # type: ignore[call-overload, no-any-return]

    def attempt(server: subprocess.Popen[str], kill_after: float | None) -> int:
        assert server.stdin
        assert server.stdout
        server.stdin.write("go\n")
        server.stdin.flush()
        child = int(server.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        while (line := server.stdout.readline()) and not line.strip().lstrip("-").isdigit():
            pass
        return int(line)  # ValueError if the server died

    rng = random.Random(0)
    with start(tmp_path / "killed") as server:
        codes = [attempt(server, rng.uniform(0.01, 0.3)) for _ in range(20)]
        assert codes.count(-signal.SIGKILL) >= 15  # a fast machine ends before the last kill
        assert attempt(server, None) == 0
        assert server.stdin
        server.stdin.close()
    with start(tmp_path / "whole") as server:
        assert attempt(server, None) == 0
        assert server.stdin
        server.stdin.close()
    files = [tmp_path / name / "capacity.json" for name in ("killed", "whole")]
    killed, whole = (constant(json.loads(path.read_text())) for path in files)
    if together == 1:
        assert killed == whole
    rows, others = load_rows(tmp_path / "killed"), load_rows(tmp_path / "whole")
    assert len(rows) == 8
    for row, other in zip(rows, others, strict=True):
        same = ("key", "sequences", "steps", "epochs")
        assert {n: row[n] for n in same} == {n: other[n] for n in same}
        held, right = (r["memorized_bits"]["strict"] for r in (row, other))
        assert held == pytest.approx(right, rel=0.02)


def test_counts_auto_takes_few_runs_and_goes_on(tmp_path: Path) -> None:
    """Fails if counts="auto" trains more runs than needed, or a resumed sweep trains others."""
    config = replace(TINY, width=(8,), counts="auto", steps=150)
    whole = finish(replace(config, out=tmp_path / "whole"))
    keys = [row["key"] for row in whole]
    assert len(set(keys)) == len(keys)
    assert {row["seed"] for row in whole} == {0, 1}
    assert len({row["sequences"]["count"] for row in whole}) >= 3
    parts = []
    for _ in keys:
        part = sweep(replace(config, out=tmp_path / "parts"), progress=False)
        parts.append(next(part)["key"])
        part.close()
    assert parts == keys
    assert finish(replace(config, out=tmp_path / "parts")) == []


def test_a_failed_run_ends_its_bracket(tmp_path: Path) -> None:
    """Fails if counts="auto" keeps training a model that diverges."""
    config = replace(TINY, counts="auto", lr=1e4, steps=200, out=tmp_path)
    assert [row["status"] for row in finish(config)] == ["failed"] * 2


def test_sequence_bits_are_opt_in(tmp_path: Path) -> None:
    """Fails if bits are written without being asked for, or are not of members and held-out."""
    finish(replace(TINY, out=tmp_path / "without", seeds=(0,)))
    assert not (tmp_path / "without" / "sequence_bits").exists()
    rows = finish(replace(TINY, out=tmp_path / "with", seeds=(0,), sequence_bits=True))
    for row in rows:
        path = tmp_path / "with" / "sequence_bits" / f"{row['key']}.parquet"
        table = pyarrow.parquet.read_table(path)
        bits, held_out = np.array(table["bits"]), np.array(table["held_out"])
        N = row["sequences"]["count"]
        assert (~held_out).sum() == held_out.sum() == N
        memorized = row["coded_entropy_bits"] - bits[~held_out].sum()
        assert memorized == pytest.approx(row["memorized_bits"]["strict"], abs=1e-3)
        assert row["held_out_bits"] == pytest.approx(bits[held_out].mean())
        assert row["held_out_bits"] > bits[~held_out].mean()
    frame = fastmem.load(tmp_path / "with")
    assert frame.held_out_bits.tolist() == [
        r["held_out_bits"] for r in load_rows(tmp_path / "with")
    ]
