"""mimir's Model interface against what its rules give, written out token by token."""

import math
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from cases.host_models import TEXT, host_model, host_tokenizer

from fastmem.integrations.mimir import Model

TOKENIZER = host_tokenizer()


@torch.no_grad()
def log_probabilities(model: Any, tokens: list[int], longest: int) -> list[float]:
    """Of each token after the first: the block it is in begins at a multiple of half a window, and
    its context at the window that ends with the block."""
    half, found = longest // 2, []
    for place in range(1, len(tokens)):
        begin = max(place // half * half + half - longest, 0)
        logits = model(torch.tensor([tokens[begin:place]])).logits[0, -1].double()
        found.append(float(torch.log_softmax(logits, -1)[tokens[place]]))
    return found


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
@pytest.mark.parametrize("longest", [None, 9, 2])
def test_probabilities(kind: str, longest: int | None) -> None:
    """Fails if a token has another context than mimir gives it, or is left out."""
    model = host_model(kind, 300)
    ours = Model(model, TOKENIZER, max_length=longest)
    assert ours.max_length == (longest or 64)
    for length in (1, 2, 31, 33, 64, 65, 150):
        text = TOKENIZER.decode(TOKENIZER(TEXT).input_ids[:length])
        tokens = TOKENIZER(text).input_ids
        expected = log_probabilities(model, tokens, ours.max_length)
        found = ours.get_probabilities(text)
        assert found == pytest.approx(expected, abs=2e-5)
        assert len(found) == len(tokens) - 1
        assert ours.get_probabilities("", tokens=np.array([tokens])) == found
        if len(tokens) > 1:
            assert ours.get_ll(text) == pytest.approx(-np.mean(expected), abs=1e-5)


@pytest.mark.parametrize("longest", [0, 1])
def test_a_window_has_two_tokens(longest: int) -> None:
    """Fails if a window without a stride is taken, or 0 for the length of the model."""
    with pytest.raises(ValueError, match=f"max_length must be from 2 to .*, got {longest}"):
        Model(host_model("gpt2", 300), TOKENIZER, max_length=longest)


def test_many_texts() -> None:
    """Fails if the losses of texts depend on each other, on their order or on the batch."""
    ours = Model(host_model("llama", 300), TOKENIZER)
    texts = [TEXT[i : i + 7 + 37 * i] for i in range(9)]
    alone = [ours.get_ll(text) for text in texts]
    for size in (1, 6):
        assert ours.get_lls(texts, batch_size=size) == pytest.approx(alone, abs=1e-5)
    assert ours.get_lls(texts[::-1]) == pytest.approx(alone[::-1], abs=1e-5)
    assert ours.get_ll("", probs=[-1.0, -2.0]) == 1.5
    assert math.isnan(ours.get_ll("t"))
    assert ours.get_lls([]) == []


@pytest.mark.parametrize("wanted", [{"return_all_probs": True}, {"no_grads": False}])
def test_what_needs_logits_says_so(wanted: dict[str, bool]) -> None:
    """Fails if an attack that needs logits gets other numbers."""
    with pytest.raises(NotImplementedError, match=r"need logits: .* fastmem\.token_stats"):
        Model(host_model("gpt2", 300), TOKENIZER).get_probabilities("the cat", **wanted)
