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
from fastmem.training.optimizer import RowOptimizer
from fastmem.training.profile import phase

WARMUP = 3
"""Steps that are taken one by one before they are captured. In the first, kernels are compiled,
libraries loaded and the optimizer's moments made; the others are for what is cached later."""

Capture = Callable[[Callable[[], None], torch.device], Callable[[], object]]


class Step:
    """Losses and gradients, then the update, one call after the other."""

    def __init__(self, engine: Engine, optimizer: RowOptimizer) -> None:
        self._engine, self._optimizer = engine, optimizer

    def take(self, tokens: Tensor, rates: Sequence[float]) -> Tensor:  # (E, B, S), (E,) → (E,)
        """Bits per token before the update of each model at its rate; valid until the next step.

        Every call must have the same tensor of tokens, with other numbers in it.
        """
        with phase("gradients"):
            losses = self._engine.compute(tokens)
        with phase("optimizer"), one_thread():
            self._optimizer.step(rates)
        return losses


class GraphedStep(Step):
    """The same, from the fourth step on as one CUDA graph.

    Tokens, rates, weights, gradients and moments stay where they are, so a replay reads what is
    there then. Where a capture fails, which changes none of them, steps go on one by one.
    """

    def __init__(self, engine: Engine, optimizer: RowOptimizer, capture: Capture) -> None:
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
        except RuntimeError as error:  # that of the capture's end hides what came before
            cause = error.__context__ or error
            warnings.warn(f"a step goes into no CUDA graph, so it is slower: {cause}", stacklevel=2)
            return None


def cuda_graph(work: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """Captures what `work` launches, without doing it; called, the result does it."""
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(device)
    with (
        torch.cuda.device(device),
        torch.cuda.stream(stream),  # which a graph does not give back if its own end fails
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        work()
    return graph.replay


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: PyTorch's own is of the device that came first, and each new one keeps
    memory for matrix products."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def is_graphed(device: torch.device, precision: Precision) -> bool:
    """Whether steps there are to be replayed; not those that draw numbers for rounding."""
    if engines.STEP not in ("eager", "graph", "compiled"):
        raise ValueError(f"FASTMEM_STEP must be eager, graph or compiled, not {engines.STEP!r}")
    return device.type == "cuda" and engines.STEP != "eager" and precision != "bf16-stochastic"
