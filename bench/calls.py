"""Microseconds of Python that a call of token_bits on a GPU costs, measured without a GPU.

    python bench/calls.py [--quick] [--json FILE]

Tensors are on the CPU, operators call their CUDA functions, and Triton compiles for sm_90 and binds
all arguments of each launch, for a driver whose launches do nothing. What a GPU adds is not here:
about 3 µs of cuLaunchKernelEx a launch, and the thread in which autograd runs a GPU's backward
pass. Beside it F.cross_entropy of F.linear, kernels on the CPU included, for orientation. Medians
of interleaved rounds.
"""

import argparse
import json
import time
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from fastmem.kernels import tiles
from torch import Tensor
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget

from fastmem.likelihood import backends, operators
from fastmem.likelihood.api import token_bits

SHAPES = {
    "128 x 64 x 2048, bf16": (128, 64, 2048, torch.bfloat16),
    "128 x 64 x 50257, bf16": (128, 64, 50257, torch.bfloat16),  # a split vocabulary
}
LAUNCHED: list[list[Any]] = []
"""Grid and arguments of each launch, tensors as their shapes and dtypes."""


def idle_driver(watching: list[bool]) -> Any:
    """A driver of an H100 whose launches do nothing but write LAUNCHED while `watching`."""

    class Launcher:
        def __init__(self, *_: Any) -> None:
            pass

        def __call__(self, *given: Any) -> None:
            if watching:
                values = given[:3] + given[9:]  # without stream, handles and hooks
                tensors = ((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in values)
                LAUNCHED.append(list(tensors))

    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *_: (1, 1, 0, 0, 1024),
    )
    return types.SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=Launcher,
        utils=utils,
    )


def use_the_gpus_functions(watching: list[bool]) -> None:
    """Sends CPU tensors to the functions of a GPU, directly and through both operators."""
    operators.DIRECT.add("cpu")
    triton.runtime.driver.set_active(idle_driver(watching))
    tiles.multiprocessors = lambda device: 132  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for op, function in (
            (operators.BITS, operators._flat(backends.cuda_bits)),
            (operators.BACKWARD, operators._flat_backward(backends.cuda_backward)),
        ):
            operators.LIBRARY.impl(op._schema.name, function, "CPU", allow_override=True)  # type: ignore[no-untyped-call]


def calls(N: int, D: int, V: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    hidden = torch.randn(N, D).to(dtype)
    weight = torch.randn(V, D).to(dtype)
    targets = torch.randint(V, (N,))
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


def launched(call: Callable[[], object], watching: list[bool]) -> list[list[Any]]:
    watching.append(True)
    LAUNCHED.clear()
    call()
    watching.clear()
    return LAUNCHED[:]


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
    parser.add_argument("--quick", action="store_true", help="two rounds of two calls")
    given = parser.parse_args(arguments)
    if given.quick:
        given.rounds, given.times = 2, 2
    torch.set_num_threads(1)
    watching: list[bool] = []
    use_the_gpus_functions(watching)
    rows = []
    for shape, sizes in list(SHAPES.items())[: 1 if given.quick else None]:
        named = calls(*sizes)
        launches = {}
        for name, call in named.items():
            first, again = launched(call, watching), launched(call, watching)
            # Triton binds the arguments of the first launch, kernels/launch.py those of the next.
            assert first == again, (name, first, again)
            launches[name] = len(again)
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
