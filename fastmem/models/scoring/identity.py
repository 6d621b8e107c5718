"""Names and hashes of models and tokenizers, which tell whether a folder has their scores."""

import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from fastmem.base.arguments import user_path
from fastmem.base.ranks import active
from fastmem.base.storage import Row
from fastmem.data.documents import Documents
from fastmem.data.files.shard import fingerprint
from fastmem.models.causal.sharded import ADAPTER

_SAMPLES = 64
Identity = tuple[str | None, str | None]
"""A name, and what changes if the thing does."""


def settings_identity(
    model: str | Path | nn.Module, tokenizer: Any, data: dict[str, Documents | None], options: Row
) -> Row:
    """What all scores in a folder share, by name: the value to show, and the value to compare."""
    return {
        "model": model_identity(model),
        "tokenizer": tokenizer_identity(tokenizer),
        **{name: (one.name, one.identity) if one else (None, None) for name, one in data.items()},
        **{name: (value, value) for name, value in options.items()},
    }


def check_same_settings(identity: Row) -> None:
    """ValueError on all ranks, unless all see the same model, data and settings."""
    if job := active():
        files = ("model", "tokenizer", "data")
        command = dict.fromkeys(identity, "start every node with the same command")
        fixes = command | dict.fromkeys(files, "give every node the same files")
        job.check_same(fixes, **{name: f"{value}" for name, (_, value) in identity.items()})


def model_identity(model: str | Path | nn.Module) -> Identity:
    """The sizes and samples of the files of a path, those of its base for an adapter; samples of
    the weights of a module; the name of a model on the hub."""
    if isinstance(model, nn.Module):
        return type(model).__name__, _of_weights(model)
    path = user_path(model)
    found = _of_files(path)
    if (path / ADAPTER).is_file():
        try:
            base = json.loads((path / ADAPTER).read_bytes())["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):  # load_model raises the error
            base = None
        found += model_identity(base)[1] or "" if isinstance(base, str) else ""
    return str(model), found


def tokenizer_identity(tokenizer: Any) -> Identity:
    """The files of a tokenizer given as a path, or the vocabulary, the special tokens, the chat
    template and all rules of a tokenizer in memory."""
    if tokenizer is None:
        return None, None
    if isinstance(tokenizer, str | Path):
        return str(tokenizer), _of_files(user_path(tokenizer))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        type(tokenizer).__name__,
        sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
        getattr(tokenizer, "special_tokens_map", None),
        getattr(tokenizer, "chat_template", None),
    ]
    text = json.dumps(parts, default=str)
    return type(tokenizer).__name__, str(xxhash.xxh3_64_hexdigest(text.encode()))


def _of_files(path: Path) -> str:
    """A hash of files that are there, else the name."""
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.is_file() and one.name[0] != ".")
        return fingerprint(files)
    return fingerprint([path]) if path.is_file() else str(path)


def _of_weights(model: nn.Module) -> str:
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # extra state of a module
            digest.update(f"{name} {tensor!r}".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.numel() or tensor.is_meta:  # offloaded weights are elsewhere
            continue
        try:
            digest.update(_sample(tensor))
        except (NotImplementedError, RuntimeError):  # a quantized tensor of another library
            digest.update(_sample(tensor.dequantize()))
    return str(digest.hexdigest())


def _sample(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)][: 2 * _SAMPLES]
    return sample.cpu().float().contiguous().numpy()
