"""Rows of runs that were never trained, whole as `execute` writes them."""

from typing import Any

from fastmem import GPTConfig, TrainConfig, UniformSequences


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
