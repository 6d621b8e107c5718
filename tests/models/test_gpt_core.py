"""The core's GPT-2 against fastmem.GPT in float64 by autograd, on every instruction set.

Results start as NaN, so that a skipped value shows.

E models, B batch, T inputs of a sequence, S positions, L layers, D width, H heads, V vocabulary, P
parameters.
"""

import functools
import math
import re
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases.likelihood_cases import BIT, assert_bits
from numpy.typing import NDArray

from fastmem import GPT, GPTConfig, _core

ISAS = [isa for isa in ("portable", "avx2", "avx512") if _core.has_isa(isa)]

Floats = NDArray[np.float32]


class Case(NamedTuple):
    L: int = 1
    D: int = 12
    H: int = 3
    V: int = 20
    S: int = 70
    E: int = 1
    B: int = 3
    T: int = 9

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(self.L, self.D, self.H, self.V, self.S)

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in self._asdict().items())


class Results(NamedTuple):
    bits: Floats  # (E, B, T)
    losses: NDArray[np.float64]  # (E,)
    gradients: Floats  # (E, P)


def inputs(case: Case, **times: float) -> tuple[Floats, NDArray[np.int64]]:
    """Parameters (E, P) with activations of about 1, and tokens (E, B, T + 1); `times` multiplies
    the weights whose names end in its keys."""
    draw = torch.Generator().manual_seed(case.D + 1000 * case.T)
    rows = []
    model = GPT(case.config, device="meta")
    for _ in range(case.E):
        parts = []
        for name, p in model.named_parameters():
            x = torch.randn(p.shape, generator=draw) / (p.shape[1] ** 0.5 if p.dim() == 2 else 3)
            x = x + float(name.endswith("norm.weight")) if p.dim() == 1 else x
            for end, factor in times.items():
                x = x * (factor if name.endswith(f"{end}.weight") else 1)
            parts.append(x.reshape(-1))
        rows.append(torch.cat(parts))
    tokens = torch.randint(case.V, (case.E, case.B, case.T + 1), generator=draw)
    return torch.stack(rows).numpy(), tokens.numpy()


def core(
    case: Case, parameters: Floats, tokens: NDArray[np.int64], isa: str = "best", threads: int = 1
) -> Results:
    shape = {"layers": case.L, "width": case.D, "heads": case.H, "vocab": case.V, "length": case.S}
    E, B, T = tokens.shape[0], tokens.shape[1], tokens.shape[2] - 1
    bits = np.full((E, B, T), np.nan, np.float32)
    losses, gradients = np.full(E, np.nan), np.full(parameters.shape, np.nan, np.float32)
    given: dict[str, Any] = {"parameters": parameters, "tokens": tokens, **shape}
    _core.gpt_bits(bits, **given, threads=threads, isa=isa)
    _core.gpt_gradients(losses, gradients, **given, threads=threads, isa=isa)
    return Results(bits, losses, gradients)


def by_autograd(
    case: Case, parameters: Floats, tokens: NDArray[np.int64], dtype: torch.dtype
) -> Results:
    bits, gradients = [], []
    for row, own in zip(parameters, tokens, strict=True):
        model = GPT(case.config).to(dtype)
        torch.nn.utils.vector_to_parameters(torch.from_numpy(row).to(dtype), model.parameters())
        of_tokens = model.token_bits(torch.from_numpy(own))
        of_tokens.mean().backward()  # type: ignore[no-untyped-call]
        bits.append(of_tokens.detach().numpy())
        grads = [p.grad for p in model.parameters()]
        gradients.append(torch.cat([g.reshape(-1) for g in grads if g is not None]).numpy())
    stacked = np.stack(bits)
    losses = stacked.astype(np.float64).mean((1, 2))
    return Results(stacked, losses, np.stack(gradients))


@functools.cache
def truth(case: Case) -> tuple[Floats, NDArray[np.int64], Results, Results]:
    """Inputs, with the results of PyTorch in float64 and in float32."""
    given = inputs(case)
    return *given, *(by_autograd(case, *given, dtype) for dtype in (torch.float64, torch.float32))


def tensors(case: Case, flat: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The parts of (E, P), each (E, ...)."""
    named = dict(GPT(case.config, device="meta").named_parameters())
    edges = np.cumsum([p.numel() for p in named.values()])
    parts = np.split(flat, edges[:-1], axis=1)
    return {name: part.reshape(len(flat), -1) for name, part in zip(named, parts, strict=True)}


def assert_gradients(case: Case, ours: Floats, right: Results, theirs: Results) -> None:
    """Each tensor of each model is as close to float64 as twice PyTorch's own error; the floor,
    1e-6 of the model's whole gradient, is for tensors whose gradient is 0 or exact by luck."""
    assert np.isfinite(ours).all()
    parts = [tensors(case, flat) for flat in (ours, right.gradients, theirs.gradients)]
    for name, mine in parts[0].items():
        error, other = (
            np.linalg.norm(x.astype(np.float64) - parts[1][name], axis=1)
            for x in (mine, parts[2][name])
        )
        floor = 1e-6 * np.linalg.norm(right.gradients, axis=1)
        assert (error <= 2 * other + floor).all(), f"{name} is off by {error}, PyTorch by {other}"


def assert_right(case: Case, ours: Results, right: Results, theirs: Results) -> None:
    assert_bits(torch.from_numpy(ours.bits), torch.from_numpy(right.bits))
    np.testing.assert_allclose(ours.losses, right.losses, rtol=2**-23, atol=BIT / 10)
    assert_gradients(case, ours.gradients, right, theirs)


# Around each vector of 4, 8 and 16 tokens; several sequences a panel and one; two panels of which
# the last is not full; more tokens than a panel has.
TIMES = [Case(B=5, T=T, S=T) for T in (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 17, 20, 24, 25)]
TIMES += [Case(B=3, T=T, S=T + 1, E=2) for T in (31, 32, 33, 48, 49, 63, 64, 65, 96, 97, 129)]
# Heads of width 1, 2, 3, 4, 8, 16, 64 and 33; rows of sums that end before their vector does.
WIDTHS = [
    Case(2, D, H, B=2, T=19)
    for D, H in [(1, 1), (2, 1), (7, 7), (16, 8), (33, 11), (24, 6), (24, 3), (16, 1), (17, 17)]
] + [Case(1, D, H, B=2, T=35) for D, H in [(64, 1), (33, 1), (128, 2)]]
# No choice, one bit, odd, threads' caches full.
VOCABULARIES = [Case(V=V, E=2) for V in (1, 2, 33, 300)] + [Case(V=4099, D=7, H=1)]
# The least; chunks of the output layer: 1024 tokens, one panel, and what 16 MiB hold.
SIZES = [
    *[Case(1, 1, 1, 1, 1, 1, 1, 1), Case(3, 8, 2, B=1, T=70), Case(3, 24, 4, 77, E=3)],
    *[Case(B=150, T=9), Case(B=1, T=1030, S=1030), Case(3, 128, 2, 50, B=22, T=60)],
]


@pytest.mark.parametrize("case", TIMES + WIDTHS + VOCABULARIES + SIZES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_against_float64(isa: str, case: Case) -> None:
    """Fails if a part of the model or of its gradient is left out, or a tile, panel or chunk ends
    in the wrong place."""
    parameters, tokens, right, theirs = truth(case)
    ours = core(case, parameters, tokens, isa)
    assert_right(case, ours, right, theirs)
    unused = tensors(case, ours.gradients)["position_embedding.weight"][:, case.T * case.D :]
    assert unused.size == case.E * (case.S - case.T) * case.D
    assert not unused.any()


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed: int) -> None:
    """Fails if an axis is right only for some sizes of the other axes."""
    draw = np.random.default_rng(seed)
    H = int(draw.integers(1, 7))
    sizes = [int(draw.integers(1, most + 1)) for most in (3, 9, 60, 3, 9, 80)]
    L, depth, V, E, B, T = sizes
    case = Case(L, depth * H, H, V, T + seed % 3, E, B, T)
    parameters, tokens, right, theirs = truth(case)
    for isa in ISAS:
        assert_right(case, core(case, parameters, tokens, isa, 1 + seed % 4), right, theirs)


# More models than threads, fewer, as many; models cut at odd places.
@pytest.mark.parametrize(
    "case", [Case(D=24, E=5, B=23), Case(D=48, E=2, B=31), Case(B=190)], ids=str
)
@pytest.mark.parametrize("isa", ISAS)
def test_threads(isa: str, case: Case) -> None:
    """Fails if a cut between threads skips or doubles a panel or mixes models, if the same call
    gives other bytes, or if the number of threads changes a token by more than 2e-5 bits, or a
    gradient by more than 1e-6 of its norm."""
    parameters, tokens, right, theirs = truth(case)
    first = core(case, parameters, tokens, isa)
    for threads in (1, 2, 3, 4, 7, 2**64 - 1):
        ours = core(case, parameters, tokens, isa, threads)
        assert_right(case, ours, right, theirs)
        for x, y in zip(ours, core(case, parameters, tokens, isa, threads), strict=True):
            np.testing.assert_array_equal(x, y)
        assert_rounding(ours, first)


def assert_rounding(ours: Results, others: Results) -> None:
    np.testing.assert_allclose(ours.bits, others.bits, rtol=2**-22, atol=2e-5)
    np.testing.assert_allclose(ours.losses, others.losses, rtol=1e-6, atol=1e-6)
    error = np.linalg.norm(ours.gradients - others.gradients, axis=1)
    assert (error <= 1e-6 * np.linalg.norm(others.gradients, axis=1)).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", ISAS)
def test_models_and_sequences_alone(isa: str, threads: int) -> None:
    """Fails if the results of a model or a sequence depend, by more than rounding, on its
    neighbours or its place."""
    case = Case(2, 16, 4, E=3, B=21, T=17)
    parameters, tokens = inputs(case)
    together = core(case, parameters, tokens, isa, threads)
    turned = core(case, parameters, tokens[:, ::-1].copy(), isa, threads)
    assert_rounding(turned._replace(bits=turned.bits[:, ::-1]), together)
    for e in range(case.E):
        one = slice(e, e + 1)
        alone = core(case, parameters[one], tokens[one], isa, threads)
        assert_rounding(alone, Results(*(x[one] for x in together)))
    one_sequence = core(case, parameters, tokens[:, 20:].copy(), isa, threads)
    np.testing.assert_allclose(one_sequence.bits, together.bits[:, 20:], rtol=2**-22, atol=2e-5)


@pytest.mark.parametrize("bias", [0, 1e16])
@pytest.mark.parametrize("isa", ISAS)
def test_no_token_sees_a_later_one(isa: str, bias: float) -> None:
    """Fails if a query sees a later key, whatever the scores: with the bias they are -4e32."""
    case = Case(T=40)
    parameters, tokens = inputs(case)
    named = tensors(case, parameters)
    named["blocks.0.qkv.bias"][:, : case.D] = bias
    named["blocks.0.qkv.bias"][:, case.D : 2 * case.D] = -bias
    before = core(case, parameters, tokens, isa).bits
    assert np.isfinite(before).all()
    for changed in range(1, case.T):
        other = tokens.copy()
        other[..., changed] = (other[..., changed] + 1) % case.V
        after = core(case, parameters, other, isa).bits
        # Bits of a token are in the slot before it.
        np.testing.assert_allclose(
            after[..., : changed - 1], before[..., : changed - 1], rtol=2**-22, atol=2e-5
        )
        assert (after[..., changed:] != before[..., changed:]).any(-1).all()


@pytest.mark.parametrize(
    "times",
    [{"qkv": 50.0}, {"up_proj": 50.0}, {"embedding": 50.0}, {"": 50.0}, {"": 1e-3}],
    ids=str,
)
@pytest.mark.parametrize("isa", ISAS)
def test_large_and_small_activations(isa: str, times: dict[str, float]) -> None:
    """Fails if attention on one key, a GELU of ±100 or a certain or impossible target overflows, or
    is less accurate than twice PyTorch's float32 error."""
    case = Case(D=16, H=2, E=3, B=7, T=21)
    parameters, tokens = inputs(case, **times)
    right, theirs = (
        by_autograd(case, parameters, tokens, dtype) for dtype in (torch.float64, torch.float32)
    )
    ours = core(case, parameters, tokens, isa)
    assert (ours.bits >= 0).all()
    error, other = (
        np.linalg.norm((x.bits - right.bits).reshape(case.E, -1), axis=1) for x in (ours, theirs)
    )
    sure = case.B * case.T * BIT + 2**-23 * np.linalg.norm(right.bits.reshape(case.E, -1), axis=1)
    assert (error <= 2 * other + sure).all(), f"bits are off by {error}, PyTorch by {other}"
    assert_gradients(case, ours.gradients, right, theirs)


@pytest.mark.parametrize("isa", ISAS)
def test_known_answers(isa: str) -> None:
    """Fails if bits are not log2 V where all hidden states are 0, or a gradient other than that of
    the last bias, (p - target) times the embedding, is not 0."""
    case = Case(2, E=2, V=37)
    parameters, tokens = inputs(case)
    named = tensors(case, parameters)
    named["norm.weight"][:] = named["norm.bias"][:] = 0
    ours = core(case, parameters, tokens, isa)
    np.testing.assert_allclose(ours.bits, math.log2(37), rtol=1e-6)
    np.testing.assert_allclose(ours.losses, math.log2(37), rtol=1e-7)
    gradients = tensors(case, ours.gradients)
    for e in range(case.E):
        embedding = named["token_embedding.weight"][e].reshape(case.V, case.D).astype(np.float64)
        targets = embedding[tokens[e, :, 1:]].mean((0, 1))
        bias = (embedding.mean(0) - targets) / math.log(2)
        np.testing.assert_allclose(gradients["norm.bias"][e], bias, rtol=1e-4, atol=1e-6)
    for name, gradient in gradients.items():
        if name not in ("norm.weight", "norm.bias"):
            assert not gradient.any(), name


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("isa", ISAS)
def test_a_model_that_is_not_finite(isa: str, value: float) -> None:
    """Fails if a model that is not finite has a finite loss, or changes any byte of another
    model."""
    case = Case(2, E=3, B=4)
    parameters, tokens = inputs(case)
    before = core(case, parameters, tokens, isa)
    for name in tensors(case, parameters):
        broken = parameters.copy()
        part = tensors(case, broken)[name]
        part[1, part.shape[1] // 20] = value  # of a position that is used
        ours = core(case, broken, tokens, isa)
        assert np.isnan(ours.losses[1]), name
        assert np.isnan(ours.bits[1]).any(), name
        assert np.isnan(ours.gradients[1]).any(), name
        for x, y in zip(ours, before, strict=True):
            np.testing.assert_array_equal(x[::2], y[::2])


def test_no_models() -> None:
    """Fails if an empty group crashes or allocates memory, or if a product of sizes may overflow,
    the greatest of which is the size of attention's exponentials."""
    case = Case(60000, 60000, 60000, S=2**15 + 1, E=0)
    parameters = np.empty((0, case.config.parameter_count), np.float32)
    core(case, parameters, np.empty((0, 3, 2**15 + 1), np.int64))
    with pytest.raises(ValueError, match=re.escape("must be from 2 to 32769, got 32770")):
        core(case, parameters, np.empty((0, 3, 2**15 + 2), np.int64))


def call(**changes: Any) -> None:
    """A valid call of both functions, except for `changes`."""
    case = Case(E=2)
    parameters, tokens = inputs(case)
    given: dict[str, Any] = {"parameters": parameters, "tokens": tokens, "threads": 1}
    given |= {"layers": 1, "width": 12, "heads": 3, "vocab": 20, "length": 70}
    results: dict[str, Any] = {
        "bits": np.empty((2, 3, 9), np.float32),
        "losses": np.empty(2),
        "gradients": np.empty_like(parameters),
    }
    results |= {name: changes.pop(name) for name in results.keys() & changes.keys()}
    _core.gpt_gradients(results["losses"], results["gradients"], **(given | changes))
    _core.gpt_bits(results["bits"], **(given | changes))


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


def misaligned(shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.zeros(size + 1, np.uint8)[1:].view(dtype).reshape(shape)


P = Case().config.parameter_count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be from 1 to 65536, got 0"),
        ({"layers": 2**32}, "layers must be from 1 to 65536, got 4294967296"),
        ({"layers": 2}, f"parameters must have the shape [2, 4872], got (2, {P})"),
        ({"width": 0}, "width must be from 1 to 65536, got 0"),
        ({"width": 2**63}, f"width must be from 1 to 65536, got {2**63}"),
        ({"heads": 0}, "heads must be from 1 to 12, got 0"),
        ({"heads": 13}, "heads must be from 1 to 12, got 13"),
        ({"heads": 5}, "heads must divide the width, got 5 and 12"),
        ({"vocab": 0}, "vocab must be from 1 to 2147483647, got 0"),
        ({"vocab": 2**31}, "vocab must be from 1 to 2147483647, got 2147483648"),
        ({"vocab": 21}, "parameters must have the shape"),
        ({"length": 0}, "length must be from 1 to 16777216, got 0"),
        ({"length": 2**60}, "length must be from 1 to 16777216"),
        ({"threads": 0}, "threads must be from 1"),
        ({"isa": "mmx"}, "isa must be best, portable, avx2 or avx512, got mmx"),
        ({"parameters": np.zeros((2, P))}, "parameters must be float32 in native byte order"),
        ({"parameters": np.zeros((2, P), ">f4")}, "parameters must be float32 in native byte"),
        ({"parameters": np.zeros(P, np.float32)}, "parameters must have 2 dimension(s)"),
        ({"parameters": np.zeros((P, 2), np.float32).T}, "parameters must be C-contiguous"),
        ({"parameters": np.zeros((2, P + 1), np.float32)}, "parameters must have the shape"),
        ({"parameters": misaligned((2, P), np.float32)}, "parameters must be aligned"),
        ({"tokens": np.zeros((2, 3, 10), np.int32)}, "tokens must be int64"),
        ({"tokens": np.zeros((2, 3, 20), np.int64)[..., ::2]}, "tokens must be C-contiguous"),
        ({"tokens": np.zeros((2, 30), np.int64)}, "tokens must have 3 dimension(s)"),
        ({"tokens": np.zeros((3, 3, 10), np.int64)}, "tokens must have the shape [2, 3, 10]"),
        ({"tokens": np.zeros((2, 0, 10), np.int64)}, "the batch, must be from 1"),
        ({"tokens": np.zeros((2, 3, 1), np.int64)}, "tokens.shape[2] must be from 2 to 71, got 1"),
        ({"tokens": np.zeros((2, 3, 72), np.int64)}, "must be from 2 to 71, got 72"),
        ({"tokens": np.full((2, 3, 10), 20)}, "tokens must be from 0 to 19, got 20"),
        ({"tokens": np.full((2, 3, 10), -1)}, "tokens must be from 0 to 19, got -1"),
        ({"tokens": np.full((2, 3, 10), 2**32)}, f"tokens must be from 0 to 19, got {2**32}"),
        ({"tokens": misaligned((2, 3, 10), np.int64)}, "tokens must be aligned"),
        ({"bits": np.zeros((2, 3, 10), np.float32)}, "bits must have the shape [2, 3, 9]"),
        ({"bits": np.zeros((2, 3, 9))}, "bits must be float32"),
        ({"bits": read_only(np.zeros((2, 3, 9), np.float32))}, "bits must be writeable"),
        ({"losses": np.zeros(3)}, "losses must have the shape [2], got (3,)"),
        ({"losses": np.zeros(2, np.float32)}, "losses must be float64"),
        ({"losses": np.zeros(4)[::2]}, "losses must be C-contiguous"),
        ({"losses": read_only(np.zeros(2))}, "losses must be writeable"),
        ({"gradients": np.zeros((1, P), np.float32)}, "gradients must have the shape"),
        ({"gradients": np.zeros((2, P))}, "gradients must be float32"),
        ({"gradients": read_only(np.zeros((2, P), np.float32))}, "gradients must be writeable"),
        ({"gradients": misaligned((2, P), np.float32)}, "gradients must be aligned"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_core_refuses(changes: dict[str, Any], message: str) -> None:
    """Fails if an invalid array or number reaches the loops."""
    call()
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**changes)


def test_the_core_refuses_one_token_out_of_range() -> None:
    """Fails if a token is not checked: the core uses each token as an index."""
    tokens = inputs(Case(E=2))[1]
    for place in range(tokens.size):
        bad = tokens.copy()
        bad.flat[place] = 20
        with pytest.raises(ValueError, match="tokens must be from 0 to 19, got 20"):
            call(tokens=bad)


def test_the_core_refuses_shared_memory() -> None:
    """Fails if a result may share memory with an input or another result."""
    shared = np.zeros((2, P), np.float32)
    tokens = np.zeros((2, 3, 10), np.int64)
    with pytest.raises(ValueError, match="gradients must not share memory"):
        call(parameters=shared, gradients=shared)
    with pytest.raises(ValueError, match="losses must not share memory"):
        call(losses=shared.reshape(-1)[4:8].view(np.float64), gradients=shared)
    with pytest.raises(ValueError, match="losses must not share memory"):
        call(losses=tokens.reshape(-1)[:2].view(np.float64), tokens=tokens)
    with pytest.raises(ValueError, match="bits must not share memory"):
        call(bits=shared.reshape(-1)[:54].reshape(2, 3, 9), parameters=shared)


def test_wrong_types() -> None:
    """Fails if a value that is not an array or an integer is converted."""
    wrong = [{"tokens": None}, {"parameters": [[1.0]]}, {"bits": "bits"}, {"losses": 1.0}]
    for changes in [*wrong, {"layers": 1.0}, {"width": -12}, {"threads": 2**64}, {"vocab": "20"}]:
        with pytest.raises((TypeError, ValueError)):
            call(**changes)
