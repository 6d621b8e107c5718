"""The rules of csrc/sequences/ written a second time, as the reference of the tests."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

U64 = np.uint64
LAST = 2**64 - 1

Array = NDArray[Any]


def known_answers() -> list[list[int]]:
    """Random123's known answers: counter, key and result."""
    text = (Path(__file__).parents[1] / "csrc" / "philox_known_answers.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [[int(word, 16) for word in line.split()] for line in lines]


def philox_reference(counter: list[Array], key: list[int]) -> list[Array]:
    """Philox4x32-10 on arrays of 32-bit words in uint64."""
    x = [word.astype(U64) for word in counter]
    k = list(key)
    low, shift = U64(0xFFFFFFFF), U64(32)
    for _ in range(10):
        even, odd = x[0] * U64(0xD2511F53), x[2] * U64(0xCD9E8D57)
        x = [
            (odd >> shift) ^ x[1] ^ U64(k[0]),
            odd & low,
            (even >> shift) ^ x[3] ^ U64(k[1]),
            even & low,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


def words_reference(seed: int, indices: Any, blocks: int, attempt: int) -> Array:
    """(N, blocks, 4): the words of the first blocks of each sequence."""
    index, block = np.meshgrid(
        np.asarray(indices, U64), np.arange(blocks, dtype=U64), indexing="ij"
    )
    attempts = np.full_like(block, attempt)
    counter = [block, attempts, index % U64(2**32), index // U64(2**32)]
    return np.stack(philox_reference(counter, [seed % 2**32, seed // 2**32]), -1)


def tokens_reference(
    seed: int, indices: Any, length: int, vocab: int, cumulative: Array | None = None
) -> Array:
    """(N, S): the token rule of docs/design.md, or its rule for given frequencies."""
    halves = cumulative is None and vocab in {2**k for k in range(17)}
    blocks = -(-length // (8 if halves else 4))
    words = words_reference(seed, indices, blocks, attempt=0)
    if cumulative is not None:
        tokens: Array = np.searchsorted(cumulative, words, "right") - 1
    elif halves:
        tokens = np.stack([words % U64(65536), words // U64(65536)], -1) % U64(vocab)
    else:
        product, attempt = words * U64(vocab), 0
        while (rejected := product % U64(2**32) < U64(2**32 % vocab)).any():
            attempt += 1
            again = words_reference(seed, indices, blocks, attempt)
            product = np.where(rejected, again * U64(vocab), product)
        tokens = product // U64(2**32)
    return tokens.reshape(len(indices), -1)[:, :length]


def order_reference(seed: int, epoch: int, count: int) -> list[int]:
    """permutation() as csrc/sequences/order.h specifies it, in Python integers."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    keys = []
    for i in range(6):
        counter = [i, 2**32 - 1, epoch % 2**32, epoch // 2**32]
        w = philox_reference([np.array(c) for c in counter], [seed % 2**32, seed // 2**32])
        keys += [int(w[0]) + 2**32 * int(w[1]), int(w[2]) + 2**32 * int(w[3])]
    bits = max(8, (count - 1).bit_length())
    low_size, high_size = 2 ** (bits // 2), 2 ** (bits - bits // 2)
    order = []
    for x in range(count):
        while True:
            high, low = divmod(x, low_size)
            for i in range(0, 12, 2):
                high ^= mix(low ^ keys[i]) % high_size
                low ^= mix(high ^ keys[i + 1]) % low_size
            x = high * low_size + low
            if x < count:
                break
        order.append(x)
    return order


def chi_square_sigmas(observed: Array, expected: float | Array) -> float:
    """The chi-square statistic of counts, in standard deviations above its mean."""
    freedom = observed.size - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)
