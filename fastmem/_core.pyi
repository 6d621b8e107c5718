"""The C++ core (csrc/). Its functions check their arguments, release the GIL and write the caller's
arrays.

Arrays are C-contiguous, aligned, in native byte order, of exactly the stated dtype, and writeable
if written; they are never copied or converted. `threads` (at least 1) is the most threads used;
tokens and orders never depend on it. A wrong array or value raises ValueError before a write; an
argument that is not an array, or not an integer of its width, raises TypeError.

N sequences or rows, S tokens a sequence, V vocabulary, D width, E models.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Returns four 32-bit words of Philox4x32-10 for a counter of four words and a key of two."""

def fill_range(
    out: NDArray[np.integer[Any]],  # (N, S) uint16 (V at most 65536), uint32, int32 or int64
    *,
    seed: int,  # 64 bits
    vocab: int,  # V, 1 to 2**31
    begin: int,  # begin + N at most 2**64
    threads: int,
    cumulative: NDArray[np.uint32] | None = None,  # (V,), V at most 2**20, not sharing out's memory
    isa: str = "best",  # or "portable", "avx2", "avx512": no token depends on it
) -> None:
    """Writes the tokens of sequences begin, ..., begin + N - 1.

    With `cumulative`, 0 = C_0 <= C_1 <= ... <= C_{V-1} and C_V = 2**32, token i has the probability
    (C_{i+1} - C_i) / 2**32: token t of a sequence is the number of i in 1, ..., V - 1 with
    C_i <= word, for word t mod 4 of block t div 4.
    """

def fill_indices(
    out: NDArray[np.integer[Any]],  # (N, S), as above
    indices: NDArray[np.uint64],  # (N,), not sharing out's memory
    *,
    seed: int,
    vocab: int,
    threads: int,
    cumulative: NDArray[np.uint32] | None = None,
    isa: str = "best",
) -> None:
    """Writes the tokens of the sequences `indices`, in this order."""

def permutation(
    out: NDArray[np.uint64],  # (n,)
    *,
    seed: int,  # 64 bits
    epoch: int,  # 64 bits
    last: int,  # the count minus 1, so that a count of 2**64 fits in 64 bits
    begin: int,  # begin + n at most last + 1
    threads: int,
    isa: str = "best",
) -> None:
    """Writes places begin, ..., begin + n - 1 of the random order of 0, ..., last."""

def permutation_at(
    out: NDArray[np.uint64],  # (n,)
    places: NDArray[np.uint64],  # (n,), each at most last, not sharing out's memory
    *,
    seed: int,
    epoch: int,
    last: int,
    threads: int,
    inverse: bool = False,
    isa: str = "best",
) -> None:
    """Writes the elements at `places` of the order of `permutation`; with `inverse` the places of
    these elements."""

def token_bits(
    bits: NDArray[np.float32],  # (E, N), written
    lse: NDArray[np.float64],  # (E, N), written: log-sum-exp for token_bits_backward
    dhidden: NDArray[np.float32] | None,  # (E, N, D), written
    dweight: NDArray[np.float32] | None,  # (E, V, D), written
    dbias: NDArray[np.float32] | None,  # (E, V), written
    *,
    hidden: NDArray[np.float32] | NDArray[np.uint16],  # (E, N, D), uint16 is bfloat16
    weight: NDArray[np.float32] | NDArray[np.uint16],  # (E, V, D), as hidden
    targets: NDArray[np.int64],  # (E, N); a target outside [0, V) gives NaN
    bias: NDArray[np.float32] | None,  # (E, V)
    softcap: float,  # 0 for none
    temperature: float,
    ignore_index: int,
    threads: int,
    entropy_bits: NDArray[np.float32] | None = None,  # (E, N), written, as the next three
    variance: NDArray[np.float32] | None = None,
    lse_bits: NDArray[np.float32] | None = None,
    is_greedy: NDArray[np.bool_] | None = None,
    isa: str = "best",  # or "portable", "avx2", "avx512"
) -> None:
    """Writes -log2 softmax(hidden @ weight.T + bias)[target] of E models side by side.

    Also writes statistics of each row's p = softmax(...), if their arrays are passed, in a call
    without gradients:

        entropy_bits  -sum p log2 p
        variance      sum p (log2 p + entropy_bits)**2
        lse_bits      log2 sum 2**z, z = logits / ln 2 (`lse` is of centred logits)
        is_greedy     argmax(logits) == target, the lowest index winning a tie

    An ignored target or one outside [0, V) makes is_greedy False and changes no other statistic. A
    row that is not finite has NaN and False.

    Results may depend on `threads` in their last bits. With arrays for gradients, also writes the
    gradients of token_bits_backward for upstream = 1, faster than a second call. Use it for V up to
    a few thousand: each thread holds 112 rows of logits in memory.
    """

def token_bits_backward(
    dhidden: NDArray[np.float32] | None,  # (E, N, D), written
    dweight: NDArray[np.float32] | None,  # (E, V, D), written
    dbias: NDArray[np.float32] | None,  # (E, V), written
    *,
    upstream: NDArray[np.float32],  # (E, N)
    lse: NDArray[np.float64],  # (E, N) of token_bits with the same arguments
    hidden: NDArray[np.float32] | NDArray[np.uint16],
    weight: NDArray[np.float32] | NDArray[np.uint16],
    targets: NDArray[np.int64],
    bias: NDArray[np.float32] | None,
    softcap: float,
    temperature: float,
    ignore_index: int,
    threads: int,
    isa: str = "best",
) -> None:
    """Writes the gradients of sum(upstream * bits).

    A row of NaN bits, from its target or its hidden state, has NaN in dhidden (0 if its upstream is
    0) and adds nothing to dweight and dbias; an ignored row has 0 and adds nothing.
    """

def has_isa(isa: str) -> bool:
    """True if this machine has the instruction set."""

def gpt_bits(
    bits: NDArray[np.float32],  # (E, B, T)
    *,
    parameters: NDArray[np.float32],  # (E, P), in the order of GPT.named_parameters()
    tokens: NDArray[np.int64],  # (E, B, T + 1) from 0 to vocab - 1, T from 1 to length
    layers: int,
    width: int,
    heads: int,
    vocab: int,
    length: int,
    threads: int,
    isa: str = "best",
) -> None:
    """Writes the bits of each token after the first under each of E models of fastmem.GPT."""

def gpt_gradients(
    losses: NDArray[np.float64],  # (E,)
    gradients: NDArray[np.float32],  # (E, P)
    *,
    parameters: NDArray[np.float32],
    tokens: NDArray[np.int64],
    layers: int,
    width: int,
    heads: int,
    vocab: int,
    length: int,
    threads: int,
    isa: str = "best",
) -> None:
    """Writes the mean of gpt_bits for each model, and its gradient.

    The results of gpt_gradients and gpt_bits depend on `threads` in their last bits.
    """
