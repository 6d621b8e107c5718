"""The environment of all tests, set before any of them loads torch."""

import os
import sys
from pathlib import Path

# As the console script does: the tests of a machine that is busy must not take hours.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# `python -m pytest` looks here first, where transformers finds kernels/ and not the package that it
# hopes for.
ROOT = Path(__file__).parent.parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
