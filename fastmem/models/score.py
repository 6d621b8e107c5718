"""Code length of each sequence of a data set under a model."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from tqdm import tqdm

from fastmem.base.ranks import active, rank_and_size
from fastmem.base.stats import Floats
from fastmem.data.array import as_sequences
from fastmem.data.files.tokenfile import TokenFile
from fastmem.data.sequences import Sequences
from fastmem.likelihood.api import token_stats
from fastmem.memorization.extraction import greedy_from
from fastmem.models.causal.lm import CausalLM
from fastmem.models.causal.load import load_model
from fastmem.models.engine import FusedEngine, Precision, converted, flat, is_fused
from fastmem.models.gpt import GPT, GPTConfig, check_model
from fastmem.models.scoring.windows import window_stats
from fastmem.models.sharded import computing, device_of


class NotFinite(ValueError):
    """The code length of a sequence is not finite, since weights are not finite."""


def sequence_bits(
    model: GPT | nn.Module | CausalLM | str | Path,
    sequences: Sequences | ArrayLike | str | Path,
    precision: Precision = "fp32",
    batch: int | None = None,
    progress: bool = False,
) -> Floats:  # (N,)
    """The code length of each sequence under the model, in bits, without its first token.

    Computes `model.token_bits(tokens).double().sum(-1)` for all N sequences, a batch at a time. A
    prefix that all sequences share is not coded: the first `sequences.context` tokens are left
    out. In float32 on a CPU the C++ core computes the bits of a GPT as made; a model with hooks,
    masks or other modules computes them itself. A causal language model of another library, and
    sequences of different lengths, go through `fastmem.CausalLM`, and sequences longer than the
    model's positions through windows (`fastmem.models.scoring.windows`). Inside `fastmem.joined`
    all ranks call this together and share the sequences of a GPT; each gets all bits.

    Args:
        model: the model, whose device does the work: a fastmem.GPT, a causal language model of
            transformers or PEFT, or the path or name that `fastmem.models.causal.load` takes.
        sequences: the data set, with a vocabulary and a length up to those of the model, or tokens
            as `from_array` takes them, or the path of a file that `TokenFile.open` takes. Lists of
            tokens may differ in length: one without a second token has 0 bits.
        precision: "fp32" computes in float32, or in float64 if the weights are float64,
            "bf16-mixed" in bfloat16 from float32 weights, the others in bfloat16. Weights of
            another dtype are converted, in a copy of the model. A model of another library
            computes in its own dtype.
        batch: sequences at a time; changes only speed and rounding.
        progress: shows a bar on a terminal.

    Returns:
        float64, in the order of the sequences: strict convention, S - 1 coded tokens each, S - P
        with a prefix of P tokens.

    Raises:
        ValueError: a model that is neither a GPT nor a causal language model, or on meta; a data
            set that does not fit the model; an unknown precision; a batch below 1; or bits that are
            not finite (weights that diverged).

    Example:
        >>> import fastmem
        >>> model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4))
        >>> bits = sequence_bits(model, fastmem.UniformSequences(10, length=4, vocab=16))
        >>> bits.shape, bool(abs(bits.mean() - 12) < 0.1)  # untrained: 3 tokens of 4 bits
        ((10,), True)
    """
    if batch is not None and (not isinstance(batch, (int, np.integer)) or batch < 1):
        raise ValueError(f"batch must be at least 1, not {batch!r}")
    if isinstance(model, (str, Path)):
        lm = load_model(model).lm
        model = lm.model if isinstance(lm.model, GPT) else lm
    documents = _documents(sequences)
    if isinstance(model, CausalLM) or _of_another_library(model):
        if precision != "fp32":
            raise ValueError(
                f"precision {precision!r} is for a fastmem.GPT: convert the model itself, for "
                "example by model.bfloat16(), and leave the precision out"
            )
        return _causal_bits(model, documents, batch, progress)
    check_model(model)
    assert isinstance(model, GPT)
    if isinstance(documents, list):
        return _causal_bits(converted(model, precision), documents, batch, progress)
    sequences = documents
    check_fit(model.config, sequences)
    batches, device = _batches(model, sequences, batch), device_of(model)
    context, model = computing(model, precision)
    fused = FusedEngine(model, flat(model)[None]) if is_fused(model, precision) else None
    bits = np.zeros(sequences.count)
    with torch.no_grad(), context:
        for rows, own in tqdm(batches, "score", disable=None if progress else True, leave=False):
            tokens = sequences.to_torch(device, rows)
            token_bits = fused.bits(tokens[None])[0] if fused else model.token_bits(tokens)
            coded = token_bits[:, sequences.context - 1 :]  # token_bits leaves out the first token
            bits[own] = coded[: own.stop - own.start].double().sum(-1).cpu().numpy()
    return _finite(_of_all_ranks(bits))


def sequence_scores(
    model: GPT, sequences: Sequences, precision: Precision = "fp32"
) -> tuple[Floats, NDArray[np.int64]]:  # (N,), (N,)
    """The code length of each sequence, and `fastmem.greedy_from` of its tokens, in one pass.

    Computes `sequence_bits` of a model of fastmem as made, to rounding, and whether each token is
    the most likely one: the smallest prefix from which greedy decoding returns the rest.

    Raises:
        ValueError: as in `sequence_bits`.

    Example:
        >>> model = GPT(GPTConfig(1, 8, 2, vocab=16, length=4))
        >>> bits, starts = sequence_scores(model, fastmem.UniformSequences(10, 4, 16))
        >>> bits.shape, bool((starts >= 1).all() and (starts <= 4).all())
        ((10,), True)
    """
    check_model(model)
    check_fit(model.config, sequences)
    batches, device = _batches(model, sequences), device_of(model)
    context, model = computing(model, precision)
    bits, starts = np.zeros((2, sequences.count))
    with torch.no_grad(), context:
        for rows, own in batches:
            tokens = sequences.to_torch(device, rows)
            hidden = model(tokens[:, :-1])
            stats = token_stats(hidden, model.head, tokens[:, 1:], greedy=True)
            assert stats.is_greedy is not None
            size = own.stop - own.start
            sums = stats.bits[:size, sequences.context - 1 :].double().sum(-1)
            bits[own] = sums.cpu().numpy()
            starts[own] = greedy_from(stats.is_greedy[:size].cpu().numpy()) if size else 0
    bits, starts = _of_all_ranks(bits), _of_all_ranks(starts)
    return _finite(bits), starts.astype(np.int64)


def _batches(
    model: GPT, sequences: Sequences, batch: int | None = None
) -> list[tuple[slice, slice]]:
    """The rows of each batch of this rank, and those whose results count: the ranks of
    `fastmem.joined` share the sequences.

    All ranks of a sharded model need the same number of batches, because they gather its weights
    together: a rank that has no sequence left takes the first one, which does not count.
    """
    N = sequences.count
    if batch is None:
        batch = score_batch(device_of(model).type, sequences.length)
    rank, size = rank_and_size()
    found = []
    for first in range(0, N, batch * size):
        start = min(first + rank * batch, N)
        own = slice(start, min(start + batch, N))
        found.append((own if own.stop > start else slice(0, 1), own))
    return found


def score_batch(device: str, length: int) -> int:
    """Sequences that a device scores at a time."""
    return max(1, (8192 if device == "cpu" else 131072) // length)


def _of_all_ranks(values: Floats) -> Floats:
    """Values of all sequences from the values of this rank's sequences, 0 for the others."""
    job = active()
    return values if job is None else job.sum(values)


def _finite(bits: Floats) -> Floats:
    if not np.isfinite(bits).all():
        raise NotFinite(
            f"the bits of sequence {int(np.argmin(np.isfinite(bits)))} are not finite, since the "
            "weights are not: train the model again at a lower rate"
        )
    return bits


def _of_another_library(model: object) -> bool:
    """True for models of transformers and PEFT, also inside DataParallel."""
    inside = getattr(model, "module", None)
    return any(
        isinstance(each, nn.Module) and hasattr(each, "get_output_embeddings")
        for each in (model, inside)
    )


Documents = list[NDArray[np.integer[Any]]]


def _documents(sequences: Any) -> Sequences | Documents:
    """A data set, or rows of tokens if their lengths differ."""
    if isinstance(sequences, (str, Path)):
        return TokenFile.open(sequences)
    rule = "sequences must be a set of sequences"
    if isinstance(sequences, Mapping) or not hasattr(sequences, "__iter__"):
        return as_sequences(rule, sequences)
    try:
        return as_sequences(rule, sequences)
    except ValueError:
        if any(isinstance(row, str) for row in sequences):
            raise ValueError(
                "sequences are texts, not tokens: use fastmem.score(model, texts).documents['bits']"
            ) from None
        rows = [_row(row) for row in sequences]
        if not rows or any(row is None for row in rows):
            raise
        found = [row for row in rows if row is not None]
        if all(row.size for row in found) and len({row.size for row in found}) == 1:
            raise  # lengths are not what is wrong
        return found


def _row(row: Any) -> NDArray[np.integer[Any]] | None:
    """One row of tokens, or None."""
    try:
        row = row.as_py() if hasattr(row, "as_py") else row  # of pyarrow
        row = np.asarray(row.detach().cpu() if isinstance(row, Tensor) else row)
    except (TypeError, ValueError, RuntimeError):
        return None
    row = row.astype(np.int64) if row.shape == (0,) else row
    return row if row.ndim == 1 and row.dtype.kind in "iu" else None


def _causal_bits(
    model: nn.Module | CausalLM, documents: Sequences | Documents, batch: int | None, progress: bool
) -> Floats:  # (N,)
    """The sums of `window_stats`, a block of documents at a time."""
    lm = model if isinstance(model, CausalLM) else CausalLM(model)
    coded = documents.context - 1 if isinstance(documents, Sequences) else 0
    bits: list[float] = []
    with tqdm(
        total=len(documents), desc="score", disable=None if progress else True, leave=False
    ) as bar:
        for block in _blocks(documents):
            longest = max(len(tokens) for tokens in block)
            area = 512 if lm.device.type == "cpu" else 16384
            found = window_stats(
                lm, block, area if batch is None else int(batch) * max(1, longest)
            )["bits"]
            bits += [float(each[coded:].sum(dtype=np.float64)) for each in found]
            bar.update(len(block))
    if lm.reason is not None:
        warnings.warn(lm.reason, stacklevel=3)
    return _finite(np.array(bits))


def _blocks(documents: Sequences | Documents) -> Iterator[Documents]:
    """Documents of together about a million tokens: windows are sorted inside a block."""
    if isinstance(documents, Sequences):
        size = max(1, (1 << 20) // documents.length)
        for start in range(0, documents.count, size):
            yield list(documents.tokens(slice(start, start + size), np.int64))
        return
    block: Documents = []
    size = 0
    for tokens in documents:
        block.append(tokens)
        size += len(tokens) + 1
        if size >= 1 << 20:
            yield block
            block, size = [], 0
    if block:
        yield block


def check_fit(config: GPTConfig, sequences: Sequences) -> None:
    """ValueError if a model of this shape cannot code these sequences."""
    if sequences.length < 2:
        raise ValueError("length is 1: only tokens after the first are coded; use 2 or more")
    if sequences.vocab < 2:
        raise ValueError("vocab is 1: a token that is always the same has no bits; use 2 or more")
    if sequences.coded_entropy_bits == 0:
        raise ValueError("the tokens are always the same and have no bits: give other weights")
    if sequences.length > config.length:
        raise ValueError(
            f"sequences of length {sequences.length} for a model of length {config.length}: "
            f"give the model at least {sequences.length}"
        )
    if sequences.vocab > config.vocab:
        raise ValueError(
            f"tokens of a vocabulary of {sequences.vocab} for a model of {config.vocab}: "
            f"give the model at least {sequences.vocab}"
        )
