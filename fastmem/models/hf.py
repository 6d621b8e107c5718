"""Folders that transformers writes and reads: GPT-2 as config.json and safetensors."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastmem.base.ranks import current
from fastmem.base.storage import write_whole

Shape = TypeVar("Shape")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def config_of(shape: object, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a GPT of this shape."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(shape, ours) for ours, theirs in _SHAPE.items()},
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
        "dtype": str(dtype).removeprefix("torch."),
        **_FIXED,
    }


_SHAPE = {
    "layers": "n_layer", "width": "n_embd", "heads": "n_head", "vocab": "vocab_size",
    "length": "n_positions",
}  # fmt: skip
_FIXED = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""Settings of transformers' GPT-2 that this model fixes."""
_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")
"""Names of transformers for one function."""
_DEFAULTS = {
    "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024,
    "tie_word_embeddings": True,
}  # fmt: skip
_ALIASES = {
    "num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}  # fmt: skip


_NAMES = {
    "token_embedding": "wte", "position_embedding": "wpe", "blocks": "h", "norm": "ln_f",
    "attention_norm": "ln_1", "qkv": "attn.c_attn", "out_proj": "attn.c_proj",
    "gelu_norm": "ln_2", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj",
}  # fmt: skip
"""Our names of modules, and the names of transformers."""


def write_tensors(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Writes weights by our names as safetensors, all in one file; weights that are DTensors as a
    file of each rank and an index, by all ranks together."""
    names = {name: f"transformer.{name_of(name)}" for name in state}
    first = next(iter(state.values()))
    if not hasattr(first, "placements") or current().size == 1:
        tensors = {names[n]: layout(n, _whole(tensor).cpu()) for n, tensor in state.items()}
        write_whole(folder / WHOLE, save(tensors, {"format": "pt"}))
        return
    job = current()
    files = [f"model-{rank + 1:05d}-of-{job.size:05d}.safetensors" for rank in range(job.size)]
    sizes, places, own = [0] * job.size, {}, {}
    for name, tensor in state.items():
        rank = sizes.index(min(sizes))
        sizes[rank] += tensor.numel()
        places[names[name]] = files[rank]
        whole = _whole(tensor)  # by all ranks, of which one keeps it
        if rank == job.rank:
            own[names[name]] = layout(name, whole.cpu())
    write_whole(folder / files[job.rank], save(own, {"format": "pt"}))
    total = {"total_size": sum(tensor.nbytes for tensor in state.values())}

    def index() -> None:
        for path in {folder / WHOLE, *folder.glob("model-*-of-*.safetensors")}:
            if path.name not in files:  # of another number of ranks
                path.unlink(missing_ok=True)
        text = json.dumps({"metadata": total, "weight_map": places}, indent=1)
        write_whole(folder / INDEX, text.encode())

    job.all(True)  # every file is there
    job.do_first(index)


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "placements") else tensor
    return whole


def read_config(folder: Path, shape: Callable[..., Shape]) -> tuple[Shape, bool]:
    """`shape` of the numbers in config.json, and whether the head is the token embedding."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a directory: give the folder that holds config.json; a model of the "
            f"hub is downloaded with: hf download {folder} --local-dir FOLDER"
        )
    try:
        found = json.loads((folder / "config.json").read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"config.json holds {found!r:.50}, not settings by name")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} holds no GPT-2 model: {error}") from None
    if found.get("model_type") != "gpt2":
        raise ValueError(f"{folder} is a model of type {found.get('model_type')!r}, not 'gpt2'")
    for alias, name in _ALIASES.items():
        if found.get(alias, found.get(name)) != found.get(name, found.get(alias)):
            raise ValueError(f"{folder}: {name} is {found[name]!r}, and {alias} {found[alias]!r}")
        if alias in found:
            found[name] = found.pop(alias)
    hf = _DEFAULTS | found
    try:
        config = shape(**{ours: hf[theirs] for ours, theirs in _SHAPE.items()})
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    same = {"activation_function": _TANH_GELUS, "n_inner": (None, 4 * hf["n_embd"])}
    for name, wanted in _FIXED.items():
        if hf.get(name, wanted) not in same.get(name, (wanted,)):
            raise ValueError(f"{folder}: {name} is {hf[name]!r}, GPT needs {wanted!r}")
    return config, bool(hf["tie_word_embeddings"])


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, without the prefix of GPT2LMHeadModel."""
    whole, index = folder / WHOLE, folder / INDEX
    other = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if not whole.exists() and not index.exists() and other:
        raise ValueError(
            f"{folder} holds {other[0]}, which can run code, and no model.safetensors: convert it "
            f"with transformers: GPT2LMHeadModel.from_pretrained({str(folder)!r})"
            f".save_pretrained('FOLDER')"
        )
    tensors: dict[str, Tensor] = {}
    path = whole
    try:
        names = {whole.name}
        if not whole.exists() and index.exists():
            path = index
            names = set(json.loads(index.read_bytes())["weight_map"].values())
            if wrong := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{wrong[0]!r} is not the name of a file in the folder")
        for name in sorted(names):
            path = folder / name
            tensors |= load_file(path, device="cpu")
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}): download or save it again") from None
    return tensors


def state_of(model: nn.Module, tensors: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """The weights of a model by our names; ValueError for those missing, and those left over."""
    state = {}
    for name, wanted in model.state_dict().items():
        theirs = name_of(name)
        prefixed = f"transformer.{theirs}"
        tensor = tensors.pop(prefixed if prefixed in tensors else theirs, None)
        if tensor is None:
            raise ValueError(f"the files lack {theirs}")
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{theirs} is {tensor.dtype}: save the model in float32")
        state[name] = layout(name, tensor)
        if state[name].shape != wanted.shape:
            expected = list(layout(name, wanted).shape)
            raise ValueError(f"{theirs} has the shape {list(tensor.shape)}, not {expected}")
    embedding, head = state["token_embedding.weight"], tensors.pop("lm_head.weight", None)
    if head is None and not tied:
        raise ValueError("tie_word_embeddings is false, and the files lack lm_head.weight")
    if head is not None and not (head.shape == embedding.shape and (head == embedding).all()):
        raise ValueError(
            "lm_head.weight is not wte.weight, and GPT uses one matrix for both: train a model "
            "with tied embeddings"
        )
    # Old files also hold the causal mask of each layer.
    left = [n for n in tensors if not n.endswith((".attn.bias", ".attn.masked_bias"))]
    if left:
        raise ValueError(
            f"the model does not use {len(left)} weights of the files, such as {left[0]}: merge "
            "adapters into the model, or mend config.json"
        )
    return state


def name_of(name: str) -> str:
    """The name of a weight in transformers."""
    return ".".join(_NAMES.get(part, part) for part in name.split("."))


def layout(name: str, tensor: Tensor) -> Tensor:
    """transformers stores the matrices of the blocks transposed."""
    return (tensor.mT if "blocks" in name and tensor.ndim == 2 else tensor).contiguous()
