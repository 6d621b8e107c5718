"""What can be taken out of a model: arithmetic on one teacher-forced pass.

N sequences of S tokens each. `uncoded` tokens at the start of each have no prediction: 1, or 0
where a begin-of-sequence token precedes the sequence. Arrays hold the S - uncoded coded tokens.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmem.base.arguments import integer, numbers
from fastmem.base.stats import Floats, Interval, clopper_pearson
from fastmem.memorization.membership import Indices, Ragged, by_length, joined

LONGEST = 2**40


def greedy_from(is_greedy: Ragged, *, uncoded: int = 1) -> Indices:
    """The fewest tokens of prefix from which greedy decoding returns the rest of a sequence.

    Greedy decoding from a prefix returns the suffix if and only if each token of the suffix is the
    greedy one after the true tokens before it: up to its first error, decoding has seen the true
    tokens. So a prefix of P tokens extracts a sequence exactly if `greedy_from <= P`, for every P
    at once. The value S means that the last token is not greedy: nothing can be extracted.

    Args:
        is_greedy: whether each coded token is the most likely one (`token_stats`).
        uncoded: tokens without a prediction.

    Returns:
        (N,) int64 from `uncoded` to S.

    Example:
        >>> greedy_from([[True, False, True, True], [False, False], [True, True]])
        array([3, 3, 1])

    Source: the definition of extraction in arXiv 2202.07646.
    """
    integer("uncoded", uncoded, 0, 1)
    return _reduced(is_greedy, lambda greedy: greedy.shape[1] - _matched(greedy[:, ::-1]) + uncoded)


def longest_match(is_greedy: Ragged, prefix: int | None = None, *, uncoded: int = 1) -> Indices:
    """The most tokens that greedy decoding returns verbatim.

    With a prefix: the suffix tokens before the first error of greedy decoding. Without: the longest
    run anywhere, each token given all true tokens before it, as in a slide through a document.

    Args:
        is_greedy: whether each coded token is the most likely one (`token_stats`).
        prefix: tokens; None for the longest run.
        uncoded: tokens without a prediction.

    Returns:
        (N,) int64.

    Raises:
        ValueError: a sequence without a token after the prefix.

    Example:
        >>> runs = [[True, False, True, True, False], [True, True, True, False, True]]
        >>> longest_match(runs), longest_match(runs, prefix=3)
        (array([2, 3]), array([2, 1]))
    """
    if prefix is None:
        return _reduced(is_greedy, _longest_run)
    begin = _begin(prefix, uncoded)
    return _reduced(is_greedy, lambda greedy: _matched(greedy[:, begin:]), begin, uncoded)


def suffix_bits(bits: Ragged, prefix: int, *, uncoded: int = 1) -> Floats:
    """(N,) bits of the tokens after a prefix: -log2 of the probability to sample them.

    Bits at a temperature, or under top-k, give the probability of that way of sampling.

    Args:
        bits: bits of each coded token, inf where a token is never sampled; sums are float64.
        prefix: tokens.
        uncoded: tokens without a prediction.

    Raises:
        ValueError: a sequence without a token after the prefix, or nan.

    Example:
        >>> suffix_bits([[1.0, 2.0, 3.0]], prefix=2)
        array([5.])
    """
    flat, lengths = joined("bits", bits, infinite=True)
    begin = _begin(prefix, uncoded)
    _check_lengths(lengths + uncoded, prefix)
    result = np.empty(len(lengths))
    for rows, places in by_length(lengths):
        result[rows] = flat[places[:, begin:]].sum(1)
    return result


def extraction_probability(bits: ArrayLike, n: ArrayLike) -> Floats:
    """The probability that n independent samples hold a suffix of `bits` bits at least once.

    Computes 1 - (1 - 2^-bits)^n by log1p and expm1, right where 2^-bits is below rounding. A
    sequence is (n, p)-discoverable if the result is at least p.

    Raises:
        ValueError: bits below 0 or nan, or n below 0.

    Example:
        >>> extraction_probability([0.0, 1.0, 40.0], n=2)
        array([1.0000000e+00, 7.5000000e-01, 1.8189894e-12])

    Source: arXiv 2410.19482, section 3.
    """
    values, samples = numbers("bits", bits), numbers("n", n)
    if not (values >= 0).all() or not (samples >= 0).all():
        raise ValueError(f"bits and n must be from 0 up, not {values.min()} and {samples.min()}")
    with np.errstate(divide="ignore", invalid="ignore"):  # a suffix of 0 bits: log 0, 0 · log 0
        missed = np.where(samples > 0, samples * np.log1p(-np.exp2(-values)), 0.0)
    return np.asarray(-np.expm1(missed) + 0.0)


def samples_needed(bits: ArrayLike, p: float) -> Floats:
    """The samples n, not rounded, after which a suffix of `bits` bits has come with probability p.

    Computes log(1 - p) / log(1 - 2^-bits); inf above 1074 bits, whose probability is 0 in float64.

    Raises:
        ValueError: bits below 0 or nan, or p outside 0 to 1.

    Example:
        >>> samples_needed([0.0, 1.0, 10.0], p=0.5).round(1)
        array([  0. ,   1. , 709.4])

    Source: arXiv 2410.19482, section 3.
    """
    values = numbers("bits", bits)
    if not (values >= 0).all() or not 0 < p < 1:
        raise ValueError(
            f"bits must be from 0 up and p between 0 and 1, not {values.min()} and {p}"
        )
    with np.errstate(divide="ignore"):
        return np.asarray(np.log1p(-p) / np.log1p(-np.exp2(-values)) + 0.0)


def edit_distance(decoded: ArrayLike, tokens: ArrayLike) -> Floats:
    """The least insertions, deletions and replacements between rows, as a fraction of their length.

    Args:
        decoded: (N, S) tokens that were decoded.
        tokens: (N, S) the true tokens.

    Returns:
        (N,) Levenshtein distance / S, from 0 (equal) to 1.

    Raises:
        ValueError: shapes that differ, or S = 0.

    Example:
        >>> edit_distance([[1, 2, 3, 4], [2, 3, 4, 9]], [[1, 2, 3, 4], [1, 2, 3, 4]])
        array([0. , 0.5])

    Source: Wagner and Fischer, J. ACM 21 (1974); the row of the table is one array operation.
    """
    ours, true = np.asarray(decoded), np.asarray(tokens)
    if ours.shape != true.shape or ours.ndim != 2 or not ours.shape[1]:
        raise ValueError(
            f"decoded of shape {ours.shape} and tokens of shape {true.shape}: give (N, S) of both, "
            "S from 1 up"
        )
    N, S = ours.shape
    places = np.arange(S + 1)
    row = np.broadcast_to(places, (N, S + 1))
    for place in range(S):
        replaced = row[:, :-1] + (ours[:, place, None] != true)
        kept = np.full((N, S + 1), place + 1)
        np.minimum(replaced, row[:, 1:] + 1, out=kept[:, 1:])
        row = np.minimum.accumulate(kept - places, axis=1) + places  # insertions, from the left
    return np.asarray(row[:, -1] / S)


def extraction_rates(
    greedy_from: ArrayLike, lengths: ArrayLike, prefixes: Sequence[int]
) -> dict[int, Interval]:
    """The fraction of sequences that greedy decoding extracts, by tokens of prefix.

    Args:
        greedy_from: (N,) from `greedy_from`.
        lengths: tokens S of each sequence, (N,) or one number for all.
        prefixes: tokens.

    Returns:
        A rate with its 95 % Clopper-Pearson interval for each prefix.

    Raises:
        ValueError: no sequence, or a sequence without a token after the prefix.

    Example:
        >>> rates = extraction_rates([3, 5, 5, 1], 5, prefixes=[2, 4])
        >>> rates[2].estimate, rates[4].estimate
        (0.25, 0.5)
    """
    starts = numbers("greedy_from", greedy_from)
    sizes = numbers("lengths", lengths)
    if starts.ndim != 1 or not len(starts) or sizes.shape not in ((), starts.shape):
        raise ValueError(
            f"greedy_from of shape {starts.shape} and lengths of shape {sizes.shape}: pass (N,), N "
            "from 1 up, and a length for each or one for all"
        )
    sizes = np.broadcast_to(sizes, starts.shape)
    wrong = np.flatnonzero((starts != np.floor(starts)) | (starts < 0) | (starts > sizes))
    if wrong.size:
        raise ValueError(
            f"greedy_from is {starts[wrong[0]]:g} for sequence {wrong[0]} of {sizes[wrong[0]]:g} "
            "tokens: pass what greedy_from returns, a whole number from 0 to the length"
        )
    for prefix in prefixes:
        _check_lengths(sizes, integer("prefix", prefix, 1, LONGEST))
    extracted = {prefix: int((starts <= prefix).sum()) for prefix in prefixes}
    return {prefix: clopper_pearson(count, len(starts)) for prefix, count in extracted.items()}


def _matched(greedy: NDArray[np.bool_]) -> Indices:
    """(rows,) tokens before the first error."""
    return np.asarray(np.where(greedy.all(1), greedy.shape[1], np.argmin(greedy, axis=1)))


def _longest_run(greedy: NDArray[np.bool_]) -> Indices:
    """(rows,) length of the longest run of greedy tokens."""
    places = np.arange(1, greedy.shape[1] + 1)
    errors = np.maximum.accumulate(np.where(greedy, 0, places), axis=1)
    return np.asarray((places - errors).max(1))


def _reduced(
    is_greedy: Ragged,
    function: Callable[[NDArray[np.bool_]], Indices],
    begin: int = 0,
    uncoded: int = 0,
) -> Indices:
    """(N,) results of a function of (rows, T) arrays of sequences of one length."""
    flat, lengths = joined("is_greedy", is_greedy)
    if not np.isin(flat, (0, 1)).all():
        raise ValueError(f"is_greedy must be true or false, not {flat[~np.isin(flat, (0, 1))][0]}")
    _check_lengths(lengths + uncoded, begin + uncoded)
    result = np.empty(len(lengths), dtype=np.int64)
    for rows, places in by_length(lengths):
        result[rows] = function(flat[places] == 1)
    return result


def _begin(prefix: int, uncoded: int) -> int:
    """The place of the first token after the prefix among coded tokens."""
    integer("uncoded", uncoded, 0, 1)
    return integer("prefix", prefix, max(1, uncoded), LONGEST) - uncoded


def _check_lengths(lengths: Indices | Floats, prefix: int) -> None:
    """ValueError if a sequence has no token after its prefix."""
    short = np.flatnonzero(lengths <= prefix)
    if short.size:
        raise ValueError(
            f"sequence {short[0]} has {lengths[short[0]]:g} tokens, none after a prefix of "
            f"{prefix} ({short.size} of {len(lengths)} sequences): use a shorter prefix, or leave "
            "them out"
        )
