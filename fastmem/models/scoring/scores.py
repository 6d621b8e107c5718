"""Scores of documents under any causal language model, in memory or as a folder of tables."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import nn

from fastmem.base.arguments import MAX_WORD, integer, user_path
from fastmem.base.lock import locked_once
from fastmem.base.ranks import do_first, gathered, rank_and_size
from fastmem.base.storage import Row, read_json, read_result
from fastmem.base.terminal import say
from fastmem.data.documents import open_documents
from fastmem.data.sequences import Sequences
from fastmem.models.causal.lm import CausalLM
from fastmem.models.causal.load import RUN, load_model
from fastmem.models.causal.memory import Memory
from fastmem.models.scoring.chunks import STATISTICS, Settings
from fastmem.models.scoring.document_tokenizer import BosPolicy, DocumentTokenizer
from fastmem.models.scoring.folder import (
    DOCUMENTS,
    SETTINGS,
    SUMMARY,
    TOKENS,
    ScoreFolder,
    read_columns,
)
from fastmem.models.scoring.identity import check_same_settings, settings_identity
from fastmem.models.scoring.run import Run
from fastmem.models.scoring.windows import checked_context, checked_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS, GPU_BATCH_TOKENS = 512, 32768
"""On a CPU 4096 take half as long again: activations leave the caches (docs/lab.md)."""
FREE_FRACTION = 0.8
"""The part of a GPU's free memory that a batch may take."""
BATCHES_OF_A_CHUNK = 32


@dataclass(frozen=True)
class Scores:
    """The scores of documents. Further fields of `summary` are listed in docs/store.md."""

    summary: Row
    """Sums over documents, and how they were scored, as in summary.json."""
    documents: dict[str, NDArray[Any]]
    """One value a document, (D,): document, source, tokens, coded_tokens, bytes, bits,
    bits_per_byte, zlib_bits, lossy. The values that need a text are NaN without text."""
    tokens: dict[str, NDArray[Any]] | None
    """One value a coded token: document, position, token, bits, and the statistics asked for."""

    def __repr__(self) -> str:
        per = self.summary["bits_per_byte"]
        in_bytes = "" if per is None else f"{per:.3f} bits a byte, "
        return (
            f"Scores({self.summary['documents']:,} documents, {self.summary['tokens']:,} tokens: "
            f"{in_bytes}{self.summary['bits_per_token']:.3f} bits a token)"
        )


def score(
    model: str | Path | nn.Module,
    data: Any,
    out: str | Path | None = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
    dtype: Any = "auto",
    device: str | torch.device = "auto",
    device_map: Any = None,
    quantization: Any = None,
    trust_remote_code: bool = False,
    shard: bool = False,
    context: int | None = None,
    stride: int | None = None,
    bos: BosPolicy = "auto",
    special_tokens: bool = False,
    chat_template: bool = False,
    also: Sequence[str] = (),
    field: str | None = None,
    column: str | None = None,
    errors: str = "strict",
    length: int | None = None,
    vocab: int | None = None,
    token_dtype: str | None = None,
    batch_tokens: int | None = None,
    tokens: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Scores:
    """The bits of each token of documents under a causal language model.

    Computes, a batch at a time and without logits, for each document with the tokens x, after the
    first token's policy:

        logits = model(x[None, :-1]).logits[0].double()
        bits = F.cross_entropy(logits, x[1:], reduction="none") / math.log(2)

    Documents that are longer than `context` are scored in windows, each token once. Bits do not
    depend on batches but by rounding. With `out`, the scores are written in chunks to a folder:
    tokens.parquet, documents.parquet, summary.json and passages.json. A call that was stopped goes
    on where it was, and a finished folder is read. Without `out`, they are only returned.
    Inside `fastmem.joined` all ranks call this with the same arguments, share the chunks, and each
    gets all scores.

    Args:
        model: a folder, a hub name, a GGUF file, a PEFT adapter, a folder of fastmem, or a module.
        data: documents, as `fastmem.data.documents.open_documents` takes them: a path, the name of
            a data set, a list of texts, token lists, arrays or tensors of tokens.
        out: the folder; needs pyarrow.
        tokenizer: the tokenizer, its folder or hub name; None: the tokenizer of the model.
        dtype, device, device_map, quantization, trust_remote_code, shard: as in
            `fastmem.models.causal.load.load_model`; inside `fastmem.joined` each rank has its own
            device.
        context: the most tokens that the model reads at once; None: all of its positions, which
            must fit into the memory of a GPU.
        stride: tokens that each window after the first scores; None: context.
        bos, special_tokens, chat_template: the tokens of a text, as in
            `fastmem.models.scoring.document_tokenizer.DocumentTokenizer`.
        also: "entropy", "variance", "greedy", "lse": further columns of tokens: entropy_bits,
            variance, is_greedy and lse_bits, as `fastmem.token_stats` has them.
        field, column, errors, length, vocab: as in `open_documents`; token_dtype is its dtype.
        batch_tokens: the most tokens of a batch, padding included; None: 512 on a CPU, on a GPU
            32768, or as many as its memory has room for. Chunks have 32 batches.
        tokens: also return the tokens, which takes their memory.
        overwrite: score again what is in `out`, each time, also after a stopped run; also take a
            folder with other files, which stay.
        progress: shows a bar and says what was decided, on standard error.

    Raises:
        ValueError: the model, the data or an option is wrong; the folder holds other scores or
            files; a token is outside the vocabulary, or bits are not finite. What was finished
            stays in `out`.
        OSError: the folder cannot be written.

    Example:
        >>> model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4))
        >>> found = score(model, [[3, 1, 2], [5]])
        >>> found.documents["coded_tokens"], round(found.summary["bits_per_token"], 1)
        (array([2, 0]), 4.0)
    """
    context, stride = checked_windows(context, stride)
    if batch_tokens is not None:
        batch_tokens = integer("batch_tokens", batch_tokens, 1, MAX_WORD)
    also = tuple(word for word in STATISTICS if word in _checked_words(also))
    documents = open_documents(
        data,
        field=field,
        column=column,
        errors=errors,
        length=length,
        vocab=vocab,
        dtype=token_dtype,
        without=out,
    )
    options: Row = {
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": None if quantization is None else str(quantization),
        "context": context,
        "stride": stride,
        "bos": bos,
        "special_tokens": special_tokens,
        "chat_template": chat_template,
        "also": list(also),
        "field": field,
        "column": column,
        "errors": errors,
        "length": length,
        "vocab": vocab,
        "token_dtype": token_dtype,
    }
    identity = settings_identity(model, tokenizer, {"data": documents}, options)
    check_same_settings(identity)
    if device_map is not None and rank_and_size()[1] > 1:
        raise ValueError(
            f"device_map {device_map!r} with several ranks, which have a device each: give shard "
            "instead, or leave device_map or torchrun out"
        )
    folder = None if out is None else ScoreFolder(user_path(out))
    if found := do_first(lambda: None if overwrite else _finished(folder, identity, tokens)):
        if progress:
            say("finished: nothing to do; --overwrite scores again")
        return found
    loaded = load_model(
        model,
        tokenizer,
        dtype=dtype,
        device=device,
        device_map=device_map,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
        shard=shard,
    )
    loaded.lm.follow(gathered(loaded.lm.reason))
    context = checked_context(loaded.lm, context)
    if batch_tokens is None:
        batch_tokens = default_batch_tokens(loaded.lm, context)
        loaded.lm.wait()
        batch_tokens = min(gathered(batch_tokens))
    own = is_own(model, data)
    run = Run(
        loaded,
        documents,
        DocumentTokenizer(loaded.tokenizer, bos, special_tokens, chat_template),
        Settings(batch_tokens, BATCHES_OF_A_CHUNK * batch_tokens, context, stride, also),
        progress,
        {
            "device_map": None if device_map is None else str(device_map),
            "trust_remote_code": trust_remote_code,
            "shard": shard,
            "in_memory": not is_named(model, tokenizer, device_map, quantization)
            or not (own or isinstance(data, str | Path)),
            "own_data": own,
        },
    )
    if folder is None:
        return Scores(*run.in_memory(identity, tokens))
    with locked_once(folder.path):
        if found := do_first(lambda: _begin(folder, identity, overwrite, tokens)):
            return found  # finished by another process since
        run.in_folder(folder, identity)
        return do_first(lambda: read_scores(folder.path, tokens))


def _begin(folder: ScoreFolder, identity: Row, overwrite: bool, tokens: bool) -> Scores | None:
    """Begins or resumes a folder; the scores of a finished one."""
    if overwrite:
        folder.delete()
    elif found := _finished(folder, identity, tokens):
        return found
    folder.begin(identity)
    return None


def _finished(folder: ScoreFolder | None, identity: Row, tokens: bool) -> Scores | None:
    """The scores of a folder, if it has them all."""
    if folder is None or not folder.check(identity):
        return None
    folder.delete_parts()  # of a process that was killed after its summary
    return read_scores(folder.path, tokens)


def read_scores(folder: str | Path, tokens: bool = False) -> Scores:
    """The scores in a finished folder; with its tokens if asked for.

    Raises:
        ValueError: the folder is not one of scores, or is not finished.

    Example:
        >>> model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4))
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = score(model, [[3, 1, 2], [5]], folder)
        ...     read_scores(folder).summary == found.summary
        True
    """
    path = user_path(folder)
    if not (path / SUMMARY).exists() or not (path / SETTINGS).exists():
        unfinished = (path / SETTINGS).exists()
        why = "is not finished: give the same command again" if unfinished else "holds no scores"
        raise ValueError(f"{path} {why}")
    summary = read_result(path / SUMMARY, "bits_per_byte", "settings")
    found = read_columns(path / TOKENS) if tokens else None
    return Scores(summary, read_columns(path / DOCUMENTS), found)


def default_batch_tokens(lm: CausalLM, context: int | None) -> int:
    """The tokens of a batch, which fit into the free memory of a GPU.

    Raises:
        ValueError: not even one window of `context` tokens fits.
    """
    if lm.device.type != "cuda":
        return BATCH_TOKENS
    memory, available = Memory(lm), int(FREE_FRACTION * torch.cuda.mem_get_info(lm.device)[0])
    longest = memory.longest(available)
    if context is not None and context > longest:
        raise ValueError(
            f"a window of {context:,} tokens needs {memory(1, context) / 2**30:.1f} GiB, and "
            f"{lm.device} has room for {available / 2**30:.1f}: give context, such as {longest}"
        )
    return min(GPU_BATCH_TOKENS, memory.tokens(available, context))


def is_named(model: Any, tokenizer: Any, *options: Any) -> bool:
    """True if a command can name the model and the options."""
    named = isinstance(model, str | Path) and tokenizer is None
    return named and all(option is None or isinstance(option, str) for option in options)


def is_own(model: Any, data: Any) -> bool:
    """True for the data set in a model's run.json, which commands take if none is given."""
    if not isinstance(model, str | Path) or not isinstance(data, Sequences):
        return False
    try:
        described = json.loads(json.dumps(data.description()))
        return bool(read_json(user_path(model) / RUN)["sequences"] == described)
    except (OSError, ValueError, KeyError):  # not a model of fastmem train, or a part of a set
        return False


def _checked_words(also: Sequence[str]) -> Sequence[str]:
    for word in also:
        if isinstance(also, str) or word not in STATISTICS:
            raise ValueError(f"also takes some of {', '.join(STATISTICS)}, got {also!r}")
    return also
