"""A rank that trains small models and prints, for each, the greatest growth of its memory."""

import gc
import json
import sys
from pathlib import Path

from fastmem.base.ranks import joined
from fastmem.data.uniform import UniformSequences
from fastmem.models.gpt import GPTConfig
from fastmem.models.sharded import Sharding, sharded_gpt
from fastmem.training.config import TrainConfig
from fastmem.training.trainer import train

SHAPE = GPTConfig(4, 384, 6, 8192, 64)
COUNT = 16


def resident(most: bool = False) -> int:
    """Resident bytes of this process, or the most since `grown` began."""
    name = "VmHWM:" if most else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def grown(precision: str, recompute: str) -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the most until now
    before = resident()
    model = sharded_gpt(SHAPE, 0, precision, Sharding(recompute))  # type: ignore[arg-type]
    config = TrainConfig(precision=precision, steps=2, batch=COUNT)  # type: ignore[arg-type]
    train(model, UniformSequences(COUNT, SHAPE.length, SHAPE.vocab), config, progress=False)
    return resident(most=True) - before


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    with joined("cpu") as job:
        for precision in ("fp32", "bf16-mixed"):
            grown(precision, "none")  # loads libraries
        found = [grown(*case) for case in cases]
        print(json.dumps(found))
