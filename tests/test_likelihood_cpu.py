"""token_bits on the CPU: the C++ core on each instruction set against float64 on the same inputs,
and its registration with PyTorch. tests/likelihood_unit.cpp judges the core under sanitizers.

Each test says what would make it fail. Results start as NaN, so that a slot which was skipped
shows. N rows, D width, V vocabulary.
"""

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastmem.kernels import reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastmem
from fastmem import _core, likelihood

ISAS = [isa for isa in ("portable", "avx2", "avx512") if _core.has_isa(isa)]
BIT = 1e-4
"""What a token's bits may be off, beside the rounding of float32 results."""

# (N, D, V): where the path changes. Tiles are 14 x 32 (AVX-512), 6 x 16 (AVX2), 6 x 8; a slice of
# the width is 32, 16, 8, computed in halves; 64 products are summed in a register.
SHAPES = [
    (1, 1, 1),  # the least
    (14, 64, 32),  # one tile of AVX-512, one depth
    (13, 63, 31),  # one less on each axis
    (15, 65, 33),  # one more
    (6, 16, 16),  # one tile of AVX2
    (7, 17, 9),  # one more, and than of portable
    (113, 48, 130),  # a group of 112 rows and one; the last slice is a half
    (29, 300, 500),  # blocks of the vocabulary
    (3, 2100, 90),  # so wide that a block is two panels
    (300, 30, 600),  # N < V: two threads share the vocabulary
    (600, 30, 300),  # N ≥ V: two threads share the rows
    (9, 5, 4099),  # V > SHORT: gradients in the backward pass
]


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The public function on one instruction set, whose results start as NaN."""
    name: str = request.param
    forward, backward = _core.token_bits, _core.token_bits_backward

    def run(core: Callable[..., None]) -> Callable[..., None]:
        def poisoned(*results: Any, **problem: Any) -> None:
            for result in results:
                if result is not None and result.dtype in (np.float32, np.float64):
                    result[...] = np.nan
            core(*results, **problem, isa=name)

        return poisoned

    monkeypatch.setattr(_core, "token_bits", run(forward))
    monkeypatch.setattr(_core, "token_bits_backward", run(backward))
    return name


Case = tuple[Tensor, Tensor, Tensor, Tensor | None]


def random_case(n: int, d: int, v: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=draw).to(dtype)
    weight = (3 / d**0.5 * torch.randn(v, d, generator=draw)).to(dtype)
    targets = torch.randint(v, (n,), generator=draw)
    return hidden, weight, targets, torch.randn(v, generator=draw)


def gradients(
    f: Callable[..., Tensor],
    case: Case,
    upstream: Tensor | None = None,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    **settings: Any,
) -> tuple[Tensor, list[Tensor | None]]:
    """Bits, and the gradients that are wanted of sum(upstream * bits), or of the mean."""
    hidden, weight, targets, bias = case
    leaves = [
        None if x is None else x.detach().clone().requires_grad_(want)
        for x, want in zip((hidden, weight, bias), wanted, strict=True)
    ]
    bits = f(leaves[0], leaves[1], targets, leaves[2], **settings)
    loss = bits.mean() if upstream is None else (bits * upstream.to(bits.dtype)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return bits.detach(), [None if x is None else x.grad for x in leaves]


def doubled(case: Case) -> Case:
    hidden, weight, targets, bias = case
    return hidden.double(), weight.double(), targets, None if bias is None else bias.double()


def eager(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """What a user would write, in the dtype of the inputs."""
    logits = F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits / temperature, targets, reduction="none") / math.log(2)


def assert_bits(bits: Tensor, right: Tensor) -> None:
    assert bits.dtype == torch.float32
    assert torch.equal(bits.isnan(), right.isnan())
    good = ~right.isnan()
    assert (bits[good] >= 0).all()
    error = (bits[good].double() - right[good]).abs() - right[good].abs() * 2**-23
    if len(error) > 0:
        assert error.max() <= BIT


def assert_gradients(
    ours: list[Tensor | None], theirs: list[Tensor | None], right: list[Tensor | None]
) -> None:
    """As close to float64 as twice PyTorch's own error; the floor is for sums of a few terms, in
    which one of the two is exact by luck."""
    for mine, other, truth in zip(ours, theirs, right, strict=True):
        if truth is None:
            assert mine is None
            continue
        assert mine is not None
        assert other is not None
        assert mine.dtype == other.dtype
        assert mine.shape == truth.shape
        floor = truth.norm() * 2e-7
        assert (mine.double() - truth).norm() <= 2 * (other.double() - truth).norm() + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_right_on_every_path(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Fails if a mask, a tail or a combination is off: bits, and gradients for a mean (made ahead
    where V is short) and for an upstream gradient of each token's own."""
    case = random_case(*shape, dtype)
    upstream = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    for up in (None, upstream):
        bits, ours = gradients(fastmem.token_bits, case, up)
        right_bits, right = gradients(reference.token_bits, doubled(case), up)
        assert_bits(bits, right_bits)
        assert_gradients(ours, gradients(eager, case, up)[1], right)


@pytest.mark.parametrize(
    "settings",
    [{"softcap": 2.0}, {"softcap": 1e4}, {"temperature": 0.3}, {"softcap": 5.0, "temperature": 3}],
    ids=str,
)
@pytest.mark.parametrize("biased", [False, True])
def test_settings(isa: str, settings: dict[str, Any], biased: bool) -> None:
    """Fails if the softcap, its slope where it bends and where it hardly does, the temperature or
    the bias is left out of a pass, or squashes the logits of tokens that do not exist."""
    hidden, weight, targets, bias = random_case(50, 40, 70)
    case = (hidden, weight, targets, bias if biased else None)
    for up in (None, torch.randn(50, generator=torch.Generator().manual_seed(1))):
        bits, ours = gradients(fastmem.token_bits, case, up, **settings)
        right_bits, right = gradients(reference.token_bits, doubled(case), up, **settings)
        assert_bits(bits, right_bits)
        assert_gradients(ours, gradients(eager, case, up, **settings)[1], right)


def hard_cases() -> dict[str, Case]:
    hidden, weight, targets, bias = random_case(40, 24, 300)
    assert bias is not None
    ones = torch.cat([torch.ones(40, 1), hidden[:, 1:]], 1)
    steps = torch.arange(300).float()
    forbidden = torch.where(steps % 3 == 0, 0.0, -torch.inf)
    shifted = torch.cat([torch.full((300, 1), 1e4), weight[:, 1:]], 1)
    return {
        # p of the target nearly 1, then nearly 0.
        "peaked": (30 * weight[targets], weight, targets, None),
        "missed": (-30 * weight[targets], weight, targets, None),
        "offset by the bias": (hidden, weight, targets, bias + 1e4),
        "offset by a column": (ones, shifted, targets, None),
        "offset by a column down": (
            ones,
            torch.cat([-shifted[:, :1], weight[:, 1:]], 1),
            targets,
            bias,
        ),
        "offset by a hidden state": (1e4 * ones, 1e-4 * shifted / 1e4, targets, None),
        # Each tile is further up than the headroom of the running maximum, or down.
        "rising": (hidden, weight, targets, 2.0 * steps),
        "falling": (hidden, weight, targets, -2.0 * steps),
        "far apart": (hidden, weight, targets, 60.0 * (steps % 7)),
        "one token": (hidden, weight[:1], targets * 0, None),
        "all alike": (hidden, weight[:1].expand(300, -1), targets, None),
        "zeros": (hidden * 0, weight, targets, None),
        "forbidden": (hidden, weight, targets // 3 * 3, forbidden),
        "first tiles forbidden": (hidden, weight, targets % 100 + 200, -1e38 * (steps < 200)),
    }


@pytest.mark.parametrize("name", hard_cases())
def test_hard_inputs(isa: str, name: str) -> None:
    """Fails if a rescale is dropped or repeated, if log-sum-exp and the target's logit round apart,
    or if an offset that all logits share costs precision."""
    case = hard_cases()[name]
    for up in (None, torch.randn(40, generator=torch.Generator().manual_seed(1))):
        bits, ours = gradients(fastmem.token_bits, case, up)
        right_bits, right = gradients(reference.token_bits, doubled(case), up)
        assert_bits(bits, right_bits)
        assert_gradients(ours, gradients(reference.token_bits, case, up)[1], right)


def test_an_offset_of_the_bias_changes_nothing(isa: str) -> None:
    """Fails if a bias that all tokens share reaches the logits: not one bit may differ."""
    hidden, weight, targets, _ = random_case(40, 24, 300)
    steps = torch.arange(300) / 256  # exact beside 1e4
    plain = gradients(fastmem.token_bits, (hidden, weight, targets, steps))
    offset = gradients(fastmem.token_bits, (hidden, weight, targets, steps + 10000))
    assert torch.equal(plain[0], offset[0])
    for a, b in zip(plain[1], offset[1], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
@pytest.mark.parametrize("vocab", [50, 4200])
def test_each_gradient_alone(wanted: tuple[bool, bool, bool], vocab: int) -> None:
    """Fails if a gradient needs another to be asked for too."""
    case = random_case(20, 12, vocab)
    for up in (None, torch.linspace(-1, 1, 20)):
        _, together = gradients(fastmem.token_bits, case, up)
        _, ours = gradients(fastmem.token_bits, case, up, wanted)
        for mine, other, want in zip(ours, together, wanted, strict=True):
            assert (mine is not None) == want
            assert mine is None or (other is not None and torch.equal(mine, other))


@pytest.mark.parametrize("vocab", [60, 4200])
def test_rows_without_bits(isa: str, vocab: int) -> None:
    """Fails if a bad row touches another, if an ignored one has any effect, whatever its hidden
    state, or if a target outside is read."""
    hidden, weight, targets, bias = random_case(40, 20, vocab)
    hidden[3], hidden[17, 4], hidden[18, 5], hidden[30] = math.nan, math.inf, -math.inf, math.nan
    targets[30] = -100
    targets[5], targets[6], targets[7], targets[8] = vocab, -1, 2**40 + 3, -(2**63)
    bad = torch.tensor([3, 17, 18, 5, 6, 7, 8])
    ignored = torch.tensor([30])
    good = torch.ones(40, dtype=torch.bool)
    good[bad] = good[ignored] = False
    for up in (torch.ones(40), torch.linspace(-1, 1, 40)):
        bits, (dhidden, dweight, dbias) = gradients(
            fastmem.token_bits, (hidden, weight, targets, bias), up
        )
        alone = (hidden[good], weight, targets[good], bias)
        right_bits, right = gradients(reference.token_bits, doubled(alone), up[good])
        assert_bits(bits[good], right_bits)
        assert bits[bad].isnan().all()
        assert (bits[ignored] == 0).all()
        assert dhidden is not None
        assert dhidden[bad].isnan().all()
        assert (dhidden[ignored] == 0).all()
        leaf = hidden.clone().requires_grad_()
        used = fastmem.token_bits(leaf, weight, targets, bias)[good]
        (used * up[good]).sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        assert (leaf.grad[bad] == 0).all()
        assert_gradients([leaf.grad[good]], [dhidden[good]], right[:1])
        ours = [dhidden[good], dweight, dbias]
        assert_gradients(ours, gradients(eager, alone, up[good])[1], right)


def test_any_ignore_index(isa: str) -> None:
    """Fails if a token that exists cannot be ignored, or has a gradient then."""
    case = random_case(40, 20, 5)
    assert (case[2] == 3).any()
    for up in (None, torch.linspace(-1, 1, 40)):
        bits, ours = gradients(fastmem.token_bits, case, up, ignore_index=3)
        right_bits, right = gradients(reference.token_bits, doubled(case), up, ignore_index=3)
        assert_bits(bits, right_bits)
        theirs = gradients(reference.token_bits, case, up, ignore_index=3)[1]
        assert_gradients(ours, theirs, right)


@pytest.mark.parametrize("shape", [(600, 30, 300), (300, 30, 600), (70, 200, 4200)], ids=str)
def test_same_bytes_twice(isa: str, shape: tuple[int, int, int]) -> None:
    """Fails if threads combine in the order in which they end; each count of threads is right."""
    case = random_case(*shape)
    right_bits, right = gradients(reference.token_bits, doubled(case))
    theirs = gradients(eager, case)[1]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs = [gradients(fastmem.token_bits, case) for _ in range(3)]
        assert_bits(runs[0][0], right_bits)
        assert_gradients(runs[0][1], theirs, right)
        for bits, grads in runs[1:]:
            assert torch.equal(bits, runs[0][0])
            for a, b in zip(grads, runs[0][1], strict=True):
                assert a is not None
                assert b is not None
                assert torch.equal(a, b)


def test_bits_do_not_depend_on_whether_gradients_are_made() -> None:
    """Fails if the pass that makes gradients ahead computes other bits."""
    hidden, weight, targets, bias = random_case(600, 30, 300)
    plain = fastmem.token_bits(hidden, weight, targets, bias)
    ahead = fastmem.token_bits(hidden, weight.requires_grad_(), targets, bias)
    assert torch.equal(plain, ahead.detach())


def test_empty_and_strided() -> None:
    """Fails if no rows, no models, a transposed weight or a step between rows is not taken."""
    hidden, weight, targets, bias = random_case(20, 12, 30)
    assert fastmem.token_bits(hidden[:0], weight, targets[:0]).shape == (0,)
    empty = gradients(fastmem.token_bits, (hidden[:0], weight, targets[:0], bias), torch.ones(0))
    assert all(grad is not None and (grad == 0).all() for grad in empty[1])
    assert fastmem.token_bits(hidden[None][:0], weight[None][:0], targets).shape == (0, 20)
    bits = fastmem.token_bits(hidden, weight, targets, bias)
    apart = torch.stack([hidden, hidden], 1).flatten(0, 1)[::2]
    across = weight.T.contiguous().T
    assert not apart.is_contiguous()
    assert not across.is_contiguous()
    assert torch.equal(fastmem.token_bits(apart, across, targets.int(), bias), bits)
    offset = torch.empty(20 * 12 + 1)[1:].view(20, 12).copy_(hidden)  # four bytes past a line
    assert torch.equal(fastmem.token_bits(offset, weight, targets, bias), bits)


def test_models_side_by_side() -> None:
    """Fails if a model reads another's hidden states, weight or bias."""
    cases = [random_case(20, 12, 30, seed=seed) for seed in range(3)]
    hidden, weight, bias = (torch.stack([c[i] for c in cases]) for i in (0, 1, 3))  # type: ignore[misc]
    targets = cases[0][2]
    weight.requires_grad_()
    bits = fastmem.token_bits(hidden, weight, targets, bias)
    bits.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    for e, (h, w, _, b) in enumerate(cases):
        one_bits, (_, dweight, _) = gradients(
            fastmem.token_bits, (h, w, targets, b), torch.ones(20)
        )
        assert torch.equal(bits[e].detach(), one_bits)
        assert dweight is not None
        assert torch.equal(weight.grad[e], dweight)


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


def core_call(**changes: Any) -> None:
    hidden, weight, targets, bias = (None if x is None else x.numpy() for x in random_case(4, 3, 5))
    results = {name: changes.pop(name, None) for name in ("dhidden", "dweight", "dbias")}
    bits = changes.pop("bits", np.empty(4, np.float32))
    lse = changes.pop("lse", np.empty(4))
    problem: dict[str, Any] = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "bias": bias,
        "softcap": 0.0,
        "temperature": 1.0,
        "ignore_index": -100,
        "threads": 1,
    }
    _core.token_bits(bits, lse, *results.values(), **(problem | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": np.zeros((4, 3))}, "hidden must be float32"),
        ({"hidden": np.zeros((4, 3), np.uint16)}, "weight must be uint16"),
        ({"hidden": np.zeros((3, 4), np.float32).T}, "hidden must be C-contiguous"),
        ({"hidden": np.zeros((4, 0), np.float32)}, "the width, must be from 1"),
        ({"weight": np.zeros((5, 2), np.float32)}, "weight must have the shape"),
        ({"weight": np.zeros((0, 3), np.float32)}, "the vocabulary, must be from 1"),
        ({"targets": np.zeros(3, np.int64)}, "targets must have the shape"),
        ({"targets": np.zeros(4, np.int32)}, "targets must be int64"),
        ({"bias": np.zeros(4, np.float32)}, "bias must have the shape"),
        ({"bits": np.zeros(5, np.float32)}, "bits must have the shape"),
        ({"lse": np.zeros(4, np.float32)}, "lse must be float64"),
        ({"dweight": np.zeros((4, 3), np.float32)}, "dweight must have the shape"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"softcap": math.nan}, "softcap must be at least 0"),
        ({"threads": 0}, "threads must be from 1"),
        ({"isa": "mmx"}, "isa must be best"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_core_refuses(changes: dict[str, Any], message: str) -> None:
    """Fails if an array that is off reaches the loops."""
    core_call()
    with pytest.raises(ValueError, match=message):
        core_call(**changes)


def test_the_core_refuses_shared_memory() -> None:
    """Fails if a result may be an input, or another result."""
    shared = np.zeros((4, 3), np.float32)
    with pytest.raises(ValueError, match="dhidden must not share memory"):
        core_call(hidden=shared, dhidden=shared)
    both = np.zeros((5, 3), np.float32)
    with pytest.raises(ValueError, match="dweight must not share memory"):
        core_call(dhidden=both[:4], dweight=both)


def test_short_is_where_gradients_move() -> None:
    """Fails if the shapes above no longer lie on both sides of the rule that they test."""
    assert 600 <= likelihood.SHORT < 4099
