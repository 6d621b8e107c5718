"""GPT against the printed parameter counts and against transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fastmem
from fastmem import GPT, GPTConfig

SMALL = GPTConfig(layers=2, width=12, heads=3, vocab=50, length=9)


@pytest.mark.parametrize(
    ("layers", "width", "vocab", "parameters"),
    [
        (1, 32, 2048, 80_352),
        (1, 64, 2048, 185_280),
        (1, 128, 2048, 468_864),
        (2, 32, 2048, 93_056),
        (2, 128, 2048, 667_136),
        (2, 256, 2048, 2_120_704),
        (4, 64, 2048, 335_232),
        (4, 256, 2048, 3_700_224),
        (8, 32, 2048, 169_280),
        (8, 256, 2048, 6_859_264),
        (8, 32, 50257, 1_711_968),
        (8, 64, 50257, 3_620_544),
        (8, 128, 50257, 8_027_520),
        (8, 256, 50257, 19_200_768),
        (12, 768, 50257, 123_702_528),
        (48, 1600, 50257, 1_556_075_200),
    ],
)
def test_published_parameter_counts(layers: int, width: int, vocab: int, parameters: int) -> None:
    """Fails if a bias, a norm or the tied head is miscounted: the printed counts of the paper, S =
    64."""
    config = GPTConfig(layers, width, heads=4, vocab=vocab, length=64)
    assert config.parameter_count == parameters
    assert GPT(config, device="meta").parameter_count == parameters


def hugging_face(config: GPTConfig) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab,
            n_positions=config.length,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    for parameter in model.parameters():  # biases and norms are tested too only if not 0 and 1
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(config: GPTConfig, batch: int = 3) -> torch.Tensor:
    sequences = fastmem.UniformSequences(batch, config.length, config.vocab)
    return torch.from_numpy(sequences[:].astype("int64"))


def test_outputs_of_transformers_from_its_folder(tmp_path: Path) -> None:
    """Fails if a weight lands elsewhere, or an operation differs from GPT2LMHeadModel."""
    theirs = hugging_face(SMALL)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_hf(tmp_path)
    assert ours.config == SMALL
    batch = tokens(SMALL)
    with torch.no_grad():
        logits = ours(batch) @ ours.head.T
        assert torch.allclose(logits, theirs(batch).logits, atol=1e-4)


def test_round_trip_through_transformers(tmp_path: Path) -> None:
    """Fails if transformers cannot load the folder of to_hf, or loses a weight."""
    ours = GPT(SMALL, seed=3)
    ours.to_hf(tmp_path / "ours")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    batch = tokens(SMALL)
    with torch.no_grad():
        assert torch.allclose(ours(batch) @ ours.head.T, theirs(batch).logits, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = GPT.from_hf(tmp_path / "theirs")
    for name, parameter in ours.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter), name


def test_token_bits_is_the_loss_of_transformers() -> None:
    """Fails if targets are not shifted by one, or the first token is counted."""
    ours = GPT(SMALL)
    batch = tokens(SMALL)
    logits = ours(batch) @ ours.head.T
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    bits = ours.token_bits(batch)
    assert bits.shape == (3, SMALL.length - 1)
    assert torch.allclose(bits.mean() * torch.tensor(2.0).log(), loss, atol=1e-5)


def test_a_token_sees_none_after_it() -> None:
    """Fails if attention is not causal: then memorization would be free."""
    model = GPT(SMALL)
    batch = tokens(SMALL)
    changed = batch.clone()
    changed[:, 5] = (changed[:, 5] + 1) % SMALL.vocab
    with torch.no_grad():
        assert torch.equal(model(batch)[:, :5], model(changed)[:, :5])
        assert not torch.equal(model(batch)[:, 5:], model(changed)[:, 5:])


def test_initialization_is_gpt2s() -> None:
    """Fails if a standard deviation is off, or the projections are not scaled by 1/sqrt(2L)."""
    model = GPT(GPTConfig(layers=8, width=64, heads=4, vocab=500, length=32))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("out_proj.weight", "down_proj.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / (4 if residual else 1), rel=0.1)


def test_seeds() -> None:
    """Fails if a seed does not fix the weights, or two seeds share them."""
    assert torch.equal(GPT(SMALL, seed=1).head, GPT(SMALL, seed=1).head)
    assert not torch.equal(GPT(SMALL, seed=1).head, GPT(SMALL, seed=2**64 - 1).head)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "width 12 is not divisible by heads 5: try heads 4"),
        ({"layers": 0}, "layers must be an integer from 1 up, not 0"),
        ({"vocab": 2**31 + 1}, "vocab must be at most"),
        ({"width": 12.0}, r"width must be an integer from 1 up, not 12\.0"),
        ({"length": True}, "length must be an integer"),
    ],
)
def test_bad_config(change: dict[str, int], message: str) -> None:
    """Fails if an impossible shape is accepted, or fails later with a worse error."""
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**vars(SMALL), **change})


def test_bad_input(tmp_path: Path) -> None:
    """Fails if the error does not name an unavailable device, a long input or a foreign folder."""
    with pytest.raises(ValueError, match="device cuda:99 is unavailable"):
        GPT(SMALL, device="cuda:99")
    with pytest.raises(ValueError, match="device nonsense is unavailable"):
        GPT(SMALL, device="nonsense")
    with pytest.raises(ValueError, match="10 tokens, but the model has 9 positions"):
        GPT(SMALL)(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match="seed must be an integer from 0"):
        GPT(SMALL, seed=-1)
    with pytest.raises(ValueError, match="holds no GPT-2 model"):
        GPT.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="is a model of type 'llama', not 'gpt2'"):
        GPT.from_hf(tmp_path)
    theirs = hugging_face(SMALL)
    theirs.config.activation_function = "relu"
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="activation_function is 'relu', GPT needs 'gelu_new'"):
        GPT.from_hf(tmp_path)


def test_the_default_device_of_torch() -> None:
    """Fails if torch's default device is ignored, or an explicit device does not win inside it."""
    made = GPT(SMALL, seed=2)
    sequences = fastmem.UniformSequences(20, SMALL.length, SMALL.vocab)
    config, bits = fastmem.TrainConfig(steps=20), fastmem.sequence_bits(made, sequences)
    try:
        torch.set_default_device("meta")
        assert GPT(SMALL).device.type == "meta"
        model = GPT(SMALL, seed=2, device="cpu")
        assert torch.equal(model.head, made.head)
        assert np.array_equal(fastmem.sequence_bits(model, sequences), bits)
        assert fastmem.quantized(model, 8).device.type == "cpu"
        inside = fastmem.train(model, sequences, config, progress=False).memorized_bits
    finally:
        torch.set_default_device(None)
    assert inside == fastmem.train(made, sequences, config, progress=False).memorized_bits
    with torch.device("meta"):
        assert {p.device.type for p in GPT(SMALL).parameters()} == {"meta"}
        assert GPT(SMALL, device="cpu").device.type == "cpu"
        with torch.device("cpu"):
            assert torch.equal(GPT(SMALL, seed=2).head, GPT(SMALL, seed=2, device="cpu").head)


def test_folders_in_the_default_device(tmp_path: Path) -> None:
    """Fails if a folder is read to another device than the given one."""
    GPT(SMALL, seed=2).to_hf(tmp_path)
    with torch.device("meta"):
        assert torch.equal(GPT.from_hf(tmp_path, device="cpu").head, GPT(SMALL, 2, "cpu").head)
        with pytest.raises(ValueError, match="meta holds shapes, not numbers"):
            GPT.from_hf(tmp_path)


def test_a_default_device_that_is_unavailable() -> None:
    """Fails if it ends in another error than an unavailable device does."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    try:
        torch.set_default_device("cuda")
        with pytest.raises(ValueError, match="device by default is unavailable"):
            GPT(SMALL)
        assert GPT(SMALL, device="cpu").device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_inside_accelerates_empty_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if weights are allocated where each new parameter is moved to meta."""
    register = torch.nn.Module.register_parameter

    def on_meta(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:  # as accelerate.init_empty_weights does
            self._parameters[name] = torch.nn.Parameter(param.to("meta"))

    monkeypatch.setattr(torch.nn.Module, "register_parameter", on_meta)
    assert {p.device.type for p in GPT(SMALL).parameters()} == {"meta"}
    assert GPT(SMALL, device="cpu").device.type == "cpu"


def test_tokens_of_any_kind() -> None:
    """Fails if integers of another type, or tokens that are not a tensor, give other bits."""
    model, batch = GPT(SMALL), tokens(SMALL)
    bits = model.token_bits(batch)
    loader = torch.utils.data.DataLoader(fastmem.UniformSequences(3, SMALL.length, SMALL.vocab), 3)
    for given in (
        batch.to(torch.uint16),
        batch.to(torch.int32),
        batch.to(torch.uint8),
        batch.numpy(),
        batch.numpy().astype(">u4"),
        batch.tolist(),
        list(batch.numpy()),
        next(iter(loader)),
    ):
        assert torch.equal(model.token_bits(given), bits)
    for given, message in (
        (batch[0], r"not torch.int64 of shape \(9,\): use tokens\[None\] for one sequence"),
        (batch.float(), "not torch.float32 of shape"),
        (batch.bool(), "not torch.bool"),
        (3, r"of shape \(\)"),
        ([[1, 2], [3]], "not a list .*lists of one length"),
        ([["a", "b"]], "not a list"),
        (None, "not a NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            model.token_bits(given)  # type: ignore[arg-type]


def test_numbers_of_numpy() -> None:
    """Fails if a NumPy number is refused, or stays one where JSON and checkpoints need Python's."""
    config = GPTConfig(*(np.int64(value) for value in vars(SMALL).values()))
    assert config == SMALL
    assert {type(value) for value in vars(config).values()} == {int}
    assert torch.equal(GPT(config, seed=np.uint64(3)).head, GPT(SMALL, seed=3).head)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers must be an integer from 1 up, not True"):
        GPTConfig(np.bool_(True), 12, 3, 50, 9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layers must be an integer from 1 up, not 1\.0"):
        GPTConfig(np.float64(1), 12, 3, 50, 9)  # type: ignore[arg-type]
