"""Complete rows of runs that were never trained, and helpers of the tests of sweeps."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmem import GPTConfig, SweepConfig, TrainConfig, UniformSequences, sweep
from fastmem.base.storage import write_json
from fastmem.cli.main import main

TINY = SweepConfig(
    width=(8, 12), vocab=16, length=4, counts=(4, 8), seeds=(0, 1), steps=12, heads=(2,)
)


def command(*arguments: object) -> int:
    """The exit code of a fastmem command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def put(folder: Path, *rows: dict[str, Any], age: float = 0.0) -> None:
    """Writes rows into a sweep's folder, as if `age` seconds ago."""
    for one in rows:
        path = folder / "rows" / f"{one['key']}.json"
        write_json(path, one)
        os.utime(path, (time.time() - age,) * 2)


def finish(config: SweepConfig) -> list[dict[str, Any]]:
    return list(sweep(config, progress=False))


def row(
    width: int = 8,
    count: int = 8,
    seed: int = 0,
    precision: str = "fp32",
    bits: float = 2.5,
    layers: int = 1,
) -> dict[str, Any]:
    """The row of a finished run that memorized `bits` bits per parameter."""
    shape = GPTConfig(layers, width, 2, 16, 4)
    sequences = UniformSequences(count, 4, 16, seed)
    strict = bits * shape.parameter_count
    points = [(9, 0.9, 0.99 * strict), (10, 1.0, strict)]
    return {
        "schema": 1,
        "key": f"{layers}x{width}-h2-{precision}-n{count}-seed{seed}",
        "status": "done",
        "error": None,
        "model": vars(shape),
        "parameters": shape.parameter_count,
        "precision": precision,
        "seed": seed,
        "sequences": sequences.description(),
        "train": vars(TrainConfig(steps=10, precision=precision, seed=seed)),  # type: ignore[arg-type]
        "entropy_bits": sequences.entropy_bits,
        "coded_entropy_bits": sequences.coded_entropy_bits,
        "memorized_bits": {"strict": strict, "published": strict * 4 / 3},
        "epochs": 10.0,
        "steps": 10,
        "seconds": 1.0,
        "tokens_per_second": 4.0 * 10 * count,
        "curve": [dict(zip(("step", "seconds", "memorized_bits"), p, strict=True)) for p in points],
        "peak_bytes": 1 << 20,
        "device": "cpu: none",
        "threads": 1,
        "version": "0",
        "commit": None,
        "torch": "0",
        "python": "3",
    }


VARY = {"seconds", "tokens_per_second", "flops_per_second", "mfu", "peak_bytes"}


def constant(value: Any) -> Any:
    """A row without the fields that differ between two runs of the same config."""
    if isinstance(value, dict):
        return {key: constant(v) for key, v in value.items() if key not in VARY}
    return [constant(v) for v in value] if isinstance(value, list) else value


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The bytes of a folder's rows, without times and memory, and of its other tables."""
    found = {path.name: path.read_bytes() for path in (folder / "sequence_bits").glob("*")}
    for path in (folder / "rows").glob("*.json"):
        row = constant(json.loads(path.read_text()))
        del row["checksum"]
        found[path.name] = json.dumps(row).encode()
    return found


def serial(config: SweepConfig) -> Path:
    """Trains a sweep with one thread of this process; returns its folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = finish(config)
    finally:
        torch.set_num_threads(threads)
    assert {row["status"] for row in rows} == {"done"}
    return config.out
