"""Laws of membership fitted to the runs of sweeps, and compared on models left out of the fit."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmem.base.stats import Floats, Interval
from fastmem.base.storage import Row
from fastmem.memorization.membership_law import (
    Form,
    MembershipLaw,
    expected_membership,
    membership_law,
)
from fastmem.memorization.memorized_law import VALUES, MemorizedLaw, memorized_law, predicted_f1

FORMS = {
    "published": "logistic in N / P, as published",
    "theory": "constant bits per parameter",
    "budget": "bits learned in the epochs",
}
"""The form of arXiv 2505.24832, `fastmem.membership_law` by theory, and
`fastmem.memorization.memorized_law`."""
LEAST_SIZES, LEAST_RUNS = 3, 8
"""Models and runs below which no law is compared."""


@dataclass(frozen=True)
class Study:
    """The runs of one or more sweeps as arrays, (M,) each."""

    parameters: Floats
    sequences: Floats
    epochs: Floats
    memorized: Floats
    """Bits of a sequence: strict, or half the distance of members and held-out sequences where
    their entropy is unknown, as the theory has it."""
    entropy: Floats
    f1: Floats
    models: NDArray[Any]
    spread: float
    """Standard deviation, in bits, of the difficulty of sequences."""

    @property
    def runs(self) -> list[Floats]:
        """As `predicted_f1` takes them."""
        return [self.parameters, self.sequences, self.epochs, self.memorized, self.entropy]

    def take(self, rows: NDArray[np.bool_]) -> "Study":
        """Some of the runs."""
        arrays = {n: v[rows] for n, v in vars(self).items() if isinstance(v, np.ndarray)}
        return Study(**arrays, spread=self.spread)


def study_of(records: Sequence[Row]) -> Study:
    """The runs of `membership_rows`.

    Raises:
        ValueError: fewer than LEAST_RUNS runs, or than LEAST_SIZES sizes of models, or too few
            runs to fit where a size is left out.
    """
    sizes = Counter(record["parameters"] for record in records)
    least = len(records) - max(sizes.values(), default=0)
    if len(records) < LEAST_RUNS or len(sizes) < LEAST_SIZES or least < VALUES:
        raise ValueError(
            f"{len(records)} runs of {len(sizes)} model sizes with stored bits, {least} without "
            f"the commonest size: a law of membership needs {LEAST_RUNS} runs of {LEAST_SIZES} "
            f"sizes, {VALUES} without any one size; widen the sweep, with --sequence-bits"
        )
    known = [record["memorized_bits_per_sequence"] is not None for record in records]
    distance = [(r["held_out_bits"] - r["member_bits"]) / 2 for r in records]
    spreads = [
        max(0.0, r["member_deviation"] ** 2 - 2 * max(0.0, bits) / log(2))
        for r, bits in zip(records, distance, strict=True)
    ]

    def column(name: str) -> Floats:
        return np.array([record[name] for record in records], np.float64)

    return Study(
        column("parameters"),
        column("count"),
        column("epochs"),
        np.array([
            record["memorized_bits_per_sequence"] if has else bits
            for record, has, bits in zip(records, known, distance, strict=True)
        ]),
        column("coded_bits_per_sequence"),
        np.array([record["f1"]["estimate"] for record in records]),
        np.array([f"{r['layers']}x{r['width']}-{r['heads']}-{r['precision']}" for r in records]),
        0.0 if all(known) else float(np.sqrt(np.median(spreads))),
    )  # fmt: skip


def fitted(study: Study) -> dict[str, MembershipLaw | MemorizedLaw]:
    """The three forms, fitted to all runs of a study."""
    P, N, E, bits, H = study.runs
    return {**_in_ratio(study), "budget": memorized_law(P, N, E, bits, entropy=H)}


def _in_ratio(study: Study) -> dict[str, MembershipLaw]:
    """The two forms in N / P."""
    P, N, _, _, H = study.runs
    entropy, uniform = float(H.mean()), not study.spread
    forms: tuple[Form, ...] = ("published", "theory")
    return {
        form: membership_law(P, N, study.f1, entropy=entropy, form=form, uniform=uniform)
        for form in forms
    }


def f1_of(laws: dict[str, Any], study: Study) -> dict[str, Floats]:
    """(M,) F1 of each form for the models, data set sizes and budgets of a study."""
    P, N, E, _, H = study.runs
    found = {form: laws[form].f1(P, N) for form in ("published", "theory")}
    bits = laws["budget"].memorized(P, N, E, H)
    return found | {"budget": expected_membership(bits, spread=study.spread, fpr=())["f1"]}


def compared(study: Study) -> Row:
    """The mean error of F1 of each form on models that were left out of its fit.

    `largest` leaves out the largest models, which the forms must extrapolate to. `each_size` leaves
    out each size in turn; it is the mean over sizes.
    """
    sizes = np.unique(study.parameters)
    errors = {size: _held_out_errors(study, study.parameters == size) for size in sizes.tolist()}
    largest = errors[float(sizes[-1])]
    own = expected_membership(study.memorized, spread=study.spread, fpr=())["f1"]
    return {
        "runs": len(study.f1),
        "sizes": [int(size) for size in sizes],
        "left_out": int(sizes[-1]),
        "largest": largest,
        "each_size": {form: float(np.mean([e[form] for e in errors.values()])) for form in FORMS},
        "from_own_bits": float(np.abs(own - study.f1).mean()),
        "better": min(largest, key=lambda form: largest[form]),
        "values": {form: list(_values(law)) for form, law in fitted(study).items()},
    }


def _held_out_errors(study: Study, out: NDArray[np.bool_]) -> dict[str, float]:
    kept, held_out = study.take(~out), study.take(out)
    found = f1_of(fitted(kept), held_out)
    return {form: float(np.abs(f1 - held_out.f1).mean()) for form, f1 in found.items()}


def _values(law: MembershipLaw | MemorizedLaw) -> tuple[float, ...]:
    if isinstance(law, MembershipLaw):
        return law.values
    return law.bits_per_parameter, law.epochs, law.exponent, law.sharpness, law.parameters


def predicted(
    study: Study, targets: Sequence[tuple[float, float, float, float]]
) -> list[dict[str, Interval]]:
    """F1 of further models by each form, for the P, N, E and entropy of each; an interval for
    `budget`, and its memorized bits a sequence."""
    laws = _in_ratio(study)
    found = predicted_f1(study.runs, study.models, targets, spread=study.spread)
    return [
        {form: Interval(float(law.f1(*target[:2]))) for form, law in laws.items()}
        | {"budget": f1, "memorized_bits": bits}
        for target, (bits, f1) in zip(targets, found, strict=True)
    ]
