"""Unintended memorization: bits that a model saves over a reference code of the same tokens.

All arrays have the bits of one sequence an entry: N members, M held-out sequences. `reference` is
the code c of H(x given θ): a model, a compressor, or the uniform code.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmem.base.arguments import integer, number, numbers
from fastmem.base.stats import Floats, Interval, percentile_interval

Code = Literal["max", "mixture"]

_DRAWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Unintended:
    """Bits of a set of N sequences under one reference and one code, with their intervals.

    `net` is the headline: a positive part has a mean above 0 for sequences that were never seen
    too, and its sum grows with N.
    """

    memorization: Interval
    """N · uniform - Σ target."""
    unintended: Interval
    """Σ `unintended_bits` of members."""
    held_out: Interval
    """N · the mean of `unintended_bits` of held-out sequences."""
    net: Interval
    """unintended - held_out."""
    generalization: Interval
    """memorization - unintended."""
    replicates: dict[str, Floats] = field(repr=False, compare=False)
    """(1 + R,) of each of these fields: its estimate and its bootstrap replicates, which
    `over_seeds` takes; nan replicates for one document."""


def unintended_bits(
    target_bits: ArrayLike, reference_bits: ArrayLike, code: Code = "max"
) -> Floats:
    """Unintended memorization of each sequence: H_c(x) - H(x given c and θ̂).

        max      max(reference - target, 0)
        mixture  log2((2^-target + 2^-reference) / 2) + reference

    The maximum of two likelihoods is the paper's code and no normalized one. The mixture is
    normalized, and costs at most 1 bit more: its result is at least -1.

    Args:
        target_bits: (N,) bits of each sequence by the target model θ̂.
        reference_bits: (N,) bits of the same coded tokens by the reference c.
        code: "max" or "mixture".

    Returns:
        (N,) bits.

    Raises:
        ValueError: the arrays are not finite numbers of one shape (N,); another code.

    Example:
        >>> unintended_bits([3.0, 9.0, 20.0], [10.0, 9.0, 10.0])
        array([7., 0., 0.])
        >>> unintended_bits([3.0, 9.0, 20.0], [10.0, 9.0, 10.0], "mixture").round(3)
        array([ 6.011,  0.   , -0.999])

    Source: arXiv 2505.24832, sections 2 and 4.
    """
    target, reference = _checked("target_bits", target_bits, "reference_bits", reference_bits)
    return _unintended(target, reference, code)


def total_unintended(
    target_bits: ArrayLike,
    reference_bits: ArrayLike,
    held_out_target_bits: ArrayLike,
    held_out_reference_bits: ArrayLike,
    uniform_bits: float,
    *,
    documents: ArrayLike | None = None,
    held_out_documents: ArrayLike | None = None,
    paired: bool = False,
    code: Code = "max",
    replicates: int = 2000,
    seed: int = 0,
) -> Unintended:
    """Memorization, unintended memorization and generalization of a set, net of held-out sequences.

    Intervals are of 95 %, by percentile bootstrap over documents, of members and of held-out
    sequences independently: sequences of one document are not independent. A replicate is N times
    the mean over the sequences of the drawn documents. Low and high are None with one document.

    Args:
        target_bits, reference_bits: (N,) bits of members.
        held_out_target_bits, held_out_reference_bits: (M,) bits of held-out sequences, scaled to N.
        uniform_bits: of one sequence, (S - 1) · log2 V.
        documents, held_out_documents: (N,) and (M,) the document of each sequence, any integers;
            None: each sequence is a document.
        paired: True if held-out sequences are of the same documents: a document is then drawn for
            both, so that what documents have in common does not widen the interval of net.
        code: "max" or "mixture".
        replicates: from 2.
        seed: of the bootstrap.

    Raises:
        ValueError: arrays that do not fit each other, or are empty; another argument.

    Example:
        >>> total = total_unintended([2.0, 4.0], [10.0, 10.0], [9.0], [10.0], uniform_bits=16)
        >>> total.memorization.estimate, total.unintended.estimate, total.net.estimate
        (26.0, 14.0, 12.0)

    Source: arXiv 2505.24832, proposition 1: a lower bound; Davison and Hinkley, Bootstrap Methods
    and their Application (1997), section 3.8 (clusters).
    """
    target, reference = _checked("target_bits", target_bits, "reference_bits", reference_bits)
    others = _checked(
        "held_out_target_bits",
        held_out_target_bits,
        "held_out_reference_bits",
        held_out_reference_bits,
    )
    replicates = integer("replicates", replicates, 2, 10**6)
    rng = np.random.default_rng(seed)
    N, uniform = target.size, number("uniform_bits", uniform_bits)
    unintended = _unintended(target, reference, code)
    rows = np.stack([uniform - target, unintended, uniform - target - unintended])
    ours = _unintended(*others, code)[None]
    groups = numbered("documents", documents, N)
    other_groups = numbered("held_out_documents", held_out_documents, ours.size)
    if paired:
        if documents is None or held_out_documents is None:
            raise ValueError("paired draws documents of both sets: give both, or leave paired out")
        given = [np.asarray(documents), np.asarray(held_out_documents)]
        both = np.unique(np.concatenate(given), return_inverse=True)[1]
        parts = [(rows, both[:N]), (ours, both[N:])]
        members, (held_out,) = _resampled(parts, replicates, rng)
    else:
        (members,) = _resampled([(rows, groups)], replicates, rng)
        ((held_out,),) = _resampled([(ours, other_groups)], replicates, rng)
    memorization, total, generalization = (N * row for row in members)
    found = {
        "memorization": memorization,
        "unintended": total,
        "held_out": N * held_out,
        "net": total - N * held_out,
        "generalization": generalization,
    }
    intervals = {name: over_seeds([values]) for name, values in found.items()}
    return Unintended(**intervals, replicates=found)


def over_seeds(runs: Sequence[Floats], seed: int = 0) -> Interval:
    """The mean over the runs of several seeds, with a 95 % interval.

    Args:
        runs: of each seed the estimate and its R replicates, (1 + R,), as `Unintended.replicates`
            has them.
        seed: of the draws.

    Returns:
        An interval of R replicates: each draws as many seeds as there are, with replacement, and
        takes the mean of their replicates. Bounds are None if a run lacks replicates.

    Example:
        >>> over_seeds([np.array([2.0, 1.0, 3.0]), np.array([4.0, 4.0, 4.0])]).estimate
        3.0
    """
    values = np.stack(runs)  # (K, 1 + R)
    estimate = float(values[:, 0].mean())
    if not np.isfinite(values).all():
        return Interval(estimate)
    K, R = len(values), values.shape[1] - 1
    drawn = np.random.default_rng(seed).integers(K, size=(K, R))
    return percentile_interval(estimate, values[drawn, 1 + np.arange(R)].mean(0))


def _unintended(target: Floats, reference: Floats, code: Code) -> Floats:
    if code not in get_args(Code):
        raise ValueError(f"code must be one of {', '.join(get_args(Code))}, got {code!r}")
    saved = reference - target
    if code == "max":
        return np.maximum(saved, 0.0)
    # log2(2^saved + 1) - 1, in which large exponents do not overflow.
    return np.asarray(np.logaddexp2(saved, 0.0) - 1.0)


def _resampled(
    parts: Sequence[tuple[Floats, NDArray[np.int64]]],  # (K, N) and (N,) each
    replicates: int,
    rng: np.random.Generator,
) -> list[Floats]:  # (K, 1 + R) each
    """The means of the rows of values, and of their replicates; nan replicates for one document.

    All parts have the same documents, which are drawn for all of them together.
    """
    G = 1 + max(int(groups.max()) for _, groups in parts)
    sums = [np.stack([np.bincount(groups, row, G) for row in values]) for values, groups in parts]
    sizes = [np.bincount(groups, minlength=G) for _, groups in parts]
    found = [np.full((len(values), 1 + replicates), np.nan) for values, _ in parts]
    for out, (values, _) in zip(found, parts, strict=True):
        out[:, 0] = values.mean(1)
    step = max(1, _DRAWS_AT_ONCE // G)
    for begin in range(1, 1 + replicates if G > 1 else 1, step):
        drawn = rng.integers(G, size=(min(step, 1 + replicates - begin), G))
        for out, total, size in zip(found, sums, sizes, strict=True):
            picked = np.stack([row[drawn].sum(1) for row in total])
            with np.errstate(invalid="ignore"):  # nan where no drawn document has a sequence
                out[:, begin : begin + step] = picked / size[drawn].sum(1)
    return found


def numbered(name: str, documents: ArrayLike | None, n: int) -> NDArray[np.int64]:
    """Numbers documents from 0."""
    if documents is None:
        return np.arange(n)
    given = np.asarray(documents)
    if given.shape != (n,):
        raise ValueError(f"{name} must be one for each of {n} sequences, got shape {given.shape}")
    return np.asarray(np.unique(given, return_inverse=True)[1])


def _checked(name: str, a: ArrayLike, other: str, b: ArrayLike) -> tuple[Floats, Floats]:
    first, second = numbers(name, a), numbers(other, b)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise ValueError(
            f"{name} and {other} must be bits of the same sequences, (N,) each, got shapes "
            f"{first.shape} and {second.shape}"
        )
    for array, what in ((first, name), (second, other)):
        if not np.isfinite(array).all():
            raise ValueError(
                f"{what} has {np.count_nonzero(~np.isfinite(array))} values not finite: leave "
                f"these sequences out of {name} and {other}"
            )
    return first, second
