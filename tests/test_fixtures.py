"""What fastmem 0.1.0 wrote opens and goes on today: tests/fixtures/v0.1.0."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmem
from fastmem import (
    GPT,
    GPTConfig,
    SweepConfig,
    TokenFile,
    TrainConfig,
    TrainResult,
    UniformSequences,
    repeated,
    sequence_bits,
    sweep,
    train_many,
    verify,
)
from fastmem.cli.main import main
from fastmem.sweeps.job import checkpoint_of
from fastmem.training.run_state import RunState
from fastmem.training.step import Step

FIXTURES = Path(__file__).parent / "fixtures" / "v0.1.0"
SHAPE = GPTConfig(layers=1, width=8, heads=4, vocab=16, length=4)
KILLED = "1x8-h4-fp32-n16-seed0"
"""Killed at step 120 of 200."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES, tmp_path / "old"))


@pytest.fixture
def finished() -> dict[str, Any]:
    """The row of the same run, not killed."""
    return dict(json.loads((FIXTURES / "finished.json").read_text()))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with each step of training."""
    taken: list[None] = []
    take = Step.take

    def counted(self: Step, *args: Any) -> torch.Tensor:
        taken.append(None)
        return take(self, *args)

    monkeypatch.setattr(Step, "take", counted)
    return taken


def test_a_sweep_goes_on_from_its_checkpoint(
    old: Path, finished: dict[str, Any], steps: list[None]
) -> None:
    """Fails if finished runs train again, or the killed run starts at step 0 or ends elsewhere."""
    config = SweepConfig(
        width=(8,), vocab=16, length=4, counts=(4, 8, 16), seeds=(0,), steps=200,
        sequence_bits=True, out=old / "sweep",
    )  # fmt: skip
    (row,) = sweep(config, progress=False)
    assert len(steps) == 80
    assert (row["key"], row["status"], row["steps"]) == (KILLED, "done", 200)
    for convention in ("strict", "published"):
        expected = pytest.approx(finished["memorized_bits"][convention], rel=1e-3)
        assert row["memorized_bits"][convention] == expected
    assert row["held_out_bits"] == pytest.approx(finished["held_out_bits"], rel=2e-2)
    same = ("schema", "model", "parameters", "sequences", "train", "peak_rates", "entropy_bits")
    assert {name: row[name] for name in same} == {name: finished[name] for name in same}
    assert finished.keys() <= {*row, "checksum"}
    assert not checkpoint_of(old / "sweep", KILLED).exists()
    assert len(list(sweep(config, progress=False))) == 0
    assert sorted(fastmem.load(old / "sweep")["count"]) == [4, 8, 16]


def test_a_folder_is_read(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a column, a figure or capacity.json needs what rows of 0.1.0 lack."""
    runs = fastmem.load(old / "sweep")
    assert runs.set_index("count")["strict_bits"].round(3).to_dict() == {4: 47.986, 8: 91.957}
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["report", str(old / "sweep")])
    assert "1 × 8" in capsys.readouterr().out
    models = json.loads((old / "sweep" / "capacity.json").read_text())["models"]
    assert [run["count"] for run in models[0]["runs"]] == [4, 8]


def test_a_checkpoint_opens(old: Path, finished: dict[str, Any], steps: list[None]) -> None:
    """Fails if the identity or the optimizer state in a checkpoint reads otherwise."""
    path, sequences = checkpoint_of(old / "sweep", KILLED), UniformSequences(16, 4, 16)
    config = TrainConfig(steps=200)
    assert RunState(GPT(SHAPE), sequences, config, path).result.steps == 120
    (result,) = train_many([GPT(SHAPE)], [sequences], [config], [path], progress=False)
    assert isinstance(result, TrainResult)
    assert len(steps) == 80
    assert [p.step for p in result.curve] == [p["step"] for p in finished["curve"]]
    expected = finished["memorized_bits"]["strict"]
    assert result.memorized_bits == pytest.approx(expected, rel=1e-3)


def test_data_sets(old: Path) -> None:
    """Fails if a manifest reads otherwise, or the same description gives other tokens."""
    base = UniformSequences(40, 4, 16, seed=1)
    sets = {"data.npy": repeated(base, 0.5, times=2, seed=1), "shards.bin": base}
    for name, expected in sets.items():
        assert verify(old / name) == expected.count
        file = TokenFile.open(old / name)
        assert file.to_torch().equal(expected.to_torch())
        assert file.description() == expected.description()


@pytest.fixture
def bits() -> Any:
    """What each of eight sequences costs under the saved model."""
    expected = json.loads((FIXTURES / "model.json").read_text())["sequence_bits"]
    return pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_saved_weights(old: Path, bits: Any) -> None:
    """Fails if the old names of weights are unknown, or a weight goes to another layer."""
    state = torch.load(old / "state_dict.pt")
    model = GPT(SHAPE, seed=1)
    model.load_state_dict(state)
    assert sequence_bits(model, UniformSequences(8, 4, 16, seed=3)) == bits
    assert any("attend" in name for name in state)  # the caller's dict stays as it was
    assert not any("attend" in name for name in model.state_dict())


def test_an_old_and_a_new_name_are_an_error(old: Path) -> None:
    """Fails if one of two weights for a layer is dropped in silence."""
    state = torch.load(old / "state_dict.pt")
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*attend.weight"):
        GPT(SHAPE).load_state_dict(state | GPT(SHAPE).state_dict())
    del state["blocks.0.attend.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*qkv.bias"):
        GPT(SHAPE).load_state_dict(state)


def test_a_hugging_face_folder(old: Path, bits: Any) -> None:
    """Fails if a folder that to_hf wrote is another model today."""
    model = GPT.from_hf(old / "hf")
    assert sequence_bits(model, UniformSequences(8, 4, 16, seed=3)) == bits
