"""Sets with structure: tokens of given frequencies, and a prefix that all sequences share.

Like a uniform set these sets are random, need no storage and have an exact entropy, in which a
repetition by construction counts once (docs/method.md).

N sequences (`count`), S tokens a sequence (`length`), V vocabulary (`vocab`).
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from fastmem.base.arguments import MAX_WORD, integer
from fastmem.data.derived import DerivedSequences
from fastmem.data.sequences import Rows, Sequences, Tokens, generated
from fastmem.data.uniform import RandomSequences
from fastmem.data.weights import Numbers, Weights


@dataclass(frozen=True, init=False)
class WeightedSequences(RandomSequences, kind="weighted"):
    """N sequences of S independent tokens of given frequencies.

    The entropy is N · S · H bits, of which N · (S - 1) · H are coded. H = -Σ p log2 p, where the
    probabilities p are rounded to multiples of 2**-32, as tokens are drawn.

    Args:
        count, length, seed, start: as for `UniformSequences`.
        weights: `zipf(vocab, exponent)`, or V numbers of at least 0 in any unit, V at most 2**20.

    Raises:
        ValueError: an argument is not an int or is outside its limits; `Weights` refuses the
            weights.

    >>> from fastmem import zipf
    >>> sequences = WeightedSequences(count=1000, length=8, weights=zipf(2048, 1.0))
    >>> sequences[0]
    array([  14,  768,  233,   80, 1630,   10,  165,    0], dtype=uint16)
    >>> round(sequences.entropy_bits)
    65090
    >>> WeightedSequences(count=1, length=4, weights=[1, 0, 3]).sequence_entropy_bits
    3.24511249783653
    """

    vocab: int = field(init=False, repr=False)
    weights: Weights = field(kw_only=True)

    def __init__(
        self, count: int, length: int, weights: Weights | Numbers, seed: int = 0, start: int = 0
    ) -> None:
        weights = weights if isinstance(weights, Weights) else Weights(weights)
        self._set(count=count, length=length, vocab=weights.vocab, seed=seed, start=start)
        self._set(weights=weights)
        self.__post_init__()

    @property
    def token_entropy_bits(self) -> float:
        """H, the entropy of the weights."""
        return self.weights.entropy_bits

    def description(self) -> dict[str, Any]:
        return super().description() | {"weights": self.weights.description()}

    @classmethod
    def _described(cls, description: dict[str, Any]) -> Self:
        names = ("count", "length", "vocab", "seed", "start", "weights")
        values = generated(cls.kind, description, names)
        values["weights"] = Weights.described(values.pop("vocab"), values["weights"])
        return cls(**values)

    def _rule(self, device: torch.device | None = None) -> dict[str, Any]:
        edges = self.weights.cumulative if device is None else self.weights.on(device)
        # Tokens after the last of positive weight are never drawn and have no edge.
        return {"seed": self.seed, "vocab": len(edges), "cumulative": edges}


@dataclass(frozen=True)
class PrefixedSequences(DerivedSequences, kind="prefixed"):
    """The sequences of another set, in which the same prefix replaces the first P tokens.

    The prefix is drawn from the base's distribution of tokens, with its own seed. It has P · H
    bits, where H is the entropy of a token, and counts once, however many sequences share it. Like
    the first token of a sequence the prefix is given, not coded: `context` is P. So for a base of N
    distinct sequences the entropy is N · (S - P) · H + P · H, of which N · (S - P) · H are coded.

    Args:
        base: random sequences, repeated or not, with or without canaries.
        prefix: P, from 1 to S - 1.
        seed: of the prefix, from 0 to 2**64 - 1; may be the base's seed, since the prefix replaces
            the tokens that it could equal.

    Raises:
        ValueError: the base has a prefix, or its tokens have no known distribution; a number is
            outside its limits.

    >>> from fastmem import UniformSequences
    >>> sequences = PrefixedSequences(UniformSequences(4, length=6, vocab=16), prefix=3, seed=1)
    >>> sequences[:2]
    array([[ 0,  8, 12,  9, 12,  7],
           [ 0,  8, 12, 13,  3,  9]], dtype=uint16)
    >>> sequences.entropy_bits, sequences.coded_entropy_bits  # 4 · 3 · 4 + 3 · 4, and 4 · 3 · 4
    (60.0, 48.0)
    """

    prefix: int
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base.context > 1:
            raise ValueError(
                f"base has a prefix of {self.base.context} tokens; a set can have one prefix only"
            )
        self.base._alike(1, 1, 0)
        limit = self.base.length - 1
        if limit == 0:
            raise ValueError("base has length 1, which leaves no room for a prefix; use 2 or more")
        self._set(prefix=integer("prefix", self.prefix, 1, limit))
        self._set(seed=integer("seed", self.seed, 0, MAX_WORD))

    @property
    def context(self) -> int:
        """P: the shared tokens are not coded."""
        return self.prefix

    def held_out(self, count: int) -> "PrefixedSequences":
        """Held-out sequences of the base, with the same prefix."""
        return replace(self, base=self.base.held_out(count))

    @property
    def _shared(self) -> Sequences:
        """The prefix, as a set of one sequence."""
        return self.base._alike(1, self.prefix, self.seed)

    def _fill(self, out: Tokens, rows: Rows, threads: int) -> None:
        self.base._fill(out, rows, threads)
        out[:, : self.prefix] = self._shared.tokens(0, out.dtype)

    def _on_gpu(self, rows: Rows, dtype: torch.dtype, device: torch.device) -> Tensor:
        out = self.base._on_gpu(rows, dtype, device)
        out[:, : self.prefix] = self._shared._on_gpu(range(1), dtype, device)
        return out

    def _entropy_from(self, position: int) -> float:
        own = self.base._entropy_from(max(position, self.prefix))
        return own + self._shared._entropy_from(position)

    def _streams(self) -> list[tuple[int, int, int]]:
        return [*self.base._streams(), *self._shared._streams()]
