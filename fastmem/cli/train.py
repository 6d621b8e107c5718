"""fastmem train: train one model on one data set."""

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch

from fastmem.base.arguments import checked_device
from fastmem.base.storage import Row, check_folder, read_json, write_json
from fastmem.base.terminal import say
from fastmem.cli.dataset import Dataset, Flat
from fastmem.cli.report import row_line
from fastmem.cli.score import code_length, default_device
from fastmem.models.gpt import GPTConfig
from fastmem.models.score import check_fit, sequence_bits
from fastmem.sweeps.config import default_heads
from fastmem.sweeps.job import is_final, run_alone
from fastmem.sweeps.rows import RunSpec
from fastmem.sweeps.study import MODEL
from fastmem.training.config import TrainConfig
from fastmem.training.profile import profiled


@dataclass(frozen=True)
class Train:
    """Trains one model to memorize one data set. Writes a folder that transformers loads, and
    run.json with the training curve and the memorized bits. The same command resumes a killed run.

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
    device = default_device(command.device)
    checked_device(device)
    run = RunSpec(shape, sequences, command.train)
    result_path, checkpoint = command.out / "run.json", command.out / "checkpoint.pt"
    check_fit(shape, sequences)
    if command.overwrite:
        result_path.unlink(missing_ok=True)
        checkpoint.unlink(missing_ok=True)
    else:
        check_folder(command.out, MODEL, "model")
    if result_path.exists():
        row = read_json(result_path)
        check_same_run(row, run, command.out)
        say(row_line(row))
        say("finished: nothing to do; --overwrite trains the model again")
        return 0
    say(f"{shape.parameter_count:,} parameters on {device}, model in {command.out}")
    command.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as profiling:
        profile = None
        if command.profile:
            profile = profiling.enter_context(
                profiled(command.out / "trace.json", torch.device(device))
            )
        row, model = run_alone(run, device, checkpoint, progress=True)
    if model is not None:
        if row["entropy_bits"] is None:
            bits = sequence_bits(model, sequences, command.train.precision, progress=True)
            row |= code_length(bits, sequences)
        model.to_hf(command.out)
        write_json(result_path, row)
    if is_final(row):
        checkpoint.unlink(missing_ok=True)
    say(row_line(row))
    if profile is not None:
        say(profile.table())
    return 0 if model is not None else 1


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
