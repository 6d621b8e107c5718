"""The rules of csrc/sequences/ written a second time, for the tests to judge by."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

U64 = np.uint64
LAST = 2**64 - 1

Array = NDArray[Any]


def known_answers() -> list[list[int]]:
    text = (Path(__file__).parents[1] / "csrc" / "philox_known_answers.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [[int(word, 16) for word in line.split()] for line in lines]


def philox_reference(counter: list[Array], key: list[int]) -> list[Array]:
    """Philox4x32-10 on arrays of words that are kept in uint64."""
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


def tokens_reference(seed: int, indices: list[int], length: int, vocab: int) -> Array:
    """The token rule of docs/design.md, for every position at once."""
    index, t = np.meshgrid(np.array(indices, U64), np.arange(length, dtype=U64), indexing="ij")
    key = [seed % 2**32, seed // 2**32]
    halves = vocab in {2**k for k in range(17)}
    per_block = 8 if halves else 4

    def words(attempt: int) -> Array:  # (N, S): the word that each token comes from
        attempts = np.full_like(t, attempt)
        counter = [t // U64(per_block), attempts, index % U64(2**32), index // U64(2**32)]
        word = (t % U64(per_block)) // U64(per_block // 4)
        return np.choose(word.astype(np.int64), philox_reference(counter, key))

    if halves:
        word = words(0)
        return np.where(t % U64(2) == 0, word % U64(65536), word // U64(65536)) % U64(vocab)
    product = words(0) * U64(vocab)
    attempt = 0
    while (rejected := product % U64(2**32) < U64(2**32 % vocab)).any():
        attempt += 1
        product = np.where(rejected, words(attempt) * U64(vocab), product)
    return product // U64(2**32)


def order_reference(seed: int, epoch: int, count: int) -> list[int]:
    """permutation() as csrc/sequences/order.h states it, in Python's own integers."""

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


def chi_square_sigmas(observed: Array, expected: float) -> float:
    """Standard deviations by which counts are further from `expected` than chance puts them."""
    freedom = observed.size - 1
    statistic = float(((observed - expected) ** 2).sum() / expected)
    return (statistic - freedom) / math.sqrt(2 * freedom)
