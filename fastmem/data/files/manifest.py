"""The names of a data set's files, and the manifest that can make it again.

N sequences, S tokens a sequence, V vocabulary, K shards.
"""

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmem.base.arguments import integer
from fastmem.base.storage import read_json
from fastmem.data.files.formats import SUFFIXES, Format, checked_format, index_path

SCHEMA = 1
_BEGINNING = b'{\n "schema": '
_SHARD = re.compile(r"-\d{5}-of-\d{5}(\.\w+)$")
_WORDS = "train|training|validation|valid|dev|val|test|testing|eval|evaluation"
_SPLIT = re.compile(rf"(?:^|[-._ 0-9])({_WORDS})(?:[-._ 0-9]|$)")

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
        if not path.name:
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
        for name in ("count", "length", "vocab"):
            integer(name, manifest[name], 1, 2**64)
        dtype, sequences = manifest["dtype"], manifest["sequences"]
        if dtype not in ("uint16", "uint32", "int32") or not isinstance(sequences, dict):
            raise ValueError(f"dtype {dtype} and sequences {sequences}")
        output = Output.at(path.with_name(path.name.removesuffix(".json")), format, len(shards))
        for shard, part in enumerate(shards):
            rows = output.rows(shard, manifest["count"])
            wanted = [file.name for file in output.shard_files(shard)]
            names = [file["name"] for file in part["files"]]
            for file in part["files"]:
                integer(f"bytes of {file['xxh3']}", file["bytes"], 0, 2**63 - 1)
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
        return path if _is_ours(path) else None
    if not path.name:
        return None
    path = _tokens_of(path)
    beside = [path.with_name(f"{path.name}{suffix}.json") for suffix in set(SUFFIXES.values())]
    beside.append(path.with_name(f"{path.name}.json"))
    there = [other for other in beside if other.is_file() and _is_ours(other)]
    if path.suffix in SUFFIXES.values():
        there = [other for other in there if other == beside[-1]]
    if len(there) > 1:
        raise ValueError(
            f"{path} names several data sets: give one of {', '.join(map(str, there))}"
        )
    if there:
        return there[0]
    return _manifest_in(path) if path.is_dir() else None


def _tokens_of(path: Path) -> Path:
    """The file beside Megatron's index, which has the manifest; any other path as it is."""
    return path.with_suffix(SUFFIXES["megatron"]) if path.suffix == ".idx" else path


def find_shard(path: Path) -> tuple[Output, Manifest, int] | None:
    """The set of which a path is one of several shards, and the shard; None for another file."""
    path = _tokens_of(path)
    stem = _SHARD.sub(r"\1", path.name)
    if stem == path.name:
        return None
    manifest_path = path.with_name(f"{stem}.json")
    if not manifest_path.is_file() or not _is_ours(manifest_path):
        return None
    output, manifest = read_manifest(manifest_path)
    paths = [output.payload(shard) for shard in range(output.shards)]
    return (output, manifest, paths.index(path)) if path in paths else None


def find_files(path: Path) -> list[Path]:
    """The files of another program that a path names, in the order of their names.

    A path names a file; the .bin of Megatron's prefix or .idx; the files of tokens in a directory;
    or the files of tokens that a pattern such as train-*.npy matches.

    Raises:
        ValueError: the path names no files, or files that do not make one data set.
    """
    tokens = _tokens_of(path) if path.suffix == ".idx" else path.parent / f"{path.name}.bin"
    is_payload = path.is_file() and path.suffix != ".idx"
    if not is_payload and tokens.is_file() and index_path(tokens).is_file():
        return [tokens]
    if path.is_file():
        return [path]
    endings = ", ".join(sorted(set(SUFFIXES.values())))
    names = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path)))
    paths = sorted(one for one in names if _is_tokens(one))
    if not paths:
        raise ValueError(
            f"{path} is a directory: give the path of a file, or of a directory with {endings}"
            if path.is_dir()
            else f"{path} is neither a file nor a data set with a manifest: give a path with one "
            f"of {endings}"
        )
    for kinds in ({one.suffix for one in paths}, {_split(one) for one in paths}):
        if len(kinds) > 1:
            raise ValueError(
                f"{path} holds files of {' and '.join(sorted(kinds))}: give one kind by a pattern, "
                f"such as '{paths[0].with_name('*' + min(kinds - {'no split'}) + '*')}'"
            )
    return paths


def _manifest_in(folder: Path) -> Path | None:
    """The manifest in a directory, if it describes all files of tokens there."""
    if journal := next(iter(sorted(folder.glob("*.journal"))), None):
        raise ValueError(f"{journal} is of an unfinished set: finish it with the same command")
    ours = [path for path in sorted(folder.glob("*.json")) if _is_ours(path)]
    if not ours:
        return None
    others = {path for path in folder.iterdir() if _is_tokens(path)}
    others -= set(read_manifest(ours[0])[0].files())
    if others:
        raise ValueError(
            f"{folder} holds {min(others).name} beside the set of {ours[0].name}: give the path of "
            "one of the two"
        )
    return ours[0]


def _is_tokens(path: Path) -> bool:
    hidden = path.name.startswith(".") or path.name.endswith(".canaries.npy")
    return path.suffix in SUFFIXES.values() and not hidden and path.is_file()


def _split(path: Path) -> str:
    """The split that a name says, by the words of datasets."""
    found = _SPLIT.search(path.stem)
    return found[1] if found else "no split"


def _is_ours(path: Path) -> bool:
    """True if a .json begins as a manifest of fastmem does."""
    with path.open("rb") as file:
        return file.read(len(_BEGINNING)) == _BEGINNING
