"""A directory or a pattern of files as one data set."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fastmem
from fastmem import TokenFile

TOKENS = np.arange(60).reshape(12, 5)


def save(path: Path, tokens: NDArray[Any]) -> None:
    if path.suffix == ".npy":
        np.save(path, tokens.astype("<u2"))
    elif path.suffix == ".bin":
        tokens.astype("<u2").tofile(path)
    elif path.suffix == ".safetensors":
        import safetensors.numpy

        safetensors.numpy.save_file({"tokens": tokens}, path)
    else:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"input_ids": tokens.tolist()}), path)


@pytest.mark.parametrize("suffix", [".npy", ".bin", ".parquet", ".safetensors"])
@pytest.mark.parametrize("name", ["", "part-*"])
def test_shards_in_order(suffix: str, name: str, tmp_path: Path) -> None:
    """Fails if shards are missing, doubled, or not in the order of their names."""
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    for i, (begin, end) in enumerate([(0, 4), (4, 5), (5, 12)]):
        save(folder / f"part-{i:05}{suffix}", TOKENS[begin:end])
    (folder / ".hidden.npy").write_text("not tokens")
    (folder / "_SUCCESS").touch()
    (folder / "README.md").write_text("a set")
    file = TokenFile.open(folder / name, length=5)
    assert [path.name for path in file.files] == [f"part-0000{i}{suffix}" for i in range(3)]
    np.testing.assert_array_equal(file[:], TOKENS)
    np.testing.assert_array_equal(file[[11, 4, 0, 5, 3]], TOKENS[[11, 4, 0, 5, 3]])
    assert (file.count, file.vocab) == (12, 60)
    assert fastmem.from_description(file.description()) == file
    if suffix == ".parquet":  # Spark writes parts without rows
        save(folder / "part-00000a.parquet", TOKENS[:0])
        np.testing.assert_array_equal(TokenFile.open(folder)[:], TOKENS)
    save(folder / f"part-00009{suffix}", TOKENS[:1])
    with pytest.raises(ValueError, match="has 13 sequences, and its description 12"):
        fastmem.from_description(file.description())


def test_tails_of_shards(tmp_path: Path) -> None:
    """Fails if a sequence goes across two files, or the dropped tokens are not said."""
    save(tmp_path / "1.bin", TOKENS.ravel()[:13])
    save(tmp_path / "2.bin", TOKENS.ravel()[13:22])
    save(tmp_path / "3.bin", TOKENS.ravel()[22:24])
    with pytest.warns(UserWarning, match="drops the last 9 tokens, which do not fill a sequence"):
        file = TokenFile.open(tmp_path, length=5)
    assert file[:].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [13, 14, 15, 16, 17]]
    assert file.dropped_tokens == 9


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.npy", "b.bin"], r"files of \.bin and \.npy: give one kind by a pattern"),
        (["train.npy", "val.npy"], "files of train and val: give one kind by a pattern"),
        (["fineweb_train_000001.bin", "fineweb_val_000000.bin"], "files of train and val"),
        (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"], "of test and train"),
        (["data.npy", "validation.npy"], "files of no split and validation"),
        ([], "is a directory: give the path of a file"),
    ],
)
def test_folders_of_several_sets(names: list[str], message: str, tmp_path: Path) -> None:
    """Fails if held-out data is joined to the training data, or formats are mixed."""
    for name in names:
        save(tmp_path / name, TOKENS)
    with pytest.raises(ValueError, match=message):
        TokenFile.open(tmp_path, length=5)
    if "val" in "".join(names):
        assert TokenFile.open(tmp_path / "*val*", length=5).count == 12
    with pytest.raises(ValueError, match="is neither a file nor a data set"):
        TokenFile.open(tmp_path / "x*.npy")


def test_shards_of_several_lengths(tmp_path: Path) -> None:
    """Fails if shards of other lengths are cut without a length, or the two are not named."""
    save(tmp_path / "a.npy", TOKENS)
    save(tmp_path / "b.npy", TOKENS.reshape(10, 6))
    with pytest.raises(ValueError, match=r"a\.npy has sequences of 5 .*b\.npy of 6: .*give length"):
        TokenFile.open(tmp_path)
    assert TokenFile.open(tmp_path, length=3).count == 40


def test_a_folder_of_our_own(tmp_path: Path) -> None:
    """Fails if a set of fastmem is foreign in its folder, or joined to other files."""
    base = fastmem.UniformSequences(10, 5, 60)
    sequences = fastmem.CanarySequences(base, base.held_out(2), 2)
    fastmem.write(sequences, tmp_path / "a", "npy", shards=3)
    np.save(tmp_path / "a.npy.canaries.npy", sequences.places)  # as fastmem generate does
    assert TokenFile.open(tmp_path).known == sequences
    assert fastmem.verify(tmp_path) == sequences.count
    save(tmp_path / "b.npy", TOKENS)
    with pytest.raises(ValueError, match=r"holds b\.npy beside the set of a\.npy\.json: give the"):
        TokenFile.open(tmp_path)
    (tmp_path / "b.npy").rename(tmp_path / "b.npy.journal")
    with pytest.raises(ValueError, match=r"b\.npy\.journal is of an unfinished set: finish it"):
        TokenFile.open(tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_columns(suffix: str, tmp_path: Path) -> None:
    """Fails if the tokens' column is found by luck, or another than the given is read."""
    path = tmp_path / f"a{suffix}"

    def put(**columns: NDArray[Any]) -> None:
        if suffix == ".safetensors":
            import safetensors.numpy

            safetensors.numpy.save_file(columns, path)
        else:
            import pyarrow.parquet

            table = pyarrow.table({name: list(values) for name, values in columns.items()})
            pyarrow.parquet.write_table(table, path)

    put(tokens=TOKENS)
    assert TokenFile.open(path)[:].tolist() == TOKENS.tolist()  # the only one
    put(tokens=TOKENS, labels=TOKENS + 1, weights=TOKENS / 2)
    with pytest.raises(ValueError, match=r"a\.\w+ .*'tokens'.*give column"):
        TokenFile.open(path)
    for column, shift in (("tokens", 0), ("labels", 1)):
        file = TokenFile.open(path, column=column)
        np.testing.assert_array_equal(file[:], TOKENS + shift)
        assert fastmem.from_description(file.description()) == file
    with pytest.raises(ValueError, match=r"a\.\w+.*not (rows|lists) of integers"):
        TokenFile.open(path, column="weights")
    with pytest.raises(ValueError, match=r"a\.\w+ .*'none'.*give column"):
        TokenFile.open(path, column="none")
    with pytest.raises(ValueError, match="column must be a name, got 3"):
        TokenFile.open(path, column=3)  # type: ignore[arg-type]
    put(input_ids=TOKENS, attention_mask=np.ones_like(TOKENS))
    assert TokenFile.open(path)[:].tolist() == TOKENS.tolist()
    if suffix == ".safetensors":
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match="is cut"):
            TokenFile.open(path)


def test_a_directory_of_the_same_name(tmp_path: Path) -> None:
    """Fails if a model's directory hides the set of the same name beside it."""
    sequences = fastmem.UniformSequences(10, 5, 60)
    fastmem.write(sequences, tmp_path / "a")
    (tmp_path / "a").mkdir()
    assert TokenFile.open(tmp_path / "a").known == sequences
