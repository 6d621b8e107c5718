"""A training step of E models on their device: losses, gradients, update.

E models, B batch, S tokens a sequence.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmem import engine as engines
from fastmem.engine import Engine, Precision, one_thread
from fastmem.optimizer import RowOptimizer
from fastmem.profile import phase

WARMUP = 3
"""Steps that are taken one by one before they are captured: kernels are compiled, libraries loaded
and the optimizer's moments made in the first."""

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
            self._optimizer.set_rates(rates)
            self._optimizer.update()
        return losses


class GraphedStep(Step):
    """The same, from the fourth step on as one CUDA graph, which takes one launch.

    Tokens, rates, weights, gradients and moments stay where they are, so a replay reads what is
    there then. Where a capture fails, which changes none of them, steps go on one by one.
    """

    def __init__(self, engine: Engine, optimizer: RowOptimizer, capture: Capture) -> None:
        super().__init__(engine, optimizer)
        self._capture = capture
        self._taken = 0
        self._replay: Callable[[], object] | None = None
        self._failed = False

    def take(self, tokens: Tensor, rates: Sequence[float]) -> Tensor:
        if self._replay is None and not self._failed and self._taken >= WARMUP:
            self._replay = self._captured(tokens)
        self._taken += 1
        if self._replay is None:
            return super().take(tokens, rates)
        with phase("gradients and optimizer"):
            self._optimizer.set_rates(rates)
            self._replay()
        return self._losses

    def _captured(self, tokens: Tensor) -> Callable[[], object] | None:
        def work() -> None:
            self._losses = self._engine.compute(tokens)
            self._optimizer.update()

        try:
            return self._capture(work, tokens.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._failed = True
            warnings.warn(f"a step goes into no CUDA graph, so it is slower: {error}", stacklevel=2)
            return None


def cuda_graph(work: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """Captures what `work` launches, without doing it; called, the result does it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        work()
    return graph.replay


def is_graphed(device: torch.device, precision: Precision) -> bool:
    """Whether steps there are to be replayed. Numbers drawn for rounding are not captured."""
    if engines.STEP not in ("eager", "graph", "compiled"):
        raise ValueError(f"FASTMEM_STEP must be eager, graph or compiled, not {engines.STEP!r}")
    return device.type == "cuda" and engines.STEP != "eager" and precision != "bf16-stochastic"
