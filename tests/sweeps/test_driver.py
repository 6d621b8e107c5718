"""Sweeps: the grid, rows, going on after anything, and capacity.json."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from cases.sweep_rows import TINY, constant, finish

import fastmem
from fastmem import (
    GPTConfig,
    SweepConfig,
    UniformSequences,
    from_description,
    load_rows,
    sweep,
)
from fastmem.base.storage import read_json, write_json
from fastmem.cli.main import main
from fastmem.sweeps import driver
from fastmem.sweeps.config import PAPER, default_heads
from fastmem.sweeps.job import execute
from fastmem.sweeps.rows import report


def test_a_row_says_which_sequences(tmp_path: Path) -> None:
    """Fails if the data set cannot be made again from its row, or older fields are renamed."""
    run = TINY.runs()[0]
    row, _ = execute(run, "cpu", tmp_path / "c", progress=False)
    assert from_description(row["sequences"]) == run.sequences
    assert {"count", "length", "vocab", "seed", "start"} <= row["sequences"].keys()


def test_unknown_entropy_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a row of a set of unknown entropy has NaN, which JSON does not know, or a number."""
    monkeypatch.setattr(UniformSequences, "_entropy_from", lambda *_: math.nan)
    row, _ = execute(TINY.runs()[0], "cpu", tmp_path / "c", progress=False)
    json.dumps(row, allow_nan=False)
    assert row["status"] == "done"
    assert row["entropy_bits"] is None
    assert row["coded_entropy_bits"] is None
    assert row["memorized_bits"] == {"strict": None, "published": None}
    assert {point["memorized_bits"] for point in row["curve"]} == {None}


def test_the_grid() -> None:
    """Fails if an axis is lost, or a seed does not change data, initialization and order."""
    runs = TINY.runs()
    assert len(runs) == 2 * 2 * 2
    assert len({run.key for run in runs}) == 8
    assert {(run.sequences.seed, run.train.seed) for run in runs} == {(0, 0), (1, 1)}
    assert len(replace(TINY, precision=("fp32", "bf16-true"), layers=(1, 2)).runs()) == 32


def test_the_published_grid() -> None:
    """Fails if the preset is not 16 shapes with the published counts of parameters."""
    runs = replace(PAPER, device="cpu").runs()
    counts = {run.model.parameter_count for run in runs}
    assert len(counts) == 16
    assert {80_352, 6_859_264} <= counts
    assert {(run.model.vocab, run.model.length, run.train.steps) for run in runs} == {
        (2048, 64, 1_000_000)
    }


def test_loads_are_bits_per_parameter() -> None:
    """Fails if data set sizes are not the stated entropy per parameter, to two digits."""
    config = SweepConfig(width=(32,), loads=(1.0, 4.0), seeds=(0,))
    for run, load in zip(config.runs(), config.loads, strict=True):
        found = run.sequences.coded_entropy_bits / run.model.parameter_count
        assert found == pytest.approx(load, rel=0.05)


def test_default_heads_are_two_wide() -> None:
    """Fails if the default does not divide the width."""
    assert [default_heads(w) for w in (32, 24, 16, 6, 2, 13)] == [16, 12, 8, 3, 1, 1]
    for width in range(1, 100):
        assert width % default_heads(width) == 0


def test_rows_hold_result_config_and_environment(tmp_path: Path) -> None:
    """Fails if a row is not enough to know what was run and where."""
    rows = finish(replace(TINY, out=tmp_path))
    assert sorted(row["key"] for row in load_rows(tmp_path)) == sorted(r["key"] for r in rows)
    row = rows[0]
    assert row["status"] == "done"
    assert row["parameters"] == GPTConfig(**row["model"]).parameter_count
    assert row["memorized_bits"]["published"] == row["memorized_bits"]["strict"] * 4 / 3
    assert row["steps"] == 12
    measured = ("seconds", "tokens_per_second", "flops_per_second", "mfu", "peak_bytes")
    for name in ("version", "torch", "device", "threads", "generator", *measured):
        assert row[name], name
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_summary(tmp_path: Path) -> None:
    """Fails if capacity.json lacks a field that its readers were promised."""
    finish(replace(TINY, out=tmp_path))
    summary = report(tmp_path)
    assert {"strict", "published"} == summary["bits_per_parameter"].keys()
    assert {"version", "commit", "torch", "device", "seconds"} <= summary.keys()
    model = summary["models"][1]
    assert (model["width"], model["heads"], model["vocab"], model["length"]) == (12, 2, 16, 4)
    assert model["saturated"] is (model["why_not"] is None)
    assert {"estimate", "low", "high"} == model["capacity_bits"]["strict"].keys()
    strict = model["bits_per_parameter"]["strict"]["estimate"]
    assert strict == model["capacity_bits"]["strict"]["estimate"] / model["parameters"]
    run = model["runs"][0]
    assert {"count", "seed", "status", "entropy_bits", "memorized_bits", "epochs", "steps"} <= (
        run.keys()
    )
    assert summary["seconds"] == pytest.approx(sum(r["seconds"] for r in load_rows(tmp_path)))


def test_finished_rows_are_skipped_and_failed_ones_tried_again(tmp_path: Path) -> None:
    """Fails if work is done twice, or a failure is for ever."""
    config = replace(TINY, out=tmp_path)
    first = finish(config)
    assert finish(config) == []
    failed = first[3] | {"status": "failed", "error": "lost"}
    write_json(tmp_path / "rows" / f"{failed['key']}.json", failed)
    (again,) = finish(config)
    assert constant(again) == constant(first[3])


def test_axes_can_grow(tmp_path: Path) -> None:
    """Fails if adding counts, as the verdict advises, is refused or repeats what is there."""
    finish(replace(TINY, out=tmp_path))
    added = finish(replace(TINY, out=tmp_path, counts=(8, 16)))
    assert {row["sequences"]["count"] for row in added} == {16}
    assert len(report(tmp_path)["models"][0]["runs"]) == 6


def test_another_study_is_refused(tmp_path: Path) -> None:
    """Fails if rows that cannot be compared are mixed."""
    config = replace(TINY, out=tmp_path)
    finish(config)
    with pytest.raises(ValueError, match=r"another sweep \(lr is None there, 0.5 here\).*--lr"):
        finish(replace(config, lr=0.5))
    path = next((tmp_path / "rows").iterdir())
    row = read_json(path)
    row["train"]["beta1"] = 0.5
    write_json(path, row)
    with pytest.raises(
        ValueError, match=r"beta1 is 0.5 there, 0.8 here\).* or the same --beta1"
    ):
        finish(config)
    for alike in (TINY.train_config(), replace(TINY, steps=None, epochs=3.0).train_config()):
        assert (alike.steps is None) is (alike.epochs is not None)


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
    words = [
        "--width",
        "8",
        "--vocab",
        "16",
        "--length",
        "4",
        "--counts",
        "4",
        "8",
        "--steps",
        "10",
        "--seeds",
        "0",
        "--out",
    ]
    monkeypatch.setattr("fastmem.cli.capacity.write_report", lambda *_: 0)
    with pytest.raises(SystemExit):
        main(["capacity", *words, str(tmp_path)])
    assert calls == {"runs": 1, "make_workers": 1, "read_study": 1}


def test_two_sweeps_in_one_folder(tmp_path: Path) -> None:
    """Fails if two processes train the same rows at once, or a lock outlives its sweep."""
    config = replace(TINY, out=tmp_path)
    first = sweep(config, progress=False)
    next(first)
    with pytest.raises(ValueError, match="another fastmem is at work in"):
        finish(config)
    first.close()
    assert len(finish(config)) == 7


def test_a_diverged_run_is_a_failed_row(tmp_path: Path) -> None:
    """Fails if divergence stops the sweep, or leaves a number in a table."""
    rows = finish(replace(TINY, out=tmp_path, lr=1e4, steps=200, width=(8,), seeds=(0,)))
    assert {row["status"] for row in rows} == {"failed"}
    assert "Diverged: diverged at step" in rows[0]["error"]
    assert rows[0]["memorized_bits"] == {"strict": None, "published": None}
    model = report(tmp_path)["models"][0]
    assert model["why_not"] == "no run finished: see the errors in its rows"
    assert model["capacity_bits"] == {"strict": None, "published": None}


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    """Fails if a damaged row, or one of a later version, is read as a result or thrown away."""
    finish(replace(TINY, out=tmp_path, width=(8,), seeds=(0,)))
    path = sorted((tmp_path / "rows").iterdir())[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=rf"{path.name} is not a whole file"):
        finish(replace(TINY, out=tmp_path, width=(8,), seeds=(0,)))
    assert path.read_bytes() == whole[:100]
    path.write_bytes(whole)
    write_json(path, read_json(path) | {"schema": 99})
    with pytest.raises(ValueError, match="has schema 99, this version reads 2"):
        load_rows(tmp_path)


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
    """Fails if a grid that cannot run begins, or leaves a folder behind."""
    out = tmp_path / "new"
    with pytest.raises(ValueError, match=message):
        finish(replace(TINY, out=out, **change))
    assert not out.exists()


@pytest.mark.parametrize("name", [field.name for field in fields(SweepConfig)])
def test_each_field_of_a_sweep_refuses_what_it_is_not(name: str) -> None:
    """Fails if a wrong type raises anything but a ValueError that names what it is of."""
    nothing = {"steps", "epochs", "seconds", "heads", "counts", "lr", "embedding_lr", "ray"}
    for bad in ("x", math.nan, [], {}, 1j, b"1", object(), ("x",), (True,), (math.nan,), None):
        if (bad is None and name in nothing) or (name, bad) in (
            ("precision", ("x",)),
            ("ray", "x"),  # looked at by fastmem.sweeps.ray
        ):
            continue
        change = {name: bad} | ({"counts": None} if name == "loads" else {})
        with pytest.raises(ValueError, match=name):
            replace(TINY, **change).runs()


@pytest.mark.parametrize("together", [1, 3])
def test_killed_twenty_times_and_finished_is_the_undisturbed_sweep(
    tmp_path: Path, together: int
) -> None:
    """Fails if kill -9 at any moment loses, doubles or changes a row.

    Of runs that are trained together a kill may save some at a later step than others: then sums
    are taken in another order, and rows are the same to what a thousand steps make of rounding.
    One process pays for torch once and forks a child for each try; the child saves every 10 ms.
    """
    flags = "--layers 1 --width 8 12 --heads 2 --vocab 16 --length 4 --counts 4 8 --steps 1000"
    program = (
        "import importlib, os, signal, sys, torch; torch.set_num_threads(1)\n"
        "from fastmem.cli.main import main\n"
        "importlib.import_module('fastmem.training.trainer').CHECKPOINT_SECONDS = 0.01\n"
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
        return int(line)  # an empty line: the server died

    rng = random.Random(0)
    with start(tmp_path / "killed") as server:
        codes = [attempt(server, rng.uniform(0.01, 0.3)) for _ in range(20)]
        assert codes.count(-signal.SIGKILL) >= 15  # a machine fast enough ends before the last
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
    """Fails if the bracket trains more than it needs, or a stopped sweep decides otherwise."""
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
    """Fails if a model that diverges is tried for ever."""
    config = replace(TINY, counts="auto", lr=1e4, steps=200, out=tmp_path)
    assert [row["status"] for row in finish(config)] == ["failed"] * 2


def test_sequence_bits_are_opt_in(tmp_path: Path) -> None:
    """Fails if bits are written that nobody asked for, or are not those of members and held-out."""
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
