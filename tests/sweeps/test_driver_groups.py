"""Runs of a sweep that train together, and memory that is too small for them."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.sweep_rows import TINY, finish

import fastmem
from fastmem import load_rows, train_many
from fastmem.sweeps.groups import group_size, needed_bytes
from fastmem.training.run_state import Diverged

JOB = sys.modules["fastmem.sweeps.job"]


def test_a_model_that_does_not_fit_is_a_failed_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a failed allocation of PyTorch stops the sweep: 2**31 tokens of width 2**12 take 32
    TiB, which every system refuses."""
    monkeypatch.setattr("fastmem.sweeps.groups.total_bytes", lambda _: 1 << 60)
    huge = replace(TINY, width=(4096,), vocab=2**31, heads=None, counts=(4,), seeds=(0,))
    (row,) = finish(replace(huge, out=tmp_path))
    assert row["status"] == "failed"
    assert "allocate memory" in row["error"]


def test_rows_do_not_depend_on_the_grouping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a run in a group gets the data set, seed or checkpoint of another run, or a row is
    lost, doubled or in another file. Up to rounding, since the order of sums may differ."""
    alone = {row["key"]: row for row in finish(replace(TINY, out=tmp_path / "alone"))}
    sizes = []

    def counted(models: Any, *rest: Any) -> Any:
        sizes.append(len(models))
        return train_many(models, *rest)

    monkeypatch.setattr(JOB, "train_many", counted)
    monkeypatch.setattr("fastmem.sweeps.workers.group_size", lambda runs, device: 3)
    finish(replace(TINY, out=tmp_path / "together", seeds=(0, 1, 2, 3)))
    assert sizes == [3, 1] * 4  # two widths, two counts that are both smaller than a batch
    rows = {row["key"]: row for row in load_rows(tmp_path / "together")}
    assert len(rows) == 16
    for key, row in alone.items():
        assert rows[key]["memorized_bits"]["strict"] == pytest.approx(
            row["memorized_bits"]["strict"], rel=1e-3
        )
        same = ("key", "sequences", "train", "model", "steps", "epochs", "stopped_by")
        assert {n: rows[key][n] for n in same} == {n: row[n] for n in same}
        assert rows[key]["stopped_by"] == "budget"
    assert not list((tmp_path / "together" / "checkpoints").iterdir())


def test_a_group_that_does_not_fit_is_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a group too large for the memory loses its runs, or is tried again as it was."""
    sizes = []

    def limited(models: Any, *rest: Any) -> Any:
        sizes.append(len(models))
        if len(models) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return train_many(models, *rest)

    monkeypatch.setattr(JOB, "train_many", limited)
    monkeypatch.setattr("fastmem.sweeps.workers.group_size", lambda runs, device: 5)
    rows = finish(replace(TINY, out=tmp_path, width=(8,), counts=(8,), seeds=tuple(range(7))))
    assert sizes == [5, 2, 2, 2, 1]
    assert [row["seed"] for row in rows] == list(range(7))
    assert {row["status"] for row in rows} == {"done"}


def test_a_model_larger_than_the_machine_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if overcommitted memory is filled until the system kills the process: a run alone must
    fail with the numbers, and a group be halved."""
    monkeypatch.setattr("fastmem.sweeps.groups.total_bytes", lambda _: 40_000_000)
    wide = replace(TINY, width=(8, 512), vocab=4096, counts=(4,), seeds=(0, 1), out=tmp_path)
    monkeypatch.setattr("fastmem.sweeps.workers.group_size", lambda runs, device: 2)
    made = []

    def make(shape: fastmem.GPTConfig, **more: Any) -> fastmem.GPT:
        made.append(shape.width)
        return fastmem.GPT(shape, **more)

    monkeypatch.setattr(JOB, "GPT", make)
    rows = finish(wide)
    assert made == [8, 8]
    assert [row["status"] for row in rows] == ["done", "done", "failed", "failed"]
    assert rows[2]["error"].startswith(
        "MemoryError: weights, gradients and moments are 0.08 GB, and cpu has 0.04 GB; it needs"
    )
    monkeypatch.setattr("fastmem.sweeps.groups.total_bytes", lambda _: 1_000_000)
    rows = finish(replace(wide, width=(8,), out=tmp_path / "b"))
    assert [row["status"] for row in rows] == ["done", "done"]


def test_a_run_that_does_not_fit_alone_gives_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the row does not say how much memory is needed and free, and what to change."""

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(JOB, "train_many", full)
    monkeypatch.setattr("fastmem.sweeps.groups.free_bytes", lambda _: 40_000_000)
    wide = replace(TINY, width=(512,), vocab=4096, counts=(4,), seeds=(0,), out=tmp_path)
    (row,) = finish(wide)
    assert row["status"] == "failed"
    assert row["error"].startswith("OutOfMemoryError: CUDA out of memory")
    assert row["error"].endswith(
        "it needs about 0.08 GB and 0.04 GB are free: try --precision bf16-true, or a smaller model"
    )
    (row,) = finish(replace(wide, out=tmp_path / "b", precision=("bf16-true",)))
    assert row["error"].endswith("are free: try a smaller model")
    long = replace(TINY, width=(8,), length=1024, counts=(500,), seeds=(0,), out=tmp_path / "c")
    (row,) = finish(long)
    assert row["error"].endswith("it needs about 0.12 GB and 0.04 GB are free: try --batch 64")
    monkeypatch.setattr("fastmem.sweeps.groups.free_bytes", lambda _: 500_000_000)
    (row,) = finish(replace(long, out=tmp_path / "d"))
    assert row["error"].endswith(
        "it needs about 0.12 GB and 0.50 GB are free now, so another process may hold the "
        "memory, or the estimate is too low: run it again, then try --batch 64"
    )


@pytest.mark.parametrize(
    ("failure", "kept"), [(MemoryError("no room"), True), (Diverged("at step 3"), False)]
)
def test_a_run_that_lacked_memory_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, kept: bool
) -> None:
    """Fails if a lack of memory deletes the checkpoint of a run, or a divergence leaves it."""

    def fail(*_: Any) -> Any:
        if isinstance(failure, Diverged):
            return [failure]
        raise failure

    monkeypatch.setattr(JOB, "train_many", fail)
    config = replace(TINY, width=(8,), counts=(4,), seeds=(0,), out=tmp_path)
    checkpoint = tmp_path / "checkpoints" / f"{config.runs()[0].key}.pt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    (row,) = finish(config)
    assert row["status"] == "failed"
    assert checkpoint.exists() is kept


def test_the_size_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a group on a GPU exceeds the free memory, or has 0 runs."""
    runs = TINY.runs()
    cuda = torch.device("cuda:1")
    for free, size in ((1000 * needed_bytes(runs[-1], cuda), 800), (5, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10**12))
        assert group_size(runs, cuda) == size
    assert group_size(runs, torch.device("cpu")) == 1
