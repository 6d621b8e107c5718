"""One model of a sweep on several ranks: the row of one process, lost ranks, and bad input."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.sweep_rows import TINY, finish, row, serial
from torch._C._distributed_c10d import TCPStore

import fastmem
from fastmem import load_rows
from fastmem.base.rank_watch import RankLost
from fastmem.base.ranks import Ranks, Stopped, joined
from fastmem.models.sharded import Sharding
from fastmem.sweeps.job import (
    Job,
    Outcome,
    RunResult,
    WorkerLost,
    checkpoint_of,
    row_without_memory,
    run_alone,
    run_job,
)
from fastmem.sweeps.ranked import (
    LocalRanks,
    _is_killed,
    rank_environment,
    run_rank,
    telling,
)
from fastmem.sweeps.store import read_sequence_bits
from fastmem.sweeps.workers import Process
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

    monkeypatch.setattr(kills, "END_SECONDS", 30.0)
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
    those of one process by more than rounding; or if a checkpoint is left, ranks print, or nothing
    says that a rank was lost."""
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
        (found,) = list(fastmem.sweep(config))
    kills.gone(killed.result() | ranks_of(kills, os.getpid()))
    out, said = capfd.readouterr()
    lines = [line for line in said.splitlines() if not line.startswith("sweep: ")]
    assert (out, len(lines)) == ("", 1)
    assert " is tried again, from its checkpoint: its process " in lines[0]
    assert (found["status"], found["ranks"], found["mesh"]) == ("done", 2, {"shard": 2})
    assert found["tokens_per_second_per_rank"] == found["tokens_per_second"] / 2
    for ours, theirs in zip(found["curve"], before, strict=False):
        assert ours["seconds"] == theirs["seconds"]
    assert not list((config.out / "checkpoints").iterdir())

    (alone,) = load_rows(serial(replace(config, gpus_per_run=1, out=tmp_path / "one")))
    assert found["memorized_bits"] == pytest.approx(alone["memorized_bits"], rel=1e-5)
    assert (found["steps"], found["epochs"]) == (alone["steps"], alone["epochs"])
    for ours, theirs in zip(
        *(read_sequence_bits(tmp_path / name, found["key"]) for name in ("two", "one")), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-2)


def ended(outcome: Outcome | BaseException) -> Future[Outcome]:
    """The future of a rank that returned, or raised."""
    future: Future[Outcome] = Future()
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
    return future


def test_who_tells_the_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a rank that misses a killed one speaks for it, if the error of one rank waits for
    ranks that wait for it, or if rank 0 speaks before the others are done."""
    monkeypatch.setattr("fastmem.sweeps.ranked.SETTLE_SECONDS", 0.1)
    (run,) = RANKED.runs()
    done, lost = [RunResult({"status": "done"})], WorkerLost("another rank was lost")
    failed = [RunResult(row_without_memory(run, torch.device("cpu"), MemoryError("full")))]
    assert "MemoryError: full" in failed[0].row["error"]
    killed, error = BrokenProcessPool(), ValueError("damaged")
    waits: Future[Outcome] = Future()
    for outcomes, teller in (
        ([done, done, done], 0),
        ([lost, OSError("rank 0"), killed], 2),
        ([lost, killed, waits], 1),
        ([waits, error, waits], 1),
        ([waits, failed, waits], 1),
        ([waits, waits, lost], 2),
    ):
        ranks = [one if isinstance(one, Future) else ended(one) for one in outcomes]
        assert telling(ranks, _is_killed) is ranks[teller]
    ranks = [ended(done), Future()]
    with ThreadPoolExecutor(1) as thread:
        told = thread.submit(telling, ranks, _is_killed)
        with pytest.raises(TimeoutError):
            told.result(0.3)
        ranks[1].set_result(done)
        assert told.result() is ranks[0]


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (MemoryError("full"), "failed"),
        (RankLost("another rank was lost"), WorkerLost("another rank was lost")),
        (Stopped(15), WorkerLost("a signal stopped it")),
        (ValueError("is damaged"), ValueError("is damaged")),
        (OSError("no space"), OSError("no space")),
    ],
)
def test_how_a_rank_fails(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, told: object
) -> None:
    """Fails if missing memory is not a failed row, if the loss of another rank or a signal ends the
    sweep, if another error does not, or if the process stays a rank."""

    def run_job(job: Job, ranks: Ranks) -> None:
        assert (ranks.rank, ranks.size, os.environ["RANK"]) == (0, 1, "0")
        raise raised

    monkeypatch.setattr("fastmem.sweeps.ranked.run_job", run_job)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = rank_environment("127.0.0.1", store, 0, 1, 0)
    job = Job(tuple(RANKED.runs()), "cpu", Path(), "no stamp")
    outcome: object
    try:
        outcome = run_rank(job, place)
    except Exception as error:
        outcome = error
    if told == "failed":
        ((row, *_),) = outcome  # type: ignore[misc]
        assert row["status"] == "failed"
        assert row["error"].startswith("MemoryError: full; it needs about")
    else:
        assert repr(outcome) == repr(told)
    assert not place.keys() & os.environ.keys()


def test_a_gpu_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if two ranks of this machine share a GPU, or several runs train as one job."""
    monkeypatch.setattr("fastmem.sweeps.ranked.checked_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    places: list[dict[str, str]] = []

    def begin(process: Process, job: Any, train: Any) -> None:
        places.append(train.keywords["environment"])
        process.future = ended([])

    monkeypatch.setattr(Process, "begin", begin)
    workers = LocalRanks(2, 3, "cuda")
    assert workers.size(RANKED.runs() * 3) == 1
    for _ in range(2):
        workers.begin(Job(tuple(RANKED.runs()), "cuda", Path(), "no stamp"))
    assert workers.room == 0
    assert [place["LOCAL_RANK"] for place in places] == ["0", "1", "2", "3", "4", "5"]
    assert [place["RANK"] for place in places] == ["0", "1", "2"] * 2
    assert {place["WORLD_SIZE"] for place in places} == {"3"}
    assert len({place["MASTER_PORT"] for place in places}) == 2
    workers.__exit__()
    for bad, message in (
        ((1, 8, "cuda"), "--gpus-per-run 8 take 8 GPUs, this machine has 6: use --gpus-per-run 6"),
        ((3, 3, "cuda"), "--gpus-per-run 3 and --workers 3 take 9 GPUs, .* 6: use --workers 2"),
        ((1, 2, "cuda:1"), "--gpus-per-run 2 takes a GPU for each rank: give --device cuda, not"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalRanks(*bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus_per_run": 0}, "gpus_per_run must be from 1 to 4096, got 0"),
        ({"gpus_per_run": 2.0}, "gpus_per_run must be"),
        ({"counts": (8, 5)}, "batch 5, of 5 sequences, is not divisible by 2 ranks: try batch 4"),
        ({"counts": (8, 90), "batch": 63}, "batch 63, of 90 sequences, .* 2 ranks: try batch 62"),
        ({"gpus_per_run": 16}, "batch 8, of 8 .* or data sets of a multiple of 16 sequences"),
    ],
)
def test_bad_input_starts_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Fails if a mistake in any run of the grid starts a sweep, or the error lacks its fix."""
    with pytest.raises(ValueError, match=message):
        finish(replace(RANKED, out=tmp_path / "s", **change))
    assert not (tmp_path / "s").exists()


def test_sizes_that_follow_from_runs_fit_the_ranks() -> None:
    """Fails if counts "auto" ask for a batch that the ranks cannot share, or for a run again."""
    config = replace(RANKED, counts="auto", gpus_per_run=7, batch=700)
    rows: list[dict[str, Any]] = []
    while found := config.runs(rows):
        for run in found:
            bits = min(run.sequences.coded_entropy_bits, 3000.0)
            rows.append(row(8, run.sequences.count, bits=bits / run.model.parameter_count))
            rows[-1]["coded_entropy_bits"] = run.sequences.coded_entropy_bits
        assert len(rows) < 30
    counts = [one["sequences"]["count"] for one in rows]
    assert len(counts) >= 3
    assert all(count % 7 == 0 for count in counts if count < 700)
    assert config.runs([row(8, 7, bits=0.01)]) == []  # the next, 3, is 7 again


def test_checkpoints_of_ranks_are_of_their_run(tmp_path: Path) -> None:
    """Fails if --overwrite, or the row of a finished run, leaves the folder of its checkpoints; or
    if one process begins such a run again, alone or with others."""
    config = replace(RANKED, gpus_per_run=1, sequence_bits=False, out=tmp_path)
    (run,) = config.runs()
    checkpoint = checkpoint_of(tmp_path, run.key)
    for overwrite in (True, False):
        (shards_of(checkpoint) / "step-000000001").mkdir(parents=True)
        finish(replace(config, overwrite=overwrite))
        assert not shards_of(checkpoint).exists()
    with joined("cpu"):
        run_alone(run, "cpu", checkpoint, progress=False, sharding=Sharding())
    (before,) = curve_of_checkpoint(tmp_path)[-1:]
    job = Job((run,), "cpu", tmp_path, "")
    assert run_job(replace(job, runs=(run, run))) is None
    (result,) = run_job(job) or ()
    assert (result.row["ranks"], result.row["seconds"]) == (1, before["seconds"])
