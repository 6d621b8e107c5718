"""The scripts in docs/slurm.md: their syntax and their flags."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import symmetric_run
from torch.distributed.run import get_args_parser

from fastmem.cli.main import parse

TEXT = (Path(__file__).parents[2] / "docs" / "slurm.md").read_text()
SCRIPTS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_syntax_of_a_script(script: str) -> None:
    """Fails if bash cannot read a script, or the script continues after an error."""
    bash = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (bash.returncode, bash.stderr) == (0, "")
    assert "set -euo pipefail" in script


def command_of(script: str) -> list[str]:
    return shlex.split(script.replace("\\\n", " ").split("srun ")[1])


def test_the_flags_of_the_sweep() -> None:
    """Fails if Ray or fastmem does not know a flag of the script."""
    command = command_of(SCRIPTS[0])
    split = command.index("--")
    known = {flag for of in (start, symmetric_run) for p in of.params for flag in p.opts}
    assert command[:2] == ["ray", "symmetric-run"]
    assert {flag for flag in command[:split] if flag.startswith("--")} <= known
    ours = command[split + 1 :]
    assert ours[:2] == ["fastmem", "capacity"]
    found = parse("capacity", ours[2:])
    assert (found.sweep.ray, found.sweep.ray_gpus, found.sweep.device) == ("auto", 0.25, "cuda")


def test_the_flags_of_the_two_nodes() -> None:
    """Fails if torchrun or fastmem does not know a flag of the script."""
    command = command_of(SCRIPTS[1])
    assert command[0] == "torchrun"
    command[command.index("--nnodes") + 1] = "2"
    found = get_args_parser().parse_args(command[1:])
    assert (found.module, found.training_script) == (True, "fastmem")
    name, *flags = found.training_script_args
    ours = parse(name, flags)
    assert (name, ours.layers, ours.sharding.recompute) == ("train", 48, "block")
    assert ours.train.batch % (2 * int(found.nproc_per_node)) == 0
