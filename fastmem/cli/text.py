"""fastmem text: what models learned of a text, and what they memorized."""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import tyro

from fastmem.base.lock import locked
from fastmem.base.storage import Row, check_folder
from fastmem.base.terminal import INTERRUPTED, duration, say, show, table
from fastmem.cli.dataset import Flat
from fastmem.cli.score import default_device
from fastmem.data.corpus import prepare_text
from fastmem.data.documents import open_documents
from fastmem.data.text import TextCorpus
from fastmem.report.sections import interval
from fastmem.report.text_json import write_text_json
from fastmem.report.text_page import write_text_page
from fastmem.report.text_study import read_text_study
from fastmem.sweeps.config import SweepConfig
from fastmem.sweeps.driver import Sweep
from fastmem.sweeps.plan import CALIBRATION_SECONDS, plan, plan_runs
from fastmem.sweeps.references import ReferenceConfig, prepare_codes, runs_to_train
from fastmem.sweeps.store import STUDY, SWEEP, read_sequence_bits
from fastmem.sweeps.text_config import CORPUS, REFERENCE, TextConfig


@dataclass(frozen=True)
class TextGrid(TextConfig):
    """The grid, without what the corpus decides."""

    vocab: Annotated[int, tyro.conf.Suppress] = 256
    length: Annotated[int, tyro.conf.Suppress] = 64
    sequence_bits: Annotated[bool, tyro.conf.Suppress] = True
    device: str = "auto"
    """Where to train: auto (a GPU where there is one), cpu, cuda, cuda:1, …"""
    workers: int = 2
    """Processes that train side by side on this machine: one a GPU, or each with a part of the
    cores, which is faster for models as small as those of the defaults."""


@dataclass(frozen=True)
class CorpusFlags:
    """The text, and how it becomes sequences."""

    data: str | None = None
    """Another name of DATA."""
    tokenizer: str = "bytes"
    """bytes (V = 256), a tokenizer.json of tokenizers, or a folder of transformers."""
    train_tokenizer: int | None = None
    """Train a byte-level BPE of this many tokens on the reference split instead."""
    vocab: int | None = None
    """Vocabulary V, such as a model's padded vocabulary; by default that of the tokenizer."""
    length: int = 64
    """Tokens a sequence, S."""
    near_duplicates: float | None = None
    """Also remove documents whose Jaccard similarity to an earlier document is at least this."""
    fractions: tuple[float, float, float] = (0.4, 0.3, 0.3)
    """Fractions of documents to train on, held out, and for the reference."""
    split_seed: int = 0
    """Seed of the split of documents."""
    # "field" itself is the function of dataclasses.
    text_field: Annotated[str | None, tyro.conf.arg(name="field")] = None
    """Field of .jsonl; text by default."""
    column: str | None = None
    """Column of Parquet or Arrow; text by default."""
    errors: str = "strict"
    """How invalid UTF-8 is decoded: strict, replace, ignore or backslashreplace."""


@dataclass(frozen=True)
class Text:
    """Measures what models memorize of real text beyond what a model of the language knows: trains
    a grid of models on samples of DATA, a reference model on other documents of it, and codes every
    sequence with both and with compressors. Writes rows/*.json, text.json, text.html and figures/
    to --out. The same command resumes a stopped one. Without DATA the text is the standard library
    of Python.

    Example: fastmem text ~/notes --out text-of-my-notes
    """

    documents: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DATA]")] = None
    """A .txt, .jsonl or .parquet, a folder of these, or the name of a data set for datasets,
    NAME:CONFIG:SPLIT."""
    plan: bool = False
    """Only prepare the text, and print what is left to train: runs, tokens, FLOPs, memory, and the
    time on this device, estimated from ten seconds of training steps."""
    corpus: Annotated[CorpusFlags, Flat] = field(default_factory=CorpusFlags)
    codes: Annotated[ReferenceConfig, Flat] = field(default_factory=ReferenceConfig)
    capacity: Path | None = None
    """Folder of a fastmem capacity that gives the capacity of each model; by default the runs on
    uniform sequences."""
    uniform: bool = True
    """Also train the models on a few sets of uniform sequences, for capacity and for double descent
    where no model can learn a language."""
    # Not "text", which errors say of data: they would read as this flag.
    show_text: Annotated[bool, tyro.conf.arg(name="text")] = True
    """Show the text of sequences in text.html."""
    sweep: Annotated[TextGrid, Flat] = field(default_factory=TextGrid)


def run_text(command: Text) -> int:
    config: TextConfig = replace(command.sweep, device=default_device(command.sweep.device))
    _check_out(config)
    corpus = _prepared(command, config.out / CORPUS)
    config = config.of_corpus()
    say(corpus_line(corpus))
    if command.plan:
        show(_plan(command, config))
        return 0
    with Sweep(config) as running:
        if config.overwrite:
            shutil.rmtree(config.out / REFERENCE, ignore_errors=True)
        prepare_codes(config, command.codes, command.capacity)
        failed = _train(running, "text")
    if command.uniform and command.capacity is None:
        with Sweep(config.of_uniform()) as running:
            failed += _train(running, "uniform sequences")
    write_text_report(config.out, command.show_text)
    return 1 if failed else 0


def _plan(command: Text, config: TextConfig) -> str:
    """The cost of what is left: references, runs on text and on uniform sequences."""
    seconds = CALIBRATION_SECONDS / 3
    of_text = plan(config, seconds, progress=True)
    parts = {"runs on text": of_text}
    if references := runs_to_train(config, command.codes):
        parts["references"] = plan_runs(references, of_text.device, seconds)
    if command.uniform and command.capacity is None:
        parts["runs on uniform sequences"] = plan(config.of_uniform(), seconds)
    total = sum(part.seconds for part in parts.values())
    texts = [f"{name}\n{part.text()}" for name, part in parts.items()]
    return "\n\n".join([*texts, f"in all about {duration(total)}, without coding and the report"])


def write_text_report(folder: Path, show_text: bool) -> None:
    """Writes text.json, the figures and text.html of a text sweep, and prints the table."""
    study = read_text_study(folder)
    text = write_text_json(study)
    page = write_text_page(study, text, folder, show_text)
    show(f"{words(text)}\n\n{page}, figures in {folder}/figures/")


def text_defaults(flags: list[str]) -> Text:
    """The defaults: no steps where the flags give another budget, one worker on a GPU or Ray."""
    grid = TextGrid()
    if any(flag.startswith(("--epochs", "--seconds")) for flag in flags):
        grid = replace(grid, steps=None)
    if default_device() != "cpu" or any(flag.startswith(("--device", "--ray")) for flag in flags):
        grid = replace(grid, workers=1)
    return Text(sweep=grid)


def _check_out(config: SweepConfig) -> None:
    """Refuses a folder of something else, or at work, before anything is written there."""
    out = config.out
    if not config.overwrite:
        check_folder(out, {*SWEEP, CORPUS, REFERENCE}, "text sweep")
        if (out / "rows").exists() and not (out / STUDY).exists():
            raise ValueError(f"{out} is the folder of another sweep: give another --out")
    if (out / CORPUS).exists():
        with locked(out):  # another process must not read a corpus that this one replaces
            pass


def _prepared(command: Text, folder: Path) -> TextCorpus:
    flags, given = command.corpus, command.documents
    if given is not None and flags.data is not None:
        raise ValueError(f"DATA {given} and --data {flags.data}: give one of the two")
    data = given if flags.data is None else flags.data
    reading: dict[str, Any] = {
        "field": flags.text_field,
        "column": flags.column,
        "errors": flags.errors,
    }
    return prepare_text(
        None
        if data is None
        else open_documents(data, without=command.sweep.out, only_text=True, **reading),
        folder,
        length=flags.length,
        tokenizer=flags.tokenizer,
        train_tokenizer=flags.train_tokenizer,
        vocab=flags.vocab,
        fractions=flags.fractions,
        seed=flags.split_seed,
        near_duplicates=flags.near_duplicates,
        **reading,
        overwrite=command.sweep.overwrite,
        progress=True,
    )


def corpus_line(corpus: TextCorpus) -> str:
    """What was read, removed and left out."""
    n, splits = corpus.counts, corpus.counts["splits"]
    line = (
        f"{n['documents']:,} documents, {n['bytes'] / 1e6:,.1f} MB: {splits['train']:,} sequences "
        f"to train on, {splits['test']:,} held out, {splits['reference']:,} for the reference; "
        f"{n['exact_duplicates']:,} duplicates removed"
    )
    if n["near_duplicates"]:
        line += f", and {n['near_duplicates']:,} documents that are nearly equal"
    if corpus.skipped:
        more = f" and {len(corpus.skipped) - 3:,} more" if len(corpus.skipped) > 3 else ""
        line += f"; left out {', '.join(corpus.skipped[:3])}{more}"
    return line


def _train(running: Sweep, what: str) -> int:
    """Trains the runs that are left; returns how many failed."""
    done, runs = running.count("done"), len(running.runs)
    say(f"{runs} runs on {what}, {done} done and skipped, in {running.config.out}")
    for number, row in enumerate(running, done + 1):
        say(f"[{number}/{runs}] {_line(row, running.config.out)}")
        if INTERRUPTED.is_set():
            raise KeyboardInterrupt
    return running.count("failed")


def _line(row: Row, folder: Path) -> str:
    if row["status"] == "failed":
        return f"{row['key']}  failed: {row['error']}"
    members, _ = read_sequence_bits(folder, row["key"])
    bits = float(members.mean()) / (row["model"]["length"] - 1)
    return f"{row['key']}  {bits:.3f} bits a training token, {duration(row['seconds'])}"


def words(text: Row) -> str:
    """A table of net unintended memorization, and the canaries."""
    head = ("model", "sequences", "bits of data", "unintended, net", "a parameter", "test bits")
    rows = [head]
    for model in text["models"]:
        for size in model["sizes"]:
            runs = [run for run in model["runs"] if run["count"] == size["count"]]
            net = size["unintended_bits"]["reference"]["net"]
            rows.append(
                (
                    f"{model['layers']} × {model['width']}",
                    f"{size['count']:,}",
                    f"{mean(run['entropy_bits']['reference'] for run in runs):,.0f}",
                    interval(net, ",.0f"),
                    f"{net['estimate'] / model['parameters']:.2f}",
                    f"{mean(run['test_bits_per_token'] for run in runs):.2f}",
                )
            )
    lines = [table(rows, rule=True)]
    if found := text["canaries"]:
        planted, others = (found[name]["unintended_bits"] for name in ("planted", "held_out"))
        lines.append(
            f"canaries of {found['planted']['entropy_bits']:,.0f} bits: "
            f"{interval(planted, ',.0f')} unintended bits where planted, "
            f"{interval(others, ',.0f')} where never trained on"
        )
    return "\n".join(lines)
