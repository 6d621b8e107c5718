"""Membership: the cost of its scores and of shadow models, and its quality around capacity.

    python bench/membership.py --json membership.json

- cost: all scores that one model gives, with the statistics that they need, against `fastmem score`
  of the same sequences, which gives their bits alone. Goal: at most 1.15 times.
- shadows: 16 shadow models trained together against the same one after another. Goal: at most as
  long.
- canaries: uniform sequences planted in text, told from others that were never trained on: TPR
  at 0.1 % FPR beside what the two means and the spread of the others predict.
- quality: `fastmem train` and `fastmem membership --shadows` of uniform data far below, at and far
  above capacity, a table of means over seeds.

Each round takes both sides, in turn, so that a busy machine slows both alike; ratios are medians of
rounds. On a busy machine the processor's time says more than the clock's.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from fastmem import (
    GPT,
    GPTConfig,
    TrainConfig,
    UniformSequences,
    expected_membership,
    from_array,
    prepare_text,
    roc,
    sequence_bits,
    train,
    train_many,
)
from fastmem.cli.main import main as command
from fastmem.data.joined import JoinedSequences
from fastmem.models.scoring.scores import score
from fastmem.report.membership_study import read_pass, target_scores
from fastmem.sweeps.rows import environment
from fastmem.sweeps.shadows import halves

GOALS = {"cost": 1.15, "shadows": 1.0}
RATES = ("0.01", "0.001")


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call by the clock, and of the processor."""
    start = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def compared(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Seconds of two calls in each round, and the medians of the ratios first / second."""
    first, second = calls
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in calls if index % 2 else reversed(calls):
            times[name].append(seconds(calls[name]))
    pairs = list(zip(times[first], times[second], strict=True))
    ratios = [median(ours[i] / theirs[i] for ours, theirs in pairs) for i in (0, 1)]
    return {"seconds": times, "ratio_of_clock": ratios[0], "ratio_of_processor": ratios[1]}


def cost(shape: GPTConfig, count: int, rounds: int) -> dict[str, Any]:
    """All scores of one model against the pass of `fastmem score`."""
    model, data = GPT(shape), UniformSequences(count, shape.length, shape.vocab)

    def scored() -> None:
        with tempfile.TemporaryDirectory() as folder:
            score(model, data, folder)

    def all_scores() -> None:
        with tempfile.TemporaryDirectory() as folder:
            score(model, data, folder, also=("entropy", "variance"))
            target_scores(read_pass(Path(folder), statistics=True), None, (20,))

    return compared({"all scores": all_scores, "fastmem score": scored}, rounds)


def shadows(shape: GPTConfig, models: int, count: int, steps: int, rounds: int) -> dict[str, Any]:
    """Shadow models trained together against one after another."""
    tokens = UniformSequences(count, shape.length, shape.vocab).tokens(slice(None))
    sets = [from_array(tokens[side], shape.vocab) for side in halves(models, count, 0)]
    configs = [replace(TrainConfig(steps=steps), seed=e) for e in range(models)]

    def made() -> list[GPT]:
        return [GPT(shape, seed=config.seed) for config in configs]

    def together() -> None:
        train_many(made(), sets, configs, progress=False)

    def alone() -> None:
        for model, data, config in zip(made(), sets, configs, strict=True):
            train(model, data, config, progress=False)

    return compared({"together": together, "alone": alone}, rounds)


def quality(shape: GPTConfig, counts: Sequence[int], seeds: int, steps: int, models: int) -> Any:
    """A row for each data set size and seed: the content of membership.json in short."""
    rows = []
    for count in counts:
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                flags = ["--layers", shape.layers, "--width", shape.width, "--heads", shape.heads]
                flags += ["--vocab", shape.vocab, "--length", shape.length, "--count", count]
                flags += ["--seed", seed, "--data-seed", seed, "--steps", steps]
                run("train", *flags, "--out", folder / "model")
                flags = ["--shadows", models, "--out", folder / "study"]
                run("membership", folder / "model", *flags)
                trained = json.loads((folder / "model" / "run.json").read_bytes())
                found = json.loads((folder / "study" / "membership.json").read_bytes())
            rows.append({
                "count": count,
                "seed": seed,
                "parameters": trained["parameters"],
                "entropy_bits": trained["coded_entropy_bits"],
                "memorized_bits": trained["memorized_bits"]["strict"],
                "expected": found["expected"],
                "blind": found["blind"],
                "scores": {name: _short(one) for name, one in found["scores"].items()},
            })  # fmt: skip
    return rows


def canaries(shape: GPTConfig, counts: Sequence[int], planted: int, steps: int) -> Any:
    """A row for each number of text sequences beside the planted canaries."""
    K, others = planted, 50 * planted
    seen = UniformSequences(K, shape.length, shape.vocab, seed=7)
    unseen = UniformSequences(others, shape.length, shape.vocab, seed=8)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text = prepare_text(None, f"{folder}/corpus", length=shape.length).train
        for count in counts:
            model = GPT(shape)
            data = JoinedSequences(text.sample(count), seen)
            train(model, data, TrainConfig(steps=steps), progress=False)
            ours, theirs = sequence_bits(model, seen), sequence_bits(model, unseen)
            found = roc(-np.concatenate([ours, theirs]), np.arange(K + others) < K)
            D = (theirs.mean() - ours.mean()) / 2
            # In nats the others' variance is 2 D and the square of the spread.
            spread = math.sqrt(max(0.0, theirs.var() - 2 * D / math.log(2)))
            told = expected_membership(D, spread=spread)
            rows.append({
                "text_sequences": count,
                "planted": K,
                "never_trained_on": others,
                "half_distance_bits": D,
                "spread_bits": spread,
                "auc": found.auc.estimate,
                "tpr_0.001": found.tpr[0.001].to_dict(),
                "theory": {name: float(value) for name, value in told.items()},
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def run(*arguments: object) -> None:
    try:
        command([str(argument) for argument in arguments])
    except SystemExit as stop:
        if stop.code:
            raise


def _short(one: dict[str, Any]) -> dict[str, float | None]:
    """The estimates of one score."""
    rates = {f"tpr_{rate}": one["tpr"][rate]["estimate"] for rate in RATES}
    f1 = {f"f1_{rule}": value["estimate"] for rule, value in one["f1"].items()}
    return {"auc": one["auc"]["estimate"], **rates, **f1}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds of AUC, TPR at 1 % FPR and F1 of each score, a column a data set size."""
    counts = sorted({row["count"] for row in rows})
    heads = []
    for count in counts:
        of_count = [row for row in rows if row["count"] == count]
        load = mean(row["entropy_bits"] / row["parameters"] for row in of_count)
        bits = mean(row["memorized_bits"] / row["parameters"] for row in of_count)
        heads.append(f"N = {count:,}: {load:.1f} bits a parameter, {bits:.2f} memorized")
    lines = ["| score | " + " | ".join(heads) + " |", "|---" * (1 + len(counts)) + "|"]
    names = list(rows[0]["scores"])
    for name in ["expected", *names]:
        cells = []
        for count in counts:
            of_count = [row for row in rows if row["count"] == count]
            ones = [r["expected"] if name == "expected" else r["scores"][name] for r in of_count]
            auc, tpr = (mean(one[key] or 0 for one in ones) for key in ("auc", "tpr_0.01"))
            f1 = mean(one["f1" if name == "expected" else "f1_median"] for one in ones)
            cells.append(f"{auc:.3f}, {tpr:.3f}, {f1:.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="+", default=["cost", "shadows", "canaries", "quality"])
    parser.add_argument("--count", type=int, default=20_000, help="sequences of cost")
    parser.add_argument("--counts", type=int, nargs="+", default=[200, 450, 4000])
    parser.add_argument("--models", type=int, default=16, help="shadow models")
    parser.add_argument("--steps", type=int, default=1000, help="of each model of quality")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    given = parser.parse_args(arguments)
    large, small, steps = GPTConfig(1, 32, 16, 2048, 64), GPTConfig(1, 32, 16, 128, 16), 60
    if given.quick:
        large = small = GPTConfig(1, 8, 4, 64, 16)
        given.count, given.counts, given.models, given.steps = 40, [20, 40], 4, 20
        given.seeds, given.rounds, steps = 1, 1, 3
    torch.set_num_threads(given.threads)
    found: dict[str, Any] = environment(torch.device("cpu"))
    if "cost" in given.parts:
        found["cost"] = cost(large, given.count, given.rounds)
    if "shadows" in given.parts:
        found["shadows"] = shadows(large, given.models, 1024, steps, given.rounds)
    for part, goal in GOALS.items():
        if part in given.parts:
            ratios = [found[part][f"ratio_of_{what}"] for what in ("clock", "processor")]
            found[part]["goal"] = goal
            print(f"{part}: {ratios[0]:.2f} by the clock, {ratios[1]:.2f} by the processor", end="")
            print(f", goal {goal}", flush=True)
    if "canaries" in given.parts:
        of_text = GPTConfig(1, 16, 8, 256, 64)
        many, of_set = (20, [50]) if given.quick else (100, [1000, 4000, 16000, 64000])
        found["canaries"] = canaries(of_text, of_set, many, 5 if given.quick else 2500)
    if "quality" in given.parts:
        sizes = given.counts, given.seeds, given.steps, given.models
        found["quality"] = quality(small, *sizes)
        print("AUC, TPR at 1 % FPR, F1 of the median rule\n" + table(found["quality"]))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
