"""Runs the tests of the Triton kernels on a CPU, interpreted, each file in a new process.

Triton decides on import whether to interpret, and another test may have imported it here already.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

TESTS = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(TESTS.glob("interpreted_*.py")), ids=lambda p: p.stem)
def test_interpreted(path: Path) -> None:
    """Fails if any test in the file fails, with its report."""
    command = [sys.executable, "-m", "pytest", str(path), "-q", "-x", "-p", "no:cacheprovider"]
    # NumPy, in place of a GPU, warns of infinities that the kernels expect.
    command += ["-p", "cases.triton_interpreted", "-W", "ignore::RuntimeWarning"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS.parent)}
    run = subprocess.run(
        command, env=environment, cwd=TESTS.parents[1], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
