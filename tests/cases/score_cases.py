"""A tokenizer of bytes and a small Llama, for the tests of scores."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = 256, 257
VOCAB = 264
POSITIONS = 32


def byte_tokenizer(bos: bool = True, adds: bool = True) -> PreTrainedTokenizerFast:
    """A token for each byte, <s> (256, if it has BOS) and </s>; `adds` puts <s> before a text."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {character: i for i, character in enumerate(sorted(alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab | {"<s>": BOS, "</s>": EOS}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    names: dict[str, Any] = {"eos_token": "</s>", **({"bos_token": "<s>"} if bos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def small_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def llama_folder(folder: Path) -> Path:
    """The small Llama with its tokenizer, as transformers saves them."""
    small_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def token_ids(text: str) -> list[int]:
    """The tokens of the byte tokenizer, without BOS."""
    ids = byte_tokenizer(adds=False)(text, split_special_tokens=True)["input_ids"]
    return [int(token) for token in ids]


def oracle_bits(
    model: LlamaForCausalLM, tokens: list[int], context: int = POSITIONS, stride: int | None = None
) -> NDArray[np.float64]:
    """Bits of all tokens but the first, from logits in float64, a window at a time."""
    exact = LlamaForCausalLM(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    found: list[float] = []
    end = min(len(tokens), context + 1)
    while len(found) < len(tokens) - 1:
        begin = max(0, end - 1 - context)
        with torch.no_grad():
            logits = exact(torch.tensor([tokens[begin : end - 1]])).logits[0]
        bits = -torch.log_softmax(logits, -1) / np.log(2)
        own = bits[torch.arange(end - 1 - begin), torch.tensor(tokens[begin + 1 : end])]
        found += own[len(found) - begin :].tolist()
        end = min(len(tokens), end + (stride or context))
    return np.asarray(found)
