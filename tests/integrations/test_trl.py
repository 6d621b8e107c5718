"""Fused heads for TRL: what its own trainers compute, from our likelihood."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from cases.host_models import KINDS, TEXT, host_model, host_tokenizer
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head as their_head

from fastmem.integrations.transformers import patch, unpatch
from fastmem.integrations.trl import add_fused_lm_head, fused_heads

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def batch(vocab: int = 131) -> dict[str, Tensor]:
    tokens = torch.randint(vocab, (3, 17), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :9] = labels[2, 5] = labels[1, -1] = -100
    return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}


def run(model: Any, add: Any, inputs: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    """The output of a fused head, and gradients of a loss that uses all that has one."""
    model = copy.deepcopy(model)
    add(model, outputs=FIELDS, **settings)
    output = model(**inputs, fused_lm_head=True)
    (output.loss + output.log_probs[:, 1::2].sum() + output.entropy.square().sum()).backward()
    return output, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["plain", "temperature", "items", "shifted", "none left"])
@pytest.mark.parametrize("kind", KINDS)
def test_fields_and_gradients_are_those_of_trl(kind: str, how: str) -> None:
    """Fails if a field of FusedCausalLMOutput, or its gradient, is not what TRL's head gives."""
    model, inputs = host_model(kind), batch()
    settings: dict[str, Any] = {"cast_lm_head_to_fp32": True} if how == "plain" else {}
    if how == "temperature":
        settings["temperature"] = 0.7
    elif how == "items":
        inputs["num_items_in_batch"] = torch.tensor(77)
    elif how == "shifted":
        inputs["shift_labels"] = inputs.pop("labels").roll(-1, dims=1)
    elif how == "none left":
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    if kind == "mixtral":
        inputs["output_router_logits"] = True
    theirs, their_gradients = run(model, their_head, inputs, **settings)
    ours, our_gradients = run(model, add_fused_lm_head, inputs, **settings)
    assert list(ours) == list(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=2e-5)


def test_without_fused_lm_head_nothing_changes() -> None:
    """Fails if a call without fused_lm_head loses labels, logits or its loss."""
    model, inputs = host_model("llama"), batch()
    before = model(**inputs)
    add_fused_lm_head(model)
    after = model(**inputs)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)
    tokens = inputs["input_ids"]
    assert model.generate(tokens, max_new_tokens=2).shape == (3, 19)


def test_heads_of_two_trainers_and_a_patch(tmp_path: Path) -> None:
    """Fails if a second head on a model, or a patch below it, calls itself or the wrong one."""
    model, inputs = patch(host_model("llama")), batch()
    loss = model(**inputs).loss
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    add_fused_lm_head(model, temperature=0.5)
    assert model(**inputs).logits is None
    model = unpatch(copy.deepcopy(model))
    fused = model(**inputs, fused_lm_head=True)
    assert fused.entropy is None
    assert fused.loss > loss + 1e-3
    assert model(**inputs).logits is not None


def grpo(folder: Path, **settings: Any) -> Any:
    rows = [{"prompt": "the cat sat"}, {"prompt": "a bird in the"}]
    return GRPOTrainer(
        host_model("llama", 300),
        reward_funcs=lambda completions, **_: [float(len(c) % 5) for c in completions],
        args=GRPOConfig(
            str(folder), num_generations=2, max_completion_length=6, temperature=0.8, **settings
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=host_tokenizer(),
    )


def dpo(folder: Path, **settings: Any) -> Any:
    row = {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " is worth two."}
    return DPOTrainer(
        host_model("llama", 300),
        host_model("llama", 300, seed=1),
        args=DPOConfig(str(folder), **settings),
        train_dataset=Dataset.from_list([row] * 4),
        processing_class=host_tokenizer(),
    )


def sft(folder: Path, **settings: Any) -> Any:
    rows = [{"prompt": TEXT[i : i + 30], "completion": TEXT[i + 30 : i + 50]} for i in range(4)]
    return SFTTrainer(
        host_model("gemma2", 300),
        args=SFTConfig(str(folder), completion_only_loss=True, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=host_tokenizer(),
    )


def settings() -> dict[str, Any]:
    return {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }


def test_grpo_log_probabilities(tmp_path: Path) -> None:
    """Fails if GRPO's _get_per_token_logps_and_entropies gives other numbers with our head."""
    theirs = grpo(tmp_path, **settings())
    with fused_heads():
        ours = grpo(tmp_path, **settings())
    assert ours.model.forward.__module__ == "fastmem.integrations.trl"
    assert theirs.model.forward.__module__ != "fastmem.integrations.trl"
    inputs = batch(300)
    found = [
        trainer._get_per_token_logps_and_entropies(
            trainer.model, inputs["input_ids"], inputs["attention_mask"], 9, 2, compute_entropy=True
        )
        for trainer in (theirs, ours)
    ]
    assert found[0][0].shape == (3, 9)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [grpo, dpo, sft])
def test_trainers(make: Any, tmp_path: Path) -> None:
    """Fails if steps of a trainer have another loss or metric with our head than with TRL's."""
    logs = []
    for ours in (False, True):
        torch.manual_seed(0)
        more = {"entropy_coef": 0.1} if make is grpo else {}
        if ours:
            with fused_heads():
                trainer = make(tmp_path, **settings(), **more)
        else:
            trainer = make(tmp_path, **settings(), **more)
        trainer.train()
        times = ("runtime", "per_second", "step_time")
        logs.append([
            {k: v for k, v in row.items() if not k.endswith(times)}
            for row in trainer.state.log_history
        ])  # fmt: skip
    assert len(logs[0]) == 4
    assert "entropy" in logs[0][0]
    for theirs, ours in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5, nan_ok=True)


def test_the_name_is_theirs_again() -> None:
    """Fails if trainers that are made later, or after an error, have our head."""
    from trl.trainer import dpo_trainer, utils

    def fails() -> None:
        with fused_heads():
            assert dpo_trainer.add_fused_lm_head is utils.add_fused_lm_head is add_fused_lm_head
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert dpo_trainer.add_fused_lm_head is utils.add_fused_lm_head is their_head
