"""Extraction from one pass against models that really decode, and against float64 logits."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases.causal_models import model_of
from numpy.typing import NDArray
from torch import Tensor, nn

import fastmem
from fastmem.models.causal.sampling import Way, sampling_bits
from fastmem.models.extraction.decode import greedy_tokens
from fastmem.models.extraction.measure import Columns, Cursor, Plan, measured_chunks
from fastmem.models.scoring.document_tokenizer import TokenizedDocument

S = 12


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """All logits, as each library gives them."""
    with torch.no_grad():
        if isinstance(model, fastmem.GPT):
            return model(tokens) @ model.head.T
        return model(tokens).logits


def decoded(model: nn.Module, prefix: Tensor, length: int) -> Tensor:
    """Greedy decoding from full logits, one token after another, of equal logits the first."""
    while prefix.shape[1] < length:
        best = logits_of(model, prefix)[:, -1].argmax(-1, keepdim=True)
        prefix = torch.cat([prefix, best], dim=1)
    return prefix


def with_ties(model: nn.Module) -> nn.Module:
    """The model with pairs of equal rows in its output matrix, so that their logits are equal."""
    weight: Any = (
        model.head if isinstance(model, fastmem.GPT) else model.get_output_embeddings().weight  # type: ignore[operator]
    )
    with torch.no_grad():
        weight[1::2] = weight[0::2]
    return model


def gpt() -> nn.Module:
    model = fastmem.GPT(fastmem.GPTConfig(2, 16, 4, vocab=20, length=S), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim == 2 else 1)
    return model


def near_sequences(model: nn.Module, count: int, vocab: int) -> Tensor:  # (count, S)
    """Greedy continuations of random tokens, of which some are then changed, some to their tie."""
    generator = torch.Generator().manual_seed(5)
    tokens = decoded(model, torch.randint(vocab, (count, 2), generator=generator), S)
    for row in range(count):
        for _ in range(row % 3):
            place = int(torch.randint(1, S, (1,), generator=generator))
            tokens[row, place] ^= 1
            if row % 2:  # and goes on as the model would
                tokens[row : row + 1] = decoded(model, tokens[row : row + 1, : place + 1], S)
    return tokens


def measured(
    lm: fastmem.CausalLM, tokens: NDArray[Any] | list[NDArray[Any]], plan: Plan, added: int = 0
) -> Columns:
    documents = [
        TokenizedDocument(f"{i}", row, added, None, None, None, 0.0) for i, row in enumerate(tokens)
    ]
    chunks = [c for c, _ in measured_chunks(lm, documents, plan, Cursor(), lambda *_: None)]
    return {
        name: np.concatenate([c[name] for c in chunks]) for name in chunks[0] if name != "source"
    }


def plan_of(*prefixes: int, **options: Any) -> Plan:
    defaults: dict[str, Any] = {
        "suffix": None, "ways": (Way(1.0),), "decode": False, "stride": None,
        "batch_tokens": 64, "chunk_tokens": 500,
    }  # fmt: skip
    return Plan(prefixes=prefixes, **defaults | options)


@pytest.mark.parametrize("name", ["fastmem", "Llama", "GPT2", "Gemma2"])
def test_one_pass_is_real_decoding(name: str) -> None:
    """Fails if real decoding, ties included, returns a suffix that greedy_from denies for any
    prefix length, or the reverse; or if longest_match or an edit distance differs."""
    model = with_ties(gpt() if name == "fastmem" else model_of(name))
    lm = fastmem.CausalLM(model)
    tokens = near_sequences(model, 60, min(lm.vocab, 100))
    prefixes = tuple(range(1, S))
    columns = measured(lm, tokens.numpy(), plan_of(*prefixes, decode=True))
    for prefix in prefixes:
        real = decoded(model, tokens[:, :prefix], S)
        exact = (real == tokens).all(1).numpy()
        assert np.array_equal(columns["greedy_from"] <= prefix, exact)
        matched = (real == tokens)[:, prefix:].long().cumprod(1).sum(1).numpy()
        assert np.array_equal(columns[f"matched_{prefix}"], matched)
        assert np.array_equal(columns[f"distance_{prefix}"] == 0, exact)
        ours = greedy_tokens(lm, tokens[:, :prefix], S - prefix)
        assert torch.equal(ours, real[:, prefix:])
    assert len(set(columns["greedy_from"].tolist())) > 5
    changed = tokens.clone()
    changed[:, -1] ^= 1  # the tie of the greedy token is not the greedy token
    last = measured(lm, changed.numpy(), plan_of(1))["greedy_from"] == S
    assert last[(columns["greedy_from"] < S) & (tokens[:, -1] % 2 == 0).numpy()].all()


def expected_bits(logits: Tensor, targets: Tensor, way: Way) -> Tensor:
    """Bits by sorting all logits, in float64."""
    z = logits.double() / way.temperature
    if way.top_k is not None:
        order = z.argsort(-1, descending=True)
        outside = torch.ones_like(z, dtype=torch.bool).scatter(-1, order[..., : way.top_k], False)
        z = z.masked_fill(outside, -math.inf)
    log_p = torch.log_softmax(z, -1).gather(-1, targets[..., None])[..., 0]
    return -log_p / math.log(2)


WAYS = [Way(1.0), Way(0.5), Way(2.0), Way(1.0, 1), Way(0.7, 5), Way(1.0, 10_000)]


@pytest.mark.parametrize("through", ["hidden", "logits"])
@pytest.mark.parametrize("name", ["fastmem", "Gemma2", "Granite", "Phi"])
def test_sampling_bits_are_those_of_float64_logits(name: str, through: str) -> None:
    """Fails if a way of sampling forgets a softcap, a scale, a bias, the order of temperature and
    top-k, or counts a token outside of the top k."""
    model = gpt() if name == "fastmem" else model_of(name)
    if name == "fastmem" and through == "logits":
        return  # a GPT as made is never scored through its logits
    lm = fastmem.CausalLM(model)
    tokens = torch.randint(min(lm.vocab, 100), (5, S), generator=torch.Generator().manual_seed(0))
    lm.token_stats(tokens[:, :-1], tokens[:, 1:])
    lm.through = through
    targets = tokens[:, 1:].clone()
    targets[:, :3] = -100
    logits = logits_of(model, tokens[:, :-1])
    for way, bits in zip(WAYS, sampling_bits(lm, tokens[:, :-1], targets, WAYS), strict=True):
        expected = expected_bits(logits, tokens[:, 1:], way)
        expected[:, :3] = 0
        assert torch.equal(bits.isinf(), expected.isinf()), way
        finite = ~expected.isinf()
        assert (bits[finite] - expected[finite]).abs().max() < 1e-3, way


def test_suffix_bits_of_any_lengths_and_batches() -> None:
    """Fails if the bits of a suffix depend on the batch, a BOS shifts the prefix, or a short
    sequence has bits."""
    lm = fastmem.CausalLM(model_of("Llama"))
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 100, n) for n in (0, 1, 4, 5, 9, 30, 12)]
    plan = plan_of(4, 8, ways=(Way(1.0), Way(0.5)))
    whole, parts = (
        measured(lm, rows, plan),
        measured(lm, rows, plan_of(4, 8, ways=plan.ways, batch_tokens=1, chunk_tokens=1)),
    )
    for name in whole:
        np.testing.assert_allclose(whole[name], parts[name], rtol=1e-4, atol=1e-4)
    for prefix in (4, 8):
        for way, name in ((Way(1.0), f"bits_{prefix}"), (Way(0.5), f"bits_{prefix}_t0.5")):
            for row, tokens in enumerate(rows):
                if len(tokens) <= prefix:
                    assert np.isnan(whole[name][row])
                    assert np.isnan(whole[f"matched_{prefix}"][row])
                    continue
                x = torch.from_numpy(tokens)[None]
                bits = expected_bits(logits_of(lm.model, x[:, :-1]), x[:, 1:], way)
                assert abs(whole[name][row] - float(bits[0, prefix - 1 :].sum())) < 1e-2
    bos = [np.concatenate([[1], tokens]) for tokens in rows]
    after = measured(lm, bos, plan, added=1)
    assert after["tokens"].tolist() == [len(tokens) for tokens in rows]
    x = torch.from_numpy(bos[5])[None]
    bits = expected_bits(logits_of(lm.model, x[:, :-1]), x[:, 1:], Way(1.0))
    assert abs(after["bits_4"][5] - float(bits[0, 4:].sum())) < 1e-2


def test_nan_is_named() -> None:
    """Fails if weights that are not finite give rates."""
    model = gpt()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match=r"^0: its bits are not finite"):
        measured(fastmem.CausalLM(model), np.ones((3, S), np.int64), plan_of(4))
