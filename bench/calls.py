"""Microseconds of Python that a call of token_bits on a GPU costs, measured without a GPU.

    python bench/calls.py [--quick] [--json FILE]

Tensors are on the CPU, operators call their CUDA functions, and Triton compiles for sm_90 and binds
all arguments of each launch, down to cuLaunchKernelEx, which does nothing (recorder.c). What a GPU
adds is not here: about 3 µs of that function, and the thread in which autograd runs a GPU's
backward pass. Beside it F.cross_entropy of F.linear, kernels on the CPU included, for orientation.
Medians of interleaved rounds.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import triton
from fastmem.kernels import tiles
from numpy.typing import NDArray
from recorder import Recorder
from torch import Tensor
from torch.nn import functional as F

from fastmem.likelihood import backends, operators
from fastmem.likelihood.api import token_bits

SHAPES = {
    "128 x 64 x 2048, bf16": (128, 64, 2048, torch.bfloat16),
    "128 x 64 x 50257, bf16": (128, 64, 50257, torch.bfloat16),  # a split vocabulary
    "128 x 528 x 2048, bf16": (128, 528, 2048, torch.bfloat16),  # descriptors
}


FIXED = ["function", "grid", "threads", "shared", "parameters"]
LEAST_ADDRESS = 1 << 40
"""Above each number that is not an address."""


def use_the_gpus_functions() -> None:
    """Sends CPU tensors to the functions of a GPU, directly and through both operators."""
    operators.DIRECT["cpu"] = operators.of_gpu
    tiles.multiprocessors = lambda device: 132  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for op, function in (
            (operators.BITS, operators._flat(backends.cuda_bits)),
            (operators.BACKWARD, operators._flat_backward(backends.cuda_backward)),
        ):
            operators.LIBRARY.impl(op._schema.name, function, "CPU", allow_override=True)  # type: ignore[no-untyped-call]


def calls(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable[[], object]]:
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]

    def both(loss: Callable[..., Any]) -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves, targets).mean().backward()

    def theirs(hidden: Any, weight: Any, targets: Any) -> Any:
        return F.cross_entropy(F.linear(hidden, weight), targets)

    return {
        "forward": lambda: token_bits(hidden, weight, targets),
        "forward, mean, backward": lambda: both(token_bits),
        "F.cross_entropy: forward": lambda: theirs(hidden, weight, targets),
        "F.cross_entropy: forward, backward": lambda: both(theirs),
    }


def same(first: NDArray[Any], again: NDArray[Any], inputs: Sequence[Tensor]) -> bool:
    """True if two lists of launches differ in the addresses of fresh memory alone."""
    if len(first) != len(again) or not np.array_equal(first[FIXED], again[FIXED]):
        return False
    pairs = np.stack([first["values"], again["values"]])
    pairs = pairs[:, pairs[0] != pairs[1]]
    fresh = (pairs > LEAST_ADDRESS) & ~np.isin(pairs, [x.data_ptr() for x in inputs])
    return bool(fresh.all() and (pairs[0] % 16 == pairs[1] % 16).all())


def seconds(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--times", type=int, default=30, help="calls of a round")
    parser.add_argument(
        "--quick", action="store_true", help="two rounds of two calls, of two shapes"
    )
    given = parser.parse_args(arguments)
    if given.quick:
        given.rounds, given.times = 2, 2
    torch.set_num_threads(1)
    use_the_gpus_functions()
    recorder = Recorder()
    rows = []
    for shape, sizes in list(SHAPES.items())[:: 2 if given.quick else 1]:
        N, D, V, dtype = sizes
        inputs = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype), torch.randint(V, (N,))
        named = calls(*inputs)
        launches = {}
        for name, call in named.items():
            # Triton binds the arguments of the first launch, kernels/launch.py those of the next.
            first, again = recorder.launches(call), recorder.launches(call)
            launches[name] = len(again)
            assert same(first, again, inputs), (name, first, again)
        took: dict[str, list[float]] = {name: [] for name in named}
        for _ in range(given.rounds):
            for name, call in named.items():
                took[name].append(seconds(call, given.times))
        for name, each in took.items():
            microseconds = 1e6 * median(each)
            rows.append({
                "shape": shape, "call": name, "microseconds": microseconds,
                "launches": launches[name],
            })  # fmt: skip
            print(f"{shape}: {name}: {microseconds:.0f} µs, {launches[name]} launches")
    if given.json:
        found = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
