"""The operators' implementations: the C++ core on a CPU, the Triton kernels on a GPU.

For each operator a function `_outputs` allocates the results; torch.compile runs it alone.

N rows, D width, V vocabulary, E models.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmem import _core
from fastmem.likelihood.problem import Problem, Saved, Tensors


def bits_outputs(problem: Problem, ahead: list[bool]) -> Tensors:
    hidden = problem.hidden
    bits = hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
    return bits, _state(hidden), *_empty_gradients(problem, ahead, torch.float32)


def _state(hidden: Tensor) -> Tensor:
    *models, N, _ = hidden.shape
    E = models[0] if models else 1
    if hidden.device.type == "cpu":
        return hidden.new_empty((1, E, N), dtype=torch.float64)  # log-sum-exp
    return hidden.new_empty((2, E, N), dtype=torch.float32)  # peak and total


def backward_outputs(
    upstream: Tensor, saved: Saved, problem: Problem, needs: list[bool]
) -> Tensors:
    return _empty_gradients(problem, needs)


def stats_outputs(problem: Problem, wanted: list[bool]) -> Tensors:
    hidden = problem.hidden
    shape = hidden.shape[:-1]
    return hidden.new_empty(shape, dtype=torch.float32), *(
        hidden.new_empty(shape if want else 0, dtype=dtype)
        for want, dtype in zip(wanted, STATISTICS, strict=True)
    )


def walk_outputs(problem: Problem, wanted: list[bool]) -> Tensors:
    return *stats_outputs(problem, wanted), _state(problem.hidden)


STATISTICS = (torch.float32, torch.float32, torch.bool, torch.float32)


def _empty_gradients(
    problem: Problem, wanted: list[bool], dtype: torch.dtype | None = None
) -> Tensors:
    """Allocates a contiguous tensor shaped like each wanted input, in `dtype` or the input's."""
    device = problem.hidden.device
    return tuple(
        torch.empty(x.shape, dtype=dtype or x.dtype, device=device)
        if want and x is not None
        else torch.empty(0, dtype=torch.float32, device=device)
        for x, want in zip(problem.differentiable, wanted, strict=True)
    )


# On a CPU: the C++ core.


def cpu_bits(problem: Problem, ahead: list[bool]) -> Tensors:
    outputs = bits_outputs(problem, ahead)
    bits, state, *grads = outputs
    _core.token_bits(
        _array(bits, 2), _array(state, 3)[0], *_gradients(grads), **_core_arguments(problem)
    )
    return outputs


def cpu_backward(upstream: Tensor, saved: Saved, problem: Problem, needs: list[bool]) -> Tensors:
    scaled = scaled_ahead(upstream, saved.ahead, problem, needs, in_place=False)
    if scaled is not None:
        return scaled
    grads = _empty_gradients(problem, needs, torch.float32)
    _core.token_bits_backward(
        *_gradients(grads),
        upstream=_array(upstream, 2),
        lse=_array(saved.state, 3)[0],
        **_core_arguments(problem),
    )
    return tuple(
        grad.to(x.dtype) if need and x is not None and x.dtype != grad.dtype else grad
        for grad, need, x in zip(grads, needs, problem.differentiable, strict=True)
    )


def scaled_ahead(
    upstream: Tensor, ahead: Tensors, problem: Problem, needs: list[bool], in_place: bool
) -> Tensors | None:
    """Scales the gradients made ahead by `upstream`; None if one is missing or `upstream` varies.

    in_place: overwrite the gradients made ahead if they have the dtype of the result.
    """
    made = all(grad.numel() > 0 for grad, need in zip(ahead, needs, strict=True) if need)
    factor = _common_factor(upstream) if made else None
    if factor is None:
        return None
    return tuple(
        _scaled(grad, factor, x.dtype, in_place) if need and x is not None else torch.empty(0)
        for grad, need, x in zip(ahead, needs, problem.differentiable, strict=True)
    )


def _common_factor(upstream: Tensor) -> Tensor | None:  # () or (E,)
    """Each model's upstream gradient if it is the same for all rows, as from mean() and sum().

    None for 0, which would turn the gradient of NaN bits into NaN, and for infinity, which would
    do so to the gradient of ignored rows.
    """
    if upstream.numel() == 0:
        return None
    rows = _array(upstream, upstream.ndim)
    first = rows[..., :1]
    common = (rows == first).all() and first.all() and np.isfinite(first).all()
    return upstream.select(-1, 0) if common else None


PIECE = 1 << 18
"""Elements that torch.mul casts at a time: it allocates memory for them."""


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    in_place &= grad.dtype == dtype
    result = grad if in_place else torch.empty(grad.shape, dtype=dtype)
    factor = factor.view(-1, 1)
    pieces = (torch.split(x.view(len(factor), -1), PIECE, -1) for x in (grad, result))
    for piece, out in zip(*pieces, strict=True):
        torch.mul(piece, factor, out=out)
    return result


def cpu_stats(problem: Problem, wanted: list[bool]) -> Tensors:
    return cpu_walk(problem, wanted)[:-1]


def cpu_walk(problem: Problem, wanted: list[bool]) -> Tensors:
    outputs = walk_outputs(problem, wanted)
    bits, *statistics, state = outputs
    entropy, variance, greedy, lse = (
        _array(x, 2) if want else None for x, want in zip(statistics, wanted, strict=True)
    )
    _core.token_bits(
        _array(bits, 2),
        _array(state, 3)[0],
        *(None, None, None),
        **_core_arguments(problem),
        entropy_bits=entropy,
        variance=variance,
        is_greedy=greedy,
        lse_bits=lse,
    )
    return outputs


def _core_arguments(problem: Problem) -> dict[str, Any]:
    hidden, weight, targets, bias, softcap, temperature, ignore_index = problem
    # Each call on a tensor takes a microsecond or two, as much as the core for a short batch.
    if targets.dtype != torch.int64:
        targets = targets.to(torch.int64)
    if targets.ndim < hidden.ndim - 1:
        targets = targets.expand(hidden.shape[:-1])
    return {
        "hidden": _array(hidden, 3),
        "weight": _array(weight, 3, resizable=True),
        "targets": _array(targets, 2),
        "bias": None if bias is None else _array(bias.float(), 2, resizable=True),
        "softcap": softcap or 0.0,
        "temperature": temperature,
        "ignore_index": ignore_index,
        "threads": torch.get_num_threads(),
    }


def _array(tensor: Tensor, axes: int, resizable: bool = False) -> NDArray[Any]:
    """The tensor as an array with an axis of models, bfloat16 as its bits; copied if it must be.

    With resizable=True the storage can still be resized, as FSDP does with a gathered parameter:
    Tensor.numpy() makes that an error for ever. The other way takes some microseconds more.
    """
    dtype = tensor.dtype
    if tensor.requires_grad:
        tensor = tensor.detach()
    tensor = tensor.contiguous()
    if dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    elif dtype == torch.float16:
        tensor = tensor.float()
    resizable = resizable and "torch.distributed.fsdp" in sys.modules
    array: NDArray[Any] = np.from_dlpack(tensor) if resizable else tensor.numpy()
    return array if array.ndim == axes else array[None]


def _gradients(grads: Sequence[Tensor]) -> list[NDArray[Any] | None]:
    return [
        _array(grad, axes) if grad.numel() > 0 else None
        for grad, axes in zip(grads, (3, 3, 2), strict=True)
    ]


# On a GPU: the Triton kernels, imported by the first call. No function waits for the device.


def cuda_bits(problem: Problem, ahead: list[bool]) -> Tensors:
    # The backward pass makes all gradients.
    return *cuda_bits_and_state(problem), *_empty_gradients(problem, [False] * 3)


def cuda_bits_and_state(problem: Problem) -> tuple[Tensor, Tensor]:
    from fastmem.kernels import likelihood

    found = likelihood.forward(*problem, shape=problem.hidden.shape[:-1])
    return found.bits, found.state


def cuda_bits_ahead(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bits, state, and what dhidden is made of if the same walk makes it."""
    from fastmem.kernels import likelihood_ahead

    hidden, weight, targets, bias, softcap, temperature, ignore_index = problem
    found = None
    if softcap is None:
        found = likelihood_ahead.forward(
            hidden, weight, targets, bias, temperature, ignore_index, shape=hidden.shape[:-1]
        )
    return (*cuda_bits_and_state(problem), None) if found is None else found


def cuda_backward(upstream: Tensor, saved: Saved, problem: Problem, needs: list[bool]) -> Tensors:
    """Makes the gradients; of those made ahead a GPU knows dhidden alone."""
    made = saved.dhidden if saved.dhidden.numel() > 0 else None
    grads = cuda_gradients(upstream, saved.state, problem, needs, made)
    return tuple(
        problem.hidden.new_empty(0, dtype=torch.float32) if grad is None else grad for grad in grads
    )


def cuda_gradients(
    upstream: Tensor,
    state: Tensor,
    problem: Problem,
    needs: list[bool],
    made: Tensor | None,
    in_place: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """made: of `cuda_bits_ahead`, overwritten with dhidden if in_place."""
    from fastmem.kernels import likelihood_backward

    hidden, weight, targets, bias, softcap, temperature, ignore_index = problem
    return likelihood_backward.backward(
        upstream,
        hidden,
        weight,
        targets,
        state,
        bias,
        softcap,
        temperature,
        ignore_index,
        want_hidden=needs[0],
        want_weight=needs[1],
        want_bias=needs[2],
        made=made,
        in_place=in_place,
        as_inputs=True,
    )


def cuda_stats(problem: Problem, wanted: list[bool]) -> Tensors:
    return cuda_walk(problem, wanted)[:-1]


def cuda_walk(problem: Problem, wanted: list[bool]) -> Tensors:
    from fastmem.kernels import likelihood

    hidden = problem.hidden
    names = ("entropy", "variance", "greedy", "lse")
    flags: dict[str, Any] = dict(zip(names, wanted, strict=True))
    found = likelihood.forward(*problem, **flags, shape=hidden.shape[:-1])
    results = (found.entropy_bits, found.variance, found.is_greedy, found.lse_bits)
    outputs = (
        hidden.new_empty(0, dtype=dtype) if x is None else x
        for x, dtype in zip(results, STATISTICS, strict=True)
    )
    return found.bits, *outputs, found.state
