"""token_bits and token_stats as PyTorch operators: schemas, autograd, vmap.

Their arguments are flat: the fields of a Problem, which nothing checks here, and a list of flags.

N rows, D width, V vocabulary, E models.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastmem.likelihood import backends
from fastmem.likelihood.problem import Problem, Saved, Tensors

_PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias,"
    " float? softcap, float temperature, int ignore_index"
)
# A result that is not asked for is an empty tensor. Schemas stay as they are: torch.compile keeps
# calls of these operators on disk, under keys that do not know the schemas.
SCHEMAS = (
    # Bits, the state for the backward pass, and the float32 gradients of the sum of all bits in
    # hidden, weight and bias where `ahead` is set.
    f"token_bits({_PROBLEM}, bool[] ahead) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # Gradients of sum(upstream * bits) in the dtypes of hidden, weight and bias, from the results
    # of token_bits after the bits.
    "token_bits_backward(Tensor upstream, Tensor state, Tensor dhidden, Tensor dweight,"
    f" Tensor dbias, {_PROBLEM}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    # Bits, then entropy, variance, is_greedy and log-sum-exp where `wanted` is set.
    f"token_stats({_PROBLEM}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # The same, then the state for the backward pass.
    f"token_walk({_PROBLEM}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
LIBRARY = torch.library.Library("fastmem", "DEF")  # type: ignore[no-untyped-call]
for _schema in SCHEMAS:
    LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
BITS = torch.ops.fastmem.token_bits.default
BACKWARD = torch.ops.fastmem.token_bits_backward.default
STATS = torch.ops.fastmem.token_stats.default
WALK = torch.ops.fastmem.token_walk.default


PLAIN = {Tensor, torch.nn.Parameter}


def token_bits(problem: Problem) -> Tensors:
    """Calls BITS, differentiable by autograd and by torch.func."""
    device = problem.hidden.device.type
    ahead = [False] * 3
    if torch.is_grad_enabled():
        ahead = [x is not None and x.requires_grad for x in problem.differentiable]
    if device in DIRECT and _is_plain(*problem[:4]):
        return DIRECT[device](problem, ahead)
    if device == "cuda":  # which makes gradients in the backward pass
        ahead = [False] * 3
    outputs: Tensors = _callable(BITS, _bits, _TransformedBits)(*problem, ahead)
    return outputs


def _is_plain(*tensors: Tensor | None) -> bool:
    """True outside of transforms, modes, tracers and compilers, for tensors without a subclass."""
    if torch.compiler.is_compiling():  # which cannot trace what follows
        return False
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or not all([x is None or type(x) in PLAIN for x in tensors])
    )


def _callable(op: Any, kernel: Any, function: Any) -> Any:
    """Under functorch the autograd.Function, under torch.compile the operator, else the kernel.

    Calling the kernel registered for autograd directly saves microseconds of the dispatcher.
    """
    if torch._C._are_functorch_transforms_active():
        return function.apply
    return op if torch.compiler.is_compiling() else kernel


def _is_last(upstream: Tensor) -> bool:
    """True if this backward pass, on a CPU, frees its graph, outside transforms and tracers."""
    plain = type(upstream) is Tensor and upstream.device.type == "cpu"
    seen = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0
    return plain and not seen and not torch._C._autograd._get_current_graph_task_keep_graph()


# Each pass has an autograd.Function of its own for torch.func, whose setup_context costs time
# elsewhere. All take the operator's flat arguments: autograd finds no tensors inside a tuple.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
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
        state, dhidden, dweight, dbias, *tensors = ctx.saved_tensors
        ahead, problem = (dhidden, dweight, dbias), Problem(*tensors, *ctx.settings)
        grads = None
        if _is_last(upstream):
            grads = backends.scaled_ahead(upstream, ahead, problem, needs, in_place=True)
        if grads is None:
            backward = _callable(BACKWARD, _gradients_of_bits, _TransformedGradients)
            grads = backward(upstream, state, *ahead, *problem, needs)
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


class _BitsOfCPU(_Bits):
    """_Bits without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        outputs = backends.cpu_bits(Problem(*inputs[:-1]), inputs[-1])
        _save(ctx, inputs, outputs)
        return outputs


class _BitsOfGPU(_Bits):
    """_Bits without the dispatcher: bits are the only output."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        problem, made = Problem(*inputs), None
        if ctx.needs_input_grad[0]:
            bits, state, made = backends.cuda_bits_ahead(problem)
        else:
            bits, state = backends.cuda_bits_and_state(problem)
        ctx.save_for_backward(state, made, *inputs[:4])
        ctx.settings = inputs[4:]
        return bits

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        needs = ctx.needs_input_grad
        needs = [needs[0], needs[1], needs[3]]
        state, made, *tensors = ctx.saved_tensors
        problem = Problem(*tensors, *ctx.settings)
        grads: Sequence[Tensor | None]
        if _is_plain(upstream) and not torch.is_grad_enabled():
            last = not torch._C._autograd._get_current_graph_task_keep_graph()
            grads = backends.cuda_gradients(upstream, state, problem, needs, made, last)
        else:
            empty = state.new_empty(0)
            ahead = [empty if made is None else made, empty, empty]
            backward = _callable(BACKWARD, _gradients_of_bits, _TransformedGradients)
            grads = backward(upstream, state, *ahead, *problem, needs)
        hidden, weight, bias = (g if need else None for g, need in zip(grads, needs, strict=True))
        return hidden, weight, None, bias, None, None, None


def of_cpu(problem: Problem, ahead: list[bool]) -> Tensors:
    if any(ahead):
        return _BitsOfCPU.apply(*problem, ahead)  # type: ignore[no-any-return,no-untyped-call]
    return backends.cpu_bits(problem, ahead)


def of_gpu(problem: Problem, ahead: list[bool]) -> Tensors:
    if any(ahead):
        return (_BitsOfGPU.apply(*problem),)  # type: ignore[no-untyped-call]
    return backends.cuda_bits_and_state(problem)


DIRECT = {"cpu": of_cpu, "cuda": of_gpu}
"""Calls without the dispatcher, which costs microseconds, where nobody else sees the call."""


class _Gradients(torch.autograd.Function):
    """BACKWARD where create_graph=True may ask for its own gradient."""

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
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
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


# torch.vmap: the mapped axis becomes an axis of models, or more rows if all entries share a weight.

Dims = Sequence[Any]
Mapped = tuple[Tensors, Dims]


class _Entries:
    """All entries of a mapped axis as one problem, whose tensors have this axis in front."""

    def __init__(self, size: int, dims: Dims, problem: Problem, models: bool = False) -> None:
        self.size = size
        self.models = models or problem.weight.ndim - (dims[1] is not None) == 3
        self.models |= dims[1] is not None or dims[3] is not None
        self.problem = Problem._make([*map(self.front, problem[:4], dims), *problem[4:]])

    def front(self, x: Tensor | None, dim: int | None) -> Any:
        if x is None:
            return None
        return x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)

    def merged(self) -> Problem:
        hidden, weight, targets, bias = self.problem[:4]
        if not self.models:
            hidden, targets = hidden.flatten(0, 1), targets.flatten(0, 1)
            weight, bias = weight[0], None if bias is None else bias[0]
        elif hidden.ndim == 4:  # an entry is several models
            if targets.ndim == 2:
                targets = targets.unsqueeze(1)
            if bias is not None:
                bias = bias.expand(weight.shape[:-1]).flatten(0, 1)
            targets = targets.expand(hidden.shape[:-1]).flatten(0, 1)
            hidden, weight = hidden.flatten(0, 1), weight.flatten(0, 1)
        return Problem(hidden, weight, targets, bias, *self.problem[4:])

    def split(self, outputs: Sequence[Tensor], like: Sequence[Tensor | None]) -> Mapped:
        """Outputs with the entries' axis in front, and its dim: None for an empty output."""
        parts = [
            (x, None) if x.numel() == 0 or y is None else (x.reshape(y.shape), 0)
            for x, y in zip(outputs, like, strict=True)
        ]
        tensors, dims = zip(*parts, strict=True)
        return tensors, dims


def _vmap_bits(info: Any, dims: Dims, problem: Problem, ahead: list[bool]) -> Mapped:
    entries = _Entries(info.batch_size, dims, problem)
    if not entries.models:  # made ahead, the gradient of a shared weight would sum over all entries
        ahead = [False] * 3
    bits, state, *grads = BITS(*entries.merged(), ahead)
    if entries.models:
        state = state.unflatten(1, (entries.size, -1))
    else:
        state = state.unflatten(2, (entries.size, -1)).movedim(2, 1)
    tensors, where = entries.split(grads, entries.problem.differentiable)
    bits = bits.reshape(entries.problem.hidden.shape[:-1])
    return (bits, state, *tensors), (0, 1, *where)


def _vmap_backward(
    info: Any, dims: Dims, upstream: Tensor, saved: Saved, problem: Problem, needs: list[bool]
) -> Mapped:
    upstream_dim, state_dim, *rest = dims
    ahead_dims, dims_of_problem = rest[:3], rest[3:]
    entries = _Entries(info.batch_size, dims_of_problem, problem, models=needs[1] or needs[2])
    merged = entries.merged()
    upstream = entries.front(upstream, upstream_dim).reshape(merged.hidden.shape[:-1])
    state = entries.front(saved.state, state_dim)
    state = state.movedim(0, 1).flatten(1, 2) if entries.models else state.movedim(0, 2).flatten(2)
    ahead = [
        entries.front(grad, dim).reshape(x.shape)
        if entries.models and grad.numel() > 0 and x is not None
        else grad.new_empty(0)
        for grad, dim, x in zip(saved.ahead, ahead_dims, merged.differentiable, strict=True)
    ]
    grads = BACKWARD(upstream, state, *ahead, *merged, needs)
    return entries.split(grads, entries.problem.differentiable)


def _vmap_stats(info: Any, dims: Dims, problem: Problem, wanted: list[bool]) -> Mapped:
    entries = _Entries(info.batch_size, dims, problem)
    outputs = STATS(*entries.merged(), wanted)
    return entries.split(outputs, [entries.problem.hidden[..., 0]] * len(outputs))


def _flat(function: Any) -> Any:
    """function(problem, flags), called with the dispatcher's flat arguments."""

    def call(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        temperature: float,
        ignore_index: int,
        flags: list[bool],
    ) -> Any:
        problem = Problem(hidden, weight, targets, bias, softcap, temperature, ignore_index)
        return function(problem, flags)

    return call


def _flat_backward(function: Any) -> Any:
    """function(upstream, saved, problem, needs), as `_flat`."""

    def call(
        upstream: Tensor,
        state: Tensor,
        dhidden: Tensor,
        dweight: Tensor,
        dbias: Tensor,
        *problem_and_needs: Any,
    ) -> Any:
        saved = Saved(state, dhidden, dweight, dbias)
        return _flat(partial(function, upstream, saved))(*problem_and_needs)

    return call


def _register(op: Any, flat: Any, outputs: Any, vmap: Any, cpu: Any, cuda: Any) -> None:
    name = op._schema.name
    LIBRARY.impl(name, flat(cpu), "CPU")  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, flat(cuda), "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(name, flat(outputs), lib=LIBRARY)
    if vmap is None:
        return

    def mapped(info: Any, dims: Dims, *arguments: Any) -> Any:
        return flat(partial(vmap, info, dims))(*arguments)

    torch.library.register_vmap(name, mapped, lib=LIBRARY)


_register(BITS, _flat, backends.bits_outputs, _vmap_bits, backends.cpu_bits, backends.cuda_bits)
_register(
    BACKWARD,
    _flat_backward,
    backends.backward_outputs,
    _vmap_backward,
    backends.cpu_backward,
    backends.cuda_backward,
)
_register(
    STATS, _flat, backends.stats_outputs, _vmap_stats, backends.cpu_stats, backends.cuda_stats
)
_register(WALK, _flat, backends.walk_outputs, None, backends.cpu_walk, backends.cuda_walk)
for _op, _kernel in ((BITS, _bits), (BACKWARD, _gradients_of_bits)):
    LIBRARY.impl(_op._schema.name, _kernel, "Autograd")  # type: ignore[no-untyped-call]
