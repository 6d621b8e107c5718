"""Small random models of transformers, and a tokenizer trained here, for the tests of hosts."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = {"bos_token_id": 0, "eos_token_id": 0}
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    **WORDS,
}
GQA = SHAPE | {"num_key_value_heads": 2}
KINDS = {
    "gpt2": lambda v: GPT2Config(
        **WORDS, vocab_size=v, n_positions=64, n_embd=32, n_layer=2, n_head=4
    ),
    "llama": lambda v: LlamaConfig(vocab_size=v, **GQA, tie_word_embeddings=False),
    "gemma2": lambda v: Gemma2Config(vocab_size=v, **GQA, head_dim=8, final_logit_softcapping=0.5),
    "cohere": lambda v: CohereConfig(vocab_size=v, **GQA, logit_scale=0.25),
    "granite": lambda v: GraniteConfig(vocab_size=v, **GQA, logits_scaling=4.0),
    "phi": lambda v: PhiConfig(vocab_size=v, **GQA),  # with a bias
    "mixtral": lambda v: MixtralConfig(
        vocab_size=v, **GQA, num_local_experts=3, output_router_logits=True
    ),
}
TEXT = (
    "the cat sat on the mat and the dog sat on the log. a bird in the hand is worth two in the "
    "bush, they say: who are they? what is said twice is learned once, and what is learned once "
    "is soon lost! 0123456789 "
) * 8


def host_model(kind: str, vocab: int = 131, seed: int = 0) -> PreTrainedModel:
    """A model whose logits differ enough to tell one token from another."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(KINDS[kind](vocab), attn_implementation="eager")
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.data.normal_(0, 0.2)
        elif name.endswith("bias"):
            weight.data.normal_(0, 0.1)
    return model.eval()


def host_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens, of which token 0 begins and ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>"
    )
