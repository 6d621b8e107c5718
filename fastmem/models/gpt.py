"""GPT-2 of any size.

B batch, T time, D width, V vocabulary, S sequence length, L layers.
"""

import functools
import json
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmem.base.arguments import checked_device, plain_numbers, user_path
from fastmem.base.ranks import do_first
from fastmem.base.storage import write_whole
from fastmem.likelihood.api import token_bits
from fastmem.models import hf

Recompute = Literal["none", "attention", "block"]


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
            self.initialize(int(seed))

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draws all weights: the same on every device, and on any number of ranks."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                residual = name.endswith(("out_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02
                drawn = torch.empty(parameter.shape, device="cpu")
                fill(parameter, drawn.normal_(0, std, generator=generator))

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

        All ranks of a sharded model must call this: they write files of at most 1 GiB together,
        each of whole weights. A rank holds one of them twice, and one more weight.

        Raises:
            ValueError: the files cannot hold the model, such as a mask of pruning or another eps.
        """
        folder = user_path(folder)
        if sharded := hasattr(self, "reshard"):  # by fully_shard
            # What the last forward pass has gathered.
            self.reshard()  # type: ignore[operator]
        elif changed := difference(self, hooks=False):
            raise ValueError(
                f"a folder of transformers does not hold {changed}: make pruning permanent, and "
                "remove wrappers and changes before"
            )
        hf.write_tensors(folder, self.state_dict())
        text = json.dumps(hf.config_of(self.config, self.head.dtype), indent=1)

        def write_config() -> None:
            write_whole(folder / "config.json", text.encode())

        if sharded:
            do_first(write_config)  # all ranks may read the folder from here on
        else:
            write_config()

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
        config, tied, tensors = hf.read_model(folder, GPTConfig)
        with hf.agreeing(folder):
            model = cls(config, device="meta")
            model.load_state_dict(hf.state_of(model, tensors, tied), assign=True)
        return model.to(device)


def fill(parameter: Any, values: Tensor) -> None:
    """Copies values into a parameter, or their part into the part of a DTensor on this rank."""
    own = parameter.to_local() if hasattr(parameter, "placements") else parameter
    own.copy_(own_part(values, parameter))


def own_part(values: Tensor, like: Any) -> Tensor:
    """The part of whole values that this rank has of a DTensor; all of them for a plain tensor."""
    if not hasattr(like, "placements"):
        return values
    from torch.distributed.tensor import distribute_tensor

    mesh, placements, device = like.device_mesh, like.placements, like.to_local().device
    values = values.to(mesh.device_type)
    return distribute_tensor(values, mesh, placements, src_data_rank=None).to_local().to(device)


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

    recompute: Recompute = "none"
    """What the backward pass computes again (`fastmem.models.sharded.Sharding`)."""

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
        if self.recompute == "block" and torch.is_grad_enabled():
            return checkpoint(self._widened_attention, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self._widened_attention(x)

    def _widened_attention(self, x: Tensor) -> Tensor:
        if self.recompute == "attention" and torch.is_grad_enabled():
            x = x + checkpoint(self._attention, x, use_reentrant=False)
        else:
            x = x + self._attention(x)
        wide = F.gelu(self.up_proj(self.gelu_norm(x)), approximate="tanh")
        return x + self.down_proj(wide)  # type: ignore[no-any-return]

    def _attention(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(B, T, D))  # type: ignore[no-any-return]

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
