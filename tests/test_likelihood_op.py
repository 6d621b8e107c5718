"""token_bits as an operator of PyTorch on the CPU: registration, compilation, vmap, memory.

Each test says what would make it fail. N rows, D width, V vocabulary.
"""

import threading
from typing import Any

import pytest
import torch
from fastmem.kernels import reference
from likelihood_cases import doubled, gradients, random_case
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastmem


def test_float64_stays_with_the_reference() -> None:
    """Fails if checking in float64 loses its precision."""
    case = doubled(random_case(10, 6, 12))
    hidden, weight, targets, bias = case
    bits = fastmem.token_bits(hidden, weight, targets, bias)
    assert bits.dtype == torch.float64
    assert torch.equal(bits, reference.token_bits(hidden, weight, targets, bias))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [40, 4200])
def test_opcheck(dtype: torch.dtype, softcap: float | None, vocab: int) -> None:
    """Fails if the registration breaks a rule of PyTorch: schema, fake tensors, autograd."""
    hidden, weight, targets, bias = random_case(10, 6, vocab, dtype)
    for x in (hidden, weight, bias):
        assert x is not None
        x.requires_grad_()
    for ahead in ([False] * 3, [True] * 3, [False, True, False]):
        args = (hidden, weight, targets, bias, softcap, 1.0, -100, ahead)
        torch.library.opcheck(torch.ops.fastmem.token_bits.default, args)
    with torch.no_grad():
        outputs = torch.ops.fastmem.token_bits(
            hidden, weight, targets, bias, softcap, 1.0, -100, [True] * 3
        )
    lse, ahead_of = outputs[1], list(outputs[2:])
    inputs = (hidden.detach(), weight.detach(), targets, None if bias is None else bias.detach())
    for upstream in (torch.ones(10), torch.linspace(-1, 1, 10)):
        back = (upstream, lse, ahead_of, *inputs, softcap, 1.0, -100, [True, True, True])
        torch.library.opcheck(torch.ops.fastmem.token_bits_backward.default, back)


@pytest.mark.parametrize("vocab", [40, 4200])
def test_compiled_is_bitwise_eager(vocab: int) -> None:
    """Fails if torch.compile breaks the graph, or computes in another way."""
    case = random_case(30, 16, vocab)

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor) -> Tensor:
        return fastmem.token_bits(2 * hidden, weight, targets, bias, softcap=9.0)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for up in (None, torch.linspace(-1, 1, 30)):
        bits, grads = gradients(loss, case, up)
        compiled_bits, compiled_grads = gradients(compiled, case, up)
        assert torch.equal(bits, compiled_bits)
        for a, b in zip(grads, compiled_grads, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


def test_autocast_no_grad_and_checkpointing() -> None:
    """Fails if autocast leaves float32 or loses the gradient's dtype, or recomputing differs."""
    hidden, weight, targets, bias = random_case(30, 16, 40)
    case = (hidden, weight, targets, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bits, grads = gradients(fastmem.token_bits, case)
    half = (hidden.bfloat16(), weight.bfloat16(), targets, bias)
    assert torch.equal(bits, fastmem.token_bits(*half))
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
    with torch.no_grad():
        assert torch.equal(fastmem.token_bits(*case), fastmem.token_bits(*case))

    def recomputed(*args: Any, **settings: Any) -> Tensor:
        out: Tensor = checkpoint(fastmem.token_bits, *args, use_reentrant=False, **settings)
        return out

    plain, again = gradients(fastmem.token_bits, case), gradients(recomputed, case)
    assert torch.equal(plain[0], again[0])
    for a, b in zip(plain[1], again[1], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize("vocab", [40, 4200])
def test_vmap(vocab: int) -> None:
    """Fails if torch.vmap reads one model's tensors for another. (torch.func.grad takes no custom
    operator that has an autograd rule in Python.)"""
    cases = [random_case(9, 5, vocab, seed=seed) for seed in range(3)]
    hidden, weight = (torch.stack([c[i] for c in cases]) for i in (0, 1))  # type: ignore[misc]
    targets = cases[0][2]

    weight.requires_grad_()
    bits = torch.func.vmap(fastmem.token_bits, in_dims=(0, 0, None))(hidden, weight, targets)
    bits.mean(-1).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    for e in range(3):
        right_bits, (_, right, _) = gradients(
            fastmem.token_bits, (hidden[e], weight[e], targets, None)
        )
        assert right is not None
        torch.testing.assert_close(bits[e].detach(), right_bits, rtol=0, atol=1e-6)
        torch.testing.assert_close(weight.grad[e], right, rtol=1e-5, atol=1e-7)


def test_backward_twice_and_accumulated() -> None:
    """Fails if a backward pass writes into what the next one reads."""
    hidden, weight, targets, bias = random_case(30, 16, 40)
    weight.requires_grad_()
    loss = fastmem.token_bits(hidden, weight, targets, bias).mean()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    first = weight.grad.clone()
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(weight.grad, 2 * first)


def test_memory_stays_below_the_logits() -> None:
    """Fails if logits, or a packed copy of the weight, are kept: in the peak of the process."""
    import resource

    hidden, weight, targets, _ = random_case(512, 64, 50257)
    torch.set_num_threads(2)
    fastmem.token_bits(hidden[:20], weight, targets[:20])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fastmem.token_bits(hidden, weight, targets)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown <= 512 * 50257 * 4 / 20


def test_the_lock_is_released() -> None:
    """Fails if other threads of Python wait for the core."""
    hidden, weight, targets, _ = random_case(2000, 64, 4000)
    steps, stop = 0, threading.Event()

    def count() -> None:
        nonlocal steps
        while not stop.is_set():
            steps += 1
            stop.wait(1e-4)

    other = threading.Thread(target=count)
    torch.set_num_threads(1)
    other.start()
    before = steps
    fastmem.token_bits(hidden, weight, targets)
    during = steps - before
    stop.set()
    other.join()
    assert during > 5
