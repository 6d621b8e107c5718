"""Kills a rank of a run at random moments, gives the same command again, and compares the row with
the row of an undisturbed run.

    python bench/rank_kills.py --kills 20 --json bench/results/rank-kills.json

torchrun starts two ranks on the CPU. A random one is killed with SIGKILL at a random moment between
its start and some seconds after its first step; the other rank must end within a minute. At the end
the row must equal that of the undisturbed run to the byte, except for times and peak memory.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from kills import alive, constant, descendants

SETTINGS = {"OMP_NUM_THREADS": "1", "FASTMEM_CHECKPOINT_SECONDS": "0.2"}
TRAIN = ["train", "--layers", "2", "--width", "24", "--vocab", "50", "--length", "12"]
VARY = ("tokens_per_second_per_rank",)
END_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    draw = random.Random(options.seed)
    killed, seconds = 0, [0.0]
    with tempfile.TemporaryDirectory() as name:
        whole, folder = Path(name, "whole"), Path(name, "disturbed")
        if started(whole, options).wait():
            raise AssertionError("the undisturbed run failed")
        while True:
            process = started(folder, options)
            if killed < options.kills:
                at = draw.uniform(0, 8)
                if (rank := a_rank(process.pid, at, draw)) is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rank, signal.SIGKILL)
                        killed += 1
                    begin = time.monotonic()
                    family = descendants(process.pid)
                    while process.poll() is None or any(alive(pid) for pid in family):
                        if time.monotonic() - begin > END_SECONDS:
                            raise AssertionError("a rank outlived a killed one by a minute")
                        time.sleep(0.05)
                    seconds.append(time.monotonic() - begin)
                    print(f"kill {killed}: {seconds[-1]:.1f} s to the end", flush=True)
            if process.wait() == 0:
                break
        ours, theirs = row_of(folder), row_of(whole)
        if ours != theirs:
            differ = [key for key in theirs if ours.get(key) != theirs[key]]
            raise AssertionError(f"{differ} differ from the undisturbed run")
    found = {
        "kills": killed,
        "ranks": options.ranks,
        "steps": options.steps,
        "same_row": True,
        "longest_seconds_to_end": max(seconds),
    }
    print(json.dumps(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def started(out: Path, options: argparse.Namespace) -> "subprocess.Popen[bytes]":
    ranks = ["--standalone", f"--nproc-per-node={options.ranks}", "-m", "fastmem"]
    command = [sys.executable, "-m", "torch.distributed.run", *ranks, *TRAIN]
    flags = ["--steps", f"{options.steps}", "--device", "cpu", "--out", f"{out}"]
    with (out.parent / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [*command, *flags], env=os.environ | SETTINGS, stdout=output, stderr=output
        )


def a_rank(torchrun: int, seconds: float, draw: random.Random) -> int | None:
    """A rank, some seconds after the first of them began; None if the run ended before."""
    while not (found := ranks_below(torchrun)):
        if not alive(torchrun):
            return None
        time.sleep(0.02)
    time.sleep(seconds)
    found = ranks_below(torchrun)
    return draw.choice(found) if found else None


def ranks_below(torchrun: int) -> list[int]:
    return sorted(pid for pid, line in descendants(torchrun).items() if "-m fastmem" in line)


def row_of(folder: Path) -> dict[str, object]:
    row = json.loads((folder / "run.json").read_text())
    for name in (*VARY, "checksum"):
        row.pop(name)
    return dict(constant(row))


if __name__ == "__main__":
    sys.exit(main())
