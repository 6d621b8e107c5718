"""What the prototypes share: how far an answer is off, a table, compilation side by side."""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BENCH = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCH))

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:  # repaired there
    sys.path.insert(0, str(BENCH.parent / "tests"))
    import cases.triton_interpreted  # noqa: F401


def off(ours: Tensor, exact: Tensor) -> float:
    """Of all entries together; NaN, which fails every comparison, if there is one."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


def kernels_us(run: Callable[[], Any]) -> float:
    from clocks import once, replayed

    once(run)
    return 1e6 * replayed(run, once(run).call)


def compile_all(work: Callable[[Any], Any], tasks: Sequence[Any]) -> None:
    """Each task once, in 14 processes; what is compiled stays on the disk."""
    with ProcessPoolExecutor(14, multiprocessing.get_context("spawn")) as pool:
        for task, error in zip(tasks, pool.map(work, tasks), strict=True):
            if error:
                print(f"{task}: {error}", flush=True)


def write(name: str, rows: list[dict[str, Any]], folder: str) -> None:
    if INTERPRETED:
        return
    from fastmem.sweeps.rows import environment

    found = {**environment(torch.device(DEVICE)), "date": date.today().isoformat(), "rows": rows}
    Path(folder, f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
