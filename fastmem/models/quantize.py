"""Memorized bits of a model whose weights are rounded to a few bits.

P parameters, b bits a weight.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmem.base.arguments import integer
from fastmem.data.sequences import Sequences
from fastmem.memorization.bits import Memorized, memorized_bits
from fastmem.models.engine import Precision
from fastmem.models.gpt import GPT, check_model, ordered
from fastmem.models.score import sequence_bits

MIN_BITS, MAX_BITS = 2, 8


def quantized(model: GPT, bits: int, symmetric: bool = True) -> GPT:
    """A float32 copy of the model with each weight rounded to the nearest of a few levels.

    Rounds every matrix, including the tied token embedding and the positions; biases and LayerNorms
    keep their values. The levels are evenly spaced over each row of a matrix (one output channel,
    one token, one position):

    - symmetric: 2**b - 1 levels from -max|w| to max|w|, including zero;
    - else 2**b levels from min w to max w.

    Nothing is clipped or calibrated. Rounding a rounded model changes nothing.

    Args:
        model: stays unchanged.
        bits: b, from 2 to 8.
        symmetric: levels from -max|w| to max|w|, not from min w to max w.

    Raises:
        ValueError: an argument of another type, bits out of range, or weights that are not finite.

    Example:
        >>> import fastmem
        >>> model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4))
        >>> len(quantized(model, 2).head[5].unique())  # -max, 0, max
        3

    Source: per-channel round-to-nearest, the baseline of arXiv 2210.17323 (GPTQ).
    """
    check_model(model)
    bits = integer("bits", bits, MIN_BITS, MAX_BITS)
    if not isinstance(symmetric, bool):
        raise ValueError(f"symmetric must be True or False, not {symmetric!r}")
    ordered(model)  # ValueError for a mask, whose copy would fail
    rounded = copy.deepcopy(model).float()
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(
                    f"{name} has values not finite: train the model again at a lower rate"
                )
            if parameter.ndim == 2:
                parameter.copy_(_nearest_level(parameter, bits, symmetric))
    return rounded


def surviving_bits(
    model: GPT,
    sequences: Sequences,
    bits: Sequence[int] = (8, 4, 3, 2),
    symmetric: bool = True,
    precision: Precision = "fp32",
) -> dict[int, Memorized]:
    """The memorized bits of the sequences under `quantized(model, b)`, for each b in bits.

    Computes `memorized_bits(sequence_bits(quantized(model, b), sequences), sequences)`.

    Raises:
        ValueError: bits out of range or empty, or sequences that do not fit the model.

    Example:
        >>> import fastmem
        >>> model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4))
        >>> sequences = fastmem.UniformSequences(8, length=4, vocab=16)
        >>> result = fastmem.train(model, sequences, fastmem.TrainConfig(steps=100), progress=False)
        >>> survives = surviving_bits(model, sequences)
        >>> survives[8].strict > 0.9 * result.memorized_bits > survives[2].strict
        True
    """
    if not isinstance(bits, Sequence) or not bits:
        raise ValueError(
            f"bits must be one or more widths from {MIN_BITS} to {MAX_BITS}, not {bits!r}: "
            "give (8, 4)"
        )
    if not isinstance(sequences, Sequences):
        raise ValueError(f"sequences must be a fastmem.Sequences, not {type(sequences).__name__}")
    widths = [integer("bits", width, MIN_BITS, MAX_BITS) for width in bits]
    survives = {}
    for width in widths:
        code = sequence_bits(quantized(model, width, symmetric), sequences, precision)
        survives[width] = memorized_bits(code, sequences)
    return survives


def _nearest_level(weight: Tensor, bits: int, symmetric: bool) -> Tensor:  # (rows, columns)
    """Rounds in float64, so that both ends of a row keep their last bit."""
    w = weight.double()
    low, high = w.aminmax(dim=1, keepdim=True)
    steps = 2**bits - 1
    if symmetric:
        high = torch.maximum(high, -low)
        low, steps = -high, steps - 1
    width = (high - low).clamp_min(torch.finfo(torch.float64).tiny)  # a row of one value stays
    place = ((w - low) / width * steps).round()
    return (low * (steps - place) + high * place) / steps  # type: ignore[no-any-return]
