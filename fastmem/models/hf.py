"""Folders that transformers writes and reads: GPT-2 as config.json and safetensors."""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastmem.base.ranks import current
from fastmem.base.storage import write_whole

Shape = TypeVar("Shape", bound="_Layered")


class _Layered(Protocol):
    @property
    def layers(self) -> int: ...


WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILE_BYTES = 1 << 30
"""Weights in one file of a sharded model, which a rank holds twice while it writes."""


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
    """Writes weights by our names as safetensors, in one file; weights that are DTensors by all
    ranks together, in files of at most FILE_BYTES and an index."""
    names = {name: f"transformer.{name_of(name)}" for name in state}
    if not any(hasattr(tensor, "placements") for tensor in state.values()):
        tensors = {names[name]: layout(name, tensor.cpu()) for name, tensor in state.items()}
        write_whole(folder / WHOLE, save(tensors, {"format": "pt"}))
        _remove_others(folder, [WHOLE])
        return
    job, parts = current(), _parts(state, current().size)
    files = [f"model-{n + 1:05d}-of-{len(parts):05d}.safetensors" for n in range(len(parts))]
    files = [WHOLE] if len(parts) == 1 else files
    for first in range(0, len(parts), job.size):  # each rank writes one of these
        own = {}
        for number, part in enumerate(parts[first : first + job.size]):
            for name in part:
                whole = state[name].full_tensor()  # type: ignore[attr-defined]  # by all ranks
                if number == job.rank:
                    own[names[name]] = layout(name, whole.cpu())
        if own:
            write_whole(folder / files[first + job.rank], save(own, {"format": "pt"}))
    total = {"total_size": sum(tensor.nbytes for tensor in state.values())}
    places = {names[n]: file for file, part in zip(files, parts, strict=True) for n in part}

    def index() -> None:
        if len(files) > 1:
            text = json.dumps({"metadata": total, "weight_map": places}, indent=1)
            write_whole(folder / INDEX, text.encode())
        _remove_others(folder, files)

    job.all(True)  # every file is there
    job.do_first(index)


def _parts(state: Mapping[str, Tensor], ranks: int) -> list[list[str]]:
    """The names of the weights of each file, in order."""
    most = min(FILE_BYTES, -(-sum(tensor.nbytes for tensor in state.values()) // ranks))
    parts: list[list[str]] = []
    size = math.inf
    for name, tensor in state.items():
        if size + tensor.nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensor.nbytes
    return parts


def _remove_others(folder: Path, files: Collection[str]) -> None:
    """Removes files of weights that stood there before, of another number of ranks."""
    whole = [folder / WHOLE, *folder.glob("model-*-of-*.safetensors")]
    for path in whole if len(files) > 1 else [*whole, folder / INDEX]:
        if path.name not in files:
            path.unlink(missing_ok=True)


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


def read_model(folder: Path, shape: Callable[..., Shape]) -> tuple[Shape, bool, dict[str, Tensor]]:
    """As `read_config`, and all tensors of the folder, which are read when they are used."""
    config, tied = read_config(folder, shape)
    tensors, layers = read_tensors(folder), config.layers
    with agreeing(folder):
        if len(tensors) < layers:
            raise ValueError(f"{layers} layers of {len(tensors)} tensors")
    return config, tied, tensors


@contextmanager
def agreeing(folder: Path) -> Iterator[None]:
    """Names the folder in errors of its weights."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: weights and config.json disagree: {error}") from None


def state_of(
    model: nn.Module,
    tensors: dict[str, Tensor],
    tied: bool,
    part: Callable[[str, Tensor], Tensor] = lambda _, whole: whole,
) -> dict[str, Tensor]:
    """The weights of a model by our names, or their `part`s, made of one weight after another;
    ValueError for those missing, and those left over."""
    state = {}
    for name, wanted in model.state_dict().items():
        theirs = name_of(name)
        prefixed = f"transformer.{theirs}"
        tensor = tensors.pop(prefixed if prefixed in tensors else theirs, None)
        if tensor is None:
            raise ValueError(f"the files lack {theirs}")
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{theirs} is {tensor.dtype}: save the model in float32")
        if tensor.shape != turned(name, wanted).shape:
            expected = list(turned(name, wanted).shape)
            raise ValueError(f"{theirs} has the shape {list(tensor.shape)}, not {expected}")
        if name == "token_embedding.weight":
            embedding = tensor
        state[name] = part(name, layout(name, tensor))
    head = tensors.pop("lm_head.weight", None)
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
    return turned(name, tensor).contiguous()


def turned(name: str, tensor: Tensor) -> Tensor:
    """A weight as transformers stores it, as a view."""
    return tensor.mT if "blocks" in name and tensor.ndim == 2 else tensor
