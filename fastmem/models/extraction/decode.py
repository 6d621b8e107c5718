"""Greedy decoding, one token after another.

B sequences, P tokens of a prefix.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastmem.models.causal.anatomy import evaluating
from fastmem.models.causal.head import keeps_some, run
from fastmem.models.causal.lm import CausalLM
from fastmem.models.gpt import GPT


def greedy_tokens(lm: CausalLM, prefix: Tensor, count: int) -> Tensor:  # (B, P) → (B, count)
    """The `count` tokens that greedy decoding appends to each prefix: of equal logits the first.

    A model of transformers generates with its cache of keys and values; any other model reads the
    whole sequence again for each token. Nothing ends or changes the tokens: no end-of-sequence
    token, no penalty of the model's own settings.

    Example:
        >>> from fastmem import GPTConfig
        >>> lm = CausalLM(GPT(GPTConfig(1, 8, 2, vocab=16, length=4)))
        >>> greedy_tokens(lm, torch.tensor([[3, 1]]), 2).shape
        torch.Size([1, 2])
    """
    prefix = prefix.to(lm.device)
    with torch.no_grad(), evaluating(lm.model):
        can = getattr(lm.model, "can_generate", None)
        if can is not None and can():
            return _generated(lm.model, prefix, count)
        tokens = prefix
        for _ in range(count):
            best = next_logits(lm, tokens)[:, : lm.vocab].argmax(-1)
            tokens = torch.cat([tokens, best[:, None].to(tokens)], dim=1)
        return tokens[:, prefix.shape[1] :]


def next_logits(lm: CausalLM, tokens: Tensor) -> Tensor:  # (B, T) → (B, V)
    """The logits of the next token, from one pass over all tokens."""
    if isinstance(lm.model, GPT):
        states: Tensor = lm.model(tokens)[:, -1]
        return states @ lm.model.head.T
    T = tokens.shape[1]
    keep = torch.arange(T - 1, T) if keeps_some(lm.model) else None
    return run(lm.model, tokens, keep)[:, -1]


def _generated(model: nn.Module, prefix: Tensor, count: int) -> Tensor:
    from transformers import GenerationConfig

    config: Any = GenerationConfig
    settings = config(
        do_sample=False,
        num_beams=1,
        max_new_tokens=count,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,  # nothing is padded, and without it a warning comes
        use_cache=True,
    )
    mask = torch.ones_like(prefix)
    own: Any = getattr(model, "generation_config", None)
    model.generation_config = settings  # its own would fill gaps
    try:
        generate: Any = model.generate
        out: Tensor = generate(prefix, attention_mask=mask, generation_config=settings)
    finally:
        model.generation_config = own
    return out[:, prefix.shape[1] :]
