"""fastmem score of documents: its flags, its folder, and its sentence and table."""

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from fastmem.base.ranks import do_first
from fastmem.base.stats import Floats
from fastmem.base.storage import Row, write_whole
from fastmem.base.terminal import table
from fastmem.cli.dataset import Dataset
from fastmem.data.columns import TEXT_COLUMN
from fastmem.data.documents import TOKEN_FILES
from fastmem.data.files.manifest import find_manifest
from fastmem.data.files.parquet import pyarrow_parquet
from fastmem.data.sequences import Sequences
from fastmem.models.scoring.document_tokenizer import BosPolicy
from fastmem.models.scoring.scores import Scores, read_scores, score
from fastmem.report.score_page import last_name, notices, write_score_page

Also = Literal["entropy", "variance", "greedy", "lse"]
_NAME = 24
"""Characters of a model's name in the table, which fits into 80 columns."""


@dataclass(frozen=True)
class TextFlags:
    """How documents are read, and how a model is loaded."""

    device_map: str | None = None
    """Spread the model over devices as accelerate does, such as auto."""
    quantization: str | None = None
    """Load the weights in 8bit or 4bit by bitsandbytes."""
    trust_remote_code: bool = False
    """Run the code that a model brings."""
    bos: BosPolicy = "auto"
    """A BOS before each document: auto (a text, if the tokenizer adds one by itself), always (EOS
    where there is no BOS) or never."""
    special_tokens: bool = False
    """Special tokens that a text spells out, such as <|im_end|>, are one token each."""
    field: str | None = None
    """Field of .jsonl; text by default."""
    errors: Literal["strict", "replace", "ignore", "backslashreplace"] = "strict"
    """How invalid UTF-8 is decoded."""
    batch_tokens: int | None = None
    """Tokens of a batch; 512 on a CPU, and up to 32768 on a GPU, by default."""
    text: bool = True
    """Show text of the documents in the page."""
    overwrite: bool = False
    """Measure again what is in --out, each time; also take a folder with other files, which
    stay."""


@dataclass(frozen=True)
class TokenFileFlags:
    """How files of tokens are read."""

    vocab: int | None = None
    """Vocabulary V of a file that does not record it."""
    length: int | None = None
    """Tokens a sequence, S, of a file that does not record it."""
    dtype: str | None = None
    """Type of the weights: auto, float32, bfloat16 or float16; or, such as uint32, type of the
    tokens in a .bin that does not record it."""
    column: str | None = None
    """Column of Parquet or Arrow, or tensor of safetensors: text, input_ids or the only one by
    default."""


@dataclass(frozen=True)
class DocumentFlags(TextFlags):
    """How documents are read and scored."""

    context: int | None = None
    """Tokens that the model reads at once; by default all of its positions."""
    stride: int | None = None
    """Tokens that each window of a long document scores after the first window; by default
    --context."""
    chat_template: bool = False
    """Score conversations: lists of messages, or texts as one message of a user each."""
    also: tuple[Also, ...] = ()
    """Further columns of tokens.parquet: entropy (entropy_bits), variance, greedy (is_greedy), lse
    (lse_bits)."""


def run_documents(
    model: str,
    data: str,
    shape: Dataset,
    flags: DocumentFlags,
    device: str,
    out: Path | None,
    as_json: bool,
    shard: bool = False,
) -> int:
    """Scores documents, writes --out, and prints the sums."""
    weights, tokens = split_dtype(shape.dtype)
    folder = None if out is None or out.suffix == ".npy" else out
    options = {"column": shape.column, "length": shape.length, "vocab": shape.vocab}
    options["shard"] = shard
    found = score_folder(model, data, folder, flags, weights, device, token_dtype=tokens, **options)
    if out is not None and folder is None:
        write_bits(out, found.documents["bits"])
    print(json.dumps(found.summary, indent=1) if as_json else words(found.summary, folder))
    return 0


def score_folder(
    model: str,
    data: str | Sequences,
    out: Path | None,
    flags: DocumentFlags,
    dtype: str,
    device: str,
    **options: str | int | None,
) -> Scores:
    """Scores documents, and writes the page of `out`, the folder, unless it is None."""
    given = {name: value for name, value in vars(flags).items() if name != "text"}
    found = score(
        model,
        data,
        out,
        dtype=dtype,
        device=device,
        progress=True,
        **given,
        **options,  # type: ignore[arg-type]
    )
    if out is not None:
        do_first(lambda: write_score_page(out, text=flags.text))
    return found


def words(summary: Row, out: Path | None) -> str:
    """A sentence, a table, and what a reader must know of the numbers."""
    per_token, per_byte = summary["bits_per_token"], summary["bits_per_byte"]
    documents = "1 document" if summary["documents"] == 1 else f"{summary['documents']:,} documents"
    costs = f"{per_token:.3f} bits a token"
    if per_byte is not None:
        costs = f"{per_byte:.3f} bits a byte, {costs}"
    tokens = "1 token" if summary["tokens"] == 1 else f"{summary['tokens']:,} tokens"
    lines = [f"{documents}, {tokens}: {costs}"]
    head = ["model", "documents", "tokens", "bits", "bits/token"]
    name = last_name(summary["model"])
    name = name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
    cells = [name, f"{summary['documents']:,}", f"{summary['tokens']:,}"]
    cells += [f"{summary['bits']:,.0f}", f"{per_token:.3f}"]
    if per_byte is not None:
        head += ["bits/byte", "zlib"]
        cells += [f"{per_byte:.3f}", f"{summary['zlib_bits_per_byte']:.3f}"]
    lines += ["", table([head, cells], rule=True), ""]
    if not summary["coded_tokens"]:
        lines.append("Without a coded token, 0 bits a token are not a measurement.")
    if uncoded := summary["tokens"] - summary["coded_tokens"]:
        first = "first token, which has" if uncoded == 1 else "first tokens, which have"
        lines.append(f"No bits for {uncoded:,} {first} nothing before.")
    if windowed := summary["windowed_documents"]:
        are = "document is" if windowed == 1 else "documents are"
        length = f"{summary['context']:,} tokens"
        lines.append(f"{windowed:,} {are} longer than {length} and scored in windows.")
    lines += notices(summary)
    if out is not None:
        lines.append(f"{out}/score.html")
    return "\n".join(lines).rstrip()


def bits_after(folder: Path, context: int) -> Floats:
    """The bits of each document of a folder of scores, without its first `context` tokens."""
    if context == 1:
        return np.asarray(read_scores(folder).documents["bits"], np.float64)
    found = read_scores(folder, tokens=True)
    assert found.tokens is not None
    coded = found.tokens["position"] >= context
    documents, bits = (found.tokens[name][coded] for name in ("document", "bits"))
    count = len(found.documents["document"])
    return np.asarray(np.bincount(documents, bits, count), np.float64)


def write_bits(path: Path, bits: ArrayLike) -> None:
    """Writes the bits of each document to a .npy file, whole or not at all; on rank 0."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(bits))
    do_first(lambda: write_whole(path, buffer.getvalue()))


def split_dtype(dtype: str | None) -> tuple[str, str | None]:
    """--dtype as the type of the weights and the type of the tokens in a file."""
    if dtype is not None and re.fullmatch(r"[<>=|]?(u?int|u|i)\d+", dtype):
        return "auto", dtype
    return dtype or "auto", None


def is_token_set(model: Path, data: Path) -> bool:
    """True for a GPT-2 folder and files of tokens, of which memorized bits are counted."""
    try:
        config = json.loads((model / "config.json").read_bytes())
        is_gpt = config.get("model_type") == "gpt2"
    except (OSError, ValueError, AttributeError):
        return False
    paths = sorted(data.iterdir()) if data.is_dir() else [data]
    if not is_gpt or any(_has_text(path) for path in paths):
        return False
    if any(path.suffix in (*TOKEN_FILES, ".idx", ".parquet") for path in paths):
        return True
    return find_manifest(data.absolute()) is not None


def _has_text(path: Path) -> bool:
    if path.suffix == ".parquet" and path.is_file():
        try:
            return TEXT_COLUMN in pyarrow_parquet().read_schema(path).names
        except (OSError, ValueError):  # the error is raised where the file is read
            return False
    return path.suffix in (".txt", ".jsonl", ".arrow")
