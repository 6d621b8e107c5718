"""Windows of documents of any length, and batches of windows.

B windows of a batch, T tokens of its longest window.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmem.base.arguments import MAX_WORD, integer
from fastmem.models.causal.lm import CausalLM
from fastmem.models.causal.through_logits import IGNORED


@dataclass(frozen=True)
class Window:
    """One pass of the model over a part of a document with the tokens x.

    The model reads x[begin : end - 1]. Its outputs score x[first : end], and begin < first.
    """

    document: int
    begin: int
    first: int
    end: int

    @property
    def inputs(self) -> int:
        """The number of tokens that the model reads."""
        return self.end - 1 - self.begin


def windows(
    lengths: Sequence[int], context: int | None = None, stride: int | None = None
) -> list[Window]:
    """Windows that score each token of each document once, except for the first token.

    The first window of a document scores as many tokens as fit. Each later window scores the next
    `stride` tokens (fewer at the end) and fills the rest of `context` with preceding tokens.

    Args:
        lengths: the number of tokens of each document.
        context: the most tokens that the model reads at once; None: any number.
        stride: tokens that a later window scores, up to context; None: context, which reads the
            fewest tokens. 1 scores each token with a full context.

    Raises:
        ValueError: a length below 0, a context below 1, or a stride outside of 1 to context.

    Example:
        >>> [(w.begin, w.first, w.end) for w in windows([7], context=4, stride=2)]
        [(0, 1, 5), (2, 5, 7)]

    Source: rolling windows of lm-evaluation-harness, `get_rolling_token_windows`.
    """
    context, stride = checked_windows(context, stride)
    found: list[Window] = []
    for document, length in enumerate(lengths):
        length = integer(f"the length of document {document}", length, 0, MAX_WORD)
        found += windows_of(document, length, context, stride)
    return found


def checked_windows(context: int | None, stride: int | None) -> tuple[int | None, int | None]:
    """Context and stride; ValueError as in `windows`."""
    if context is not None:
        context = integer("context", context, 1, MAX_WORD)
    if stride is not None:
        stride = integer("stride", stride, 1, MAX_WORD)
        if context is None or stride > context:
            raise ValueError(
                f"stride {stride} with context {context}: a window cannot score more tokens than "
                f"it reads; give a context of at least {stride}"
            )
    return context, stride


def windows_of(
    document: int, length: int, context: int | None, stride: int | None
) -> Iterator[Window]:
    """The windows of one document, one at a time: `stride` 1 has as many as the document tokens."""
    if length < 2:
        return
    most = length if context is None else context
    end = min(length, most + 1)
    yield Window(document, 0, 1, end)
    while end < length:
        first, end = end, min(length, end + (stride or most))
        yield Window(document, end - 1 - most, first, end)


def checked_context(lm: CausalLM, context: int | None) -> int | None:
    """The context, by default the positions of the model; ValueError if it is above them."""
    if lm.positions is None or context is None:
        return lm.positions if context is None else context
    if context > lm.positions:
        raise ValueError(
            f"context {context} for a model of {lm.positions} positions: give at most "
            f"{lm.positions}"
        )
    return context


def batches(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Windows in batches of at most `batch_tokens` tokens, padding included, longest first.

    Windows of one length share a batch, so little is padded, and the first batch needs the most
    memory. A window that is longer than `batch_tokens` is a batch by itself.

    Example:
        >>> found = windows([3, 9, 4, 3])
        >>> [[w.document for w in batch] for batch in batches(found, batch_tokens=8)]
        [[1], [2, 0], [3]]
    """
    batch_tokens = integer("batch_tokens", batch_tokens, 1, MAX_WORD)
    batch: list[Window] = []
    for window in sorted(windows, key=lambda window: -window.inputs):
        if batch and batch[0].inputs * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def window_tensors(
    documents: Sequence[NDArray[np.integer[Any]]], batch: Sequence[Window]
) -> tuple[Tensor, Tensor]:  # (B, T), (B, T)
    """Inputs and targets of a batch in int64, padded on the right: targets there are -100.

    A causal model computes nothing from the tokens that follow, so padding needs no mask.
    """
    longest = max(window.inputs for window in batch)
    inputs = np.zeros((len(batch), longest), np.int64)
    targets = np.full((len(batch), longest), IGNORED, np.int64)
    for row, window in enumerate(batch):
        tokens = documents[window.document]
        inputs[row, : window.inputs] = tokens[window.begin : window.end - 1]
        inputs[row, window.inputs :] = inputs[row, window.inputs - 1]  # a token that exists
        scored = slice(window.first - 1 - window.begin, window.inputs)
        targets[row, scored] = tokens[window.first : window.end]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def scored_windows(
    lm: CausalLM,
    documents: Sequence[NDArray[np.integer[Any]]],
    windows: Sequence[Window],
    batch_tokens: int,
    **statistics: Any,
) -> Iterator[tuple[list[Window], dict[str, list[NDArray[Any]]]]]:
    """Batches of windows, longest first, and the statistics of the tokens that they score.

    Args:
        documents: tokens by the number in `Window.document`.
        windows, batch_tokens: as in `batches`.
        statistics: as in `CausalLM.token_stats`.

    Yields:
        A batch, and for "bits" and each further field of `TokenStats` that was asked for an array
        (end - first,) for each window of the batch.
    """
    for batch in batches(windows, batch_tokens):
        stats = lm.token_stats(*window_tensors(documents, batch), **statistics)._asdict()
        scored = [slice(window.first - 1 - window.begin, window.inputs) for window in batch]
        yield (
            batch,
            {
                name: [row[part] for row, part in zip(values.cpu().numpy(), scored, strict=True)]
                for name, values in stats.items()
                if values is not None
            },
        )


def window_stats(
    lm: CausalLM,
    documents: Sequence[NDArray[np.integer[Any]]],
    batch_tokens: int = 512,
    context: int | None = None,
    stride: int | None = None,
    *,
    entropy: bool = False,
    variance: bool = False,
    greedy: bool = False,
    lse: bool = False,
    progress: Callable[[int], object] | None = None,
) -> dict[str, list[NDArray[Any]]]:
    """Statistics of each token of each document after its first token.

    Computes `lm.token_stats` of all windows, in batches, longest first. Batches change nothing but
    rounding.

    Args:
        documents: (N_i,) integers each, with the tokens that begin a document, such as BOS.
        batch_tokens: the most tokens of a batch, padding included: fastmem.models.causal.memory.
        context, stride: as in `windows`; a context of None is `lm.positions`.
        entropy, variance, greedy, lse: as in `CausalLM.token_stats`.
        progress: called after each batch with the number of tokens that it scored.

    Returns:
        For "bits", and each of "entropy_bits", "variance", "is_greedy" and "lse_bits" that was
        asked for, an array (N_i - 1,) for each document, in the order of documents: bool for
        is_greedy, else of the type `lm.dtype`.

    Raises:
        ValueError: a context above `lm.positions`, a document that is not one row of integers, a
            token outside the vocabulary, or as in `windows` and `batches`.
    """
    context = checked_context(lm, context)
    for index, tokens in enumerate(documents):
        if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            kind = getattr(tokens, "dtype", type(tokens).__name__)
            raise ValueError(
                f"document {index} is {kind} of shape {np.shape(tokens)}, not one row of integers: "
                "use np.asarray(tokens, np.int64)"
            )
    names = ["bits"] + ["entropy_bits"] * entropy + ["variance"] * variance
    names += ["is_greedy"] * greedy + ["lse_bits"] * lse
    sizes = [max(0, len(tokens) - 1) for tokens in documents]
    dtype = str(lm.dtype).removeprefix("torch.")
    found: dict[str, list[NDArray[Any]]] = {
        name: [np.zeros(size, bool if name == "is_greedy" else dtype) for size in sizes]
        for name in names
    }
    cut = windows([len(tokens) for tokens in documents], context, stride)
    asked = {"entropy": entropy, "variance": variance, "greedy": greedy, "lse": lse}
    for batch, arrays in scored_windows(lm, documents, cut, batch_tokens, **asked):
        for name, parts in arrays.items():
            for window, part in zip(batch, parts, strict=True):
                found[name][window.document][window.first - 1 : window.end - 1] = part
        if progress is not None:
            progress(sum(window.end - window.first for window in batch))
    return found
