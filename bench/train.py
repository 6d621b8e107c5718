"""Training and scoring on a CPU against transformers' GPT-2 and torch's AdamW, in one process.

    python bench/train.py                 the table of tokens per second: some minutes
    python bench/train.py --race          time to the bits that the peer reaches in 8 minutes
    python bench/train.py --quick         both in seconds, to see that they run; judges nothing

Each round times every side once, so that a busy machine slows all sides; medians count. First all
sides must agree: loss and gradients from the same weights, and the bits of the data set after the
same 10 steps. The scoring inside `fastmem.train` is timed separately and subtracted ("with_scoring"
in the JSON includes it). The floor is flops_per_token at matmul_rate, with a third of the FLOPs for
scoring. Exits with 1 if a bar is missed.

The race: the peer trains at five learning rates for an eighth of its time each, then at the best
rate for all of its time, with linear decay; its clock stops while it is scored. Ours is
fastmem.train with its defaults and growing budgets of seconds, scoring included, until a run
reaches the same bits.

N sequences, S tokens a sequence, B batch.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peer import Peer
from torch import Tensor

import fastmem
from fastmem import GPT, GPTConfig, TrainConfig, UniformSequences
from fastmem.sweeps.rows import environment

RESULTS = Path(__file__).parent / "results"
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)
FRACTIONS = (1 / 10, 1 / 7, 1 / 5, 1 / 3, 1 / 2, 1.0)
"""Budgets of ours as fractions of the peer's time, until one suffices."""
RACE_BAR = 1 / 5
SCORED = 512


@dataclass(frozen=True)
class Case:
    """Shape, batch (None: scoring), and the least speed of ours over the eager peer."""

    shape: GPTConfig
    batch: int | None
    bar: float

    @property
    def name(self) -> str:
        what = "score" if self.batch is None else f"train batch {self.batch}"
        return f"L{self.shape.layers} D{self.shape.width} {what}"


def shape(layers: int, width: int, vocab: int = 2048, length: int = 64) -> GPTConfig:
    return GPTConfig(layers, width, width // 4, vocab, length)


CASES = [
    Case(shape(1, 32), 64, 3.0),
    Case(shape(1, 32), 512, 3.0),
    Case(shape(2, 64), 128, 2.0),
    Case(shape(4, 128), 64, 1.3),
    Case(shape(1, 32), None, 4.0),
]
QUICK = [Case(shape(2, 8, 64, 8), 16, 3.0), Case(shape(2, 8, 64, 8), None, 4.0)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, judges nothing")
    parser.add_argument("--race", action="store_true", help="time to the peer's memorized bits")
    parser.add_argument("--minutes", type=float, default=8.0, help="time of the peer in the race")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled peer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="output file, instead of bench/results")
    options = parser.parse_args(arguments)
    facts = {**environment(torch.device("cpu")), "transformers": transformers.__version__}
    if options.race:
        name, found = "race-cpu.json", race(options.minutes * 60, options.quick)
        met = found["met"]
    else:
        cases = [c for c in (QUICK if options.quick else CASES) if options.only in c.name]
        name, rows = "train-cpu.json", []
        print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}")
        print(HEADER)
        for case in cases:
            rows.append(measure(case, options))
            print(line(rows[-1]), flush=True)
        found = {"rows": rows}
        met = all(row["met"] for row in rows)
    path = options.json or (None if options.quick else RESULTS / name)
    if path is not None:
        path.write_text(json.dumps(facts | found, indent=1) + "\n")
    return 0 if met or options.quick else 1


# Tokens per second.

HEADER = (
    f"{'thousand tokens/s':22}{'ours':>8}{'eager':>8}{'compiled':>9}"
    f"{'over eager':>12}{'bar':>6}{'floor':>8}{'of floor':>9}"
)


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a case; all sides start from the same weights."""
    torch.compiler.reset()
    count = case.batch or (8 * 16 if options.quick else SCORED)
    sequences = UniformSequences(count, case.shape.length, case.shape.vocab)
    model = GPT(case.shape)
    settle = TrainConfig(steps=10, batch=case.batch or 64, lr=1e-2)
    fastmem.train(model, sequences, settle, progress=False)
    peers = {"eager": Peer(model)}
    if not (options.eager or options.quick):
        peers["compiled"] = Peer(model, compiled=True)
    sides = (scorers if case.batch is None else trainers)(model, peers, sequences)

    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(2 if options.quick else options.rounds):
        for name, side in sides.items():
            times[name].append(seconds(side.run))
    medians = {name: statistics.median(t) for name, t in times.items()}
    with_scoring = medians["ours"]
    medians["ours"] -= sides["ours"].scores * medians.pop("scoring", 0.0)
    tokens = {name: count * case.shape.length * side.passes for name, side in sides.items()}
    speeds = {name: tokens[name] / s for name, s in medians.items()}
    flops = fastmem.flops_per_token(case.shape) / (3 if case.batch is None else 1)
    floor = fastmem.matmul_rate("cpu") / flops
    ratio = speeds["ours"] / speeds["eager"]
    return {
        "case": case.name,
        **asdict(case),
        "tokens_per_second": speeds,
        "with_scoring": tokens["ours"] / with_scoring,
        "floor": floor,
        "ratio": ratio,
        "met": ratio >= case.bar,
        "seconds": times,
    }


@dataclass(frozen=True)
class Side:
    """What is timed, with its passes over the data set and the scores included."""

    run: Callable[[], Any]
    passes: int = 1
    scores: int = 0


def scorers(model: GPT, peers: dict[str, Peer], sequences: UniformSequences) -> dict[str, Side]:
    """Sides with the same bits; the peers in their fastest batch."""
    tokens = sequences.to_torch()
    batch = fastest_batch(peers["eager"], tokens)
    bits = fastmem.sequence_bits(model, sequences).sum()
    sides = {"ours": Side(lambda: fastmem.sequence_bits(model, sequences))}
    for name, peer in peers.items():
        agree(f"{name}: bits", bits, float(peer.bits(tokens, batch).sum()), 1e-5)
        sides[name] = Side(lambda peer=peer: peer.bits(tokens, batch))
    return sides


def trainers(model: GPT, peers: dict[str, Peer], sequences: UniformSequences) -> dict[str, Side]:
    """Sides with the same gradients; the data set is one batch. A round is about a second of the
    peer, and four times as many steps of ours, so that the scores weigh less."""
    tokens = sequences.to_torch()
    for name, peer in peers.items():
        same_gradients(name, model, peer, tokens)
    same_training(model, UniformSequences(min(len(tokens), 64), sequences.length, sequences.vocab))
    steps = max(3, min(10, int(1 / seconds(lambda: peers["eager"].step(tokens, 1e-3)))))
    config = TrainConfig(steps=4 * steps, batch=len(tokens), lr=1e-3)

    def train() -> fastmem.TrainResult:
        return fastmem.train(model, sequences, config, progress=False)

    sides = {
        "ours": Side(train, 4 * steps, len(train().curve)),
        "scoring": Side(lambda: fastmem.sequence_bits(model, sequences)),
    }
    for name, peer in peers.items():
        sides[name] = Side(lambda peer=peer: [peer.step(tokens, 1e-3) for _ in range(steps)], steps)
    return sides


def fastest_batch(peer: Peer, tokens: Tensor) -> int:
    """The batch of 16 to 128 sequences that the peer scores fastest. transformers sets none, and
    large logits cost more than they save."""

    def warm_seconds(batch: int) -> float:
        peer.bits(tokens, batch)
        return seconds(lambda: peer.bits(tokens, batch))

    return min((16, 32, 64, 128), key=warm_seconds)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def line(row: dict[str, Any]) -> str:
    speeds = {name: f"{s / 1e3:.1f}" for name, s in row["tokens_per_second"].items()}
    return (
        f"{row['case']:22}{speeds['ours']:>8}{speeds['eager']:>8}{speeds.get('compiled', '-'):>9}"
        f"{row['ratio']:>11.2f}x{row['bar']:>6}{row['floor'] / 1e3:>8.0f}"
        f"{row['tokens_per_second']['ours'] / row['floor']:>9.1%}"
        f"  {'met' if row['met'] else 'missed'}"
    )


def same_gradients(name: str, model: GPT, peer: Peer, tokens: Tensor) -> None:
    """Exits if losses or gradients from the same weights differ."""
    ours = model.token_bits(tokens).mean() * math.log(2)
    ours.backward()
    agree(f"{name}: loss", ours.item(), peer.loss(tokens).item(), 1e-5)
    gradients = peer.gradients(tokens)
    noise = 1e-7 * torch.cat([g.flatten() for g in gradients]).norm()
    for (part, p), theirs in zip(model.named_parameters(), gradients, strict=True):
        if not (p.grad - theirs).norm() <= 1e-4 * theirs.norm() + noise:
            sys.exit(f"{name}: the gradient of {part} differs: no speed of a wrong answer")
    model.zero_grad()


def same_training(model: GPT, sequences: UniformSequences) -> None:
    """Exits if fastmem.train and the eager peer have different bits after 10 steps on the same
    batches at the same rates."""
    tokens = sequences.to_torch()
    trained, follower = copy.deepcopy(model), Peer(model)
    config = TrainConfig(steps=10, batch=len(tokens), lr=5e-3, warmup=0.0)
    fastmem.train(trained, sequences, config, progress=False)
    for step in range(10):
        follower.step(tokens, config.lr * (1 - (step + 0.5) / 10))
    ours, theirs = fastmem.sequence_bits(trained, sequences), follower.bits(tokens)
    agree("bits after 10 steps", ours.sum(), float(theirs.sum()), 1e-3)


def agree(what: str, ours: float, theirs: float, tolerance: float) -> None:
    if not abs(ours - theirs) <= tolerance * abs(theirs):
        sys.exit(f"{what}: {ours!r} and {theirs!r} differ: no speed of a wrong answer")


# The race.


def race(seconds: float, quick: bool) -> dict[str, Any]:
    """The time of ours to the bits that the peer reaches in `seconds`."""
    case = shape(1, 8, 64, 8) if quick else shape(1, 32)
    sequences = UniformSequences(64 if quick else 512, case.length, case.vocab)
    scan = {rate: peer_bits(case, sequences, rate, seconds / 8) for rate in RATES}
    for rate, (bits, steps) in scan.items():
        print(f"peer, {seconds / 8:.0f} s at {rate}: {bits:,.0f} bits, {steps} steps", flush=True)
    best = max(scan, key=lambda rate: scan[rate][0])
    target, steps = peer_bits(case, sequences, best, seconds)
    per = case.parameter_count
    print(f"peer, {seconds:.0f} s at {best}: {target:,.0f} bits, {target / per:.3f} a parameter")

    runs = []
    reached = None
    for fraction in FRACTIONS:
        budget = fraction * seconds
        result = fastmem.train(GPT(case), sequences, TrainConfig(seconds=budget), progress=False)
        runs.append({"budget": budget, **asdict(result)})
        print(
            f"ours, {result.seconds:.0f} s: {result.memorized_bits:,.0f} bits, "
            f"{result.memorized_bits / per:.3f} a parameter",
            flush=True,
        )
        there = [p.seconds for p in result.curve if p.memorized_bits >= target]
        if there:
            reached = min(there)
            break
    fraction = math.inf if reached is None else reached / seconds
    verdict = "met" if fraction <= RACE_BAR else "missed"
    print(
        f"the peer's bits after {fraction:.3f} of its time, bar {RACE_BAR}: {verdict}"
        if reached
        else f"the peer's bits were not reached in its time, bar {RACE_BAR}: missed"
    )
    return {
        "shape": asdict(case),
        "sequences": sequences.description(),
        "peer_seconds": seconds,
        "peer_rate": best,
        "peer_steps": steps,
        "peer_memorized_bits": target,
        "scan": {str(rate): bits for rate, (bits, _) in scan.items()},
        "ours": runs,
        "seconds_to_peer": reached,
        "bar": RACE_BAR,
        "met": fraction <= RACE_BAR,
    }


def peer_bits(
    case: GPTConfig, sequences: UniformSequences, rate: float, seconds: float
) -> tuple[float, int]:
    """Strict memorized bits and steps of the peer's loop: batch 64, epochs in random order."""
    peer = Peer(GPT(case))
    tokens = sequences.to_torch()
    steps, batches = 0, []
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        if not batches:
            epoch = 64 * steps // sequences.count
            order = fastmem.permutation(0, epoch, sequences.count).astype("int64")
            batches = list(torch.from_numpy(order).split(64))
        peer.step(tokens[batches.pop()], rate * (1 - elapsed / seconds))
        steps += 1
    bits = peer.bits(tokens).numpy()
    if not math.isfinite(bits.sum()):
        return -math.inf, steps
    return fastmem.memorized_bits(bits, sequences).strict, steps


if __name__ == "__main__":
    sys.exit(main())
