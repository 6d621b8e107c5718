"""Folders of transformers: what GPT.from_hf reads as transformers does, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from fastmem import GPT, GPTConfig

SHAPE = GPTConfig(layers=2, width=16, heads=4, vocab=32, length=8)
Config = dict[str, Any]
Weights = dict[str, torch.Tensor]


def edit(
    folder: Path,
    config: Callable[[Config], Any] = lambda c: c,
    weights: Callable[[Weights], Weights] = lambda w: w,
    shape: GPTConfig = SHAPE,
) -> Path:
    """A folder of to_hf with changes."""
    GPT(shape, seed=3).to_hf(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(config(json.loads(path.read_text()))))
    path = folder / "model.safetensors"
    save_file(weights(load_file(path)), path, {"format": "pt"})
    return folder


def same(folder: Path, shape: GPTConfig = SHAPE) -> bool:
    model, made = GPT.from_hf(folder), GPT(shape, seed=3)
    return model.config == shape and all(
        torch.equal(p, made.get_parameter(n)) for n, p in model.named_parameters()
    )


def own_head(w: Weights) -> Weights:
    return w | {"lm_head.weight": w["transformer.wte.weight"] + 0.1}


def equal_head(w: Weights) -> Weights:
    return w | {"lm_head.weight": w["transformer.wte.weight"].clone()}


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {k: v for k, v in values.items() if k not in names}


@pytest.mark.parametrize("tied", [True, False, None])
def test_a_head_of_its_own(tmp_path: Path, tied: bool | None) -> None:
    """Fails if a head that is not the token embedding is dropped, whatever config.json says, or an
    equal head is refused."""
    config = (
        without("tie_word_embeddings")
        if tied is None
        else lambda c: c | {"tie_word_embeddings": tied}
    )
    with pytest.raises(ValueError, match=r"lm_head\.weight is not wte\.weight, and GPT uses one"):
        GPT.from_hf(edit(tmp_path, config, own_head))
    assert same(edit(tmp_path, config, equal_head))
    assert same(
        edit(
            tmp_path,
            config,
            lambda w: w | {"lm_head.weight": w["transformer.wte.weight"].clone().double()},
        )
    )
    if tied is False:  # transformers initializes the head
        with pytest.raises(
            ValueError, match=r"tie_word_embeddings is false, and the files lack lm_h"
        ):
            GPT.from_hf(edit(tmp_path, config))
    with pytest.raises(ValueError, match=r"lm_head\.weight is not wte\.weight"):
        GPT.from_hf(edit(tmp_path, config, lambda w: w | {"lm_head.weight": torch.zeros(33, 16)}))


@pytest.mark.parametrize(
    ("left", "config"),
    [
        ("transformer.h.1", lambda c: c | {"n_layer": 1}),
        ("transformer.h.0.attn.c_attn.lora_A.weight", lambda c: c),
        ("h.0.attn.c_attn.base_layer.weight", lambda c: c),
        ("score.weight", lambda c: c),
        ("wte.weight", lambda c: c),
        ("transformer.h.0.attn.c_attn.weight.SCB", lambda c: c),
    ],
)
def test_weights_left_over(tmp_path: Path, left: str, config: Callable[[Config], Config]) -> None:
    """Fails if a layer, an adapter or another head in the files is dropped without a word."""
    more = {} if left == "transformer.h.1" else {left: torch.zeros(2, 16)}
    with pytest.raises(ValueError, match=f"does not use .* such as {left}.*: merge adapters"):
        GPT.from_hf(edit(tmp_path, config, lambda w: w | more))


def test_buffers_of_attention_are_no_weights(tmp_path: Path) -> None:
    """Fails if an old GPT-2 file, which holds the causal mask, is refused."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(2)}
    masks |= {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    assert same(edit(tmp_path, weights=lambda w: w | masks))
    bare = lambda w: {n.removeprefix("transformer."): t for n, t in w.items()} | masks  # noqa: E731
    assert same(edit(tmp_path, weights=bare))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_weights_of_another_type(tmp_path: Path, dtype: torch.dtype) -> None:
    """Fails if quantized weights are read as numbers."""
    name = "transformer.h.0.mlp.c_fc.weight"
    folder = edit(tmp_path, weights=lambda w: w | {name: w[name].to(dtype)})
    with pytest.raises(
        ValueError, match=f"h.0.mlp.c_fc.weight is {dtype}: save the model in float32"
    ):
        GPT.from_hf(folder)


GPT2 = GPTConfig(layers=12, width=24, heads=12, vocab=32, length=8)


def aliased(c: Config) -> Config:
    names = GPT2Config.attribute_map
    return {{v: k for k, v in names.items()}.get(name, name): value for name, value in c.items()}


@pytest.mark.parametrize(
    "config",
    [
        without("n_layer"),
        without("n_layer", "n_head"),
        aliased,
        lambda c: c | {"num_hidden_layers": 12},
        lambda c: c | {"n_inner": 96},
        lambda c: c | {"activation_function": "gelu_pytorch_tanh"},
        lambda c: c | {"activation_function": "gelu_fast"},
        without("activation_function", "layer_norm_epsilon", "scale_attn_weights", "n_inner"),
    ],
)
def test_configs_that_transformers_takes(
    tmp_path: Path, config: Callable[[Config], Config]
) -> None:
    """Fails if a default, an alias or another name of the same function is refused or read as
    another value."""
    folder = edit(tmp_path, config, shape=GPT2)
    assert same(folder, GPT2)
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        ours = GPT.from_hf(folder)
        torch.testing.assert_close(ours(tokens) @ ours.head.T, theirs(tokens).logits)


def test_the_default_shape_is_gpt2s(tmp_path: Path) -> None:
    """Fails if a default differs from GPT2Config's."""
    theirs = GPT2Config()
    defaults = without("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")
    with pytest.raises(
        ValueError, match=r"wte.weight has the shape \[32, 16\], not \[50257, 768\]"
    ):
        GPT.from_hf(edit(tmp_path, lambda c: defaults(c) | {"n_layer": 2}))
    with pytest.raises(ValueError, match="12 layers of 1 tensors"):
        GPT.from_hf(edit(tmp_path, defaults, lambda w: {"a": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"wpe.weight has the shape \[8, 16\], not \[1024, 16\]"):
        GPT.from_hf(edit(tmp_path, without("n_positions")))
    assert (theirs.n_layer, theirs.n_embd, theirs.n_head) == (12, 768, 12)
    assert (theirs.vocab_size, theirs.n_positions) == (50257, 1024)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"config.json holds \[\], not settings by name"),
        ("null", "config.json holds None"),
        ("7", "config.json holds 7"),
        ("", "holds no GPT-2 model: Expecting value"),
        ("\xff", "holds no GPT-2 model"),
        ("[" * 100_000, "holds no GPT-2 model"),
        ({"model_type": "llama"}, "is a model of type 'llama', not 'gpt2'"),
        ({}, "is a model of type None, not 'gpt2'"),
        ({"n_layer": None}, "config.json: layers must be an integer from 1 up, not None"),
        ({"n_embd": "16"}, "config.json: width must be an integer from 1 up, not '16'"),
        ({"n_embd": None, "n_inner": 4}, "config.json: width must be"),
        ({"n_layer": -2}, "layers must be an integer from 1 up, not -2"),
        ({"n_layer": 2.5}, r"layers must be an integer from 1 up, not 2\.5"),
        ({"n_layer": True}, "layers must be an integer from 1 up, not True"),
        ({"n_layer": 10**12}, "1000000000000 layers of 28 tensors"),
        ({"n_embd": 4 * 10**9}, "weights and config.json disagree"),
        ({"n_head": 3}, "width 16 is not divisible by heads 3"),
        ({"hidden_size": 32}, "n_embd is 16, and hidden_size 32"),
        ({"n_inner": 48}, "n_inner is 48, GPT needs None"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu', GPT needs 'gelu_new'"),
        ({"activation_function": []}, r"activation_function is \[\], GPT needs"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06, GPT needs 1e-05"),
        ({"add_cross_attention": True}, "add_cross_attention is True, GPT needs False"),
    ],
)
def test_damaged_configs(tmp_path: Path, text: str | Config, message: str) -> None:
    """Fails if a damaged config.json ends in another error than a ValueError of one line."""
    edit(tmp_path)
    path = tmp_path / "config.json"
    if isinstance(text, dict):
        kind = {} if "model_type" in text or not text else json.loads(path.read_text())
        text = json.dumps(kind | text)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as raised:
        GPT.from_hf(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_sharded_folder(tmp_path: Path) -> None:
    """Fails if a shard is not read, or a missing or foreign shard is not named."""
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ))  # fmt: skip
    theirs.save_pretrained(tmp_path, max_shard_size="6KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "model.safetensors").exists()
    ours, tokens = GPT.from_hf(tmp_path), torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens) @ ours.head.T, theirs.eval()(tokens).logits)
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    for changed, message in (
        (text.replace(shards[1].name, "../elsewhere.safetensors"), "is not the name of a file in"),
        ('{"weight_map": 7}', "index.json cannot be read"),
        ("[]", "index.json cannot be read"),
        ("{", "index.json cannot be read"),
    ):
        index.write_text(changed)
        with pytest.raises(ValueError, match=message):
            GPT.from_hf(tmp_path)
    index.write_text(text)
    shards[1].write_bytes(shards[1].read_bytes()[:50])
    with pytest.raises(ValueError, match=f"{shards[1].name} cannot be read .*: download"):
        GPT.from_hf(tmp_path)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"{shards[1].name} cannot be read .*No such file"):
        GPT.from_hf(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_pickle_is_refused_with_the_line_that_converts_it(tmp_path: Path, name: str) -> None:
    """Fails if a file that can run code is read, or the error lacks the way out."""
    edit(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*No such file"):
        GPT.from_hf(tmp_path)
    torch.save({}, tmp_path / name)
    with pytest.raises(
        ValueError, match=rf"holds {name}, .*from_pretrained\('.*save_pretrained\('"
    ):
        GPT.from_hf(tmp_path)


def test_what_is_not_a_folder(tmp_path: Path) -> None:
    """Fails if the name of a hub, or a file, ends in an error that does not say what to give."""
    edit(tmp_path)
    for name in ("openai-community/gpt2", tmp_path / "model.safetensors", tmp_path / "none"):
        with pytest.raises(ValueError, match=r"is not a directory: give the folder .* hf download"):
            GPT.from_hf(name)
