"""Jobs as tasks of Ray, an engine that is an extra: on this machine, or on a cluster."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from math import ceil
from typing import Any, Self

import torch

from fastmem.base.arguments import checked_device, integer, threads_or_all
from fastmem.sweeps.groups import free_bytes, group_size
from fastmem.sweeps.job import Job, Outcome, RunResult, WorkerLost, run_job
from fastmem.sweeps.rows import RunSpec
from fastmem.sweeps.workers import POLL_SECONDS, SPIN_COUNT

FORWARDED_ENV = (
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "FASTMEM_CHECKPOINT_SECONDS",
    "FASTMEM_REFERENCE",
    "FASTMEM_STEP",
)
"""Of this process's environment, what tasks are to have too."""
PORT_SECONDS = 5.0
CONNECT_SECONDS = 30.0
SILENCE_SECONDS = 20
"""A cluster that says nothing for so long is gone. Ray itself waits for a minute, and then ends the
process."""


class RayCluster:
    """A Ray cluster, as many jobs at a time as its nodes have room for; it may grow and shrink.

    On a cluster that others have started, one job more than fits waits there: by it a cluster that
    scales itself sees that there is work.

    Args:
        address: "local" starts Ray on this machine, for this process; "auto" finds one that is
            there; else HOST:PORT of a cluster's head.
        device: cpu or cuda; Ray says which GPU.
        cpus: cores, and threads, of a task.
        gpus: the part of a GPU that a task has, with device cuda.

    Raises:
        ValueError: Ray is not installed; an address where nothing answers; nodes too small for a
            task. Each with the fix.
        ConnectionError: later, when the cluster is lost.
    """

    def __init__(self, address: str, device: str, cpus: int, gpus: float) -> None:
        _import_ray()
        if device not in ("cpu", "cuda"):
            raise ValueError(f"Ray gives out devices: use --device cpu or cuda, not {device}")
        integer("ray_cpus", cpus, 1, 4096)
        if not 0 < gpus <= 1:
            raise ValueError(
                f"a task has a part of one GPU: ray_gpus must be in (0, 1], not {gpus}"
            )
        if address not in ("local", "auto"):
            _check_port(address)
        self._address, self._device, self._cpus = address, torch.device(device), cpus
        self._gpus = gpus if device == "cuda" else 0.0
        self._jobs: dict[Any, Job] = {}
        self._free: float | None = None

    def __enter__(self) -> Self:
        self._ray = _connected(self._address)
        try:
            self._me = self._ray.get_runtime_context().get_node_id()
            self._slots = self._count(self._ray.nodes())
            self._check_size()
            options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_retries": 0}
            # Ray keeps a process for the next task, but not one that had a GPU: what CUDA sees is
            # decided once in a process, and the next task may have another.
            self._do = self._ray.remote(**options)(_do)
            self._measure = self._ray.remote(**options)(_free_bytes)
        except BaseException:
            self._ray.shutdown()
            raise
        self._silence, self._looked = 0.0, time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._closed.set()
        for reference in self._jobs:
            self._ray.cancel(reference, force=True)
        self._jobs.clear()
        self._ray.shutdown()

    @property
    def room(self) -> int:
        return self._slots + (self._address != "local") - len(self._jobs)

    def size(self, runs: Sequence[RunSpec]) -> int:
        if self._gpus and self._free is None:
            # This machine may have no GPU: a task looks at one of theirs.
            self._free = self._gpus * self._measured()
        fits = group_size(runs, self._device, self._free)
        return min(fits, ceil(len(runs) / max(1, self._slots)))

    def _measured(self) -> float:
        """Bytes that are free on a GPU of theirs."""
        reference = self._measure.remote(self._device)
        while not self._ray.wait([reference], timeout=POLL_SECONDS)[0]:
            self._check_heard()
        try:
            return float(self._ray.get(reference))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise ConnectionError(f"no node said how much memory its GPU has: {error}") from None

    def begin(self, job: Job) -> None:
        self._jobs[self._do.options(name=job.name).remote(job, self._cpus)] = job

    def wait(self) -> list[tuple[Job, Outcome]]:
        references = list(self._jobs)
        self._ray.wait(references, timeout=POLL_SECONDS)
        self._check_heard()
        done, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        ended: list[tuple[Job, Outcome]] = []
        for reference in done:
            try:
                ended.append((self._jobs[reference], self._outcome(reference)))
            except Exception:
                if not ended:
                    raise
                continue  # the others' rows are written first; the next wait raises it
            del self._jobs[reference]
        return ended

    def _outcome(self, reference: Any) -> Outcome:
        exceptions = self._ray.exceptions
        try:
            ended: list[RunResult] | None = self._ray.get(reference)
            return ended
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, ModuleNotFoundError):
                raise ValueError(
                    f"a node of the cluster lacks a module ({error.cause}): install the same "
                    "fastmem-lm on all of them"
                ) from None
            raise error.cause from None
        except exceptions.RayError as error:
            return WorkerLost(f"Ray said {str(error).splitlines()[0].rstrip('.')}")

    def _follow(self) -> None:
        """Asks the head which nodes there are, again and again, in a thread of its own: the call
        does not return when the head is gone."""
        while not self._closed.wait(POLL_SECONDS):
            try:
                nodes = self._ray.nodes()
            except Exception:  # whatever Ray makes of an answer that does not come
                continue
            if any(node["NodeID"] == self._me and node["Alive"] for node in nodes):
                self._slots = self._count(nodes)
                self._silence = 0.0

    def _check_heard(self) -> None:
        now = time.monotonic()
        # A process that was stopped for a while has not listened; that is no silence.
        self._silence += min(now - self._looked, 2 * POLL_SECONDS)
        self._looked = now
        if self._silence > SILENCE_SECONDS:
            raise ConnectionError(
                f"the Ray cluster ({self._address}) is gone: what is finished is kept, and the "
                "same command goes on from there"
            )

    def _count(self, nodes: Sequence[dict[str, Any]]) -> int:
        """Tasks that fit on the nodes."""
        count = 0
        for node in nodes:
            if node["Alive"]:
                there = node["Resources"]
                fits = int(there.get("CPU", 0) // self._cpus)
                if self._gpus:
                    fits = min(fits, int(there.get("GPU", 0)) * int(1 / self._gpus))
                count += fits
        return count

    def _check_size(self) -> None:
        if self._slots:
            return
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus, cpus = (max((int(n.get(of, 0)) for n in nodes), default=0) for of in ("GPU", "CPU"))
        if self._gpus and not gpus:
            raise ValueError(
                f"a task needs {self._gpus:g} GPUs, the Ray cluster ({self._address}) has 0: start "
                "nodes with `ray start --num-gpus`, or use --device cpu"
            )
        raise ValueError(
            f"a task needs {self._cpus} cores, the largest node of the Ray cluster "
            f"({self._address}) has {cpus}: use --ray-cpus {max(1, cpus)}"
        )


def _do(job: Job, threads: int) -> list[RunResult] | None:
    """What a task does."""
    torch.set_num_threads(threads)
    return run_job(job)


def _free_bytes(device: torch.device) -> int:
    return free_bytes(checked_device(device))


def _import_ray() -> Any:
    # Said before it is loaded: no telemetry, and no word on what 0 GPUs will mean.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise ValueError(
            "--ray needs ray, which is not installed: pip install 'fastmem-lm[ray]'"
        ) from None
    return ray


def _check_port(address: str) -> None:
    """ValueError where nothing is behind an address; Ray itself would be asked for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--ray takes local, auto or HOST:PORT, not {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=PORT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from None


def _rehearse(address: str) -> None:
    """ValueError where Ray cannot connect. Another process tries it first: where something else
    answers, Ray does not give up, and is not quiet."""
    program = "import sys, ray; ray.init(sys.argv[1])"
    try:
        subprocess.run(
            [sys.executable, "-c", program, address],
            check=True,
            capture_output=True,
            text=True,
            timeout=CONNECT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise _no_cluster(address, f"no answer in {CONNECT_SECONDS:.0f} seconds") from None
    except subprocess.CalledProcessError as failure:
        if "InvalidAuthToken" in failure.stderr:
            # Ray uses the token it has for an address only where it is told to.
            raise ValueError(
                f"the Ray cluster at {address} asks for a token: set RAY_AUTH_MODE=token, with "
                "the token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from None
        lines = [line for line in failure.stderr.splitlines() if line.strip()]
        raise _no_cluster(address, lines[-1] if lines else "Ray ended without a word") from None


def _no_cluster(address: str, why: str) -> ValueError:
    return ValueError(
        f"no Ray cluster answers at {address} ({why}): start one with `ray start --head`, or use "
        "--ray local"
    )


def _connected(address: str) -> Any:
    """Ray, connected; ValueError where it cannot be."""
    ray = _import_ray()
    if ray.is_initialized():
        raise ValueError("this process is connected to Ray already: call ray.shutdown() first")
    settings: dict[str, Any] = {}
    if address == "local":
        settings = {"num_cpus": threads_or_all(None), "include_dashboard": False}
        # A head on this machine that is silent does not come back, so Ray need not wait a minute.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(2 * SILENCE_SECONDS))
    else:
        _rehearse(address)
    told = {name: os.environ[name] for name in FORWARDED_ENV if name in os.environ}
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & told.keys():
        told["GOMP_SPINCOUNT"] = SPIN_COUNT
    settings["runtime_env"] = {"env_vars": told}
    try:
        ray.init(address, log_to_driver=False, logging_level="CRITICAL", **settings)
    except Exception as error:  # of no type of its own where a part of Ray did not start
        raise ConnectionError(f"Ray did not start: {str(error).splitlines()[0]}") from error
    # Its word on each process that is lost goes to standard output; rows and errors say it here.
    ray._private.worker._worker_logs_enabled = False
    return ray
