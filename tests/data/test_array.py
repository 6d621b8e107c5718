"""Tokens in memory as a data set."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
import torch

import fastmem
from fastmem import TokenFile, from_array

ROWS = [[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]]


def column(format: str | None) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"input_ids": ROWS}).with_format(format)["input_ids"]


KINDS: dict[str, Any] = {
    "list": ROWS,
    "tuples": tuple(map(tuple, ROWS)),
    "int64": np.array(ROWS),
    "uint8": np.array(ROWS, np.uint8),
    "big-endian": np.array(ROWS, ">i4"),
    "Fortran": np.asfortranarray(ROWS),
    "tensor": torch.tensor(ROWS),
    "uint16 tensor": torch.tensor(ROWS, dtype=torch.uint16),
    "list of tensors": [torch.tensor(row) for row in ROWS],
    "list of arrays": [np.array(row, np.uint16) for row in ROWS],
    "generator": (row for row in ROWS),
    "Series": pandas.Series(ROWS),
    "DataFrame": pandas.DataFrame(ROWS),
    "ListArray": pyarrow.array(ROWS),
    "FixedSizeList": pyarrow.array(ROWS, pyarrow.list_(pyarrow.int32(), 4)),
    "ChunkedArray": pyarrow.chunked_array([ROWS[:1], ROWS[1:]]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    """Fails if tokens of any library are other tokens, or have an entropy."""
    sequences = from_array(KINDS[kind])
    assert (sequences.count, sequences.length, sequences.vocab) == (3, 4, 10)
    assert sequences[:].tolist() == ROWS
    assert sequences[[2, 0]].tolist() == [ROWS[2], ROWS[0]]
    assert sequences[-1].tolist() == ROWS[2]
    assert sequences[::-2].tolist() == ROWS[::-2]
    assert sequences.to_torch(dtype=torch.int32).tolist() == ROWS
    assert math.isnan(sequences.entropy_bits)
    assert math.isnan(sequences.coded_entropy_bits)
    assert sequences.copies().tolist() == [1, 1, 1]
    assert sequences == from_array(ROWS)
    assert pickle.loads(pickle.dumps(sequences)) == sequences


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("format", [None, "numpy", "torch", "arrow", "pandas"])
def test_columns_of_datasets(format: str | None) -> None:
    """Fails if a column of datasets is not a data set in any of its formats."""
    for tokens in (column(format), column(format)[:]):
        assert from_array(tokens)[:].tolist() == ROWS


def test_a_set_is_its_tokens() -> None:
    """Fails if a set changes with the array, or other tokens are equal."""
    tokens = np.array(ROWS)
    sequences = from_array(tokens)
    tokens[0, 0] = 7
    assert sequences[:].tolist() == ROWS
    assert from_array(tokens) != sequences
    assert from_array(tokens[:2]) != sequences
    assert from_array(ROWS, vocab=11) != sequences
    assert hash(from_array(ROWS)) == hash(sequences)
    assert repr(sequences) == "ArraySequences(count=3, length=4, vocab=10)"
    assert from_array(ROWS, vocab=100_000)[0].dtype == np.uint32
    with pytest.raises(ValueError, match="ArraySequences knows only its own sequences"):
        sequences.held_out(1)
    with pytest.raises(ValueError, match=r"only a hash, .* give them again with fastmem.from_arr"):
        fastmem.from_description(sequences.description())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2], [3]], r"sequence 1 has shape \(1,\), and sequence 0 \(2,\): cut or pack"),
        (pandas.Series([[1, 2], [3]]), r"sequence 1 has shape \(1,\)"),
        ([1, 2], r"integers of shape .*got int64 of shape \(2,\).*reshape\(-1, length\)"),
        (np.zeros((2, 2, 2), int), r"got int64 of shape \(2, 2, 2\)"),
        ([[1.0, 2.0]], r"got float64 of shape \(1, 2\).*tokens.astype"),
        ([[True]], "got bool"),
        (torch.ones(2, 2, dtype=torch.bfloat16), "BFloat16"),
        (torch.ones(2, 2, dtype=torch.int64, device="meta"), "meta"),
        (np.ma.masked_array([[1, 2]], np.array([[False, True]])), "not rows of tokens"),
        ([[1, None]], "got object"),
        ([["1"]], "got <U1"),
        ({"input_ids": ROWS}, r"not rows of tokens.*dataset\['input_ids'\]"),
        ("train.npy", r"'train.npy' .*TokenFile.open\(path\) for a file"),
        (None, "None"),
        ([], r"of shape \(0, 0\)"),
        ([[]], r"of shape \(1, 0\)"),
        ([[0, 1], [2, -100]], "token -100 of sequence 1, position 1, is outside 0 to 2147483647"),
        ([[2**31]], "token 2147483648 of sequence 0, position 0"),
        ([[2**70]], "got object"),
        (fastmem.UniformSequences(2, 2, 4), "UniformSequences is a data set already"),
    ],
)
def test_what_is_not_tokens(tokens: Any, message: str) -> None:
    """Fails if anything but whole rows of integers is a set, or an error of another kind."""
    with pytest.raises(ValueError, match=message):
        from_array(tokens)


def test_a_vocabulary() -> None:
    """Fails if a token outside the given vocabulary is taken."""
    with pytest.raises(ValueError, match="token 9 of sequence 1, position 1, is outside 0 to 8"):
        from_array(ROWS, vocab=9)
    with pytest.raises(ValueError, match="vocab must be from 1"):
        from_array(ROWS, vocab=0)


def test_tokens_are_sets_everywhere(tmp_path: Path) -> None:
    """Fails if tokens in memory are not taken where a data set is."""
    model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4))
    config = fastmem.TrainConfig(steps=20, batch=3)
    fastmem.train(model, from_array(ROWS), config, progress=False)
    wanted = fastmem.sequence_bits(model, from_array(ROWS))
    for tokens in (ROWS, np.array(ROWS), torch.tensor(ROWS), pandas.Series(ROWS)):
        model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4))
        fastmem.train(model, tokens, config, progress=False)
        bits = fastmem.sequence_bits(model, tokens)
        np.testing.assert_array_equal(bits, wanted)
        assert math.isnan(fastmem.memorized_bits(bits, tokens).strict)
        stream = fastmem.SequenceStream(tokens, batch=2)
        assert [part.tolist() for part in stream] == [ROWS[:2], ROWS[2:]]
    with pytest.raises(ValueError, match="sequences must be a set of sequences, not 3 "):
        fastmem.sequence_bits(model, 3)


def test_a_checkpoint_knows_the_tokens(tmp_path: Path) -> None:
    """Fails if a run on tokens in memory does not resume, or resumes with other tokens."""
    shape = fastmem.GPTConfig(1, 8, 2, vocab=16, length=4)
    path, config = tmp_path / "run.pt", fastmem.TrainConfig(steps=5)
    fastmem.train(fastmem.GPT(shape), ROWS, config, path, progress=False)
    fastmem.train(fastmem.GPT(shape), ROWS, config, path, progress=False)
    with pytest.raises(ValueError, match=r"of another run \(sequences xxh3 is"):
        fastmem.train(fastmem.GPT(shape), ROWS[::-1], config, path, progress=False)


def test_written_tokens(tmp_path: Path) -> None:
    """Fails if tokens in memory cannot be written, read and verified, or resume as others."""
    fastmem.write(ROWS, tmp_path / "a", "npy")
    file = TokenFile.open(tmp_path / "a")
    assert (file[:].tolist(), file.vocab, file.known) == (ROWS, 10, None)
    assert fastmem.verify(tmp_path / "a") == 3
    payload = bytearray((tmp_path / "a.npy").read_bytes())
    payload[-1] ^= 1
    (tmp_path / "a.npy").write_bytes(payload)
    with pytest.raises(ValueError, match=r"a\.npy has the hash"):
        fastmem.verify(tmp_path / "a")
    mixed = fastmem.repeated(from_array(ROWS), 0.5, 2)
    with pytest.raises(ValueError, match=r"give them again with fastmem.from_array, or write them"):
        fastmem.write(mixed, tmp_path / "b")
    assert not list(tmp_path.glob("b*"))


def test_structure_takes_a_set() -> None:
    """Fails if repetitions of tokens in memory are not possible, or the fix is not said."""
    mixed = fastmem.repeated(from_array(ROWS), 1 / 3, 3)
    assert sorted(mixed.copies()) == [1, 1, 3, 3, 3]
    with pytest.raises(ValueError, match=r"base must be a set .*from_array\(tokens\)"):
        fastmem.repeated(np.array(ROWS), 0.5, 2)  # type: ignore[arg-type]


def test_numpy_scalars(tmp_path: Path) -> None:
    """Fails if a size or an option that is a NumPy number is refused, or does not become plain."""
    i: Any = np.int64
    f: Any = np.float32
    base = fastmem.UniformSequences(i(50), i(8), i(16), i(3), i(2))
    assert base == fastmem.UniformSequences(50, 8, 16, 3, 2)
    weights = fastmem.zipf(i(16), f(1.5))
    for sequences in (
        base,
        fastmem.WeightedSequences(i(20), i(8), weights, seed=i(1)),
        fastmem.WeightedSequences(i(20), i(8), np.array([1, 2, 3], np.float16)),
        fastmem.repeated(base, f(0.25), i(3), i(1)),
        fastmem.CanarySequences(base, base.held_out(i(3)), i(2), i(0)),
        fastmem.PrefixedSequences(base, i(3), i(1)),
    ):
        description = json.loads(json.dumps(sequences.description()))
        assert fastmem.from_description(description) == sequences
        assert (sequences.to_torch(indices=i(3)).numpy() == sequences.tokens(3, threads=i(1))).all()
    assert from_array(ROWS, vocab=i(16)).vocab == 16
    fastmem.write(base, tmp_path / "a", "npy", shards=i(2), workers=i(1))
    assert fastmem.verify(tmp_path / "a", sample=i(3), workers=i(1)) == 3
    assert fastmem.TokenFile.open(tmp_path / "a", length=i(8), vocab=i(16)).count == 50
    stream = fastmem.SequenceStream(base, batch=i(4), seed=i(0), rank=i(0), world=i(2))
    stream.set_epoch(i(1), i(1))
    assert next(iter(stream)).shape == (4, 8)
