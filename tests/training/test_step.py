"""Steps that are captured and replayed, with a stand-in for a CUDA graph.

The stand-in records the operations that PyTorch dispatches, with the Python numbers and the tensors
of that moment, and undoes them. A replay runs the same operations on the current values of these
tensors. So it freezes what a real graph would freeze: a rate that is a Python number, a tensor that
is allocated anew. It does not show waits for a GPU, or memory that is freed after the capture.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases.train_cases import SHAPE, run, timeless, weights
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmem import GPT, Diverged, TrainConfig, UniformSequences, train_many
from fastmem.models.engine import PlainEngine
from fastmem.training import group as groups, trainer
from fastmem.training.group import Group
from fastmem.training.step import GraphedStep, is_graphed


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Graph(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for storage in (t.untyped_storage() for t in tensors((args, kwargs))):
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        for storage, before in self.before.values():
            storage.copy_(before)

    def replay(self) -> None:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.operations:
                inputs = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
                for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                    if old.untyped_storage().data_ptr() not in inputs:
                        old.copy_(new)


def recorded(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    graph = Graph()
    with graph:
        work()
    graph.undo()
    return graph.replay


def one_by_one(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    return work


def graphs(monkeypatch: pytest.MonkeyPatch, capture: Any = recorded) -> list[GraphedStep]:
    """Makes training use graphs; returns the list of steps made."""
    made: list[GraphedStep] = []

    def make(*args: Any) -> GraphedStep:
        made.append(GraphedStep(*args))
        return made[-1]

    monkeypatch.setattr(groups, "GraphedStep", make)
    monkeypatch.setattr(groups, "is_graphed", lambda *_: True)
    monkeypatch.setattr(groups, "cuda_graph", capture)
    return made


def distance(ours: bytes, theirs: bytes) -> float:
    difference = np.frombuffer(ours, np.float32) - np.frombuffer(theirs, np.float32)
    return float(np.abs(difference).max())


def trained(precision: Any) -> list[tuple[bytes, object]]:
    """Three models, two of one schedule; one ends before the others, so that steps are captured
    twice."""
    models = [GPT(SHAPE, seed) for seed in range(3)]
    sets = [UniformSequences(20, SHAPE.length, SHAPE.vocab, seed) for seed in range(3)]
    configs = [
        TrainConfig(
            steps=steps,
            seed=e,
            lr=lr,
            embedding_lr=2 * lr,
            batch=8,
            clip=0.5,
            precision=precision,
        )
        for e, (steps, lr) in enumerate([(12, 0.01), (25, 0.02), (25, 0.02)])
    ]
    results = train_many(models, sets, configs, progress=False)
    return [(weights(m.float()), timeless(r)) for m, r in zip(models, results, strict=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-true"])
def test_a_replayed_step_is_a_step(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Fails if a replay has the rate or the tokens of the captured step, the capture itself takes a
    step, or a run that ends takes along weights that other runs train."""
    monkeypatch.setattr(groups, "make_engine", PlainEngine)
    graphs(monkeypatch, one_by_one)
    expected = trained(precision)
    made = graphs(monkeypatch)
    assert trained(precision) == expected
    assert [step._replay is not None for step in made] == [True, True]


def test_rates_on_the_device_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a rate goes to another group; the rest of the difference is float32 against
    float64."""
    monkeypatch.setattr(groups, "make_engine", PlainEngine)
    expected = trained("fp32")
    graphs(monkeypatch, one_by_one)
    for (ours, _), (theirs, _) in zip(trained("fp32"), expected, strict=True):
        assert distance(ours, theirs) < 1e-3


def test_a_run_goes_on_by_graphs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a checkpoint lacks what a graph changes, or its moments are not used."""
    monkeypatch.setattr(groups, "make_engine", PlainEngine)
    config, checkpoint = TrainConfig(steps=30, batch=8), tmp_path / "checkpoint.pt"
    graphs(monkeypatch, one_by_one)
    model, _ = run(config)
    made = graphs(monkeypatch)
    monkeypatch.setattr(groups, "CHECKPOINT_SECONDS", 0.0)
    step, taken = GraphedStep.take, 0

    def interrupted(*args: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == 12:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as context:
        context.setattr(GraphedStep, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config, checkpoint=checkpoint)
    resumed, result = run(config, checkpoint=checkpoint)
    assert result.steps == 30
    assert len(made) == 2
    assert weights(resumed) == weights(model)


def test_what_cannot_be_captured_goes_on_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a failed capture ends the run, loses a step, or is tried again in each step."""
    monkeypatch.setattr(groups, "make_engine", PlainEngine)
    graphs(monkeypatch, one_by_one)
    model, _ = run(TrainConfig(steps=10))
    tries = []

    def refused(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        tries.append(device)
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs(monkeypatch, refused)
    with pytest.warns(UserWarning, match="CUDA graph capture failed.*not permitted when stream"):
        other, _ = run(TrainConfig(steps=10))
    assert len(tries) == 1
    assert weights(other) == weights(model)


def test_nothing_is_kept_of_a_group_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an engine or a step lives on, in a reference cycle or in the traceback of a diverged
    model: a graph keeps its memory, which the next graph needs."""
    made: list[weakref.ref[Any]] = []

    def engine(*args: Any) -> PlainEngine:
        one = PlainEngine(*args)
        made.append(weakref.ref(one))
        return one

    class Watched(Group):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(groups, "make_engine", engine)
    monkeypatch.setattr(trainer, "Group", Watched)
    steps = graphs(monkeypatch)
    sets = [UniformSequences(20, SHAPE.length, SHAPE.vocab, seed) for seed in range(3)]
    configs = [
        TrainConfig(steps=n, batch=8, lr=lr) for n, lr in ((12, 0.01), (60, 1e6), (60, 0.01))
    ]
    gc.collect()
    gc.disable()
    try:
        first, failed, last = train_many([GPT(SHAPE) for _ in sets], sets, configs, progress=False)
        made += [weakref.ref(step) for step in steps]
        steps.clear()
        assert [one() for one in made] == [None] * len(made)
    finally:
        gc.enable()
    assert isinstance(failed, Diverged)
    assert (first.steps, last.steps) == (12, 60)  # type: ignore[union-attr]
    assert len(made) == 7


@pytest.mark.parametrize(
    ("device", "precision", "graphed"),
    [
        ("cuda", "fp32", True),
        ("cuda:1", "bf16-mixed", True),
        ("cuda", "bf16-stochastic", True),
        ("cpu", "fp32", False),
    ],
)
def test_where_steps_are_replayed(
    device: str, precision: Any, graphed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a CPU would make a CUDA graph, or stochastic rounding by PyTorch's generator would
    be frozen in a graph."""
    monkeypatch.setattr("fastmem.training.fused_optimizer.DEVICES", ["cuda"])
    assert is_graphed(torch.device(device), precision) is graphed
    monkeypatch.setattr("fastmem.training.fused_optimizer.DEVICES", [])
    draws = precision == "bf16-stochastic"
    assert is_graphed(torch.device(device), precision) is (graphed and not draws)


def test_a_step_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a misspelt FASTMEM_STEP is accepted."""
    monkeypatch.setattr("fastmem.models.engine.STEP", "graphs")
    with pytest.raises(ValueError, match="must be eager, graph or compiled, not 'graphs'"):
        is_graphed(torch.device("cuda"), "fp32")
    monkeypatch.setattr("fastmem.models.engine.STEP", "eager")
    assert not is_graphed(torch.device("cuda"), "fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_a_compiled_model_learns_the_same(monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    """Fails if nothing is compiled, the compiler needs more than one graph or recompiles in each
    step, or the model learns otherwise. The compiler's own kernels are not generated here (backend
    "aot_eager")."""
    monkeypatch.setattr(groups, "make_engine", PlainEngine)
    config = TrainConfig(steps=10, precision=precision)
    expected, _ = run(config)
    compiler, graphs = torch.compile, []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    def traced(model: Any, mode: str, dynamic: bool) -> Any:
        return compiler(model, backend=backend, fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr("fastmem.models.engine.STEP", "compiled")
    model, _ = run(config)
    assert len(graphs) == 1
    assert distance(weights(model), weights(expected)) < (1e-3 if precision == "fp32" else 0.2)
