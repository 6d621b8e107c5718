"""fastmem capacity: train a sweep."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal

import tyro

from fastmem.base.terminal import INTERRUPTED, say, show
from fastmem.cli.report import row_line, write_report
from fastmem.cli.score import default_device
from fastmem.sweeps.config import PRESETS, SweepConfig
from fastmem.sweeps.driver import Sweep
from fastmem.sweeps.plan import plan
from fastmem.sweeps.store import load_rows, without_bits
from fastmem.sweeps.trackers import TrackerName, check_tracker, open_tracker


@dataclass(frozen=True)
class Capacity:
    """Measures how many bits a parameter stores: trains a grid of models on uniformly random
    sequences and finds the plateau of memorized bits. Writes rows/*.json, capacity.json,
    report.html and figures/ to --out. The same command resumes a stopped sweep.

    Example: fastmem capacity --width 16 32 --seeds 0 1 2 --steps 2000 --out capacity-mine
    """

    preset: Literal["laptop", "paper"] = "laptop"
    """Default flags: laptop (minutes on a CPU) or paper (the published grid, for GPUs)."""
    plan: bool = False
    """Only print what the sweep would cost: runs, tokens, FLOPs, memory, and the time on this
    device, estimated from ten seconds of training steps. Writes nothing."""
    log: TrackerName | None = None
    """Also send each row to TensorBoard (files in --out), wandb or trackio."""
    sweep: Annotated[SweepConfig, tyro.conf.arg(name="")] = PRESETS["laptop"]


def run_capacity(command: Capacity) -> int:
    config = replace(command.sweep, device=default_device(command.sweep.device))
    if command.plan:
        show(plan(config, progress=True).text())
        return 0
    if command.log:
        check_tracker(command.log)
    with Sweep(config) as running:
        done, failed = running.count("done"), running.count("failed")
        runs = len(running.runs)
        total = "" if running.automatic else f"/{runs}"
        many = "as many runs" if running.automatic else f"{runs} run{'s' * (runs > 1)}"
        needed = " as the plateaus need" * running.automatic
        say(f"{many} on {config.device} in {config.out}{needed}")
        if running.rows:
            say(f"{done} done and skipped, {failed} failed and tried again")
        if config.sequence_bits and (unscored := without_bits(config.out, running.rows)):
            say(unscored)
        tracker = command.log and open_tracker(command.log, config.out)
        number = done
        for number, row in enumerate(running, done + 1):
            say(f"[{number}{total}] {row_line(row)}")
            if tracker:
                tracker.add(row)
            if INTERRUPTED.is_set():
                raise KeyboardInterrupt
        if number == done:
            say("finished: nothing to do; --overwrite trains all runs again")
    rows = load_rows(config.out)
    if tracker:
        tracker.close(rows)
    return write_report(config.out, rows)


def capacity_defaults(flags: list[str]) -> Capacity:
    """The preset named in `flags`, whose values the other flags replace."""
    names = [b for a, b in pairwise(flags) if a == "--preset"]
    names += [flag.partition("=")[2] for flag in flags if flag.startswith("--preset=")]
    name = names[-1] if names and names[-1] in PRESETS else "laptop"
    config = PRESETS[name]
    if name == "laptop":
        config = replace(config, device="auto")
    if any(flag.startswith(("--epochs", "--seconds")) for flag in flags):
        config = replace(config, steps=None)
    return Capacity(name, sweep=config)  # type: ignore[arg-type]
