"""Rows of runs that were never trained, whole as `execute` writes them; what sweeps share."""

import json
from pathlib import Path
from typing import Any

import torch

from fastmem import GPTConfig, SweepConfig, TrainConfig, UniformSequences, sweep

TINY = SweepConfig(
    width=(8, 12), vocab=16, length=4, counts=(4, 8), seeds=(0, 1), steps=12, heads=(2,)
)


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
    """A finished run that holds `bits` a parameter."""
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
    """A row without what differs between two runs of the same config."""
    if isinstance(value, dict):
        return {key: constant(v) for key, v in value.items() if key not in VARY}
    return [constant(v) for v in value] if isinstance(value, list) else value


def bytes_of(folder: Path) -> dict[str, bytes]:
    """What is in the rows of a folder, but for times and memory, and in its other tables."""
    found = {path.name: path.read_bytes() for path in (folder / "sequence_bits").glob("*")}
    for path in (folder / "rows").glob("*.json"):
        row = constant(json.loads(path.read_text()))
        del row["checksum"]
        found[path.name] = json.dumps(row).encode()
    return found


def serial(config: SweepConfig) -> Path:
    """The folder of a sweep that one thread of this process has trained."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = finish(config)
    finally:
        torch.set_num_threads(threads)
    assert {row["status"] for row in rows} == {"done"}
    return config.out
