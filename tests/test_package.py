"""The package as a whole: layers, documents, what an import costs and what it touches."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fastmem

ROOT = Path(__file__).parents[1]
PACKAGE = Path(fastmem.__file__).parent

# A file imports only files of a smaller number (docs/design.md).
LAYERS = {
    "_core": 0,
    "kernels": 0,
    "arguments": 0,
    "storage": 1,
    "lock": 1,
    "terminal": 1,
    "stats": 1,
    "sequences": 1,
    "order": 1,
    "profile": 1,
    "formats": 1,
    "likelihood_kernels": 1,
    "data": 2,
    "weights": 2,
    "journal": 2,
    "manifest": 2,
    "parquet": 2,
    "canvas": 2,
    "likelihood_ops": 2,
    "convergence": 2,
    "structure": 3,
    "repetition": 3,
    "store": 3,
    "files": 3,
    "stream": 3,
    "likelihood": 3,
    "model": 4,
    "sinks": 4,
    "tokenfile": 4,
    "engine": 5,
    "memorization": 5,
    "capacity": 5,
    "speed": 5,
    "verify": 5,
    "score": 6,
    "recipe": 6,
    "quantize": 7,
    "law": 6,
    "bracket": 6,
    "watch": 6,
    "optimizer": 7,
    "member": 8,
    "step": 8,
    "train": 9,
    "rows": 9,
    "groups": 10,
    "job": 11,
    "agenda": 12,
    "workers": 12,
    "display": 12,
    "cluster": 13,
    "sweep": 14,
    "plan": 15,
    "plots": 15,
    "held_out": 15,
    "study": 15,
    "__init__": 15,
    "exhibits": 16,
    "page": 17,
    "commands_sweep": 18,
    "commands_folder": 18,
    "commands_data": 18,
    "commands_model": 19,
    "cli": 20,
}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file names in an import, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names if name.split(".")[0] == "fastmem"]
    return {p[1] if len(p) > 1 and p[1] in LAYERS else "__init__" for p in parts}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_go_down(path: Path) -> None:
    """Fails if a file imports one of its own layer or above, or is in no layer."""
    assert path.stem in LAYERS, f"give {path.name} a layer here and in docs/design.md"
    for name in imported(path):
        assert LAYERS[name] < LAYERS[path.stem], f"{path.stem} imports {name}"


def test_kernels_import_nothing_above() -> None:
    """Fails if a kernel needs the package around it."""
    for path in (ROOT / "kernels").glob("*.py"):
        assert imported(path) <= {"kernels"}, path.name


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - {"_core", "kernels", "__init__"}))
def test_examples_run(name: str) -> None:
    """Fails if an example in a docstring shows another result than it has."""
    module = importlib.import_module(f"fastmem.{name}")
    results = doctest.testmod(module, extraglobs={"fastmem": fastmem})
    assert results.failed == 0


def test_every_public_name_is_documented() -> None:
    """Fails if the API has a name without a docstring of its own (a dataclass gets one made)."""
    for name in fastmem.__all__:
        assert not (getattr(fastmem, name).__doc__ or f"{name}(").startswith(f"{name}("), name


def in_new_process(program: str) -> str:
    """What a program prints in an interpreter of its own, outside the checkout."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout


def test_import_needs_neither_triton_nor_matplotlib_nor_tyro() -> None:
    """Fails if `import fastmem` fails without them, or loads them where they are."""
    program = (
        "import sys\n"
        "for name in ('triton', 'matplotlib', 'tyro', 'transformers'): sys.modules[name] = None\n"
        "import fastmem\n"
        "bits = fastmem.sequence_bits(fastmem.GPT(fastmem.GPTConfig(1, 8, 2, 16, 4)),"
        " fastmem.UniformSequences(4, 4, 16))\n"
        "print(len(bits))"
    )
    assert in_new_process(program) == "4\n"


def test_import_costs_little_more_than_torch() -> None:
    """Fails if import loads a heavy module that torch and NumPy did not: 150 is today's twice."""
    program = (
        "import sys, numpy, torch; before = set(sys.modules); import fastmem\n"
        "print(len(set(sys.modules) - before))"
    )
    assert int(in_new_process(program)) < 150


def test_kernels_are_ours_alone() -> None:
    """Fails if the folder kernels/ shadows the published package of that name."""
    assert "ImportError" in in_new_process(
        "import fastmem.kernels\ntry: import kernels\nexcept ImportError as e: print(repr(e))"
    ).replace("ModuleNotFoundError", "ImportError")
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "try: import kernels\n"
        "except ImportError as error: print(error)"
    )
    assert "import fastmem.kernels" in in_new_process(program)


def test_one_version() -> None:
    """Fails if the version is written in a second place."""
    assert fastmem.__version__ == version("fastmem-lm")
    in_project = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert in_project
    assert in_project[1] == fastmem.__version__
    assert f"## {fastmem.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_tree_in_the_readme_is_the_tree() -> None:
    """Fails if the README's file tree lacks a tracked file, or shows one that is not there."""
    block = re.search(r"```text\n(pyproject.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block
    shown, folder = set(), ""
    for line in block[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ""
        if name.endswith("/"):
            folder = name
        else:
            shown.add(folder + name)
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    # Tests, pictures and stored results are told by their folders.
    hidden = ("tests/", "docs/figures/", "bench/results/", ".")
    assert shown == {name for name in listed if not name.startswith(hidden)}


def test_the_first_example_of_the_readme_runs() -> None:
    """Fails if the Python in the README does not run as printed."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
