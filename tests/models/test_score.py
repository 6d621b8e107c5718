"""Code lengths of sequences, and memorized bits in both conventions."""

import math

import numpy as np
import pytest
import torch

import fastmem
from fastmem import (
    GPT,
    GPTConfig,
    Sequences,
    TrainConfig,
    UniformSequences,
    memorized_bits,
    sequence_bits,
)
from fastmem.models.engine import Precision

SHAPE = GPTConfig(layers=1, width=16, heads=4, vocab=2048, length=64)
SET = UniformSequences(count=50, length=64, vocab=2048, seed=2)


def test_sum_of_token_bits() -> None:
    """Fails if a token is dropped or counted twice, or sums are float32."""
    model = GPT(SHAPE)
    tokens = torch.from_numpy(SET.tokens(slice(None), np.int64))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).double() @ model.head.double().T
    log_p = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    expected = -log_p.sum(-1).numpy() / math.log(2)
    bits = sequence_bits(model, SET)
    assert bits.dtype == np.float64
    np.testing.assert_allclose(bits, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 7, 50, 1000])
def test_batch_size_changes_only_rounding(batch: int) -> None:
    """Fails if the last, smaller batch is lost, or the bits of a sequence land in another's
    place."""
    model = GPT(SHAPE)
    np.testing.assert_allclose(
        sequence_bits(model, SET, batch=batch), sequence_bits(model, SET), rtol=1e-6
    )


def test_an_untrained_model_memorizes_nothing() -> None:
    """Fails if an untrained model memorizes more than the sampling error."""
    model = GPT(GPTConfig(layers=1, width=32, heads=8, vocab=128, length=16))
    sequences = UniformSequences(count=4000, length=16, vocab=128, seed=5)
    bits = sequence_bits(model, sequences)
    error = bits.std() * math.sqrt(sequences.count)
    memorized = memorized_bits(bits, sequences)
    assert memorized.strict <= 4 * error
    assert abs(memorized.fraction) < 0.01


@pytest.mark.parametrize(
    "sequences",
    [
        fastmem.WeightedSequences(4000, 16, fastmem.zipf(128, 0.05), seed=5),
        fastmem.repeated(UniformSequences(4000, 16, 128, seed=5), 0.5, times=3),
        fastmem.PrefixedSequences(UniformSequences(4000, 16, 128, seed=5), 12),
    ],
    ids=lambda sequences: sequences.kind,
)
def test_an_untrained_model_memorizes_nothing_of_a_structured_set(sequences: Sequences) -> None:
    """Fails if entropy and sum count different tokens, such as a repeated sequence once and three
    times."""
    model = GPT(GPTConfig(layers=1, width=32, heads=8, vocab=128, length=16))
    memorized = memorized_bits(sequence_bits(model, sequences), sequences)
    assert abs(memorized.fraction) < 0.01


def test_bits_of_a_prefix_are_left_out() -> None:
    """Fails if a token of the prefix counts, or the first token after the prefix does not."""
    model = GPT(SHAPE)
    sequences = fastmem.PrefixedSequences(SET, 20)
    with torch.no_grad():
        every = model.token_bits(sequences.to_torch()).double().numpy()  # of tokens 1, 2, …
    np.testing.assert_allclose(sequence_bits(model, sequences), every[:, 19:].sum(-1), rtol=1e-6)


def test_published_credits_what_is_not_coded() -> None:
    """Fails if a prefix is credited once per sequence: published would exceed the entropy."""
    sequences = fastmem.PrefixedSequences(UniformSequences(count=10, length=5, vocab=4), 2)
    memorized = memorized_bits(np.zeros(10), sequences)
    assert memorized.strict == 10 * 3 * 2
    assert memorized.published == memorized.entropy_bits == 10 * 3 * 2 + 2 * 2
    assert memorized.fraction == 1


def test_a_lookup_table_holds_all() -> None:
    """Fails if a model that predicts every next token is not credited with all but the first.

    Constructed, not trained: one token for each position, and an output matrix that points at it.
    """
    S, V = 8, 16
    sequences = UniformSequences(count=1, length=S, vocab=V, seed=3)
    model = GPT(GPTConfig(layers=1, width=32, heads=1, vocab=V, length=S))
    tokens = torch.from_numpy(sequences.tokens(0, np.int64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1)
        codes = torch.eye(32)[:V] * 30 - 30 / 32
        model.token_embedding.weight.copy_(codes)
        for t in range(S - 1):  # the position cancels the token that is there and writes the next
            model.position_embedding.weight[t] = 2 * codes[tokens[t + 1]] - codes[tokens[t]]
    memorized = memorized_bits(sequence_bits(model, sequences), sequences)
    assert memorized.fraction >= 0.99
    assert memorized.strict >= 0.99 * (S - 1) * 4


def test_conventions_and_held_out() -> None:
    """Fails if the two conventions are confused: published credits the first token."""
    sequences = UniformSequences(count=10, length=5, vocab=4)
    memorized = memorized_bits(np.full(10, 3.0), sequences)
    assert memorized.strict == 10 * (4 * 2 - 3)
    assert memorized.published == memorized.strict * 5 / 4
    assert memorized.entropy_bits == 10 * 5 * 2
    assert memorized.fraction == memorized.strict / (10 * 4 * 2)
    assert memorized.share == memorized.fraction  # its name in 0.1.0


def test_precisions_agree_to_their_rounding() -> None:
    """Fails if bf16-mixed is silently fp32, or bf16-true is not scored in its own weights."""
    model = GPT(SHAPE)
    full = sequence_bits(model, SET)
    mixed = sequence_bits(model, SET, "bf16-mixed")
    true = sequence_bits(model.to(torch.bfloat16), SET, "bf16-true")
    for other in (mixed, true):
        assert not np.array_equal(other, full)
        np.testing.assert_allclose(other, full, rtol=0.01)


def test_bad_input() -> None:
    """Fails if a data set that cannot be scored, or weights that are not finite, give numbers."""
    model = GPT(SHAPE)
    with pytest.raises(ValueError, match="a vocabulary of 4096 for a model of 2048"):
        sequence_bits(model, UniformSequences(4, 64, 4096))
    with pytest.raises(ValueError, match="always the same and have no bits: give other weights"):
        sequence_bits(model, fastmem.WeightedSequences(4, 64, [0, 1]))
    with pytest.raises(ValueError, match="batch must be at least 1, not 0"):
        sequence_bits(model, SET, batch=0)
    with pytest.raises(ValueError, match="precision must be one of"):
        sequence_bits(model, SET, "fp64")  # type: ignore[arg-type]
    with torch.no_grad():
        model.norm.bias[0] = math.nan
    with pytest.raises(ValueError, match="the bits of sequence 0 are not finite"):
        sequence_bits(model, SET)
    for bits, message in (
        (np.zeros(3), r"one float for each of 50 sequences, not float64 of shape \(3,\)"),
        (np.zeros(50, dtype=int), "not int64"),
        (np.full(50, np.nan), "50 values not finite"),
        (np.where(np.arange(50) == 3, -0.5, 1), "bits is -0.5 for sequence 3: pass what"),
    ):
        with pytest.raises(ValueError, match=message):
            memorized_bits(bits, SET)
    with pytest.raises(ValueError, match="length is 1"):
        fastmem.memorized_bits(np.zeros(5), UniformSequences(5, 1, 8))


def rounded(dtype: torch.dtype) -> GPT:
    return GPT(SHAPE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fp32_computes_in_float32(dtype: torch.dtype) -> None:
    """Fails if weights are scored in their own, smaller type under the name fp32, also inside
    autocast or where only some are of this type; float64 stays float64."""
    model, plain = rounded(dtype), rounded(dtype)
    expected = sequence_bits(plain.float() if dtype.itemsize == 2 else plain, SET)
    assert np.array_equal(sequence_bits(model, SET), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(sequence_bits(model, SET), expected)
    assert {p.dtype for p in model.parameters()} == {dtype}
    if dtype.itemsize == 2:
        model.norm.float()
        assert np.array_equal(sequence_bits(model, SET), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bf16_precisions_compute_in_bfloat16(dtype: torch.dtype) -> None:
    """Fails if weights of another type are scored in it under the name of a bf16 precision."""
    model = rounded(dtype)
    true = sequence_bits(rounded(dtype).to(torch.bfloat16), SET, "bf16-true")
    mixed = sequence_bits(rounded(dtype).float(), SET, "bf16-mixed")
    assert np.array_equal(sequence_bits(model, SET, "bf16-true"), true)
    assert np.array_equal(sequence_bits(model, SET, "bf16-stochastic"), true)
    assert np.array_equal(sequence_bits(model, SET, "bf16-mixed"), mixed)
    assert not np.array_equal(true, mixed)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "bf16-stochastic"])
def test_float16_does_not_fit_bfloat16(precision: Precision) -> None:
    """Fails if float16 weights are rounded to bfloat16, or computed in float16, without a word."""
    for call in (
        lambda: sequence_bits(rounded(torch.float16), SET, precision),
        lambda: fastmem.train(
            rounded(torch.float16), SET, TrainConfig(steps=1, precision=precision)
        ),
    ):
        with pytest.raises(
            ValueError, match=r"float16 weights, which bf16-.* use fp32, or convert"
        ):
            call()


def test_models_of_other_kinds() -> None:
    """Fails if a wrapper, a model of another library or a model without numbers gives another error
    than a ValueError with the fix."""
    model = GPT(SHAPE)
    for given, message in (
        (torch.nn.DataParallel(model), "not DataParallel: give model.module"),
        (torch.compile(model, backend="eager"), "not OptimizedModule: give model._orig_mod"),
        (torch.nn.Linear(2, 2), "not Linear: save a GPT-2 of transformers with save_pretrained"),
        (None, "not NoneType"),
        (GPT(SHAPE, device="meta"), "on meta, which holds no numbers: make it with device='cpu'"),
    ):
        for call in (
            lambda model: sequence_bits(model, SET),
            lambda model: fastmem.train(model, SET, progress=False),
            lambda model: fastmem.surviving_bits(model, SET),
        ):
            with pytest.raises(ValueError, match=message):
                call(given)
    for batch in (2.5, "7", np.int64(0), -1):
        with pytest.raises(ValueError, match="batch must be at least 1, not"):
            sequence_bits(model, SET, batch=batch)  # type: ignore[arg-type]
    assert np.array_equal(
        sequence_bits(model, SET, batch=np.int64(7)), sequence_bits(model, SET, batch=7)
    )  # type: ignore[arg-type]


def test_bits_that_are_no_array_of_floats() -> None:
    """Fails if a tensor that NumPy does not take gives another error than a ValueError."""
    for bits in (
        torch.ones(50, dtype=torch.bfloat16),
        torch.ones(50, requires_grad=True),
        [[1.0], [1.0, 2.0]],
    ):
        with pytest.raises(
            ValueError, match=r"must be an array of floats, not a .*: pass what seq"
        ):
            memorized_bits(bits, SET)  # type: ignore[arg-type]
    assert memorized_bits([1.0] * 50, SET) == memorized_bits(torch.ones(50), SET)  # type: ignore[arg-type]
