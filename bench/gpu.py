"""Training and bits per token on one GPU, beside what a user would run instead.

    python bench/gpu.py --folder DIR            everything, some minutes; a JSON file each in DIR
    python bench/gpu.py --folder DIR --only token_bits

- train: L 8, D 256, V 2048, S 64, batch 2048, bf16-mixed: tokens a second of fastmem.train without
  its scoring (timed by itself and taken off), its share of the GPU's matrix products (MFU), and the
  same of transformers' GPT-2 compiled, with fused AdamW.
- together: 40 models of L 1, D 32, trained as one and one after another.
- token_bits: forward and backward by CUDA events, with the second level cache as the last run left
  it (hot) and overwritten before each run (cold).

Answers are compared before anything is timed, rounds are interleaved, medians count. No GPU has run
this yet. Exits with 2 where there is none.

N rows, D width, V vocabulary, S tokens a sequence, B batch, E models.
"""

import argparse
import functools
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peer import Peer
from torch import Tensor

import fastmem
from fastmem import GPT, GPTConfig, TrainConfig, UniformSequences
from fastmem.rows import environment

SHAPES = [(8192, 32, 2048), (131072, 256, 2048), (8192, 768, 50257)]
CACHE_BYTES = 256 << 20
"""More than the second level cache of any GPU there is."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the JSON files")
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    parser.add_argument("--rounds", type=int, default=20)
    # So that a machine without a GPU can run every line of this.
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: this bench needs one", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    for name in [options.only] if options.only else PARTS:
        found = {**environment(device), **PARTS[name](device, options)}
        (options.folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


# Training.


def train(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    shape = GPTConfig(8, 256, 64, vocab=2048, length=64)
    batch, steps = 2048, 20
    if options.quick:
        shape, batch, steps = GPTConfig(2, 8, 2, vocab=64, length=8), 16, 2
    precision = "bf16-mixed"
    sequences = UniformSequences(batch, shape.length, shape.vocab)
    tokens = sequences.to_torch(device)
    model = GPT(shape, device=device)
    peer = Peer(model, compiled=not options.quick, precision=precision)
    ours, theirs = (
        float(fastmem.sequence_bits(model, sequences, precision).sum()),
        float(peer.bits(tokens).sum()),
    )
    if not math.isclose(ours, theirs, rel_tol=1e-3):
        sys.exit(f"{ours} bits here, {theirs} there: no speed of a wrong answer")

    config = TrainConfig(steps=4 * steps, batch=batch, lr=1e-3, precision=precision)
    scores = 0

    def train_ours() -> None:
        nonlocal scores
        scores = len(fastmem.train(model, sequences, config, progress=False).curve)

    def train_peer() -> None:
        for _ in range(steps):
            peer.step(tokens, 1e-3)

    times = interleaved(
        {
            "ours": train_ours,
            "scoring": lambda: fastmem.sequence_bits(model, sequences, precision),
            "peer": train_peer,
        },
        functools.partial(wall_seconds, device),
        rounds=min(3, options.rounds),
    )
    per_step = batch * shape.length
    training = times["ours"] - scores * times["scoring"]
    speed = 4 * steps * per_step / training
    peer_speed = steps * per_step / times["peer"]
    flops = fastmem.flops_per_token(shape)
    rate = fastmem.matmul_rate(device, torch.bfloat16)
    print(
        f"train L{shape.layers} D{shape.width} batch {batch}: {speed:,.0f} tokens/s, "
        f"MFU {speed * flops / rate:.1%}; peer {peer_speed:,.0f}, "
        f"MFU {peer_speed * flops / rate:.1%}; {speed / peer_speed:.2f}x (bars: 40 %, 3x)"
    )
    return {
        "shape": asdict(shape),
        "batch": batch,
        "tokens_per_second": {"ours": speed, "peer": peer_speed},
        "with_scoring": 4 * steps * per_step / times["ours"],
        "matmul_flops": rate,
        "mfu": {"ours": speed * flops / rate, "peer": peer_speed * flops / rate},
    }


# Bits per token.


def token_bits(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.float32 if options.quick else torch.bfloat16
    rows = []
    for shape in [(64, 8, 50)] if options.quick else SHAPES:
        for cold in (False, True):
            rows.append(time_token_bits(shape, dtype, cold, device, options.rounds, options.quick))
            times = ", ".join(f"{k} {1e3 * s:.3f}" for k, s in rows[-1]["seconds"].items())
            print(f"token_bits {shape} {'cold' if cold else 'hot'}, ms: {times}", flush=True)
    return {"dtype": str(dtype), "rows": rows}


def time_token_bits(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    cold: bool,
    device: torch.device,
    rounds: int,
    quick: bool,
) -> dict[str, Any]:
    N, D, V = shape
    draw = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, generator=draw, device=device).to(dtype)
    weight = (torch.randn(V, D, generator=draw, device=device) / D**0.5).to(dtype)
    targets = torch.randint(V, (N,), generator=draw, device=device)

    def run(loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        h, w = (x.detach().requires_grad_() for x in (hidden, weight))
        mean = loss(h, w, targets)
        mean.backward()
        return mean.detach(), h.grad, w.grad

    torch.compiler.reset()
    right = run(lambda h, w, t: eager(h.float(), w.float(), t))
    sides, refused = {}, {}
    for name, loss in losses(quick).items():
        try:
            got = run(loss)
        except Exception as error:  # a peer that cannot do this shape must not end the bench
            refused[name] = f"{type(error).__name__}: {error}"
            continue
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(got, right, strict=True))
        if error < (1e-4 if dtype == torch.float32 else 2e-2):
            sides[name] = functools.partial(run, loss)
        else:
            refused[name] = f"off by {error:.2g}"
    if "token_bits" in refused:
        sys.exit(f"token_bits: {refused['token_bits']}; no speed of a wrong answer")
    flush = torch.empty(CACHE_BYTES if cold else 0, dtype=torch.uint8, device=device)
    times = interleaved(sides, functools.partial(event_seconds, device, flush), rounds)
    return {"shape": shape, "cold": cold, "seconds": times, "not_timed": refused}


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def losses(quick: bool) -> dict[str, Loss]:
    """Ours and the peers that are installed, all means in nats of (hidden, weight, targets)."""
    made: dict[str, Loss] = {
        "token_bits": lambda h, w, t: fastmem.token_bits(h, w, t).mean() * math.log(2),
        "eager": eager,
    }
    if not quick:
        made["torch.compile"] = torch.compile(eager, dynamic=False)
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        made["F.linear_cross_entropy"] = F.linear_cross_entropy
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        made["cut-cross-entropy"] = linear_cross_entropy
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        made["Liger"] = lambda h, w, t: liger(w, h, t)
    return made


# Clocks.


def interleaved(
    sides: dict[str, Callable[[], Any]],
    seconds: Callable[[Callable[[], Any]], float],
    rounds: int,
) -> dict[str, float]:
    """The median of each over rounds in which every side runs once; the first round is no count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 + rounds):
        for name, run in sides.items():
            times[name].append(seconds(run))
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def wall_seconds(device: torch.device, run: Callable[[], Any]) -> float:
    """Until the device is done."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def event_seconds(device: torch.device, flush: Tensor, run: Callable[[], Any]) -> float:
    """By the device's own clock, waits for the program that feeds it included.

    Where `flush` has a size, it is what the caches hold before.
    """
    flush.zero_()
    if device.type != "cuda":
        return wall_seconds(device, run)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    wait(device)
    return start.elapsed_time(end) / 1e3


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


PARTS = {"train": train, "token_bits": token_bits}


if __name__ == "__main__":
    sys.exit(main())
