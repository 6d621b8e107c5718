"""FLOPs of a training step, and the FLOP/s of a device.

V vocabulary, S sequence length, D width, L layers.
"""

import functools
import time

import torch

from fastmem.base.arguments import checked_device, integer
from fastmem.models.gpt import GPTConfig

MATMUL_SECONDS = 0.2
MATMUL_SIZES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
"""Large enough that a product takes far longer than its launch, small enough for MATMUL_SECONDS."""


def flops_per_token(config: GPTConfig, length: int | None = None) -> float:
    """FLOPs per token of a training step, forward and backward.

    Counts the multiplications and additions of every matrix product that a GPT needs. Norms, GELU,
    softmax, the optimizer and recomputed products are not counted. A sequence of S tokens has
    S - 1 inputs, since the last token is only a target. Each input takes

    - 6 FLOPs for each weight of the blocks' matrices and of the tied head: 6 · (12 · L · D² +
      V · D). Looking up an embedding is not a product;
    - 12 · L · D FLOPs for each token that attention reads, on average S / 2 of S - 1 under the
      causal mask. Programs that also compute the masked half take up to twice as many.

    The forward pass alone, as in scoring, takes a third. tokens/s · flops_per_token / matmul_rate
    is the model FLOPs utilization (MFU), where tokens/s counts all S tokens, as
    `TrainResult.tokens_per_second` does.

    Args:
        config: the shape.
        length: S of the sequences, from 2 to config.length; by default config.length.

    Raises:
        ValueError: a length outside these limits.

    Example:
        >>> flops_per_token(GPTConfig(layers=1, width=32, heads=8, vocab=2048, length=64))
        471744.0

    Source: appendix B of arXiv 2204.02311 (MFU), with the causal half of attention alone.
    """
    if config.length < 2:
        raise ValueError(f"a model of length {config.length} codes no token: use 2 or more")
    S = integer("length", config.length if length is None else length, 2, config.length)
    L, D, V = config.layers, config.width, config.vocab
    one_input = 6 * (12 * L * D * D + V * D) + 12 * L * D * S / 2
    return one_input * (S - 1) / S


def matmul_rate(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of the fastest large square matrix product of torch on a device.

    The first call of a process for a device, dtype and number of torch's threads takes about 0.2
    seconds; later calls return the same value. float32 on a GPU uses TF32 if torch is set to.

    Args:
        device: where to multiply.
        dtype: a floating point type that the device multiplies.

    Raises:
        ValueError: the device is unavailable, or has no matrix product for the dtype.

    Example:
        >>> matmul_rate("cpu") > 1e8
        True
    """
    place = checked_device(device)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating point type, not {dtype}: use torch.float32")
    try:
        return _matmul_rate(place, dtype, torch.get_num_threads())
    except NotImplementedError:
        raise ValueError(f"{place} has no matrix product for {dtype}: use torch.float32") from None


@functools.cache
def _matmul_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    sizes = MATMUL_SIZES["cpu" if device.type == "cpu" else "cuda"]
    draw = torch.Generator(device).manual_seed(0)  # leaves torch's own generator as it was
    best = 0.0
    for n in sizes:
        a, b = torch.randn(2, n, n, device=device, generator=draw).to(dtype)
        out = a @ b
        end = time.perf_counter() + MATMUL_SECONDS / len(sizes)
        while True:
            synchronize(device)
            start = time.perf_counter()
            torch.matmul(a, b, out=out)
            synchronize(device)
            now = time.perf_counter()
            best = max(best, 2 * n**3 / (now - start))
            if now > end:
                break
    return best


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done its work; a CPU has none pending."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
