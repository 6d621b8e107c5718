"""Extraction of sequences and of documents from any causal language model, into a folder."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fastmem.base.arguments import MAX_WORD, integer, user_path
from fastmem.base.lock import locked
from fastmem.base.storage import Row, read_result, write_document
from fastmem.base.terminal import say
from fastmem.data.documents import Documents, open_documents
from fastmem.data.sequences import Sequences
from fastmem.models.causal.load import Loaded, load_model
from fastmem.models.causal.sampling import Way
from fastmem.models.extraction.folder import RATES, SETS, ExtractionFolder
from fastmem.models.extraction.measure import Columns, Plan, measured_chunks
from fastmem.models.extraction.passages import write_passages
from fastmem.models.extraction.rates import rates_of
from fastmem.models.extraction.slide import slide_of
from fastmem.models.scoring.chunks import Cursor as Begin
from fastmem.models.scoring.document_tokenizer import BosPolicy, DocumentTokenizer
from fastmem.models.scoring.identity import settings_identity
from fastmem.models.scoring.run import Progress, described, how_measured
from fastmem.models.scoring.scores import (
    BATCHES_OF_A_CHUNK,
    default_batch_tokens,
    is_named,
    is_own,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = 1
PREFIXES = (8, 16, 32)
SLIDE_SUFFIX, STRIDE = 50, 10
HELD_OUT = 10_000
"""Most held-out sequences of a model's own data set, as in arXiv 2505.24832."""


def extract(
    model: str | Path | nn.Module,
    data: Any,
    test: Any = None,
    *,
    out: str | Path,
    prefixes: Sequence[int] = PREFIXES,
    suffix: int | None = None,
    temperatures: Sequence[float] = (1.0,),
    top_k: int | None = None,
    samples: int = 100,
    probability: float = 0.5,
    decode: bool = False,
    slide: bool = False,
    stride: int = STRIDE,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
    dtype: Any = "auto",
    device: str | torch.device = "auto",
    device_map: Any = None,
    quantization: Any = None,
    trust_remote_code: bool = False,
    bos: BosPolicy = "auto",
    special_tokens: bool = False,
    field: str | None = None,
    column: str | None = None,
    errors: str = "strict",
    length: int | None = None,
    vocab: int | None = None,
    token_dtype: str | None = None,
    batch_tokens: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Row:
    """How much of its training sequences a model returns by greedy decoding and by samples.

    Computes, for each sequence x and each prefix of P tokens, from one teacher-forced pass,

        exact = (model.generate(x[:P], do_sample=False, max_new_tokens=len(x) - P) == x).all()

    the tokens before the first error, and -log2 of the probability to sample the suffix. Another
    temperature and top-k share one further pass; `decode` decodes for real. Writes
    sequences.parquet, a row a sequence, extraction.json and passages.json to `out`. A call that was
    stopped goes on where it was; a finished folder is only summed again.

    Args:
        model: as in `fastmem.score`.
        data: the training sequences: documents, as `fastmem.score` takes them.
        test: sequences that the model has not seen, which generalization alone extracts.
        out: the folder; needs pyarrow.
        prefixes: tokens P of the prefixes, without a BOS that is added.
        suffix: tokens after the longest prefix; the rest of a document is left out. None: all (with
            `slide` 50).
        temperatures: of sampling.
        top_k: samples only among this many tokens.
        samples: n, samples of each suffix.
        probability: p; a suffix is discoverable if n samples hold it with at least p.
        decode: also decodes, one token after another, for edit distances.
        slide: measures windows of the longest prefix and the suffix in each document.
        stride: tokens between windows.
        tokenizer, dtype, device, device_map, quantization, trust_remote_code, bos, special_tokens,
            field, column, errors, length, vocab, token_dtype, batch_tokens, overwrite, progress: as
            in `fastmem.score`.

    Returns:
        The content of extraction.json; docs/store.md lists its fields.

    Raises:
        ValueError: a prefix below 1, or no sequence has a token after it; a temperature that is not
            above 0; a sequence that the model cannot read at once; and as `fastmem.score`.
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=8))
        >>> sequences = fastmem.UniformSequences(20, 8, 16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = extract(model, sequences, out=folder, prefixes=[4])
        >>> found["prefixes"][0]["train"]["sequences"]
        20
    """
    prefixes = checked_prefixes(prefixes)
    suffix = SLIDE_SUFFIX if slide and suffix is None else suffix
    if suffix is not None:
        suffix = integer("suffix", suffix, 1, MAX_WORD)
    stride = integer("stride", stride, 1, MAX_WORD)
    samples = integer("samples", samples, 1, MAX_WORD)
    if not 0 < probability < 1:
        raise ValueError(f"probability must be between 0 and 1, not {probability}: try 0.5")
    ways = _ways(temperatures, top_k)
    reading = {"field": field, "column": column, "errors": errors, "length": length, "vocab": vocab}
    opened = _opened(data, test, without=out, dtype=token_dtype, **reading)
    options: Row = {
        "prefixes": prefixes,
        "suffix": suffix,
        "temperatures": [way.temperature for way in ways],
        "top_k": top_k,
        "decode": decode,
        "slide": slide,
        "stride": stride if slide else None,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": None if quantization is None else str(quantization),
        "bos": bos,
        "special_tokens": special_tokens,
        **reading,
        "token_dtype": token_dtype,
    }
    sets = {"data": opened["train"], "test": opened.get("test")}
    identity = settings_identity(model, tokenizer, sets, options)
    folder = ExtractionFolder(user_path(out))
    if not overwrite and folder.check(identity):
        return _summed_again(folder, ways, samples, probability, progress)
    loaded = load_model(
        model,
        tokenizer,
        dtype=dtype,
        device=device,
        device_map=device_map,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
    )
    if top_k is not None and top_k > loaded.lm.vocab:
        raise ValueError(
            f"top_k {top_k} of a vocabulary of {loaded.lm.vocab}: give at most as many"
        )
    if batch_tokens is None:
        batch_tokens = default_batch_tokens(loaded.lm, _longest(opened, loaded, prefixes, suffix))
    batch_tokens = integer("batch_tokens", batch_tokens, 1, MAX_WORD)
    chunk = BATCHES_OF_A_CHUNK * batch_tokens
    strides = stride if slide else None
    plan = Plan(tuple(prefixes), suffix, ways, decode, strides, batch_tokens, chunk)
    tokenize = DocumentTokenizer(loaded.tokenizer, bos, special_tokens, False)
    own, held_out = is_own(model, data), False
    if own and isinstance(test, Sequences):
        with suppress(ValueError):  # a file knows only its own sequences
            held_out = test == held_out_of(data)
    # Without test, a command takes held-out sequences beside a model's own data.
    sets_named = held_out or isinstance(test, str | Path)
    if not own:
        sets_named = isinstance(data, str | Path) and isinstance(test, str | Path | None)
    given = {
        "device_map": None if device_map is None else str(device_map),
        "trust_remote_code": trust_remote_code,
        "in_memory": not is_named(model, tokenizer, device_map, quantization) or not sets_named,
        "own_data": own,
        "own_test": held_out,
    }
    folder.path.mkdir(parents=True, exist_ok=True)
    with locked(folder.path):
        if overwrite:
            folder.delete()
        else:
            folder.check(identity)  # another process may have begun since
        folder.begin(identity)
        found = _measured(folder, opened, loaded, tokenize, plan, identity, progress) | given
        return _finished(folder, found, opened, loaded, tokenize, plan, samples, probability)


def held_out_of(sequences: Sequences) -> Sequences:
    """The held-out sequences beside which commands measure those of a model's training."""
    return sequences.held_out(min(HELD_OUT, sequences.count))


def checked_prefixes(prefixes: Sequence[int]) -> list[int]:
    """Prefixes in rising order, each once; ValueError for none, or one below 1."""
    if np.ndim(prefixes) != 1 or not len(prefixes):
        raise ValueError(f"prefixes must be one or more, not {prefixes!r}: such as (8, 16, 32)")
    return sorted({integer("prefixes", prefix, 1, MAX_WORD) for prefix in prefixes})


def _opened(data: Any, test: Any, **reading: Any) -> dict[str, Documents]:
    """The sets that are given, by name; ValueError for one without documents."""
    given = {"train": data, "test": test}
    opened = {
        name: open_documents(one, **reading) for name, one in given.items() if one is not None
    }
    for name, documents in opened.items():
        if next(iter(documents), None) is None:
            raise ValueError(f"{documents.name} has no documents: give other {name} sequences")
    return opened


def _ways(temperatures: Sequence[float], top_k: int | None) -> tuple[Way, ...]:
    """The ways of sampling, without probabilities that are the same."""
    if np.ndim(temperatures) != 1 or not len(temperatures):
        raise ValueError(
            f"temperatures must be one or more, not {temperatures!r}: such as (1, 0.7)"
        )
    for temperature in temperatures:
        if not 0 < temperature < float("inf"):
            raise ValueError(
                f"temperatures must be above 0, not {temperature}: greedy decoding, which is "
                "temperature 0, is always measured"
            )
    if top_k is not None:
        integer("top_k", top_k, 1, MAX_WORD)
    return tuple(dict.fromkeys(Way(float(t), top_k) for t in temperatures))


def _longest(
    opened: dict[str, Documents], loaded: Loaded, prefixes: list[int], suffix: int | None
) -> int | None:
    """The most tokens of one pass, which a GPU must have room for."""
    if suffix is None:
        return loaded.lm.positions
    longest = max(prefixes) + suffix
    return min(longest, loaded.lm.positions or longest)


def _summed_again(
    folder: ExtractionFolder, ways: Sequence[Way], samples: int, probability: float, progress: bool
) -> Row:
    """The rates of a finished folder, written anew."""
    folder.delete_parts()  # of a process that was killed before it could
    if progress:
        say("measured: only the rates are summed; --overwrite measures again")
    old = read_result(folder.path / RATES, "prefixes", "settings")
    found = _summed(folder, old, ways, samples, probability)
    write_document(folder.path / RATES, found)
    return found


def _measured(
    folder: ExtractionFolder,
    opened: dict[str, Documents],
    loaded: Loaded,
    tokenize: DocumentTokenizer,
    plan: Plan,
    identity: Row,
    progress: bool,
) -> Row:
    """Writes sequences.parquet; returns extraction.json without rates."""
    state: Row = {}
    for name, documents in opened.items():
        state |= _measure(folder, name, documents, loaded, tokenize, plan, progress)
    folder.merge()
    return _summary(loaded, tokenize, identity, state)


def _finished(
    folder: ExtractionFolder,
    found: Row,
    opened: dict[str, Documents],
    loaded: Loaded,
    tokenize: DocumentTokenizer,
    plan: Plan,
    samples: int,
    probability: float,
) -> Row:
    """Writes passages.json and extraction.json with its rates, the last file of a folder."""
    try:
        found = _summed(folder, found, plan.ways, samples, probability)
    except ValueError:  # these prefixes measure nothing, and others are to be given
        folder.delete()
        raise
    write_passages(folder, folder.read(), opened, tokenize, plan, loaded.tokenizer)
    write_document(folder.path / RATES, found)
    folder.delete_parts()
    return found


def _measure(
    folder: ExtractionFolder,
    name: str,
    documents: Documents,
    loaded: Loaded,
    tokenize: DocumentTokenizer,
    plan: Plan,
    progress: bool,
) -> Row:
    """Measures what the folder lacks of one set; gives what the summary needs of the run."""
    number, (cursor, state) = folder.parts(name), folder.end(name)
    if progress and (skipped := documents.skipped_in_words()):
        say(skipped)
    if progress and number:
        say(f"{cursor.document:,} {name} documents are measured and skipped")
    lm, before = loaded.lm, state.get("seconds", 0.0)
    rest = tokenize(documents.after(cursor.document))
    begin = Begin(cursor.document, read=cursor.read)
    with Progress(progress, documents.count, begin, f"extract {name}") as shown:
        for columns, end in measured_chunks(lm, rest, plan, cursor, shown.update):
            state = how_measured(lm, state, before + time.monotonic() - shown.began)
            if not number:
                _check_equal(columns["tokens"], plan, name)
            folder.add(name, number, columns, end, state)
            number += 1
    return {f"{name}_seconds": state.pop("seconds", 0.0), **state} if state else {}


def _check_equal(lengths: NDArray[np.int64], plan: Plan, name: str) -> None:
    """ValueError, before all is measured, for sequences of one length without a suffix."""
    if len(lengths) > 1 and lengths.min() == lengths.max() <= max(plan.prefixes):
        raise ValueError(
            f"prefix {max(plan.prefixes)} of {name} sequences of {lengths[0]} tokens leaves "
            f"nothing to extract: give a prefix below {lengths[0]}"
        )


def _summary(loaded: Loaded, tokenize: DocumentTokenizer, identity: Row, state: Row) -> Row:
    """extraction.json without rates."""
    return {
        "schema": SCHEMA,
        "model": identity["model"][0],
        "data": identity["data"][0],
        "test": identity["test"][0],
        "bos": tokenize.bos,
        **described(loaded.lm, state),
        "seconds": sum(state.get(f"{name}_seconds", 0.0) for name in SETS),
        "settings": {name: value[0] for name, value in identity.items()},
    }


def _summed(
    folder: ExtractionFolder,
    found: Row,
    ways: Sequence[Way],
    samples: int,
    probability: float,
) -> Row:
    """The content of extraction.json with the rates for this many samples."""
    columns: Columns = folder.read()
    prefixes = found["settings"]["prefixes"]
    suffix, stride = (found["settings"][name] for name in ("suffix", "stride"))
    windows = stride is not None
    for name, data in (("train", found["data"]), ("test", found["test"])):
        if windows and data is not None and not (columns["set"] == name).any():
            raise ValueError(
                f"no document of {data} has {prefixes[-1] + suffix:,} tokens, the longest prefix "
                f"and a suffix of {suffix:,}: give a shorter suffix or prefix, or longer documents"
            )
    rates = rates_of(columns, prefixes, ways, samples, probability, windows)
    slide = slide_of(columns, prefixes[-1], suffix, stride) if windows else None
    return found | {"samples": samples, "prefixes": rates, "slide": slide}
