"""Runs and their rows: config, result and environment."""

import platform
import resource
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from math import isnan, nan
from pathlib import Path
from typing import Any, get_args

import torch

from fastmem.base.storage import Row
from fastmem.data.sequences import GENERATOR, Sequences
from fastmem.memorization.bits import published_bits
from fastmem.memorization.capacity import summarize
from fastmem.memorization.convergence import extrapolated
from fastmem.memorization.scaling_law import Convention, law_of_rows
from fastmem.models.gpt import GPTConfig
from fastmem.sweeps.membership import membership_rows
from fastmem.sweeps.membership_laws import compared, study_of
from fastmem.sweeps.store import SCHEMA, load_rows, models_of, planned_work
from fastmem.training.config import TrainConfig
from fastmem.training.curve import Point
from fastmem.training.run_state import TrainResult


@dataclass(frozen=True)
class RunSpec:
    """One model and the data set to train it on: a row of the sweep."""

    model: GPTConfig
    sequences: Sequences
    train: TrainConfig
    held_out: Sequences | None = None
    """What --sequence-bits scores beside the data set; None: as many held-out sequences."""

    @property
    def key(self) -> str:
        """The name of the run in the folder: every axis of the grid."""
        m, n = self.model, self.sequences.count
        return f"{m.layers}x{m.width}-h{m.heads}-{self.train.precision}-n{n}-seed{self.train.seed}"


def make_row(run: RunSpec, device: torch.device, outcome: TrainResult | str) -> Row:
    """The row of a run from its result, or from the reason of its failure."""
    result = outcome if isinstance(outcome, TrainResult) else None
    error = None if result else outcome
    strict = result.memorized_bits if result else nan
    published = published_bits(strict, run.sequences)
    rates = run.train.for_shape(run.model)
    return {
        "schema": SCHEMA,
        "key": run.key,
        "status": "failed" if error else "done",
        "error": error,
        "model": asdict(run.model),
        "parameters": run.model.parameter_count,
        "precision": run.train.precision,
        "seed": run.train.seed,
        "sequences": run.sequences.description(),
        "generator": GENERATOR,
        "train": asdict(run.train),
        "peak_rates": {name: getattr(rates, name) for name in ("lr", "embedding_lr")},
        "entropy_bits": _known(run.sequences.entropy_bits),
        "coded_entropy_bits": _known(run.sequences.coded_entropy_bits),
        "memorized_bits": {"strict": _known(strict), "published": _known(published)},
        "epochs": result and result.epochs,
        "steps": result and result.steps,
        "seconds": result and result.seconds,
        "tokens_per_second": result and result.tokens_per_second,
        "flops_per_second": result and result.flops_per_second,
        "mfu": result and result.mfu,
        "curve": [_point(point) for point in result.curve] if result else [],
        "stopped_by": result and result.stopped_by,
        "stages": [_point(point) for point in result.stages] if result else [],
        "extrapolated_bits": result and _extrapolated(result, run.sequences),
        "peak_bytes": _peak_bytes(device),
        **environment(device),
    }


def report(folder: Path, rows: list[Row] | None = None) -> dict[str, Any]:
    """The content of capacity.json from the rows in the folder; ValueError if it has no rows."""
    rows = load_rows(folder) if rows is None else rows
    if not rows:
        raise ValueError(f"{folder} has no rows: run `fastmem capacity --out {folder}` first")
    last = next((row for row in reversed(rows) if row["status"] == "done"), rows[-1])
    here = {name: last[name] for name in ("version", "commit", "torch", "device")}
    seconds = sum(row["seconds"] or 0.0 for row in rows)
    done = {row["key"] for row in rows if row["status"] == "done"}
    work, search = planned_work(folder)
    runs = {"done": len(done), "planned": None if search else len(done | work.keys())}
    if search:
        runs["searched"] = models_of(work.keys() - done)
    found = {**summarize(rows), "law": _law(rows), "runs": runs, **here, "seconds": seconds}
    membership = membership_rows(folder, rows)
    if not membership:
        return found
    return found | {"membership": membership, "membership_law": _membership_law(membership)}


def _membership_law(records: list[Row]) -> Row | None:
    """The forms of the law and their errors on models left out; None for too few models."""
    try:
        return compared(study_of(records))
    except ValueError:
        return None


def _law(rows: list[Row]) -> Row:
    """The scaling law in both conventions, or why the rows do not give one."""
    try:
        return {c: law_of_rows(rows, convention=c).to_dict() for c in get_args(Convention)}
    except ValueError as reason:
        return {"strict": None, "published": None, "why_not": str(reason)}


def environment(device: torch.device) -> Row:
    """Device, threads and versions: what a result depends on besides its config."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "version": _version("fastmem-lm"),
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": sys.version.split()[0],
    }


@cache
def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    options = ["--always", "--dirty", "--exclude=*", "--abbrev=40"]
    command = ["git", "-C", str(root), "describe", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss begins with that of the process that started this one.
    with suppress(OSError, IndexError):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _extrapolated(result: TrainResult, sequences: Sequences) -> dict[str, float | None] | None:
    """Strict bits; None if fewer than three stages ended, or their bits are unknown."""
    bits = [stage.memorized_bits for stage in result.stages]
    if len(bits) < 3 or isnan(bits[-1]):
        return None
    return extrapolated(bits, sequences.coded_entropy_bits).to_dict()


def _point(point: Point) -> Row:
    """A point without nan; `sampled`, `low` and `high` only where a sample was scored."""
    values = asdict(point) | {"memorized_bits": _known(point.memorized_bits)}
    if point.sampled is None:
        del values["sampled"], values["low"], values["high"]
        return values
    return values | {name: _known(values[name]) for name in ("low", "high")}


def _known(bits: float) -> float | None:
    """None for nan, which JSON cannot hold."""
    return None if isnan(bits) else bits
