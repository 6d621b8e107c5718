"""Jobs of several ranks that score documents; started by `rank_jobs.launched`."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastmem.kernels.reference import TokenStats
from numpy.typing import NDArray

import fastmem
from fastmem.base import lock
from fastmem.base.ranks import Ranks
from fastmem.models.causal import lm
from fastmem.models.causal.lm import CausalLM
from fastmem.models.scoring.folder import ScoreFolder
from fastmem.models.sharded import sharded_from_hf

SEQUENCES = fastmem.UniformSequences(50, length=12, vocab=50, seed=2)
BATCH = {"batch_tokens": 16, "context": 32}
"""Chunks of 512 tokens."""


def documents() -> list[NDArray[np.int64]]:
    """Documents, of which one takes several chunks; 12 chunks in all."""
    draw = np.random.default_rng(4)
    return [draw.integers(0, 100, n) for n in (0, 1, 2, 40, 700, 3000, 33, 5, 900, 64, 800, 1)]


def small() -> fastmem.GPT:
    """A model whose process starts soon, without transformers."""
    return fastmem.GPT(fastmem.GPTConfig(1, 16, 2, vocab=100, length=32), 5)


def scored(job: Ranks, folders: dict[str, str]) -> dict[str, Any]:
    """Sums of scores, by what was scored; folders of scores beside them."""
    found: dict[str, Any] = {}
    for name in ("Llama", "GPT2"):
        for shard in (False, True):
            out = Path(folders["out"], f"{name}-{shard}")
            fastmem.score(folders[name], documents(), out, shard=shard, **BATCH)
            one = fastmem.score(folders[name], [[5, 1, 2, 7]], shard=shard)
            found[f"{name}-{shard}"] = one.summary["bits"]
    memory = fastmem.score(folders["Llama"], documents(), tokens=True, **BATCH)
    assert memory.tokens is not None
    found["memory"] = [memory.documents["bits"].tolist(), memory.tokens["bits"].sum().item()]
    whole, parts = fastmem.GPT.from_hf(folders["GPT"]), sharded_from_hf(folders["GPT"])
    found["sequences"] = [fastmem.sequence_bits(m, SEQUENCES).tolist() for m in (whole, parts)]
    if job.rank == 1:
        lm.TOLERANCE = -1.0  # the proof of its bits fails
    found["through"] = fastmem.score(folders["Llama"], documents(), **BATCH).summary["through"]
    lm.TOLERANCE = 1e-3
    found["errors"] = errors(job, folders)
    return found


def errors(job: Ranks, folders: dict[str, str]) -> dict[str, str | None]:
    """The error of each misuse, by name."""
    found: dict[str, str | None] = {}

    def tried(name: str, model: Any, data: Any = None, out: Any = None, **options: Any) -> None:
        try:
            fastmem.score(model, [[1, 2]] if data is None else data, out, **options)
            found[name] = None
        except (ValueError, OSError) as error:
            found[name] = str(error)

    lock.SEEN_SECONDS = 1
    llama, own = folders["Llama"], Path(folders["out"], f"of-{job.rank}")
    tried("device_map", llama, device_map="auto")
    tried("quantization", llama, quantization="4bit", shard=True)
    tried("in memory", small(), shard=True)
    for kind in ("gguf", "adapter", "quantized"):
        tried(kind, folders[kind], shard=True)
    tried("data", llama, [[1, 2 + job.rank]])
    tried("settings", llama, context=4 + job.rank)
    tried("folder", llama, out=own)
    tried("lock", llama, out=folders["locked"])
    tried("vocabulary", llama, [[1, 2], [1, 200]])
    return found


def broken(job: Ranks, argument: dict[str, Any]) -> int:
    """Scores into a folder; something happens to the second chunk of one rank."""
    folder = Path(argument["out"])

    def die(number: int) -> None:
        other = folder / "parts" / f"{number + 1:06d}.tokens.parquet"
        while not other.exists():  # so that a part lacks the part before
            time.sleep(0.01)
        os._exit(9)

    def full(number: int) -> None:
        raise OSError(28, "No space left on device", str(folder))

    actions: dict[str, Callable[[int], None]] = {"die": die, "full": full}
    if job.rank == argument["rank"] and argument["action"] in actions:
        add = ScoreFolder.add

        def added(self: ScoreFolder, number: int, chunk: Any, state: Any) -> None:
            if number >= 2:
                actions[argument["action"]](number)
            add(self, number, chunk, state)

        ScoreFolder.add = added  # type: ignore[method-assign]
    if job.rank == argument["rank"] and argument["action"] == "nan":
        CausalLM.token_stats = _nan  # type: ignore[assignment, method-assign]
    fastmem.score(small(), documents(), folder, **BATCH)
    return 0


def _nan(self: CausalLM, inputs: torch.Tensor, targets: torch.Tensor, **_: Any) -> TokenStats:
    return TokenStats(torch.full(inputs.shape, torch.nan), None, None, None, None, None)
