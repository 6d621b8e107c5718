"""Training and bits per token on one GPU, beside what a user would run instead.

    python bench/gpu.py --check              first: is every public function right on this GPU?
    python bench/gpu.py --json PATH          all parts, in 12 minutes at most; a table, and as JSON
    python bench/gpu.py --json PATH --only likelihood --word 50257     these anew, in that file

- likelihood: token_bits and linear_cross_entropy, forward and both passes, with eager PyTorch,
  torch.compile and what is installed of F.linear_cross_entropy, Liger and cut-cross-entropy.
- training: steps of fastmem.train in each of the ways of engine.STEP, and transformers'
  GPT-2 compiled, with fused AdamW. MFU is of 800 TFLOP/s, what a large bf16 product reaches.
- together: 16 models of L 1, D 32, trained as one and one after another.

Each is timed twice: its kernels, by replays of a CUDA graph (or the sum that the profiler gives,
where it waits for the device or no graph takes it), and the call as a user makes it, Python
included, one after another. Inputs stay where they are between runs.

All is compiled first, side by side in 14 processes, but what torch.compile makes of the loss: it
measures what it chooses from. A part then has 4 minutes, the last one what is left of 12 in all;
what it has not timed by then is not in the table, which says so. Answers are compared: the speed of
a wrong answer is not told. Exits with 2 where a GPU is missing, with 1 if a check or a part fails.

N rows, D width, V vocabulary, S tokens a sequence, B batch, E models.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from clocks import Times, once, timed
from parts import Row, run_beside, run_part
from torch import Tensor

import fastmem
from fastmem import GPT, GPTConfig, TrainConfig, UniformSequences
from fastmem.models import engine
from fastmem.sweeps.rows import environment
from fastmem.training.fused_optimizer import make_optimizer

TESTS = Path(__file__).resolve().parents[1] / "tests"
COMPILE_SECONDS, PART_SECONDS, LEAST_SECONDS, ALL_SECONDS = 150, 240, 75, 710
"""The longest compilation and part, what parts that follow keep, and the sum: 12 minutes with what
Python takes to start and to end."""
PEAK = 8e14
"""FLOP/s of a large bf16 product on an H100 or H200."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Clock = Callable[..., Times]


V = 2048
LIKELIHOOD = [
    *((131072, D, V, torch.bfloat16) for D in (64, 128, 256, 512)),
    (65536, 1600, 50257, torch.bfloat16),
    *((131072, D, V, torch.float32) for D in (32, 64, 128)),
    (128, 64, V, torch.bfloat16),  # all Python
]
TRAINING = [
    (GPTConfig(1, 32, 16, V, 64), 512, "bf16-mixed", ("graph", "eager", "peer", "compiled")),
    (GPTConfig(1, 32, 16, V, 64), 512, "fp32", ("graph", "peer")),
    (GPTConfig(4, 64, 32, V, 64), 512, "bf16-mixed", ("graph", "peer")),
    (GPTConfig(8, 256, 128, V, 64), 1024, "bf16-mixed", ("graph", "peer")),
    (GPTConfig(8, 256, 4, V, 64), 1024, "bf16-mixed", ("graph", "peer")),
]
"""Compiled, the last would take longer than a part has."""
TOGETHER = [(GPTConfig(1, 32, 16, V, 64), 512, 16)]
TINY = GPTConfig(2, 8, 2, 64, 8)
QUICK = {
    "likelihood": [(64, 8, 50, torch.float32)],
    "training": [(TINY, 16, "fp32", ("eager", "peer"))],
    "together": [(TINY, 16, 3)],
}
"""So that a machine without a GPU can run every line of this but graphs."""
CASES = {"likelihood": LIKELIHOOD, "training": TRAINING, "together": TOGETHER}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the table goes as JSON")
    parser.add_argument("--only", choices=CASES, help="this part alone")
    parser.add_argument("--word", default="", help="cases that have it in their text alone")
    parser.add_argument("--check", action="store_true", help="run the tests for a GPU alone")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.quick and not torch.cuda.is_available():
        print("no CUDA device here: this bench needs one", file=sys.stderr)
        return 2
    found: Row = {**environment(device(options.quick)), "date": date.today().isoformat()}
    if options.check:
        found["check"] = check()
        failed = bool(found["check"]["failed"])
    else:
        cases = QUICK if options.quick else CASES
        cases = {n: [c for c in cs if options.word in str(c)] for n, cs in cases.items()}
        names = [options.only] if options.only else list(cases)
        begun = time.monotonic()
        if not options.quick:
            sides = [(name, case) for name in names for case in cases[name]]
            run_beside(compile_one, sides, COMPILE_SECONDS)
        found |= {"compile_seconds": time.monotonic() - begun, "parts": {}, "rows": []}
        print("| part | case | side | kernels, ms | call, ms | |\n|---|---|---|---|---|---|")
        for later, name in zip(reversed(range(len(names))), names, strict=True):
            seconds = seconds_of_part(time.monotonic() - begun, later)
            given = name, cases[name], options.quick
            rows, part = run_part(rows_of_part, given, seconds, show)
            found["rows"] += rows
            found["parts"][name] = part
        print({name: part["ended"] for name, part in found["parts"].items()})
        failed = any(part["ended"] == "failed" for part in found["parts"].values())
    if options.json:
        if options.json.exists():
            found = merged(json.loads(options.json.read_text()), found)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(failed)


def merged(old: Row, new: Row) -> Row:
    """A file's rows, where they are new anew."""
    both = [*old.get("rows", []), *new.get("rows", [])]
    rows = {(row["part"], row["case"], row["side"]): row for row in both}
    parts = old.get("parts", {}) | new.get("parts", {})
    return {**old, **new, "parts": parts, "rows": list(rows.values())}


def device(quick: bool) -> torch.device:
    return torch.device("cpu" if quick else "cuda")


def check() -> Row:
    """tests/gpu/ and, beside it, the interpreter's tests with the compiled kernels."""
    kernels = ["-p", "cases.triton_interpreted", "-W", "ignore::RuntimeWarning"]
    kernels += map(str, sorted(TESTS.glob("kernels/interpreted_*.py")))
    runs, cases = [], []
    with tempfile.TemporaryDirectory() as folder:
        for i, more in enumerate(([str(TESTS / "gpu")], kernels)):
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            command += ["-p", "no:benchmark"]  # warns of xdist, and no warning passes
            command += ["-n", "8"] if importlib.util.find_spec("xdist") else []
            command += ["--tb=short", f"--junitxml={folder}/{i}.xml", *more]
            variables = {**os.environ, "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"}
            runs.append(subprocess.Popen(command, cwd=TESTS.parent, env=variables))
        for i, run in enumerate(runs):
            run.wait()
            cases += ElementTree.parse(f"{folder}/{i}.xml").iter("testcase")
    failed = [c.get("name") for c in cases if {child.tag for child in c} & {"failure", "error"}]
    return {"tests": len(cases), "failed": failed}


def compile_one(name: str, case: Any) -> None:
    """Each side once; what is compiled stays on the disk, for the processes to come."""
    for row in PARTS[name](case, torch.device("cuda"), once):
        print("compiled:", *(row[name] for name in ("part", "case", "side")), flush=True)


def seconds_of_part(elapsed: float, later: int) -> float:
    """What a part may take, with so many parts to follow."""
    return min(PART_SECONDS, ALL_SECONDS - elapsed - LEAST_SECONDS * later)


def rows_of_part(name: str, cases: list[Any], quick: bool) -> Iterator[Row]:
    for case in cases:
        yield from PARTS[name](case, device(quick), once if quick else timed)


def make_row(part: str, case: str, side: str, times: Times | None, **more: Any) -> Row:
    ms = [None if s is None else 1e3 * s for s in times or (None, None)]
    return {"part": part, "case": case, "side": side, "kernels_ms": ms[0], "call_ms": ms[1], **more}


def show(row: Row) -> None:
    """A line of the table."""
    times = ("" if row[n] is None else f"{row[n]:.3f}" for n in ("kernels_ms", "call_ms"))
    cells = (row["part"], row["case"], row["side"], *times, row.get("note", ""))
    print(f"| {' | '.join(cells)} |", flush=True)


# The parts.


def likelihood(case: Any, on: torch.device, clock: Clock) -> Iterator[Row]:
    N, D, V, dtype = case
    draw = torch.Generator(on).manual_seed(0)
    hidden = torch.randn(N, D, generator=draw, device=on).to(dtype)
    weight = (torch.randn(V, D, generator=draw, device=on) / D**0.5).to(dtype)
    targets = torch.randint(V, (N,), generator=draw, device=on)

    def run(loss: Loss, both: bool, h: Tensor = hidden, w: Tensor = weight) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(both) for x in (h, w)]
        mean = loss(*leaves, targets)
        return [mean.detach(), *(torch.autograd.grad(mean, leaves) if both else ())]

    # By plain PyTorch, some rows at a time. Gradients tell what a mean over rows would hide.
    right = None
    name = f"({N}, {D}, {V}) {str(dtype)[6:]}"
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    for side, (loss, graph) in losses(compiled=on.type == "cuda").items():
        if side == "torch.compile" and clock is once:
            continue  # it measures what it chooses from, which takes a GPU of its own
        try:
            if clock is not once or on.type == "cpu":
                right = right or run(losses(False)["token_bits"][0], True, *wide(hidden, weight))
                got = run(loss, True)
                off = max(float((a - b).norm() / b.norm()) for a, b in zip(got, right, strict=True))
                del got
                if off > limit:
                    yield make_row("likelihood", name, side, None, note=f"off by {off:.2g}")
                    continue
            for both in (False, True):
                sided = functools.partial(run, loss, both)
                times = clock(sided, graph)
                peak = allocated(on, sided)
                rate = (3 if both else 1) * 2 * N * D * V / (times.kernels or times.call) / 1e12
                note = f"{rate:.0f} TFLOP/s, {peak / 2**20:.0f} MiB"
                of = f"{name}, {'both' if both else 'forward'}"
                more = {"note": note, "tflops": rate, "bytes": peak, "profiled": not graph}
                yield make_row("likelihood", of, side, times, **more)
        except Exception as error:  # a peer that cannot do this must not end the bench
            if side in ("token_bits", "linear_cross_entropy"):
                raise
            yield make_row("likelihood", name, side, None, note=f"{type(error).__name__}: {error}")
        if on.type == "cuda":
            torch.cuda.empty_cache()


def wide(*tensors: Tensor) -> list[Tensor]:
    return [x.double() for x in tensors]


def allocated(on: torch.device, run: Callable[[], Any]) -> int:
    """The most bytes of the GPU's memory that this takes beside what is there; its results too."""
    if on.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def losses(compiled: bool) -> dict[str, tuple[Loss, bool]]:
    """All are means in nats of (hidden, weight, targets); and whether a CUDA graph takes them."""
    made: dict[str, tuple[Loss, bool]] = {
        "token_bits": (lambda h, w, t: fastmem.token_bits(h, w, t).mean() * math.log(2), True),
        "linear_cross_entropy": (fastmem.linear_cross_entropy, True),
        "eager": (eager, True),
    }
    if not compiled:
        return made
    made["torch.compile"] = torch.compile(eager, dynamic=False), True
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        made["F.linear_cross_entropy"] = F.linear_cross_entropy, True
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        made["Liger"] = (lambda h, w, t: liger(w, h, t)), False
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        made["cut-cross-entropy"] = linear_cross_entropy, False
    return made


def training(case: Any, on: torch.device, clock: Clock) -> Iterator[Row]:
    from peer import Peer

    shape, batch, precision, ways = case
    name = f"{shape.layers} x {shape.width}, {shape.heads} heads, B {batch}, {precision}"
    sequences = UniformSequences(batch, shape.length, shape.vocab)
    tokens = sequences.to_torch(on)
    right = float(fastmem.sequence_bits(GPT(shape, device=on), sequences, precision).sum())
    for way in ways:
        if way == "peer":
            peer = Peer(GPT(shape, device=on), compiled=on.type == "cuda", precision=precision)
            bits = float(peer.bits(tokens).sum())
            times = clock(functools.partial(peer.step, tokens, 1e-3), graph=False)
            side = "transformers, compiled"
        else:
            engine.STEP, before = way, engine.STEP
            step, bits = step_of_ours([GPT(shape, device=on)], tokens[None], precision)
            steps = 256 if clock is once else max(64, 600 // (shape.layers * shape.width // 32))
            config = TrainConfig(steps=steps, batch=batch, lr=1e-3, precision=precision)
            times = clock(step)._replace(call=seconds_a_step(shape, sequences, config, on))
            engine.STEP = before
            side = way
        if not math.isclose(bits, right, rel_tol=1e-3):
            sys.exit(f"{side}: {bits} bits for {right}; no speed of a wrong answer")
        yield make_row("training", name, side, times, **speed(shape, batch, times))


def step_of_ours(
    models: list[GPT], tokens: Tensor, precision: Any
) -> tuple[Callable[[], Any], float]:
    """What a CUDA graph of a step has in it, and the bits of all tokens before the first."""
    parameters = engine.stacked(models)
    made = engine.make_engine(models[0], parameters, precision)
    configs = [TrainConfig(steps=1, precision=precision)] * len(models)
    optimizer = make_optimizer(
        parameters, made.gradients, configs, [None] * len(models), capturable=tokens.is_cuda
    )
    bits = float(made.bits(tokens).double().sum())
    optimizer.set_rates([1e-3] * len(models))

    def step() -> None:
        made.compute(tokens)
        optimizer.update()

    return step, bits


def seconds_a_step(shape: GPTConfig, sequences: Any, config: TrainConfig, on: Any) -> float:
    """Of fastmem.train in the second half of a run, without its scores."""
    model = GPT(shape, device=on)
    score = functools.partial(fastmem.sequence_bits, model, sequences, config.precision)
    scoring = min(once(score).call for _ in range(3))
    curve = fastmem.train(model, sequences, config, progress=False).curve
    late = [point for point in curve if point.step >= config.steps // 2]
    seconds = late[-1].seconds - late[0].seconds - (len(late) - 1) * scoring
    return seconds / (late[-1].step - late[0].step)


def speed(shape: GPTConfig, batch: int, times: Times, members: int = 1) -> Row:
    tokens = members * batch * shape.length
    fastest = tokens / (times.kernels or times.call)
    mfu = fastest * fastmem.flops_per_token(shape) / PEAK
    note = f"{fastest / 1e6:.1f} Mtokens/s, MFU {mfu:.1%}; by call {tokens / times.call / 1e6:.1f}"
    return {"note": note, "tokens_per_second": fastest, "mfu": mfu}


def together(case: Any, on: torch.device, clock: Clock) -> Iterator[Row]:
    shape, batch, members = case
    sets = [UniformSequences(batch, shape.length, shape.vocab, seed=e) for e in range(members)]
    steps = 2 if clock is once else 200
    precision = "fp32" if on.type == "cpu" else "bf16-mixed"
    config = TrainConfig(steps=steps, batch=batch, precision=precision)
    configs = [replace(config, seed=e) for e in range(members)]

    def models() -> list[GPT]:
        return [GPT(shape, seed=e, device=on) for e in range(members)]

    def one_by_one() -> list[Any]:
        runs = zip(models(), sets, configs, strict=True)
        return [fastmem.train(*run, progress=False) for run in runs]

    def at_once() -> list[Any]:
        return fastmem.train_many(models(), sets, configs, progress=False)

    for e, (alone, member) in enumerate(zip(one_by_one(), at_once(), strict=True)):
        # The code length, not what it lacks of the entropy: that is small at the beginning.
        ours, its = (sets[e].coded_entropy_bits - r.memorized_bits for r in (member, alone))
        if not math.isclose(ours, its, rel_tol=5e-2):
            sys.exit(f"model {e}: {its} bits alone, {ours} together: no speed of a wrong answer")
    tokens = torch.stack([one.to_torch(on) for one in sets])
    name = f"{members} x ({shape.layers} x {shape.width}), {precision}"
    for side, run, count in (("together", at_once, members), ("one by one", one_by_one, 1)):
        step, _ = step_of_ours(models()[:count], tokens[:count], precision)
        seconds = clock(step).kernels
        kernels = None if seconds is None else seconds * members / count
        times = Times(kernels, once(run).call / steps)
        yield make_row("together", name, side, times, **speed(shape, batch, times, members))


PARTS = {"likelihood": likelihood, "training": training, "together": together}


if __name__ == "__main__":
    sys.exit(main())
