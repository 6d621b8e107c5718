"""Batches for a DataLoader: every sequence once, whatever the ranks and workers."""

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader

import fastmem
from fastmem import SequenceStream, UniformSequences

# 17 tokens of 2048: no two sequences are equal, so a row identifies its sequence.
SEQUENCES = UniformSequences(count=103, length=17, vocab=2048, seed=4)
INDEX = {row.tobytes(): i for i, row in enumerate(SEQUENCES.tokens(slice(None), np.int64))}


def places(batches: Any) -> list[int]:
    """The number of each sequence in the batches."""
    return [INDEX[row.numpy().tobytes()] for batch in batches for row in batch]


@pytest.mark.parametrize("seed", [None, 0, 2**64 - 1])
@pytest.mark.parametrize("world", [1, 2, 5, 200])
@pytest.mark.parametrize("batch", [1, 10, 103, 1000])
def test_the_ranks_share_an_epoch(seed: int | None, world: int, batch: int) -> None:
    """Fails if an epoch skips or repeats a sequence, or a rank has another number of steps."""
    for epoch in (0, 7):
        there = []
        for rank in range(world):
            stream = SequenceStream(SEQUENCES, batch, seed, rank, world)
            stream.set_epoch(epoch)
            batches = list(stream)
            assert len(batches) == stream.steps
            assert all(len(part) == batch for part in batches[:-1])
            there += places(batches)
        assert sorted(there) == list(range(103))


def test_order() -> None:
    """Fails if the order is not `permutation`, the same each time and new each epoch."""
    stream = SequenceStream(SEQUENCES, 10, seed=3)
    stream.set_epoch(2)
    expected = fastmem.permutation(3, 2, 103).tolist()
    assert places(stream) == expected
    assert places(stream) == expected
    stream.set_epoch(3)
    assert places(stream) == fastmem.permutation(3, 3, 103).tolist()
    assert places(SequenceStream(SEQUENCES, 10)) == list(range(103))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_workers_change_nothing(workers: int) -> None:
    """Fails if a DataLoader with workers gives other batches, or another order, than without."""
    stream = SequenceStream(SEQUENCES, 10, seed=3, rank=1, world=2)
    stream.set_epoch(1, step=1)
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, multiprocessing_context=context(workers)
    )
    order = fastmem.permutation(3, 1, 103).tolist()
    expected = [place for step in range(1, 5) for place in order[20 * step + 10 :][:10]]
    assert places(loader) == expected


def context(workers: int) -> str | None:
    # A fork of a process with threads may hang; and a stream must survive pickling.
    return "forkserver" if workers else None


def test_persistent_workers() -> None:
    """Fails if set_epoch does not reach persistent workers."""
    stream = SequenceStream(SEQUENCES, 10, seed=3)
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )
    for epoch, step in ((0, 0), (1, 0), (5, 3)):
        stream.set_epoch(epoch, step)
        assert places(loader) == fastmem.permutation(3, epoch, 103).tolist()[10 * step :]


def test_resuming_at_every_step() -> None:
    """Fails if a stream that begins at a step is not the rest of the whole stream."""
    for drop_last in (False, True):
        stream = SequenceStream(SEQUENCES, 10, seed=0, rank=2, world=3, drop_last=drop_last)
        whole = places(stream)
        for step in range(stream.steps + 1):
            stream.set_epoch(0, step)
            assert (stream.epoch, stream.step) == (0, step)
            assert places(stream) == whole[10 * step :]


def test_drop_last() -> None:
    """Fails if ranks get different numbers of steps, smaller batches, or too few batches."""
    for world in (1, 2, 5):
        streams = [SequenceStream(SEQUENCES, 10, 0, r, world, True) for r in range(world)]
        there = [places(stream) for stream in streams]
        assert {len(part) for part in there} == {10 * (103 // (10 * world))}
        together = [place for part in there for place in part]
        assert len(set(together)) == len(together)


def test_a_file_in_workers(tmp_path: Path) -> None:
    """Fails if a TokenFile cannot be pickled for workers, or reads other sequences there."""
    fastmem.write(SEQUENCES, tmp_path / "train", "npy", shards=3)
    stream = SequenceStream(fastmem.TokenFile.open(tmp_path / "train"), 10, seed=3)
    loader = DataLoader(
        stream, batch_size=None, num_workers=2, multiprocessing_context="forkserver"
    )
    assert places(loader) == fastmem.permutation(3, 0, 103).tolist()


def test_rank_of_the_process_group() -> None:
    """Fails if a stream does not take its rank from torch.distributed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    try:
        stream = SequenceStream(SEQUENCES, 10)
        assert (stream.rank, stream.world) == (0, 1)
        assert SequenceStream(SEQUENCES, 10, rank=1, world=2).rank == 1
    finally:
        distributed.destroy_process_group()


def test_dtypes() -> None:
    """Fails if tokens have another dtype than requested."""
    for dtype in (torch.int64, torch.int32, torch.uint16, torch.uint32):
        assert next(iter(SequenceStream(SEQUENCES, 10, dtype=dtype))).dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch must be from 1"),
        ({"batch": 2.0}, "batch must be an integer"),
        ({"seed": -1}, "seed must be from 0"),
        ({"rank": 2, "world": 2}, "rank must be from 0 to 1, got 2"),
        ({"rank": 0, "world": 0}, "world must be from 1"),
        ({"rank": 1}, "rank and world go together, got 1 and None; give both"),
        ({"dtype": torch.float32}, "dtype must be torch.uint16"),
        ({"sequences": [1, 2]}, "sequences must be a set of sequences"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    """Fails if a wrong argument is found only in training, or never."""
    with pytest.raises(ValueError, match=message):
        SequenceStream(**{"sequences": SEQUENCES, "batch": 10, **change})


def test_bad_places() -> None:
    """Fails if a stream starts outside an epoch."""
    stream = SequenceStream(SEQUENCES, 10)
    for epoch, step in ((-1, 0), (0, -1), (0, 12), (0.5, 0)):
        with pytest.raises(ValueError, match="must be"):
            stream.set_epoch(epoch, step)  # type: ignore[arg-type]


def test_the_last_step_of_the_largest_set() -> None:
    """Fails if a step above the state's limit is an error of torch."""
    stream = SequenceStream(fastmem.UniformSequences(2**64, 4, 16), batch=1)
    stream.set_epoch(0, 2**63 - 1)
    assert stream.step == 2**63 - 1
    with pytest.raises(ValueError, match="step must be from 0 to 9223372036854775807"):
        stream.set_epoch(0, 2**64 - 1)
