"""Probabilities of tokens as integers, so that all machines and devices draw the same tokens.

A token is drawn by comparing a 32-bit word with cumulative integers C_0 = 0 ≤ C_1 ≤ … ≤ C_V = 2**32
(docs/design.md), so token i has exactly the probability (C_{i+1} - C_i) / 2**32. Integer arithmetic
alone makes them from weights: C_i = floor(2**32 · (w_0 + … + w_{i-1}) / (w_0 + … + w_{V-1})).
"""

import hashlib
import math
from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmem.base.arguments import integer
from fastmem.data.sequences import sent

MAX_VOCAB = 2**20
_ONE = 2**32
_DIGITS = 40

Numbers = Sequence[float] | NDArray[np.integer[Any]] | NDArray[np.floating[Any]]


class Weights:
    """The probabilities of V tokens, from weights in any unit.

    Weights are exact rational numbers, not rounded. A probability differs from weight / total by
    less than 2**-32, and is 0 only if the weight is 0.

    Args:
        weights: (V,) finite numbers of at least 0, V from 1 to 2**20.

    Raises:
        ValueError: not a 1-D list or array of numbers; a weight is negative or not finite; all
            weights are 0; a weight above 0 has a probability that rounds to 0.

    Two `Weights` are equal if their integers are equal.

    >>> weights = Weights([3, 0, 1, 0])
    >>> weights.probabilities.tolist(), weights.entropy_bits
    ([0.75, 0.0, 0.25, 0.0], 0.8112781244591325)
    >>> weights.cumulative  # without the zeros at the end; 2**32 follows
    array([         0, 3221225472, 3221225472], dtype=uint32)
    """

    vocab: int
    cumulative: NDArray[np.uint32]
    exponent: float | None = None

    def __init__(self, weights: Numbers) -> None:
        values = _exact(weights)
        self._set(len(values), _cumulative(values, "give it 0 or more"))

    def _set(self, vocab: int, cumulative: list[int], exponent: float | None = None) -> None:
        # C_i = 2**32 does not fit into 32 bits; the tokens from i on are never drawn.
        self.vocab, self.exponent = vocab, exponent
        self.cumulative = np.array([c for c in cumulative if c < _ONE], np.uint32)
        self.cumulative.flags.writeable = False
        self._tensors: dict[torch.device, Tensor] = {}

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """(V,) the probabilities in units of 2**-32."""
        edges = np.full(self.vocab + 1, _ONE)
        edges[: len(self.cumulative)] = self.cumulative
        return np.diff(edges)

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """(V,), exact."""
        return self.counts / _ONE

    @cached_property
    def entropy_bits(self) -> float:
        """-Σ p log2 p of the exact probabilities."""
        return 32 - math.fsum(n * math.log2(n) for n in self.counts.tolist() if n) / _ONE

    @cached_property
    def checksum(self) -> str:
        """A hash of the vocabulary and the integers, the same on every machine."""
        content = b"%d:" % self.vocab + self.cumulative.astype("<u4").tobytes()
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def on(self, device: torch.device) -> Tensor:
        """The integers on the device, copied once."""
        if device not in self._tensors:
            self._tensors[device] = sent(self.cumulative.copy(), device)
        return self._tensors[device]

    def description(self) -> dict[str, Any]:
        """The exponent or, without one, the integers; and their checksum."""
        if self.exponent is not None:
            return {"exponent": self.exponent, "checksum": self.checksum}
        return {"checksum": self.checksum, "cumulative": self.cumulative.tolist()}

    @classmethod
    def described(cls, vocab: int, description: dict[str, Any]) -> "Weights":
        """The weights of a description; ValueError if the description was altered."""
        vocab = integer("vocab", vocab, 1, MAX_VOCAB)
        if not isinstance(description, dict) or description.keys() not in (
            {"checksum", "exponent"},
            {"checksum", "cumulative"},
        ):
            raise ValueError(
                f"weights must have a checksum and either exponent or cumulative, got {description}"
            )
        if "exponent" in description:
            weights = zipf(vocab, description["exponent"])
        else:
            weights = cls.__new__(cls)
            edges = description["cumulative"]
            if not isinstance(edges, list) or not 1 <= len(edges) <= vocab or edges[0] != 0:
                raise ValueError(
                    f"cumulative must be a list of 1 to {vocab} integers that begins with 0"
                )
            edges = [integer("cumulative", edge, 0, _ONE - 1) for edge in edges]
            if any(a > b for a, b in pairwise(edges)):
                raise ValueError("cumulative must not decrease: it is altered, or not cumulative")
            weights._set(vocab, edges)
        if weights.checksum != description["checksum"]:
            raise ValueError(
                f"weights have the checksum {weights.checksum}, their description has "
                f"{description['checksum']}: the description was altered"
            )
        return weights

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Weights) and self.checksum == other.checksum

    def __hash__(self) -> int:
        return hash(self.checksum)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tensors": {}}

    def __repr__(self) -> str:
        if self.exponent is not None:
            return f"zipf({self.vocab}, {self.exponent})"
        return f"<Weights of {self.vocab} tokens, checksum {self.checksum}>"


def zipf(vocab: int, exponent: float = 1.0) -> Weights:
    """Zipf's law: token i has weight (i + 1)**-exponent.

    Computed in decimal arithmetic, which has the same results everywhere: for a prime p
    exp(-exponent · ln p), rounded to 40 digits, and for other numbers products of these.

    Args:
        vocab: V, from 1 to 2**20.
        exponent: at least 0 and finite; words in a text have about 1, 0 is uniform.

    Raises:
        ValueError: an argument is outside its limits, or the last tokens would be rarer than 2**-32
            and never drawn.

    >>> zipf(4, 1).probabilities * 25 / 12  # 1 / (1 + 1/2 + 1/3 + 1/4) = 12 / 25
    array([1.        , 0.5       , 0.33333333, 0.25      ])
    >>> round(zipf(50257, 1).entropy_bits, 3)
    10.915
    """
    vocab = integer("vocab", vocab, 1, MAX_VOCAB)
    is_number = isinstance(exponent, (int, float, np.number)) and not isinstance(exponent, bool)
    if not is_number or not 0 <= exponent < math.inf:
        raise ValueError(
            f"exponent must be a finite number of at least 0, got {exponent!r}; words in a text "
            "have about 1"
        )
    return _zipf(vocab, float(exponent))


@lru_cache(maxsize=16)
def _zipf(vocab: int, exponent: float) -> Weights:
    factor = np.arange(vocab + 1)  # the least prime factor of each number
    for p in range(2, math.isqrt(vocab) + 1):
        np.minimum(factor[p * p :: p], p, out=factor[p * p :: p])
    powers = [Decimal(1)] * (vocab + 1)
    with localcontext(Context(prec=_DIGITS, rounding=ROUND_HALF_EVEN, Emin=-(10**6), traps=[])):
        slope = -Decimal(exponent)
        for k, p in enumerate(factor.tolist()):
            if k >= 2:
                prime = p == k
                powers[k] = (slope * Decimal(k).ln()).exp() if prime else powers[p] * powers[k // p]
        values = [max(1, int(power.scaleb(_DIGITS))) for power in powers[1:]]
    weights = Weights.__new__(Weights)
    fix = f"use a smaller exponent than {exponent} or a smaller vocab"
    weights._set(vocab, _cumulative(values, fix), exponent)
    return weights


def _exact(weights: object) -> list[int]:
    """The weights in a unit that makes all of them integers; ValueError if any is not a weight."""
    try:
        array = np.asarray(weights)
    except ValueError:
        raise ValueError(
            f"weights must be a 1-D list or array of 1 to {MAX_VOCAB} numbers, got lists of "
            "different lengths; give one number for each token"
        ) from None
    whole = array.dtype.kind == "O" and all(type(value) is int for value in array.flat)
    if (
        array.ndim != 1
        or not (whole or array.dtype.kind in "iuf")
        or not 1 <= array.size <= MAX_VOCAB
    ):
        raise ValueError(
            f"weights must be a 1-D list or array of 1 to {MAX_VOCAB} numbers, got shape "
            f"{array.shape} of {array.dtype}; give one number for each token"
        )
    wrong = (array < 0) if whole else ~(np.isfinite(array) & (array >= 0))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"weights must be finite and at least 0, got {array[i]} for token {i}; "
            "use 0 for a token that is never drawn"
        )
    if not array.any():
        raise ValueError(f"weights are all 0, for {array.size} tokens; make one larger")
    ratios = [number.as_integer_ratio() for number in array.tolist()]
    unit = max(denominator for _, denominator in ratios)  # each a power of two
    return [numerator * (unit // denominator) for numerator, denominator in ratios]


def _cumulative(values: list[int], fix: str) -> list[int]:
    """C_0, …, C_V; ValueError if a value above 0 gets a probability of 0."""
    sums = [0, *accumulate(values)]
    edges = [_ONE * partial // sums[-1] for partial in sums]
    for i, value in enumerate(values):
        if value > 0 and edges[i] == edges[i + 1]:
            raise ValueError(
                f"token {i} has {value / sums[-1]:.3g} of all weight, less than the 2**-32 that "
                f"can be drawn: {fix}"
            )
    return edges
