"""Jobs as tasks of Ray: the same rows, lost workers, a lost head, and what is refused."""

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
from cases.sweep_rows import bytes_of, serial

from fastmem import SweepConfig, load_rows, sweep
from fastmem.sweeps.job import Job
from fastmem.sweeps.ray import RayCluster

TINY = SweepConfig(
    width=(8, 12), vocab=16, length=4, counts=(4, 8), seeds=(0, 1), steps=12, heads=(2,)
)


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench/kills.py, which knows how to find the processes of a sweep."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    import kills

    return kills


def kill_a_task(kills: Any) -> int:
    """Ends the first process that is seen to train, and says which."""
    while True:
        for pid, told in kills.descendants(os.getpid()).items():
            if told.startswith("ray::1x"):
                os.kill(pid, signal.SIGKILL)
                return int(pid)
        time.sleep(0.02)


def test_ray_writes_the_same_rows_and_survives(
    tmp_path: Path, kills: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fails if a byte of a row or of the bits of its sequences depends on who trained it; if a
    worker that is killed takes more than its own run with it, or that for good; or if Ray
    speaks."""
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


def test_a_head_that_is_killed(tmp_path: Path, kills: Any) -> None:
    """Fails if it is waited for, if more than a line says so, if a row is lost or torn, or if a
    task goes on. In a process of its own, since Ray ends one whose head is gone."""
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
        told = [driver.stderr.readline() for _ in range(2)]
        assert told[1].startswith("[1/20] ")
        family = kills.descendants(driver.pid)
        os.kill(next(pid for pid, told in family.items() if "/gcs_server " in told), signal.SIGKILL)
        *lines, last = driver.stderr.read().splitlines()
    assert driver.returncode == 2
    assert last.startswith(
        "fastmem: the Ray cluster (local) is gone: what is finished is kept, and"
    )
    assert all(line.startswith("[") for line in lines)
    # Ray's own processes look for their head for a minute.
    kills.gone({pid for pid, told in family.items() if told.startswith("ray::1x")})
    assert len(load_rows(tmp_path)) == 1 + len(lines)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of something that listens and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_an_address_that_does_not_answer(
    tmp_path: Path, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if it is waited for without end, or the line does not say what to do."""
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
        ({"device": "cuda:1"}, "Ray gives out devices: use --device cpu or cuda, not cuda:1"),
        ({"ray_cpus": 0}, "ray_cpus must be from 1 to 4096, got 0"),
        ({"ray_gpus": 2.0}, r"ray_gpus must be in \(0, 1\], not 2.0"),
        ({"ray_gpus": float("nan")}, r"ray_gpus must be in \(0, 1\], not nan"),
    ],
)
def test_bad_input_begins_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Fails if a mistake starts Ray or leaves a folder, or is not told with its fix."""
    config = replace(TINY, **{"ray": "local", "out": tmp_path / "s", **change})
    with pytest.raises(ValueError, match=message):
        list(sweep(config, progress=False))
    assert not (tmp_path / "s").exists()


def test_ray_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a user without Ray sees a traceback, or is not told what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'fastmem-lm\[ray\]'"):
        list(sweep(replace(TINY, ray="local", out=tmp_path / "s"), progress=False))


class Nodes:
    """Stands for Ray: a cluster of nodes that never were, one of which can be asked."""

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
    """Fails if more tasks are given out than fit on the nodes, or less, or a part of a GPU is taken
    for one that spans two."""
    nodes = Nodes(*resources)
    monkeypatch.setattr("fastmem.sweeps.ray._connected", lambda address: nodes)
    with RayCluster("local", "cuda" if gpus else "cpu", 2, gpus or 0.25) as cluster:
        assert cluster.room == slots
        assert (nodes.options["num_cpus"], nodes.options["num_gpus"]) == (2, gpus)
        nodes._nodes.append({"NodeID": "new", "Alive": True, "Resources": resources[0]})
        nodes._nodes.append({"NodeID": "dead", "Alive": False, "Resources": resources[0]})
        cluster._slots = cluster._count(nodes.nodes())
        assert cluster.room == slots + cluster._count(nodes.nodes()[:1])


def test_a_group_on_gpus_that_are_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the size of a group does not come from the part of their memory that a task has."""
    from fastmem.sweeps.groups import needed_bytes

    runs = replace(TINY, width=(8,), counts=(8,), seeds=tuple(range(1000))).runs()
    free = 1000 * needed_bytes(runs[0], torch.device("cuda"))
    nodes = Nodes({"CPU": 8.0, "GPU": 1.0}, free=free)
    monkeypatch.setattr("fastmem.sweeps.ray._connected", lambda address: nodes)
    with RayCluster("local", "cuda", 1, 0.25) as cluster:
        assert cluster.size(runs) == 0.8 * 250
        assert cluster.size(runs[:10]) == 3  # for each of the four


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
    """Fails if tasks that never fit are waited for, or Ray is left running."""
    nodes = Nodes({"CPU": 4.0}, {"CPU": 8.0})
    monkeypatch.setattr("fastmem.sweeps.ray._connected", lambda address: nodes)
    with pytest.raises(ValueError, match=message), RayCluster("local", device, 9, 0.25):
        pass
    assert nodes.is_shut


def test_a_node_that_sees_another_folder(tmp_path: Path) -> None:
    """Fails if a node writes checkpoints into a folder that only has the name of the sweep's, or
    writes none into the sweep's own."""
    (run,) = replace(TINY, width=(8,), counts=(4,), seeds=(0,)).runs()
    job = Job((run,), "cpu", tmp_path, stamp='{"pid": 1}')
    assert job.checkpoints() == [None]
    (tmp_path / "lock").write_text('{"pid": 2}')
    assert job.checkpoints() == [None]
    (tmp_path / "lock").write_text('{"pid": 1}')
    assert job.checkpoints() == [tmp_path / "checkpoints" / f"{run.key}.pt"]


def test_precisions_are_checked_where_the_devices_are(tmp_path: Path) -> None:
    """Fails if a machine without a GPU cannot send runs to one, or sends what no device has."""
    config = replace(TINY, ray="local", device="cuda", precision=("bf16-mixed",), out=tmp_path)
    assert len(config.runs()) == 8
    with pytest.raises(ValueError, match="precision must be one of"):
        replace(config, precision=("fp8",)).runs()  # type: ignore[arg-type]


def test_a_cluster_that_asks_for_a_token(monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    """Fails if Ray's refusal is told as a head that does not answer."""

    def refused(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="RPC error: InvalidAuthToken: ...")

    monkeypatch.setattr(subprocess, "run", refused)
    with pytest.raises(ValueError, match="asks for a token: set RAY_AUTH_MODE=token"):
        RayCluster(silent, "cpu", 1, 0.25).__enter__()
