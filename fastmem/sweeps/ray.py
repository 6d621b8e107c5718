"""Workers of Ray, an optional dependency: jobs are tasks on this machine or on a cluster."""

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
from torch._C._distributed_c10d import TCPStore

from fastmem.base.arguments import checked_device, threads_or_all
from fastmem.base.openmp import default_spin
from fastmem.sweeps.groups import free_bytes, group_size
from fastmem.sweeps.job import Job, Outcome, RunResult, WorkerLost, run_job
from fastmem.sweeps.ranked import rank_environment, run_rank, telling
from fastmem.sweeps.rows import RunSpec
from fastmem.sweeps.workers import POLL_SECONDS

FORWARDED_ENV = (
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "FASTMEM_CHECKPOINT_SECONDS",
    "FASTMEM_COLLECTIVE_SECONDS",
    "FASTMEM_REFERENCE",
    "FASTMEM_STEP",
    "FASTMEM_WORKSPACE",
)
"""Variables of this process's environment that tasks get too."""
PORT_SECONDS = 5.0
CONNECT_SECONDS = 30.0
SILENCE_SECONDS = 20
"""A cluster silent for this long is lost. Ray itself ends the process after a minute."""


class RayCluster:
    """A Ray cluster: trains as many jobs at a time as fit on its nodes, and may grow and shrink.

    On a cluster started elsewhere one job more than fits waits in Ray's queue, so that a cluster
    that scales itself sees work.

    Args:
        address: "local" starts Ray on this machine, for this process; "auto" finds a running
            cluster; else HOST:PORT of a cluster's head.
        device: cpu or cuda; Ray assigns the GPU.
        cpus: cores, and threads, of a task.
        gpus: the fraction of a GPU that a task has, in (0, 1], with device cuda.
        ranks: tasks that train one model together, each with a whole GPU.

    Raises:
        ValueError: Ray is not installed; nothing answers at the address; or every node is too small
            for a task. Each with the fix.
        ConnectionError: later, when the cluster is lost.
    """

    def __init__(self, address: str, device: str, cpus: int, gpus: float, ranks: int = 1) -> None:
        _import_ray()
        if device not in ("cpu", "cuda"):
            raise ValueError(f"Ray assigns devices: use --device cpu or cuda, not {device}")
        if address not in ("local", "auto"):
            _check_port(address)
        self._address, self._device, self._cpus = address, torch.device(device), cpus
        self._gpus = (gpus if ranks == 1 else 1.0) if device == "cuda" else 0.0
        self._ranks = ranks
        self._jobs: dict[Any, Job] = {}
        self._groups: dict[Any, Any] = {}
        """The placement group of each job of ranks."""
        self._free: float | None = None

    def __enter__(self) -> Self:
        self._ray = _connected(self._address)
        try:
            self._node = self._ray.get_runtime_context().get_node_id()
            self._slots = self._count_slots(self._ray.nodes())
            self._check_size()
            options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_retries": 0}
            # Ray reuses a process for the next task, except after a GPU task: CUDA fixes the GPUs
            # of a process once, and the next task may have another GPU.
            self._task = self._ray.remote(**options)(_run_task)
            self._together = self._ray.remote(num_cpus=0, max_retries=0)(_run_ranks)
            self._measure = self._ray.remote(**options)(_free_bytes)
        except BaseException:
            self._ray.shutdown()
            raise
        self._silence, self._checked = 0.0, time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._poll_nodes, daemon=True).start()
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
        if self._ranks == 1 and self._gpus and self._free is None:
            # This machine may lack a GPU, so a task measures the memory on a node.
            self._free = self._gpus * self._measured()
        if self._ranks > 1:
            return 1
        fits = group_size(runs, self._device, self._free)
        return min(fits, ceil(len(runs) / max(1, self._slots)))

    def _measured(self) -> float:
        """Free bytes of a GPU of the cluster."""
        reference = self._measure.remote(self._device)
        while not self._ray.wait([reference], timeout=POLL_SECONDS)[0]:
            self._check_alive()
        try:
            return float(self._ray.get(reference))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise ConnectionError(f"no node reported the memory of its GPU: {error}") from None

    def begin(self, job: Job) -> None:
        if self._ranks == 1:
            self._jobs[self._task.options(name=job.name).remote(job, self._cpus)] = job
            return
        # The group belongs to this process: it ends, with its tasks, if the task that starts them
        # is lost. PACK: on one node if one has room.
        parts = [{"CPU": self._cpus, "GPU": self._gpus}] * self._ranks
        group = self._ray.util.placement_group(parts, strategy="PACK")
        reference = self._together.options(name=job.name).remote(job, group, self._cpus, self._gpus)
        self._jobs[reference], self._groups[reference] = job, group

    def wait(self) -> list[tuple[Job, Outcome]]:
        references = list(self._jobs)
        self._ray.wait(references, timeout=POLL_SECONDS)
        self._check_alive()
        done, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        outcomes: list[tuple[Job, Outcome]] = []
        for reference in done:
            try:
                outcomes.append((self._jobs[reference], self._outcome(reference)))
            except Exception:
                if not outcomes:
                    raise
                continue  # the sweep first writes the rows of the other jobs; the next wait raises
            del self._jobs[reference]
            if reference in self._groups:
                self._ray.util.remove_placement_group(self._groups.pop(reference))
        return outcomes

    def _outcome(self, reference: Any) -> Outcome:
        exceptions = self._ray.exceptions
        try:
            results: list[RunResult] | None = self._ray.get(reference)
            return results
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, ModuleNotFoundError):
                raise ValueError(
                    f"a node of the cluster lacks a module ({error.cause}): install the same "
                    "fastmem-lm on all nodes"
                ) from None
            raise error.cause from None
        except exceptions.RayError as error:
            return WorkerLost(f"Ray reported {str(error).splitlines()[0].rstrip('.')}")

    def _poll_nodes(self) -> None:
        """Asks the head for its nodes until closed; in a separate thread, since the call does not
        return once the head is lost."""
        while not self._closed.wait(POLL_SECONDS):
            try:
                nodes = self._ray.nodes()
            except Exception:  # Ray raises various types if the head does not answer
                continue
            if any(node["NodeID"] == self._node and node["Alive"] for node in nodes):
                self._slots = self._count_slots(nodes)
                self._silence = 0.0

    def _check_alive(self) -> None:
        now = time.monotonic()
        # The time for which this process itself was stopped does not count.
        self._silence += min(now - self._checked, 2 * POLL_SECONDS)
        self._checked = now
        if self._silence > SILENCE_SECONDS:
            raise ConnectionError(
                f"the Ray cluster ({self._address}) is lost: finished runs are kept, and the same "
                "command resumes the sweep"
            )

    def _count_slots(self, nodes: Sequence[dict[str, Any]]) -> int:
        """Jobs that fit on the nodes."""
        count = 0
        for node in nodes:
            if node["Alive"]:
                resources = node["Resources"]
                fits = int(resources.get("CPU", 0) // self._cpus)
                if self._gpus:
                    fits = min(fits, int(resources.get("GPU", 0)) * int(1 / self._gpus))
                count += fits
        return count // self._ranks

    def _check_size(self) -> None:
        if self._slots:
            return
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus, cpus = (max((int(n.get(of, 0)) for n in nodes), default=0) for of in ("GPU", "CPU"))
        if self._ranks > 1:
            of = "GPU" if self._gpus else "CPU"
            found = sum(int(node.get(of, 0)) for node in nodes)
            raise ValueError(
                f"--gpus-per-run {self._ranks} needs as many tasks of {self._cpus} cores"
                f"{' and a GPU' * bool(self._gpus)}, the Ray cluster ({self._address}) has {found} "
                f"{of}s: use a smaller --gpus-per-run or --ray-cpus"
            )
        if self._gpus and not gpus:
            raise ValueError(
                f"a task needs {self._gpus:g} GPUs, the Ray cluster ({self._address}) has 0: start "
                "nodes with `ray start --num-gpus`, or use --device cpu"
            )
        raise ValueError(
            f"a task needs {self._cpus} cores, the largest node of the Ray cluster "
            f"({self._address}) has {cpus}: use --ray-cpus {max(1, cpus)}"
        )


def _run_task(job: Job, threads: int) -> list[RunResult] | None:
    torch.set_num_threads(threads)
    return run_job(job)


def _run_ranks(job: Job, group: Any, threads: int, gpus: float) -> Outcome:
    """Starts the ranks of a job, a task in each part of the placement group; the outcome of all."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray = _import_ray()
    address, size = ray.util.get_node_ip_address(), group.bundle_count
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    options = {"num_cpus": threads, "num_gpus": gpus, "max_retries": 0}
    task = ray.remote(**options)(_run_rank)
    ranks = []
    for rank in range(size):
        part = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        # Ray shows each task one GPU, which is then the first.
        place = rank_environment(address, store, rank, size, 0)
        named = task.options(scheduling_strategy=part, name=f"{job.name} rank {rank}")
        ranks.append(named.remote(job, place, threads).future())
    lost, failed = ray.exceptions.RayError, ray.exceptions.RayTaskError
    try:
        outcome: Outcome = telling(ranks, lambda one: _is_lost(one.exception())).result()
        return outcome
    except failed as error:
        raise error.cause from None
    except lost as error:
        return WorkerLost(f"Ray reported {str(error).splitlines()[0].rstrip('.')}")


def _is_lost(error: BaseException | None) -> bool:
    exceptions = _import_ray().exceptions
    lost = isinstance(error, exceptions.RayError)
    return lost and not isinstance(error, exceptions.RayTaskError)


def _run_rank(job: Job, place: dict[str, str], threads: int) -> Outcome:
    torch.set_num_threads(threads)
    return run_rank(job, place)


def _free_bytes(device: torch.device) -> int:
    return free_bytes(checked_device(device))


def _import_ray() -> Any:
    # Ray reads both when it loads: no telemetry, and no warning about tasks with 0 GPUs.
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
    """ValueError if nothing listens at an address; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--ray takes local, auto or HOST:PORT, not {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=PORT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from None


def _check_connection(address: str) -> None:
    """ValueError if Ray cannot connect. A separate process tries first, since Ray prints errors and
    does not give up if another program answers."""
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
            # Ray sends its token only in this mode.
            raise ValueError(
                f"the Ray cluster at {address} asks for a token: set RAY_AUTH_MODE=token, with "
                "the token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from None
        lines = [line for line in failure.stderr.splitlines() if line.strip()]
        raise _no_cluster(address, lines[-1] if lines else "Ray ended without a message") from None


def _no_cluster(address: str, why: str) -> ValueError:
    return ValueError(
        f"no Ray cluster answers at {address} ({why}): start one with `ray start --head`, or use "
        "--ray local"
    )


def _connected(address: str) -> Any:
    """The module ray, connected; ValueError if it cannot connect."""
    ray = _import_ray()
    if ray.is_initialized():
        raise ValueError("this process is connected to Ray already: call ray.shutdown() first")
    settings: dict[str, Any] = {}
    if address == "local":
        settings = {"num_cpus": threads_or_all(None), "include_dashboard": False}
        # A local head that stops answering never returns, so Ray need not wait a minute.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(2 * SILENCE_SECONDS))
    else:
        _check_connection(address)
    forwarded = {name: os.environ[name] for name in FORWARDED_ENV if name in os.environ}
    settings["runtime_env"] = {"env_vars": forwarded | default_spin()}
    try:
        ray.init(address, log_to_driver=False, logging_level="CRITICAL", **settings)
    except Exception as error:  # Ray raises a plain Exception if a part of it does not start
        raise ConnectionError(f"Ray did not start: {str(error).splitlines()[0]}") from error
    # Ray reports lost processes on standard output; rows and errors report them here.
    ray._private.worker._worker_logs_enabled = False
    return ray
