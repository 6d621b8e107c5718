"""Batches of a data set for torch's DataLoader, divided among ranks and workers.

B batch, S tokens a sequence, N sequences.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, distributed
from torch.utils.data import IterableDataset, get_worker_info

from fastmem.base.arguments import MAX_WORD, integer
from fastmem.data.array import as_sequences
from fastmem.data.order import permutation
from fastmem.data.sequences import Sequences


class SequenceStream(IterableDataset[Tensor]):
    """The batches (B, S) of one epoch after another, computed on access.

    Batch b of an epoch has places [b·B, (b + 1)·B) of its order. Rank r of R takes the batches
    b = r, r + R, r + 2R, … as its steps 0, 1, 2, …. A step does not depend on the steps before it
    or on the number of workers. Together the ranks visit each sequence once per epoch.

        stream = SequenceStream(sequences, batch=32, seed=0)
        loader = DataLoader(stream, batch_size=None, num_workers=2)  # do not batch again
        for epoch in range(10):
            stream.set_epoch(epoch)
            for tokens in loader: ...

    To resume a run, call `set_epoch(epoch, step)`, where `step` is the number of batches that this
    rank has taken in the epoch.

    Args:
        sequences: the data set, or tokens as `from_array` takes them.
        batch: B, from 1; the last batch of an epoch may be smaller.
        seed: of the orders, which differ between epochs. None: the order of the set.
        rank, world: this process and the number of processes, 0 ≤ rank < world. None: the values
            of torch.distributed if it is initialized, else 0 and 1.
        drop_last: drops the batches at the end of an epoch that some rank would not get whole, so
            that all ranks take the same number of steps. Ranks that wait for each other's gradients
            need it if B · world does not divide N.
        dtype: of the tokens: torch.int64, int32, uint16 or uint32.

    Raises:
        ValueError: an argument is outside its limits.

    Example:
        >>> stream = SequenceStream(fastmem.UniformSequences(10, 4, vocab=16), batch=4, seed=0)
        >>> [tuple(tokens.shape) for tokens in stream]
        [(4, 4), (4, 4), (2, 4)]
    """

    def __init__(
        self,
        sequences: Sequences | ArrayLike,
        batch: int,
        seed: int | None = None,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = False,
        dtype: torch.dtype = torch.int64,
    ) -> None:
        sequences = as_sequences("sequences must be a set of sequences", sequences)
        if (rank is None) != (world is None):
            raise ValueError(f"rank and world go together, got {rank} and {world}; give both")
        if rank is None or world is None:
            rank, world = 0, 1
            if distributed.is_available() and distributed.is_initialized():
                rank, world = distributed.get_rank(), distributed.get_world_size()
        self.world = integer("world", world, 1, MAX_WORD)
        self.rank = integer("rank", rank, 0, self.world - 1)
        self.sequences = sequences
        self.batch = integer("batch", batch, 1, MAX_WORD)
        self.seed = None if seed is None else integer("seed", seed, 0, MAX_WORD)
        self.drop_last, self.dtype = drop_last, dtype
        sequences.to_torch(indices=[], dtype=dtype)  # checks the dtype
        # In shared memory, so that set_epoch reaches persistent workers.
        self._state = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The epoch of the next iteration."""
        return int(self._state[0])

    @property
    def step(self) -> int:
        """The step of this rank at which the next iteration begins."""
        return int(self._state[1])

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Makes the next iteration give `epoch` from `step` of this rank on.

        Raises:
            ValueError: the epoch is below 0, or the step outside 0 to `steps`.
        """
        last = min(self.steps, 2**63 - 1)  # the largest int of the state
        state = [integer("epoch", epoch, 0, 2**63 - 1), integer("step", step, 0, last)]
        self._state.copy_(torch.tensor(state))

    @property
    def steps(self) -> int:
        """The number of batches of this rank in a whole epoch."""
        if self.drop_last:
            return self.sequences.count // (self.batch * self.world)
        batches = -(-self.sequences.count // self.batch)
        return max(0, -(-(batches - self.rank) // self.world))

    def __iter__(self) -> Iterator[Tensor]:
        """The batches from `step` on; in a worker of a DataLoader, the batches of this worker."""
        epoch, first = self.epoch, self.step
        info = get_worker_info()
        # DataLoader takes from its workers in turn, so the order is the same without workers.
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for step in range(first + worker, self.steps, workers):
            yield self._tokens(epoch, step)

    def _tokens(self, epoch: int, step: int) -> Tensor:  # (B, S)
        N = self.sequences.count
        begin = (step * self.world + self.rank) * self.batch
        end = min(begin + self.batch, N)
        places: slice | np.ndarray[tuple[int], np.dtype[np.uint64]] = slice(begin, end)
        if self.seed is not None:
            places = permutation(self.seed, epoch, N, begin, end)
        return self.sequences.to_torch(indices=places, dtype=self.dtype)
