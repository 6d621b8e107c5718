"""How long OpenMP's threads spin. OpenMP reads the setting when torch loads, so this file imports
nothing that loads torch."""

import os

SPIN_COUNT = "1000"
"""Threads that spin longer make two runs on the same cores 40 times slower each (docs/lab.md)."""


def default_spin() -> dict[str, str]:
    """The variable that limits OpenMP's spinning; empty if the user has set a limit."""
    is_set = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    return {} if is_set else {"GOMP_SPINCOUNT": SPIN_COUNT}
