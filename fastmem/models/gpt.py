"""GPT-2 of any size.

B batch, T time, D width, V vocabulary, S sequence length, L layers.
"""

import functools
import json
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastmem.base.arguments import checked_device, plain_numbers, user_path
from fastmem.base.storage import write_whole
from fastmem.likelihood.api import token_bits


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    Example:
        >>> GPTConfig(layers=2, width=128, heads=4, vocab=2048, length=64).parameter_count
        667136
    """

    layers: int
    width: int
    heads: int
    vocab: int
    length: int

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer from 1 up, not {value!r}")
        if self.vocab > 2**31:
            raise ValueError(f"vocab must be at most 2**31 = {2**31}, not {self.vocab}")
        if self.width % self.heads:
            fits = [h for h in range(1, self.width + 1) if self.width % h == 0]
            near = min(fits, key=lambda h: abs(h - self.heads))
            raise ValueError(
                f"width {self.width} is not divisible by heads {self.heads}: try heads {near}"
            )

    @property
    def parameter_count(self) -> int:
        """P = V·d + S·d + L·(12d² + 13d) + 2d; the tied embedding counts once."""
        d = self.width
        return (self.vocab + self.length) * d + self.layers * (12 * d * d + 13 * d) + 2 * d


class GPT(nn.Module):
    """GPT-2: biases, learned positions, pre-LayerNorm, tanh GELU, tied embeddings, no dropout.

    Computes the hidden states of transformers' GPT2LMHeadModel with the same weights; `head` is
    the output matrix. Initialized as GPT-2: normal with standard deviation 0.02, divided by
    sqrt(2L) for the two projections of each layer that add to the residual stream.

    Args:
        config: the shape.
        seed: seed of the initialization, from 0 to 2**64 - 1.
        device: device of the weights; "meta" allocates none. None: torch's default device.

    Raises:
        ValueError: a seed out of range, or an unavailable device.

    Example:
        >>> model = GPT(GPTConfig(layers=1, width=8, heads=2, vocab=16, length=4))
        >>> model(torch.tensor([[3, 1, 2]])).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self, config: GPTConfig, seed: int = 0, device: str | torch.device | None = None
    ) -> None:
        super().__init__()
        if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
            raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, not {seed!r}")
        self.config = config
        # accelerate's init_empty_weights moves each new parameter to meta.
        if device is None and nn.LayerNorm(0, device="cpu").weight.is_meta:
            device = "meta"
        device = checked_device(device, meta=True)
        with torch.device("meta"):
            self.token_embedding = nn.Embedding(config.vocab, config.width)
            self.position_embedding = nn.Embedding(config.length, config.width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = nn.LayerNorm(config.width)
        if device.type != "meta":
            self.to_empty(device=device)
            self._initialize(torch.Generator("cpu").manual_seed(int(seed)))

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator) -> None:
        # Drawn on the CPU, so that a seed gives the same model on every device.
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                residual = name.endswith(("out_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02
                drawn = torch.empty(parameter.shape, device="cpu")
                parameter.copy_(drawn.normal_(0, std, generator=generator))

    @property
    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.head.device

    @property
    def head(self) -> Tensor:  # (V, D)
        """The output matrix, tied to the token embedding."""
        return self.token_embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) → (B, T, D)
        """Hidden states after the last LayerNorm, for T ≤ S tokens."""
        T = tokens.shape[-1]
        if self.config.length < T:
            raise ValueError(f"{T} tokens, but the model has {self.config.length} positions")
        x = self.token_embedding(tokens) + self.position_embedding.weight[:T]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]

    def token_bits(self, tokens: Tensor | ArrayLike) -> Tensor:  # (B, S) → (B, S - 1) float32
        """Code length of each token after the first, given the tokens before, in bits.

        Args:
            tokens: integers of any type, as a tensor, an array or lists.

        Raises:
            ValueError: tokens are not integers of shape (B, S).
        """
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 2:
            tokens = token_tensor(tokens).to(self.device)
        return token_bits(self(tokens[:, :-1]), self.head, tokens[:, 1:])

    def to_hf(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, which transformers loads as GPT-2.

        Raises:
            ValueError: the files cannot hold the model, such as a mask of pruning or another eps.
        """
        folder = user_path(folder)
        if changed := difference(self, hooks=False):
            raise ValueError(
                f"a folder of transformers does not hold {changed}: make pruning permanent, and "
                "remove wrappers and changes before"
            )
        tensors = {
            f"transformer.{_hf_name(name)}": _hf_layout(name, tensor.cpu())
            for name, tensor in self.state_dict().items()
        }
        write_whole(folder / "model.safetensors", save(tensors, {"format": "pt"}))
        write_whole(folder / "config.json", json.dumps(_hf_config(self), indent=1).encode())

    @classmethod
    def from_hf(cls, folder: str | Path, device: str | torch.device | None = None) -> "GPT":
        """The model in a folder written by to_hf or by transformers' GPT2LMHeadModel.

        Settings that config.json leaves out have the defaults of transformers. Shards of
        safetensors are read; pytorch_model.bin, which can run code, is not.

        Args:
            folder: a directory, not the name of a model on the hub.
            device: of the weights; None: torch's default device.

        Raises:
            ValueError: a file is missing or damaged, the model is not plain GPT-2, its head is not
                its token embedding, or the folder holds weights that the model does not have.
        """
        device = checked_device(device)
        folder = user_path(folder)
        config, tied = _hf_read(folder)
        tensors = _hf_tensors(folder)
        try:
            if len(tensors) < config.layers:
                raise ValueError(f"{config.layers} layers of {len(tensors)} tensors")
            model = cls(config, device="meta")
            model.load_state_dict(_hf_state(model, tensors, tied), assign=True)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{folder}: weights and config.json disagree: {error}") from None
        return model.to(device)


def check_model(model: object) -> None:
    """ValueError unless the model is a GPT that holds numbers."""
    if not isinstance(model, GPT):
        fix = "save a GPT-2 of transformers with save_pretrained, and load it with GPT.from_hf"
        for wrapped in ("module", "_orig_mod"):  # of DataParallel, of torch.compile
            if isinstance(getattr(model, wrapped, None), GPT):
                fix = f"give model.{wrapped}"
        raise ValueError(f"a model must be a fastmem.GPT, not {type(model).__name__}: {fix}")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the model is on meta, which holds no numbers: make it with device='cpu'")


def token_tensor(tokens: object) -> Tensor:  # (N, S) int64
    """Tokens in memory, as a tensor; ValueError unless they are integers of shape (N, S)."""
    try:
        if isinstance(tokens, Tensor):
            given = tokens
        else:
            array = np.asarray(tokens)
            given = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"tokens must be integers of shape (N, S), not a {type(tokens).__name__} ({error}): "
            "give an array, a tensor or lists of one length"
        ) from None
    integers = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if not integers or given.ndim != 2:
        raise ValueError(
            f"tokens must be integers of shape (N, S), not {given.dtype} of shape "
            f"{tuple(given.shape)}: use tokens[None] for one sequence"
        )
    return given.to(torch.int64)


class Block(nn.Module):
    """One layer: attention and a four times wider GELU, both added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D)
        self.out_proj = nn.Linear(D, D)
        self.gelu_norm = nn.LayerNorm(D)
        self.up_proj = nn.Linear(D, 4 * D)
        self.down_proj = nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) → (B, T, D)
        B, T, D = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out_proj(mixed.transpose(1, 2).reshape(B, T, D))
        wide = F.gelu(self.up_proj(self.gelu_norm(x)), approximate="tanh")
        return x + self.down_proj(wide)  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for (old, new), part in product(_RENAMED.items(), ("weight", "bias")):
            before, now = f"{prefix}{old}.{part}", f"{prefix}{new}.{part}"
            if before in state and now not in state:
                state[now] = state.pop(before)
        super()._load_from_state_dict(state, prefix, *rest)


@functools.lru_cache(64)
def as_made(config: GPTConfig) -> GPT:
    """A GPT of this shape without numbers: its names, in the order of a row of an engine."""
    return GPT(config, device="meta")


def ordered(model: GPT) -> dict[str, nn.Parameter]:
    """The parameters by name, in the order in which a GPT is made: a parameter that was registered
    again comes last in `named_parameters`."""
    found = dict(model.named_parameters(remove_duplicate=False))
    names = [name for name, _ in as_made(model.config).named_parameters()]
    if wrong := sorted(found.keys() ^ set(names)):
        raise ValueError(
            f"the parameters are not those of a GPT ({', '.join(wrong[:4])}): make pruning "
            "permanent, remove parametrizations and merge adapters before"
        )
    return {name: found[name] for name in names}


def frozen(model: GPT) -> list[str]:
    """The names of the parameters that training leaves as they are."""
    return [name for name, p in ordered(model).items() if not p.requires_grad]


def difference(model: "GPT", hooks: bool = True) -> str:
    """The first part of a model that may compute something else than in a GPT as made, or "".

    With hooks=False, hooks and subclasses of GPT are not looked at.
    """
    if hooks and type(model) is not GPT:
        return f"the class {type(model).__name__}"
    if hooks and nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "the global hooks of torch.nn"
    for (kind, name), method in _METHODS.items():
        if getattr(kind, name) is not method:
            return f"{kind.__name__}.{name}, which was replaced"
    found, made = dict(model.named_modules()), dict(as_made(model.config).named_modules())
    if found.keys() != made.keys():
        return f"the modules {sorted(found.keys() ^ made.keys())}"
    for name, plain in made.items():
        module, ours, theirs = found[name], vars(found[name]), vars(plain)
        where = name or "the model"
        if name and type(module) is not type(plain):
            return f"the class {type(module).__name__} of {where}"
        if _shapes(module) != _shapes(plain):
            return f"the parameters {list(_shapes(module))} of {where}"
        if isinstance(module, nn.ModuleList) and list(module._modules) != list(plain._modules):
            return f"the order of {where}"
        for key in ours.keys() | theirs.keys():
            ignored = key in _UNREAD or (key.endswith("_hooks") and not hooks)
            shadows = key not in theirs and hasattr(plain, key)
            if not ignored and (
                shadows or not _same(ours.get(key), theirs.get(key, ours.get(key)))
            ):
                return f"the {key.strip('_')} of {where}"
    return ""


def _shapes(module: nn.Module) -> dict[str, Any]:
    return {name: None if p is None else p.shape for name, p in module._parameters.items()}


def _same(ours: object, theirs: object) -> bool:
    return type(ours) is type(theirs) and ours == theirs


_METHODS = {
    (kind, "forward"): kind.forward for kind in (GPT, Block, nn.Embedding, nn.LayerNorm, nn.Linear)
} | {(GPT, "token_bits"): GPT.token_bits}
_UNREAD = {
    "training", "_parameters", "_modules", "_compiled_call_impl", "_is_full_backward_hook",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
}  # fmt: skip
"""Attributes of a module that do not change what it computes, or are compared in another way."""


_RENAMED = {"attend": "qkv", "project": "out_proj", "widen": "up_proj", "shrink": "down_proj"}
"""Layers whose weights version 0.1.0 saved under another name."""


def _hf_config(model: GPT) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(model.config, ours) for ours, theirs in _HF_SHAPE.items()},
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
        "dtype": str(model.head.dtype).removeprefix("torch."),
        **_HF_FIXED,
    }


_HF_SHAPE = {
    "layers": "n_layer", "width": "n_embd", "heads": "n_head", "vocab": "vocab_size",
    "length": "n_positions",
}  # fmt: skip
_HF_FIXED = {
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
_HF_DEFAULTS = {
    "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024,
    "tie_word_embeddings": True,
}  # fmt: skip
_HF_ALIASES = {
    "num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}  # fmt: skip


_HF_NAMES = {
    "token_embedding": "wte", "position_embedding": "wpe", "blocks": "h", "norm": "ln_f",
    "attention_norm": "ln_1", "qkv": "attn.c_attn", "out_proj": "attn.c_proj",
    "gelu_norm": "ln_2", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj",
}  # fmt: skip
"""Our names of modules, and the names of transformers."""


def _hf_read(folder: Path) -> tuple[GPTConfig, bool]:
    """The shape in config.json, and whether the head is the token embedding."""
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
    for alias, name in _HF_ALIASES.items():
        if found.get(alias, found.get(name)) != found.get(name, found.get(alias)):
            raise ValueError(f"{folder}: {name} is {found[name]!r}, and {alias} {found[alias]!r}")
        if alias in found:
            found[name] = found.pop(alias)
    hf = _HF_DEFAULTS | found
    try:
        config = GPTConfig(**{ours: hf[theirs] for ours, theirs in _HF_SHAPE.items()})
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    same = {"activation_function": _TANH_GELUS, "n_inner": (None, 4 * config.width)}
    for name, wanted in _HF_FIXED.items():
        if hf.get(name, wanted) not in same.get(name, (wanted,)):
            raise ValueError(f"{folder}: {name} is {hf[name]!r}, GPT needs {wanted!r}")
    return config, bool(hf["tie_word_embeddings"])


def _hf_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, without the prefix of GPT2LMHeadModel."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
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


def _hf_state(model: GPT, tensors: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """The weights of a model by our names; ValueError for those missing, and those left over."""
    state = {}
    for name, wanted in model.state_dict().items():
        theirs = _hf_name(name)
        prefixed = f"transformer.{theirs}"
        tensor = tensors.pop(prefixed if prefixed in tensors else theirs, None)
        if tensor is None:
            raise ValueError(f"the files lack {theirs}")
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{theirs} is {tensor.dtype}: save the model in float32")
        state[name] = _hf_layout(name, tensor)
        if state[name].shape != wanted.shape:
            expected = list(_hf_layout(name, wanted).shape)
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


def _hf_name(name: str) -> str:
    return ".".join(_HF_NAMES.get(part, part) for part in name.split("."))


def _hf_layout(name: str, tensor: Tensor) -> Tensor:
    """transformers stores the matrices of the blocks transposed."""
    return (tensor.mT if "blocks" in name and tensor.ndim == 2 else tensor).contiguous()
