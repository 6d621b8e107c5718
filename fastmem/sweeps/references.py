"""The codes of a text sweep: reference models and compressors, once for a corpus.

N training and N held-out sequences of the largest data set of a seed, M of the test split, S tokens
a sequence, V vocabulary. A code has a folder in out/reference: its identity, and of each seed the
bits of tokens 2, …, S of each of these sequences. Those of a smaller data set are the beginnings.
"""

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import log2
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from fastmem.base.arguments import integer
from fastmem.base.stats import Floats
from fastmem.base.storage import Row, read_json, write_json, write_whole
from fastmem.base.terminal import say
from fastmem.data.files.shard import fingerprint
from fastmem.data.sequences import from_description
from fastmem.data.text import TextCorpus, TextSequences
from fastmem.data.tokenizers import PieceTokenizer, saved_tokenizer
from fastmem.memorization.capacity import by_model, capacity_bits, counts_and_bits
from fastmem.memorization.compressors import compressor_bits, least_bits
from fastmem.memorization.scaling_law import law_of_rows
from fastmem.models.causal.load import RUN, Loaded, load_model
from fastmem.models.gpt import GPT, GPTConfig
from fastmem.models.score import check_fit, sequence_bits
from fastmem.models.scoring.identity import model_identity
from fastmem.models.scoring.scores import score
from fastmem.sweeps.job import run_alone
from fastmem.sweeps.rows import RunSpec
from fastmem.sweeps.store import STUDY, load_rows
from fastmem.sweeps.text_config import REFERENCE, TextConfig, text_sets
from fastmem.training.config import TrainConfig

CODE = "code.json"
SAME_TOKENS = "the same tokens 2 to S, given token 1"
SAME_TEXT = (
    "the same text with another tokenizer: the reference codes whole sequences, its first token by "
    "log2 of its vocabulary where nothing is before it, and log2 V is taken off for token 1 of the "
    "target; characters that a cut divides are U+FFFD"
)
"""What a reference codes."""
Score = Callable[[TextSequences], Floats]


@dataclass(frozen=True)
class ReferenceConfig:
    """The reference model, which knows the language and not these sequences."""

    reference: str | None = None
    """A model to use as the reference: anything that fastmem score takes. By default the command
    trains one on the reference split."""
    reference_saw_training: bool = False
    """Take a reference that was trained on the training or the test split."""
    reference_layers: int = 2
    """Layers of the reference that is trained."""
    reference_width: int = 64
    """Width of the reference that is trained."""
    reference_heads: int = 8
    """Heads of the reference that is trained."""
    reference_steps: tuple[int, ...] = (100, 400, 1600)
    """Optimizer steps: a reference is trained for each number. The longest training gives the
    reference; the others show how results depend on its strength."""

    def __post_init__(self) -> None:
        if not self.reference_steps or len({*self.reference_steps}) < len(self.reference_steps):
            raise ValueError(
                f"reference_steps needs one or more different values, not {self.reference_steps}"
            )
        for steps in self.reference_steps:
            integer("reference_steps", steps, 1, 10**9)

    def shape(self, corpus: TextCorpus) -> GPTConfig:
        """The shape of the reference that is trained."""
        own = self.reference_layers, self.reference_width, self.reference_heads
        try:
            return GPTConfig(*own, corpus.train.vocab, corpus.train.length)
        except ValueError as error:
            named = re.sub(r"\b(layers|width|heads)\b", r"reference_\1", str(error))
            raise ValueError(named) from None


def prepare_codes(
    config: TextConfig, reference: ReferenceConfig, capacity: Path | None = None
) -> Row:
    """Makes the codes that the folder lacks; writes and returns text-study.json.

    Args:
        config: the sweep; its corpus is prepared.
        reference: the reference model.
        capacity: the folder of a capacity sweep that gives the capacity of each shape.

    Raises:
        ValueError: the reference cannot be loaded, does not fit the corpus, has seen the training
            sequences, or diverged.
    """
    corpus = config.corpus
    bits = None if capacity is None else _capacity(config, capacity)
    if reference.reference is None:
        strengths = [
            _trained(config, reference, steps) for steps in sorted(reference.reference_steps)
        ]
    else:
        strengths = [_given(config, reference, reference.reference)]
    targets, own = config.shapes()[-1].parameter_count, strengths[-1]["parameters"]
    if own <= targets:
        say(
            f"warning: the reference has {own:,} parameters, and the largest model {targets:,}: a "
            "reference of their size takes what they learned for memorization"
        )
    compressor = _compressed(config)
    study = {
        "corpus": corpus.hash,
        "strengths": strengths,
        "codes": {"reference": strengths[-1]["path"], "compressor": compressor["path"]},
        "compressor": compressor,
        "capacity": bits,
    }
    write_json(config.out / STUDY, study)
    return study


def runs_to_train(config: TextConfig, reference: ReferenceConfig) -> list[RunSpec]:
    """The references that are not in the folder yet."""
    if reference.reference is not None:
        return []
    places = [_place(config, reference, steps) for steps in sorted(reference.reference_steps)]
    return [run for run, path in places if not (config.out / path / RUN).exists()]


def _place(config: TextConfig, reference: ReferenceConfig, steps: int) -> tuple[RunSpec, str]:
    """A reference to train on the reference split, and its folder in config.out."""
    shape = reference.shape(config.corpus)
    run = RunSpec(shape, config.corpus.reference, TrainConfig(steps=steps))
    return run, f"{REFERENCE}/{shape.layers}x{shape.width}-h{shape.heads}-{steps}"


def _trained(config: TextConfig, reference: ReferenceConfig, steps: int) -> Row:
    """A reference trained on the reference split."""
    run, path = _place(config, reference, steps)
    shape, train = run.model, run.train
    check_fit(shape, run.sequences)
    name = f"{shape.layers} × {shape.width}, {steps:,} steps"

    def make() -> tuple[Score, Row]:
        folder = config.out / path
        model: GPT | None
        if (folder / RUN).exists():
            model = GPT.from_hf(folder, _device(config))
        else:
            say(f"reference {name}: training")
            row, model = run_alone(run, _device(config), folder / "checkpoint.pt", progress=True)
            if model is None:
                raise ValueError(f"the reference failed ({row['error']}): give --reference-steps")
            model.to_hf(folder)
            write_json(folder / RUN, row)
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        trained = model
        facts = {"convention": SAME_TOKENS, "parameters": shape.parameter_count}
        return lambda sequences: sequence_bits(trained, sequences), facts

    identity = {"model": asdict(shape), "train": asdict(train)}
    return _stored(config, path, name, identity, make) | {"saw_training": False}


def _device(config: TextConfig) -> str:
    """The device of this machine, which need not have those of Ray's nodes."""
    return config.device if config.ray is None or torch.cuda.is_available() else "cpu"


def _given(config: TextConfig, reference: ReferenceConfig, model: str) -> Row:
    """A reference of the user."""
    corpus = config.corpus
    saw = saw_training(Path(model), corpus)
    if saw and not reference.reference_saw_training:
        raise ValueError(
            f"the reference {model} was trained on {saw} of this corpus, so that it knows what is "
            "to be measured: give another model, or --reference-saw-training"
        )

    if saw:
        say(f"warning: the reference was trained on {saw}, so that memorization is underestimated")

    def make() -> tuple[Score, Row]:
        loaded = load_model(model, device=_device(config))
        same = _same_tokens(loaded, corpus)
        size = sum(p.numel() for p in loaded.lm.model.parameters())
        facts = {"convention": SAME_TOKENS if same else SAME_TEXT, "parameters": size}
        return _score_of(loaded, corpus, same), facts

    named, files = model_identity(model)
    path = f"{REFERENCE}/given-{xxhash.xxh3_64_hexdigest(repr((named, files)).encode())}"
    stored = _stored(config, path, model, {"model": named, "files": files}, make)
    return stored | {"saw_training": saw is not None}


def _compressed(config: TextConfig) -> Row:
    """The least of the compressors and of the uniform code."""
    names = [*compressor_bits([], [b"a"]), "uniform"]

    def make() -> tuple[Score, Row]:
        reference = config.corpus.reference.text_bytes()

        def bits(sequences: TextSequences) -> Floats:
            codes = compressor_bits(sequences.text_bytes(), reference)
            return least_bits(codes, sequences.uniform_bits)

        return bits, {"convention": SAME_TOKENS, "compressors": names}

    path = f"{REFERENCE}/compressor"
    return _stored(config, path, "compressors", {"compressors": names}, make)


def _stored(
    config: TextConfig,
    path: str,
    name: str,
    identity: Row,
    make: Callable[[], tuple[Score, Row]],
) -> Row:
    """Writes the bits that the folder of a code lacks; returns its name, strength and facts."""
    folder, corpus = config.out / path, config.corpus
    known = {"identity": json.loads(json.dumps(identity)) | {"corpus": corpus.hash}}
    code = read_json(folder / CODE) if (folder / CODE).exists() else {}
    if code.get("identity") != known["identity"]:
        shutil.rmtree(folder, ignore_errors=True)
        code = known
        write_json(folder / CODE, code)
    bits_of: Score | None = None
    for seed in config.seeds:
        N, there = config.largest(seed), read_code(folder).get(seed)
        if there is None or there.members.size < N:
            if bits_of is None:
                bits_of, facts = make()
                code = known | {"facts": facts}
                write_json(folder / CODE, code)
                say(f"{name}: coding the sequences")
            _write(folder, seed, CodeBits(*map(bits_of, text_sets(corpus, N, seed))))
    seed, of_first = next(iter(read_code(folder).items()))
    texts = corpus.test.sample(of_first.test.size, seed).text_bytes()
    per_byte = float(of_first.test.sum() / max(1, sum(map(len, texts))))
    return {"name": name, "path": path, "bits_per_byte": per_byte, **code["facts"]}


class CodeBits(NamedTuple):
    """Bits of sequences by one code."""

    members: Floats  # (N,)
    held_out: Floats  # (N,)
    test: Floats  # (M,)

    def of(self, N: int, M: int) -> "CodeBits":
        """The bits of a smaller data set."""
        return CodeBits(self.members[:N], self.held_out[:N], self.test[:M])


def read_code(folder: Path) -> dict[int, CodeBits]:
    """The bits of sequences by a code, by seed; empty if there are none.

    Raises:
        ValueError: a file is damaged.
    """
    found = {}
    for path in sorted(folder.glob("seed*.npz")):
        try:
            with np.load(path) as file:
                found[int(path.stem[4:])] = CodeBits(*(file[name] for name in CodeBits._fields))
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and run again") from None
    return found


def _write(folder: Path, seed: int, bits: CodeBits) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **bits._asdict())
    write_whole(folder / f"seed{seed}.npz", buffer.getvalue())


def _capacity(config: TextConfig, folder: Path) -> Row:
    """Strict bits of each shape: its own in the folder, else by the law of the folder's models."""
    rows = [row for row in load_rows(folder) if row["memorized_bits"]["strict"] is not None]
    of_shape = {model_shape(runs[0]): runs for runs in by_model(rows)}
    found, by_law = {}, False
    for shape in config.shapes():
        runs = of_shape.get((shape.layers, shape.width, shape.vocab, shape.length))
        if runs is None:
            by_law = True
            bits = law_of_rows(rows).slope.estimate * shape.parameter_count
        else:
            bits = capacity_bits(*counts_and_bits(runs, "strict")).estimate
        found[f"{shape.layers}x{shape.width}"] = bits
    law = ", of shapes that it lacks by its bits per parameter" if by_law else ""
    return {"bits": found, "from": f"the capacity sweep {folder}{law}"}


def model_shape(row: Row) -> tuple[int, ...]:
    """Layers, width, vocabulary and length of the model of a row."""
    return tuple(row["model"][name] for name in ("layers", "width", "vocab", "length"))


def saw_training(model: Path, corpus: TextCorpus) -> str | None:
    """The split of this corpus other than reference that a model of fastmem was trained on.

    Documents tell it where the same text was prepared again, cut to another length or with another
    tokenizer, as long as that folder and the split seed are the same.
    """
    if not (model / RUN).is_file():
        return None
    found = _of_text(read_json(model / RUN)["sequences"])
    for one in found:
        if one.get("kind") == "text" and one["hash"] == corpus.hash and one["split"] != "reference":
            return f"split {one['split']}"
        seen = _documents(one, corpus) if one.get("kind") == "text" else None
        for split in ("train", "test"):
            own = TextSequences(corpus.folder, split)
            if seen is not None and np.isin(own.document_hashes(), seen).any():
                return f"documents of split {split}"
            # By content too: the same text may have been prepared in another folder.
            file = corpus.folder / f"{split}.npy"
            if one.get("path") == str(file) or one.get("fingerprint") == fingerprint([file]):
                return f"split {split}"
    return None


def _documents(description: Row, corpus: TextCorpus) -> NDArray[np.int64] | None:
    """The hashes of the documents of a description, if they compare with those of the corpus."""
    try:
        other = from_description(description)
    except (ValueError, OSError):  # its folder is gone, or prepared anew
        return None
    assert isinstance(other, TextSequences)
    same = other.split_seed == corpus.train.split_seed and other.hash != corpus.hash
    return other.document_hashes() if same else None


def _of_text(description: Any) -> Iterator[Row]:
    """The descriptions that a description is made of."""
    if isinstance(description, dict):
        yield description
        for value in description.values():
            yield from _of_text(value)


def _same_tokens(loaded: Loaded, corpus: TextCorpus) -> bool:
    """True if the model takes the tokens of the corpus; False if it is to score their text."""
    vocab = corpus.train.vocab
    if loaded.tokenizer is None:
        if loaded.lm.vocab < vocab:
            raise ValueError(
                f"the reference {loaded.name} has a vocabulary of {loaded.lm.vocab} and no "
                f"tokenizer, and the corpus has tokens below {vocab}: give a model of this "
                "vocabulary, or with a tokenizer"
            )
        return True
    backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
    ours = saved_tokenizer(corpus.folder)
    return backend is not None and PieceTokenizer(backend).identity == ours.identity


def _score_of(loaded: Loaded, corpus: TextCorpus, same: bool) -> Score:
    model = loaded.lm.model
    if same:
        taken = model if isinstance(model, GPT) else loaded.lm
        return lambda sequences: sequence_bits(taken, sequences)
    first = log2(corpus.train.vocab)

    def bits(sequences: TextSequences) -> Floats:
        found = score(model, sequences.texts(), tokenizer=loaded.tokenizer, progress=True)
        documents = found.documents
        uncoded = documents["tokens"] - documents["coded_tokens"]
        return np.asarray(documents["bits"] + uncoded * log2(loaded.lm.vocab) - first)

    return bits
