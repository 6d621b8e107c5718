"""Membership scores: how likely each sequence is a member, from the bits of its tokens.

N sequences, n coded tokens of one sequence, T tokens of all sequences of one length.
"""

import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmem.base.stats import Floats

Indices = NDArray[np.int64]
Ragged = Sequence[ArrayLike] | NDArray[Any]
"""N arrays with one value for each coded token, of any lengths, without padding; or one (N, n)."""

MAX_ENTROPY = 2 / np.log(2)
"""Bits of entropy below which a token is certain for `surp`: 2 nats, as in the published tool."""
SMALLEST_BITS = 1e-9
"""Rounding tolerance in bits: added to both sides of a ratio, and the least gain of a window."""
ROUNDING = 1e-3
"""Bits below 0 of a token that is sure, in float32."""
CLIP = 0.01
"""Most that one token adds to `dc_pdd`, in nats, as published."""
BLOCK_TOKENS = 1 << 14
"""Tokens that are scored at once."""
WIDTHS = tuple(round(2 * 20 ** (step / 9)) for step in range(10))
"""Tokens of the ten windows of `window_votes`, in equal ratios from 2 to 40, as published."""


def auc(members: Floats, held_out: Floats) -> float:
    """Fraction of pairs in which the member has fewer bits than the held-out sequence.

    Computes `(members[:, None] < held_out).mean()` with ties counted half: the area under the ROC
    curve of a threshold on bits.

    Example:
        >>> auc(np.array([1.0, 2.0]), np.array([2.0, 3.0]))
        0.875
    """
    others = np.sort(held_out)
    above = len(others) - np.searchsorted(others, members, "right")
    equal = len(others) - np.searchsorted(others, members, "left") - above
    return float((above + equal / 2).mean() / len(others))


def membership_scores(
    bits: Ragged,
    *,
    entropy: Ragged | None = None,
    variance: Ragged | None = None,
    reference: Ragged | None = None,
    texts: Sequence[str | bytes] | None = None,
    tokens: Ragged | None = None,
    frequency: ArrayLike | None = None,
    k: Sequence[float] = (20,),
    max_entropy: float = MAX_ENTROPY,
) -> dict[str, Floats]:
    """All scores that the given arrays allow, by name; a higher score is more likely a member.

    With b the bits of the n tokens of a sequence, H and s² their entropy and variance, r the bits
    of the reference, and m the larger of 1 and ⌊k · n / 100⌋:

    - loss: -mean(b)
    - min_k: -mean of the m largest b; max_k: -mean of the m smallest b
    - zlib: -mean(b) / bytes of the compressed text (needs `texts`)
    - surp: -mean of the b that are at least the m-th largest, of tokens with H < max_entropy; min_k
      if there are none (needs `entropy`)
    - min_k_plus_plus: mean of the m smallest (H - b) / max(s, 1e-6 · H + 1e-10) (needs `entropy`
      and `variance`)
    - reference: mean(r) - mean(b); reference_ratio: -mean(b) / mean(r) (need `reference`)
    - window_votes: the fraction of windows in which the reference has more bits, averaged over ten
      widths of 2 to 40 tokens (needs `reference`)
    - dc_pdd: mean over the first occurrence of each token of min(-p · ln q, 0.01), p = 2^-b and q
      the frequency of the token with one count added (needs `tokens` and `frequency`)

    What is ours: surp gives sequences without a certain token their min_k, where the published
    tool gives -100; a width above n is one window of n tokens, which the paper leaves open.

    Args:
        bits: bits of each coded token, in any float type; sums are float64. No padding: a token of
            0 bits counts, and so does token 0.
        entropy: bits of entropy of the prediction of each token (`token_stats`).
        variance: variance of the bits under the prediction, in bits² (`token_stats`).
        reference: bits of the same tokens by a model that was not trained on them.
        texts: N texts, whose compressed size stands for their difficulty.
        tokens: the coded tokens themselves.
        frequency: (V,) counts of each token in a corpus of the same kind.
        k: percentages. With several, the names end with _K, such as min_k_20.
        max_entropy: bits.

    Returns:
        (N,) float64 by name, in the order above, each score for all k before the next.

    Raises:
        ValueError: arrays of different lengths, an empty sequence, values that are not finite, a
            negative variance, a token outside the frequencies, or a k outside 0 to 100.

    Example:
        >>> bits, reference = [[1.0, 2.0, 6.0], [0.5, 1.5]], [[3.0, 3.0, 3.0], [2.0, 2.0]]
        >>> scores = membership_scores(bits, reference=reference, k=(50,))
        >>> list(scores)
        ['loss', 'min_k', 'max_k', 'reference', 'reference_ratio', 'window_votes']
        >>> scores["min_k"]
        array([-6. , -1.5])

    Source: docs/method.md names the paper of each score.
    """
    if variance is not None and entropy is None:
        raise ValueError("variance without entropy: pass entropy too, from the same token_stats")
    if (tokens is None) != (frequency is None):
        raise ValueError("dc_pdd needs tokens and frequency: pass both or neither")
    flat, lengths = joined("bits", bits)
    arrays = {"bits": flat}
    given = {"entropy": entropy, "variance": variance, "reference": reference, "tokens": tokens}
    for name, values in given.items():
        if values is not None:
            arrays[name], _ = joined(name, values, lengths)
    for name in [one for one in ("bits", "reference") if one in arrays]:
        wrong = arrays[name] < -ROUNDING
        _name_first(wrong, lengths, f"{name} below 0", "pass -log2 of probabilities")
    if variance is not None:
        _name_first(arrays["variance"] < 0, lengths, "variance is negative", "pass bits²")
    compressed = None if texts is None else _compressed(texts, len(lengths))
    if frequency is not None:
        arrays["rarity"] = _rarity(arrays["tokens"], frequency, lengths)
    _check_k(k, lengths)
    scores: dict[str, Floats] = {}
    for rows, places in _blocks(lengths):
        group = {name: values[places] for name, values in arrays.items()}
        if compressed is not None:
            group["compressed"] = compressed[rows]
        for name, values in _scores_of(group, k, max_entropy):
            scores.setdefault(name, np.empty(len(lengths)))[rows] = values
    return scores


def _blocks(lengths: Indices) -> Iterator[tuple[Indices, Indices]]:
    """`by_length` in blocks that a processor's cache holds."""
    for rows, places in by_length(lengths):
        step = max(1, BLOCK_TOKENS // places.shape[1])
        for begin in range(0, len(rows), step):
            yield rows[begin : begin + step], places[begin : begin + step]


def _scores_of(
    group: dict[str, Floats], k: Sequence[float], max_entropy: float
) -> Iterator[tuple[str, Floats]]:
    """Names and scores of sequences of one length, from (rows, T) arrays and (rows,) bytes."""
    bits, n = group["bits"], group["bits"].shape[1]
    loss = -bits.mean(1)
    yield "loss", loss
    ordered = np.sort(bits, axis=1)
    counts = {f"_{percent:g}" if len(k) > 1 else "": tokens_of(percent, n) for percent in k}
    min_k = {end: -ordered[:, n - m :].mean(1) for end, m in counts.items()}
    yield from (("min_k" + end, values) for end, values in min_k.items())
    yield from (("max_k" + end, -ordered[:, :m].mean(1)) for end, m in counts.items())
    if "compressed" in group:
        yield "zlib", loss / group["compressed"]
    if "entropy" in group:
        for end, m in counts.items():
            chosen = (bits >= ordered[:, [n - m]]) & (group["entropy"] < max_entropy)
            surp = -(bits * chosen).sum(1) / np.maximum(1, chosen.sum(1))
            yield "surp" + end, np.where(chosen.any(1), surp, min_k[end])
    if "variance" in group:
        floor = 1e-6 * group["entropy"] + 1e-10  # the rounding of bits in float32
        z = (group["entropy"] - bits) / np.maximum(np.sqrt(group["variance"]), floor)
        z.sort(axis=1)
        for end, m in counts.items():
            yield "min_k_plus_plus" + end, z[:, :m].mean(1)
    if "reference" in group:
        other = group["reference"].mean(1)
        yield "reference", other + loss
        yield "reference_ratio", (loss - SMALLEST_BITS) / (other + SMALLEST_BITS)
        yield "window_votes", _window_votes(group["reference"] - bits)
    if "rarity" in group:
        first = _first_occurrences(group["tokens"])
        divergence = np.minimum(np.exp2(-bits) * group["rarity"], CLIP)
        yield "dc_pdd", (divergence * first).sum(1) / first.sum(1)


def _window_votes(gain: Floats) -> Floats:
    """(rows,) fraction of windows with a gain above 0, averaged over WIDTHS."""
    sums = np.zeros((len(gain), gain.shape[1] + 1))
    np.cumsum(gain, axis=1, out=sums[:, 1:])
    widths = [min(width, gain.shape[1]) for width in WIDTHS]
    votes = [(sums[:, w:] - sums[:, :-w] > SMALLEST_BITS).mean(1) for w in widths]
    return np.asarray(np.mean(votes, axis=0))


def _first_occurrences(tokens: Floats) -> NDArray[np.bool_]:
    """True where a token is the first of its kind in its row."""
    order = np.argsort(tokens, axis=1, kind="stable")
    ordered = np.take_along_axis(tokens, order, axis=1)
    new = np.ones(tokens.shape, dtype=np.bool_)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.empty_like(new)
    np.put_along_axis(first, order, new, axis=1)
    return first


def _rarity(tokens: Floats, frequency: ArrayLike, lengths: Indices) -> Floats:
    """-ln of the smoothed frequency of each token."""
    counts = np.asarray(frequency, dtype=np.float64)
    if counts.ndim != 1 or not (np.isfinite(counts) & (counts >= 0)).all():
        raise ValueError(f"frequency must be (V,) counts from 0 up, not {counts.shape}: {counts}")
    outside = (tokens < 0) | (tokens >= len(counts)) | (tokens % 1 != 0)
    fix = f"frequency has {len(counts):,} counts: count with the same tokenizer"
    _name_first(outside, lengths, "a token is outside the vocabulary", fix)
    rarity = -np.log((counts + 1) / (counts.sum() + len(counts)))
    return np.asarray(rarity[tokens.astype(np.int64)])


def _compressed(texts: Sequence[str | bytes], count: int) -> Floats:
    """(N,) bytes of each text after zlib."""
    if isinstance(texts, (str, bytes)) or len(texts) != count:
        raise ValueError(f"{len(texts)} texts for {count} sequences: give a text for each sequence")
    raw = (text if isinstance(text, bytes) else text.encode() for text in texts)
    return np.array([len(zlib.compress(text)) for text in raw], dtype=np.float64)


def check_percentages(k: Sequence[float]) -> None:
    """ValueError unless each k is a percentage."""
    if np.ndim(k) != 1 or not len(k) or not all(0 < percent <= 100 for percent in k):
        raise ValueError(f"k must be percentages above 0 up to 100, not {k!r}: try (10, 20)")


def _check_k(k: Sequence[float], lengths: Indices) -> None:
    """`check_percentages`, and a warning if k % of a sequence is under a token."""
    check_percentages(k)
    short = int((lengths * min(k) < 100).sum())
    if short:
        warnings.warn(
            f"{min(k):g} % of the tokens of {short} of {len(lengths)} sequences is less than one "
            "token: one token is used",
            stacklevel=3,
        )


def tokens_of(percent: float, n: int) -> int:
    """The larger of 1 and ⌊percent · n / 100⌋, exact where a float would fall below."""
    return max(1, int(percent * n / 100 + 1e-9))


def joined(
    name: str, sequences: Ragged, lengths: Indices | None = None, infinite: bool = False
) -> tuple[Floats, Indices]:
    """All values end to end as float64, and the number of each sequence.

    Args:
        infinite: whether inf is a value.

    Raises:
        ValueError: no sequence, an empty sequence, a value that is not a finite number, or other
            lengths than the given ones; the message names the first such sequence.
    """
    try:
        if isinstance(sequences, np.ndarray) and sequences.ndim == 2:
            flat = sequences.astype(np.float64).ravel()
            sizes = [sequences.shape[1]] * len(sequences)
        else:
            arrays = [np.asarray(values) for values in sequences]
            if shapes := [values.shape for values in arrays if values.ndim != 1]:
                raise ValueError(f"one is of shape {shapes[0]}")
            flat = np.concatenate([np.zeros(0), *arrays], dtype=np.float64, casting="unsafe")
            sizes = [len(values) for values in arrays]
    except (TypeError, ValueError, RuntimeError) as error:  # of torch, such as for bfloat16
        raise ValueError(
            f"{name} must be one array of numbers for each sequence ({error}): pass a list of "
            "1-d float arrays, one number a coded token, as fastmem.score(…, tokens=True) has them"
        ) from None
    counts = np.array(sizes, dtype=np.int64)
    if not len(counts):
        raise ValueError(f"{name} has no sequences: give at least one")
    if not counts.all():
        raise ValueError(f"{name} of sequence {counts.argmin()} has 0 tokens: leave it out")
    if lengths is not None and not np.array_equal(counts, lengths):
        if len(counts) != len(lengths):
            found, where = f"{len(counts)} sequences, bits {len(lengths)}", ""
        else:
            row = int((counts != lengths).argmax())
            found, where = f"{counts[row]} tokens, bits {lengths[row]}", f" of sequence {row}"
        raise ValueError(f"{name}{where} has {found}: score both with one tokenizer")
    wrong = np.isnan(flat) | (flat == -np.inf) if infinite else ~np.isfinite(flat)
    _name_first(wrong, counts, f"{name} not finite", "score again or leave out")
    return flat, counts


def _name_first(wrong: NDArray[np.bool_], lengths: Indices, what: str, fix: str) -> None:
    """ValueError that names the first sequence with a wrong value, and how many there are."""
    if wrong.any():
        ends = np.cumsum(lengths)
        rows = np.unique(np.searchsorted(ends, np.flatnonzero(wrong), "right"))
        place = int(wrong.argmax() - (ends - lengths)[rows[0]])
        raise ValueError(
            f"{what} in sequence {rows[0]} at token {place} ({len(rows)} of {len(lengths)} "
            f"sequences): {fix}"
        )


def by_length(lengths: Indices) -> Iterator[tuple[Indices, Indices]]:
    """For each length, the sequences (rows,) of it and their places (rows, T) in a flat array.

    A rectangle for each length needs no padding, which no score could tell from a token.
    """
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(lengths, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        yield rows, starts[rows, None] + np.arange(lengths[rows[0]])
