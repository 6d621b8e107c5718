"""Flags that choose a data set, for train, score and generate."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastmem.base.terminal import say
from fastmem.cli.flags import named
from fastmem.data.files.tokenfile import TokenFile
from fastmem.data.repetition import CanarySequences, repeated
from fastmem.data.sequences import Sequences
from fastmem.data.structure import PrefixedSequences, WeightedSequences
from fastmem.data.uniform import RandomSequences, UniformSequences
from fastmem.data.weights import zipf

Flat = tyro.conf.arg(name="")
"""Flags of a nested dataclass without its name as a prefix."""

_CANARIES = 2**63
"""Index of the first canary, far behind the members and the held-out sequences."""


@dataclass(frozen=True)
class Structure:
    """Structure of a data set: what differs from independent uniform tokens."""

    zipf: float | None = None
    """Draw tokens by Zipf's law with this exponent; by default they are uniform."""
    repeat_fraction: Annotated[float, tyro.conf.arg(aliases=["--repeat-share"])] = 0.0
    """Fraction of the --count sequences that are repeated; the rest occur once."""
    repeat_times: int = 2
    """Copies of each repeated sequence."""
    canaries: int = 0
    """Other random sequences to insert at random rows, in addition to --count; generate writes
    their rows to OUT.bin.canaries.npy, one canary a line."""
    canary_times: int = 1
    """Copies of each canary."""
    prefix: int = 0
    """Tokens at the start that all sequences share."""


@dataclass(frozen=True)
class Dataset:
    """The data set to train on."""

    count: int | None = None
    """Sequences in the data set; 400 by default."""
    vocab: int | None = None
    """Vocabulary V; 128 by default; with --data only if the file does not record it."""
    length: int | None = None
    """Tokens a sequence, S; 16 by default; with --data only if the file does not record it."""
    data_seed: int | None = None
    """Seed of the tokens; 0 by default. --seed sets initialization and order."""
    structure: Annotated[Structure, Flat] = field(default_factory=Structure)
    data: Path | None = None
    """A token file to use instead, written by fastmem generate or by another program; or a
    directory of such files, or a pattern such as 'train-*.npy'."""
    dtype: str | None = None
    """Type of the tokens in a .bin of --data that does not record it, such as uint32."""
    column: str | None = None
    """Column or tensor with the tokens in Parquet or safetensors of --data; input_ids by
    default."""

    def sequences(self, defaults: dict[str, int], reason: str = "") -> Sequences:
        """The data set that the flags choose.

        Args:
            defaults: values for count, length, vocab and seed where the flags set none.
            reason: why a default may be missing, for the error.

        Raises:
            ValueError: --data beside flags that contradict it, or a missing number.
        """
        flags = {"count": self.count, "length": self.length, "vocab": self.vocab}
        flags["seed"] = self.data_seed
        given = {name: value for name, value in flags.items() if value is not None}
        if self.data is not None:
            if given.keys() & {"count", "seed"} or self.structure != Structure():
                raise ValueError(
                    f"--data {self.data} is a whole data set: add only --length and --vocab, "
                    "--dtype and --column"
                )
            shape = {"length": self.length, "vocab": self.vocab}
            return open_data(self.data, **shape, dtype=self.dtype, column=self.column)
        if self.dtype or self.column:
            flag = f"--dtype {self.dtype}" if self.dtype else f"--column {self.column}"
            raise ValueError(f"{flag} is for a file: add --data FILE")
        numbers = defaults | given
        missing = [f"--{name}" for name in ("count", "length", "vocab") if name not in numbers]
        if missing:
            raise ValueError(f"{reason}: give {missing}, or --data")
        with named("seed", "--data-seed"):
            return make_data(**numbers, structure=self.structure)


@dataclass(frozen=True)
class ScoredDataset(Dataset):
    """The data set to score. The model's run.json, or the manifest of --data, has its structure."""

    count: int | None = None
    """Sequences in the data set; by default as in training."""
    vocab: int | None = None
    """Vocabulary V; by default as in training; with --data only if the file does not record it."""
    length: int | None = None
    """Tokens a sequence, S; by default as in training; with --data only if the file does not record
    it."""
    data_seed: int | None = None
    """Seed of the tokens; by default as in training."""
    structure: Annotated[Structure, Flat, tyro.conf.Suppress] = field(default_factory=Structure)


def make_data(count: int, length: int, vocab: int, seed: int, structure: Structure) -> Sequences:
    """The data set with this shape, seed and structure."""
    for name, value, needed in (
        ("repeat_times", structure.repeat_times, "repeat_fraction"),
        ("canary_times", structure.canary_times, "canaries"),
    ):
        if value != getattr(Structure, name) and not getattr(structure, needed):
            flag, other = (f"--{word.replace('_', '-')}" for word in (name, needed))
            raise ValueError(f"{flag} {value} does nothing without {other}: give both or neither")

    def random(count: int, start: int) -> RandomSequences:
        if structure.zipf is None:
            return UniformSequences(count, length, vocab, seed, start)
        with named("exponent", "--zipf"):
            weights = zipf(vocab, structure.zipf)
        return WeightedSequences(count, length, weights, seed, start)

    sequences: Sequences = random(count, 0)
    if structure.repeat_fraction:
        with named("fraction", "--repeat-fraction"), named("times", "--repeat-times"):
            sequences = repeated(sequences, structure.repeat_fraction, structure.repeat_times, seed)
    if structure.canaries:
        with named("count", "--canaries"):
            canaries = random(structure.canaries, _CANARIES)
        with named("times", "--canary-times"):
            sequences = CanarySequences(sequences, canaries, structure.canary_times, seed)
    if structure.prefix:
        sequences = PrefixedSequences(sequences, structure.prefix, seed)
    return sequences


def open_data(path: Path, **options: Any) -> TokenFile:
    """The token file as sequences; its warnings, such as of dropped tokens, go to the terminal."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = TokenFile.open(path, **options)
    for warning in caught:
        say(str(warning.message))
    return file
