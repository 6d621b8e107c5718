"""generate and verify; data sets with structure and from files in train and score."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fastmem
from fastmem.base.storage import read_json
from fastmem.cli.dataset import Structure, make_data
from fastmem.cli.main import main

SHAPE = ["--count", "1_000", "--length", "8", "--vocab", "16"]
TINY = ["--width", "8", "--steps", "10"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("format", ["bin", "llmc", "megatron", "npy", "parquet", "safetensors"])
def test_generate_and_verify(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if generate writes another set than its flags describe, or does not name the files."""
    out = tmp_path / "new" / "train"
    flags = ["--seed", 5, "--format", format, "--shards", 2, "--workers", 1, "--out", out]
    assert run("generate", *SHAPE, *flags) == 0
    output = capsys.readouterr()
    assert "1,000 sequences" in output.err
    manifest = Path(output.out.strip())
    assert manifest.parent == out.parent
    file = fastmem.TokenFile.open(manifest)
    assert file.known == fastmem.UniformSequences(1000, 8, 16, seed=5)
    assert run("verify", manifest) == 0
    assert "1,000 sequences of" in capsys.readouterr().out
    assert run("verify", out, "--sample", 10) == 0
    assert capsys.readouterr().out.startswith("10 sequences of")
    assert run("generate", *SHAPE, *flags) == 2
    assert "exists already: give another name, or --overwrite" in capsys.readouterr().err
    assert run("generate", *SHAPE, *flags, "--overwrite") == 0


@pytest.mark.parametrize(
    ("flags", "rows", "entropy_bits"),
    [
        ([], 1000, 1000 * 32),
        (["--prefix", "3"], 1000, 1000 * 20 + 12),
        (["--repeat-fraction", "0.1", "--repeat-times", "4"], 1300, 1000 * 32),
        (["--repeat-share", "0.1"], 1100, 1000 * 32),  # the flag of 0.1.0
        (["--canaries", "7", "--canary-times", "5"], 1035, 1007 * 32),
        (["--zipf", "0"], 1000, 1000 * 32),
        (["--canaries", "7", "--repeat-fraction", "1", "--prefix", "1"], 2007, 1007 * 28 + 4),
    ],
)
def test_structure(flags: list[str], rows: int, entropy_bits: float, tmp_path: Path) -> None:
    """Fails if generate ignores a flag of structure, or the entropy is wrong."""
    assert run("generate", *SHAPE, *flags, "--out", tmp_path / "train") == 0
    assert run("verify", tmp_path / "train") == 0
    file = fastmem.TokenFile.open(tmp_path / "train")
    assert (file.count, file.entropy_bits) == (rows, entropy_bits)
    assert file.coded_entropy_bits < entropy_bits


@pytest.mark.parametrize("prefix", [0, 3])
def test_places_of_canaries(prefix: int, tmp_path: Path) -> None:
    """Fails if the saved rows of the canaries are wrong, or stay when a set without canaries
    replaces the set."""
    path = tmp_path / "train.bin.canaries.npy"
    flags = ["--canaries", "7", "--canary-times", "5", "--prefix", prefix]
    assert run("generate", *SHAPE, *flags, "--out", tmp_path / "train") == 0
    file, places = fastmem.TokenFile.open(tmp_path / "train"), np.load(path)
    assert places.shape == (7, 5)
    assert (file.copies(places.ravel()) == 5).all()
    for row in places:
        assert (file[row] == file[row[0]]).all()
    assert run("generate", *SHAPE, "--overwrite", "--out", tmp_path / "train") == 0
    assert not path.exists()


def test_canaries_are_far_from_held_out_data() -> None:
    """Fails if held-out sequences of a set with canaries are too few or include canaries."""
    sequences = make_data(100, 8, 16, 0, Structure(canaries=10, repeat_fraction=0.5, prefix=2))
    assert sequences.held_out(1000).count == 1000


def test_train_and_score_a_generated_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a file gives other bits than the data set in it."""
    assert run("generate", *SHAPE, "--out", tmp_path / "set", "--format", "npy") == 0
    assert run("train", *TINY, "--data", tmp_path / "set", "--out", tmp_path / "a") == 0
    assert run("train", *TINY, *SHAPE, "--out", tmp_path / "b") == 0
    a, b = (read_json(tmp_path / name / "run.json") for name in "ab")
    assert a["memorized_bits"] == b["memorized_bits"]
    assert a["sequences"] == b["sequences"]
    capsys.readouterr()
    lines = []
    for flags in ([], ["--data", tmp_path / "set.npy"], SHAPE):
        assert run("score", tmp_path / "a", *flags, "--json") == 0
        lines.append(json.loads(capsys.readouterr().out))
    assert lines[0] == lines[1] == lines[2]
    assert lines[0]["memorized_bits"]["strict"] == pytest.approx(a["memorized_bits"]["strict"])
    assert lines[0]["code_bits"] + lines[0]["memorized_bits"]["strict"] == 1000 * 7 * 4
    flags = ["--data", tmp_path / "set.npy", "--held-out", 5, "--json"]
    assert run("score", tmp_path / "a", *flags) == 0
    assert json.loads(capsys.readouterr().out)["sequences"]["start"] == 1000


def test_train_and_score_a_foreign_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if memorized bits are claimed without a known entropy, or dropped tokens go unsaid."""
    path = tmp_path / "text.bin"
    np.arange(83, dtype=np.uint16).tofile(path)
    flags = ["--data", path, "--length", 8]
    assert run("train", *TINY, *flags, "--out", tmp_path / "m") == 0
    output = capsys.readouterr().err
    assert "drops the last 3 tokens, which do not fill a sequence of 8" in output
    assert " bits, " in output
    assert " per token" in output
    row = read_json(tmp_path / "m" / "run.json")
    assert row["entropy_bits"] is None
    assert row["memorized_bits"] == {"strict": None, "published": None}
    assert row["bits_per_token"] == pytest.approx(row["code_bits"] / 70)
    for again in ([], flags):
        assert run("score", tmp_path / "m", *again, "--json") == 0
        scored = json.loads(capsys.readouterr().out)
        assert scored["code_bits"] == pytest.approx(row["code_bits"])
        assert scored.keys() == {"sequences", "code_bits", "bits_per_token"}
        assert scored["sequences"]["path"] == str(path)
    assert run("score", tmp_path / "m", *flags, "--held-out", 1) == 2
    assert "without held-out sequences" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate --count 5 --length 4 --vocab 0", "vocab must be from 1 to 2147483648, got 0"),
        ("generate --count 18446744073709551617 --length 4 --vocab 2", "count must be from 1 to"),
        ("generate --count 5 --length 0 --vocab 16", "length must be from 1 to"),
        ("generate --count 5 --length 4 --vocab 16 --shards 6", "shards must be from 1 to 5"),
        ("generate --count 5 --length 4 --vocab 16 --prefix 4", "prefix"),
        (
            "generate --count 5 --length 4 --vocab 16 --zipf -1",
            "--zipf must be a finite number",
        ),
        (
            "generate --count 5 --length 4 --vocab 16 --repeat-fraction 2",
            "--repeat-fraction must be above 0",
        ),
        ("train --repeat-fraction 0.1 --repeat-times 1", "--repeat-times must be from 2"),
        ("train --canaries -1", "--canaries must be from 1 to"),
        ("train --canaries 1 --canary-times 0", "--canary-times must be from 1"),
        ("train --data-seed -1", "--data-seed must be from 0"),
        ("train --seed -1", "--seed must be an integer from 0"),
        ("generate --count 5 --length 4 --vocab 4 --seed -1", "--seed must be from 0"),
        ("train --dtype uint32", "fastmem: --dtype uint32 is for a file: add --data FILE"),
        ("train --column ids", "fastmem: --column ids is for a file: add --data FILE"),
        (
            "generate --count 5 --length 4 --vocab 16 --repeat-times 5",
            "--repeat-times 5 does nothing without --repeat-fraction",
        ),
        (
            "train --count 5 --length 4 --vocab 16 --canary-times 5",
            "--canary-times 5 does nothing without --canaries",
        ),
        ("verify /nowhere", "/nowhere has no manifest beside it"),
        ("verify /etc/passwd", "/etc/passwd has no manifest beside it"),
        ("train --data /nowhere.bin", "/nowhere.bin is neither a file nor a data set"),
        ("train --data /etc/passwd", "has the suffix '': fastmem reads"),
        ("train --data /nowhere.bin --count 5", "is a whole data set: add only --length"),
        ("train --data /nowhere.bin --prefix 5", "is a whole data set: add only --length"),
    ],
)
def test_mistakes_are_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Fails if a mistake gives a traceback, two lines, another reason, or leaves a file."""
    words = arguments.split()
    if words[0] != "verify":
        words += ["--out", str(tmp_path / "out")]
    assert run(*words) == 2
    output = capsys.readouterr().err
    assert message in output
    assert output.startswith("fastmem: ")
    assert len(output.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_score_takes_the_flags_of_structure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if score refuses flags that 0.1.0 took, or scores another set."""
    assert run("train", *TINY, *SHAPE, "--zipf", 1, "--out", tmp_path / "m") == 0
    found = []
    for flags in ([], [*SHAPE, "--zipf=1"], [*SHAPE, "--repeat-share", 0.5]):
        capsys.readouterr()
        assert run("score", tmp_path / "m", *flags, "--json") == 0
        found.append(json.loads(capsys.readouterr().out)["code_bits"])
    assert found[0] == found[1] != found[2]


def test_structure_and_half_the_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if score calls run.json missing when it records a set with structure."""
    assert run("train", *TINY, *SHAPE, "--zipf", 1, "--out", tmp_path / "m") == 0
    assert run("score", tmp_path / "m", "--count", 10) == 2
    output = capsys.readouterr().err
    assert (
        "run.json records a weighted data set, without its flags: give --length --vocab" in output
    )


def test_damage_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the error for an altered file lacks its file, byte or sequence."""
    out = tmp_path / "train.bin"
    assert run("generate", *SHAPE, "--out", out) == 0
    payload = bytearray(out.read_bytes())
    payload[100] ^= 1
    out.write_bytes(payload)
    capsys.readouterr()
    assert run("verify", out) == 2
    output = capsys.readouterr().err.splitlines()
    assert len(output) == 1
    assert output[0].startswith(f"fastmem: {out}, byte 100 (sequence 6, position 2)")


def test_ctrl_c_keeps_the_written_blocks(tmp_path: Path) -> None:
    """Fails if Ctrl-C gives a traceback or another exit code, or removes written blocks."""
    program = "from fastmem.cli.main import main; main()"
    shape = ["--count", "20_000_000", "--length", "64", "--vocab", "2048"]
    flags = ["generate", *shape, "--workers", "1", "--out", str(tmp_path / "train")]
    command = [sys.executable, "-c", program, *flags]
    log = tmp_path / "train.bin.journal"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        while not (log.exists() and log.read_bytes().count(b"\n") > 3):
            assert child.poll() is None
            time.sleep(0.001)
        os.kill(child.pid, signal.SIGINT)
        output = child.communicate()[1]
    assert child.returncode == 130
    assert "the same command resumes" in output
    assert "Traceback" not in output
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin.part", log.name}
    assert (tmp_path / "train.bin.part").stat().st_size >= 3 * (4 << 20)


def test_files_of_other_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if --dtype, --column, a directory or a pattern does not reach the file, or the model
    cannot be scored on it again."""
    import pyarrow.parquet

    tokens = np.arange(40).reshape(10, 4)
    tokens.astype("<u4").tofile(tmp_path / "raw.bin")
    (tmp_path / "set").mkdir()
    for part in (0, 1):
        table = pyarrow.table({"ids": tokens[5 * part :][:5].tolist(), "labels": [[1] * 4] * 5})
        pyarrow.parquet.write_table(table, tmp_path / "set" / f"{part}.parquet")
    for i, words in enumerate(
        [
            "raw.bin --dtype uint32 --length 4",
            "set --column ids",
            "set/*.parquet --column ids",
        ]
    ):
        data, *flags = words.split()
        out = tmp_path / f"model{i}"
        assert run("train", *TINY, "--data", tmp_path / data, *flags, "--out", out) == 0
        assert run("score", out, "--out", tmp_path / f"{i}.npy") == 0
        assert len(np.load(tmp_path / f"{i}.npy")) == 10
    np.testing.assert_array_equal(np.load(tmp_path / "1.npy"), np.load(tmp_path / "2.npy"))
    capsys.readouterr()
    for words, message in (
        (f"--data {tmp_path}/raw.bin --length 4", "give --dtype uint32 or int64"),
        (f"--data {tmp_path}/set", "give --column"),
        ("--dtype uint32", "--dtype uint32 is for a file: add --data FILE"),
    ):
        assert run("train", *TINY, *words.split(), "--out", tmp_path / "none") == 2
        assert message in capsys.readouterr().err


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a command makes a folder called ~, or does not find what another wrote there."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("generate", *SHAPE, "--canaries", 2, "--out=~/new/set") == 0
    assert run("verify", "~/new/set") == 0
    assert run("train", *TINY, "--data=~/new/set", "--out=~/model") == 0
    assert run("score", "~/model", "--out=~/bits.npy") == 0
    grid = ["--vocab", 16, "--length", 4, "--counts", 4, "--seeds", 0]
    assert run("capacity", *TINY, *grid, "--out=~/sweep") == 0
    assert run("report", "~/sweep") == run("watch", "--once", "~/sweep") == 0
    assert len(fastmem.load_rows("~/sweep")) == len(fastmem.load("~/sweep")) == 1
    model, sequences = fastmem.GPT.from_hf("~/model"), fastmem.TokenFile.open("~/new")
    fastmem.train(model, sequences, fastmem.TrainConfig(steps=2), "~/run.pt", progress=False)
    model.to_hf("~/again")
    fastmem.write(sequences, "~/copy", "npy")
    assert fastmem.verify("~/copy") == 1002
    config = fastmem.SweepConfig(width=(8,), steps=2, counts=(4,), seeds=(0,), out="~/two")  # type: ignore[arg-type]
    assert len(list(fastmem.sweep(config, progress=False))) == 1
    assert not list(Path().iterdir())
    made = {path.name for path in (tmp_path / "home").iterdir()}
    assert made >= {"new", "model", "bits.npy", "sweep", "run.pt", "again", "copy.npy", "two"}
