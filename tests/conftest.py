"""The environment of all tests, set before any of them loads torch."""

import os

# As the console script does: the tests of a machine that is busy must not take hours.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
