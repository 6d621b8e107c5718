"""fastmem score: count the bits of a data set that one model memorized."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fastmem.base.arguments import user_path
from fastmem.base.ranks import active, do_first, joined, launched
from fastmem.base.stats import Floats
from fastmem.base.storage import Row, read_json
from fastmem.base.terminal import table
from fastmem.cli.dataset import Flat, ScoredDataset, Structure
from fastmem.cli.flags import named
from fastmem.cli.job import check_same
from fastmem.cli.score_documents import (
    DocumentFlags,
    bits_after,
    is_token_set,
    run_documents,
    score_folder,
    split_dtype,
    write_bits,
)
from fastmem.data.sequences import Sequences, from_description
from fastmem.memorization.bits import memorized_bits
from fastmem.models.causal.sharded import check_shardable
from fastmem.models.engine import Precision
from fastmem.models.gpt import GPT, GPTConfig
from fastmem.models.hf import read_config
from fastmem.models.quantize import quantized
from fastmem.models.score import sequence_bits
from fastmem.models.scoring.folder import PAGE
from fastmem.models.sharded import sharded_from_hf


@dataclass(frozen=True)
class ScoredData(ScoredDataset):
    """The data to score, where it is not a positional argument."""

    data: Path | None = None
    """Another name of DATA."""
    dtype: str | None = None
    """Type of the weights: auto, float32, bfloat16 or float16; or, such as uint32, type of the
    tokens in a .bin that does not record it."""
    column: str | None = None
    """Column of Parquet or Arrow, or tensor of safetensors: text, input_ids or the only one by
    default."""


@dataclass(frozen=True)
class Score:
    """Counts the bits of documents under any causal language model, a token at a time, and writes
    them with --out as tables and a page. Without DATA: counts the bits that a model of fastmem
    memorized of the data set that `fastmem train` trained it on. Under torchrun the ranks share the
    data (docs/large.md).

    Example: fastmem score SmolLM2.gguf texts/ --out scores
    """

    # Text, since a Path drops the leading ./ that makes a missing folder no name on the hub.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Folder of a model of fastmem or transformers, a hub name, a GGUF file, or a PEFT adapter."""
    documents: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DATA]")] = None
    """A .txt, .jsonl, .parquet, .arrow or token file, a folder of these, or the name of a data set
    for datasets, NAME:CONFIG:SPLIT."""
    dataset: Annotated[ScoredData, Flat] = field(default_factory=ScoredData)
    texts: Annotated[DocumentFlags, Flat] = field(default_factory=DocumentFlags)
    held_out: int | None = None
    """Score this many sequences that follow the data set, instead of the data set."""
    precision: Precision | None = None
    """Of a model of fastmem: fp32, bf16-mixed or bf16-true; by default the precision of the
    training, else fp32. A folder as --out has the bits in the type of the weights."""
    quantize: tuple[int, ...] = ()
    """Also score a model of fastmem with weights rounded to each of these numbers of bits, 2 to
    8."""
    asymmetric: bool = False
    """Quantization levels from the least to the greatest weight of a row, not from -max to max."""
    device: str = "auto"
    """Where to compute: auto (a GPU where there is one), cpu, cuda, cuda:1, …"""
    shard: bool = False
    """Under torchrun: spread the layers of the model over all ranks, for a model that is larger
    than a GPU."""
    json: bool = False
    """Print all numbers as JSON, for programs."""
    out: Path | None = None
    """Folder for tokens.parquet, documents.parquet, summary.json and score.html; or a .npy file for
    the bits of each document (float64). The same command resumes a stopped run, except with
    --overwrite, which begins again."""


@dataclass(frozen=True)
class _StructuredData(ScoredData):
    structure: Annotated[Structure, Flat] = field(default_factory=Structure)


@dataclass(frozen=True)
class StructuredScore(Score):
    """Score with the flags of structure that 0.1.0 had, which the help leaves out."""

    dataset: Annotated[_StructuredData, Flat] = field(default_factory=_StructuredData)


def run_score(command: Score) -> int:
    if not launched():
        return _run(command)
    with joined(command.device) as job:
        check_same(job)
        return _run(replace(command, device=f"{job.device}"))


def _run(command: Score) -> int:
    dataset, data = command.dataset, command.documents
    if data is not None and dataset.data is not None:
        raise ValueError(f"DATA {data} and --data {dataset.data}: give one")
    if data is None and dataset.data is not None:
        data = f"{dataset.data}"
    model = user_path(command.model)
    if data is None or is_token_set(model, user_path(data)):
        path = None if data is None else user_path(data)
        return _run_memorized(replace(command, dataset=replace(dataset, data=path)), model)
    for name in ("held_out", "precision", "quantize", "asymmetric"):
        if getattr(command, name) != getattr(Score, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is for a model of fastmem and a data set of tokens: "
                "leave it out"
            )
    for name, value in (("count", dataset.count), ("data-seed", dataset.data_seed)):
        if value is not None:
            raise ValueError(f"--{name} {value} makes a data set: leave it or DATA out")
    return run_documents(
        command.model,
        data,
        dataset,
        command.texts,
        command.device,
        command.out,
        command.json,
        command.shard,
    )


def _run_memorized(command: Score, path: Path) -> int:
    """The bits that a model of fastmem memorized of a set of sequences."""
    weights, tokens = split_dtype(command.dataset.dtype)
    is_folder = command.out is not None and command.out.suffix != ".npy"
    if not is_folder:
        changed = [n for n, v in vars(command.texts).items() if v != getattr(DocumentFlags, n)]
        if changed or weights != "auto":
            name = changed[0].replace("_", "-") if changed else "dtype"
            raise ValueError(f"--{name} is for documents: give DATA, or a folder as --out")
    elif command.precision is not None:
        raise ValueError(
            f"--precision {command.precision} with a folder as --out, which has the bits in the "
            "type of the weights: leave --precision out, or give --dtype"
        )
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory: give the folder of a model, or DATA")
    if not (path / "config.json").exists():
        raise ValueError(f"{path} lacks config.json of a model: give a model's folder")
    row: Row = {"sequences": {}, "precision": "fp32"}
    if (path / "run.json").exists():
        row = read_json(path / "run.json")
    sequences = _scored_data(replace(command.dataset, dtype=tokens), row["sequences"])
    if command.held_out is not None:
        with named("count", "--held-out"):
            sequences = sequences.held_out(command.held_out)
    if job := active():
        check_same(job, sequences)
    precision: Precision = "fp32" if is_folder else command.precision or row["precision"]
    model = _gpt(command, path, precision, is_folder)
    symmetric = not command.asymmetric
    with named("bits", "--quantize"):
        rounded = {width: quantized(model, width, symmetric) for width in command.quantize}
    if is_folder and command.out is not None:
        flags = command.texts
        device, shard = command.device, command.shard
        score_folder(command.model, sequences, command.out, flags, weights, device, shard=shard)
        out = command.out
        bits = do_first(lambda: bits_after(out, sequences.context))
    else:
        bits = sequence_bits(model, sequences, precision, progress=True)
        if command.out is not None:
            write_bits(command.out, bits)
    result = {"sequences": sequences.description(), **_scores(bits, sequences, model)}
    if rounded:
        result["quantized"] = {
            width: _scores(
                sequence_bits(copy, sequences, precision, progress=True), sequences, copy
            )
            for width, copy in rounded.items()
        }
    lines = _words(result, sequences) + [f"{command.out}/{PAGE}"] * is_folder
    print(json.dumps(result, indent=1) if command.json else "\n".join(lines))
    return 0


def _gpt(command: Score, path: Path, precision: Precision, is_folder: bool) -> GPT:
    """The model, all of it or the part of this rank; for a folder as --out its shape."""
    if is_folder and not command.quantize:
        return GPT(read_config(path, GPTConfig)[0], device="meta")
    if not command.shard:
        return GPT.from_hf(path, default_device(command.device))
    if command.quantize:
        raise ValueError("--quantize needs whole weights: leave --shard out")
    check_shardable(path)
    return sharded_from_hf(path, precision)


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
        coded = sequences.coded_entropy_bits
        lines = [f"{what}: {coded:,.0f} bits of entropy in coded tokens"]
        share, strict = result["share"], result["memorized_bits"]["strict"]
        lines.append(f"The model memorized {strict:,.0f} bits, {share:.1%} of this entropy.")
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


def _scored_data(flags: ScoredData, trained: dict[str, Any]) -> Sequences:
    """The data set that the flags choose, else the one in run.json."""
    if flags == ScoredData() and trained:
        return from_description(trained)
    reason = "no DATA is given, and no run.json records the data set"
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
