"""Engines against autograd and each other, and models together against models alone."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastmem import GPT, GPTConfig, UniformSequences
from fastmem.models.engine import (
    Engine,
    FusedEngine,
    PlainEngine,
    compute_in,
    flat,
    is_fused,
    make_engine,
    one_thread,
    stacked,
)

# Heads of width 1, 4 and all; several layers; a vocabulary and a length that no vector divides.
SHAPES = [
    GPTConfig(layers=1, width=8, heads=8, vocab=37, length=7),
    GPTConfig(layers=2, width=12, heads=3, vocab=64, length=9),
    GPTConfig(layers=3, width=16, heads=1, vocab=130, length=5),
]
ENGINES = [FusedEngine, PlainEngine]


def models(shape: GPTConfig, count: int = 3, dtype: torch.dtype = torch.float32) -> list[GPT]:
    """Untrained models whose norms, biases and logits are not at their initial values."""
    generator = torch.Generator().manual_seed(1)
    made = [GPT(shape, seed) for seed in range(count)]
    with torch.no_grad():
        for model in made:
            for parameter in model.parameters():
                noise = torch.empty(parameter.shape).normal_(0, 0.2, generator=generator)
                parameter.add_(noise)
    return [model.to(dtype) for model in made]


def batches(shape: GPTConfig, count: int = 3, batch: int = 6) -> torch.Tensor:
    sets = [UniformSequences(batch, shape.length, shape.vocab, seed) for seed in range(count)]
    return torch.stack([sequences.to_torch() for sequences in sets])


def by_autograd(shape: GPTConfig, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (E,) and gradients (E, P) in float64, one model at a time."""
    losses, gradients = [], []
    for model, batch in zip(models(shape, len(tokens), torch.float64), tokens, strict=True):
        loss = model.token_bits(batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    return torch.stack(losses), torch.stack(gradients)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_those_of_autograd_in_float64(engine: type[Engine], shape: GPTConfig) -> None:
    """Fails if a term of the forward or backward pass is wrong for any model, head or layer."""
    tokens = batches(shape)
    losses, gradients = by_autograd(shape, tokens)
    made = models(shape)
    computed = engine(made[0], stacked(made))  # type: ignore[call-arg]
    found = computed.compute(tokens)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=0)
    for row, expected in zip(computed.gradients.double(), gradients, strict=True):
        assert (row - expected).norm() <= 1e-5 * expected.norm()
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_plain_engine_in_float64(shape: GPTConfig) -> None:
    """Fails if the oracle differs from GPT: in float64 rounding hides nothing."""
    tokens = batches(shape)
    losses, gradients = by_autograd(shape, tokens)
    made = models(shape, dtype=torch.float64)
    plain = PlainEngine(made[0], stacked(made))
    torch.testing.assert_close(plain.compute(tokens), losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(plain.gradients, gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_bits_are_those_of_the_model(engine: type[Engine]) -> None:
    """Fails if the bits of a token land in another place, sequence or model."""
    shape = SHAPES[1]
    made, tokens = models(shape), batches(shape)
    bits = engine(made[0], stacked(made)).bits(tokens)  # type: ignore[call-arg]
    for row, model, batch in zip(bits, made, tokens, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(row, model.token_bits(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_sequences_shorter_than_the_model(engine: type[Engine]) -> None:
    """Fails if positions are taken from the end, or unused positions get a gradient."""
    shape = SHAPES[1]
    tokens = batches(replace(shape, length=4))
    losses, gradients = by_autograd(shape, tokens)
    made = models(shape)
    computed = engine(made[0], stacked(made))  # type: ignore[call-arg]
    torch.testing.assert_close(computed.compute(tokens).double(), losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(computed.gradients.double(), gradients, rtol=1e-3, atol=1e-6)
    unused = slice(shape.vocab * shape.width + 3 * shape.width, (shape.vocab + 9) * shape.width)
    assert not computed.gradients[:, unused].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_has_what_it_has_alone(engine: type[Engine]) -> None:
    """Fails if models that are computed together read each other's tokens or weights."""
    shape = SHAPES[1]
    tokens, made = batches(shape), models(shape)
    together = engine(made[0], stacked(made))  # type: ignore[call-arg]
    losses = together.compute(tokens).clone()
    for e, model in enumerate(models(shape)):
        alone = engine(model, stacked([model]))  # type: ignore[call-arg]
        torch.testing.assert_close(alone.compute(tokens[e : e + 1])[0], losses[e])
        torch.testing.assert_close(alone.gradients[0], together.gradients[e])


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_are_not_finite_harm_one_model(engine: type[Engine]) -> None:
    """Fails if a diverged model has a finite loss, or changes the loss of another."""
    shape = SHAPES[0]
    tokens, made = batches(shape), models(shape)
    with torch.no_grad():
        made[1].norm.bias[0] = torch.nan
    computed = engine(made[0], stacked(made))  # type: ignore[call-arg]
    losses, gradients = by_autograd(shape, tokens)
    found = computed.compute(tokens).double()
    assert found[1].isnan()
    for e in (0, 2):
        torch.testing.assert_close(found[e], losses[e], rtol=1e-5, atol=0)
        assert (computed.gradients[e].double() - gradients[e]).norm() <= 1e-5 * gradients[e].norm()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_is_that_of_the_model(precision: str) -> None:
    """Fails if the plain engine rounds where a single model does not, or does not round."""
    shape = GPTConfig(layers=2, width=32, heads=4, vocab=128, length=16)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    made, tokens = models(shape, 2, dtype), batches(shape, 2)
    expected, right = [], by_autograd(shape, tokens)[0]
    for model, batch in zip(made, tokens, strict=True):
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
        ):
            expected.append(model.token_bits(batch).mean().double())
    plain = PlainEngine(made[0], stacked(made), precision)  # type: ignore[arg-type]
    found = plain.compute(tokens).double()
    own_error = (torch.stack(expected) - right).abs().max()
    assert plain.gradients.dtype == dtype
    assert own_error > 1e-4
    assert (found - right).abs().max() <= 2 * own_error


def test_modules_are_views_of_rows() -> None:
    """Fails if an update of the rows does not reach a model, or a copy is made on the way."""
    made = models(SHAPES[1])
    expected = [flat(model) for model in made]
    state = {name: tensor.clone() for name, tensor in made[1].state_dict().items()}
    rows = stacked(made)
    assert rows.shape == (3, SHAPES[1].parameter_count)
    for row, copy in zip(rows, expected, strict=True):
        assert torch.equal(row, copy)
    for name, tensor in made[1].state_dict().items():
        assert torch.equal(tensor, state[name])
    rows[1].zero_()
    assert not any(parameter.any() for parameter in made[1].parameters())
    assert all(parameter.any() for parameter in (made[0].head, made[2].head))
    made[1].load_state_dict(state)
    assert torch.equal(rows[1], expected[1])


def test_which_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the core gets a model that it cannot compute, or is left out where it can."""
    model = GPT(SHAPES[0])
    assert type(make_engine(model, stacked([model]), "fp32")) is FusedEngine
    assert not is_fused(model, "bf16-mixed")
    assert not is_fused(GPT(SHAPES[0]).to(torch.bfloat16), "bf16-true")
    assert not is_fused(GPT(SHAPES[0]).double(), "fp32")
    longest = 2**15  # inputs that the core takes
    assert is_fused(GPT(replace(SHAPES[0], length=longest)), "fp32")
    assert not is_fused(GPT(replace(SHAPES[0], length=longest + 2)), "fp32")
    assert not is_fused(GPT(replace(SHAPES[0], vocab=2**31), device="meta"), "fp32")
    changed = GPT(SHAPES[0])
    changed.blocks[0].up_proj = torch.nn.Identity()  # type: ignore[index, assignment]
    assert not is_fused(changed, "fp32")
    monkeypatch.setattr("fastmem.models.engine.FUSED", False)
    assert type(make_engine(model, stacked([model]), "fp32")) is PlainEngine


def test_one_thread_and_then_as_before() -> None:
    """Fails if PyTorch has several threads inside, or fewer threads afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with one_thread():
        inside = torch.get_num_threads()
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert (inside, after) == (1, 2)


def test_a_device_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if training starts in a precision that the device lacks."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    for name in ("mps", "cuda"):
        with pytest.raises(ValueError, match=f"{name} has no bfloat16, which bf16-true needs: use"):
            compute_in("bf16-true", torch.device(name))
        compute_in("fp32", torch.device(name))
    with pytest.raises(ValueError, match="precision must be one of"):
        compute_in("fp8", torch.device("cpu"))  # type: ignore[arg-type]


def test_same_bytes_twice() -> None:
    """Fails if sums depend on the order of threads: then a resumed run ends elsewhere."""
    shape = GPTConfig(layers=2, width=32, heads=8, vocab=256, length=16)
    tokens, made = batches(shape, 2, 64), models(shape, 2)
    engine = FusedEngine(made[0], stacked(made))
    found = set()
    for _ in range(5):
        losses = engine.compute(tokens)
        found.add(losses.numpy().tobytes() + engine.gradients.numpy().tobytes())
    assert len(found) == 1
    assert np.isfinite(engine.gradients.numpy()).all()


def test_gradients_are_written_once() -> None:
    """Fails if the gradients of all weights are first made in another tensor of their size."""
    models = [GPT(GPTConfig(layers=2, width=12, heads=3, vocab=31, length=9)) for _ in range(3)]
    engine = PlainEngine(models[0], stacked(models))
    made = []

    class Watch(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == engine.gradients.shape:
                made.append((str(func), out.data_ptr() == engine.gradients.data_ptr()))
            return out

    with Watch():
        engine.compute(torch.randint(31, (3, 4, 9)))
    assert made == [("aten.cat.out", True)]


def test_a_compilation_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if FASTMEM_STEP=compiled takes its minute silently, or another step speaks of it."""
    model = GPT(GPTConfig(1, 8, 2, 16, 4))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for way, said in (("graph", False), ("compiled", True)):
        monkeypatch.setattr("fastmem.models.engine.STEP", way)
        PlainEngine(model, stacked([model]))
        assert ("FASTMEM_STEP=compiled: compiling" in capsys.readouterr().err) == said
