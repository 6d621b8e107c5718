"""The names of a data set's files, and the manifest that can make it again.

N sequences, S tokens a sequence, V vocabulary, K shards.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmem.base.storage import read_json
from fastmem.data.files.formats import SUFFIXES, Format, checked_format, index_path

SCHEMA = 1
_BEGINNING = b'{\n "schema": '

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Output:
    """The names of a data set's files, which all begin with `stem`."""

    stem: Path
    format: Format
    shards: int

    @classmethod
    def at(cls, path: str | Path, format: Format, shards: int) -> "Output":
        """The files at a path that a user gave, with the suffix of the format or without."""
        path = Path(path)
        if path.suffix == SUFFIXES[format]:
            path = path.with_suffix("")
        elif path.suffix in SUFFIXES.values():
            raise ValueError(
                f"{path} does not have the suffix of format {format}: is {path.suffix} the format? "
                f"give --format {next(name for name in SUFFIXES if SUFFIXES[name] == path.suffix)}"
            )
        if not path.name or path.is_dir():
            raise ValueError(f"{path} is a directory: give the path of a file")
        return cls(path, format, shards)

    @property
    def manifest(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}{SUFFIXES[self.format]}.json")

    @property
    def journal(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}{SUFFIXES[self.format]}.journal")

    def payload(self, shard: int) -> Path:
        middle = f"-{shard:05}-of-{self.shards:05}" if self.shards > 1 else ""
        return self.stem.with_name(f"{self.stem.name}{middle}{SUFFIXES[self.format]}")

    def shard_files(self, shard: int) -> list[Path]:
        """The payload of a shard, and its index in Megatron's format."""
        path = self.payload(shard)
        return [path, index_path(path)] if self.format == "megatron" else [path]

    def files(self) -> list[Path]:
        """Every payload and index."""
        return [path for shard in range(self.shards) for path in self.shard_files(shard)]

    def rows(self, shard: int, count: int) -> range:
        """The sequences of one shard."""
        return range(count * shard // self.shards, count * (shard + 1) // self.shards)


def read_manifest(path: Path) -> tuple[Output, Manifest]:
    """The files and the content of a manifest; ValueError if it is damaged or foreign."""
    try:
        manifest = read_json(path)
    except ValueError:
        raise ValueError(f"{path} was cut or altered: generate it again with --overwrite") from None
    try:
        if manifest["schema"] != SCHEMA:
            raise ValueError(f"schema {manifest['schema']}, and this version reads {SCHEMA}")
        shards, format = manifest["shards"], checked_format(manifest["format"])
        if not shards:
            raise ValueError("an empty list of files")
        output = Output.at(path.with_name(path.name.removesuffix(".json")), format, len(shards))
        for shard, part in enumerate(shards):
            rows = output.rows(shard, manifest["count"])
            wanted = [file.name for file in output.shard_files(shard)]
            names = [file["name"] for file in part["files"]]
            if [part["begin"], part["end"], *names] != [rows.start, rows.stop, *wanted]:
                raise ValueError(f"files {names} of {part['begin']} to {part['end']}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a manifest of fastmem that fits its name: {error}"
        ) from None
    return output, manifest


def find_manifest(path: Path) -> Path | None:
    """The manifest of the set that a path names; None if there is none."""
    if path.suffix == ".json":
        if not path.is_file():
            raise ValueError(f"{path} does not exist: give the path of a file of tokens")
        return path
    if not path.name or path.is_dir():
        raise ValueError(f"{path} is a directory: give the path of a file")
    beside = [path.with_name(f"{path.name}{suffix}.json") for suffix in set(SUFFIXES.values())]
    beside.append(path.with_name(f"{path.name}.json"))
    there = [other for other in beside if other.is_file() and _is_ours(other)]
    if path.suffix in SUFFIXES.values():
        there = [other for other in there if other == beside[-1]]
    if len(there) > 1:
        raise ValueError(
            f"{path} names several data sets: give one of {', '.join(map(str, there))}"
        )
    return there[0] if there else None


def _is_ours(path: Path) -> bool:
    """True if a .json begins as a manifest of fastmem does."""
    with path.open("rb") as file:
        return file.read(len(_BEGINNING)) == _BEGINNING
