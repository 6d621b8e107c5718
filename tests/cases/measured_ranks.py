"""A rank that trains small models and prints, for each, the greatest growth of its memory."""

import gc
import json
import sys
import threading
from pathlib import Path

from fastmem.base.ranks import joined
from fastmem.data.uniform import UniformSequences
from fastmem.models.gpt import GPTConfig
from fastmem.models.sharded import Sharding, sharded_gpt
from fastmem.training.config import TrainConfig
from fastmem.training.trainer import train

SHAPE = GPTConfig(4, 384, 6, 8192, 64)
COUNT = 16


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def watched(stop: threading.Event, most: list[int]) -> None:
    while not stop.wait(0.003):
        most[0] = max(most[0], resident())


def grown(precision: str, recompute: str) -> int:
    gc.collect()
    before, stop = resident(), threading.Event()
    most = [before]
    thread = threading.Thread(target=watched, args=(stop, most))
    thread.start()
    model = sharded_gpt(SHAPE, 0, precision, Sharding(recompute))  # type: ignore[arg-type]
    config = TrainConfig(precision=precision, steps=2, batch=COUNT)  # type: ignore[arg-type]
    train(model, UniformSequences(COUNT, SHAPE.length, SHAPE.vocab), config, progress=False)
    stop.set()
    thread.join()
    return most[0] - before


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    with joined("cpu") as job:
        for precision in dict.fromkeys(precision for precision, _ in cases):
            grown(precision, "none")  # loads libraries
        found = [grown(*case) for case in cases]
        print(json.dumps(found))
