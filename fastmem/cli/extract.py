"""fastmem extract: how much of its training sequences a model returns."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastmem.base.arguments import user_path
from fastmem.base.storage import Row, read_json
from fastmem.base.terminal import show, table
from fastmem.cli.dataset import Flat
from fastmem.cli.flags import named
from fastmem.cli.score_documents import TextFlags, TokenFileFlags, split_dtype
from fastmem.data.sequences import Sequences, from_description
from fastmem.models.causal.load import RUN
from fastmem.models.extraction.folder import PAGE
from fastmem.models.extraction.run import PREFIXES, STRIDE, extract, held_out_of
from fastmem.report.extraction_page import rate, verdict, way_in_words, write_extraction_page


@dataclass(frozen=True)
class Extract:
    """Measures how often greedy decoding and samples return the rest of a training sequence after
    a prefix, beside held-out sequences, which the model can only predict. Without DATA: of the
    data set that `fastmem train` trained the model on.

    Example: fastmem extract SmolLM2.gguf seen.jsonl --test unseen.jsonl --out extracted
    """

    # Text, since a Path drops the leading ./ that makes a missing folder no name on the hub.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Folder of a model of fastmem or transformers, a hub name, a GGUF file, or a PEFT adapter."""
    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DATA]")] = None
    """The training sequences: documents or tokens, as fastmem score takes them."""
    test: str | None = None
    """Held-out sequences of the same kind, which the model was not trained on."""
    prefixes: tuple[int, ...] = PREFIXES
    """Tokens of the prefixes."""
    suffix: int | None = None
    """Tokens after the longest prefix, the rest is left out; by default all, with --slide 50."""
    temperatures: tuple[float, ...] = (1.0,)
    """Temperatures of sampling."""
    top_k: int | None = None
    """Sample only among this many tokens."""
    samples: int = 100
    """Samples of each suffix."""
    probability: float = 0.5
    """A suffix is discoverable if --samples hold it with at least this probability."""
    decode: bool = False
    """Also decode, one token after another, and measure edit distances."""
    slide: bool = False
    """Measure windows of the longest prefix and --suffix all along each document."""
    stride: int = STRIDE
    """Tokens between the windows of --slide."""
    files: Annotated[TokenFileFlags, Flat] = field(default_factory=TokenFileFlags)
    texts: Annotated[TextFlags, Flat] = field(default_factory=TextFlags)
    device: str = "auto"
    """Where to compute: auto (a GPU where there is one), cpu, cuda, cuda:1, …"""
    json: bool = False
    """Print all numbers as JSON, for programs."""
    out: Path = Path("extraction")
    """Folder for sequences.parquet, extraction.json and extraction.html. The same command resumes
    a stopped run, except with --overwrite, which begins again."""


def run_extract(command: Extract) -> int:
    data: str | Sequences | None = command.data
    test: str | Sequences | None = command.test
    if data is None:
        data, test = own_sequences(user_path(command.model), command.test)
    weights, tokens = split_dtype(command.files.dtype)
    given: dict[str, Any] = {n: v for n, v in vars(command.texts).items() if n != "text"}
    with named("prefixes", "--prefixes"):
        found = extract(
            command.model,
            data,
            test,
            out=command.out,
            prefixes=command.prefixes,
            suffix=command.suffix,
            temperatures=command.temperatures,
            top_k=command.top_k,
            samples=command.samples,
            probability=command.probability,
            decode=command.decode,
            slide=command.slide,
            stride=command.stride,
            dtype=weights,
            device=command.device,
            token_dtype=tokens,
            length=command.files.length,
            vocab=command.files.vocab,
            column=command.files.column,
            progress=True,
            **given,
        )
    write_extraction_page(command.out, text=command.texts.text)
    if command.json:
        print(json.dumps(found, indent=1))
    else:
        show("\n".join([*words(found), f"{command.out}/{PAGE}"]))
    return 0


def own_sequences(folder: Path, test: str | None) -> tuple[Sequences, str | Sequences | None]:
    """The data set in run.json of a model, and as many held-out sequences, or `test`."""
    if not (folder / RUN).exists():
        raise ValueError(f"{folder} has no {RUN}, which names the data of its training: give DATA")
    sequences = from_description(read_json(folder / RUN)["sequences"])
    if test is not None:
        return sequences, test
    return sequences, held_out_of(sequences)


def words(found: Row) -> list[str]:
    """A sentence, a table of the rates, and what was left out."""
    head = ["prefix", "sequences", "of", "exact", "verbatim, mean", "longest"]
    ways = found["prefixes"][0]["train"]["sampled"]
    head += [f"at {way_in_words(way)}" for way in ways]
    rows = [head]
    short = 0
    for entry in found["prefixes"]:
        for name in ("train", "test"):
            if (of := entry[name]) is None:
                continue
            short = max(short, of["too_short"])
            matched = of["matched_tokens"]
            cells = [f"{entry['prefix']:,}", f"{of['sequences']:,}", name, rate(of["exact"])]
            cells += [f"{matched['mean']:,.1f}", f"{matched['longest']:,}"]
            rows.append([*cells, *(rate(way["discoverable"]) for way in of["sampled"])])
    lines = [verdict(found), "", table(rows, rule=True), ""]
    lines.append(
        f"At a temperature: the fraction whose suffix {found['samples']:,} samples hold with a "
        f"probability of at least {ways[0]['discoverable']['probability']:g}."
    )
    if found["slide"]:
        for of in ("train", "test"):
            runs = [run for run in found["slide"]["longest_runs"] if run["set"] == of]
            if runs:
                run = runs[0]
                where = f"from token {run['start']:,} of {run['source']}"
                lines.append(f"Longest verbatim run, {of}: {run['tokens']:,} tokens, {where}.")
    if short:
        lines.append(f"Up to {short:,} sequences are too short for a prefix and left out of it.")
    if found["reason"]:
        lines.append(found["reason"])
    return lines
