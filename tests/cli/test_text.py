"""fastmem text: one run of the command, its files, resumption, and one line for bad input."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.sweep_rows import bytes_of, command
from cases.text_cases import FLAGS, documents, write_documents

from fastmem import GPT, GPTConfig, total_unintended
from fastmem.base.lock import locked
from fastmem.base.storage import write_json
from fastmem.data.text import MANIFEST
from fastmem.report.text_json import text_json
from fastmem.report.text_study import read_text_study
from fastmem.sweeps.store import read_sequence_bits


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder, and its data beside it."""
    folder = tmp_path_factory.mktemp("text")
    data = write_documents(folder / "docs.jsonl")
    assert command("text", data, *FLAGS, "--workers", 1, "--out", folder / "out") == 0
    return folder / "out"


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    """Fails if the plan trains anything, or leaves out references or uniform sequences, or plans
    again what is finished."""
    data, out = write_documents(tmp_path / "docs.jsonl"), tmp_path / "out"
    assert command("text", data, *FLAGS, "--workers", 1, "--out", out, "--plan") == 0
    text = capsys.readouterr().out
    heads = ("runs on text", "references", "runs on uniform sequences")
    places = [text.index(f"{head}\n") for head in heads]
    assert places == sorted(places)
    assert [int(n) for n in re.findall(r"(\d+) runs to do, 0 done", text)] == [4, 2, 10]
    assert [path.name for path in out.iterdir()] == ["corpus"]
    done = finished.parent / "docs.jsonl"
    assert command("text", done, *FLAGS, "--workers", 1, "--out", finished, "--plan") == 0
    text = capsys.readouterr().out
    assert re.findall(r"0 runs to do, (\d+) done", text) == ["4", "10"]
    assert "references\n" not in text


def test_schema(finished: Path) -> None:
    """Fails if text.json lacks a number, or a sum differs from the arrays of the folder."""
    found = json.loads((finished / "text.json").read_text())
    study = read_text_study(finished)
    corpus = found["corpus"]
    assert corpus["documents"] == 200
    assert corpus["sequences"] == sum(corpus["splits"].values())
    assert {"bytes", "exact_duplicates", "near_duplicates"} <= corpus.keys()
    (model,) = found["models"]
    shape = {name: model[name] for name in ("layers", "width", "heads", "vocab", "length")}
    assert shape == {"layers": 1, "width": 8, "heads": 2, "vocab": 256, "length": 16}
    assert [(run["count"], run["seed"]) for run in model["runs"]] == [
        (20, 0),
        (20, 1),
        (60, 0),
        (60, 1),
    ]
    for row, run in zip(model["runs"], study.runs, strict=True):
        members, others = read_sequence_bits(finished, run.row["key"])
        parts = [run.held_out, run.test, run.canaries[1]]
        assert others.tolist() == np.concatenate(parts).tolist()
        assert members.tolist() == [*run.members, *run.canaries[0]]
        assert [part.size for part in (run.members, *parts)] == [run.count] * 3 + [2]
        assert row["train_bits_per_token"] == pytest.approx(run.members.mean() / 15)
        assert row["test_bits_per_token"] == pytest.approx(run.test.mean() / 15)
        assert row["entropy_bits"]["uniform"] == run.count * 15 * 8
        for code in ("reference", "compressor", "uniform"):
            bits, ours = run.codes[code], row["unintended_bits"][code]
            assert row["entropy_bits"][code] == pytest.approx(bits[0].sum())
            totals: dict[str, Any] = {
                name: total_unintended(
                    run.members, bits[0], run.held_out, bits[1], 120, code=name, replicates=2
                )
                for name in ("max", "mixture")
            }
            for name, total in totals.items():
                assert ours[name] == pytest.approx(total.unintended.estimate)
                assert ours[f"held_out_{name}"] == pytest.approx(total.held_out.estimate)
            assert ours["net"]["estimate"] == pytest.approx(totals["max"].net.estimate)
            assert ours["net"]["low"] < ours["net"]["estimate"] < ours["net"]["high"]
            of_test = total_unintended(
                run.members, bits[0], run.test, run.test_codes[code], 120, replicates=2
            )
            assert ours["net_test"]["estimate"] == pytest.approx(of_test.net.estimate)
            generalization = totals["max"].generalization.estimate
            assert row["generalization_bits"][code] == pytest.approx(generalization)
    size = model["sizes"][0]
    nets = [run["unintended_bits"]["reference"]["net"]["estimate"] for run in model["runs"][:2]]
    assert size["unintended_bits"]["reference"]["net"]["estimate"] == pytest.approx(np.mean(nets))
    assert (size["count"], size["seeds"]) == (20, 2)
    assert found["capacity_from"].startswith("runs of uniform data")
    assert model["capacity_bits"] > 0


def test_membership_and_extraction(finished: Path) -> None:
    """Fails if text.json or the page lacks the membership of a run, or canaries and other
    documents count in it."""
    found = json.loads((finished / "text.json").read_text())["membership"]
    study = read_text_study(finished)
    assert [one["run"] for one in found] == [run.row["key"] for run in study.runs]
    for one, run in zip(found, study.runs, strict=True):
        wins = run.members[:, None] < run.held_out
        ties = run.members[:, None] == run.held_out
        assert one["auc"]["estimate"] == pytest.approx(wins.mean() + ties.mean() / 2)
        assert [entry["prefix"] for entry in one["extraction"]] == [2, 4, 8]
    assert "Membership and extraction" in (finished / "text.html").read_text()
    assert (finished / "figures" / "membership.csv").exists()


def test_canaries(finished: Path) -> None:
    """Fails if canaries count as text, those planted are not memorized in a small data set, or
    those that were never trained on are."""
    found = json.loads((finished / "text.json").read_text())["canaries"]
    assert found["each_bits"] == 15 * 8
    assert found["counts"] == [20]
    planted, others = found["planted"], found["held_out"]
    assert planted["count"] == others["count"] == 4  # 2 of each seed
    assert planted["entropy_bits"] == 4 * 120
    assert 0.7 * 480 < planted["unintended_bits"]["low"] <= planted["unintended_bits"]["high"] < 480
    assert others["unintended_bits"] == {"estimate": 0.0, "low": 0.0, "high": 0.0}
    study = read_text_study(finished)
    assert [run.canaries[0].size for run in study.runs] == [2] * 4
    assert text_json(study)["canaries"] == found


def test_resumed(finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Fails if a finished command trains again, a moved folder or file is another study, or two
    workers write other rows."""
    data = tmp_path / "moved.jsonl"
    shutil.copy(finished.parent / "docs.jsonl", data)
    out = tmp_path / "moved"
    shutil.copytree(finished, out)
    before = bytes_of(out)
    assert command("text", data, *FLAGS, "--workers", 1, "--out", out) == 0
    told = capsys.readouterr()
    assert "4 runs on text, 4 done and skipped" in told.err
    assert "training" not in told.err
    assert bytes_of(out) == before
    ours, theirs = (json.loads((one / "text.json").read_text()) for one in (out, finished))
    assert ours == theirs
    row = next((out / "rows").iterdir())
    row.unlink()
    assert command("text", data, *FLAGS, "--workers", 2, "--out", out) == 0
    assert "[4/4]" in capsys.readouterr().err
    kept = {name: value for name, value in bytes_of(out).items() if name != row.name}
    assert kept == {name: value for name, value in before.items() if name != row.name}


def test_a_changed_corpus_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a corpus that changed between two starts goes on, but for --overwrite."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    data = write_documents(tmp_path / "docs.jsonl", 190)
    few = [*FLAGS, "--counts", 20, "--seeds", 0, "--no-uniform", "--workers", 1, "--out", out]
    capsys.readouterr()
    assert command("text", data, *few) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "was prepared from other text: " in line
    manifest = out / "corpus" / MANIFEST
    before = manifest.read_bytes()
    with locked(out):
        assert command("text", data, *few, "--overwrite") == 2
    assert "is at work" in capsys.readouterr().err
    assert manifest.read_bytes() == before
    assert command("text", data, *few, "--overwrite") == 0
    assert [path.name for path in (out / "rows").iterdir()] == ["1x8-h2-fp32-n22-seed0.json"]
    assert json.loads((out / "text.json").read_text())["corpus"]["documents"] == 190


BAD = [
    ("empty", [], "holds no text: give text"),
    ("two", [], "has 2 of the 3 documents that 3 splits need"),
    ("few", [], r"more than half of the"),
    ("docs", ["--length", 1], "length is 1: only tokens after the first are coded"),
    ("latin", [], "is not UTF-8"),
    ("same", [], "is empty: "),
    ("docs", ["--vocab", 100], "is outside the vocabulary of 100"),
    ("blank", [], "holds white space: give text"),
    ("absent", [], "absent"),
    ("docs", ["--reference", "small"], "a vocabulary of 100 and no tokenizer"),
    ("docs", ["--reference", "saw"], "was trained on split train of this corpus"),
    ("docs", ["--counts", "auto"], "needs data of known entropy"),
    ("docs", ["--data", "docs"], "give one of the two"),
    ("docs", ["--fractions", 0.5, 0.5, 0.5], "with the sum 1"),
    ("docs", ["--canaries", -1], "canaries must be from 0"),
    ("docs", ["--workers", 1, "--capacity", "absent"], "is not a directory"),
    ("docs", ["--workers", 1, "--capacity", "FINISHED"], "no finished run"),
    ("docs", ["--reference-heads", 0], "--reference-heads must be an integer from 1 up"),
]


@pytest.mark.parametrize(("data", "flags", "message"), BAD)
def test_bad_input(
    data: str,
    flags: list[object],
    message: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if bad input is not one line that names it, or leaves rows."""
    monkeypatch.chdir(tmp_path)
    contents = {
        "empty": "",
        "two": '{"text": "one text"}\n{"text": "another text"}\n',
        "same": json.dumps({"text": "the same words again " * 9}) + "\n",
        "blank": '{"text": "  "}\n' * 5,
    }
    for name, text in contents.items():
        Path(f"{name}.jsonl").write_text(text * (9 if name == "same" else 1))
    Path("latin.txt").write_bytes(b"caf\xe9 " * 100)
    write_documents(Path("docs.jsonl"))
    write_documents(Path("few.jsonl"), 12)
    GPT(GPTConfig(1, 8, 2, vocab=100, length=16)).to_hf("small")
    GPT(GPTConfig(1, 8, 2, vocab=256, length=16)).to_hf("saw")
    write_json(Path("small/run.json"), {"sequences": {"kind": "uniform"}})
    train = read_text_study(finished).corpus.train
    write_json(Path("saw/run.json"), {"sequences": train.description()})
    capsys.readouterr()
    path = "latin.txt" if data == "latin" else f"{data}.jsonl"
    flags = [finished if flag == "FINISHED" else flag for flag in flags]
    assert command("text", path, *FLAGS, *flags, "--out", "out") == 2
    line = [one for one in capsys.readouterr().err.splitlines() if one.startswith("fastmem:")]
    assert len(line) == 1
    assert message in line[0]
    assert not list(Path("out").glob("rows/*"))


def test_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a binary file of a folder is not skipped, counted and named, or a folder that holds
    something else is written to."""
    for place, text in enumerate(documents(60)):
        (tmp_path / f"{place}.txt").write_text(text)
    (tmp_path / "binary.txt").write_bytes(b"\0\1 binary")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.md").write_text("mine")
    few = [*FLAGS, "--counts", 20, "--seeds", 0, "--no-uniform", "--workers", 1, "--canaries", 0]
    assert command("text", tmp_path, *few, "--out", notes) == 2
    assert "holds notes.md" in capsys.readouterr().err
    assert [path.name for path in notes.iterdir()] == ["notes.md"]
    out = tmp_path / "out"
    assert command("text", tmp_path, *few, "--out", out) == 0
    told = capsys.readouterr()
    assert "60 documents" in told.err
    assert "left out binary.txt" in told.err
    found = json.loads((out / "text.json").read_text())
    assert found["canaries"] is None
    assert found["capacity_from"].startswith("2.87 bits a parameter")
    assert command("capacity", "--out", out) == 2
    assert "is the folder of a text sweep: give another --out" in capsys.readouterr().err
    capacity = tmp_path / "capacity"
    shape = ["--width", 8, "--vocab", 16, "--length", 4, "--counts", 4]
    assert command("capacity", *shape, "--steps", 5, "--seeds", 0, "--out", capacity) == 0
    assert command("text", tmp_path, *few, "--out", capacity) == 2
    assert "is the folder of another sweep" in capsys.readouterr().err
    assert not (capacity / "corpus").exists()


def test_a_study_that_is_not_whole(finished: Path, tmp_path: Path) -> None:
    """Fails if a folder without its codes, or that is not a text sweep, is read."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    next((out / "reference").glob("*-40/seed1.npz")).unlink()
    with pytest.raises(ValueError, match=r"has 0 sequences of seed 1 by the reference"):
        read_text_study(out)
    with pytest.raises(ValueError, match="is not the folder of a text sweep"):
        read_text_study(tmp_path)


@pytest.mark.parametrize(
    ("part", "name"), [("corpus", "text"), ("corpus", "rows"), ("target", "membership")]
)
def test_the_report_of_an_unfinished_folder(
    part: str, name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a folder of text or membership that was stopped is taken for one of capacity."""
    (tmp_path / part).mkdir()
    if name == "rows":
        shutil.copytree(finished / "rows", tmp_path / "rows")
    assert command("report", tmp_path) == 2
    expected = f"{tmp_path} is not finished: give the same fastmem {name.replace('rows', 'text')} "
    assert capsys.readouterr().err == f"fastmem: {expected}command again\n"


def test_the_page_is_made_again(finished: Path, tmp_path: Path) -> None:
    """Fails if `fastmem report` does not make the same page and figures, or --no-text leaves a word
    of the text in a file that it writes."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "text.html").unlink()
    shutil.rmtree(out / "figures")
    assert command("report", out) == 0
    page = (out / "text.html").read_text()
    assert page.replace(out.name, finished.name) == (finished / "text.html").read_text()
    names = {path.name for path in (finished / "figures").iterdir()}
    assert {path.name for path in (out / "figures").iterdir()} == names
    words = {word for text in documents() for word in text.split() if len(word) == 6}
    assert any(word in page for word in words)
    assert command("report", "--no-text", out) == 0
    for path in (out / "text.html", out / "text.json", *(out / "figures").iterdir()):
        assert not [word for word in words if word.encode() in path.read_bytes()], path
