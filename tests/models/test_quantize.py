"""Rounded weights: known levels, and the memorized bits that survive."""

import math

import numpy as np
import pytest
import torch
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

import fastmem
from fastmem import GPT, GPTConfig, TrainConfig, UniformSequences
from fastmem.models.quantize import quantized, surviving_bits

SHAPE = GPTConfig(layers=2, width=16, heads=4, vocab=32, length=8)
SET = UniformSequences(count=20, length=8, vocab=32)
SCHEMES = pytest.mark.parametrize("symmetric", [True, False])
WIDTHS = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def noisy(seed: int = 0) -> GPT:
    """A model whose weights all differ, including biases and LayerNorms."""
    model = GPT(SHAPE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.5, generator=generator))
    return model


@WIDTHS
@SCHEMES
def test_weights_at_levels_survive_exactly(bits: int, symmetric: bool) -> None:
    """Fails if there are fewer levels than 2**b - 1 (2**b), or they do not reach both ends: each
    row has every level, times a step of the row."""
    levels = torch.arange(2**bits - symmetric).float() - (2 ** (bits - 1) - 1)
    model = GPT(GPTConfig(layers=1, width=2**bits, heads=1, vocab=8, length=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                row = levels[torch.arange(parameter.shape[1]) % len(levels)]
                parameter.copy_(row * 2.0 ** (torch.arange(len(parameter)) % 7)[:, None])
    rounded = quantized(model, bits, symmetric)
    for name, parameter in model.named_parameters():
        assert torch.equal(rounded.get_parameter(name), parameter), name


@WIDTHS
@SCHEMES
def test_against_the_nearest_of_all_levels(bits: int, symmetric: bool) -> None:
    """Fails if a weight is not rounded to the nearest level, rows share a range, or levels are not
    evenly spaced between the ends: brute force over all levels in NumPy."""
    model = noisy()
    rounded = quantized(model, bits, symmetric)
    for name, parameter in model.named_parameters():
        ours = rounded.get_parameter(name).detach().numpy()
        if parameter.ndim == 1:
            assert np.array_equal(ours, parameter.detach().numpy()), name
            continue
        for w, found in zip(parameter.detach().double().numpy(), ours, strict=True):
            low, high = (-abs(w).max(), abs(w).max()) if symmetric else (w.min(), w.max())
            levels = np.linspace(low, high, 2**bits - symmetric)
            nearest = levels[np.abs(w[:, None] - levels).argmin(1)]
            np.testing.assert_allclose(found, nearest, rtol=1e-6, atol=1e-7 * high)
            assert len(np.unique(found)) <= len(levels)
            half = (high - low) / (len(levels) - 1) / 2
            assert np.abs(w - found).max() <= half * (1 + 1e-6)


@WIDTHS
def test_against_torchao(bits: int) -> None:
    """Fails if symmetric levels differ from torchao's affine quantization with a range of 2**b - 1
    integers around zero and a scale for each row."""
    limit = 2 ** (bits - 1) - 1
    model = noisy()
    rounded = quantized(model, bits)
    for name, w in model.named_parameters():
        if w.ndim == 2:
            one_row = (1, w.shape[1])
            w = w.detach()
            scale, zero = choose_qparams_affine(
                w, MappingType.SYMMETRIC, one_row, torch.int8, -limit, limit
            )
            level = (torch.int8, -limit, limit)
            q = quantize_affine(w, one_row, scale, zero, *level)
            expected = dequantize_affine(q, one_row, scale, zero, *level)
            torch.testing.assert_close(rounded.get_parameter(name).detach(), expected)


@WIDTHS
@SCHEMES
def test_rounded_twice_is_rounded_once(bits: int, symmetric: bool) -> None:
    """Fails if rounding moves the ends of a row by an ulp or more."""
    once = quantized(noisy(), bits, symmetric)
    twice = quantized(once, bits, symmetric)
    for name, parameter in once.named_parameters():
        assert torch.equal(twice.get_parameter(name), parameter), name


def test_the_model_is_left_as_it_is() -> None:
    """Fails if rounding writes into the model, or the head of the copy is not its embedding."""
    model = noisy()
    before = {name: p.clone() for name, p in model.named_parameters()}
    rounded = quantized(model, 2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert rounded.head is rounded.token_embedding.weight
    assert len(rounded.head.abs().amax(1).unique()) > 2  # each row has steps of its own


@SCHEMES
def test_rows_of_one_value(symmetric: bool) -> None:
    """Fails if a row of zeros, or of one value, divides by its range of 0."""
    model = noisy()
    with torch.no_grad():
        model.head[0] = 0.0
        model.head[1] = -0.3
    head = quantized(model, 2, symmetric).head
    assert torch.equal(head[:2], model.head[:2])


def test_a_model_in_bfloat16() -> None:
    """Fails if levels are rounded again to bfloat16, which is too coarse for 8 bits: the copy is
    float32, the same as from float32 weights of the same values."""
    half = noisy().to(torch.bfloat16)
    ours, theirs = quantized(half, 8), quantized(noisy().to(torch.bfloat16).float(), 8)
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, theirs.get_parameter(name)), name
    assert half.head.dtype == torch.bfloat16


def test_what_survives() -> None:
    """Fails if fewer bits per weight hold more, 8 bits lose much, 2 bits lose nothing, or the bits
    belong to another model."""
    model = GPT(SHAPE)
    full = fastmem.train(model, SET, TrainConfig(steps=300), progress=False).memorized_bits
    survives = surviving_bits(model, SET)
    strict = [survives[bits].strict for bits in (8, 4, 3, 2)]
    assert strict == sorted(strict, reverse=True)
    assert strict[0] == pytest.approx(full, rel=0.02)
    assert strict[3] < 0.5 * full
    bits = fastmem.sequence_bits(quantized(model, 4, symmetric=False), SET)
    expected = fastmem.memorized_bits(bits, SET)
    assert surviving_bits(model, SET, (4,), symmetric=False) == {4: expected}
    bits = fastmem.sequence_bits(quantized(model, 4), SET, "bf16-mixed")
    half = surviving_bits(model, SET, (4,), precision="bf16-mixed")
    assert half == {4: fastmem.memorized_bits(bits, SET)} != surviving_bits(model, SET, (4,))


def test_bad_input() -> None:
    """Fails if an invalid number of bits, or weights that are not finite, give a result."""
    model = noisy()
    for bits in (16, 9, 1, 0, -3, 2.0, "4", True, None):
        with pytest.raises(ValueError, match=r"bits must be .*from 2 to 8"):
            quantized(model, bits)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"bits must be .*from 2 to 8"):
            surviving_bits(model, SET, (8, bits))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a model must be a fastmem.GPT, not Linear"):
        quantized(torch.nn.Linear(4, 4), 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bits must be one or more widths from 2 to 8"):
        surviving_bits(model, SET, ())
    for bits in (4, "84", None):
        with pytest.raises(ValueError, match=r"bits must be .* from 2 to 8"):
            surviving_bits(model, SET, bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="symmetric must be True or False, not 1"):
        quantized(model, 4, symmetric=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sequences must be a fastmem.Sequences, not list"):
        surviving_bits(model, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a vocabulary of 33 for a model of 32"):
        surviving_bits(model, UniformSequences(4, 8, 33))
    with torch.no_grad():
        model.blocks[0].up_proj.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"blocks.0.up_proj.weight has values not finite"):
        quantized(model, 4)
