"""Libraries that are not installed."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "library", "package"),
    [
        ("lm_eval", "lm_eval", "lm-eval[hf]>=0.4.13"),
        ("transformers", "transformers", "fastmem-lm[hf]"),
        ("trl", "trl", "trl>=1.16"),
        ("torchtitan", "torchtitan", "torchtitan>=0.3"),
    ],
)
def test_the_error_has_the_pip_line(module: str, library: str, package: str) -> None:
    """Fails if a missing library is an error without the line that installs it."""
    program = f"import sys; sys.modules['{library}'] = None; import fastmem.integrations.{module}"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    last = told.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: fastmem.integrations.{module} needs ")
    assert last.endswith(f": pip install '{package}'")
    assert "During handling" not in told.stderr
