"""The order in which training visits sequences: a pure function of (seed, epoch, place).

Like the sequences the order is computed where it is needed and never stored.
"""

import numpy as np
from numpy.typing import NDArray

from fastmem import _core
from fastmem.base.arguments import MAX_WORD, array_length, integer, threads_or_all

_MAX_COUNT = 2**64


def permutation(
    seed: int,
    epoch: int,
    count: int,
    begin: int = 0,
    end: int | None = None,
    threads: int | None = None,
) -> NDArray[np.uint64]:
    """Places [begin, end) of the random order in which `epoch` visits 0, ..., count - 1.

    An order has each number once. Any part is computed without the rest, in the memory of the
    result alone, so a run resumes at any step, and `count` can exceed memory.

    Args:
        seed: from 0 to 2**64 - 1.
        epoch: from 0 to 2**64 - 1. Each epoch has another order.
        count: from 1 to 2**64.
        begin: first place, from 0 to count.
        end: one past the last place, from begin to count; None: count.
        threads: at most this many; None: one per core. The order does not depend on the threads.

    Returns:
        (end - begin,) uint64.

    Raises:
        ValueError: an argument is not an int, or is outside these limits.

    Orders are random in (seed, epoch). Two counts at the same (seed, epoch) have similar orders:
    use another seed where the orders must differ.

    >>> permutation(seed=0, epoch=0, count=8)
    array([5, 3, 7, 4, 2, 6, 0, 1], dtype=uint64)
    >>> permutation(seed=0, epoch=0, count=8, begin=5)
    array([6, 0, 1], dtype=uint64)
    >>> permutation(seed=0, epoch=1, count=10**18, begin=10**17, end=10**17 + 2)
    array([230262204823291296, 987748370052112252], dtype=uint64)

    Source: Black, Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (a Feistel network
    and cycle walking). csrc/sequences/order.h specifies the order to the bit.
    """
    seed = integer("seed", seed, 0, MAX_WORD)
    epoch = integer("epoch", epoch, 0, MAX_WORD)
    count = integer("count", count, 1, _MAX_COUNT)
    begin = integer("begin", begin, 0, count)
    end = integer("end", count if end is None else end, begin, count)
    limit = threads_or_all(threads)
    out = np.empty(array_length(range(begin, end)), np.uint64)
    if out.size:  # an empty part at the very end would begin at 2**64
        _core.permutation(out, seed=seed, epoch=epoch, last=count - 1, begin=begin, threads=limit)
    return out


def batch_indices(seed: int, step: int, batch: int, count: int) -> NDArray[np.uint64]:
    """The sequences of training step `step`: the next `batch` in the order of all epochs.

    Epochs follow each other without a gap, each in its own `permutation(seed, epoch, count)`, so a
    batch may end one epoch and begin the next, and a step depends on no step before it.

    Args:
        seed: from 0 to 2**64 - 1.
        step: from 0 to 2**64 - 1.
        batch: from 1 to count.
        count: N, from 1 to 2**64.

    Returns:
        (batch,) uint64, relative to the set.

    Raises:
        ValueError: an argument is not an int, or is outside these limits.

    >>> batch_indices(seed=0, step=0, batch=4, count=6)
    array([5, 3, 1, 4], dtype=uint64)
    >>> batch_indices(seed=0, step=1, batch=4, count=6)
    array([2, 0, 5, 3], dtype=uint64)
    """
    count = integer("count", count, 1, _MAX_COUNT)
    batch = integer("batch", batch, 1, count)
    epoch, begin = divmod(integer("step", step, 0, MAX_WORD) * batch, count)
    end = min(begin + batch, count)
    indices = permutation(seed, epoch, count, begin, end)
    if end - begin == batch:
        return indices
    rest = permutation(seed, epoch + 1, count, 0, batch - (end - begin))
    return np.concatenate([indices, rest])
