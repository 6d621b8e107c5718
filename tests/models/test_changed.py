"""Models that were changed after they were made: each answer is that of the model's own forward
pass, or an error."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize, prune

from fastmem import (
    GPT,
    GPTConfig,
    TrainConfig,
    UniformSequences,
    quantized,
    sequence_bits,
    surviving_bits,
    train,
)
from fastmem.models.engine import is_fused

SHAPE = GPTConfig(layers=2, width=16, heads=4, vocab=64, length=12)
SET = UniformSequences(count=40, length=12, vocab=64)


def noisy() -> GPT:
    """A model whose biases and norms are not at their initial values."""
    model, generator = GPT(SHAPE), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model


@torch.no_grad()
def own_bits(model: GPT) -> Any:
    return model.token_bits(SET.to_torch()).double().sum(-1).numpy()


def set_again(model: Any) -> None:
    qkv = model.blocks[0].qkv
    weight = qkv.weight
    del qkv.weight
    qkv.weight = torch.nn.Parameter(weight.detach().clone())


def pruned(model: Any) -> None:
    prune.l1_unstructured(model.blocks[1].out_proj, "weight", amount=0.3)


def pruned_for_good(model: Any) -> None:
    pruned(model)
    prune.remove(model.blocks[1].out_proj, "weight")


def parametrized(model: Any) -> None:
    parametrize.register_parametrization(model.blocks[0].qkv, "weight", torch.nn.Identity())


def parametrized_once(model: Any) -> None:
    parametrized(model)
    parametrize.remove_parametrizations(model.blocks[0].qkv, "weight")


def skipped(model: Any) -> None:
    model.blocks[0].register_forward_hook(lambda module, inputs, output: inputs[0])


def doubled_input(model: Any) -> None:
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def other_eps(model: Any) -> None:
    model.norm.eps = 0.1


def other_heads(model: Any) -> None:
    model.blocks[0].heads = 2


def patched_forward(model: Any) -> None:
    model.forward = lambda tokens: GPT.forward(model, tokens) / 2


def patched_block(model: Any) -> None:
    model.blocks[0].forward = lambda x: x


def patched_bits(model: Any) -> None:
    model.token_bits = lambda tokens: GPT.token_bits(model, tokens) / 2


def renormalized(model: Any) -> None:
    model.token_embedding.max_norm = 0.5


def reversed_blocks(model: Any) -> None:
    model.blocks._modules = dict(reversed(model.blocks._modules.items()))


def shared_block(model: Any) -> None:
    model.blocks[1] = model.blocks[0]


def replaced_layer(model: Any) -> None:
    model.blocks[0].up_proj = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh())


def no_bias(model: Any) -> None:
    model.blocks[0].qkv.bias = None


def shadowed(model: Any) -> None:
    model.norm.__dict__["weight"] = torch.ones(16)


REGISTERED_AGAIN = [set_again, pruned_for_good, parametrized_once]
CHANGED = [
    pruned, parametrized, skipped, doubled_input, other_eps, other_heads, patched_forward,
    patched_block, patched_bits, renormalized, reversed_blocks, shared_block, replaced_layer,
    no_bias, shadowed,
]  # fmt: skip
Change = Callable[[Any], None]


@pytest.mark.parametrize("change", REGISTERED_AGAIN + CHANGED)
def test_bits_are_those_of_the_forward_pass(change: Change) -> None:
    """Fails if the core computes another function than the model, or takes numbers in the order of
    their registration."""
    model = noisy()
    change(model)
    np.testing.assert_allclose(sequence_bits(model, SET), own_bits(model), rtol=1e-5)
    assert is_fused(model, "fp32") == (change in REGISTERED_AGAIN)


@pytest.mark.parametrize("change", REGISTERED_AGAIN)
def test_weights_registered_again_are_trained(change: Change, tmp_path: Path) -> None:
    """Fails if weights are moved to other places in training, in a checkpoint or in rounding."""
    model, plain = noisy(), noisy()
    change(model)
    plain.load_state_dict(model.state_dict())
    survives = [surviving_bits(m, SET, (8,)) for m in (model, plain)]
    assert survives[0] == survives[1]
    paths = [tmp_path / "model", tmp_path / "plain"]
    results = [
        train(m, SET, TrainConfig(steps=30), path, progress=False)
        for m, path in zip((model, plain), paths, strict=True)
    ]
    assert results[0].memorized_bits == results[1].memorized_bits
    resumed = noisy()
    change(resumed)
    train(resumed, SET, TrainConfig(steps=30), paths[0], progress=False)
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
        assert torch.equal(resumed.get_parameter(name), parameter), name


@pytest.mark.parametrize("change", CHANGED)
def test_training_refuses_what_it_would_ignore(change: Change) -> None:
    """Fails if a hook, a mask or a changed setting is ignored in training."""
    model = noisy()
    change(model)
    before = copy.copy(model.state_dict())
    with pytest.raises(ValueError, match=r"would ignore the .*: remove hooks, masks and wrappers"):
        train(model, SET, TrainConfig(steps=5), progress=False)
    for name, tensor in model.state_dict().items():
        assert tensor is before[name] or torch.equal(tensor, before[name])


def test_what_does_not_change_the_function_is_taken() -> None:
    """Fails if a note on a model, its mode or a removed hook makes it slow or refuses training."""
    model = noisy()
    model.note = "first"  # type: ignore[assignment]
    model.eval()
    model.blocks[0].register_forward_hook(lambda *_: None).remove()
    model.norm.register_full_backward_hook(lambda *_: None).remove()
    model.register_state_dict_post_hook(lambda *_: None)
    assert is_fused(model, "fp32")
    assert is_fused(copy.deepcopy(model), "fp32")
    train(model, SET, TrainConfig(steps=2), progress=False)


def test_global_changes_are_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the core is used where a hook of all modules, or a replaced class method, counts."""
    model = noisy()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: 2 * output if isinstance(module, torch.nn.Linear) else None
    )
    try:
        hooked = sequence_bits(model, SET)
        np.testing.assert_allclose(hooked, own_bits(model), rtol=1e-5)
    finally:
        handle.remove()
    plain = sequence_bits(model, SET)
    assert not np.allclose(hooked, plain)
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", lambda self, x: x)
    np.testing.assert_allclose(sequence_bits(model, SET), own_bits(model), rtol=1e-5)
    assert not np.allclose(sequence_bits(model, SET), plain)


def test_a_subclass_is_asked() -> None:
    """Fails if a subclass of GPT is scored or trained as a GPT."""

    class Half(GPT):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens) / 2

    model = Half(SHAPE)
    np.testing.assert_allclose(sequence_bits(model, SET), own_bits(model), rtol=1e-5)
    with pytest.raises(ValueError, match="would ignore the class Half"):
        train(model, SET, TrainConfig(steps=5), progress=False)


def test_files_and_rounding_refuse_a_mask(tmp_path: Path) -> None:
    """Fails if a folder without the mask is written, or a copy without the mask is rounded."""
    model = noisy()
    pruned(model)
    with pytest.raises(ValueError, match=r"does not hold the parameters .* of blocks.1.out_proj"):
        model.to_hf(tmp_path / "masked")
    with pytest.raises(ValueError, match=r"not those of a GPT \(blocks.1.out_proj.weight, "):
        quantized(model, 8)
    with pytest.raises(ValueError, match=r"cannot be copied .* convert it with model.to\(torch.bf"):
        sequence_bits(model, SET, "bf16-true")
    other = noisy()
    other_eps(other)
    with pytest.raises(ValueError, match="does not hold the eps of norm: "):
        other.to_hf(tmp_path / "eps")
    assert not list(tmp_path.iterdir())
    skipped(hooked := noisy())
    hooked.to_hf(tmp_path / "hooked")  # weights are what a folder holds


def test_weights_that_share_memory_are_not_trained() -> None:
    """Fails if training unties them without a word."""
    tied, once = noisy(), noisy()
    once.blocks[1].qkv.weight = once.blocks[0].qkv.weight  # type: ignore[index, union-attr]
    tied.blocks[1].qkv.weight.data = tied.blocks[0].qkv.weight.data  # type: ignore[index, union-attr]
    for model in (tied, once):
        np.testing.assert_allclose(sequence_bits(model, SET), own_bits(model), rtol=1e-5)
        with pytest.raises(ValueError, match="two parameters share memory: clone one"):
            train(model, SET, TrainConfig(steps=5), progress=False)
