"""Checkpoints of a sharded run: folders that all ranks write, by torch.distributed.checkpoint."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from fastmem.base import ranks
from fastmem.base.storage import Row
from fastmem.models.gpt import GPT, fill, ordered, own_part
from fastmem.models.sharded import locals_of
from fastmem.training.checkpoint import read_record, shards_of, write_record
from fastmem.training.optimizer import State, spans_of

RECORD = "run.pt"
"""Written last: a folder with it is a whole checkpoint."""
COPY_FRACTION = 0.5
"""A checkpoint is written beside training if copies of all parts take less of the free memory."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedCheckpoint:
    """The checkpoints of one run, of which the last whole one stays.

    Args:
        checkpoint: the file that a process alone would write.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._file, self._folder = checkpoint, shards_of(checkpoint)
        self._pending: Future[None] | None = None

    def save(self, record: Row, model: GPT, optimizer: State, wait: bool) -> None:
        """Writes weights, moments and the record of a run.

        Training goes on meanwhile, where memory has room for a copy; `wait` waits for the end. A
        checkpoint that is due while another is being written is left out.

        Raises:
            OSError: a rank could not write its part; the last checkpoint stays.
        """
        if self._pending is not None and not wait and not self._ended():
            return
        self.finish()
        job = ranks.current()
        whole = self._folder / f"step-{record['result']['steps']:09d}"
        part = self._folder / f".{whole.name}.part"
        job.do_first(lambda: _emptied(part))
        state = _state(model, optimizer["parts"])
        steps = [int(moments["step"]) for moments in optimizer["parts"].values() if moments]
        record = record | {"optimizer_steps": steps[0] if steps else 0}
        size = sum(x.to_local().nbytes for named in state.values() for x in named.values())
        room = job.all(size * _local_ranks() < COPY_FRACTION * _free_bytes())
        options = {"storage_writer": FileSystemWriter(part), "process_group": job.checkpoints}

        if room and not wait:
            written = async_save(state, **options)
            assert isinstance(written, Future)
            # Rank 0 is told last: by then all ranks have written their parts.
            self._pending = Future()
            written.add_done_callback(partial(self._end, self._pending, part, whole, record))
            return
        with _as_os_error(self._folder):
            save(state, **options)
        job.do_first(lambda: self._complete(part, whole, record))

    def finish(self) -> None:
        """Waits until the checkpoint that is being written is whole; its error is raised on all
        ranks."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.exception()  # waits for this rank's part
            ranks.current().do_first(lambda: self._outcome(pending))

    def _outcome(self, pending: Future[None]) -> None:
        with _as_os_error(self._folder):
            pending.result()

    def _end(
        self, pending: Future[None], part: Path, whole: Path, record: Row, written: Future[Any]
    ) -> None:
        """Makes a written checkpoint whole, on rank 0, in the thread that wrote it."""
        try:
            written.result()
            if ranks.is_first():
                self._complete(part, whole, record)
            pending.set_result(None)
        except BaseException as error:  # raised by `finish`
            pending.set_exception(error)

    def load(
        self,
        model: GPT,
        trained: Sequence[tuple[int, int]],
        check: Callable[[Row, Path], None],
    ) -> tuple[Row, State | None] | None:
        """The record and the moments of the last whole checkpoint, or of the file of a process
        alone; the weights go into the model.

        Removes what a killed job left of other checkpoints. `check` raises for the record of
        another run.
        """
        path = ranks.current().do_first(self._found)
        if path is None:
            return None
        if path == self._file:
            record = read_record(path)
            check(record, path)
            return record, _from_file(record, model, trained)
        record = read_record(path / RECORD)
        check(record, path)
        steps = record.pop("optimizer_steps")
        parts: dict[str, dict[str, Tensor]] = {}
        for name, parameter, own in locals_of(model):
            if parameter.requires_grad and steps:
                dtype = torch.float32 if _rounds(record) else own.dtype
                moments = {name: torch.zeros_like(own, dtype=dtype) for name in MOMENTS}
                parts[name] = {"step": torch.tensor(float(steps)), **moments}
        with _as_os_error(path):
            load(
                _state(model, parts),
                storage_reader=FileSystemReader(path),
                process_group=ranks.current().checkpoints,
            )
        return record, {"parts": parts} if parts else None

    def _found(self) -> Path | None:
        for part in self._folder.glob(".*.part"):
            if (part / RECORD).exists():  # whole, but for its name
                _renamed(part, self._folder / part.name[1 : -len(".part")])
            else:
                shutil.rmtree(part)
        whole = sorted(self._folder.glob(f"step-*/{RECORD}"))
        if whole:
            return whole[-1].parent
        return self._file if self._file.exists() else None

    def _ended(self) -> bool:
        assert self._pending is not None
        return ranks.current().all(self._pending.done())

    def _complete(self, part: Path, whole: Path, record: Row) -> None:
        """Makes a checkpoint of all written parts, and removes the checkpoints before it."""
        write_record(part / RECORD, record)
        _renamed(part, whole)
        directory = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        for other in self._folder.glob("step-*"):
            if other != whole:
                shutil.rmtree(other)
        self._file.unlink(missing_ok=True)


def _emptied(folder: Path) -> None:
    """Makes an empty folder."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _renamed(part: Path, whole: Path) -> None:
    if whole.exists():  # of the same step
        shutil.rmtree(whole)
    part.replace(whole)


def _from_file(state: dict[str, Any], model: GPT, trained: Sequence[tuple[int, int]]) -> State:
    """The moments of the checkpoint of a process alone; its weights go into the model."""
    begin, embeddings = 0, 0
    for name, p in ordered(model).items():
        fill(p.detach(), state["parameters"][begin : begin + p.numel()].view(p.shape))
        begin += p.numel()
        embeddings += p.numel() * ("embedding" in name)
    spans, old = spans_of(begin, embeddings, trained), state["optimizer"]["parts"]
    parts: dict[str, dict[str, Tensor]] = {}
    begin = 0
    for name, p in ordered(model).items():
        end = begin + p.numel()
        for (a, b), moments in zip(spans, old, strict=False):
            if a <= begin < end <= b and moments:
                # A copy for each: the optimizer counts each parameter's steps.
                parts[name] = {"step": torch.tensor(float(moments["step"]))}
                for moment in MOMENTS:
                    values = moments[moment][begin - a : end - a].view(p.shape)
                    parts[name][moment] = own_part(values, p).clone()
        begin = end
    return {"parts": parts}


def _state(model: GPT, parts: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Weights and moments as DTensors, by name."""
    from torch.distributed.tensor import DTensor

    found: dict[str, dict[str, Any]] = {"weights": {}}
    for name, parameter in model.named_parameters():
        found["weights"][name] = parameter.detach()
        for moment in MOMENTS if parts.get(name) else ():
            found.setdefault(moment, {})[name] = DTensor.from_local(
                parts[name][moment],
                parameter.device_mesh,  # type: ignore[attr-defined]
                parameter.placements,  # type: ignore[attr-defined]
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
    return found


@contextmanager
def _as_os_error(folder: Path) -> Iterator[None]:
    """Turns the failures of ranks into the error of the first of them."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        code = getattr(cause, "errno", None)
        if code is None and "file write failed" in str(cause):  # of torch's own writer
            code = errno.ENOSPC
        text = str(cause).splitlines()[0] if code is None else os.strerror(code)
        raise OSError(code or errno.EIO, f"rank {rank}: {text}", str(folder)) from None


def _rounds(record: Row) -> bool:
    return bool(record["identity"]["train"]["precision"] == "bf16-stochastic")


def _local_ranks() -> int:
    """Ranks that share the memory of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
