"""The plan of one model on many GPUs."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastmem import GPTConfig, TrainConfig, UniformSequences
from fastmem.cli.main import main
from fastmem.models.flops import flops_per_token
from fastmem.models.sharded import Sharding
from fastmem.sweeps.large_plan import large_plan, recomputed
from fastmem.sweeps.rows import RunSpec

SHAPE = GPTConfig(2, 64, 4, 64, 32)


def run_of(batch: int = 64, shape: GPTConfig = SHAPE) -> RunSpec:
    sequences = UniformSequences(1000, shape.length, shape.vocab)
    return RunSpec(shape, sequences, TrainConfig(steps=10, batch=batch))


def test_the_smallest_number_of_gpus_is_that_of_trying_all() -> None:
    """Fails if fewer GPUs would fit, or the number found does not."""
    numbers = [1, 2, 4, 8]
    peaks = [large_plan(run_of(8), Sharding(), n, 1e9).lines[0].peak.total for n in numbers]
    assert peaks == sorted(peaks, reverse=True)
    for n, peak in zip(numbers, peaks, strict=True):
        assert large_plan(run_of(8), Sharding(), None, 1.01 * peak / 0.9).smallest == n


def test_hours_from_the_rate_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the hours are not those of the published tokens at 35 % of 50 TFLOP/s."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (line,) = large_plan(run_of(), Sharding(), 1).lines
    speed = 0.35 * 50e12 / flops_per_token(SHAPE, 32)
    assert line.tokens_per_second == pytest.approx(speed)
    assert line.published_seconds == pytest.approx(131.072e9 / speed)


def test_recomputed_products_of_a_block() -> None:
    """Fails if a block computes again anything but its forward pass, a third of its FLOPs, or the
    output layer is computed again."""
    tall = GPTConfig(64, 64, 4, 2, 32)
    assert recomputed(tall, 32, "block") == pytest.approx(1 / 3, rel=0.01)
    assert recomputed(tall, 32, "none") == 0 < recomputed(tall, 32, "attention") < 1 / 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--plan --gpus 0", "--gpus must be from 1"),
        ("--plan --gpus 7 --batch 8", "not divisible by 7 ranks"),
        ("--plan --batch 8 --accumulate 3", "on any number of GPUs: try --batch 6"),
        ("--plan --gpu-memory 0", "--gpu-memory must be above 0"),
        ("--plan --gpu-memory 0.0001", "try --recompute block"),
        ("--gpus 2", "belong to --plan"),
    ],
)
def test_what_no_plan_can_be_made_of(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if one of these is planned, or has no line that says the fix."""
    with pytest.raises(SystemExit, match="2"):
        main(["train", *flags.split()])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_command_prints_a_table_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the plan leaves a file, or does not say what to start and what is assumed."""
    monkeypatch.chdir(tmp_path)
    flags = ["--length", "32", "--batch", "16", "--gpus", "16", "--out", str(tmp_path / "x")]
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--plan", *flags])
    out = capsys.readouterr().out
    for text in ("torchrun --nnodes 2", "published budget", "assumed"):
        assert text in out
    assert not list(tmp_path.iterdir())


def test_gpt2_xl_is_planned_in_little_memory() -> None:
    """Fails if the plan of 1.5 billion parameters takes 2 GB, or is not those of 1,556,075,200
    parameters on 8 GPUs."""
    code = (
        "from pathlib import Path\n"
        "from fastmem.training.memory import *\n"
        "shape = GPTConfig(48, 1600, 25, 50257, 64)\n"
        "peak = planned_peak(shape, TrainConfig(batch=64), Sharding(), 8, 1000, 64)\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(peak.weights, status.split('VmHWM:')[1].split()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    weights, kilobytes = map(int, done.stdout.split())
    assert weights == pytest.approx(1_556_075_200 * 4 / 8, rel=1e-3)
    assert kilobytes < 2e6
