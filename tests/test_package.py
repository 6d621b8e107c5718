"""The package as a whole: layers, documents, what an import costs and what it touches."""

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

import fastmem

ROOT = Path(__file__).parents[1]
PACKAGE = Path(fastmem.__file__).parent

# A package imports itself and the packages of a smaller number (docs/design.md has this table).
LAYERS = {
    "base": 0,
    "kernels": 0,
    "likelihood": 1,
    "data": 1,
    "memorization": 2,
    "models": 3,
    "training": 4,
    "integrations": 4,
    "sweeps": 5,
    "report": 6,
    "cli": 7,
}
FACE = {"__init__", "__main__"}
"""Modules outside of the packages, which may import any of them."""


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Each module of the package by its dotted name below fastmem."""
    paths = sorted(package.rglob("*.py"))
    found = {".".join(path.relative_to(package).with_suffix("").parts): path for path in paths}
    kernels = {f"kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in (found | kernels).items()}


def imports(path: Path, names: Collection[str]) -> set[str]:
    """Those of the modules `names` that a file imports, anywhere in it but for types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {f"{node.module}"}
    ours = {name.removeprefix("fastmem.") for name in found if name.startswith("fastmem.")}
    return ours & set(names)


def problems(found: dict[str, Path]) -> list[str]:
    """What is wrong with the imports of these modules; nothing for a house in order."""
    wrong, graph = [], {}
    for name, path in found.items():
        package = name.partition(".")[0]
        if package in FACE:
            continue
        if package not in LAYERS:
            wrong.append(f"{name} is in no package of LAYERS")
            continue
        graph[name] = imports(path, found) - {name}
        for other in (other.partition(".")[0] for other in graph[name]):
            if other != package and LAYERS.get(other, -1) >= LAYERS[package]:
                wrong.append(f"{name} imports {other}, which is not below {package}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append(f"modules import each other in a circle: {' -> '.join(error.args[1])}")
    return wrong


def test_imports_go_down() -> None:
    """Fails if a package imports one that is not below it, or modules import each other."""
    assert problems(modules()) == []
    assert {name.partition(".")[0] for name in modules()} == LAYERS.keys() | FACE


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("base/planted.py", "from fastmem.data.order import permutation", "not below base"),
        ("data/planted.py", "import fastmem.likelihood.api", "not below data"),
        ("base/stats.py", "from fastmem.base.planted import x", "in a circle"),
        ("utils.py", "", "in no package"),
        ("extra/planted.py", "", "in no package"),
    ],
)
def test_planted_imports_are_found(file: str, text: str, message: str, tmp_path: Path) -> None:
    """Fails if the test above could not fail: an import that goes up, a circle, a new module."""
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    extra = {".".join(path.relative_to(tmp_path).with_suffix("").parts): path}
    if message == "in a circle":
        extra["base.planted"] = tmp_path / "planted.py"
        extra["base.planted"].write_text("from fastmem.base.stats import Interval")
    (wrong,) = problems(modules() | extra)
    assert message in wrong


def test_the_design_has_the_layers() -> None:
    """Fails if the table of docs/design.md has other packages or numbers than LAYERS."""
    text = (ROOT / "docs" / "design.md").read_text()
    told = re.findall(r"^\| (\d) `(\w+)`", text, re.M)
    assert {name: int(layer) for layer, name in told} == LAYERS


@pytest.mark.parametrize("name", sorted(modules().keys() - FACE))
def test_examples_run(name: str) -> None:
    """Fails if an example in a docstring shows another result than it has."""
    if name.startswith("kernels."):
        pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    try:
        module = importlib.import_module(f"fastmem.{name}")
    except ImportError as error:
        if not name.startswith("integrations."):
            raise
        pytest.skip(str(error))
    results = doctest.testmod(module, extraglobs={"fastmem": fastmem})
    assert results.failed == 0


def test_every_public_name_is_documented() -> None:
    """Fails if the API has a name without a docstring of its own (a dataclass gets one made)."""
    for name in fastmem.__all__:
        assert not (getattr(fastmem, name).__doc__ or f"{name}(").startswith(f"{name}("), name


def test_types_and_lazy_imports_name_the_same() -> None:
    """Fails if a public name is imported from one module for mypy and from another when used."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert typed == {name: f"fastmem.{module}" for name, module in fastmem._MODULES.items()}


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


@pytest.mark.parametrize(("given", "found"), [({}, 1000), ({"GOMP_SPINCOUNT": "7"}, 7)])
def test_commands_limit_the_spinning_of_threads(given: dict[str, str], found: int) -> None:
    """Fails if OpenMP loads before its limit is set, loads twice, or the user's limit is lost."""
    spin = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in spin}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **given}
    command = [sys.executable, "-m", "fastmem", "completion", "--help"]
    ended = subprocess.run(command, cwd="/", capture_output=True, text=True, env=environment)
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", ended.stderr) == [str(found)]


def test_ctrl_c_while_torch_loads() -> None:
    """Fails if it is a traceback, or the exit code is not that of Ctrl-C."""
    program = (
        "import signal, sys\n"
        "from fastmem.__main__ import command\n"
        "class CtrlC:\n"
        "    def find_spec(*_): signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, CtrlC())\n"
        "command()"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "")


def test_commands_start_without_what_few_need() -> None:
    """Fails if every command imports half a second of PyTorch's compiler or distributed tensors."""
    loaded = in_new_process("import sys, fastmem.cli.main; print(*sys.modules)")
    slow = {"sympy", "torch._dynamo", "torch.distributed.tensor", "scipy", "matplotlib", "rich"}
    assert not slow & set(loaded.split())


@pytest.mark.parametrize("package", ["transformers", "diffusers", "fastmem", "fastmem.kernels"])
def test_imports_in_the_root_of_a_clone(package: str) -> None:
    """Fails if kernels/ is taken there for the published package that others look for."""
    program = f"import {package}, kernels; print(kernels.__file__, kernels.__path__)"
    command = [sys.executable, "-c", program]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # Where it is installed, it is that one, and else it is empty.
    assert told.returncode == 0, told.stderr
    assert told.stdout == "None []\n" or str(ROOT / "kernels") not in told.stdout


def test_the_source_is_not_the_package(tmp_path: Path) -> None:
    """Fails if an import of the source tree, beside an installed package, does not say so."""
    (tmp_path / "fastmem").mkdir()
    (tmp_path / "fastmem" / "__init__.py").write_text((PACKAGE / "__init__.py").read_text())
    program = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"
        "import fastmem"
    )
    command = [sys.executable, "-c", program]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stderr
    assert told.splitlines()[-1].startswith(
        f"ImportError: {tmp_path}/fastmem is the source of fastmem, not an installed package: run "
    )


SDIST = """
import sys, types, setuptools
helpers = sys.modules["pybind11.setup_helpers"] = types.ModuleType("pybind11.setup_helpers")
helpers.ParallelCompile = lambda name: types.SimpleNamespace(install=lambda: None)
helpers.Pybind11Extension = lambda *args, cxx_std, **named: setuptools.Extension(*args, **named)
sys.argv = ["setup.py", "-q", "egg_info", "--egg-base", sys.argv[1]]
exec(open("setup.py").read())
"""
"""Lists the files of a source distribution; the compiler's flags of pybind11 do not matter."""


def test_source_distribution(tmp_path: Path) -> None:
    """Fails if it lacks a file of the repository, or its description has links or pictures that a
    package index cannot follow."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "CHANGELOG.md").touch()
    folders = ("bench", "csrc", "docs", "fastmem", "kernels", "tests")
    for folder in folders:
        (tmp_path / folder).symlink_to(ROOT / folder)
    command = [sys.executable, "-W", "ignore", "-c", SDIST, "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    told = tmp_path / "fastmem_lm.egg-info"
    listed = {*(told / "SOURCES.txt").read_text().splitlines()}
    paths = [path for name in folders for path in (ROOT / name).rglob("*.*") if path.is_file()]
    files = {f"{path.relative_to(ROOT)}" for path in paths}
    ignored = re.compile(r"__pycache__|\.(so|pyc|pyo|egg-info)|/\.|^fastmem/kernels/")
    assert {name for name in files if not ignored.search(name)} <= listed
    assert {"CHANGELOG.md", "LICENSE", "setup.py", "docs/figures/report.png"} <= listed
    assert not [name for name in listed if name.endswith(".so")]
    text = (told / "PKG-INFO").read_text()
    assert "Description-Content-Type: text/markdown" in text
    assert "- docs/cli.md: every command, with an example" in text
    assert [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link] == []
    assert "fastmem.train(model, sequences" in text


def test_one_version() -> None:
    """Fails if the version is written in a second place."""
    assert fastmem.__version__ == version("fastmem-lm")
    in_project = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert in_project
    assert in_project[1] == fastmem.__version__
    assert f"## {fastmem.__version__}" in (ROOT / "CHANGELOG.md").read_text()
