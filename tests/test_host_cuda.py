"""What is only done on a GPU, without one: on the device that tests/host_cuda makes of the host."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import rank_jobs
from torch.utils import cpp_extension

pytest.importorskip("triton", reason="needs Triton, which is made for Linux")

TESTS = Path(__file__).parent
DEVICE = TESTS / "host_cuda"
pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None or torch.version.hip is not None,
    reason="this PyTorch has the device itself",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a process that has the device."""
    library = tmp_path_factory.mktemp("host_cuda") / "device.so"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-w", "-shared", "-fPIC"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [f"{DEVICE / 'device.cpp'}", "-o", f"{library}", "-lc10", "-ltorch_cpu"]
    command += [f"-L{path}" for path in cpp_extension.library_paths()]
    subprocess.run(command, check=True)
    return {
        **os.environ,
        "HOST_CUDA": f"{library}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (DEVICE, TESTS))),
        "PYTHONWARNINGS": "ignore::RuntimeWarning",  # of NumPy, about infinities of kernels
        "TRITON_INTERPRET": "1",
    }


def run(environment: dict[str, str], *arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    ended = subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_on_the_device(environment: dict[str, str]) -> None:
    """Fails if any test in the file fails, with its report."""
    file = DEVICE / "on_the_device.py"
    run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", file)


def test_ranks_with_devices(environment: dict[str, str]) -> None:
    """Fails if two ranks that keep weights in the memory of their devices, or in that of the host,
    train otherwise than a CPU; collectives are gloo's in the place of NCCL."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", 2, rank_jobs.__file__]
    variables = environment | {"RANKS_DEVICE": "cuda", "FASTMEM_STEP": "eager"}
    found: dict[str, Any] = json.loads(
        run(variables, *launch, "offloaded", "null").splitlines()[-1]
    )
    assert found["places"] == [["cuda"], ["cpu"]]
    right, entropy = rank_jobs.trained(None, "fp32"), rank_jobs.DATA.coded_entropy_bits
    for bits in found["bits"]:
        assert np.abs(np.subtract(bits, right["bits"])).max() / entropy < 2e-5
