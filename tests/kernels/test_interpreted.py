"""Runs the tests of the Triton kernels in a new process: interpreted, and on a GPU.

Triton decides on import whether to interpret, and another test may have imported it here already.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

TESTS = Path(__file__).parent
FILES = sorted(TESTS.glob("interpreted_*.py"))


def run(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    # numpy, standing for a GPU, warns of infinities that the kernels expect.
    command += [
        "-p",
        "cases.triton_interpreted",
        "-W",
        "ignore::RuntimeWarning",
        *arguments,
        *map(str, FILES),
    ]
    variables = {**os.environ, "PYTHONPATH": str(TESTS.parent), **environment}
    found = subprocess.run(
        command, env=variables, cwd=TESTS.parents[1], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_interpreted() -> None:
    """Fails if any of these tests fails, with its report."""
    run(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")  # tensors are too small for two threads


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_native() -> None:
    """Fails if any of these tests fails with compiled kernels on the GPU."""
    # Most of the time is compilation.
    workers = ("-n", "auto") if importlib.util.find_spec("xdist") else ()
    run(*workers)
