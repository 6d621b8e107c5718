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

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastmem.base.arguments import checked_device
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
        device: device of the weights; "meta" allocates none.

    Raises:
        ValueError: a seed out of range, or an unavailable device.

    Example:
        >>> model = GPT(GPTConfig(layers=1, width=8, heads=2, vocab=16, length=4))
        >>> model(torch.tensor([[3, 1, 2]])).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self, config: GPTConfig, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__()
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, not {seed!r}")
        self.config = config
        device = checked_device(device, meta=True)
        with torch.device("meta"):
            self.token_embedding = nn.Embedding(config.vocab, config.width)
            self.position_embedding = nn.Embedding(config.length, config.width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = nn.LayerNorm(config.width)
        if device.type != "meta":
            self.to_empty(device=device)
            self._initialize(torch.Generator().manual_seed(seed))

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
                parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))

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

    def token_bits(self, tokens: Tensor) -> Tensor:  # (B, S) → (B, S - 1) float32
        """Code length of each token after the first, given the tokens before, in bits."""
        return token_bits(self(tokens[:, :-1]), self.head, tokens[:, 1:])

    def to_hf(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, which transformers loads as GPT-2.

        Raises:
            ValueError: the files cannot hold the model, such as a mask of pruning or another eps.
        """
        folder = Path(folder)
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
    def from_hf(cls, folder: str | Path, device: str | torch.device = "cpu") -> "GPT":
        """The model in a folder written by to_hf or by transformers' GPT2LMHeadModel.

        Raises:
            ValueError: a file is missing, or the model is not plain GPT-2.
        """
        folder = Path(folder)
        try:
            hf = json.loads((folder / "config.json").read_bytes())
            tensors = load_file(folder / "model.safetensors")
        except Exception as error:
            raise ValueError(
                f"{folder} holds no GPT-2 model (config.json and model.safetensors): {error}"
            ) from None
        if hf.get("model_type") != "gpt2":
            raise ValueError(f"{folder} is a model of type {hf.get('model_type')!r}, not 'gpt2'")
        for name, wanted in _HF_FIXED.items():
            if hf.get(name, wanted) != wanted:
                raise ValueError(f"{folder}: {name} is {hf[name]!r}, GPT needs {wanted!r}")
        shape = {ours: hf[theirs] for ours, theirs in _HF_SHAPE.items()}
        model = cls(GPTConfig(**shape), device="meta")
        state = {}
        for name in model.state_dict():
            theirs = _hf_name(name)
            tensor = tensors.get(f"transformer.{theirs}", tensors.get(theirs))
            if tensor is None:
                raise ValueError(f"{folder}/model.safetensors lacks {theirs}")
            state[name] = _hf_layout(name, tensor)
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{folder}: weights and config.json disagree: {error}") from None
        return model.to(checked_device(device))


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
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
"""Settings of transformers' GPT-2 that this model fixes."""


_HF_NAMES = {
    "token_embedding": "wte", "position_embedding": "wpe", "blocks": "h", "norm": "ln_f",
    "attention_norm": "ln_1", "qkv": "attn.c_attn", "out_proj": "attn.c_proj",
    "gelu_norm": "ln_2", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj",
}  # fmt: skip
"""Our names of modules, and the names of transformers."""


def _hf_name(name: str) -> str:
    return ".".join(_HF_NAMES.get(part, part) for part in name.split("."))


def _hf_layout(name: str, tensor: Tensor) -> Tensor:
    """transformers stores the matrices of the blocks transposed."""
    return (tensor.mT if "blocks" in name and tensor.ndim == 2 else tensor).contiguous()
