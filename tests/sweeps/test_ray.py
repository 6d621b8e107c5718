"""Jobs as tasks of Ray: the same rows, lost workers, a lost head, and bad input."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.sweep_rows import TINY, bytes_of, serial

from fastmem import load_rows, sweep
from fastmem.sweeps.job import Job
from fastmem.sweeps.ray import RayCluster


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench/kills.py, which finds the processes of a sweep."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    import kills

    return kills


def kill_a_task(kills: Any) -> int:
    """Kills the first process that trains; returns its id."""
    while True:
        for pid, command in kills.descendants(os.getpid()).items():
            if command.startswith("ray::1x"):
                os.kill(pid, signal.SIGKILL)
                return int(pid)
        time.sleep(0.02)


def test_ray_writes_the_same_rows_and_survives(
    tmp_path: Path, kills: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fails if a byte of a row or of its sequence bits depends on the worker; if a killed worker
    costs more than a second attempt of its own run; or if Ray prints."""
    config = replace(
        TINY, steps=400, seeds=tuple(range(3)), sequence_bits=True, out=tmp_path / "ray"
    )
    running = sweep(replace(config, ray="local"), progress=False)
    with ThreadPoolExecutor(1) as thread:
        killed = thread.submit(kill_a_task, kills)
        rows = list(running)
    assert killed.result()
    assert {(row["status"], row["threads"]) for row in rows} == {("done", 1)}
    serial(replace(config, out=tmp_path / "one"))
    assert bytes_of(config.out) == bytes_of(tmp_path / "one")
    assert len(bytes_of(config.out)) == 2 * 12
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores of Ray")
def test_a_model_of_two_ranks(
    tmp_path: Path, kills: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fails if ranks on Ray do not find each other; if a killed rank is not an outcome of its job,
    or holds the cores of its job; if the row differs by more than rounding; or if Ray prints."""
    config = replace(TINY, width=(8,), counts=(8,), seeds=(0,), steps=300, out=tmp_path / "ray")
    running = sweep(replace(config, ray="local", gpus_per_run=2), progress=False)

    def kill_a_rank() -> int:
        while True:
            for pid, command in kills.descendants(os.getpid()).items():
                if command.startswith("ray::1x") and "rank 1" in command:
                    os.kill(pid, signal.SIGKILL)
                    return int(pid)
            time.sleep(0.02)

    with ThreadPoolExecutor(1) as thread:
        killed = thread.submit(kill_a_rank)
        (row,) = list(running)
    assert killed.result()
    assert capfd.readouterr() == ("", "")
    assert (row["status"], row["ranks"]) == ("done", 2)
    (alone,) = load_rows(serial(replace(config, out=tmp_path / "one")))
    assert row["memorized_bits"] == pytest.approx(alone["memorized_bits"], rel=1e-5)


def test_a_head_that_is_killed(tmp_path: Path, kills: Any) -> None:
    """Fails if the sweep waits for its head, prints more than one line, loses or tears a row, or
    leaves a task running. In a subprocess, since Ray ends a process whose head is lost."""
    program = (
        "from fastmem.cli.main import main; from fastmem.sweeps import ray; "
        "ray.SILENCE_SECONDS = 2; main()"
    )
    grid = {"width": 8, "vocab": 16, "length": 4, "counts": 4, "steps": 5000, "ray": "local"}
    words = [f"--{name}={value}" for name, value in (grid | {"out": tmp_path}).items()]
    words += ["--seeds", *map(str, range(20))]
    with subprocess.Popen(
        [sys.executable, "-c", program, "capacity", *words], stderr=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stderr is not None
        begun = iter(driver.stderr.readline, "")  # on a busy machine lines of progress come first
        assert any(line.startswith("[1/20] ") for line in begun)
        family = kills.descendants(driver.pid)
        head = next(pid for pid, command in family.items() if "/gcs_server " in command)
        os.kill(head, signal.SIGKILL)
        *lines, last = driver.stderr.read().splitlines()
    lines = [line for line in lines if not line.startswith("sweep: ")]
    assert driver.returncode == 2
    assert last.startswith("fastmem: the Ray cluster (local) is lost: finished runs are kept, and")
    assert all(line.startswith("[") for line in lines)
    # Ray's own processes search for their head for a minute.
    kills.gone({pid for pid, command in family.items() if command.startswith("ray::1x")})
    assert len(load_rows(tmp_path)) == 1 + len(lines)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a socket that listens and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_an_address_that_does_not_answer(
    tmp_path: Path, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the sweep waits for ever, or the error lacks its fix."""
    monkeypatch.setattr("fastmem.sweeps.ray.CONNECT_SECONDS", 0.5)
    why = rf"no Ray cluster answers at {silent} \(no answer in 0 seconds\): start one with `ray sta"
    with pytest.raises(ValueError, match=why):
        list(sweep(replace(TINY, ray=silent, out=tmp_path / "s"), progress=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ray": "foo"}, "--ray takes local, auto or HOST:PORT, not 'foo'"),
        ({"ray": "ray://head:x"}, "takes local, auto or HOST:PORT"),
        (
            {"ray": "127.0.0.1:1"},
            r"answers at 127.0.0.1:1 \(.*refused\): start one with `ray start",
        ),
        ({"ray": "127.0.0.1:99999"}, "no Ray cluster answers at 127.0.0.1:99999"),
        ({"workers": 2}, "--workers 2 and --ray local: Ray counts its own workers"),
        ({"device": "cuda:1"}, "Ray assigns devices: use --device cpu or cuda, not cuda:1"),
        ({"ray_cpus": 0}, "ray_cpus must be from 1 to 4096, got 0"),
        ({"ray_gpus": 2.0}, r"ray_gpus must be in \(0, 1\], not 2.0"),
        ({"ray_gpus": float("nan")}, r"ray_gpus must be in \(0, 1\], not nan"),
    ],
)
def test_bad_input_starts_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Fails if a mistake starts Ray or leaves a folder, or the error lacks its fix."""
    config = replace(TINY, **{"ray": "local", "out": tmp_path / "s", **change})
    with pytest.raises(ValueError, match=message):
        list(sweep(config, progress=False))
    assert not (tmp_path / "s").exists()


def test_ray_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a missing Ray gives a traceback, or the error does not say what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'fastmem-lm\[ray\]'"):
        list(sweep(replace(TINY, ray="local", out=tmp_path / "s"), progress=False))


class Nodes:
    """A fake ray module: a cluster of nodes with these resources, and free bytes on a GPU."""

    def __init__(self, *resources: dict[str, float], free: int = 0) -> None:
        self._nodes = [{"NodeID": "me", "Alive": True, "Resources": r} for r in resources]
        self._free, self.is_shut = free, False

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def get_runtime_context(self) -> Any:
        return type("Context", (), {"get_node_id": lambda self: "me"})()

    def remote(self, **options: Any) -> Any:
        self.options = options
        return lambda function: type("Remote", (), {"remote": lambda self, *_: None})()

    def wait(self, references: list[None], timeout: float) -> tuple[list[None], list[None]]:
        return references, []

    def get(self, reference: None) -> int:
        return self._free

    def shutdown(self) -> None:
        self.is_shut = True


@pytest.mark.parametrize(
    ("resources", "gpus", "slots"),
    [
        ([{"CPU": 5.0}], 0.0, 2),
        ([{"CPU": 5.0}, {"CPU": 3.0}, {}], 0.0, 3),
        ([{"CPU": 64.0, "GPU": 8.0}], 0.25, 32),
        ([{"CPU": 64.0, "GPU": 8.0}], 0.3, 24),
        ([{"CPU": 64.0, "GPU": 2.0}, {"CPU": 64.0}], 1.0, 2),
    ],
)
def test_room_follows_the_nodes(
    monkeypatch: pytest.MonkeyPatch, resources: list[dict[str, float]], gpus: float, slots: int
) -> None:
    """Fails if the number of tasks is not the number that fits on the nodes, or a task gets parts
    of two GPUs."""
    nodes = Nodes(*resources)
    monkeypatch.setattr("fastmem.sweeps.ray._connected", lambda address: nodes)
    with RayCluster("local", "cuda" if gpus else "cpu", 2, gpus or 0.25) as cluster:
        assert cluster.room == slots
        assert (nodes.options["num_cpus"], nodes.options["num_gpus"]) == (2, gpus)
        nodes._nodes.append({"NodeID": "new", "Alive": True, "Resources": resources[0]})
        nodes._nodes.append({"NodeID": "dead", "Alive": False, "Resources": resources[0]})
        cluster._slots = cluster._count_slots(nodes.nodes())
        assert cluster.room == slots + cluster._count_slots(nodes.nodes()[:1])


def test_a_group_on_gpus_of_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the size of a group does not follow from the fraction of a GPU that a task has."""
    from fastmem.sweeps.groups import needed_bytes

    runs = replace(TINY, width=(8,), counts=(8,), seeds=tuple(range(1000))).runs()
    free = 1000 * needed_bytes(runs[0], torch.device("cuda"))
    nodes = Nodes({"CPU": 8.0, "GPU": 1.0}, free=free)
    monkeypatch.setattr("fastmem.sweeps.ray._connected", lambda address: nodes)
    with RayCluster("local", "cuda", 1, 0.25) as cluster:
        assert cluster.size(runs) == 0.8 * 250
        assert cluster.size(runs[:10]) == 3  # an equal part for each of four tasks


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", r"a task needs 0.25 GPUs, the Ray cluster \(local\) has 0: start nodes with"),
        ("cpu", r"a task needs 9 cores, the largest node .* has 8: use --ray-cpus 8"),
    ],
)
def test_nodes_that_are_too_small(
    monkeypatch: pytest.MonkeyPatch, device: str, message: str
) -> None:
    """Fails if the sweep waits for tasks that never fit, or leaves Ray running."""
    nodes = Nodes({"CPU": 4.0}, {"CPU": 8.0})
    monkeypatch.setattr("fastmem.sweeps.ray._connected", lambda address: nodes)
    with pytest.raises(ValueError, match=message), RayCluster("local", device, 9, 0.25):
        pass
    assert nodes.is_shut


def test_a_node_that_sees_another_folder(tmp_path: Path) -> None:
    """Fails if a node writes checkpoints into another folder of the same name, or does not write
    into the sweep's folder."""
    (run,) = replace(TINY, width=(8,), counts=(4,), seeds=(0,)).runs()
    job = Job((run,), "cpu", tmp_path, stamp='{"pid": 1}')
    assert job.checkpoints() == [None]
    (tmp_path / "lock").write_text('{"pid": 2}')
    assert job.checkpoints() == [None]
    (tmp_path / "lock").write_text('{"pid": 1}')
    assert job.checkpoints() == [tmp_path / "checkpoints" / f"{run.key}.pt"]


def test_a_cluster_that_asks_for_a_token(monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    """Fails if Ray's refusal is reported as a head that does not answer."""

    def refused(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="RPC error: InvalidAuthToken: ...")

    monkeypatch.setattr(subprocess, "run", refused)
    with pytest.raises(ValueError, match="asks for a token: set RAY_AUTH_MODE=token"):
        RayCluster(silent, "cpu", 1, 0.25).__enter__()
