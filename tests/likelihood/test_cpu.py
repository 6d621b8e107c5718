"""token_bits on a CPU: the C++ core on each instruction set against float64 on the same inputs.
tests/csrc/likelihood_unit.cpp tests the core under sanitizers.

Results start as NaN, so that a skipped entry shows. N rows, D width, V vocabulary.
"""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases.likelihood_cases import (
    Case,
    assert_bits,
    assert_gradients,
    doubled,
    eager,
    gradients,
    random_case,
)
from fastmem.kernels import reference

import fastmem
from fastmem import _core

ISAS = [isa for isa in ("portable", "avx2", "avx512") if _core.has_isa(isa)]

# (N, D, V) at which the path changes. Tiles are 8 tokens x 3 vectors of 16 rows (AVX-512),
# 4 x 3 x 8 (AVX2), 4 x 3 x 4 (portable); fewer at the ends; a register sums 128 products.
SHAPES = [
    (1, 1, 1),  # the least
    (48, 128, 8),  # one tile of AVX-512, one depth
    (47, 127, 7),  # one less on each axis: tiles of 4, 2 and 1 tokens
    (49, 129, 9),  # one more on each axis
    (24, 16, 4),  # one tile of AVX2; one vector of AVX-512 and a half
    (13, 17, 5),  # one more than a portable tile
    (113, 48, 130),  # three panels; 128 tokens whose exp_logits stay in the cache, and two
    (29, 300, 500),  # blocks of the vocabulary; three depths
    (3, 1024, 90),  # rows of weight 4 KiB apart are copied
    (3, 2100, 90),  # so wide that blocks are a few tiles
    (300, 30, 600),  # N < V: two threads share the vocabulary
    (600, 30, 300),  # N ≥ V: two threads share the rows
    (60, 5, 4099),  # V > 4096: threads share the tokens of two panels at a time, ahead too
    (3, 8192, 100),  # the widest
    (5, 4, 2**20),  # the longest vocabulary
]


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the public function on one instruction set, with results that start as NaN."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_right_on_every_path(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Fails if a mask, a tail or a sum of parts is wrong: in bits, and in gradients of a mean (made
    ahead if V is short) and for an upstream gradient that varies by token."""
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
    """Fails if a pass lacks the softcap, its slope where tanh is steep or flat, the temperature or
    the bias, or applies the softcap to tokens that do not exist."""
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
        # Each tile is above, or below, the limit at which sums are rescaled.
        "rising": (hidden, weight, targets, 2.0 * steps),
        "falling": (hidden, weight, targets, -2.0 * steps),
        "far apart": (hidden, weight, targets, 60.0 * (steps % 7)),
        "one token": (hidden, weight[:1], targets * 0, None),
        "all alike": (hidden, weight[:1].expand(300, -1), targets, None),
        "zeros": (hidden * 0, weight, targets, None),
        "forbidden": (hidden, weight, targets // 3 * 3, forbidden),
        "first tiles forbidden": (hidden, weight, targets % 100 + 200, -1e38 * (steps < 200)),
        "masked": (hidden, weight, targets // 3 * 3, forbidden.clamp(min=-1e35)),
        # The largest bias belongs to an impossible token; all other biases are small beside it.
        "one large bias": (
            ones,
            torch.cat([torch.tensor([[-2e4, *[0.0] * 23]]), weight[1:]]),
            targets % 299 + 1,
            torch.cat([torch.tensor([1e4]), bias[1:]]),
        ),
    }


@pytest.mark.parametrize("name", hard_cases())
def test_hard_inputs(isa: str, name: str) -> None:
    """Fails if a rescale is dropped or repeated, if log-sum-exp and the target's logit round
    differently, or if an offset that all logits share costs precision."""
    case = hard_cases()[name]
    for up in (None, torch.randn(40, generator=torch.Generator().manual_seed(1))):
        bits, ours = gradients(fastmem.token_bits, case, up)
        right_bits, right = gradients(reference.token_bits, doubled(case), up)
        assert_bits(bits, right_bits)
        assert_gradients(ours, gradients(reference.token_bits, case, up)[1], right)


def test_an_offset_of_the_bias_changes_nothing(isa: str) -> None:
    """Fails if an offset that all biases share reaches the logits: results must be equal."""
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
    """Fails if a gradient is made only together with another."""
    case = random_case(20, 12, vocab)
    for up in (None, torch.linspace(-1, 1, 20)):
        _, together = gradients(fastmem.token_bits, case, up)
        _, ours = gradients(fastmem.token_bits, case, up, wanted)
        for mine, other, want in zip(ours, together, wanted, strict=True):
            assert (mine is not None) == want
            assert mine is None or (other is not None and torch.equal(mine, other))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "bias"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_token_that_is_not_finite(
    isa: str, softcap: float | None, where: str, value: float
) -> None:
    """Fails if rows that do not count, or lanes without a row, reach gradients as 0 times inf; or
    if gradients made ahead and gradients made later have NaN in different places."""
    hidden, weight, targets, bias = random_case(45, 20, 60)
    assert bias is not None
    hidden = hidden.abs()  # so that the token's logit has the sign of its weight
    targets = targets % 7
    targets[3], targets[9] = -100, 60
    if where == "weight":
        weight[7, 2] = value
    else:
        bias[7] = value
    case = (hidden, weight, targets, bias)
    found = [
        gradients(fastmem.token_bits, case, up, softcap=softcap)
        for up in (torch.ones(45), torch.ones(45).index_fill(0, torch.tensor(0), 1 + 2**-20))
    ]
    (bits, ahead), (_, after) = found
    right = reference.token_bits(*doubled(case), softcap=softcap)
    assert_bits(bits, right)
    for mine, other in zip(ahead, after, strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True, rtol=1e-5, atol=1e-5)
    if value == -math.inf or (softcap is not None and value == math.inf):
        assert ahead[2] is not None
        assert ahead[2].isfinite().all()


@pytest.mark.parametrize("vocab", [60, 4200])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_without_bits(isa: str, softcap: float | None, vocab: int) -> None:
    """Fails if a bad row changes another, if an ignored row with any hidden state has an effect, if
    a target outside [0, V) is read, or if a row that is not finite counts under a softcap."""
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
            fastmem.token_bits, (hidden, weight, targets, bias), up, softcap=softcap
        )
        alone = (hidden[good], weight, targets[good], bias)
        right_bits, right = gradients(
            reference.token_bits, doubled(alone), up[good], softcap=softcap
        )
        assert_bits(bits[good], right_bits)
        assert bits[bad].isnan().all()
        assert (bits[ignored] == 0).all()
        assert dhidden is not None
        assert dhidden[bad].isnan().all()
        assert (dhidden[ignored] == 0).all()
        leaf = hidden.clone().requires_grad_()
        used = fastmem.token_bits(leaf, weight, targets, bias, softcap=softcap)[good]
        (used * up[good]).sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        assert (leaf.grad[bad] == 0).all()
        assert_gradients([leaf.grad[good]], [dhidden[good]], right[:1])
        ours = [dhidden[good], dweight, dbias]
        assert_gradients(ours, gradients(eager, alone, up[good], softcap=softcap)[1], right)


def test_any_ignore_index(isa: str) -> None:
    """Fails if a token in [0, V) cannot be ignored, or has a gradient if it is."""
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
    """Fails if the sum depends on which thread ends first, or any number of threads is wrong."""
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
    """Fails if the pass that makes gradients ahead computes other bits: it walks 128 tokens at a
    time and the plain pass blocks of weight, but both add up sums of 1024 tokens."""
    torch.set_num_threads(1)
    for vocab in (300, 9000):
        hidden, weight, targets, bias = random_case(600, 30, vocab)
        plain = fastmem.token_bits(hidden, weight, targets, bias)
        ahead = fastmem.token_bits(hidden, weight.requires_grad_(), targets, bias)
        assert torch.equal(plain, ahead.detach())


def test_empty_and_strided() -> None:
    """Fails if no rows, no models, a transposed weight or a stride between rows is refused."""
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
    offset = torch.empty(20 * 12 + 1)[1:].view(20, 12).copy_(hidden)  # misaligned by four bytes
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


FORKS = """
import concurrent.futures, os, signal, torch, fastmem

torch.set_num_threads(3)
hidden, weight = torch.randn(600, 64), torch.randn(512, 64)
targets = torch.randint(512, (600,))
def bits():
    return fastmem.token_bits(hidden, weight, targets).sum().item()
def forked(right):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for ever
        once = fastmem.token_bits(hidden.requires_grad_(), weight, targets).sum()
        once.backward()
        torch.ones(1 << 20).exp_()
        os._exit(0 if bits() == once.item() == right else 1)
    assert os.waitpid(child, 0)[1] == 0
right = bits()
forked(right)
concurrent.futures.ThreadPoolExecutor(1).submit(forked, bits()).result()
forked(bits())
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
def test_a_forked_child_has_threads() -> None:
    """Fails if a child waits for the threads of its parent, which a fork does not copy."""
    command = [sys.executable, "-W", "ignore", "-c", FORKS]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.stdout == "done\n", found.stderr
