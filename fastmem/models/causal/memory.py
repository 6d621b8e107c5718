"""The memory that a pass of a causal language model needs, known before the pass."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmem.base.arguments import MAX_WORD, integer
from fastmem.models.causal.lm import CausalLM
from fastmem.models.causal.through_logits import MAX_LOGITS

LENGTHS = (64, 128, 256)
"""Tokens of the three passes that measure."""


class Memory:
    """Bytes beside the weights that `CausalLM.token_stats` holds at most.

    Three short passes of one sequence are measured, allocation by allocation. Through them goes a
    parabola, since all that a model computes grows with the tokens of a sequence or, as attention
    without a fused kernel does, with their square. A pass of two sequences says what each further
    sequence adds. What a kernel allocates for itself is not seen; on a CPU the estimate is right to
    about 15 %, and too high by more for a model that is scored through its logits.

    Example:
        >>> from fastmem import GPT, GPTConfig
        >>> memory = Memory(CausalLM(GPT(GPTConfig(2, 64, 2, vocab=16, length=256))))
        >>> 2**17 < memory(sequences=2, length=256) < 2**21
        True
        >>> 256 <= memory.tokens(2**22) < 2**16
        True
    """

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm
        most = LENGTHS[-1] if lm.positions is None else min(lm.positions, LENGTHS[-1])
        x = [max(1, most * length // LENGTHS[-1]) for length in LENGTHS]
        y = [measured(lm, 1, length) for length in x]
        self._further = max(0.0, measured(lm, 2, x[-1]) / y[-1] - 1)
        if len(set(x)) < len(x):  # fewer than four positions
            self._bends, self._slope, self._base = 0.0, y[-1] / x[-1], 0.0
            return
        first, second = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
        self._bends = max(0.0, (second - first) / (x[2] - x[0]))
        self._slope = max(0.0, second - self._bends * (x[1] + x[2]))
        self._base = max(0.0, y[2] - self._slope * x[2] - self._bends * x[2] ** 2)

    def __call__(self, sequences: int, length: int) -> int:
        """Peak bytes that `token_stats` allocates for `sequences` sequences of `length` tokens."""
        if self.lm.through == "logits":  # a part of the batch at a time
            sequences = min(sequences, max(1, MAX_LOGITS // (length * self.lm.vocab)))
        one = self._base + length * (self._slope + self._bends * length)
        return int(one * (1 + (sequences - 1) * self._further))

    def tokens(self, available: int, length: int | None = None) -> int:
        """The most tokens of a batch that fits into `available` bytes, padding included.

        Args:
            available: bytes beside the weights.
            length: the longest sequence; None: as many tokens as fit are one sequence, up to
                `positions`.

        Raises:
            ValueError: not even one sequence fits.
        """
        available = integer("available", available, 1, MAX_WORD)
        limit = self.lm.positions or 1 << 20
        length = limit if length is None else min(integer("length", length, 1, MAX_WORD), limit)
        length = self.longest(available, length)
        if self(1, length) > available:
            raise ValueError(
                f"{available} bytes are too few for one token of {self.lm.name}, which needs "
                f"{self(1, length)}: give more memory"
            )
        low, high = 1, 1 << 24  # sequences
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self(middle, length) <= available else (low, middle - 1)
        return low * length

    def longest(self, available: int, limit: int | None = None) -> int:
        """The longest sequence that fits into `available` bytes: `limit`, by default `positions`,
        halved until it fits."""
        length = limit or self.lm.positions or 1 << 20
        while length > 1 and self(1, length) > available:
            length //= 2
        return length


def measured(lm: CausalLM, sequences: int, length: int) -> int:
    """Peak bytes that `token_stats` allocates for `sequences` sequences of `length` tokens."""
    tokens = torch.arange(length + 1) * 7919 % min(lm.vocab, lm.embeddings)
    inputs, targets = (part.expand(sequences, -1) for part in (tokens[:-1], tokens[1:]))
    lm.token_stats(inputs, targets)  # proves the model, and fills its caches
    with _Allocations() as seen:
        lm.token_stats(inputs, targets)
    return int(seen.peak)


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the bytes of live tensors that operators returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes and key not in before:
                    self._sizes[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, key)
        return result

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
