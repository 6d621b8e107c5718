"""fastmem train, fastmem score: one model on one data set."""

import io
import json
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from fastmem.base.arguments import checked_device
from fastmem.base.stats import Floats
from fastmem.base.storage import Row, read_json, write_json, write_whole
from fastmem.base.terminal import say
from fastmem.cli.data import Structure, made, opened
from fastmem.cli.sweep import row_line
from fastmem.data.sequences import Sequences, from_description
from fastmem.memorization.bits import memorized_bits
from fastmem.models.engine import Precision
from fastmem.models.gpt import GPT, GPTConfig
from fastmem.models.quantize import quantized
from fastmem.models.score import check_fit, sequence_bits
from fastmem.sweeps.driver import default_heads
from fastmem.sweeps.job import execute, has_ended
from fastmem.sweeps.rows import RunSpec
from fastmem.training.config import TrainConfig
from fastmem.training.profile import profiled

Flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Train:
    """Trains one model to memorize one data set. Writes a folder that transformers loads, with
    run.json (the curve and the memorized bits) beside it; a killed run goes on.

    Example: fastmem train --width 32 --vocab 2048 --length 64 --count 512 --epochs 200
    """

    layers: int = 1
    """Layers."""
    width: int = 32
    """Width."""
    heads: int | None = None
    """Heads; by default as many as make each 2 wide."""
    vocab: int | None = None
    """Vocabulary V, 128 by default; of --data if it does not say it itself."""
    length: int | None = None
    """Tokens a sequence, S, 16 by default; of --data if it does not say it itself."""
    count: int | None = None
    """Sequences in the data set, 400 by default."""
    data_seed: int | None = None
    """Of the tokens, 0 by default; --seed is of the initialization and the order."""
    structure: Annotated[Structure, Flat] = field(default_factory=Structure)
    data: Path | None = None
    """A file to train on instead: one of fastmem generate or of another program."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, …"""
    out: Path = Path("model")
    """Folder of the model."""
    profile: bool = False
    """Print where the time went, and write a Chrome trace of 20 steps to trace.json in --out."""
    train: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Score:
    """Counts the bits of a data set that a model holds. Without flags the data set is the one
    that `fastmem train` trained the model on.

    Example: fastmem score model --held-out 1000, fastmem score model --quantize 8 4 3 2
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a model that fastmem or transformers wrote (GPT-2)."""
    count: int | None = None
    """Sequences in the data set."""
    vocab: int | None = None
    """Vocabulary."""
    length: int | None = None
    """Tokens a sequence."""
    data_seed: int | None = None
    """Of the tokens."""
    structure: Annotated[Structure, Flat] = field(default_factory=Structure)
    data: Path | None = None
    """A file to score instead: one of fastmem generate or of another program."""
    held_out: int | None = None
    """Score this many sequences that follow the data set instead of the set itself."""
    precision: Precision | None = None
    """fp32, bf16-mixed or bf16-true; by default that of the training, else fp32."""
    quantize: tuple[int, ...] = ()
    """Also count what survives in weights rounded to each of these numbers of bits, 2 to 8."""
    asymmetric: bool = False
    """Levels from the least to the greatest weight of a row, not from -max to max."""
    device: str = "cpu"
    """Where to compute."""
    out: Path | None = None
    """A .npy file for the bits of each sequence (float64)."""


def run_train(command: Train) -> int:
    sequences = _chosen(command, {"count": 400, "length": 16, "vocab": 128, "seed": 0})
    shape = GPTConfig(
        command.layers,
        command.width,
        default_heads(command.width) if command.heads is None else command.heads,
        sequences.vocab,
        sequences.length,
    )
    checked_device(command.device)
    run = RunSpec(shape, sequences, command.train)
    result_path = command.out / "run.json"
    if result_path.exists():
        raise ValueError(f"{command.out} holds a finished run: give another --out")
    check_fit(shape, sequences)
    command.out.mkdir(parents=True, exist_ok=True)
    checkpoint = command.out / "checkpoint.pt"
    with ExitStack() as profiling:
        profile = None
        if command.profile:
            profile = profiling.enter_context(
                profiled(command.out / "trace.json", torch.device(command.device))
            )
        row, model = execute(run, command.device, checkpoint, progress=True)
    if model is not None:
        if row["entropy_bits"] is None:
            bits = sequence_bits(model, sequences, command.train.precision, progress=True)
            row |= _code_length(bits, sequences)
        model.to_hf(command.out)
        write_json(result_path, row)
    if has_ended(row):
        checkpoint.unlink(missing_ok=True)
    say(row_line(row))
    if profile is not None:
        say(profile.table())
    return 0 if model is not None else 1


def run_score(command: Score) -> int:
    if not command.model.is_dir():
        raise ValueError(f"{command.model} is no folder: give that of a model")
    row: Row = {"sequences": {}, "precision": "fp32"}
    if (command.model / "run.json").exists():
        row = read_json(command.model / "run.json")
    sequences = _scored(command, row["sequences"])
    if command.held_out is not None:
        sequences = sequences.held_out(command.held_out)
    model = GPT.from_hf(command.model, command.device)
    symmetric = not command.asymmetric
    rounded = {width: quantized(model, width, symmetric) for width in command.quantize}
    precision = command.precision or row["precision"]
    bits = sequence_bits(model, sequences, precision, progress=True)
    if command.out is not None:
        buffer = io.BytesIO()
        np.save(buffer, bits)
        write_whole(command.out, buffer.getvalue())
    line = {"sequences": sequences.description(), **_counted(bits, sequences, model)}
    if rounded:
        line["quantized"] = {
            width: _counted(sequence_bits(copy, sequences, precision), sequences, copy)
            for width, copy in rounded.items()
        }
    print(json.dumps(line, indent=1))
    return 0


def _scored(command: Score, trained: dict[str, Any]) -> Sequences:
    """The data set that the flags name, else the one that the model was trained on."""
    flags = (command.count, command.length, command.vocab, command.data_seed, command.data)
    if all(flag is None for flag in flags) and command.structure == Structure() and trained:
        return from_description(trained)
    numbers = trained if trained.get("kind") == "uniform" else {}
    names = ("count", "length", "vocab", "seed")
    reason = "no run.json says which data set"
    if trained and not numbers:
        reason = f"run.json is of a {trained['kind']} set, whose flags it does not keep"
    known = {n: numbers[n] for n in names if n in numbers}
    return _chosen(command, {"seed": 0} | known, reason)


def _chosen(command: Train | Score, defaults: dict[str, int], reason: str = "") -> Sequences:
    """The data set that the flags name."""
    flags = {
        "count": command.count,
        "length": command.length,
        "vocab": command.vocab,
        "seed": command.data_seed,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    if command.data is not None:
        if given.keys() & {"count", "seed"} or command.structure != Structure():
            raise ValueError(
                f"--data {command.data} is a whole data set: give only --length and --vocab with it"
            )
        return opened(command.data, command.length, command.vocab)
    wanted = defaults | given
    missing = [f"--{name}" for name in ("count", "length", "vocab") if name not in wanted]
    if missing:
        raise ValueError(f"{reason}: give {missing}, or --data")
    return made(**wanted, structure=command.structure)


def _counted(bits: Floats, sequences: Sequences, model: GPT) -> Row:
    """The bits, as far as the entropy of the set is known."""
    line = _code_length(bits, sequences)
    if math.isnan(sequences.coded_entropy_bits):
        return line
    memorized = memorized_bits(bits, sequences)
    return line | {
        "entropy_bits": memorized.entropy_bits,
        "memorized_bits": {"strict": memorized.strict, "published": memorized.published},
        "share": memorized.share,
        "bits_per_parameter": {
            "strict": memorized.strict / model.parameter_count,
            "published": memorized.published / model.parameter_count,
        },
    }


def _code_length(bits: Floats, sequences: Sequences) -> Row:
    """What the whole set costs under the model, rows that stand in it twice counted twice."""
    coded = sequences.length - sequences.context
    return {"code_bits": float(bits.sum()), "bits_per_token": float(bits.mean()) / coded}
