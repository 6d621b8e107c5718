"""token_bits and token_stats as PyTorch's operators: schemas, autograd, vmap.

hidden is (N, D) with weight (V, D), or (E, N, D) with (E, V, D). targets are integers, (N,) or
(E, N); bias is (V,) or (E, V). Nothing is checked here.

N rows, D width, V vocabulary, E models.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastmem.likelihood import backends as kernels

_PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias,"
    " float? softcap, float temperature, int ignore_index"
)
SCHEMAS = (
    # Bits, what the backward pass needs of the forward's walk, and the gradients of the sum of all
    # bits, float32, of hidden, weight and bias as far as they are made ahead. What is not asked for
    # is an empty tensor, here and below.
    f"token_bits({_PROBLEM}, bool[] ahead) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # Gradients of sum(upstream * bits) of hidden, weight and bias, in their dtypes, from what
    # token_bits made but for the bits.
    "token_bits_backward(Tensor upstream, Tensor state, Tensor dhidden, Tensor dweight,"
    f" Tensor dbias, {_PROBLEM}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    # Bits, then entropy, second moment, is_greedy and log-sum-exp as far as they are wanted.
    f"token_stats({_PROBLEM}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
LIBRARY = torch.library.Library("fastmem", "DEF")  # type: ignore[no-untyped-call]
for _schema in SCHEMAS:
    LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
BITS = torch.ops.fastmem.token_bits.default
BACKWARD = torch.ops.fastmem.token_bits_backward.default
STATS = torch.ops.fastmem.token_stats.default


# Autograd, once. torch.func wants the two halves of a forward pass apart, which costs time.


def token_bits(*inputs: Any) -> tuple[Tensor, ...]:
    """BITS, differentiable by torch.func too."""
    outputs: tuple[Tensor, ...] = _way(BITS, _bits, _TransformedBits)(*inputs)
    return outputs


def _way(op: Any, kernel: Any, function: Any) -> Any:
    """What to call for op. kernel is where the dispatcher would come to, microseconds later."""
    if torch._C._are_functorch_transforms_active():
        return function.apply
    return op if torch.compiler.is_compiling() else kernel


def _is_last(upstream: Tensor) -> bool:
    """Whether this backward pass, on a CPU, frees its graph, and nothing is there that must see an
    operator: a transform, a tracer."""
    plain = type(upstream) is Tensor and upstream.device.type == "cpu"
    seen = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0
    return plain and not seen and not torch._C._autograd._get_current_graph_task_keep_graph()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, *ctx.settings, _ = inputs
    ctx.save_for_backward(*output[1:], hidden, weight, targets, bias)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _refuse() -> NoReturn:
    raise RuntimeError(
        "token_bits is differentiable once, and in reverse mode: for more pass float64, or use "
        "fastmem.kernels.reference.token_bits"
    )


class _Bits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = BITS(*inputs)
        _save(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> Any:
        if upstream is None:
            return (None,) * 8
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        inputs = (upstream, *ctx.saved_tensors, *ctx.settings, needs)
        grads = kernels.scaled_ahead(*inputs, in_place=True) if _is_last(upstream) else None
        if grads is None:
            grads = _way(BACKWARD, _gradients_of_bits, _TransformedGradients)(*inputs)
        dhidden, dweight, dbias = (
            grad if need else None for grad, need in zip(grads, needs, strict=True)
        )
        return dhidden, dweight, None, dbias, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        _refuse()


class _TransformedBits(_Bits):
    generate_vmap_rule = True
    setup_context = staticmethod(_save)

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return BITS(*inputs)


class _Gradients(torch.autograd.Function):
    """BACKWARD where its own gradient may be asked for: create_graph=True."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return BACKWARD(*inputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        _refuse()


class _TransformedGradients(_Gradients):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return BACKWARD(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass


def _with_autograd(op: Any, function: Any) -> Any:
    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return call


_bits = _with_autograd(BITS, _Bits)
_gradients_of_bits = _with_autograd(BACKWARD, _Gradients)


# torch.vmap: the mapped axis is one of models, or of more rows where all share one weight.

Dims = tuple[Any, ...]


class _Mapped:
    """The problem of all entries of a mapped axis at once."""

    def __init__(self, size: int, dims: Dims, inputs: Sequence[Any], models: bool = False) -> None:
        self.size = size
        self.models = models or inputs[1].ndim - (dims[1] is not None) == 3
        self.models |= dims[1] is not None or dims[3] is not None
        # An axis for the entries in front of each.
        self.hidden, self.weight, self.targets, self.bias = (
            self.front(x, dim) for x, dim in zip(inputs[:4], dims[:4], strict=True)
        )

    def front(self, x: Tensor | None, dim: int | None) -> Any:
        if x is None:
            return None
        return x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)

    def merged(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        hidden, weight, targets, bias = self.hidden, self.weight, self.targets, self.bias
        if not self.models:
            bias = None if bias is None else bias[0]
            return hidden.flatten(0, 1), weight[0], targets.flatten(0, 1), bias
        if hidden.ndim == 4:  # the entries have models of their own
            if targets.ndim == 2:
                targets = targets.unsqueeze(1)
            if bias is not None:
                bias = bias.expand(weight.shape[:-1]).flatten(0, 1)
            targets = targets.expand(hidden.shape[:-1]).flatten(0, 1)
            hidden, weight = hidden.flatten(0, 1), weight.flatten(0, 1)
        return hidden, weight, targets, bias

    def split(
        self, outputs: Sequence[Tensor], like: Sequence[Tensor | None]
    ) -> tuple[tuple[Tensor, ...], Dims]:
        """Outputs with the entries' axis in front, and where it is: those not wanted have none."""
        parts = [
            (x, None) if x.numel() == 0 or y is None else (x.reshape(y.shape), 0)
            for x, y in zip(outputs, like, strict=True)
        ]
        tensors, dims = zip(*parts, strict=True)
        return tensors, dims


def _vmap_bits(info: Any, dims: Dims, *inputs: Any) -> tuple[tuple[Tensor, ...], Dims]:
    mapped = _Mapped(info.batch_size, dims, inputs)
    # Made ahead, the gradient of one weight for all would be the sum of what each entry asks for.
    ahead = inputs[-1] if mapped.models else [False] * 3
    bits, state, *grads = BITS(*mapped.merged(), *inputs[4:-1], ahead)
    if mapped.models:
        state = state.unflatten(1, (mapped.size, -1))
    else:
        state = state.unflatten(2, (mapped.size, -1)).movedim(2, 1)
    tensors, where = mapped.split(grads, (mapped.hidden, mapped.weight, mapped.bias))
    bits = bits.reshape(mapped.hidden.shape[:-1])
    return (bits, state, *tensors), (0, 1, *where)


def _vmap_backward(info: Any, dims: Dims, *inputs: Any) -> tuple[tuple[Tensor, ...], Dims]:
    upstream, state, *ahead = inputs[:5]
    needs: list[bool] = inputs[-1]
    mapped = _Mapped(info.batch_size, dims[5:], inputs[5:], models=needs[1] or needs[2])
    problem = mapped.merged()
    hidden, weight, _, bias = problem
    upstream = mapped.front(upstream, dims[0]).reshape(hidden.shape[:-1])
    state = mapped.front(state, dims[1])
    state = state.movedim(0, 1).flatten(1, 2) if mapped.models else state.movedim(0, 2).flatten(2)
    ahead = [
        mapped.front(grad, dim).reshape(x.shape)
        if mapped.models and grad.numel() > 0 and x is not None
        else grad.new_empty(0)
        for grad, dim, x in zip(ahead, dims[2:5], (hidden, weight, bias), strict=True)
    ]
    grads = BACKWARD(upstream, state, *ahead, *problem, *inputs[9:])
    return mapped.split(grads, (mapped.hidden, mapped.weight, mapped.bias))


def _vmap_stats(info: Any, dims: Dims, *inputs: Any) -> tuple[tuple[Tensor, ...], Dims]:
    mapped = _Mapped(info.batch_size, dims, inputs)
    outputs = STATS(*mapped.merged(), *inputs[4:])
    return mapped.split(outputs, [mapped.hidden[..., 0]] * len(outputs))


def _register(op: Any, outputs: Any, vmap: Any, **implementations: Any) -> None:
    name = op._schema.name
    for key, kernel in implementations.items():
        LIBRARY.impl(name, kernel, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(name, outputs, lib=LIBRARY)
    torch.library.register_vmap(name, vmap, lib=LIBRARY)


_register(
    BITS,
    kernels.bits_outputs,
    _vmap_bits,
    CPU=kernels.cpu_bits,
    CUDA=kernels.cuda_bits,
    Autograd=_bits,
)
_register(
    BACKWARD,
    kernels.backward_outputs,
    _vmap_backward,
    CPU=kernels.cpu_backward,
    CUDA=kernels.cuda_backward,
    Autograd=_gradients_of_bits,
)
_register(STATS, kernels.stats_outputs, _vmap_stats, CPU=kernels.cpu_stats, CUDA=kernels.cuda_stats)
