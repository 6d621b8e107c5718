"""What a step of training costs in floating point operations, and how fast a device does them.

V vocabulary, S sequence length, D width, L layers.
"""

import functools
import time

import torch

from fastmem.base.arguments import checked_device, integer
from fastmem.models.gpt import GPTConfig

MATMUL_SECONDS = 0.2
MATMUL_SIZES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
"""Large enough that a product takes far longer than its start, small enough for MATMUL_SECONDS."""


def flops_per_token(config: GPTConfig, length: int | None = None) -> float:
    """What one step of training must compute, forward and backward, divided by its tokens.

    Counts a multiplication and an addition of every matrix product that a GPT needs, and nothing
    else (no norm, GELU, softmax, optimizer, and no product that is computed again). A sequence of
    S tokens has S - 1 inputs, since the last token is only a target; each of them takes

    - 6 for each weight of the blocks' matrices and of the tied head: 6 · (12 · L · D² + V · D).
      An embedding that is looked up is no product;
    - 12 · L · D for each token that attention sees, on average S / 2 of S - 1 under the causal
      mask. Programs that compute the masked half too do up to twice that.

    Forward alone, as in scoring, takes a third. tokens/s · flops_per_token / matmul_rate is the
    share of the device's speed that the model gets (MFU), with all S tokens counted in tokens/s,
    as `TrainResult.tokens_per_second` counts them.

    Args:
        config: the shape.
        length: S of the sequences, from 2 to config.length; None: config.length.

    Raises:
        ValueError: a length outside these limits.

    Example:
        >>> flops_per_token(GPTConfig(layers=1, width=32, heads=8, vocab=2048, length=64))
        471744.0

    Source: appendix B of arXiv 2204.02311 (MFU), with the causal half of attention alone.
    """
    if config.length < 2:
        raise ValueError(f"a model of length {config.length} codes no token: give it 2 or more")
    S = integer("length", config.length if length is None else length, 2, config.length)
    L, D, V = config.layers, config.width, config.vocab
    one_input = 6 * (12 * L * D * D + V * D) + 12 * L * D * S / 2
    return one_input * (S - 1) / S


def matmul_rate(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """The fastest of torch's large square matrix products on a device, in FLOP/s.

    Takes about 0.2 seconds the first time that a process asks for a device, dtype and number of
    torch's threads, and is kept then. float32 on a GPU is as torch is set (TF32 or not).

    Args:
        device: where.
        dtype: a floating point type that the device multiplies.

    Raises:
        ValueError: a device that is not there, or a dtype without matrix products.

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
        raise ValueError(f"{place} multiplies no {dtype}: use torch.float32") from None


@functools.cache
def _matmul_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    sizes = MATMUL_SIZES["cpu" if device.type == "cpu" else "cuda"]
    draw = torch.Generator(device).manual_seed(0)  # the caller's numbers stay as they are
    best = 0.0
    for n in sizes:
        a, b = torch.randn(2, n, n, device=device, generator=draw).to(dtype)
        out = a @ b
        end = time.perf_counter() + MATMUL_SECONDS / len(sizes)
        while True:
            _wait(device)
            start = time.perf_counter()
            torch.matmul(a, b, out=out)
            _wait(device)
            now = time.perf_counter()
            best = max(best, 2 * n**3 / (now - start))
            if now > end:
                break
    return best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
