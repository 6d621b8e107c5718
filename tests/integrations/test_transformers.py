"""patch of transformers' models: losses, gradients and outputs as they were, without logits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

import transformers
from cases.host_models import KINDS, host_model
from transformers import Trainer, TrainingArguments

from fastmem.integrations.transformers import patch, unpatch


def batch(vocab: int = 131, seed: int = 1) -> dict[str, Tensor]:
    """Tokens, and labels that ignore some of them."""
    tokens = torch.randint(vocab, (3, 17), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[0, :9] = labels[2, 5] = labels[1, -1] = -100
    return {"input_ids": tokens, "labels": labels}


def both(model: Any, **inputs: Any) -> tuple[Any, Any, dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the model as it is, and of the model patched."""
    found = []
    for change in (unpatch, patch):
        change(model).zero_grad()
        output = model(**inputs)
        output.loss.backward()
        found.append((output, {n: p.grad.clone() for n, p in model.named_parameters()}))
    unpatch(model)
    return found[0][0], found[1][0], found[0][1], found[1][1]


@pytest.mark.parametrize("how", ["mean", "items", "tensor", "shifted", "none left"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_logits(kind: str, how: str) -> None:
    """Fails if the loss lacks the shift, -100, num_items_in_batch, a softcap, a scale, a bias or
    the loss of the experts, or if another field changes."""
    inputs: dict[str, Any] = batch()
    if how == "none left":
        inputs["labels"][:] = -100
        inputs["num_items_in_batch"] = 3
    elif how == "shifted":
        inputs["shift_labels"] = inputs["labels"].roll(-2, dims=1)
    elif how != "mean":
        inputs["num_items_in_batch"] = 77 if how == "items" else torch.tensor(77)
    theirs, ours, their_gradients, our_gradients = both(
        host_model(kind), **inputs, output_hidden_states=True
    )
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(our_gradients, their_gradients, rtol=1e-4, atol=2e-6)
    assert list(ours) == [name for name in theirs if name != "logits"]
    assert ours.logits is None
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, rtol=0, atol=0)


def test_positional_labels_and_tuples() -> None:
    """Fails if labels are found by their name alone, or a tuple keeps the empty logits."""
    model, inputs = host_model("gpt2"), batch()
    places = [inputs["input_ids"], None, None, None, None, None, None, None, inputs["labels"]]
    loss, *rest = model(*places, return_dict=False)
    ours, *others = patch(model)(*places, return_dict=False)
    torch.testing.assert_close(ours, loss)
    assert len(others) == len(rest) - 1
    assert not isinstance(others[0], Tensor)


def test_without_labels_nothing_changes() -> None:
    """Fails if a patched model makes other logits, generates other tokens or keeps a hook."""
    model, tokens = host_model("llama"), batch()["input_ids"]
    logits, generated = model(tokens).logits, model.generate(tokens, max_new_tokens=4)
    patch(model)
    model(tokens, labels=tokens)
    assert torch.equal(model(tokens).logits, logits)
    assert torch.equal(model.generate(tokens, max_new_tokens=4), generated)
    assert not model.lm_head._forward_pre_hooks
    assert "_loss_function" not in vars(model)


class Sizes(TorchDispatchMode):
    """The most rows of any tensor with V columns that an operation returns."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and value.ndim and value.shape[-1] == self.vocab:
                self.rows = max(self.rows, value.numel() // self.vocab)
        return result


@pytest.mark.parametrize("patched", [True, False])
def test_no_logits_are_made(patched: bool) -> None:
    """Fails if a training step makes a tensor of logits, or if this test would not see it."""
    model, inputs = host_model("llama", vocab=5003).train(), batch(5003)
    if patched:
        patch(model)
    with Sizes(5003) as sizes:
        model(**inputs).loss.backward()
    assert sizes.rows == (32 if patched else 51)  # 32: the matrix of the head, transposed


def trained(kind: str, folder: Path, patched: bool, **settings: Any) -> list[float]:
    """Losses of 50 steps of four batches each, and the loss of an evaluation at the end."""
    model = host_model(kind)
    data = [{k: v[0] for k, v in batch(seed=seed).items()} for seed in range(40)]
    for seed, row in enumerate(data):  # so that the mean of means is not the mean
        row["labels"][: seed % 13] = -100
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=50,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = Trainer(patch(model) if patched else model, arguments, train_dataset=data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return [*losses, trainer.evaluate(data)["eval_loss"]]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_trainer(kind: str, tmp_path: Path) -> None:
    """Fails if 50 steps with gradient accumulation have other losses than without patch."""
    losses = trained(kind, tmp_path, patched=True)
    assert len(losses) == 51
    assert losses[-1] < losses[0] - 0.1  # it trains
    assert losses == pytest.approx(trained(kind, tmp_path, patched=False), abs=1e-4)


def test_label_smoothing_is_the_trainers(tmp_path: Path) -> None:
    """Fails if Trainer's label smoothing finds no logits, or a loss that is not smoothed."""
    settings = {"label_smoothing_factor": 0.2}
    losses = trained("gpt2", tmp_path, patched=True, **settings)
    assert losses == pytest.approx(trained("gpt2", tmp_path, patched=False, **settings), abs=1e-6)
    assert losses[0] != pytest.approx(trained("gpt2", tmp_path, patched=True)[0], abs=1e-2)


def test_custom_losses_are_the_models() -> None:
    """Fails if a loss that the user set is replaced."""
    model, inputs = host_model("gpt2"), batch()
    patch(model).loss_function = lambda logits, labels, **_: logits.mean()
    assert model(**inputs).loss == model(**inputs).logits.mean()
    with pytest.raises(ValueError, match="GPT2LMHeadModel computes <lambda>: patch takes the"):
        patch(unpatch(model))


def test_a_token_outside_of_the_vocabulary_is_an_error() -> None:
    """Fails if such a label makes a NaN, which Trainer's log hides."""
    model, inputs = patch(host_model("gpt2")), batch()
    inputs["labels"][1, 4] = 131
    with pytest.raises(ValueError, match=r"target at .* is 131"):
        model(**inputs)


def test_undone() -> None:
    """Fails if unpatch leaves anything that changes a call, or undoes what others have wrapped."""
    model, inputs = host_model("gpt2"), batch()
    assert unpatch(patch(patch(model))) is model
    assert "forward" not in vars(model)
    patch(model)
    ours, calls = model.forward, []
    model.forward = lambda *args, **kwargs: calls.append(1) or ours(*args, **kwargs)  # accelerate
    assert model(**inputs).logits is None
    unpatch(model)
    assert model(**inputs).logits is not None
    assert patch(model)(**inputs).logits is None
    assert calls


def test_a_copy_is_its_own_model() -> None:
    """Fails if a deep copy, as TRL makes it for a reference model, calls the first model."""
    model, inputs = patch(host_model("gpt2")), batch()
    other = copy.deepcopy(model)
    before = other(**inputs).loss
    other.transformer.wte.weight.data.mul_(2)
    assert other(**inputs).loss != before
    assert model(**inputs).loss == before
    model(**inputs).loss.backward()
    assert other.transformer.wte.weight.grad is None


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_adapters() -> None:
    """Fails if a model inside PEFT is not patched, or an adapter on the head is overlooked."""
    peft = pytest.importorskip("peft")
    lora = {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False}
    model = peft.get_peft_model(
        host_model("llama"), peft.LoraConfig(target_modules=["q_proj"], **lora)
    )
    inputs = batch()
    loss = model(**inputs).loss
    output = patch(model)(**inputs)
    torch.testing.assert_close(output.loss, loss)
    assert output.logits is None
    assert unpatch(model)(**inputs).logits is not None
    lora["init_lora_weights"] = True  # adds nothing before it is trained
    model = host_model("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], **lora))
    with pytest.raises(ValueError, match=r"head of LlamaForCausalLM is peft\..*, not a plain"):
        patch(adapted)
    model = patch(host_model("llama"))
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], **lora))
    with pytest.raises(RuntimeError, match="replaced after it was patched"):
        model(**inputs)


def test_larger_vocabularies_need_another_patch() -> None:
    """Fails if tokens that are added after patch are left out of the softmax."""
    model, inputs = patch(host_model("gpt2")), batch()
    model.resize_token_embeddings(140, mean_resizing=False)
    with pytest.raises(RuntimeError, match="replaced after it was patched"):
        model(**inputs)
    theirs, ours, *_ = both(model, **inputs)
    torch.testing.assert_close(ours.loss, theirs.loss)


def test_a_loss_of_its_own() -> None:
    """Fails if a model that does not use loss_function is patched, or refused but changed."""
    config = transformers.BartConfig(
        vocab_size=50, d_model=16, decoder_layers=1, decoder_attention_heads=2,
        decoder_ffn_dim=16, max_position_embeddings=16, is_encoder_decoder=False,
    )  # fmt: skip
    model = transformers.BartForCausalLM(config).eval()
    tokens = torch.arange(8)[None]
    before = model(input_ids=tokens, labels=tokens).loss
    with pytest.raises(ValueError, match="BartForCausalLM does not compute its loss by loss_fun"):
        patch(model)
    assert torch.equal(model(input_ids=tokens, labels=tokens).loss, before)


def test_what_is_refused() -> None:
    """Fails if a model that cannot be patched is patched, or the message lacks the reason."""
    with pytest.raises(ValueError, match="Sequential is not a model of transformers"):
        patch(torch.nn.Sequential(host_model("gpt2")))
    model = host_model("gpt2")
    original = type(model).forward
    model.forward = lambda *a, **k: _squared(original(model, *a, **k))
    with pytest.raises(ValueError, match="by more than a scale and a softcap"):
        patch(model)


def _squared(output: Any) -> Any:
    output.logits = output.logits**2
    return output
