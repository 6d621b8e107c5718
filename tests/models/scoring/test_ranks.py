"""Scores by several ranks: the same bytes as by one process, also after a rank has died."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import score_jobs
from cases.causal_models import model_of
from cases.rank_jobs import launched
from cases.score_jobs import BATCH, SEQUENCES, documents, small

import fastmem
from fastmem.base.lock import locked
from fastmem.models.scoring.scores import read_scores

TABLES = ("tokens.parquet", "documents.parquet", "passages.json")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of models, and of results."""
    root = tmp_path_factory.mktemp("ranks")
    for name in ("Llama", "GPT2"):
        model_of(name).save_pretrained(root / name)
    fastmem.GPT(fastmem.GPTConfig(2, 24, 4, vocab=50, length=12), 3).to_hf(root / "GPT")
    for name in ("out", "locked", "gguf", "adapter", "quantized"):
        (root / name).mkdir()
    (root / "gguf" / "model.gguf").touch()
    (root / "adapter" / "adapter_config.json").write_text("{}")
    config = json.loads((root / "Llama" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (root / "quantized" / "config.json").write_text(json.dumps(config))
    return {path.name: f"{path}" for path in root.iterdir()}


@pytest.fixture(scope="module")
def two(folders: dict[str, str]) -> Any:
    """What two ranks found."""
    with locked(Path(folders["locked"])):
        ended = launched(2, "scored", folders, score_jobs.__file__)
    assert ended.codes == [0, 0], ended.errors
    return ended.result


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_two_ranks_equal_one_process(
    two: Any, folders: dict[str, str], name: str, tmp_path: Path
) -> None:
    """The same bytes: fails if a document's bits are not carried from rank to rank."""
    one = fastmem.score(folders[name], documents(), tmp_path, tokens=True, **BATCH)
    out = Path(folders["out"])
    for table in TABLES:
        same = (tmp_path / table).read_bytes() == (out / f"{name}-False" / table).read_bytes()
        assert same, table
    assert not (out / f"{name}-False" / "parts").exists()
    sharded = read_scores(out / f"{name}-True", tokens=True)
    assert one.tokens is not None
    assert sharded.tokens is not None
    assert np.abs(one.tokens["bits"] - sharded.tokens["bits"]).max() < 1e-5
    parts = {"seconds", "tokens_per_second", "settings", "ranks", "bits", "bits_per_token"}
    for field in one.summary.keys() - parts:
        assert one.summary[field] == sharded.summary[field], field
    assert sharded.summary["ranks"] == 2


def test_fewer_documents_than_ranks(two: Any, folders: dict[str, str]) -> None:
    """Fails (or hangs) if an idle rank leaves the passes of a sharded model."""
    for name in ("Llama", "GPT2"):
        bits = fastmem.score(folders[name], [[5, 1, 2, 7]]).summary["bits"]
        assert two[f"{name}-False"] == bits
        assert two[f"{name}-True"] == pytest.approx(bits, rel=1e-6)


def test_without_a_folder(two: Any, folders: dict[str, str]) -> None:
    one = fastmem.score(folders["Llama"], documents(), tokens=True, **BATCH)
    assert one.tokens is not None
    assert two["memory"] == [one.documents["bits"].tolist(), one.tokens["bits"].sum().item()]


def test_sequences(two: Any, folders: dict[str, str]) -> None:
    """Fails if a rank scores no or other sequences, or a part of a weight is another's."""
    bits = fastmem.sequence_bits(fastmem.GPT.from_hf(folders["GPT"]), SEQUENCES)
    assert two["sequences"][0] == bits.tolist()
    assert two["sequences"][1] == pytest.approx(bits.tolist(), rel=1e-5)


def test_all_ranks_take_the_same_way(two: Any) -> None:
    """Fails if rank 0 does not follow rank 1, whose proof fails."""
    assert two["through"] == "logits"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("device_map", "device_map 'auto' with several ranks, which have a device each"),
        ("quantization", "quantization '4bit' with shard: give one of the two"),
        ("in memory", "a model in memory cannot be spread over ranks: save it"),
        ("gguf", "is a GGUF file, which each rank would read whole"),
        ("adapter", "is an adapter, which cannot be spread over ranks: merge it into its base"),
        ("quantized", "has quantized weights, which cannot be spread over ranks: leave shard out"),
        ("data", "rank 1 differs from rank 0 in its data"),
        ("settings", "rank 1 differs from rank 0 in its context (5 there, 4 on rank 0): start"),
        ("folder", "rank 1 differs from rank 0 in its folder (none there"),
        ("lock", "another fastmem is at work in"),
        ("vocabulary", "token 200 at position 1 is outside the model's vocabulary of 100"),
    ],
)
def test_bad_input(two: Any, name: str, error: str) -> None:
    assert error in two["errors"][name]


def test_shard_is_for_ranks(folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="a single process: start it by torchrun"):
        fastmem.score(folders["Llama"], [[1, 2]], shard=True)


@pytest.mark.parametrize(("action", "rank", "line", "kept"), [
    ("die", 0, None, {0, 1, 3}),
    ("full", 1, "rank 1: [Errno 28] No space left on device", {0, 1, 2}),
    ("nan", 1, "rank 1: 4: the bits of the token at position 385 are not finite", set()),
])  # fmt: skip
def test_a_rank_fails(
    tmp_path: Path, action: str, rank: int, line: str | None, kept: set[int]
) -> None:
    """One line on rank 0, no hang, and another number of ranks goes on: to the same bytes."""
    out, one = tmp_path / "out", tmp_path / "one"
    argument = {"out": f"{out}", "rank": rank, "action": action}
    ended = launched(2, "broken", argument, score_jobs.__file__)
    assert 0 not in ended.codes
    if line is not None:
        assert line in ended.errors[0]
    parts = {int(path.name[:6]) for path in (out / "parts").glob("*.tokens.parquet")}
    assert parts == kept
    fastmem.score(small(), documents(), one, **BATCH)
    if action == "die":  # fails if a part after the missing one is taken for a new one
        found = fastmem.score(small(), documents(), out, tokens=True, batch_tokens=512, context=32)
        wanted = read_scores(one, tokens=True)
        assert found.tokens is not None
        assert wanted.tokens is not None
        assert np.allclose(found.documents["bits"], wanted.documents["bits"], 1e-6)
        assert found.tokens["position"].tolist() == wanted.tokens["position"].tolist()
        return
    fastmem.score(small(), documents(), out, **BATCH)
    for table in TABLES:
        assert (out / table).read_bytes() == (one / table).read_bytes(), table
