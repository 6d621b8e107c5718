"""fastmem train: train one model on one data set."""

import json
import math
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch

from fastmem.base.arguments import checked_device
from fastmem.base.ranks import Ranks, is_first, joined, launched
from fastmem.base.storage import Row, read_json, write_json
from fastmem.base.terminal import say, show
from fastmem.cli.dataset import Dataset, Flat
from fastmem.cli.job import check_same, one_folder
from fastmem.cli.report import row_line
from fastmem.cli.score import code_length, default_device
from fastmem.data.sequences import Sequences
from fastmem.models.gpt import GPTConfig
from fastmem.models.score import check_fit, sequence_bits
from fastmem.models.sharded import Sharding
from fastmem.sweeps.config import default_heads
from fastmem.sweeps.job import is_final, run_alone
from fastmem.sweeps.large_plan import large_plan
from fastmem.sweeps.rows import RunSpec
from fastmem.sweeps.study import MODEL
from fastmem.training.checkpoint import delete_checkpoints, shards_of
from fastmem.training.config import TrainConfig
from fastmem.training.profile import profiled

CHECKPOINT = "checkpoint.pt"
MIN_EPOCHS = 5
"""Fewer memorize next to nothing: of five data sets above capacity at most 0.16 bits per parameter
after 3 epochs and 0.32 after 5, but 1 to 2 after 40, of about 3 (docs/lab.md, "Few epochs")."""


@dataclass(frozen=True)
class Train:
    """Trains one model to memorize one data set. Writes a folder that transformers loads, and
    run.json with the training curve and the memorized bits. The same command resumes a killed run.
    Under torchrun all ranks train one model, of which each has a part (docs/large.md).

    Example: fastmem train --width 32 --vocab 2048 --length 64 --count 512 --epochs 200
    """

    layers: int = 1
    """Number of layers."""
    width: int = 32
    """Width of the hidden states."""
    heads: int | None = None
    """Number of heads; by default each head is 2 wide."""
    dataset: Annotated[Dataset, Flat] = field(default_factory=Dataset)
    device: str = "auto"
    """Where to train: auto (a GPU where there is one), cpu, cuda, cuda:1, …"""
    out: Path = Path("model")
    """Folder of the model."""
    overwrite: bool = False
    """Train a finished model again; also take a folder that holds other files, which stay."""
    profile: bool = False
    """Print where the time went, and write a Chrome trace of 20 steps to trace.json in --out."""
    plan: bool = False
    """Only print what training on many GPUs needs: memory of a GPU, GPUs, time. Needs no GPU and
    writes nothing."""
    gpus: int | None = None
    """With --plan: GPUs; by default the smallest number that fits."""
    gpu_memory: float | None = None
    """With --plan: GB of a GPU; by default those of the GPU here, or 80."""
    sharding: Annotated[Sharding, Flat] = field(default_factory=Sharding)
    train: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)


def run_train(command: Train) -> int:
    sequences = command.dataset.sequences({"count": 400, "length": 16, "vocab": 128, "seed": 0})
    shape = GPTConfig(
        command.layers,
        command.width,
        default_heads(command.width) if command.heads is None else command.heads,
        sequences.vocab,
        sequences.length,
    )
    run = RunSpec(shape, sequences, command.train)
    check_fit(shape, sequences)
    if command.plan:
        return _plan(command, run)
    if command.gpus is not None or command.gpu_memory is not None:
        raise ValueError("--gpus and --gpu-memory belong to --plan: torchrun starts the ranks")
    shards = shards_of(command.out / CHECKPOINT)
    if launched() or command.sharding != Sharding() or shards.exists():
        with joined(command.device) as job, one_folder(command.out, command.overwrite, MODEL):
            check_same(job, sequences)
            return _train(command, run, job)
    device = default_device(command.device)
    checked_device(device)
    with one_folder(command.out, command.overwrite, MODEL):
        return _train(command, run, None, device)


def _plan(command: Train, run: RunSpec) -> int:
    if not is_first():
        return 0
    size = int(os.environ["WORLD_SIZE"]) if launched() and command.gpus is None else command.gpus
    memory = None if command.gpu_memory is None else 1e9 * command.gpu_memory
    device = "cpu" if command.device == "cpu" else "cuda"
    show(large_plan(run, command.sharding, size, memory, device).text())
    return 0


def _train(command: Train, run: RunSpec, job: Ranks | None, device: str = "") -> int:
    """Trains, or finds a finished run; on all ranks, if there are several."""
    place = torch.device(device) if job is None else job.device
    result_path, checkpoint = command.out / "run.json", command.out / CHECKPOINT
    do_first = (lambda work: work()) if job is None else job.do_first
    row = do_first(lambda: _finished(command, run))
    if row is not None:
        say(row_line(row))
        say("finished: nothing to do; --overwrite trains the model again")
        return 0
    where = f"{place}" if job is None or job.size == 1 else f"{job.size} ranks of {place.type}"
    say(f"{run.model.parameter_count:,} parameters on {where}, model in {command.out}")
    sequences, count = run.sequences, run.sequences.count
    steps = command.train.total_steps(count)
    if steps and (warning := too_few(steps * command.train.step_batch(count) / count, sequences)):
        say(warning)
    with ExitStack() as profiling:
        profile = None
        if command.profile and is_first():
            profile = profiling.enter_context(profiled(command.out / "trace.json", place))
        sharding = None if job is None else command.sharding
        row, model = run_alone(run, place, checkpoint, is_first(), sharding)
    if model is not None:
        if row["entropy_bits"] is None:
            bits = sequence_bits(model, sequences, command.train.precision, progress=is_first())
            row |= code_length(bits, sequences)
        model.to_hf(command.out)
    do_first(lambda: _end(row, model is not None, result_path, checkpoint))
    say(row_line(row))
    if model is not None and not steps and (warning := too_few(row["epochs"], sequences)):
        say(warning)
    if profile is not None:
        say(profile.table())
    return 0 if model is not None else 1


def _finished(command: Train, run: RunSpec) -> Row | None:
    """The row of a finished run in the folder; with --overwrite deletes the run."""
    result_path, checkpoint = command.out / "run.json", command.out / CHECKPOINT
    if command.overwrite:
        result_path.unlink(missing_ok=True)
        delete_checkpoints(checkpoint)
    if not result_path.exists():
        return None
    row = read_json(result_path)
    check_same_run(row, run, command.out)
    return row


def _end(row: Row, done: bool, result_path: Path, checkpoint: Path) -> None:
    if done:
        write_json(result_path, row)
    if is_final(row):
        delete_checkpoints(checkpoint)


def too_few(epochs: float, sequences: Sequences) -> str | None:
    """The warning that so few epochs memorize nothing; None for enough, and for tokens of unknown
    entropy, which may have rules to learn."""
    if epochs >= MIN_EPOCHS or math.isnan(sequences.entropy_bits):
        return None
    return (
        f"warning: in {epochs:.3g} epochs a model memorizes next to nothing, since it must see a "
        "random sequence many times: give --epochs 100 or more, or fewer sequences"
    )


def check_same_run(row: Row, run: RunSpec, folder: Path) -> None:
    """Refuses a finished run that differs from the run that the flags choose."""
    parts = {
        "model": asdict(run.model),
        "sequences": run.sequences.description(),
        "train": asdict(run.train),
    }
    for part, ours in parts.items():
        for name, value in json.loads(json.dumps(ours)).items():
            theirs = row[part].get(name, value)  # an earlier version may lack a field
            if theirs != value:
                raise ValueError(
                    f"{folder} holds a finished run ({name} is {theirs} there, {value} here): give "
                    "another --out, or --overwrite"
                )
