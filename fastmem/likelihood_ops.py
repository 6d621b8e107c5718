"""token_bits and token_stats as PyTorch's operators: for a CPU and a GPU, autograd, vmap, compile.

hidden is (N, D) with weight (V, D), or (E, N, D) with (E, V, D). targets are integers, (N,) or
(E, N); bias is (V,) or (E, V). Nothing is checked here. On a GPU nothing waits for the device.

N rows, D width, V vocabulary, E models.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmem import _core

LIBRARY = torch.library.Library("fastmem", "DEF")
_PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias,"
    " float? softcap, float temperature, int ignore_index"
)
# Bits, what the backward pass needs of the forward's walk, and the gradients of the sum of all
# bits, float32, of hidden, weight and bias as far as they are made ahead. What is not asked for is
# an empty tensor, here and below.
LIBRARY.define(f"token_bits({_PROBLEM}, bool[] ahead) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
# Gradients of sum(upstream * bits) of hidden, weight and bias, in their dtypes, from what
# token_bits made but for the bits.
LIBRARY.define(
    "token_bits_backward(Tensor upstream, Tensor state, Tensor dhidden, Tensor dweight,"
    f" Tensor dbias, {_PROBLEM}, bool[] needs) -> (Tensor, Tensor, Tensor)"
)
# Bits, then entropy, second moment, is_greedy and log-sum-exp as far as they are wanted.
LIBRARY.define(
    f"token_stats({_PROBLEM}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
BITS = torch.ops.fastmem.token_bits.default
BACKWARD = torch.ops.fastmem.token_bits_backward.default
STATS = torch.ops.fastmem.token_stats.default


# What comes back, as far as it is asked for: on every device, and all that torch.compile sees.


def _bits_outputs(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weight, _, bias, *_, ahead = rest
    *models, N, _ = hidden.shape
    E = models[0] if models else 1
    if hidden.device.type == "cpu":
        state = hidden.new_empty((1, E, N), dtype=torch.float64)  # log-sum-exp
    else:
        state = hidden.new_empty((2, E, N), dtype=torch.float32)  # peak and total
    bits = hidden.new_empty((*models, N), dtype=torch.float32)
    return bits, state, *_memory_for((hidden, weight, bias), ahead, torch.float32)


def _backward_outputs(*inputs: Any) -> tuple[Tensor, ...]:
    hidden, weight, _, bias, *_, needs = inputs[5:]
    return _memory_for((hidden, weight, bias), needs)


def _stats_outputs(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shape = hidden.shape[:-1]
    return hidden.new_empty(shape, dtype=torch.float32), *(
        hidden.new_empty(shape if want else 0, dtype=dtype)
        for want, dtype in zip(rest[-1], STATISTICS, strict=True)
    )


STATISTICS = (torch.float32, torch.float32, torch.bool, torch.float32)


def _memory_for(
    inputs: Sequence[Tensor | None], wanted: list[bool], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Contiguous, for something shaped as each input; of its dtype or this one."""
    device = inputs[0].device  # type: ignore[union-attr]
    return tuple(
        torch.empty(x.shape, dtype=dtype or x.dtype, device=device)
        if want and x is not None
        else torch.empty(0, dtype=torch.float32, device=device)
        for x, want in zip(inputs, wanted, strict=True)
    )


# On a CPU: the C++ core.


def _cpu_bits(*inputs: Any) -> tuple[Tensor, ...]:
    outputs = _bits_outputs(*inputs)
    bits, state, *grads = outputs
    _core.token_bits(
        _array(bits, 2), _array(state, 3)[0], *_gradients(grads), **_core_problem(*inputs)
    )
    return outputs


def _cpu_backward(upstream: Tensor, state: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    ahead, problem = inputs[:3], inputs[3:]
    hidden, weight, _, bias, *_, needs = problem
    made = all(grad.numel() > 0 for grad, need in zip(ahead, needs, strict=True) if need)
    factor = _common_factor(upstream) if made else None
    if factor is not None:
        grads = tuple(
            _scaled(grad, factor) if need else grad for grad, need in zip(ahead, needs, strict=True)
        )
    else:
        grads = _memory_for((hidden, weight, bias), needs, torch.float32)
        _core.token_bits_backward(
            *_gradients(grads),
            upstream=_array(upstream, 2),
            lse=_array(state, 3)[0],
            **_core_problem(*problem),
        )
    return tuple(
        torch.empty(0) if not need else grad if grad.dtype == x.dtype else grad.to(x.dtype)
        for grad, need, x in zip(grads, needs, (hidden, weight, bias), strict=True)
    )


def _common_factor(upstream: Tensor) -> Tensor | None:  # () or (E,)
    """A model's upstream gradient if it is one number for all rows, as mean() and sum() give.

    Not if it is 0, which would turn the gradient of NaN bits into NaN.
    """
    rows = _array(upstream, upstream.ndim)
    first = rows[..., :1]
    return upstream.select(-1, 0) if (rows == first).all() and first.all() else None


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    return grad * (factor.view(-1, *[1] * (grad.ndim - 1)) if factor.ndim > 0 else factor)


def _cpu_stats(*inputs: Any) -> tuple[Tensor, ...]:
    outputs = _stats_outputs(*inputs)
    bits, *statistics = outputs
    entropy, moment, greedy, lse = (
        _array(x, 2) if want else None for x, want in zip(statistics, inputs[-1], strict=True)
    )
    _core.token_bits(
        _array(bits, 2),
        _array(torch.empty_like(bits, dtype=torch.float64), 2),
        *(None, None, None),
        **_core_problem(*inputs),
        entropy_bits=entropy,
        second_moment=moment,
        is_greedy=greedy,
        lse_bits=lse,
    )
    return outputs


def _core_problem(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    _: list[bool],
) -> dict[str, Any]:
    """The arguments that all functions of the core share."""
    # Each call on a tensor takes a microsecond or two, as much as the core for a short batch.
    if targets.dtype != torch.int64:
        targets = targets.to(torch.int64)
    if targets.ndim < hidden.ndim - 1:
        targets = targets.expand(hidden.shape[:-1])
    return {
        "hidden": _array(hidden, 3),
        "weight": _array(weight, 3),
        "targets": _array(targets, 2),
        "bias": None if bias is None else _array(bias.float(), 2),
        "softcap": softcap or 0.0,
        "temperature": temperature,
        "ignore_index": ignore_index,
        "threads": torch.get_num_threads(),
    }


def _array(tensor: Tensor, axes: int) -> NDArray[Any]:
    """The same memory where NumPy can have it, with an axis of models; bfloat16 as its bits."""
    dtype = tensor.dtype
    if tensor.requires_grad:
        tensor = tensor.detach()
    tensor = tensor.contiguous()
    if dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    elif dtype == torch.float16:
        tensor = tensor.float()
    array: NDArray[Any] = tensor.numpy()
    return array if array.ndim == axes else array[None]


def _gradients(grads: Sequence[Tensor]) -> list[NDArray[Any] | None]:
    return [
        _array(grad, axes) if grad.numel() > 0 else None
        for grad, axes in zip(grads, (3, 3, 2), strict=True)
    ]


# On a GPU: the Triton kernels, imported when the first tensor comes. Nothing waits for the device.


def _cuda_bits(*inputs: Any) -> tuple[Tensor, ...]:
    from fastmem.kernels import likelihood

    hidden, weight, _, bias, *_ = inputs
    with torch.cuda.device_of(hidden):
        found = likelihood.forward(*inputs[:-1])
    bits = found.bits.view(hidden.shape[:-1])
    # All gradients are made in the backward pass.
    return bits, found.state, *_memory_for((hidden, weight, bias), [False] * 3)


def _cuda_backward(upstream: Tensor, state: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    from fastmem.kernels import likelihood_backward

    hidden, weight, targets, bias, *settings, needs = inputs[3:]
    wants = dict(zip(("want_hidden", "want_weight", "want_bias"), needs, strict=True))
    with torch.cuda.device_of(hidden):
        grads = likelihood_backward.backward(
            upstream, hidden, weight, targets, state, bias, *settings, **wants
        )
    return tuple(
        hidden.new_empty(0, dtype=torch.float32) if grad is None else grad.view(x.shape)
        for x, grad in zip((hidden, weight, bias), grads, strict=True)
    )


def _cuda_stats(*inputs: Any) -> tuple[Tensor, ...]:
    from fastmem.kernels import likelihood

    hidden, *_, wanted = inputs
    flags = dict(zip(("entropy", "second_moment", "greedy", "lse"), wanted, strict=True))
    with torch.cuda.device_of(hidden):
        found = likelihood.forward(*inputs[:-1], **flags)
    shape = hidden.shape[:-1]
    results = (found.entropy_bits, found.second_moment, found.is_greedy, found.lse_bits)
    return found.bits.view(shape), *(
        hidden.new_empty(0, dtype=dtype) if x is None else x.view(shape)
        for x, dtype in zip(results, STATISTICS, strict=True)
    )


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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, *ctx.settings, _ = inputs
    ctx.save_for_backward(*output[1:], hidden, weight, targets, bias)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError(
        "token_bits is differentiable once, and in reverse mode: for more pass float64, or use "
        "fastmem.kernels.reference.token_bits"
    )


class _Bits(torch.autograd.Function):
    jvp = staticmethod(_refuse)

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
        backward = _way(BACKWARD, _gradients_of_bits, _TransformedGradients)
        grads = backward(upstream, *ctx.saved_tensors, *ctx.settings, needs)
        dhidden, dweight, dbias = (
            grad if need else None for grad, need in zip(grads, needs, strict=True)
        )
        return dhidden, dweight, None, dbias, None, None, None, None


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

    def split(self, outputs: Sequence[Tensor], like: Sequence[Tensor | None]) -> Any:
        """Outputs with the entries' axis in front, and where it is: those not wanted have none."""
        parts = [
            (x, None) if x.numel() == 0 or y is None else (x.reshape(y.shape), 0)
            for x, y in zip(outputs, like, strict=True)
        ]
        return tuple(zip(*parts, strict=True))


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


def _register(op: Any, cpu: Any, cuda: Any, outputs: Any, vmap: Any) -> None:
    name = op._schema.name
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(name, outputs, lib=LIBRARY)
    torch.library.register_vmap(name, vmap, lib=LIBRARY)


_register(BITS, _cpu_bits, _cuda_bits, _bits_outputs, _vmap_bits)
_register(BACKWARD, _cpu_backward, _cuda_backward, _backward_outputs, _vmap_backward)
_register(STATS, _cpu_stats, _cuda_stats, _stats_outputs, _vmap_stats)
LIBRARY.impl("token_bits", _bits, "Autograd")
LIBRARY.impl("token_bits_backward", _gradients_of_bits, "Autograd")
