"""The examples of docs/cli.md: they run, in their order, or at least parse."""

import re
import shlex
from pathlib import Path

import pytest

from fastmem.cli.main import COMMANDS, main, parse

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
BLOCKS = re.findall(r"(<!-- not run by the tests: [^\n]+ -->\n)?```bash\n(.*?)```", TEXT, re.S)
RUN = [line for marker, block in BLOCKS for line in block.splitlines() if not marker]
PARSED = [line for marker, block in BLOCKS for line in block.splitlines() if marker]


def test_every_command_has_a_section_and_an_example() -> None:
    """Fails if docs/cli.md lacks a command, or an example that runs."""
    sections = re.findall(r"^## (\w+)$", TEXT, re.M)
    assert sections == re.findall(r"^\| \[(\w+)\]", TEXT, re.M)
    assert set(sections) == COMMANDS.keys() == {line.split()[1] for line in RUN}
    assert PARSED


def test_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if an example of docs/cli.md fails, or prints nothing."""
    monkeypatch.chdir(tmp_path)
    for line in RUN:
        program, *arguments = shlex.split(line)
        assert program == "fastmem"
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code, line
        printed = capsys.readouterr()
        assert printed.out or printed.err, line
    named = ("sweep/report.html", "sweep/capacity.json", "bits.npy", "secret.bin.canaries.npy")
    assert [name for name in named if not (tmp_path / name).exists()] == []


@pytest.mark.parametrize("line", PARSED)
def test_examples_that_are_not_run_parse(line: str) -> None:
    """Fails if an example for GPUs or clusters has an unknown flag or a wrong value."""
    program, command, *flags = shlex.split(line)
    assert program == "fastmem"
    parse(command, flags)


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z][a-z-]*)", TEXT))))
def test_flags_exist(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if docs/cli.md names a flag that no command has."""
    help_texts = []
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            parse(command, ["--help"])
        help_texts.append(capsys.readouterr().out)
    assert any(re.search(rf"(?<![\w-]){flag}(?![\w-])", text) for text in help_texts)
