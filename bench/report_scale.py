"""The time and memory of `fastmem report` for thousands of synthetic rows.

    python bench/report_scale.py --rows 10000

Writes the rows (tests/cases/study_rows.py) to a temporary folder, then times the command in a new
process: it loads, checks and fits the rows, draws figures and writes the page. Prints seconds, peak
memory and the size of the page.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cases.study_rows import study_rows, write_rows

PER_WIDTH = 200  # 5 data set sizes, 10 seeds, 2 precisions, 2 depths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    widths = range(8, 8 + 4 * max(1, parser.parse_args().rows // PER_WIDTH), 4)
    with tempfile.TemporaryDirectory() as name:
        rows = list(study_rows(widths, range(10), ("fp32", "bf16-mixed"), (1, 2)))
        os.fsync = lambda fd: None  # The rows are not part of the measurement.
        folder = write_rows(Path(name) / "study", rows)
        command = [sys.executable, "-c", "from fastmem.cli.main import main; main()", "report"]
        start = time.perf_counter()
        subprocess.run([*command, folder], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        size = (folder / "report.html").stat().st_size
    result = {"rows": len(rows), "seconds": seconds, "peak_bytes": peak, "page_bytes": size}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
