"""The memory of a pass, known before it."""

import pytest
import torch
from cases.causal_models import config_of
from torch import nn

from fastmem import CausalLM
from fastmem.models.causal.memory import Memory, measured

transformers = pytest.importorskip("transformers")


def model_with(attention: str) -> nn.Module:
    config = config_of("Llama", vocab_size=3000, max_position_embeddings=1024)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention
    )
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("through", ["hidden", "logits"])
def test_larger_passes_need_what_was_said(attention: str, through: str) -> None:
    """Fails if the estimate leaves out what grows with sequences, with tokens, with their square
    (eager attention) or with the vocabulary (logits)."""
    model = model_with(attention)
    if through == "logits":
        model.lm_head.register_forward_hook(  # type: ignore[union-attr,operator]
            lambda m, a, out: out + torch.arange(out.shape[-1]) / 1000
        )
    lm = CausalLM(model)
    memory = Memory(lm)
    assert lm.through == through
    for sequences, length in ((1, 512), (6, 100), (3, 700)):
        found = measured(lm, sequences, length)
        assert 0.8 * found <= memory(sequences, length) <= 1.3 * found


def test_logits_are_most_of_the_memory() -> None:
    """Fails if the measurement does not see logits, 94 times the width, or counts memory that was
    given back."""
    lm = CausalLM(model_with("sdpa"))
    hidden = measured(lm, 4, 256)
    assert 4 * 256 * 32 * 4 * 4 < hidden < 4 * 256 * 32 * 4 * 20  # 4 to 20 widths a token at once
    lm.through = "logits"
    assert measured(lm, 4, 256) > 5 * hidden
    assert measured(lm, 4, 256) > 4 * 4 * 256 * 3000


def test_tokens_that_fit() -> None:
    """Fails if a batch of the tokens that fit needs more than is there, or half would fit too."""
    lm = CausalLM(model_with("sdpa"))
    memory = Memory(lm)
    for available, length in ((1 << 22, 64), (1 << 24, None), (1 << 20, 1024)):
        tokens = memory.tokens(available, length)
        long = min(tokens, length or 1024)
        assert tokens % long == 0
        assert memory(tokens // long, long) <= available < memory(2 * tokens // long, long) * 1.1
    with pytest.raises(ValueError, match=r"100 bytes are too few for one token of Llama.* needs"):
        memory.tokens(100)
    with pytest.raises(ValueError, match="available must be from 1"):
        memory.tokens(0)
