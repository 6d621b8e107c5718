"""The stopping rule and the extrapolation, checked against longer training.

Trains each run to its whole budget in stages of doubled steps. At every stage but the last, the
answers of fastmem.memorization.convergence are compared with the bits of the later stages.

    python bench/stopping.py stopping-runs          # a few minutes; resumes after a stop
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmem import SweepConfig, load_rows, sweep
from fastmem.memorization.convergence import extrapolated, has_converged

Curve = tuple[str, float, list[float]]
"""A name, the entropy of the set, and the bits at the end of each stage."""

ONE_LAYER = {"until": "converged", "tolerance": 0.0, "layers": (1,)}
STUDIES = {
    "1 × 4, V 32, S 8": SweepConfig(
        width=(4,), heads=(2,), vocab=32, length=8, counts=(24, 48), seeds=(0, 1, 2, 3),
        steps=25600, lr=0.06, **ONE_LAYER,
    ),
    "1 × 8, V 64, S 8": SweepConfig(
        width=(8,), heads=(2,), vocab=64, length=8, counts=(96, 200), seeds=(0, 1),
        steps=12800, lr=0.04, **ONE_LAYER,
    ),
    "1 × 8, V 32, S 8": SweepConfig(
        width=(8,), heads=(4,), vocab=32, length=8, counts=(120,), seeds=(0, 1, 2),
        steps=12800, lr=0.04, **ONE_LAYER,
    ),
    "1 × 16, V 128, S 16": SweepConfig(
        width=(16,), heads=(4,), vocab=128, length=16, counts=(160,), seeds=(0, 1),
        steps=12800, lr=0.04, **ONE_LAYER,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    out = parser.parse_args().folder
    curves: list[Curve] = []
    for place, (name, study) in enumerate(STUDIES.items()):
        folder = out / str(place)
        list(sweep(SweepConfig(**vars(study) | {"out": folder})))
        for row in load_rows(folder):
            held = [stage["memorized_bits"] for stage in row["stages"]]
            sequences = row["sequences"]["count"]
            curves.append((f"{name}, N {sequences}", row["coded_entropy_bits"], held))
    print("\n".join(report(curves)))


def report(curves: list[Curve]) -> Iterator[str]:
    """The cost of stopping at a tolerance, and the coverage of the intervals."""
    for tolerance in (0.05, 0.02):
        for name in dict.fromkeys(name for name, *_ in curves):
            runs = [(entropy, held) for n, entropy, held in curves if n == name]
            yield f"{name}, tolerance {tolerance:.0%}: {_stopped(runs, tolerance)}"
    for doublings in (1, 2, 3):
        places = [
            (entropy, held[: k + 1], held[k + doublings])
            for _, entropy, held in curves
            for k in range(2, len(held) - doublings)
            if abs(held[k] - held[k - 1]) < 0.1 * held[k]
        ]
        found = [extrapolated(held, entropy, doublings) for entropy, held, _ in places]
        later = np.array([bits for *_, bits in places])
        low, high = (np.array([getattr(i, side) for i in found]) for side in ("low", "high"))
        covered = (low <= later) & (later <= high)
        error = np.array([i.estimate for i in found]) / later - 1
        yield (
            f"{doublings} doublings on, {len(places)} cases of a gain below 10 %: "
            f"{covered.mean():.0%} covered, interval {np.mean((high - low) / later):.1%} wide, "
            f"estimate off by {error.mean():+.1%} ± {error.std():.1%}"
        )


def _stopped(runs: list[tuple[float, list[float]]], tolerance: float) -> str:
    stopped = []
    for entropy, held in runs:
        stops = (k for k in range(len(held)) if has_converged(held[: k + 1], tolerance))
        k = next(stops, len(held) - 1)
        if k == len(held) - 1:
            stopped.append("not within the budget")
            continue
        found = extrapolated(held[: k + 1], entropy)
        fraction = held[k] / held[-1]
        inside = found.low is not None and found.high is not None
        inside = inside and found.low <= max(held[k:]) <= found.high
        stopped.append(
            f"at 1/{2 ** (len(held) - 1 - k)} of the steps with {fraction:.1%} of the last bits, "
            f"the best later {'in' if inside else 'outside'} [{found.low:,.0f}, {found.high:,.0f}]"
        )
    return "; ".join(stopped)


if __name__ == "__main__":
    main()
