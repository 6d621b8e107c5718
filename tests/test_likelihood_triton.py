"""The Triton kernels: interpreted on the CPU, in a process of its own.

Triton decides on import whether it interprets, so this process, where another test may have
imported it already, cannot be the one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

INTERPRETED = Path(__file__).with_name("triton_interpreted.py")


def test_interpreted_kernels() -> None:
    """Fails if any test in triton_interpreted.py does, with its report."""
    run = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                str(INTERPRETED),
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
            ),
            # numpy, standing for a GPU, warns of infinities that the kernels expect.
            *("-W", "ignore::RuntimeWarning"),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=INTERPRETED.parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
