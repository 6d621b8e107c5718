"""token_bits and token_stats as PyTorch operators on a CPU: registration, transforms, memory.

N rows, D width, V vocabulary, E models.
"""

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.likelihood_cases import doubled, gradients, random_case
from fastmem.kernels import reference
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastmem
from fastmem.likelihood import backends
from fastmem.likelihood.operators import BACKWARD, BITS, STATS

E = 3


def models(n: int = 9, d: int = 5, v: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (E, N, D), (E, V, D), (E, N), (E, V)."""
    parts = zip(*(random_case(n, d, v, seed=seed) for seed in range(E)), strict=True)
    hidden, weight, targets, bias = (torch.stack(part) for part in parts)  # type: ignore[arg-type]
    return hidden, weight, targets, bias


def assert_equal(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other)


def assert_close(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def mean_bits(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor) -> Tensor:
    return fastmem.token_bits(hidden, weight, targets, bias, softcap=9.0).mean()


def mean_grads(*inputs: Tensor) -> list[Tensor]:
    """Returns the gradients of mean_bits, by autograd."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    mean_bits(*leaves).backward()  # type: ignore[no-untyped-call]
    return [x.grad for x in leaves if x.grad is not None]


def test_float64_stays_with_the_reference() -> None:
    """Fails if float64 loses its precision."""
    case = doubled(random_case(10, 6, 12))
    hidden, weight, targets, bias = case
    bits = fastmem.token_bits(hidden, weight, targets, bias)
    assert bits.dtype == torch.float64
    assert torch.equal(bits, reference.token_bits(hidden, weight, targets, bias))


# With and without an axis of models, a bias and a softcap; each input type; targets for each model
# and shared; gradients in each pass.
SAMPLES = [
    ("rows", torch.float32, 40, True, None),
    ("rows", torch.bfloat16, 4200, False, 3.0),
    ("models", torch.float32, 40, False, 3.0),
    ("models", torch.bfloat16, 40, True, None),
    ("shared targets", torch.float16, 4200, True, 3.0),
]


@pytest.mark.parametrize(("kind", "dtype", "vocab", "biased", "softcap"), SAMPLES, ids=str)
def test_opcheck(
    kind: str, dtype: torch.dtype, vocab: int, biased: bool, softcap: float | None
) -> None:
    """Fails if the registration breaks a rule of PyTorch: schema, fake tensors, autograd."""
    hidden, weight, targets, bias = models(10, 6, vocab)
    if kind == "rows":
        hidden, weight, targets, bias = hidden[0], weight[0], targets[0], bias[0]
    if kind == "shared targets":
        targets = targets[0]
    floats = (hidden.to(dtype), weight.to(dtype), bias if biased else None)
    settings = (softcap, 0.7, 2)
    leaves = [None if x is None else x.clone().requires_grad_() for x in floats]
    for ahead in ([False] * 3, [True] * 3, [False, True, False]):
        problem = (leaves[0], leaves[1], targets, leaves[2], *settings, ahead)
        torch.library.opcheck(BITS, problem)
    problem = (floats[0], floats[1], targets, floats[2], *settings)
    outputs = BITS(*problem, [True] * 3)
    assert biased == (outputs[-1].numel() > 0)
    alike = torch.ones(hidden.shape[:-1])
    for upstream in (alike, torch.randn(hidden.shape[:-1])):
        torch.library.opcheck(BACKWARD, (upstream, *outputs[1:], *problem, [True, True, biased]))
    for wanted in ([True] * 4, [False, True, False, False]):
        torch.library.opcheck(STATS, (*problem, wanted))


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # of torch itself
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("vocab", [40, 4200])
def test_compiled_is_bitwise_eager(vocab: int, backend: str) -> None:
    """Fails if torch.compile breaks the graph, changes results, or fixes the number of rows
    (30, 31, 33: the second compilation is for any number)."""
    torch.compiler.reset()

    def f(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor) -> Tensor:
        return fastmem.token_bits(2 * hidden, weight, targets, bias, softcap=9.0)

    def stats(hidden: Tensor, weight: Tensor, targets: Tensor) -> fastmem.TokenStats:
        return fastmem.token_stats(2 * hidden, weight, targets, entropy=True, greedy=True)

    compiled: Callable[..., Tensor] = torch.compile(f, fullgraph=True, backend=backend)
    compiled_stats = torch.compile(stats, fullgraph=True, backend=backend, dynamic=True)
    for rows in (30, 31, 33):
        case = random_case(rows, 16, vocab)
        for up in (None, torch.linspace(-1, 1, rows)):
            bits, grads = gradients(f, case, up)
            compiled_bits, compiled_grads = gradients(compiled, case, up)
            assert torch.equal(bits, compiled_bits)
            assert_equal(grads, compiled_grads)
        with torch.no_grad():
            assert torch.equal(f(*case), compiled(*case))  # type: ignore[arg-type]
        assert_equal(stats(*case[:3]), compiled_stats(*case[:3]))


def test_autocast_no_grad_and_inference() -> None:
    """Fails if autocast keeps float32 or loses the gradient's dtype, or a mode changes bits."""
    hidden, weight, targets, bias = random_case(30, 16, 40)
    case = (hidden, weight, targets, bias)
    half = (hidden.bfloat16(), weight.bfloat16(), targets, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bits, grads = gradients(fastmem.token_bits, case)
        stats = fastmem.token_stats(*case, entropy=True)
    assert torch.equal(bits, fastmem.token_bits(*half))
    assert_equal(stats, fastmem.token_stats(*half, entropy=True))
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
    plain = fastmem.token_bits(*case)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(fastmem.token_bits(*case), plain)
            assert torch.equal(fastmem.token_stats(*case).bits, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """Fails if recomputing gives other bits or gradients."""
    case = random_case(30, 16, 40)

    def recomputed(*args: Any) -> Tensor:
        out: Tensor = checkpoint(fastmem.token_bits, *args, use_reentrant=reentrant)
        return out

    plain, again = gradients(fastmem.token_bits, case), gradients(recomputed, case)
    assert torch.equal(plain[0], again[0])
    assert_equal(plain[1], again[1])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the calls of the C++ core."""
    names: list[str] = []

    def spy(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            names.append(name)
            function(*args, **kwargs)

        return call

    for name in ("token_bits", "token_bits_backward"):
        core = backends._core
        monkeypatch.setattr(core, name, spy(name, getattr(core, name)))
    return names


def test_models_are_one_call(calls: list[str]) -> None:
    """Fails if models side by side are a loop, or read each other's tensors or upstream gradient:
    each loss has its own factor, which scales the gradients made ahead."""
    hidden, weight, targets, bias = models()
    share = torch.tensor([1.0, -2.0, 0.5])
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    bits = fastmem.token_bits(leaves[0], leaves[1], targets, leaves[2], softcap=9.0)
    (bits.mean(-1) * share).sum().backward()  # type: ignore[no-untyped-call]
    assert calls == ["token_bits"]
    for e in range(E):
        alone = mean_grads(hidden[e], weight[e], targets[e], bias[e])
        assert_close([x.grad[e] / share[e] for x in leaves if x.grad is not None], alone)


def test_what_was_made_ahead_becomes_the_result_once() -> None:
    """Fails if a pass that keeps its graph scales the gradients that the next pass needs, or the
    last pass copies them: at V = 50257 a copy takes 150 MB."""
    hidden, weight, targets, bias = (x[0] for x in models())
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.data_ptr())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = 3 * mean_bits(leaves[0], leaves[1], targets, leaves[2])
    passes = [torch.autograd.grad(loss, leaves, retain_graph=kept) for kept in (True, True, False)]
    assert_close(passes[0], [3 * x for x in mean_grads(hidden, weight, targets, bias)])
    for grads, in_place in zip(passes, (False, False, True), strict=True):
        for grad, first in zip(grads, passes[0], strict=True):
            assert torch.equal(grad, first)
            assert (grad.data_ptr() in saved) == in_place


def test_a_mode_sees_both_operators() -> None:
    """Fails if a pass avoids the dispatcher under a mode: a tracer would keep the gradients of this
    call as constants."""
    names: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    hidden, weight, targets, _ = (x[0] for x in models())
    with Names():
        fastmem.token_bits(hidden.requires_grad_(), weight, targets).mean().backward()  # type: ignore[no-untyped-call]
    ours = [name for name in names if name.startswith("fastmem")]
    assert ours == ["fastmem.token_bits.default", "fastmem.token_bits_backward.default"]


@pytest.mark.parametrize("vocab", [40, 4200])
def test_vmap_and_grad(vocab: int, calls: list[str]) -> None:
    """Fails if torch.func.grad or vmap, alone or nested, is refused, differs from autograd, or is a
    loop although each entry has its own weight."""
    hidden, weight, targets, bias = models(v=vocab)
    right = [mean_grads(*model) for model in zip(hidden, weight, targets, bias, strict=True)]
    calls.clear()
    grad = torch.func.grad(mean_bits, (0, 1, 3))
    assert_close(grad(hidden[0], weight[0], targets[0], bias[0]), right[0])
    assert len(calls) == 1
    calls.clear()
    for e, ours in enumerate(
        zip(*torch.func.vmap(grad)(hidden, weight, targets, bias), strict=True)
    ):
        assert_close(ours, right[e])
    assert len(calls) == 1
    # Autograd of vmap, entries along another axis, and shared targets.
    leaf = weight.movedim(0, 2).clone().requires_grad_()
    bits = torch.func.vmap(fastmem.token_bits, (0, 2, None))(hidden, leaf, targets[0])
    bits.mean().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    other = weight.clone().requires_grad_()
    fastmem.token_bits(hidden, other, targets[0]).mean().backward()  # type: ignore[no-untyped-call]
    assert other.grad is not None
    assert_close([leaf.grad.movedim(2, 0)], [other.grad])


def test_vmap_of_rows_that_share_a_weight(calls: list[str]) -> None:
    """Fails if a shared weight is copied for each entry, or if its gradients, one for each entry,
    are summed."""
    hidden, weight, targets, bias = models()
    one = (weight[0], bias[0])
    bits = torch.func.vmap(fastmem.token_bits, (0, None, 0, None))(hidden, one[0], targets, one[1])
    assert torch.equal(bits, fastmem.token_bits(hidden, one[0], targets, one[1]))
    grads = torch.func.grad(mean_bits, (0, 1, 3))
    mapped = torch.func.vmap(grads, (0, None, 0, None))(hidden, one[0], targets, one[1])
    for e, ours in enumerate(zip(*mapped, strict=True)):
        assert_close(ours, mean_grads(hidden[e], one[0], targets[e], one[1]))
    calls.clear()
    hidden_alone = torch.func.vmap(torch.func.grad(mean_bits), (0, None, 0, None))
    assert_close([hidden_alone(hidden, one[0], targets, one[1])], [mapped[0]])
    assert len(calls) == 2


def test_vmap_over_models_that_are_there_already() -> None:
    """Fails if the mapped axis and the axis of models are confused."""
    hidden, weight, targets, bias = models()
    scales = torch.tensor([1.0, -2.0])
    many = scales[:, None, None, None] * hidden
    flags = dict.fromkeys(("entropy", "second_moment", "greedy", "lse", "variance"), True)

    def stats(hidden: Tensor, targets: Tensor, bias: Tensor) -> fastmem.TokenStats:
        return fastmem.token_stats(hidden, weight, targets, bias, **flags)

    for t, b in ((targets, bias), (targets[0], bias[0])):
        mapped = torch.func.vmap(stats, (0, None, None))(many, t, b)
        for i, scale in enumerate(scales):
            assert_close([x[i] for x in mapped], stats(scale * hidden, t, b))
    twice = torch.func.vmap(torch.func.vmap(fastmem.token_bits, (0, 0, 0)), (0, None, None))
    assert_close(twice(many, weight, targets)[1], fastmem.token_bits(-2 * hidden, weight, targets))


def test_jacobian() -> None:
    """Fails if upstream gradients under vmap are confused."""
    hidden, weight, targets, _ = random_case(5, 4, 7)
    ours = torch.func.jacrev(lambda w: fastmem.token_bits(hidden, w, targets))(weight)
    exact = torch.func.jacrev(lambda w: reference.token_bits(hidden.double(), w, targets))(
        weight.double()
    )
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # of torch itself
def test_second_derivatives_are_refused() -> None:
    """Fails if a second derivative, or a derivative in forward mode, is computed and wrong, or if
    float64, which the error recommends, has no second derivative."""
    hidden, weight, targets, _ = random_case(5, 4, 7)

    def total(weight: Tensor) -> Tensor:
        return fastmem.token_bits(hidden.to(weight.dtype), weight, targets).sum()

    leaf = weight.clone().requires_grad_()
    (first,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    message = "differentiable once.*pass float64"
    with pytest.raises(RuntimeError, match=message):
        first.sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=message):
        torch.func.hessian(total)(weight)
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda w: torch.func.grad(total)(w).sum())(weight)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(total, (weight,), (weight,))
    assert torch.func.hessian(total)(weight.double()).abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_gets_the_kernels(dtype: torch.dtype) -> None:
    """Fails if tensors on a GPU bypass the operators, or an operator lacks a CUDA kernel. (Tensors
    without data: tests/kernels/interpreted_dispatch.py runs the kernels.)"""
    seen: list[Any] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        hidden, weight, bias = (torch.empty(s, device="cuda") for s in ((2, 3, 4), (7, 4), (7,)))
        targets = torch.empty(2, 3, dtype=torch.int64, device="cuda")
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bits = fastmem.token_bits(hidden, weight, targets, bias)
        stats = fastmem.token_stats(hidden, weight, targets, bias, second_moment=True)
        problem = (hidden.flatten(0, 1), weight, targets.flatten(), bias, None, 1.0, -100)
        outputs = BITS(*problem, [False] * 3)
        grads = BACKWARD(outputs[0], *outputs[1:], *problem, [True] * 3)
        fastmem.token_bits(hidden.double(), weight.double(), targets, bias)
    assert [func for func in seen if func.namespace == "fastmem"] == [BITS, STATS, BITS, BACKWARD]
    for x in (bits, stats.second_moment, *outputs, *grads):
        assert x is not None
        assert x.device.type == "cuda"
    assert bits.shape == (2, 3)
    assert [g.dtype for g in grads] == [dtype, dtype, torch.float32]
    # No gradient is made ahead, and the state for the backward pass has 8 bytes a row.
    assert [x.numel() for x in outputs] == [6, 2 * 6, 0, 0, 0]
    for op in (BITS, BACKWARD, STATS):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op._schema.name, "CUDA")


def test_without_kernels() -> None:
    """Fails if FASTMEM_REFERENCE does not force plain PyTorch, or changes the results."""
    program = (
        "import torch, fastmem; from fastmem.likelihood import api, operators\n"
        "operators.BITS = operators.STATS = None\n"
        "operators.token_bits = None\n"
        "hidden, weight = torch.zeros(3, 4), torch.zeros(8, 4)\n"
        "print(fastmem.token_bits(hidden, weight, torch.arange(3)).tolist())\n"
        "print(fastmem.token_stats(hidden, weight, torch.arange(3), lse=True).lse_bits.tolist())"
    )
    command = [sys.executable, "-c", program]
    for environment, code in (({"FASTMEM_REFERENCE": "1"}, 0), ({"FASTMEM_REFERENCE": ""}, 1)):
        run = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
        assert run.returncode == code, run.stderr
        assert run.stdout == ("" if code else "[3.0, 3.0, 3.0]\n[3.0, 3.0, 3.0]\n")


def test_backward_twice_and_accumulated() -> None:
    """Fails if a backward pass overwrites memory that the next pass reads."""
    hidden, weight, targets, bias = random_case(30, 16, 40)
    weight.requires_grad_()
    loss = fastmem.token_bits(hidden, weight, targets, bias).mean()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    first = weight.grad.clone()
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(weight.grad, 2 * first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaling_makes_no_copy_but_the_result(dtype: torch.dtype) -> None:
    """Fails if a gradient made ahead, which may be as large as the weight, is scaled or cast
    through a copy: only the result and less than a third of the gradient is allocated. Fails too if
    a model's gradient is scaled by another model's factor, or rounded more than once."""
    grad, factor = torch.randn(2, 600, 1000), torch.tensor([0.3, -7.0])
    size = torch.finfo(dtype).bits // 8 * grad.numel()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        scaled = backends._scaled(grad, factor, dtype, in_place=False)
    allocated = [e.cpu_memory_usage for e in profiler.events() or [] if e.name == "aten::mul"]
    assert max(allocated, default=0) <= grad.nbytes / 3
    made = [e.cpu_memory_usage for e in profiler.events() or [] if e.name == "aten::empty"]
    assert max(made) == size
    assert torch.equal(scaled, (grad * factor[:, None, None]).to(dtype))
    one = backends._scaled(grad[0], factor[0], dtype, in_place=False)
    assert torch.equal(one, scaled[0])


def test_memory_stays_below_the_logits() -> None:
    """Fails if logits, or a packed copy of the weight, raise the peak memory of the process."""
    import resource

    hidden, weight, targets, _ = random_case(512, 64, 50257)
    torch.set_num_threads(2)
    fastmem.token_bits(hidden[:20], weight, targets[:20])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fastmem.token_bits(hidden, weight, targets)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown <= 512 * 50257 * 4 / 20


def test_the_lock_is_released() -> None:
    """Fails if the core keeps the GIL from other Python threads."""
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
    during = 0
    for _ in range(200):  # a busy machine may not run the other thread during one call
        before = steps
        fastmem.token_bits(hidden, weight, targets)
        during = max(during, steps - before)
        if during > 5:
            break
    stop.set()
    other.join()
    assert during > 5
