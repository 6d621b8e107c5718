"""Losses and gradients of E models of one shape at once, for each step of training.

E models, P parameters each, B batch, T tokens a sequence.
"""

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fastmem import _core
from fastmem.base.terminal import say
from fastmem.likelihood.api import token_bits
from fastmem.models.attention import attention
from fastmem.models.block import mlp, norm, norm_linear
from fastmem.models.embedding import embedding
from fastmem.models.gpt import GPT, difference, ordered

Precision = Literal["fp32", "bf16-mixed", "bf16-true", "bf16-stochastic"]
"""fp32; bf16-mixed: fp32 weights and optimizer, bf16 compute; bf16-true: all bf16; bf16-stochastic:
bf16 weights and compute, fp32 updates with stochastic rounding (`fastmem.training.optimizer`)."""
FUSED = not os.environ.get("FASTMEM_REFERENCE")
"""False if the environment variable FASTMEM_REFERENCE is not empty at the import: plain PyTorch
computes everything then."""
STEP = os.environ.get("FASTMEM_STEP", "graph")
"""Steps of `PlainEngine`, from the environment variable FASTMEM_STEP. "eager": Python launches one
kernel after another. "graph": on a GPU the whole step is a CUDA graph, since most kernels of a
small model take less time than their launch. "compiled": a CUDA graph with the model through
torch.compile (max-autotune), which takes a minute or more for each shape and compiles at most eight
shapes in a process. On an H100 (bench/gpu.py) a 1 x 32 model trains at 5.2, 18.8 and 27.4 million
tokens a second. The blocks of a sharded model are compiled on a GPU unless it is "eager", elsewhere
if it is "compiled"."""


class Engine(Protocol):
    """E models and their gradients."""

    def compute(self, tokens: Tensor) -> Tensor:  # (E, B, T) → (E,)
        """Mean bits per token of each model over its batch; writes the gradients."""


class FlatEngine(Engine, Protocol):
    """E models as two tensors: row e of `parameters` is model e, of `gradients` its gradient."""

    parameters: Tensor  # (E, P)
    gradients: Tensor  # (E, P)

    def bits(self, tokens: Tensor) -> Tensor:  # (E, B, T) → (E, B, T - 1)
        """Code length of each token after the first, in bits."""


def make_engine(model: GPT, parameters: Tensor, precision: Precision) -> FlatEngine:
    """The fastest engine for E models of the shape of `model`, with `parameters` (E, P)."""
    if is_fused(model, precision):
        return FusedEngine(model, parameters)
    return PlainEngine(model, parameters, precision)


def is_fused(model: GPT, precision: Precision) -> bool:
    """True if the C++ core computes the model: a GPT as made, in float32 on a CPU."""
    c = model.config
    fits = max(c.layers, c.width) <= 1 << 16 and c.vocab < 1 << 31 and c.length <= 1 << 15
    plain = all(
        type(p) is torch.nn.Parameter and p.dtype == torch.float32 and p.device.type == "cpu"
        for p in model.parameters()
    )
    return FUSED and fits and plain and precision != "bf16-mixed" and not difference(model)


class FusedEngine:
    """E models forward and backward in one call of the C++ core, without autograd."""

    def __init__(self, model: GPT, parameters: Tensor) -> None:
        self.parameters, self.gradients = parameters, torch.zeros_like(parameters)
        self._losses = torch.zeros(len(parameters), dtype=torch.float64, device="cpu")
        # Views are made once: making them takes longer than a step of a small model.
        self._written = self._losses.numpy(), self.gradients.numpy()
        self._read = parameters.numpy()
        self._shape = vars(model.config)

    def compute(self, tokens: Tensor) -> Tensor:  # (E, B, T) → (E,)
        self._call(_core.gpt_gradients, tokens, *self._written)
        return self._losses

    def bits(self, tokens: Tensor) -> Tensor:  # (E, B, T) → (E, B, T - 1)
        E, B, T = tokens.shape
        bits = torch.empty(E, B, T - 1, device="cpu")
        self._call(_core.gpt_bits, tokens, bits.numpy())
        return bits

    def _call(self, function: Callable[..., None], tokens: Tensor, *out: Any) -> None:
        threads, shape = torch.get_num_threads(), self._shape
        function(*out, parameters=self._read, tokens=tokens.numpy(), threads=threads, **shape)


class PlainEngine:
    """E models by PyTorch's autograd with batched products, on any device and in any precision."""

    def __init__(self, model: GPT, parameters: Tensor, precision: Precision = "fp32") -> None:
        self.parameters, self.gradients = parameters, torch.zeros_like(parameters)
        compute_in(precision, parameters.device)  # a check that torch.compile cannot trace
        self._config, self._mixed = model.config, precision == "bf16-mixed"
        self._parts = [(name, p.shape) for name, p in ordered(model).items()]
        ends = itertools.accumulate(shape.numel() for _, shape in self._parts)
        self._ends = {name: end for (name, _), end in zip(self._parts, ends, strict=True)}
        # Not a bound method: a reference to itself would keep the tensors until a collection.
        self._trained = PlainEngine._bits
        self._into: Tensor | None = self.gradients
        if STEP == "compiled":
            say("FASTMEM_STEP=compiled: compiling the step takes a minute or more for each shape")
            # Without CUDA graphs: the graph of the whole step captures these kernels.
            mode = "max-autotune-no-cudagraphs"
            self._trained = torch.compile(PlainEngine._bits, mode=mode, dynamic=False)
            self._into = None  # a compiled graph would copy all gradients for each write

    def compute(self, tokens: Tensor) -> Tensor:  # (E, B, T) → (E,)
        # Each weight is a leaf, whose gradient is where the optimizer reads if a kernel wrote it.
        leaves = [piece.detach().requires_grad_() for piece in self._pieces(self.parameters)]
        bits = self._trained(self, leaves, tokens, self._into)
        of_mean = torch.full_like(bits, 1 / max(1, bits[0].numel()))
        found = torch.autograd.grad(bits, leaves, of_mean)
        pairs = zip(found, self._pieces(self.gradients), strict=True)
        if self._into is not None and any(g.data_ptr() != to.data_ptr() for g, to in pairs):
            # Not all are: one copy of all is faster than many. It takes no part of its output.
            self._into, found = None, tuple(g.clone() for g in found)
        if self._into is None:
            torch.cat(found, 1, out=self.gradients)
        return bits.detach().mean((1, 2))

    @torch.no_grad()
    def bits(self, tokens: Tensor) -> Tensor:  # (E, B, T) → (E, B, T - 1)
        return self._bits(self._pieces(self.parameters), tokens)

    def _pieces(self, flat: Tensor) -> tuple[Tensor, ...]:  # (E, P) → each (E, n)
        return torch.split(flat, [shape.numel() for _, shape in self._parts], 1)

    def _bits(self, pieces: Sequence[Tensor], tokens: Tensor, into: Tensor | None = None) -> Tensor:
        parts = zip(self._parts, pieces, strict=True)
        weights = {name: piece.view(-1, *shape) for (name, shape), piece in parts}
        kind = tokens.device.type
        with torch.autocast(kind, torch.bfloat16) if self._mixed else nullcontext():
            hidden, head = self._hidden(weights, tokens[..., :-1], into)
            targets = tokens[..., 1:]
            bits = token_bits(hidden, head, targets.flatten(1))
        return bits.view(targets.shape)

    def _hidden(
        self, w: dict[str, Tensor], tokens: Tensor, into: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # (E, B·T, D), (E, V, D)
        """`GPT.forward` with a leading axis of models on each weight; the output matrix."""
        # Not vmap of GPT: on a CPU it ignores autocast in linear layers and loops over attention.
        E, B, T = tokens.shape
        D, H = self._config.width, self._config.heads

        def columns(*names: str) -> Tensor | None:  # of the gradients of adjacent weights
            if into is None:
                return None
            return into[:, self._ends[names[0]] - w[names[0]][0].numel() : self._ends[names[-1]]]

        def layers(*names: str) -> tuple[list[Tensor], Tensor | None]:
            names = tuple(f"{name}.{part}" for name in names for part in ("weight", "bias"))
            return [w[name] for name in names], columns(*names)

        names = "token_embedding.weight", "position_embedding.weight"
        x, head = embedding(tokens, w[names[0]], w[names[1]], columns(*names))
        for block in (f"blocks.{layer}" for layer in range(self._config.layers)):
            x, qkv = norm_linear(x, *layers(f"{block}.attention_norm", f"{block}.qkv"))
            mixed = attention(qkv.view(E * B, T, 3, H, D // H)).reshape(E, B * T, D)
            parts = "out_proj", "gelu_norm", "up_proj", "down_proj"
            x = mlp(x, mixed, *layers(*[f"{block}.{part}" for part in parts]))
        return norm(x, *layers("norm")), head


def flat(model: GPT) -> Tensor:  # (P,)
    """A copy of all parameters as one vector, in the order of `ordered`."""
    return parameters_to_vector(ordered(model).values()).detach()


def stacked(models: Sequence[GPT]) -> Tensor:  # (E, P)
    """Moves the parameters of the models into one tensor; they become views of its rows."""
    parameters = torch.stack([flat(model) for model in models])
    for model, row in zip(models, parameters, strict=True):
        vector_to_parameters(row, ordered(model).values())
    return parameters


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits PyTorch to one thread, for work of microseconds: idle threads would spin for a while
    on the cores that the C++ core needs next."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compute_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The autocast context of a precision; ValueError if the device lacks bfloat16."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {get_args(Precision)}, not {precision!r}")
    if precision != "fp32" and not _has_bfloat16(device):
        raise ValueError(f"{device} has no bfloat16, which {precision} needs: use fp32")
    # Inside the caller's autocast, a cache would keep weights from before an update.
    mixed = precision == "bf16-mixed"
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=False)


def weights_dtype(model: GPT, precision: Precision) -> torch.dtype:
    """The dtype of weights that a precision computes with; float64 stays float64 in "fp32".

    Raises:
        ValueError: float16 weights, which bfloat16 would round, in another precision than "fp32".
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if precision == "fp32":
        return torch.float64 if dtypes == {torch.float64} else torch.float32
    if torch.float16 in dtypes:
        raise ValueError(
            f"the model has float16 weights, which {precision} would round to bfloat16: use fp32, "
            "or convert the model with model.float()"
        )
    return torch.float32 if precision == "bf16-mixed" else torch.bfloat16


def converted(model: GPT, precision: Precision) -> GPT:
    """The model, or a copy if its weights do not have the dtype of the precision."""
    dtype = weights_dtype(model, precision)
    if all(p.dtype == dtype for p in model.parameters() if p.is_floating_point()):
        return model
    try:
        return copy.deepcopy(model).to(dtype)
    except RuntimeError as error:  # such as a mask of pruning
        raise ValueError(
            f"{precision} needs weights of {dtype}, and the model cannot be copied ({error}): "
            f"convert it with model.to({dtype})"
        ) from None


def _has_bfloat16(device: torch.device) -> bool:
    if device.type != "cuda":
        return device.type == "cpu"
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
