"""fastmem score: count the bits of a data set that one model memorized."""

import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from fastmem.base.stats import Floats
from fastmem.base.storage import Row, read_json, write_whole
from fastmem.base.terminal import table
from fastmem.cli.dataset import Flat, ScoredDataset as Dataset
from fastmem.data.sequences import Sequences, from_description
from fastmem.memorization.bits import memorized_bits
from fastmem.models.engine import Precision
from fastmem.models.gpt import GPT
from fastmem.models.quantize import quantized
from fastmem.models.score import sequence_bits


@dataclass(frozen=True)
class Score:
    """Counts the bits of a data set that a model memorized. Without flags it is the data set that
    `fastmem train` trained the model on.

    Example: fastmem score model --held-out 1000, fastmem score model --quantize 8 4 3 2
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a GPT-2 model, written by fastmem or transformers."""
    dataset: Annotated[Dataset, Flat] = field(default_factory=Dataset)
    held_out: int | None = None
    """Score this many sequences that follow the data set, instead of the data set."""
    precision: Precision | None = None
    """fp32, bf16-mixed or bf16-true; by default the precision of the training, else fp32."""
    quantize: tuple[int, ...] = ()
    """Also score the model with weights rounded to each of these numbers of bits, 2 to 8."""
    asymmetric: bool = False
    """Quantization levels from the least to the greatest weight of a row, not from -max to max."""
    device: str = "auto"
    """Where to compute: auto (a GPU where there is one), cpu, cuda, cuda:1, …"""
    json: bool = False
    """Print all numbers as JSON, for programs."""
    out: Path | None = None
    """Write the bits of each sequence to this .npy file (float64)."""


def run_score(command: Score) -> int:
    if not command.model.is_dir():
        raise ValueError(f"{command.model} is not a directory: give the folder of a model")
    row: Row = {"sequences": {}, "precision": "fp32"}
    if (command.model / "run.json").exists():
        row = read_json(command.model / "run.json")
    sequences = _scored_data(command.dataset, row["sequences"])
    if command.held_out is not None:
        sequences = sequences.held_out(command.held_out)
    model = GPT.from_hf(command.model, default_device(command.device))
    symmetric = not command.asymmetric
    rounded = {width: quantized(model, width, symmetric) for width in command.quantize}
    precision = command.precision or row["precision"]
    bits = sequence_bits(model, sequences, precision, progress=True)
    if command.out is not None:
        buffer = io.BytesIO()
        np.save(buffer, bits)
        write_whole(command.out, buffer.getvalue())
    result = {"sequences": sequences.description(), **_scores(bits, sequences, model)}
    if rounded:
        result["quantized"] = {
            width: _scores(sequence_bits(copy, sequences, precision), sequences, copy)
            for width, copy in rounded.items()
        }
    print(json.dumps(result, indent=1) if command.json else "\n".join(_words(result, sequences)))
    return 0


def _words(result: Row, sequences: Sequences) -> list[str]:
    """What was scored, a table of the model and of its rounded copies, and what it means."""
    copies = {f"{width}-bit weights": one for width, one in result.get("quantized", {}).items()}
    head = ["", "bits", "bits/token"]
    known = "memorized_bits" in result
    head += ["memorized, strict", "published", "of the entropy", "bits/parameter"] * known
    rows = [head]
    for name, one in {"model": result, **copies}.items():
        cells = [name, f"{one['code_bits']:,.0f}", f"{one['bits_per_token']:.3f}"]
        if known:
            bits = one["memorized_bits"]
            cells += [f"{bits['strict']:,.0f}", f"{bits['published']:,.0f}", f"{one['share']:.1%}"]
            cells.append(f"{one['bits_per_parameter']['strict']:.2f}")
        rows.append(cells)
    what = f"{sequences.count:,} sequences of {sequences.length:,} tokens"
    what += f", vocabulary {sequences.vocab:,}"
    lines = [f"{what}: the code length under the model"]
    if known:
        lines = [f"{what}, {result['entropy_bits']:,.0f} bits of entropy"]
        share, strict = result["share"], result["memorized_bits"]["strict"]
        lines.append(f"The model memorized {strict:,.0f} bits, {share:.1%} of the entropy.")
        if strict < 0:
            lines[-1] = f"The model memorized nothing: its code is {-strict:,.0f} bits longer than"
            lines.append("the entropy, since a trained model expects other sequences than these.")
    else:
        lines.append("Memorized bits are unknown, since the entropy of the data is.")
    return [*lines, "", table(rows, rule=True)]


def default_device(device: str = "auto") -> str:
    """The device; for auto a GPU where there is one, else the CPU."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def code_length(bits: Floats, sequences: Sequences) -> Row:
    """Bits to code the whole data set with the model; repeated rows count each time."""
    coded = sequences.length - sequences.context
    return {"code_bits": float(bits.sum()), "bits_per_token": float(bits.mean()) / coded}


def _scored_data(flags: Dataset, trained: dict[str, Any]) -> Sequences:
    """The data set that the flags choose, else the one in run.json."""
    if flags == Dataset() and trained:
        return from_description(trained)
    reason = "no run.json records the data set"
    defaults = {"seed": 0}
    if trained.get("kind") == "uniform":
        defaults |= {name: trained[name] for name in ("count", "length", "vocab", "seed")}
    elif trained:
        reason = f"run.json records a {trained['kind']} data set, without its flags"
    return flags.sequences(defaults, reason)


def _scores(bits: Floats, sequences: Sequences, model: GPT) -> Row:
    """The code length, and the memorized bits if the entropy is known."""
    result = code_length(bits, sequences)
    if math.isnan(sequences.coded_entropy_bits):
        return result
    memorized = memorized_bits(bits, sequences)
    return result | {
        "entropy_bits": memorized.entropy_bits,
        "memorized_bits": {"strict": memorized.strict, "published": memorized.published},
        "share": memorized.fraction,  # the key of 0.1.0
        "bits_per_parameter": {
            "strict": memorized.strict / model.parameter_count,
            "published": memorized.published / model.parameter_count,
        },
    }
