"""Training and bits per token on one GPU, against the alternatives in PyTorch.

    python bench/gpu.py --folder DIR            everything, some minutes; a JSON file each in DIR
    python bench/gpu.py --folder DIR --only token_bits

- train: tokens a second of fastmem.train in the second half of a run, without scoring (timed
  separately and subtracted), for each value of engine.STEP, to choose its default; model FLOPs
  utilization (MFU) and reserved memory; and the same for transformers' GPT-2 compiled (without
  CUDA graphs), with fused AdamW. V 2048, S 64, bf16-mixed.
- together: 40 models of L 1, D 32, trained together and one after another.
- token_bits: the forward pass and both passes by CUDA events, with the second-level cache as the
  last run left it (hot) and overwritten before each run (cold), and the memory of a forward pass.

Results are compared, and a wrong one ends the bench without a number; rounds are interleaved, and
medians count. No GPU has run this bench yet. Exits with 2 without a GPU.

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
import warnings
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
from fastmem.models import engine
from fastmem.sweeps.rows import environment

MODELS = [(GPTConfig(1, 32, 16, 2048, 64), 512, 400), (GPTConfig(8, 256, 64, 2048, 64), 2048, 20)]
"""Shape, batch, and an eighth of the steps."""
WAYS = ("eager", "graph", "compiled")
SHAPES = [(131072, d, 2048) for d in (64, 128, 256, 512)] + [(65536, 1600, 50257)]
CACHE_BYTES = 256 << 20
"""More than the second-level cache of any GPU."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the JSON files")
    parser.add_argument("--only", choices=PARTS, help="run this part alone")
    parser.add_argument("--rounds", type=int, default=20)
    # For tests without a GPU.
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("this bench needs a CUDA device, found none", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    for name in [options.only] if options.only else PARTS:
        found = {**environment(device), **PARTS[name](device, options)}
        (options.folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


# Training.


def train(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    models = [(GPTConfig(2, 8, 2, 64, 8), 16, 8)] if options.quick else MODELS
    return {"rows": [train_one(*model, device, options) for model in models]}


def train_one(
    shape: GPTConfig, batch: int, steps: int, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
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
        sys.exit(f"{ours} bits by fastmem, {theirs} by the peer: not timed")
    config = TrainConfig(steps=8 * steps, batch=batch, lr=1e-3, precision=precision)
    clock = functools.partial(wall_seconds, device)
    scoring = statistics.median(
        clock(lambda: fastmem.sequence_bits(model, sequences, precision)) for _ in range(5)
    )
    learnt: dict[str, float] = {}
    reserved: dict[str, int] = {}

    def step_of_ours(way: str) -> float:
        """Returns seconds a step in the second half of a run, when all is compiled."""
        engine.STEP, before = way, engine.STEP
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "a step goes into no CUDA graph")
            result = fastmem.train(GPT(shape, device=device), sequences, config, progress=False)
        engine.STEP = before
        learnt[way] = ours - sequences.coded_entropy_bits + result.memorized_bits
        reserved[way] = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
        late = [point for point in result.curve if point.step >= 4 * steps]
        seconds = late[-1].seconds - late[0].seconds - (len(late) - 1) * scoring
        return seconds / (late[-1].step - late[0].step)

    def step_of_peer() -> float:
        return clock(lambda: [peer.step(tokens, 1e-3) for _ in range(steps)]) / steps

    ways = WAYS[:1] if options.quick else WAYS
    sides = {way: functools.partial(step_of_ours, way) for way in ways} | {"peer": step_of_peer}
    times = interleaved(sides, lambda step: step(), rounds=min(2, options.rounds))
    if not all(
        gain > 0 and math.isclose(gain, learnt["eager"], rel_tol=0.1) for gain in learnt.values()
    ):
        sys.exit(f"bits learnt in the same steps: {learnt}: not timed")
    speeds = {side: batch * shape.length / seconds for side, seconds in times.items()}
    flops = fastmem.flops_per_token(shape)
    rate = fastmem.matmul_rate(device, torch.bfloat16)
    print(f"train L{shape.layers} D{shape.width} batch {batch} (bars at L8: MFU 40 %, 3x the peer)")
    for side, speed in speeds.items():
        print(
            f"  {side:8} {speed:12,.0f} tokens/s, MFU {speed * flops / rate:.1%}, "
            f"{speed / speeds['peer']:.2f}x"
        )
    return {
        "shape": asdict(shape),
        "batch": batch,
        "tokens_per_second": speeds,
        "scoring_seconds": scoring,
        "reserved_bytes": reserved,
        "matmul_flops": rate,
        "mfu": {side: speed * flops / rate for side, speed in speeds.items()},
    }


def together(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Times 40 models on sets near their capacity; a batch is the whole set."""
    shape, count, members, steps = GPTConfig(1, 32, 8, vocab=2048, length=64), 512, 40, 500
    if options.quick:
        shape, count, members, steps = GPTConfig(1, 8, 2, vocab=64, length=8), 16, 3, 2
    sets = [UniformSequences(count, shape.length, shape.vocab, seed=e) for e in range(members)]
    configs = [TrainConfig(steps=steps, batch=count, seed=e) for e in range(members)]

    def models() -> list[GPT]:
        return [GPT(shape, seed=e, device=device) for e in range(members)]

    def one_by_one() -> list[Any]:
        runs = zip(models(), sets, configs, strict=True)
        return [fastmem.train(*run, progress=False) for run in runs]

    def at_once() -> list[Any]:
        return fastmem.train_many(models(), sets, configs, progress=False)

    for e, (alone, member) in enumerate(zip(one_by_one(), at_once(), strict=True)):
        # The code length, not the memorized bits, which are few at the beginning.
        ours, its = (sets[e].coded_entropy_bits - r.memorized_bits for r in (member, alone))
        if not math.isclose(ours, its, rel_tol=1e-2):
            sys.exit(f"model {e}: {its} bits alone, {ours} together: not timed")
    times = interleaved(
        {"one by one": one_by_one, "together": at_once},
        functools.partial(wall_seconds, device),
        rounds=min(3, options.rounds),
    )
    ratio = times["one by one"] / times["together"]
    print(f"{members} models of L1 D32: together {ratio:.2f}x as fast as one by one (bar: 10x)")
    return {
        "shape": asdict(shape),
        "models": members,
        "steps": steps,
        "seconds": times,
        "ratio": ratio,
    }


# Bits per token.


def token_bits(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.float32 if options.quick else torch.bfloat16
    rows = []
    for shape in [(64, 8, 50)] if options.quick else SHAPES:
        for both in (False, True):
            for cold in (False, True):
                row = time_token_bits(shape, dtype, both, cold, device, options)
                rows.append(row)
                times = ", ".join(f"{k} {1e3 * s:.3f}" for k, s in row["seconds"].items())
                print(
                    f"token_bits {shape} {'both' if both else 'forward'} "
                    f"{'cold' if cold else 'hot'}, ms: {times}; ours {row['tflops']:.0f} TFLOP/s"
                    + f", {row['bytes_a_token']:.0f} bytes a token"
                    * (device.type == "cuda"),
                    flush=True,
                )
    return {"dtype": str(dtype), "rows": rows}


def time_token_bits(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    both: bool,
    cold: bool,
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, Any]:
    N, D, V = shape
    draw = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, generator=draw, device=device).to(dtype)
    weight = (torch.randn(V, D, generator=draw, device=device) / D**0.5).to(dtype)
    targets = torch.randint(V, (N,), generator=draw, device=device)

    def run(loss: Loss, gradients: bool = both, wide: bool = False) -> list[Tensor]:
        inputs = (x.double() if wide else x.detach() for x in (hidden, weight))
        h, w = (x.requires_grad_(gradients) for x in inputs)
        mean = loss(h, w, targets)
        if not gradients:
            return [mean]
        mean.backward()
        return [mean.detach(), h.grad, w.grad]

    torch.compiler.reset()
    offered = losses(options.quick)
    # Plain PyTorch in float64, some rows at a time; gradients, because a mean hides errors of rows.
    right = run(offered["token_bits"], gradients=True, wide=True)
    sides, refused = {}, {}
    for name, loss in offered.items():
        try:
            got = run(loss, gradients=True)
            run(loss)
        except Exception as error:  # a peer that fails at this shape must not end the bench
            refused[name] = f"{type(error).__name__}: {error}"
            continue
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(got, right, strict=True))
        if error < (1e-4 if dtype == torch.float32 else 2e-2):
            sides[name] = functools.partial(run, loss)
        else:
            refused[name] = f"off by {error:.2g}"
    if "token_bits" in refused:
        sys.exit(f"token_bits: {refused['token_bits']}: not timed")
    flush = torch.empty(CACHE_BYTES if cold else 0, dtype=torch.uint8, device=device)
    times = interleaved(sides, functools.partial(event_seconds, device, flush), options.rounds)
    return {
        "shape": shape,
        "both": both,
        "cold": cold,
        "seconds": times,
        "tflops": (3 if both else 1) * 2 * N * D * V / times["token_bits"] / 1e12,
        "bytes_a_token": allocated(device, sides["token_bits"]) / N,
        "not_timed": refused,
    }


def allocated(device: torch.device, run: Callable[[], Any]) -> int:
    """Returns the peak of the GPU's memory during `run`, results included, minus that before."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def losses(quick: bool) -> dict[str, Loss]:
    """Returns token_bits and the installed peers, each the mean in nats of its arguments."""
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
    """Returns each side's median over interleaved rounds; the first round is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 + rounds):
        for name, run in sides.items():
            times[name].append(seconds(run))
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def wall_seconds(device: torch.device, run: Callable[[], Any]) -> float:
    """Returns the seconds until the device is done."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def event_seconds(device: torch.device, flush: Tensor, run: Callable[[], Any]) -> float:
    """Returns seconds by the device's clock, which includes its waits for the host.

    A `flush` that is not empty overwrites the caches first.
    """
    if device.type != "cuda":
        return wall_seconds(device, run)
    # Either keeps the device busy while the host gets ahead of it.
    flush.zero_() if flush.numel() else run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    wait(device)
    return start.elapsed_time(end) / 1e3


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


PARTS = {"train": train, "together": together, "token_bits": token_bits}


if __name__ == "__main__":
    sys.exit(main())
