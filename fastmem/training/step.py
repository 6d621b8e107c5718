"""A training step of E models on their device: losses, gradients, update.

E models, B batch, S tokens a sequence.
"""

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmem.models import engine as engines
from fastmem.models.engine import Engine, Precision, one_thread
from fastmem.training.fused_optimizer import FusedAdamW, is_fused
from fastmem.training.optimizer import RowAdamW
from fastmem.training.profile import phase
from fastmem.training.sharded_optimizer import ShardedAdamW

WARMUP = 3
"""Steps before the capture. The first compiles kernels, loads libraries and allocates the
optimizer's moments; the next two fill caches."""

Capture = Callable[[Callable[[], None], torch.device], Callable[[], object]]


class Step:
    """Losses and gradients, then the update, launched one by one."""

    def __init__(self, engine: Engine, optimizer: RowAdamW | FusedAdamW | ShardedAdamW) -> None:
        self._engine, self._optimizer = engine, optimizer

    def take(self, tokens: Tensor, rates: Sequence[float]) -> Tensor:  # (E, B, S), (E,) → (E,)
        """Updates each model at its learning rate; returns the bits per token before the update.

        Every call needs the same tensor of tokens, with new values. The result is valid until the
        next step.
        """
        with phase("gradients"):
            losses = self._engine.compute(tokens)
        with phase("optimizer"), one_thread():
            self._optimizer.step(rates)
        return losses


class GraphedStep(Step):
    """A step that is replayed as one CUDA graph from the fourth step on.

    Tokens, rates, weights, gradients and moments stay in the same tensors, so a replay reads their
    current values. A failed capture changes none of them; steps are then launched one by one.
    """

    def __init__(self, engine: Engine, optimizer: RowAdamW | FusedAdamW, capture: Capture) -> None:
        super().__init__(engine, optimizer)
        self._capture: Capture | None = capture
        self._replay: Callable[[], object] | None = None
        self._losses = torch.empty(0)
        self._taken = 0

    def take(self, tokens: Tensor, rates: Sequence[float]) -> Tensor:
        if self._capture is not None and self._taken == WARMUP:
            self._replay, self._capture = self._captured(self._capture, tokens), None
        self._taken += 1
        if self._replay is None:
            return super().take(tokens, rates)
        with phase("gradients and optimizer"):
            self._optimizer.set_rates(rates)
            self._replay()
        return self._losses

    def _captured(self, capture: Capture, tokens: Tensor) -> Callable[[], object] | None:
        def work() -> None:
            self._losses = self._engine.compute(tokens)
            self._optimizer.update()

        try:
            return capture(work, tokens.device)
        except RuntimeError as error:  # the end of a failed capture raises too, and hides the cause
            cause = error.__context__ or error
            message = "CUDA graph capture failed; training goes on without it, more slowly"
            warnings.warn(f"{message}: {cause}", stacklevel=2)
            return None


def cuda_graph(work: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """Captures the kernels that `work` launches, without running them; returns their replay."""
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(device)
    with (
        torch.cuda.device(device),
        torch.cuda.stream(stream),  # restores the current stream if the end of the capture fails
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        work()
    return graph.replay


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for each device: PyTorch's default capture stream is on the first device used, and
    each new stream keeps memory for matrix products."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def is_graphed(device: torch.device, precision: Precision) -> bool:
    """True if steps are replayed as CUDA graphs; False for steps that draw random numbers from a
    generator of PyTorch."""
    if engines.STEP not in ("eager", "graph", "compiled"):
        raise ValueError(f"FASTMEM_STEP must be eager, graph or compiled, not {engines.STEP!r}")
    draws = precision == "bf16-stochastic" and not is_fused(device)
    return device.type == "cuda" and engines.STEP != "eager" and not draws
