"""Windows and batches against brute force."""

import itertools

import numpy as np
import pytest
import torch

from fastmem.models.scoring.windows import Window, batches, window_tensors, windows, windows_of


@pytest.mark.parametrize("context", [1, 2, 3, 5, 8, None])
def test_each_token_is_scored_once_with_the_most_context(context: int | None) -> None:
    """Fails if a token is lost, scored twice, or has fewer tokens before it than its window could
    hold."""
    for length, stride in itertools.product(range(24), range((context or 0) + 1)):
        found = windows([length], context, stride or None)
        step = stride or context
        scored: list[int] = []
        for window in found:
            assert window.begin < window.first < window.end <= length
            assert context is None or window.inputs <= context
            scored += range(window.first, window.end)
            # The most that fits before the last token of the window.
            assert window.begin == (0 if context is None else max(0, window.end - 1 - context))
        assert scored == list(range(1, length))
        for before, after in itertools.pairwise(found):
            assert after.first == before.end
            assert step is not None
            assert after.end - after.first == min(step, length - after.first)
        if found and context is not None:
            assert found[0].end == min(length, context + 1)


@pytest.mark.parametrize(("context", "stride"), [(4, 4), (4, 1), (4, 3), (7, 2)])
def test_windows_of_lm_eval(context: int, stride: int) -> None:
    """Fails if a window has other inputs or scores other tokens than lm-evaluation-harness."""
    utils = pytest.importorskip("lm_eval.utils")
    for length in range(2, 30):
        tokens = list(range(length))
        theirs = utils.get_rolling_token_windows(tokens[1:], 0, context, context - stride + 1)
        ours = windows([length], context, stride)
        expected = [utils.make_disjoint_window(pair) for pair in theirs]
        assert [
            (tokens[w.begin : w.first], tokens[w.first : w.end]) for w in ours
        ] == [(list(before), list(scored)) for before, scored in expected]  # fmt: skip


def test_batches_hold_each_window_once_longest_first() -> None:
    """Fails if a window is lost, a batch has a larger area than asked for, or is not sorted."""
    lengths = np.random.default_rng(0).integers(0, 40, 200)
    cut = windows(lengths.tolist(), 16, 4)
    for limit in (1, 16, 17, 100, 10**6):
        found = list(batches(cut, limit))
        flat = [window for batch in found for window in batch]
        assert sorted(flat, key=repr) == sorted(cut, key=repr)
        assert [w.inputs for w in flat] == sorted((w.inputs for w in cut), reverse=True)
        for batch in found:
            assert len(batch) == 1 or max(w.inputs for w in batch) * len(batch) <= limit
        for batch, following in itertools.pairwise(found):
            assert batch[0].inputs * (len(batch) + 1) > limit, following


def test_windows_of_a_long_document_are_made_one_at_a_time() -> None:
    """Fails if the windows of a document, as many as its tokens, are in memory at once."""
    found = itertools.islice(windows_of(3, 10**12, 100, 1), 2)
    assert [*found] == [Window(3, 0, 1, 101), Window(3, 1, 101, 102)]


def test_tensors_of_a_batch() -> None:
    """Fails if a target is not the token after its input, or padding is scored."""
    documents = [np.arange(10, 16, dtype=np.uint16), np.array([7, 8], np.int32)]
    inputs, targets = window_tensors(documents, [Window(0, 1, 4, 6), Window(1, 0, 1, 2)])
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == [[11, 12, 13, 14], [7, 7, 7, 7]]
    assert targets.tolist() == [[-100, -100, 14, 15], [8, -100, -100, -100]]


@pytest.mark.parametrize(
    ("context", "stride", "message"),
    [
        (0, None, "context must be from 1 to"),
        (4, 0, "stride must be from 1 to"),
        (4, 5, r"stride 5 with context 4: .* a context of at least 5"),
        (None, 5, r"stride 5 with context None: .* at least 5"),
        (2.5, None, "context must be an integer"),
    ],
)
def test_bad_windows(context: int | None, stride: int | None, message: str) -> None:
    """Fails if windows that leave out tokens are made."""
    with pytest.raises(ValueError, match=message):
        windows([3], context, stride)
    with pytest.raises(ValueError, match="batch_tokens must be from 1"):
        list(batches([], 0))
