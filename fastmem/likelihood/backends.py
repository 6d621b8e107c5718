"""What the operators of likelihood_ops run: the C++ core on a CPU, the Triton kernels on a GPU.

Each takes the arguments of its schema there, and its result is made by the function of the same
name with `outputs`, which is also all that torch.compile sees of it.

N rows, D width, V vocabulary, E models.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmem import _core


def bits_outputs(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weight, _, bias, *_, ahead = rest
    *models, N, _ = hidden.shape
    E = models[0] if models else 1
    if hidden.device.type == "cpu":
        state = hidden.new_empty((1, E, N), dtype=torch.float64)  # log-sum-exp
    else:
        state = hidden.new_empty((2, E, N), dtype=torch.float32)  # peak and total
    bits = hidden.new_empty((*models, N), dtype=torch.float32)
    return bits, state, *_memory_for((hidden, weight, bias), ahead, torch.float32)


def backward_outputs(*inputs: Any) -> tuple[Tensor, ...]:
    hidden, weight, _, bias, *_, needs = inputs[5:]
    return _memory_for((hidden, weight, bias), needs)


def stats_outputs(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
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


def cpu_bits(*inputs: Any) -> tuple[Tensor, ...]:
    outputs = bits_outputs(*inputs)
    bits, state, *grads = outputs
    _core.token_bits(
        _array(bits, 2), _array(state, 3)[0], *_gradients(grads), **_core_problem(*inputs)
    )
    return outputs


def cpu_backward(upstream: Tensor, state: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    scaled = scaled_ahead(upstream, state, *inputs, in_place=False)
    if scaled is not None:
        return scaled
    problem = inputs[3:]
    hidden, weight, _, bias, *_, needs = problem
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


def scaled_ahead(
    upstream: Tensor, _state: Tensor, *inputs: Any, in_place: bool
) -> tuple[Tensor, ...] | None:
    """The gradients from those of the sum of bits, if these were made ahead and that is enough.

    in_place: these are not wanted again, and become the result where their dtype is its own.
    """
    ahead, (hidden, weight, _, bias, *_, needs) = inputs[:3], inputs[3:]
    made = all(grad.numel() > 0 for grad, need in zip(ahead, needs, strict=True) if need)
    factor = _common_factor(upstream) if made else None
    if factor is None:
        return None
    return tuple(
        _scaled(grad, factor, x.dtype, in_place) if need else torch.empty(0)
        for grad, need, x in zip(ahead, needs, (hidden, weight, bias), strict=True)
    )


def _common_factor(upstream: Tensor) -> Tensor | None:  # () or (E,)
    """A model's upstream gradient if it is one number for all rows, as mean() and sum() give.

    Not if it is 0, which would turn the gradient of NaN bits into NaN, or infinite, which would do
    so to the gradient of ignored rows.
    """
    if upstream.numel() == 0:
        return None
    rows = _array(upstream, upstream.ndim)
    first = rows[..., :1]
    common = (rows == first).all() and first.all() and np.isfinite(first).all()
    return upstream.select(-1, 0) if common else None


PIECE = 1 << 18
"""Elements: torch.mul makes what it casts in memory of its own first."""


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    in_place &= grad.dtype == dtype
    result = grad if in_place else torch.empty(grad.shape, dtype=dtype)
    factor = factor.view(-1, 1)
    pieces = (torch.split(x.view(len(factor), -1), PIECE, -1) for x in (grad, result))
    for piece, out in zip(*pieces, strict=True):
        torch.mul(piece, factor, out=out)
    return result


def cpu_stats(*inputs: Any) -> tuple[Tensor, ...]:
    outputs = stats_outputs(*inputs)
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


def _device_of(tensor: Tensor) -> AbstractContextManager[None]:
    device: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return device


def cuda_bits(*inputs: Any) -> tuple[Tensor, ...]:
    from fastmem.kernels import likelihood

    hidden, weight, _, bias, *_ = inputs
    with _device_of(hidden):
        found = likelihood.forward(*inputs[:-1])
    bits = found.bits.view(hidden.shape[:-1])
    # All gradients are made in the backward pass.
    return bits, found.state, *_memory_for((hidden, weight, bias), [False] * 3)


def cuda_backward(upstream: Tensor, state: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    from fastmem.kernels import likelihood_backward

    hidden, weight, targets, bias, *settings, needs = inputs[3:]
    wants = dict(zip(("want_hidden", "want_weight", "want_bias"), needs, strict=True))
    with _device_of(hidden):
        grads = likelihood_backward.backward(
            upstream, hidden, weight, targets, state, bias, *settings, **wants
        )
    return tuple(
        hidden.new_empty(0, dtype=torch.float32) if grad is None else grad.view(x.shape)
        for x, grad in zip((hidden, weight, bias), grads, strict=True)
    )


def cuda_stats(*inputs: Any) -> tuple[Tensor, ...]:
    from fastmem.kernels import likelihood

    hidden, *_, wanted = inputs
    flags = dict(zip(("entropy", "second_moment", "greedy", "lse"), wanted, strict=True))
    with _device_of(hidden):
        found = likelihood.forward(*inputs[:-1], **flags)
    shape = hidden.shape[:-1]
    results = (found.entropy_bits, found.second_moment, found.is_greedy, found.lse_bits)
    return found.bits.view(shape), *(
        hidden.new_empty(0, dtype=dtype) if x is None else x.view(shape)
        for x, dtype in zip(results, STATISTICS, strict=True)
    )
