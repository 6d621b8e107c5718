"""fastmem.write against dd on the same disk: the same number of bytes, both synced to disk.

    python bench/generate_disk.py --folder /tmp --gigabytes 4

dd copies zeros in blocks of 4 MiB with conv=fsync: once through the page cache and once past it
(oflag=direct). Each round times both, then `fastmem generate` in a new process: the whole command,
and the write alone, because the imports do not depend on the size. Prints medians, their ratio to
the faster dd, and the peak memory beyond that of the imports.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LENGTH, VOCAB = 64, 2048
BLOCK = 4 << 20

# The console script, with a clock and Linux's peak of memory around the write.
CHILD = """
import json, sys, time
from pathlib import Path
from fastmem.cli import generate, main

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024

write = generate.write
def timed(*args, **kwargs):
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = status("VmRSS"), time.perf_counter()
    result = write(*args, **kwargs)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes_over_imports": status("VmHWM") - before}))
    return result

generate.write = timed
main.main(sys.argv[1:])
"""


def settle() -> None:
    """Brings disk and memory to the same state before each run.

    A virtual machine returns free memory to its host after a second or two, and returned memory
    takes several times as long to write. fastmem's imports take that long; dd starts at once.
    """
    os.sync()
    time.sleep(4)


DD = {"dd": [], "dd oflag=direct": ["oflag=direct"]}


def seconds_of_dd(path: Path, size: int, flags: list[str]) -> float:
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={BLOCK}", f"count={size // BLOCK}"]
    start = time.perf_counter()
    subprocess.run([*command, "conv=fsync", *flags], check=True, capture_output=True)
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def generated(path: Path, size: int, format: str) -> dict[str, float]:
    count = size // (2 * LENGTH)
    flags = f"--count {count} --length {LENGTH} --vocab {VOCAB} --format {format} --out {path}"
    start = time.perf_counter()
    child = subprocess.run(
        [sys.executable, "-c", CHILD, "generate", *flags.split()],
        check=True,
        capture_output=True,
        text=True,
    )
    command = time.perf_counter() - start
    row: dict[str, float] = json.loads(child.stdout.splitlines()[0])
    return row | {"command_seconds": command}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--format", default="bin")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    size = int(options.gigabytes * 1e9) // BLOCK * BLOCK
    dd: dict[str, list[float]] = {name: [] for name in DD}
    ours = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        # The first round does not count: a virtual machine is slow to write memory it never used.
        for round in range(1 + options.rounds):
            for flags, seconds in zip(DD.values(), dd.values(), strict=True):
                settle()
                seconds.append(seconds_of_dd(folder / "dd", size, flags))
            settle()
            ours.append(generated(folder / "set", size, options.format))
            for path in folder.iterdir():
                path.unlink()
            if round == 0:
                ours.clear()
                for seconds in dd.values():
                    seconds.clear()
    best = min(statistics.median(seconds) for seconds in dd.values())
    write = statistics.median(r["seconds"] for r in ours)
    command = statistics.median(r["command_seconds"] for r in ours)
    row = {
        "gigabytes": size / 1e9,
        "format": options.format,
        "dd_gb_per_second": {n: size / 1e9 / statistics.median(s) for n, s in dd.items()},
        "write_gb_per_second": size / 1e9 / write,
        "write_over_faster_dd": best / write,
        "command_over_faster_dd": best / command,
        "peak_megabytes_over_imports": max(r["bytes_over_imports"] for r in ours) / 1e6,
        "dd_seconds": dd,
        "write_seconds": [r["seconds"] for r in ours],
        "command_seconds": [r["command_seconds"] for r in ours],
    }
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
