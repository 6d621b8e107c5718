"""Small data sets that tests write to files."""

from pathlib import Path

from fastmem import UniformSequences
from fastmem.data.files.formats import SUFFIXES, Format

FORMATS: list[Format] = list(SUFFIXES)
SEQUENCES = UniformSequences(count=50, length=16, vocab=2048, seed=9)
OTHER = UniformSequences(count=50, length=16, vocab=2048, seed=10)


def contents(folder: Path) -> dict[str, bytes]:
    """The name and the bytes of each file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
