"""The environment of all tests, set before any of them loads torch."""

import os
import sys
from pathlib import Path

import pytest

# As the console script does: the tests of a machine that is busy must not take hours.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# `python -m pytest` looks here first, where transformers finds kernels/ and not the package that it
# hopes for.
ROOT = Path(__file__).parent.parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]

LONGEST = [
    "kernels/test_interpreted.py",
    "sweeps/test_ray.py",
    "training/test_ranks.py",
    "test_bench.py",
    "test_host_cuda.py",
    "cli/test_main.py",
    "integrations/test_lm_eval.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first: at the end one of two workers would wait for them."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
