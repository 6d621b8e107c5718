"""One model on several ranks: the same losses, checkpoints on any number of ranks, clean ends."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import rank_jobs
from cases.rank_jobs import FLAGS, PATHS, STEPS, Ended, all_trained, launched
from torch._dynamo.backends.registry import lookup_backend

import fastmem
from fastmem.base.ranks import joined
from fastmem.cli.main import main
from fastmem.training import group, sharded_checkpoint
from fastmem.training.checkpoint import shards_of

PRECISIONS = ("fp32", "bf16-mixed", "bf16-true", "bf16-stochastic")
BITS = {"fp32": 2e-5, "bf16-mixed": 1e-2, "bf16-true": 2e-2, "bf16-stochastic": 2e-2}
"""How far apart, relative to the entropy, two orders of summation may put the bits."""
ENTROPY = 40 * 11 * np.log2(50)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """A process without ranks, and a job of one rank in this process."""
    with joined("cpu") as job:
        one = all_trained(job)
    return {"plain": all_trained(None), "one": one}


@pytest.fixture(scope="module", params=[2, 4])
def several(request: pytest.FixtureRequest) -> dict[str, Any]:
    ended = launched(request.param, "all_trained", request.param == 2)
    assert ended.codes == [0] * request.param, ended.errors
    return dict(ended.result)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_number_of_ranks_trains_alike(
    precision: str, alone: dict[str, Any], several: dict[str, Any]
) -> None:
    """Fails if ranks see other sequences, average gradients wrongly, or clip by a part's norm."""
    one, many = alone["one"][precision], several[precision]
    difference = np.abs(np.subtract(one["bits"], many["bits"])).max() / ENTROPY
    assert difference < BITS[precision]
    if precision == "fp32":
        np.testing.assert_allclose(one["weights"], many["weights"], rtol=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_job_of_one_rank_trains_as_a_process_alone(precision: str, alone: dict[str, Any]) -> None:
    """Fails if the sharded model starts from other numbers or takes other steps."""
    one, plain = alone["one"][precision]["bits"], alone["plain"][precision]["bits"]
    assert np.abs(np.subtract(one, plain)).max() / ENTROPY < 2 * BITS[precision]


@pytest.mark.parametrize("several", [2], indirect=True)
@pytest.mark.parametrize("way", ["attention", "block", "accumulate"])
def test_ways_to_save_memory_change_rounding_only(way: str, several: dict[str, Any]) -> None:
    """Fails if recomputation computes something else, or accumulation weighs parts wrongly."""
    difference = np.abs(np.subtract(several[way]["bits"], several["fp32"]["bits"])).max()
    assert difference / ENTROPY < BITS["fp32"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiled_blocks_train_alike(
    recompute: Any, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if FSDP2 does not call the compiled blocks, or they compute something else. The
    compiler's own kernels are not generated here."""
    compiler, graphs = torch.compile, []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr("fastmem.models.engine.STEP", "compiled")
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend=backend))
    with joined("cpu") as job:
        found = rank_jobs.trained(job, "fp32", recompute=recompute)
    assert graphs
    difference = np.abs(np.subtract(found["bits"], alone["one"]["fp32"]["bits"])).max()
    assert difference / ENTROPY < BITS["fp32"]


def test_stochastic_rounding_does_not_depend_on_the_ranks(
    alone: dict[str, Any], several: dict[str, Any]
) -> None:
    """Fails if a weight's noise depends on which rank has the weight."""
    assert several["update"] == alone["one"]["update"]


def flags(out: Path, **more: object) -> list[str]:
    return [*FLAGS, "--out", f"{out}", *(f"--{k}={v}" for k, v in more.items())]


def job(size: int, out: Path, action: str = "", step: int = 0, rank: int = 1, **env: str) -> Ended:
    argument: dict[str, Any] = {"flags": flags(out)}
    if action:
        argument |= {"action": action, "step": step, "rank": rank}
    return launched(size, "command", argument, FASTMEM_CHECKPOINT_SECONDS="0", **env)


def curve(out: Path) -> dict[int, float]:
    """Memorized bits by step."""
    points = json.loads((out / "run.json").read_bytes())["curve"]
    return {point["step"]: point["memorized_bits"] for point in points}


def memorized(out: Path) -> float:
    return curve(out)[STEPS]


def whole_steps(out: Path) -> list[str]:
    return sorted(path.parent.name for path in shards_of(out / "checkpoint.pt").glob("*/run.pt"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The curve of an undisturbed run."""
    out = tmp_path_factory.mktemp("undisturbed") / "model"
    with pytest.raises(SystemExit, match="0"):
        main(flags(out))
    return curve(out)


@pytest.fixture(scope="module")
def undisturbed(whole: dict[int, float]) -> float:
    return whole[STEPS]


def test_a_run_goes_on_with_fewer_ranks(tmp_path: Path, whole: dict[int, float]) -> None:
    """Fails if SIGTERM to one rank does not stop all between two steps with a whole checkpoint, if
    the checkpoint of 4 ranks does not open on 2 and on 1, or if a step, or the score that was due
    after it, is lost."""
    out = tmp_path / "model"
    assert {8, 17} <= whole.keys()
    ended = job(4, out, "stop", step=8)
    assert ended.codes == [143] * 4
    (line,) = [line for line in ended.errors[0].splitlines() if "stopped" in line]
    assert line == "stopped: all work is kept, and the same command resumes"
    assert ended.errors[1:] == ["", "", ""]
    assert whole_steps(out) == ["step-000000008"]
    assert job(2, out, "stop", step=9, rank=0).codes == [143, 143]
    assert whole_steps(out) == ["step-000000017"]
    with pytest.raises(SystemExit, match="0"):
        main(flags(out))
    assert curve(out).keys() == whole.keys()
    np.testing.assert_allclose([*curve(out).values()], [*whole.values()], atol=2e-5 * ENTROPY)
    assert not shards_of(out / "checkpoint.pt").exists()
    row = json.loads((out / "run.json").read_bytes())
    assert (row["ranks"], row["mesh"], row["steps"]) == (1, {"shard": 1}, STEPS)


def test_a_killed_rank_ends_the_job_with_one_line(tmp_path: Path, undisturbed: float) -> None:
    """Fails if the other rank hangs or says nothing, or the same command loses or repeats steps."""
    out = tmp_path / "model"
    ended = job(2, out, "die", step=12)
    assert ended.codes == [2, 9]
    lines = [line for line in ended.errors[0].splitlines() if line.startswith("fastmem:")]
    (line,) = lines
    assert line.startswith("fastmem: another rank was lost (")
    assert line.endswith("): the same command goes on from the last checkpoint")
    assert whole_steps(out)
    ended = job(2, out)
    assert ended.codes == [0, 0], ended.errors
    assert abs(memorized(out) - undisturbed) / ENTROPY < BITS["fp32"]
    model = fastmem.GPT.from_hf(out)
    assert len(list(out.glob("model-*-of-*.safetensors"))) >= 2
    bits = fastmem.sequence_bits(model, fastmem.UniformSequences(40, 12, 50, seed=1))
    assert abs(ENTROPY - bits.sum() - memorized(out)) / ENTROPY < 1e-5


def test_an_error_of_one_rank_ends_all_with_its_reason(tmp_path: Path) -> None:
    """Fails if rank 0 waits for the rank that failed, or does not say why it failed."""
    ended = job(2, tmp_path / "model", "fail", step=3)
    assert ended.codes == [2, 2]
    lines = [line for line in ended.errors[0].splitlines() if line.startswith("fastmem:")]
    assert lines == ["fastmem: rank 1: [Errno 5] Input/output error: 'a file'"]
    assert ended.errors[1] == ""


def test_a_silent_rank_ends_the_job(tmp_path: Path) -> None:
    """Fails if a rank waits for another without a limit of time."""
    ended = job(2, tmp_path / "model", "sleep", step=3, FASTMEM_COLLECTIVE_SECONDS="3")
    assert ended.codes[0] == 2
    assert "another rank was lost" in ended.errors[0]


def test_the_checkpoint_of_a_process_alone_opens_on_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: float
) -> None:
    """Fails if weights or moments of one file do not become those of the ranks' parts."""
    path, model = tmp_path / "run.pt", fastmem.GPT(fastmem.GPTConfig(2, 24, 4, 50, 12))
    data = fastmem.UniformSequences(40, 12, 50, seed=1)
    config = fastmem.TrainConfig(steps=STEPS, batch=16)
    monkeypatch.setattr("fastmem.training.group.CHECKPOINT_SECONDS", "0")
    saves: list[int] = []
    save = fastmem.training.run_state.RunState.save

    def until_12(self: Any, *rest: Any) -> None:
        save(self, *rest)
        saves.append(self.result.steps)
        if saves[-1] == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr("fastmem.training.run_state.RunState.save", until_12)
    with pytest.raises(KeyboardInterrupt):
        fastmem.train(model, data, config, path, progress=False)
    monkeypatch.undo()
    with joined("cpu"):
        sharded = fastmem.sharded_gpt(model.config)
        result = fastmem.train(sharded, data, config, path, progress=False)
    assert result.steps == STEPS
    assert result.curve[0].step < 12
    assert abs(result.memorized_bits - undisturbed) / ENTROPY < BITS["fp32"]
    assert not path.exists()  # the folder of the ranks has taken its place


@pytest.mark.parametrize(("fraction", "beside"), [(0.5, True), (0.0, False)])
def test_a_checkpoint_is_written_beside_training_where_a_copy_fits(
    fraction: float, beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if training waits for a checkpoint whose copy has room, or copies where it has none."""
    used: list[str] = []

    def watched(name: str) -> None:
        function = getattr(sharded_checkpoint, name)

        def spy(*inputs: Any, **options: Any) -> Any:
            used.append(name)
            return function(*inputs, **options)

        monkeypatch.setattr(sharded_checkpoint, name, spy)

    watched("save")
    watched("async_save")
    monkeypatch.setattr(sharded_checkpoint, "COPY_FRACTION", fraction)
    monkeypatch.setattr(group, "CHECKPOINT_SECONDS", "0")
    with joined("cpu"):
        model = fastmem.sharded_gpt(rank_jobs.SHAPE)
        fastmem.train(model, rank_jobs.DATA, rank_jobs.CONFIG, tmp_path / "run.pt", progress=False)
    assert used
    assert ("async_save" in used) == beside


def test_a_checkpoint_that_lacks_its_name_is_found(tmp_path: Path) -> None:
    """Fails if a job that was killed between the parts of a checkpoint and its name, while it took
    the place of one of the same step, loses both, or if parts without a record are taken."""
    path, config = tmp_path / "run.pt", fastmem.TrainConfig(steps=4, batch=16)
    with joined("cpu"):
        model = fastmem.sharded_gpt(rank_jobs.SHAPE, 3)
        first = fastmem.train(model, rank_jobs.DATA, config, path, progress=False)
        whole, part = (
            shards_of(path) / name for name in ("step-000000004", ".step-000000004.part")
        )
        whole.rename(part)
        (shards_of(path) / ".step-000000005.part").mkdir()
        again = fastmem.sharded_gpt(rank_jobs.SHAPE, 4)
        found = fastmem.train(again, rank_jobs.DATA, config, path, progress=False)
        assert torch.equal(again.head.full_tensor(), model.head.full_tensor())
    assert found.seconds == first.seconds
    assert [one.name for one in shards_of(path).iterdir()] == [whole.name]


def test_a_model_that_was_read_can_be_written_and_stopped(
    tmp_path: Path, undisturbed: float
) -> None:
    """Fails if weights that a forward pass gathered, and no backward pass freed, are in the way of
    a file, of training, or of the checkpoint of a score that was stopped."""
    ended = launched(2, "read", f"{tmp_path}")
    assert ended.codes == [0, 0], ended.errors
    assert ended.result["file"]
    assert ended.result["kept"]
    assert abs(ended.result["memorized"] - undisturbed) / ENTROPY < BITS["fp32"]


MISUSES = {
    "batch": "batch 15 is not divisible by 2 ranks x accumulate 1: try batch 14",
    "accumulate": "batch 16 is not divisible by 2 ranks x accumulate 3: try batch 12",
    "precision": "the model is sharded for fp32, not bf16-mixed",
    "joined": "this process has joined its ranks already",
    "code": "rank 1 differs from rank 0 in its code (1 there, 0 on rank 0): install the same",
    "data": "rank 1 differs from rank 0 in its data (",
    "command": "(FASTMEM_CHECKPOINT_SECONDS=21 there, FASTMEM_CHECKPOINT_SECONDS=20 on rank 0): ",
    "recompute": "recompute must be one of ('none', 'attention', 'block'), not 'all'",
    "twice": "another fastmem is at work in ",
    "folder": "rank 1 differs from rank 0 in its folder (none there",
    "shape": "is the checkpoint of another run (model layers is 2 there, 1 here)",
    "disk": "rank 1: No space left on device",
    "name": "[Errno 5] Input/output error: 'the name'",
    "alone": "2 ranks train a model of all of them: make it by fastmem.sharded_gpt, or",
    "few": "batch 1 is not divisible by 2 ranks x accumulate 1: try at least 2 sequences",
    "nan": "diverged at step ",
}


@pytest.fixture(scope="module")
def misuse(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ended = launched(2, "misused", f"{tmp_path_factory.mktemp('misuse')}")
    assert ended.codes == [0, 0], ended.errors
    return dict(ended.result)


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_one_error_of_all_ranks(name: str, misuse: dict[str, Any]) -> None:
    """Fails if a misuse is accepted, or seen by one rank alone, which would hang the other."""
    assert MISUSES[name] in misuse[name]


def test_a_full_disk_leaves_no_part(misuse: dict[str, Any]) -> None:
    """Fails if a checkpoint with the parts of some ranks looks whole."""
    assert misuse["shared"] is None
    assert misuse["full"] == []


def test_no_contact_names_the_address(tmp_path: Path) -> None:
    """Fails if a rank waits for ever, or without an address, for ranks that are not there."""
    script = (
        "import os; os.environ |= dict(RANK='1', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', "
        "MASTER_PORT='9')\n"
        "from fastmem.base import ranks; ranks.CONNECT_SECONDS = 1\n"
        "try:\n ranks.joined('cpu').__enter__()\nexcept ranks.RankLost as e: print(e)"
    )
    end = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert re.match(r"rank 1 of 2 does not reach the others by 127.0.0.1:9 \(", end.stdout)


def test_torchrun_starts_again_after_a_death(tmp_path: Path, undisturbed: float) -> None:
    """Fails if torchrun's elastic restart does not end with the losses of an undisturbed run."""
    out = tmp_path / "model"
    argument = {"flags": flags(out), "action": "die", "step": 12, "rank": 1}
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options]
    end = subprocess.run(
        [*torchrun, rank_jobs.__file__, "command", json.dumps(argument)],
        env=os.environ | {"FASTMEM_CHECKPOINT_SECONDS": "0", "PYTHONPATH": os.pathsep.join(PATHS)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert end.returncode == 0, end.stderr
    assert "another rank was lost" in end.stderr
    assert abs(memorized(out) - undisturbed) / ENTROPY < BITS["fp32"]
