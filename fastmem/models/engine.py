"""Losses and gradients of E models of one shape at once: what training repeats.

E models, P parameters each, B batch, T tokens a sequence.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmem import _core
from fastmem.likelihood.api import token_bits
from fastmem.models.gpt import GPT, GPTConfig

Precision = Literal["fp32", "bf16-mixed", "bf16-true", "bf16-stochastic"]
"""fp32; bf16-mixed: fp32 weights and optimizer, bf16 compute; bf16-true: all bf16; bf16-stochastic:
bf16 weights and compute, updates in fp32 and rounded at random (`fastmem.training.optimizer`)."""
FUSED = not os.environ.get("FASTMEM_REFERENCE")
"""The environment variable FASTMEM_REFERENCE, set to anything but nothing before the import, leaves
all to plain PyTorch."""
STEP = os.environ.get("FASTMEM_STEP", "graph")
"""How `PlainEngine` takes steps; the environment variable of that name sets it. "eager": Python
launches one kernel after another. "graph": on a GPU, the whole step is a CUDA graph, since most
kernels of a small model take less time than their launch. "compiled": the same with the model
through torch.compile (max-autotune), which takes a minute or more for each shape, and for the first
eight of a process. bench/gpu.py times all three; no GPU has run it yet, so the default is reasoned,
not measured."""


class Engine(Protocol):
    """E models as two tensors: row e of `parameters` is model e, of `gradients` its gradient."""

    parameters: Tensor  # (E, P)
    gradients: Tensor  # (E, P)

    def compute(self, tokens: Tensor) -> Tensor:  # (E, B, T) → (E,)
        """Each model's bits per token, the mean over its batch, and its gradient, written."""

    def bits(self, tokens: Tensor) -> Tensor:  # (E, B, T) → (E, B, T - 1)
        """What each token after the first costs to code, in bits."""


def make_engine(model: GPT, parameters: Tensor, precision: Precision) -> Engine:
    """The fastest engine for models like `model` with the numbers in `parameters` (E, P)."""
    if is_fused(model, precision):
        return FusedEngine(model, parameters)
    return PlainEngine(model, parameters, precision)


def is_fused(model: GPT, precision: Precision) -> bool:
    """Whether the C++ core computes it: a GPT as it was made, in float32, on a CPU."""
    c = model.config
    within = max(c.layers, c.width) <= 1 << 16 and c.vocab < 1 << 31 and c.length <= 1 << 15
    # A quantized model has other modules, or parameters of another class.
    made = type(model) is GPT and model.parameter_count == c.parameter_count
    plain = all(
        type(p) is torch.nn.Parameter and p.dtype == torch.float32 and p.device.type == "cpu"
        for p in model.parameters()
    )
    return FUSED and within and made and plain and precision != "bf16-mixed"


class FusedEngine:
    """All E models forward and backward in one call of the C++ core, without autograd."""

    def __init__(self, model: GPT, parameters: Tensor) -> None:
        self.parameters, self.gradients = parameters, torch.zeros_like(parameters)
        self._losses = torch.zeros(len(parameters), dtype=torch.float64)
        # NumPy's views are made once: a step of a small model takes less than they would.
        self._written = self._losses.numpy(), self.gradients.numpy()
        self._read = parameters.numpy()
        self._shape = vars(model.config)

    def compute(self, tokens: Tensor) -> Tensor:  # (E, B, T) → (E,)
        _core.gpt_gradients(
            *self._written,
            parameters=self._read,
            tokens=tokens.numpy(),
            threads=torch.get_num_threads(),
            **self._shape,
        )
        return self._losses

    def bits(self, tokens: Tensor) -> Tensor:  # (E, B, T) → (E, B, T - 1)
        E, B, T = tokens.shape
        bits = torch.empty(E, B, T - 1)
        _core.gpt_bits(
            bits.numpy(),
            parameters=self._read,
            tokens=tokens.numpy(),
            threads=torch.get_num_threads(),
            **self._shape,
        )
        return bits


class PlainEngine:
    """PyTorch's autograd, on any device and in any precision; all E models in batched products."""

    def __init__(self, model: GPT, parameters: Tensor, precision: Precision = "fp32") -> None:
        self.parameters, self.gradients = parameters, torch.zeros_like(parameters)
        compute_in(precision, parameters.device)  # checked here: torch.compile cannot trace it
        self._config, self._mixed = model.config, precision == "bf16-mixed"
        self._parts = [(name, p.shape) for name, p in model.named_parameters()]
        # Not bound: an engine that held itself would keep its tensors until it is collected.
        self._trained = PlainEngine._bits
        if STEP == "compiled":
            # Without its CUDA graphs: the one of the whole step has these kernels too.
            mode = "max-autotune-no-cudagraphs"
            self._trained = torch.compile(PlainEngine._bits, mode=mode, dynamic=False)

    def compute(self, tokens: Tensor) -> Tensor:  # (E, B, T) → (E,)
        leaf = self.parameters.detach().requires_grad_()
        losses = self._trained(self, leaf, tokens).mean((1, 2))
        (gradients,) = torch.autograd.grad(losses.sum(), leaf)
        self.gradients.copy_(gradients)
        return losses.detach()

    @torch.no_grad()
    def bits(self, tokens: Tensor) -> Tensor:  # (E, B, T) → (E, B, T - 1)
        return self._bits(self.parameters, tokens)

    def _bits(self, parameters: Tensor, tokens: Tensor) -> Tensor:
        sizes = [shape.numel() for _, shape in self._parts]
        # The backward pass of one split writes all gradients side by side, once.
        pieces = zip(self._parts, torch.split(parameters, sizes, 1), strict=True)
        weights = {name: piece.view(-1, *shape) for (name, shape), piece in pieces}
        kind = parameters.device.type
        with torch.autocast(kind, torch.bfloat16) if self._mixed else nullcontext():
            hidden = _hidden(weights, self._config, tokens[..., :-1])
            targets = tokens[..., 1:]
            bits = token_bits(hidden, weights["token_embedding.weight"], targets.flatten(1))
        return bits.view(targets.shape)


def _hidden(w: dict[str, Tensor], config: GPTConfig, tokens: Tensor) -> Tensor:  # (E, B·T, D)
    """The forward pass of `GPT`, each of its weights with a leading axis of models."""
    E, B, T = tokens.shape
    D, H = config.width, config.heads

    def linear(name: str, x: Tensor) -> Tensor:
        return torch.baddbmm(w[f"{name}.bias"][:, None], x, w[f"{name}.weight"].mT)

    def norm(name: str, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)  # rounded once, as nn.LayerNorm does
        scale, shift = (w[f"{name}.{part}"][:, None].to(wide) for part in ("weight", "bias"))
        return torch.addcmul(shift, F.layer_norm(x.to(wide), (D,)), scale).to(x.dtype)

    rows = tokens + config.vocab * torch.arange(E, device=tokens.device)[:, None, None]
    x = F.embedding(rows, w["token_embedding.weight"].flatten(0, 1))
    x = (x + w["position_embedding.weight"][:, None, :T]).flatten(1, 2)
    for block in (f"blocks.{layer}" for layer in range(config.layers)):
        qkv = linear(f"{block}.qkv", norm(f"{block}.attention_norm", x))
        q, k, v = qkv.view(E * B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(f"{block}.out_proj", mixed.transpose(1, 2).reshape(E, B * T, D))
        wide = F.gelu(linear(f"{block}.up_proj", norm(f"{block}.gelu_norm", x)), approximate="tanh")
        x = x + linear(f"{block}.down_proj", wide)
    return norm("norm", x)


@torch.no_grad()
def flat(model: GPT) -> Tensor:  # (P,)
    """A copy of all its numbers, its parts in the order of `named_parameters`."""
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def stacked(models: Sequence[GPT]) -> Tensor:  # (E, P)
    """Their numbers as one tensor, of which their parameters are views from now on."""
    parameters = torch.stack([flat(model) for model in models])
    for model, row in zip(models, parameters, strict=True):
        pieces = row.split([parameter.numel() for parameter in model.parameters()])
        for parameter, piece in zip(model.parameters(), pieces, strict=True):
            parameter.data = piece.view(parameter.shape)
    return parameters


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch in one thread. Its idle threads spin for a while, on the cores that the C++ core has
    for its own: what takes microseconds is not worth waking them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compute_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The autocast of a precision; ValueError where the device has no bfloat16."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {get_args(Precision)}, not {precision!r}")
    if precision != "fp32" and not _has_bfloat16(device):
        raise ValueError(f"{device} has no bfloat16, which {precision} needs: use fp32")
    if precision == "bf16-mixed":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def _has_bfloat16(device: torch.device) -> bool:
    if device.type != "cuda":
        return device.type == "cpu"
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
