"""Reads a model's head, device, embeddings and maximum length."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastmem.models.causal.head import matrix
from fastmem.models.gpt import GPT


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel or DistributedDataParallel."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"a model must be a torch.nn.Module, not {type(model).__name__}: load it with "
            "fastmem.models.causal.load.load_model"
        )
    # Hooks that are set after torch.compile are not seen by what it compiled.
    inner = model._modules.get("_orig_mod")
    if inner is None and not hasattr(model, "get_output_embeddings"):
        inner = model._modules.get("module")
    return model if inner is None else unwrapped(inner)


def checked_head(model: nn.Module) -> nn.Module:
    """The head of a model; ValueError if the model is not a causal language model with numbers."""
    name = type(model).__name__
    fix = "give a causal language model, as AutoModelForCausalLM loads it"
    base = getattr(model, "get_base_model", lambda: model)()
    check_kind(name, type(base).__name__, getattr(model, "config", None))
    offloaded = getattr(model, "hf_device_map", None)
    if any(p.is_meta for p in model.parameters()) and not offloaded:
        raise ValueError(
            f"{name} is on meta, which holds no numbers: load its weights, with device='cpu'"
        )
    if isinstance(model, GPT):
        return model.token_embedding
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise ValueError(f"{name} has no head (get_output_embeddings() is {head}): {fix}")
    return head


def check_kind(name: str, kind: str, config: Any) -> None:
    """ValueError if the class `kind` is an encoder-decoder or a masked model."""
    fix = "give a causal language model, as AutoModelForCausalLM loads it"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder, which codes a target and not a text: {fix}"
        )
    if "MaskedLM" in kind:
        raise ValueError(f"{name} is a masked model, which has no code length of a text: {fix}")


def embeddings_of(model: nn.Module, head: nn.Module) -> int:
    """The number of tokens that the model can read."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        found = (module for module in model.modules() if isinstance(module, nn.Embedding))
        embedding = next(found, head)
    return int(getattr(embedding, "num_embeddings", None) or len(matrix(embedding)))


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its tokens."""
    try:
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        device = next(model.parameters()).device
    if device.type == "meta":  # offloaded: accelerate moves the tokens
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    return torch.device(device)


def positions_of(model: nn.Module) -> int | None:
    """The most tokens of one pass that the configuration names; None if it names none."""
    if isinstance(model, GPT):
        return model.config.length
    config = _text_config(model)
    for name in ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and 0 < value < 1 << 31:
            peft = getattr(model, "active_peft_config", None)
            virtual = getattr(peft, "num_virtual_tokens", None) or 0
            ahead = hasattr(config, "ngram")  # ProphetNet also reads the position that follows
            return value - virtual - _rows_before_the_first_position(model, value) - ahead
    return None


def _rows_before_the_first_position(model: nn.Module, rows: int) -> int:
    """RoBERTa's table of positions begins after the row of its padding token."""
    for name, table in model.named_modules():
        if not isinstance(table, nn.Embedding) or "position" not in name.rpartition(".")[2]:
            continue
        if table.num_embeddings == rows and table.padding_idx is not None:
            return table.padding_idx + 1
    return 0


def longrope_limit_of(model: nn.Module) -> int | None:
    """The tokens above which all tokens of a pass get other rotary frequencies; None if none do.

    Source: transformers' `longrope_frequency_update`, for Phi-3 and later models.
    """
    config = _text_config(model)
    found = getattr(config, "rope_parameters", None) or {}
    for rope in (found, *found.values()):  # one, or one for each kind of layer
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            limit = rope.get("original_max_position_embeddings")
            return limit or getattr(config, "original_max_position_embeddings", None)
    return None


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return getattr(config, "get_text_config", lambda: config)()
