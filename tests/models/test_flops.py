"""FLOPs of a step against counts by hand and by PyTorch; the rate against its definition."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastmem
from fastmem import GPT, GPTConfig, flops_per_token, matmul_rate
from fastmem.models.flops import _matmul_rate


def test_by_hand() -> None:
    """Fails if a matrix, the mask or the last token is counted wrongly.

    One layer of width 32: 3072 + 1024 + 4096 + 4096 weights and 65,536 weights of the head, 6 FLOPs
    each; 63 of 64 tokens are inputs, and each reads 32 on average, at 12 · 32.
    """
    config = GPTConfig(layers=1, width=32, heads=8, vocab=2048, length=64)
    assert flops_per_token(config) == (6 * 77_824 + 12 * 32 * 32) * 63 / 64
    # Two tokens: one input, which sees itself.
    assert flops_per_token(config, length=2) == (6 * 77_824 + 12 * 32) / 2


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (GPTConfig(layers=1, width=8, heads=2, vocab=16, length=4), 4),
        (GPTConfig(layers=3, width=12, heads=3, vocab=50, length=9), 7),
    ],
    ids=str,
)
def test_against_pytorchs_counter(config: GPTConfig, length: int) -> None:
    """Fails if a product of the forward or backward pass is missing or added.

    PyTorch's counter also counts the masked half of attention: T · (T + 1) / 2 of its T · T
    products are needed, and the rest is added here.
    """
    B, T = 5, length - 1
    tokens = torch.from_numpy(fastmem.UniformSequences(B, length, config.vocab)[:].astype("int64"))
    model = GPT(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(tokens[:, :-1]) @ model.head.T
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    masked = 12 * config.layers * config.width * (T * T - T * (T + 1) // 2)
    assert counter.get_total_flops() - B * masked == B * length * flops_per_token(config, length)


def test_longer_sequences_cost_more() -> None:
    """Fails if attention is left out, or its FLOPs per token are not linear in the length."""
    config = GPTConfig(layers=2, width=16, heads=4, vocab=32, length=4096)
    inputs = [flops_per_token(config, S) * S / (S - 1) for S in (1024, 2048, 3072, 4096)]
    steps = [b - a for a, b in pairwise(inputs)]
    assert steps == pytest.approx([12 * 2 * 16 * 512] * 3)


@pytest.mark.parametrize(
    ("length", "message"),
    [(1, "length must be from 2 to 8, got 1"), (9, "from 2 to 8, got 9"), (4.0, "pass an int")],
)
def test_lengths_that_do_not_fit(length: object, message: str) -> None:
    """Fails if a length that the model cannot code gives a number."""
    with pytest.raises(ValueError, match=message):
        flops_per_token(GPTConfig(1, 8, 2, vocab=16, length=8), length)  # type: ignore[arg-type]


def test_a_model_of_one_token() -> None:
    """Fails if the error for a model that codes nothing names an argument that was not given."""
    with pytest.raises(ValueError, match="a model of length 1 codes no token"):
        flops_per_token(GPTConfig(1, 8, 2, vocab=16, length=1))


def test_the_rate_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if FLOPs are not 2n³, the best time does not count, or a second call measures again."""
    clock = iter([0.0, 1.0, 3.0, 4.0, 7.0, 0.0, 0.0, 99.0])  # seconds: 2, 3; then 99
    monkeypatch.setattr("fastmem.models.flops.MATMUL_SIZES", {"cpu": (8, 16)})
    monkeypatch.setattr("fastmem.models.flops.MATMUL_SECONDS", 7.0)
    monkeypatch.setattr("fastmem.models.flops.time.perf_counter", lambda: next(clock))
    _matmul_rate.cache_clear()
    try:
        assert matmul_rate("cpu") == 2 * 8**3 / 2 > 2 * 16**3 / 99
        assert matmul_rate(torch.device("cpu"), torch.float32) == 2 * 8**3 / 2
    finally:
        _matmul_rate.cache_clear()


def test_the_rate_leaves_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if measuring changes the random numbers of the caller."""
    monkeypatch.setattr("fastmem.models.flops.MATMUL_SECONDS", 0.0)
    _matmul_rate.cache_clear()
    state = torch.get_rng_state()
    try:
        assert matmul_rate("cpu", torch.bfloat16) > 0
    finally:
        _matmul_rate.cache_clear()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cuda:99", torch.float32, "device cuda:99 is unavailable"),
        ("meta", torch.float32, "device meta holds shapes"),
        ("cpu", torch.int64, "dtype must be a floating point type, not torch.int64"),
        ("cpu", "float32", "dtype must be a floating point type, not float32"),
        ("cpu", torch.float8_e8m0fnu, "cpu has no matrix product for torch.float8_e8m0fnu"),
    ],
)
def test_what_has_no_rate(device: str, dtype: torch.dtype, message: str) -> None:
    """Fails if a device or dtype without matrix products gives a number or another error."""
    with pytest.raises(ValueError, match=message):
        matmul_rate(device, dtype)
