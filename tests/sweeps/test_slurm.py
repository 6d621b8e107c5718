"""The script in docs/slurm.md: its syntax and its flags."""

import re
import shlex
import subprocess
from pathlib import Path

from ray.scripts.scripts import start
from ray.scripts.symmetric_run import symmetric_run

from fastmem.cli.main import parse

TEXT = (Path(__file__).parents[2] / "docs" / "slurm.md").read_text()
SCRIPT = re.findall(r"```bash\n(.*?)```", TEXT, re.S)[0]


def test_the_syntax_of_the_script() -> None:
    """Fails if bash cannot read the script, or the script continues after an error."""
    bash = subprocess.run(["bash", "-n"], input=SCRIPT, text=True, capture_output=True)
    assert (bash.returncode, bash.stderr) == (0, "")
    assert "set -euo pipefail" in SCRIPT


def test_the_flags_of_the_script() -> None:
    """Fails if Ray or fastmem does not know a flag of the script."""
    command = shlex.split(SCRIPT.replace("\\\n", " ").split("srun ")[1])
    split = command.index("--")
    known = {flag for of in (start, symmetric_run) for p in of.params for flag in p.opts}
    assert command[:2] == ["ray", "symmetric-run"]
    assert {flag for flag in command[:split] if flag.startswith("--")} <= known
    ours = command[split + 1 :]
    assert ours[:2] == ["fastmem", "capacity"]
    found = parse("capacity", ours[2:])
    assert (found.sweep.ray, found.sweep.ray_gpus, found.sweep.device) == ("auto", 0.25, "cuda")
