"""Each command as a user runs it, and the one-line error of each mistake."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cases.study_rows import study_row, write_rows
from transformers import GPT2LMHeadModel

from fastmem import GPT, GPTConfig, TrainConfig, UniformSequences, load_rows, train
from fastmem.base.storage import write_json
from fastmem.base.terminal import INTERRUPTED
from fastmem.cli import capacity as capacity_command
from fastmem.cli.capacity import capacity_defaults
from fastmem.cli.main import COMMANDS, main
from fastmem.cli.score import Score, default_device
from fastmem.cli.train import Train
from fastmem.models.quantize import surviving_bits
from fastmem.sweeps.store import PLANNED

TINY = ["--width", "8", "--vocab", "16", "--length", "4", "--steps", "10"]
GRID = [*TINY, "--counts", "4", "8", "--seeds", "0"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_capacity_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if capacity leaves out a file or the table, or does not resume."""
    out = tmp_path / "sweep"
    assert run("capacity", *GRID, "--out", out) == 0
    output = capsys.readouterr()
    assert f"2 runs on cpu in {out}\n" in output.err
    assert "[2/2] 1x8-h4-fp32-n8-seed0" in output.err
    assert "bits/parameter strict" in output.out
    assert "lower bound" in output.out
    assert "saturated" not in output.out
    figures = {p.name for p in (out / "figures").iterdir()}
    names = ("memorized_bits", "capacity", "training")
    assert figures == {f"{name}.{ending}" for name in names for ending in ("png", "svg", "pdf")}
    page = (out / "report.html").read_text()
    assert "There is no law yet" in page
    assert f"{out}/report.html" in output.out
    summary = json.loads((out / "capacity.json").read_text())
    assert len(summary["models"]) == 1

    assert run("capacity", *GRID, "--out", out) == 0
    assert "2 done and skipped, 0 failed and tried again" in capsys.readouterr().err
    (out / "capacity.json").unlink()
    assert run("report", out) == 0
    assert json.loads((out / "capacity.json").read_text()) == summary
    assert (out / "report.html").read_text() == page
    assert "1 × 8, 4 heads, fp32: " in capsys.readouterr().out


def test_an_unfinished_sweep_gets_no_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the report of a part of the runs asks for data sets that the other runs have."""
    assert run("capacity", *GRID, "--out", tmp_path) == 0
    work = json.loads((tmp_path / PLANNED).read_text())["work"]
    write_json(tmp_path / PLANNED, {"work": work | {"1x8-h4-fp32-n99-seed0": 1.0}})
    capsys.readouterr()
    assert run("report", tmp_path) == 0
    output = capsys.readouterr().out
    assert "unfinished, 2 of 3 runs" in output
    assert "1 × 8, 4 heads, fp32: " not in output
    assert "what to run" not in (tmp_path / "report.html").read_text()


def test_sequence_bits_of_runs_that_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if --sequence-bits on finished runs does not say how many lack the bits and why, or
    counts runs that have them."""
    monkeypatch.setattr(capacity_command, "write_report", lambda *_: 0)  # its figures take long
    out = tmp_path / "s"
    assert run("capacity", *GRID, "--out", out) == 0
    more = [*GRID[:-4], "--counts", "4", "16", "--seeds", "0", "--sequence-bits", "--out", out]
    capsys.readouterr()
    assert run("capacity", *more) == 0
    output = capsys.readouterr().err
    assert "2 finished runs have no sequence bits, and models are not kept to score them" in output
    assert f"or delete their rows in {out}/rows to train them again" in output
    for path in (out / "rows").glob("*-n[48]-*"):
        path.unlink()
    assert run("capacity", *more) == 0
    assert "no sequence bits" not in capsys.readouterr().err
    assert len(list((out / "sequence_bits").iterdir())) == 2


@pytest.mark.parametrize("how", [("--workers", 2), ("--ray", "local")])
def test_capacity_side_by_side(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], how: tuple[str, object]
) -> None:
    """Fails if workers leave out a run, or print lines of their own."""
    assert run("capacity", *GRID, *how, "--out", tmp_path / "sweep") == 0
    output = capfd.readouterr()
    first, *rows = output.err.splitlines()
    assert first.startswith("2 runs on cpu in")
    # Workers that take long to start give the log a line of progress.
    rows = [line for line in rows if not line.startswith("sweep: ")]
    assert [line[:5] for line in rows] == ["[1/2]", "[2/2]"]
    assert len(load_rows(tmp_path / "sweep")) == 2
    assert output.out.startswith("model")


@pytest.mark.parametrize("command", ["capacity", "text"])
def test_sizes_in_two_units(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if one of --counts and --loads is ignored."""
    assert run(command, "--counts", 5, "--loads=3") == 2
    told = capsys.readouterr().err
    assert told == "fastmem: --counts and --loads both give sizes: leave one out\n"


def test_a_folder_without_a_study_has_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a folder without a finished run or with two studies gets a report, or the error
    lacks the values that differ."""
    lost, one = study_row(8, 5, error="Diverged: at step 3"), study_row(8, 9)
    assert run("report", write_rows(tmp_path / "lost", [lost])) == 2
    output = capsys.readouterr().err
    assert "holds no finished run, and 1 failed, the first with Diverged: at step 3" in output
    assert run("report", write_rows(tmp_path / "two", [one, study_row(8, 10, lr=0.5)])) == 2
    output = capsys.readouterr().err
    assert (
        f"lr is 0.5 in 1 (first 1x8-h4-fp32-n10-seed0) and 0.04 in 1 (first {one['key']})" in output
    )
    (tmp_path / "none").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "run.json").write_text("{}")
    assert run("report", tmp_path / "model") == 2
    assert "is a model of fastmem train, and its run is run.json there" in capsys.readouterr().err
    assert run("report", tmp_path / "none") == 2
    assert "holds no finished run, and 0 failed: run `fastmem" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/report.html"))
    assert not list(tmp_path.glob("*/capacity.json"))


def test_a_failed_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a sweep with failed runs looks like success."""
    steps = ["--steps", "300"]
    assert run("capacity", *GRID, *steps, "--lr", "1e4", "--out", tmp_path / "s") == 1
    output = capsys.readouterr()
    assert "1x8-h4-fp32-n4-seed0  failed: Diverged: diverged at step" in output.out
    assert "no run finished" in output.out


def test_train_and_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if transformers or score cannot load a trained model, or score counts other bits."""
    out = tmp_path / "model"
    assert run("train", *TINY, "--count", 5, "--out", out) == 0
    row = json.loads((out / "run.json").read_text())
    capsys.readouterr()
    assert run("score", out, "--out", tmp_path / "bits.npy", "--json") == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["memorized_bits"]["strict"] == pytest.approx(row["memorized_bits"]["strict"])
    bits = np.load(tmp_path / "bits.npy")
    assert bits.shape == (5,)
    assert 5 * 3 * 4 - bits.sum() == pytest.approx(row["memorized_bits"]["strict"])
    assert run("score", out, "--held-out", 7, "--json") == 0
    assert json.loads(capsys.readouterr().out)["sequences"]["start"] == 5
    assert run("score", out, "--quantize", 8, 2, "--json") == 0
    survives = json.loads(capsys.readouterr().out)["quantized"]
    expected = surviving_bits(GPT.from_hf(out), UniformSequences(5, 4, 16), (8, 2))
    for bits in (8, 2):
        assert survives[str(bits)]["memorized_bits"]["strict"] == expected[bits].strict
    assert run("score", out, "--quantize", 3, "--asymmetric", "--json") == 0
    scored = json.loads(capsys.readouterr().out)["quantized"]["3"]
    bits = surviving_bits(GPT.from_hf(out), UniformSequences(5, 4, 16), (3,), symmetric=False)
    assert scored["share"] == bits[3].fraction
    assert run("score", out, "--quantize", 4, 16) == 2
    assert "--quantize must be from 2 to 8, got 16" in capsys.readouterr().err
    assert GPT2LMHeadModel.from_pretrained(out).config.n_embd == 8
    assert not (out / "checkpoint.pt").exists()
    before = (out / "run.json").read_bytes()
    assert run("train", *TINY, "--count", 5, "--out", out) == 0
    assert "finished: nothing to do" in capsys.readouterr().err
    assert (out / "run.json").read_bytes() == before
    assert run("train", *TINY, "--out", out) == 2
    told = capsys.readouterr().err
    assert "holds a finished run (--count is 5 there, 400 here): give another --out" in told
    assert run("train", *TINY, "--out", out, "--overwrite") == 0
    assert json.loads((out / "run.json").read_text())["sequences"]["count"] == 400


def test_too_few_epochs_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a budget that memorizes nothing is spent in silence, or others are warned of."""
    flags = ["train", *TINY[:-2], "--count", 50]
    for place, (budget, epochs) in enumerate(
        [(["--epochs", 2], "2"), (["--steps", 4], "4"), (["--seconds", 1e-9], "1")]
    ):
        assert run(*flags, *budget, "--out", tmp_path / f"{place}") == 0
        warning = f"warning: in {epochs} epochs a model memorizes next to nothing"
        assert warning in capsys.readouterr().err
    assert run(*flags, "--epochs", 5, "--out", tmp_path / "enough") == 0
    np.save(tmp_path / "text.npy", UniformSequences(9, 4, 16)[:])
    assert run("train", *TINY[:2], "--data", tmp_path / "text.npy", "--vocab", 16,
               "--epochs", 1, "--out", tmp_path / "text") == 0  # fmt: skip
    assert "warning" not in capsys.readouterr().err


def test_score_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if score prints JSON unasked, another number than JSON, or a negative share without
    its reason."""
    out, text = tmp_path / "model", tmp_path / "text.npy"
    assert run("train", *TINY[:-1], 300, "--count", 5, "--out", out) == 0
    np.save(text, np.arange(40, dtype=np.uint16).reshape(10, 4) % 16)
    capsys.readouterr()
    for flags, sentence in (
        (
            [],
            "vocabulary 16: 60 bits of entropy in coded tokens\nThe model memorized {:,.0f} ",
        ),
        (
            ["--held-out", 20],
            "The model memorized nothing: its code is {:,.0f} bits longer than",
        ),
        (["--data", text, "--vocab", 16], "Memorized bits are unknown, since the entropy"),
        (["--quantize", 8, 2], "2-bit weights "),
    ):
        assert run("score", out, *flags, "--json") == 0
        exact = json.loads(capsys.readouterr().out)
        assert run("score", out, *flags) == 0
        told = capsys.readouterr().out
        assert sentence.format(abs(exact.get("memorized_bits", {}).get("strict", 0))) in told
        assert f"{exact['code_bits']:,.0f}" in told
        assert max(map(len, told.splitlines())) <= 100
    assert "{" not in told


def test_folders_of_other_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a command writes unasked into a folder with other files, or --overwrite deletes any
    of them, or leaves runs of the sweep before."""
    monkeypatch.setattr(capacity_command, "write_report", lambda *_: 0)  # its figures take long
    sweep, model, notes = (tmp_path / name for name in ("sweep", "model", "notes"))
    assert run("capacity", *GRID, "--out", sweep) == 0
    assert run("train", *TINY, "--count", 5, "--out", model) == 0
    (notes / "rows").parent.mkdir()
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (notes / name).write_text("mine")
    capsys.readouterr()
    for command, folder, kind in (
        (["capacity", *GRID], model, "sweep"),
        (["capacity", *GRID], notes, "sweep"),
        (["train", *TINY], sweep, "model"),
        (["train", *TINY], notes, "model"),
    ):
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
        assert run(*command, "--out", folder) == 2
        assert f"{folder} is not the folder of a {kind}, and holds " in capsys.readouterr().err
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
        assert run(*command, "--out", folder, "--overwrite") == 0
        assert before.keys() <= {*folder.rglob("*")}
    (sweep / "rows" / "mine.txt").write_text("mine")
    (sweep / "empty").mkdir()
    assert run("capacity", *GRID, "--out", sweep / "empty") == 0
    assert run("capacity", *GRID, "--out", sweep) == 0
    assert "finished: nothing to do; --overwrite" in capsys.readouterr().err
    assert run("capacity", *GRID[:-1], 7, "--steps", 11, "--out", sweep) == 2
    assert "the same --steps, or --overwrite" in capsys.readouterr().err
    assert run("capacity", *GRID[:-1], 7, "--steps", 11, "--out", sweep, "--overwrite") == 0
    assert {row["seed"] for row in load_rows(sweep)} == {7}
    assert (sweep / "rows" / "mine.txt").exists()


def test_train_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if --profile leaves out a phase of the loop, its percentage, or the trace."""
    out = tmp_path / "model"
    assert run("train", *TINY[:-1], 40, "--count", 5, "--profile", "--out", out) == 0
    lines = capsys.readouterr().err.splitlines()
    table = lines[lines.index("where the time went, 40 steps (last column: a step)") + 1 :]
    assert [line.split()[0] for line in table] == [
        "data",
        "gradients",
        "optimizer",
        "score",
        "rest",
    ]
    shares = [float(line.split()[1].rstrip("%")) for line in table]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "gradients" for event in events) == 20


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the help of a command lacks an example, shows types of Python or None, breaks lines
    where the source does, or has a line that 80 columns do not hold."""
    monkeypatch.setenv("COLUMNS", "80")
    assert run(command, "--help") == 0
    told = capsys.readouterr().out
    assert f"Example: fastmem {command} " in told
    assert "None" not in told
    assert "(default: )" not in told
    words = " ".join(told.replace("│", " ").split())
    if command == "capacity":
        assert "--counts INT ...|{auto} Data set sizes" in words
        assert "the time on this device, estimated" in words
        assert "on this  " not in told
    assert ("--zipf" in told) is (command in ("train", "generate"))
    assert {len(line) for line in told.splitlines() if line.startswith("│")} <= {80}
    assert max(told.splitlines(), key=len)[80:] == ""


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if fastmem without arguments does not name the first command, or a line wraps."""
    assert run() == 2
    usage = capsys.readouterr().out
    assert "To begin: fastmem capacity" in usage
    assert max(map(len, usage.splitlines())) <= 80
    assert run("--version") == 0
    told = capsys.readouterr().out
    assert told.startswith("fastmem 0.")
    assert [line.split()[0] for line in told.splitlines()[1:]] == [
        "build",
        "torch",
        "triton",
        "python",
        "device",
    ]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the completion of a shell lacks a command or a flag."""
    assert run("completion", shell) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "sequence-bits" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_completion_of_fish(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if fish could not read the script, or its program does not complete: fish's language
    has strings in quotes (in double quotes a backslash escapes \\, " and $) and blocks with an end.
    """
    assert run("completion", "fish") == 0
    script = capsys.readouterr().out
    quoted = r'set -l pycode "((?:[^"\\$]|\\["\\$])*)"\n'
    (found,) = re.finditer(quoted, script)
    program = re.sub(r'\\(["\\$])', r"\1", found[1])
    strings = r"""#.*|'[^'\\]*'|"([^"\\]|\\n)*"|"""
    rest = re.sub(strings, "", script.replace(found[0], "\n"))
    assert not {*"'\"\\"} & {*rest}
    words = [line.split()[0] for line in rest.splitlines() if line.split()]
    assert words.count("end") == sum(words.count(word) for word in ("function", "if", "for"))
    for typed, offered in (
        ("", COMMANDS.keys()),
        ("train", {"--zipf", "--precision"}),
        ("score", {"--data", "--precision"}),
        ("train --precision", {"fp32", "bf16-mixed", "bf16-true", "bf16-stochastic"}),
    ):
        command = [sys.executable, "-c", program, "fastmem", *typed.split()]
        command.append(f"{len(command) - 3}")
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        told = {line.split("\t")[0] for line in lines.splitlines()}
        assert told >= {*offered}
        assert ("--zipf" in told) is (typed == "train")


def test_a_gpu_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a command ignores a GPU that is there, or takes one against --device."""
    for is_there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda answer=is_there: answer)
        assert default_device(capacity_defaults([]).sweep.device) == device
        assert [default_device(kind.device) for kind in (Train, Score)] == [device] * 2
        assert default_device("cpu") == "cpu"
        assert default_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--version"], 0, "fastmem 0."),
        (["train", "--help"], 0, "usage: fastmem train"),
        (["capacity", "--width", "0"], 2, "fastmem: --width must be an integer"),
    ],
)
def test_python_m_fastmem(arguments: list[str], code: int, text: str) -> None:
    """Fails if python -m fastmem is another program than fastmem."""
    command = [sys.executable, "-m", "fastmem", *arguments]
    child = subprocess.run(command, capture_output=True, text=True)
    assert (child.returncode, (child.stdout + child.stderr)[: len(text)]) == (code, text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("frobnicate", "no command 'frobnicate': use one of capacity, text, train, score"),
        ("capacity --seeds -1", "--seeds must be from 0 to 18446744073709551615, got -1"),
        ("capacity --batch 0", "fastmem: --batch must be a whole number from 1 up, not 0"),
        (
            "capacity --width 15 --heads 4",
            "--width 15 is not divisible by --heads 4: try --heads 3",
        ),
        ("capacity --length 1", "fastmem: --vocab 128, --length 1: sequences without entropy"),
        ("capacity --width 8 8", "--width needs one or more different values, not 8 8"),
        ("capacity --width", "--width needs one or more different values, not none"),
        ("capacity --loads 0", "--loads must be above 0 and finite, not 0.0"),
        ("predict / --width 8", "/ is not the folder of a sweep, and holds "),
        ("capacity --counts 0", "--counts must be from 1 to"),
        ("capacity --counts -5", "--counts must be from 1 to"),
        ("capacity --vocab 0", "vocab must be an integer from 1 up"),
        ("capacity --vocab 2147483649", "vocab must be at most"),
        ("capacity --length 1 --counts 5", "only tokens after the first are coded"),
        (
            "capacity --seeds 18446744073709551616",
            "--seeds must be from 0 to 18446744073709551615, got 18446744073709551616",
        ),
        ("capacity --device cuda:99", "device cuda:99 is unavailable"),
        (
            "capacity --preset paper --device cpu --epochs 5 --seconds 5",
            "the budget is one of --steps, --epochs and --seconds, not --epochs 5.0, --seconds 5.0",
        ),
        ("capacity --out /proc/fastmem", "/proc/fastmem"),
        ("train --lr 0", "lr must be above 0"),
        ("train --heads 0", "heads must be an integer from 1 up, not 0"),
        ("score /nowhere", "/nowhere is not a directory: give the folder of a model"),
        ("capacity --out /etc/passwd", "/etc/passwd is a file: give --out a folder"),
        ("generate --count 5 --length 4 --vocab 16 --out /etc/passwd/x", "/etc/passwd is a file: "),
        ("train --vocab 1", "vocab is 1: a token that is always the same has no bits"),
        ("train --device meta", "device meta holds shapes, not numbers"),
        ("score /", "/ lacks config.json of a model: give a model's folder"),
        ("score / --count 5 --length 4 --vocab 16", "/ lacks config.json of a model"),
        (
            "report /nowhere",
            "/nowhere is not a directory: run `fastmem capacity --out /nowhere` first",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Fails if a mistake gives a traceback, two lines, another reason, or exit code 0."""
    words = arguments.split()
    if words[0] in ("capacity", "train") and "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    assert run(*words) == 2
    output = capsys.readouterr().err
    assert message in output
    assert output.startswith("fastmem: ")
    assert "[Errno" not in output
    assert len(output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


FP = "Expected one of ('fp32', 'bf16-mixed', 'bf16-true', 'bf16-stochastic')."


@pytest.mark.parametrize("columns", ["50", "200"])
@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ("capacity --widht 8", ("Unrecognized options: --widht, 8", "meant: --width INT ... Wi")),
        (
            "capacity --lr fast",
            ("--lr: takes FLOAT, not 'fast'", "--lr FLOAT Peak learning rate; by"),
        ),
        ("capacity --counts 4 some", ("--counts: takes INT ...|{auto}, not '4', 'some'",)),
        ("capacity --counts None", ("--counts: takes INT ...|{auto}, not 'None'",)),
        ("capacity --heads None", ("--heads: takes INT ..., not 'None'",)),
        ("capacity --width 8,16", ("--width: takes INT ..., not '8,16'", "each width. (default:")),
        ("capacity --precision fp8 fp32", ("invalid choice 'fp8' for argument '--pre", FP)),
        ("capacity --preset huge", ("invalid choice 'huge'", "one of ('laptop', 'paper')")),
        ("capacity --plan yes", ("Unrecognized options: yes",)),
        ("train --lr", ("Missing value for argument '--lr'",)),
        ("train --lr=", ("--lr: takes FLOAT, not ''",)),
        ("train --steps 1e3", ("--steps: takes INT, not '1e3'",)),
        ("score", ("Missing from fastmem score: PATH Folder of a model",)),
        ("score / --precision fp8", ("invalid choice 'fp8' for argument '--precision'", FP)),
        ("generate --length 4", ("Missing from fastmem generate: --count INT", "--vocab INT V")),
        ("generate --count 5 --length 4 --vocab 16 --format csv", ("invalid choice 'csv'",)),
        ("verify", ("Missing from fastmem verify: PATH",)),
        ("completion tcsh", ("invalid choice 'tcsh'", "('bash', 'zsh', 'fish')")),
    ],
)
def test_a_wrong_flag_shows_its_help(
    arguments: str,
    messages: tuple[str, ...],
    columns: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if the error of a flag lacks the flag or the value, names None or a type of Python,
    ends with another code, or leaves out its reason in a narrow terminal."""
    monkeypatch.setenv("COLUMNS", columns)
    assert run(*arguments.split()) == 2
    output = capsys.readouterr().err
    told = " ".join(output.translate(str.maketrans("", "", "│╭╮╰╯─")).split())
    for message in (*messages, f"fastmem {arguments.split()[0]} --help"):
        assert message in told
    for word in ("Traceback", "None}", "tuple[", "<class", "Got errors", "default: None"):
        assert word not in told
    assert max(map(len, output.splitlines())) <= int(columns)


def test_damage_in_the_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a damaged row or checkpoint is used or deleted, or gives a traceback."""
    monkeypatch.setattr(capacity_command, "write_report", lambda *_: 0)  # its figures take long
    out = tmp_path / "s"
    assert run("capacity", *GRID, "--out", out) == 0
    row = out / "rows" / "1x8-h4-fp32-n4-seed0.json"
    row.write_text("{")
    capsys.readouterr()
    assert run("capacity", *GRID, "--out", out) == 2
    output = capsys.readouterr().err.splitlines()
    assert output == [f"fastmem: {row} is not a whole file of fastmem: delete it and run again"]
    row.unlink()
    checkpoint = out / "checkpoints" / "1x8-h4-fp32-n4-seed0.pt"
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.write_bytes(b"torn")
    assert run("capacity", *GRID, "--out", out) == 2
    assert f"{checkpoint} is damaged: delete it" in capsys.readouterr().err
    checkpoint.unlink()
    assert run("capacity", *GRID, "--out", out) == 0


def test_a_full_disk_is_one_line_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a full disk leaves part of a row, or the sweep cannot resume. No file may exceed
    400 bytes."""
    out = tmp_path / "s"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        assert run("capacity", *GRID, "--out", out) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    output = capsys.readouterr().err.splitlines()[-1]
    assert "File too large" in output
    assert "free some space and give the same command again" in output
    assert not list(out.glob("rows/*"))
    assert run("capacity", *GRID, "--out", out) == 0


def test_a_dropped_ctrl_c_stops_after_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the sweep goes on after a Ctrl-C whose exception Python dropped in a finalizer."""
    monkeypatch.setattr(capacity_command, "row_line", lambda row: INTERRUPTED.set())
    assert run("capacity", *GRID, "--out", tmp_path / "s") == 130
    assert len(list((tmp_path / "s" / "rows").iterdir())) == 1


def test_ctrl_c(tmp_path: Path) -> None:
    """Fails if Ctrl-C loses a finished row, leaves part of a row, or gives another exit code."""
    out = tmp_path / "s"
    command = [sys.executable, "-c", "from fastmem.cli.main import main; main()", "capacity"]
    grid = [*GRID[:-4], "--counts", "4", "8", "--seeds", *map(str, range(50)), "--out", str(out)]
    with subprocess.Popen([*command, *grid], stderr=subprocess.PIPE, text=True) as child:
        while len(list((out / "rows").glob("*.json"))) < 3:
            assert child.poll() is None
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGINT)
        output = child.communicate()[1]
    assert child.returncode == 130
    assert "finished work is kept" in output
    assert "Traceback" not in output
    assert run("report", out) == 0
    assert not list((out / "rows").glob(".*"))


def test_the_checkpoint_of_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the way out is a function's and not a flag."""
    model, data = GPT(GPTConfig(1, 8, 2, 16, 4)), UniformSequences(8, 4, 16)
    config = TrainConfig(steps=2)
    train(model, data, config, tmp_path / "checkpoint.pt", progress=False)
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--width=16", "--vocab=16", "--length=4", f"--out={tmp_path}"])
    assert capsys.readouterr().err.endswith(" here): give another --out, or --overwrite\n")
