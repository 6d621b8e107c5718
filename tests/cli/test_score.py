"""fastmem score of documents: what it prints and writes, what stays as before, its errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from cases.score_cases import VOCAB, llama_folder

import fastmem
from fastmem.cli.main import main
from fastmem.cli.score_documents import is_token_set, split_dtype
from fastmem.models.scoring.scores import read_scores

TINY = ["--width", "8", "--vocab", "16", "--length", "4", "--steps", "10", "--count", "5"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("models") / "llama-with-a-name-that-is-too-long")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "ours"
    assert run("train", *TINY, "--out", folder) == 0
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("The first document. " * 3)
    (folder / "b.jsonl").write_text('{"text": "second"}\n{"text": ""}\n')
    (folder / "notes.md").write_text("#")
    return folder


def test_documents_in_words_and_files(
    llama: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a number printed differs from the files, the table is wider than 80 columns, a
    skipped file or a cut document is not told, or the page is missing."""
    out = tmp_path / "out"
    assert run("score", llama, texts, "--out", out, "--also", "entropy", "greedy") == 0
    told = capsys.readouterr()
    summary = json.loads((out / "summary.json").read_bytes())
    assert told.out.startswith(
        f"3 documents, 66 tokens: {summary['bits_per_byte']:.3f} bits a byte"
    )
    assert f"{summary['zlib_bits'] / summary['bytes']:.3f}" in told.out
    assert "llama-with-a-name-that-…" in told.out
    assert "1 document is longer than 32 tokens and scored in windows" in told.out
    assert max(map(len, told.out.splitlines()[:5])) <= 80
    assert f"{texts}: skips 1 file, notes.md" in told.err
    tokens = pyarrow.parquet.read_table(out / "tokens.parquet")
    names = ["document", "position", "token", "bits", "entropy_bits", "is_greedy"]
    assert tokens.column_names == names
    documents = pyarrow.parquet.read_table(out / "documents.parquet")
    assert documents["source"].to_pylist() == ["a.txt", "b.jsonl:1", "b.jsonl:2"]
    assert sum(documents["bits"].to_pylist()) == pytest.approx(summary["bits"])
    page = (out / "score.html").read_text()
    assert "The" in page
    capsys.readouterr()
    (out / "score.html").unlink()
    assert run("report", out) == 0
    assert f"{out}/score.html" in capsys.readouterr().out
    assert (out / "score.html").read_text() == page
    assert run("report", out, "--no-text") == 0
    assert "↵" not in (out / "score.html").read_text().split("<script>")[0]
    assert run("score", llama, texts, "--out", out, "--also", "greedy", "entropy", "--json") == 0
    told = capsys.readouterr()
    assert "finished: nothing to do; --overwrite scores again" in told.err
    assert json.loads(told.out[told.out.index("{") :]) == summary


def test_an_array_of_bits(
    llama: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if an --out that ends in .npy is a folder, or --data is not another name of DATA."""
    out = tmp_path / "bits.npy"
    assert run("score", llama, "--data", texts, "--out", out, "--json") == 0
    bits = np.load(out)
    assert bits.shape == (3,)
    assert bits.dtype == np.float64
    told = capsys.readouterr().out
    assert json.loads(told[told.index("{") :])["bits"] == pytest.approx(bits.sum())
    assert run("score", llama, texts, "--data", texts) == 2
    assert f"DATA {texts} and --data {texts}: give one" in capsys.readouterr().err


def test_memorized_bits_as_before(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a data set of tokens under a model of fastmem gives other numbers than before, or
    its folder other bits than its array."""
    fastmem.write(fastmem.UniformSequences(5, 4, 16), tmp_path / "set", "npy")
    results = []
    for data in ([], ["--data", tmp_path / "set"], [tmp_path / "set.npy"]):
        assert run("score", ours, *data, "--json") == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["memorized_bits"] == results[1]["memorized_bits"]
    assert results[0]["memorized_bits"] == results[2]["memorized_bits"]
    assert run("score", ours, "--out", tmp_path / "bits.npy") == 0
    assert run("score", ours, "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "The model memorized" in told
    assert told.endswith(f"{tmp_path}/out/score.html\n")
    found = read_scores(tmp_path / "out")
    np.testing.assert_allclose(found.documents["bits"], np.load(tmp_path / "bits.npy"), atol=1e-3)
    assert (tmp_path / "out" / "score.html").exists()


def test_memorized_bits_are_scored_once(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if --out with a folder scores twice, or again what is finished, scores before it knows
    that the folder is another's, leaves out --precision, or counts the tokens of a prefix."""
    prefixed = fastmem.PrefixedSequences(fastmem.UniformSequences(5, 4, 16), 2)
    fastmem.write(prefixed, tmp_path / "set", "npy")
    expected = fastmem.sequence_bits(ours, prefixed)
    monkeypatch.setattr("fastmem.cli.score.sequence_bits", None)
    out, notes = tmp_path / "out", tmp_path / "notes"
    for data in ([], ["--data", tmp_path / "set.npy"]):
        assert run("score", ours, *data, "--out", out, "--json", "--overwrite") == 0
        told = capsys.readouterr().out
        first = json.loads(told)
        with monkeypatch.context() as patched:
            patched.setattr(fastmem.CausalLM, "token_stats", None)
            assert run("score", ours, *data, "--out", out, "--json") == 0
        assert json.loads(capsys.readouterr().out) == first
    assert first["code_bits"] == pytest.approx(expected.sum(), abs=1e-3)
    notes.mkdir()
    (notes / "mine").write_text("mine")
    assert run("score", ours, "--out", notes) == 2
    assert "is not the folder of a score" in capsys.readouterr().err
    assert run("score", ours, "--out", out, "--precision", "bf16-true") == 2
    assert "--precision bf16-true with a folder as --out" in capsys.readouterr().err


def test_a_path_that_begins_with_a_point(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if ./missing is looked for on the hub, as a model or as a data set."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    asked: list[object] = []
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", asked.append)
    monkeypatch.setattr("fastmem.data.documents.load_named", asked.append)
    assert run("score", "./missing", "a.txt") == 2
    assert "missing does not exist: give a folder" in capsys.readouterr().err
    assert run("score", llama, "./missing") == 2
    assert "./missing does not exist: give a file" in capsys.readouterr().err
    assert not asked


def test_tokens_of_a_file_under_any_model(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if --dtype is not the type of the tokens and of the weights, by its value, or --length
    does not cut a file."""
    np.arange(40, dtype=np.uint32).tofile(tmp_path / "t.bin")
    flags = ["--dtype", "uint32", "--length", "8", "--json"]
    assert run("score", llama, tmp_path / "t.bin", *flags) == 0
    told = capsys.readouterr().out
    summary = json.loads(told[told.index("{") :])
    assert (summary["documents"], summary["tokens"], summary["dtype"]) == (5, 40, "float32")
    np.save(tmp_path / "t.npy", np.arange(40, dtype=np.uint16).reshape(5, 8))
    assert run("score", llama, tmp_path / "t.npy", "--dtype", "bfloat16", "--json") == 0
    told = capsys.readouterr().out
    assert json.loads(told[told.index("{") :])["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (None, ("auto", None)),
        ("bfloat16", ("bfloat16", None)),
        ("uint32", ("auto", "uint32")),
        ("<u2", ("auto", "<u2")),
        ("i4", ("auto", "i4")),
    ],
)
def test_one_flag_for_two_types(dtype: str | None, wanted: Any) -> None:
    """Fails if a type of tokens is taken for a type of weights."""
    assert split_dtype(dtype) == wanted


def test_which_data_are_a_set_of_tokens(ours: Path, llama: Path, tmp_path: Path) -> None:
    """Fails if text goes to the count of memorized bits, or tokens of a GPT-2 model do not."""
    np.save(tmp_path / "t.npy", np.zeros((2, 4), np.uint16))
    (tmp_path / "t.txt").write_text("x")
    tables = {"text": {"text": ["x"]}, "ids": {"input_ids": [[1, 2]]}}
    for name, columns in tables.items():
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    for name, wanted in (
        ("t.npy", True),
        ("ids.parquet", True),
        ("text.parquet", False),
        ("t.txt", False),
        ("gone", False),
        (".", False),
    ):
        assert is_token_set(ours, tmp_path / name) == wanted
        assert not is_token_set(llama, tmp_path / name)


def test_errors_of_one_line(
    llama: Path, ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a mistake gives more than a line, another exit code than 2, or a folder."""
    text = tmp_path / "a.txt"
    text.write_bytes(b"caf\xe9")
    fine, lines = tmp_path / "b.txt", tmp_path / "c.jsonl"
    fine.write_text("fine")
    lines.write_text(json.dumps({"text": [1, VOCAB]}))
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine").write_text("mine")
    out = tmp_path / "out"
    damaged = tmp_path / "damaged"
    shutil.copytree(llama, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for arguments, message in (
        ([llama, text], f"{text}, byte 3: 0xe9 is not UTF-8"),
        ([llama, tmp_path / "no.txt"], "no.txt does not exist"),
        ([llama, lines], f"c.jsonl:1: token {VOCAB} at position 1 is outside"),
        ([llama, lines, "--field", "x"], "none is 'x': give --field"),
        ([ours, fine], "b.txt is text, and the model has no tokenizer"),
        ([llama, fine, "--context", "99"], "context 99 for a model of 32 positions"),
        ([llama, fine, "--held-out", "5"], "--held-out is for a model of fastmem"),
        ([llama, fine, "--count", "5"], "--count 5 makes a data set"),
        ([ours, "--context", "5"], "--context is for documents: give DATA"),
        ([ours, "--also", "lse"], "--also is for documents: give DATA"),
        ([llama, fine, "--chat-template"], "the tokenizer has none"),
        ([llama], "no run.json records the data set: give --count --length --vocab, or"),
        ([tmp_path / "nothing", fine], "nothing does not exist"),
        ([damaged, fine], "damaged cannot be loaded"),
        ([llama, fine, "--out", notes], "is not the folder of a score, and holds mine: give"),
    ):
        before = [*notes.iterdir()]
        place = [] if "--out" in arguments else ["--out", out]
        if arguments[0] == ours:
            place = []
        assert run("score", *arguments, *place) == 2, arguments
        told = capsys.readouterr().err
        (line,) = [one for one in told.splitlines() if one.startswith("fastmem: ")]
        assert message in line
        assert "Traceback" not in told
        assert [*notes.iterdir()] == before
        assert not (out / "summary.json").exists()


def test_a_report_of_unfinished_scores(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if report makes a page of half the data."""
    (tmp_path / "settings.json").write_text("{}")
    assert run("report", tmp_path) == 2
    assert "is not finished: give the same command again" in capsys.readouterr().err


def test_another_setting_is_named_as_typed(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a folder of other settings names a Python argument, or a flag for a position."""
    text, other, out = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "out"
    text.write_text("some words")
    other.write_text("other words")
    assert run("score", llama, text, "--context", 8, "--out", out) == 0
    for arguments, said in (
        ([text, "--context", 16], "(--context is 8 there, 16 here)"),
        ([text, "--context", 16], "the same --context, or"),
        ([other, "--context", 8], f"(data is {text} there, {other} here)"),
    ):
        capsys.readouterr()
        assert run("score", llama, *arguments, "--out", out) == 2
        assert said in " ".join(capsys.readouterr().err.split())
