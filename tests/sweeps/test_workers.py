"""Jobs in this process and in other processes: the same rows, and nothing left behind."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import spawn
from pathlib import Path

import pytest
import torch
from cases.sweep_rows import TINY, bytes_of, serial

from fastmem import sweep
from fastmem.sweeps.job import Job, WorkerLost
from fastmem.sweeps.workers import LocalProcesses, Process, _inherited, core_sets


def test_processes_write_the_same_rows(tmp_path: Path) -> None:
    """Fails if a byte of a row or of its sequence bits depends on the worker; if an error in a
    worker does not end the sweep, or the sweep loses rows by it or cannot resume; or if a sweep
    needs the main thread, which servers and notebooks do not give it."""
    config = replace(TINY, sequence_bits=True, out=tmp_path / "two")
    broken = config.out / "checkpoints" / f"{config.runs()[-1].key}.pt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="is damaged: delete it"):
        list(sweep(replace(config, workers=2), progress=False))
    broken.unlink()
    first = len(list((config.out / "rows").glob("*.json")))
    with ThreadPoolExecutor(1) as thread:
        rows = thread.submit(list, sweep(replace(config, workers=2), progress=False)).result()
    assert {row["threads"] for row in rows} == {1}
    assert first + len(rows) == 8
    assert bytes_of(config.out) == bytes_of(serial(replace(config, out=tmp_path / "one")))
    assert not list((config.out / "checkpoints").iterdir())
    assert not list((config.out / "running").iterdir())


def test_a_process_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the death of a worker is not an outcome of its job, kills the next process, or
    counts for the next job; or if processes that die while starting are started for ever."""
    monkeypatch.setattr("fastmem.sweeps.workers.MAX_STARTS", 1)
    job = Job((replace(TINY, steps=10**6).runs()[0],), "cpu", tmp_path, "no stamp")
    worker = Process("cpu", 1, core_sets(1)[0])
    worker.begin(job)
    pid = worker._first.result()
    os.kill(pid, signal.SIGKILL)
    assert worker.future is not None
    assert worker.future.exception() is not None
    assert worker.take() == (job, WorkerLost(f"its process {pid} was killed or crashed"))

    worker._threads = 0  # torch refuses it while starting
    worker.begin(job)
    assert worker.future.exception() is not None
    with pytest.raises(OSError, match="1 worker processes in a row died while starting"):
        worker.take()
    worker.stop()


def test_what_a_process_inherits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a worker starts with other threads, gets Ctrl-C, or runs the main program again; or
    if this process keeps the settings."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before = dict(os.environ), signal.pthread_sigmask(signal.SIG_BLOCK, ()), sys.modules["__main__"]
    with _inherited(3):
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert os.environ["GOMP_SPINCOUNT"] == "1000"
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert not [name for name in spawn.get_preparation_data("w") if "main" in name]
    after = dict(os.environ), signal.pthread_sigmask(signal.SIG_BLOCK, ()), sys.modules["__main__"]
    assert after == before
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with _inherited(3):
        assert "GOMP_SPINCOUNT" not in os.environ


def test_cores_and_threads_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if workers share cores while others are idle, or get more threads than cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {9, 2, 3, 5, 6})
    assert core_sets(1) == [[2, 3, 5, 6, 9]]
    assert core_sets(2) == [[2, 3], [5, 6, 9]]
    assert core_sets(7) == [[2], [3], [5], [6], [9], [2], [3]]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert [worker._threads for worker in LocalProcesses(2, "cpu")._workers] == [2, 2]
    assert [worker._threads for worker in LocalProcesses(7, "cpu")._workers] == [1] * 7


def test_gpus_are_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if two processes share a GPU, or more workers than GPUs is not an error."""
    monkeypatch.setattr("fastmem.sweeps.workers.checked_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [worker._device for worker in LocalProcesses(2, "cuda")._workers] == ["cuda:0", "cuda:1"]
    assert [worker._device for worker in LocalProcesses(1, "cuda:1")._workers] == ["cuda:1"]
    with pytest.raises(ValueError, match=r"3 workers need 3 GPUs, cuda has 2: use --workers 2"):
        LocalProcesses(3, "cuda")
    with pytest.raises(ValueError, match=r"2 workers need 2 GPUs, cuda:1 has 1: use --workers 1"):
        LocalProcesses(2, "cuda:1")


@pytest.mark.parametrize("count", [0, -1, 10**6, True, 2.0])
def test_bad_numbers_of_workers(tmp_path: Path, count: int) -> None:
    """Fails if an invalid number of workers starts a sweep, or the error lacks the limits."""
    with pytest.raises(ValueError, match=r"workers must be .*from 1 to 4096"):
        list(sweep(replace(TINY, workers=count, out=tmp_path / "s"), progress=False))
    assert not (tmp_path / "s").exists()
