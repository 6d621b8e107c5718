"""Bits of causal language models of many architectures against their logits in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from cases.causal_models import (
    ARCHITECTURES,
    POSITIONS,
    UNLIMITED,
    VOCAB,
    bits64,
    config_of,
    documents_of,
    logits64,
    model_of,
    randomized,
)
from fastmem.kernels.reference import stats_of_logits
from torch import Tensor, nn

import fastmem
from fastmem import CausalLM
from fastmem.models.causal import lm as module
from fastmem.models.causal.memory import measured
from fastmem.models.scoring.windows import window_stats

transformers = pytest.importorskip("transformers")

LENGTHS = (1, 2, 5, 30, POSITIONS, 0, 17)
STATISTICS = {"entropy": True, "variance": True, "greedy": True, "lse": True}
NAMES = ("entropy_bits", "variance", "is_greedy", "lse_bits")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bits_of_float64_logits(name: str) -> None:
    """Fails if hidden states, head, softcap, scale or bias of an architecture are not its own, or
    padding, places or positions are wrong."""
    model, documents = model_of(name), documents_of(LENGTHS)
    lm = CausalLM(model)
    found = window_stats(lm, documents, 128, **STATISTICS)
    assert (lm.through, lm.reason, lm.vocab) == ("hidden", None, VOCAB)
    assert lm.positions == (None if name in UNLIMITED else POSITIONS)
    for index, tokens in enumerate(documents):
        np.testing.assert_allclose(
            found["bits"][index], bits64(model, tokens), rtol=0, atol=1e-4, err_msg=str(index)
        )
        if len(tokens) > 1:
            exact = stats_of_logits(logits64(model, tokens[:-1]), torch.from_numpy(tokens[1:]))
            for field in NAMES:
                np.testing.assert_allclose(
                    found[field][index], getattr(exact, field), rtol=0, atol=1e-3, err_msg=field
                )


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Mamba", "Phi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Fails if logits that are rounded to 16 bits are the judge, or the bits come from them."""
    model = model_of(name).to(dtype)
    lm = CausalLM(model)
    (tokens,) = documents_of([40])
    inputs, targets = (torch.from_numpy(part)[None] for part in (tokens[:-1], tokens[1:]))
    bits = lm.token_stats(inputs, targets).bits
    assert lm.through == "hidden", lm.reason
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        hidden = module.hidden_states(model, head, inputs)
        exact = copy.deepcopy(head).double()
        logits = exact(hidden.double())
        if name == "Gemma2":
            logits = 2 * torch.tanh(logits / 2)
    expected = stats_of_logits(logits, targets).bits
    torch.testing.assert_close(bits.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Bloom", "OPT", "Mamba", "GPT2"])
def test_neither_batch_nor_order_nor_padding_changes_bits(name: str) -> None:
    """Fails if a token's bits depend on its batch: every shipped fault of padding does."""
    lm, documents = CausalLM(model_of(name)), documents_of([3, 40, 64, 2, 25, 64, 33], seed=3)
    alone = window_stats(lm, documents, 1)["bits"]
    for area in (64, 100, 10**6):
        for order in (range(7), reversed(range(7)), (3, 1, 4, 0, 5, 2, 6)):
            order = list(order)
            bits = window_stats(lm, [documents[i] for i in order], area)["bits"]
            for place, i in enumerate(order):
                np.testing.assert_allclose(bits[place], alone[i], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "OPT", "Bloom", "GPT2"])
def test_pad_token_and_token_0_are_tokens(name: str) -> None:
    """Fails if token 0 or the pad token is taken for padding: both occur everywhere here."""
    model = model_of(name)
    model.config.pad_token_id = 5  # type: ignore[union-attr]
    lm = CausalLM(model)
    documents = [
        np.array(x) for x in ([0, 0, 0, 7], [5, 5, 5, 5, 5], [5, 0, 9, 0, 5], [1, 0], [2, 5])
    ]
    for bits, tokens in zip(window_stats(lm, documents)["bits"], documents, strict=True):
        assert (bits != 0).all()
        np.testing.assert_allclose(bits, bits64(model, tokens), rtol=0, atol=1e-4)


def test_longrope_of_short_and_long_sequences() -> None:
    """Fails if a sequence gets the rotary frequencies of a longer sequence in its batch, first
    batch or later, or if longrope alone makes logits."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 12.0, 16.0],
        "original_max_position_embeddings": 16,
    }
    settings = {"rope_parameters": rope, "original_max_position_embeddings": 16}
    model = randomized(transformers.AutoModelForCausalLM.from_config(config_of("Phi3", **settings)))
    for first in (documents_of([9, 16]), documents_of([17, 18, 40, 3])):
        lm = CausalLM(model)
        for documents in (first, documents_of([3, 16, 17, 18, 40, 64])):
            found = window_stats(lm, documents, 1000, entropy=True)
            for index, tokens in enumerate(documents):
                expected = bits64(model, tokens)
                np.testing.assert_allclose(found["bits"][index], expected, rtol=0, atol=1e-3)
            assert (lm.through, lm.reason) == ("hidden", None)


@pytest.mark.parametrize("name", ["Roberta", "Data2VecText"])
def test_positions_that_begin_after_the_padding_token(name: str) -> None:
    """Fails if the most positions are the rows of a table whose first rows are not positions."""
    config = config_of(name, is_decoder=True, pad_token_id=1)
    model = randomized(getattr(transformers, f"{name}ForCausalLM")(config))
    lm = CausalLM(model)
    assert lm.positions == POSITIONS - 2
    documents = [tokens + 2 for tokens in documents_of([5, POSITIONS - 1, 100], VOCAB - 2)]
    found = window_stats(lm, documents, 300)["bits"]
    for tokens, bits in zip(documents[:2], found, strict=False):
        np.testing.assert_allclose(bits, bits64(model, tokens), rtol=0, atol=1e-3)


def test_positions_of_prophetnet() -> None:
    """Fails if the most positions leave no room for the position after the last token."""
    config = transformers.ProphetNetConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_decoder_layers=1,
        num_decoder_attention_heads=4,
        decoder_ffn_dim=32,
        max_position_embeddings=POSITIONS,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    model = randomized(transformers.ProphetNetForCausalLM(config))
    lm, (tokens,) = CausalLM(model), documents_of([POSITIONS - 1])
    assert lm.positions == POSITIONS - 2
    (bits,) = window_stats(lm, [tokens])["bits"]
    np.testing.assert_allclose(bits, bits64(model, tokens), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["gelu_new", "gelu_fast"])
def test_gelu_by_tanh_is_one_operation(kind: str) -> None:
    """Fails if the widest activations are held several times, if a forward pass leaves its mark on
    the model, or if an activation with a hook of its own loses the hook."""
    config = config_of("GPT2", activation_function=kind)
    model = randomized(transformers.AutoModelForCausalLM.from_config(config))
    (tokens,), lm = documents_of([40]), CausalLM(model)
    plain = config_of("GPT2", activation_function="gelu_pytorch_tanh")
    fused = CausalLM(transformers.AutoModelForCausalLM.from_config(plain))
    assert measured(lm, 4, 60) <= measured(fused, 4, 60)
    expected = bits64(model, tokens)
    np.testing.assert_allclose(window_stats(lm, [tokens])["bits"][0], expected, rtol=0, atol=1e-4)
    activations = [layer.mlp.act for layer in model.transformer.h]
    assert not any("forward" in vars(activation) for activation in activations)
    for activation in activations:
        activation.register_forward_hook(lambda module, args, out: 2 * out)
    (bits,) = window_stats(lm, [tokens])["bits"]
    assert np.abs(bits - expected).max() > 0.01
    np.testing.assert_allclose(bits, bits64(model, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("context", "stride"), [(8, None), (8, 3), (20, 1), (None, None)])
def test_windows_of_long_documents(context: int | None, stride: int | None) -> None:
    """Fails if a window's bits land in another place, or a token has another context: brute force
    scores each token by itself."""
    model = model_of("Llama")
    documents = documents_of([3, 100, 21])
    found = window_stats(CausalLM(model), documents, 64, context, stride)["bits"]
    most = context or POSITIONS
    for tokens, bits in zip(documents, found, strict=True):
        for place in range(1, len(tokens)):
            begin, end = 0, min(len(tokens), most + 1)
            while place >= end:
                end = min(len(tokens), end + (stride or most))
                begin = end - 1 - most
            exact = bits64(model, tokens[begin : place + 1])[-1]
            assert abs(bits[place - 1] - exact) < 1e-4, (place, begin)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_cache_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a pass makes keys and values for later tokens."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a cache was made")

    model = model_of(name)
    for kind in vars(transformers.cache_utils).values():
        if isinstance(kind, type) and kind.__name__.endswith("Cache"):
            monkeypatch.setattr(kind, "__init__", refuse)
    lm = CausalLM(model)
    inputs = torch.arange(12).view(2, 6)
    lm.token_stats(inputs, inputs + 1)
    if name == "Llama":
        with pytest.raises(AssertionError, match="a cache was made"):
            model(inputs, use_cache=True)


def test_the_head_sees_scored_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the head itself runs after the first batch, or padded and ignored rows reach the
    likelihood."""
    model, rows, calls = model_of("Llama"), [], []
    lm = CausalLM(model)
    inputs = torch.arange(24).view(2, 12)
    targets = torch.full((2, 12), -100)
    targets[0, 3:7], targets[1, 0] = 9, 4
    first = lm.token_stats(inputs, targets)
    compute = module.token_bits

    def counted(hidden: Tensor, *rest: Any) -> Tensor:
        rows.append(len(hidden))
        return compute(hidden, *rest)

    monkeypatch.setattr(module, "token_bits", counted)
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[operator,union-attr]
    second = lm.token_stats(inputs, targets)
    assert (rows, calls) == ([5], [])
    assert torch.equal(first.bits, second.bits)
    assert torch.equal(first.bits != 0, targets != -100)
    stats = lm.token_stats(inputs, targets, **STATISTICS)
    for field in NAMES:
        assert not getattr(stats, field)[targets == -100].any()


def test_the_model_stays_as_it_is() -> None:
    """Fails if modes, hooks, gradients or the configuration of a live model change, also where the
    pass fails."""
    model = model_of("GPT2").train()
    model.transformer.h[0].eval()  # type: ignore[union-attr,index,operator]

    def state() -> Any:
        each = list(model.modules())
        return (
            [m.training for m in each],
            [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in each],
            [p.requires_grad for p in model.parameters()],
            model.config.to_dict(),  # type: ignore[union-attr,operator]
            torch.is_grad_enabled(),
        )

    before, lm = state(), CausalLM(model)
    inputs = torch.arange(12).view(2, 6)
    bits = lm.token_stats(inputs, inputs + 1).bits
    assert state() == before
    assert not bits.requires_grad
    assert torch.equal(bits, lm.token_stats(inputs, inputs + 1).bits)  # no dropout
    handle = model.transformer.h[1].register_forward_hook(lambda *_: 1 / 0)  # type: ignore
    with pytest.raises(ZeroDivisionError):
        lm.token_stats(inputs, inputs + 1)
    handle.remove()
    assert state() == before
    # Transformers' own collection of hidden states works after a pass that ended at the head.
    assert len(model(inputs, output_hidden_states=True).hidden_states) == 3


def test_weights_are_read_at_each_call() -> None:
    """Fails if the head of the first call is kept while training replaces it."""
    model = model_of("Phi")
    lm = CausalLM(model)
    (tokens,) = documents_of([20])
    before = window_stats(lm, [tokens])["bits"][0]
    head: nn.Linear = model.lm_head  # type: ignore[assignment]
    head.weight = nn.Parameter(head.weight.detach() * 2)
    after = window_stats(lm, [tokens])["bits"][0]
    assert abs(before - after).max() > 0.1
    np.testing.assert_allclose(after, bits64(model, tokens), rtol=0, atol=1e-4)


def test_nothing_scored() -> None:
    """Fails if an empty batch, or one without targets, is an error or NaN."""
    lm = CausalLM(model_of("Llama"))
    for shape in ((0, 5), (2, 0), (2, 3)):
        stats = lm.token_stats(
            torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100), **STATISTICS
        )
        assert stats.bits.shape == shape
        assert not stats.bits.any()


def test_a_gpt_of_fastmem() -> None:
    """Fails if our own model has other bits here than by its token_bits."""
    model = fastmem.GPT(fastmem.GPTConfig(2, 16, 2, vocab=50, length=12))
    lm = CausalLM(model)
    tokens = torch.arange(24).view(2, 12)
    stats = lm.token_stats(tokens[:, :-1], tokens[:, 1:])
    assert torch.equal(stats.bits, model.token_bits(tokens).detach())
    assert (lm.through, lm.vocab, lm.positions) == ("hidden", 50, 12)


def test_float64_bits_are_not_rounded() -> None:
    """Fails if windows or a folder round the bits of a model in float64 to float32."""
    model, (tokens,) = model_of("Llama").double(), documents_of([100])
    lm = CausalLM(model)
    (bits,) = window_stats(lm, [tokens], context=20)["bits"]
    expected = np.concatenate([bits64(model, tokens[i : i + 21]) for i in range(0, 80, 20)])
    np.testing.assert_allclose(bits[:80], expected, rtol=0, atol=1e-9)
    found = fastmem.score(model, [tokens], context=20, tokens=True).tokens
    assert found is not None
    np.testing.assert_array_equal(found["bits"], bits)


def test_float64() -> None:
    """Fails if a model in float64 loses digits."""
    model = model_of("Llama").double()
    (tokens,) = documents_of([20])
    inputs = torch.from_numpy(tokens)
    bits = CausalLM(model).token_stats(inputs[None, :-1], inputs[None, 1:]).bits[0]
    np.testing.assert_allclose(bits, bits64(model, tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_wrapped_models(wrap: Any) -> None:
    """Fails if the model inside torch.compile or DataParallel is not found: what was compiled does
    not see later hooks."""
    model = model_of("Llama")
    wrapped = wrap(model)
    (tokens,) = documents_of([20])
    with torch.no_grad():
        wrapped(torch.from_numpy(tokens)[None], use_cache=False)
    lm = CausalLM(wrapped)
    bits = window_stats(lm, [tokens])["bits"][0]
    assert (lm.model, lm.through) == (model, "hidden")
    np.testing.assert_allclose(bits, bits64(model, tokens), rtol=0, atol=1e-4)


def bert(kind: str, **settings: Any) -> nn.Module:
    model: nn.Module = getattr(transformers, kind)(config_of("Bert", **settings))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                  num_heads=2)),
         "T5ForConditionalGeneration is an encoder-decoder"),
        (lambda: bert("BertForMaskedLM"), "BertForMaskedLM is a masked model"),
        (lambda: bert("BertLMHeadModel"), r"BertLMHeadModel is not causal: .* is_decoder=True"),
        (lambda: transformers.LlamaModel(config_of("Llama")), "LlamaModel has no head"),
        (lambda: transformers.LlamaForSequenceClassification(config_of("Llama")), "has no head"),
        (lambda: nn.Linear(2, 2), "Linear has no head"),
        (lambda: model_of("Llama").to("meta"), "LlamaForCausalLM is on meta, .*device='cpu'"),
        (lambda: None, "must be a torch.nn.Module, not NoneType"),
    ],
)  # fmt: skip
def test_models_that_are_refused(make: Any, message: str) -> None:
    """Fails if a model whose numbers are not code lengths of a text gives numbers."""
    with pytest.raises(ValueError, match=message) as caught:
        CausalLM(make())
    assert "\n" not in str(caught.value)


def test_a_causal_bert() -> None:
    """Fails if a decoder of an architecture that is usually masked is refused."""
    model = bert("BertLMHeadModel", is_decoder=True).eval()
    (tokens,) = documents_of([20])
    lm = CausalLM(model)
    np.testing.assert_allclose(
        window_stats(lm, [tokens])["bits"][0], bits64(model, tokens), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ([[1, 100]], [[2, 3]], r"token 100 is outside of the 100 embeddings of Llama.*tokenizer"),
        ([[1, -1]], [[2, 3]], "token -1 is outside of the 100 embeddings"),
        ([[1, 2]], [[2, 300]], "token 300 is outside of the 100 logits"),
        ([[1, 2]], [[2, -5]], "token -5 is outside of the 100 logits"),
        ([[1] * 65], [[1] * 65], "65 tokens for the 64 positions of Llama.*windows"),
        ([1, 2], [2, 3], r"inputs are torch.int64 of shape \(2,\): give int64"),
        ([[1, 2]], [[2]], r"targets are torch.int64 of shape \(1, 1\)"),
        ([[1.0, 2.0]], [[2, 3]], "inputs are torch.float32"),
    ],
)
def test_bad_tokens(inputs: Any, targets: Any, message: str) -> None:
    """Fails if an id that the model lacks is an IndexError of torch, or is read."""
    with pytest.raises(ValueError, match=message):
        CausalLM(model_of("Llama")).token_stats(torch.tensor(inputs), torch.tensor(targets))


def test_bad_documents() -> None:
    """Fails if documents or contexts that do not fit give numbers."""
    lm = CausalLM(model_of("Llama"))
    with pytest.raises(ValueError, match="context 65 for a model of 64 positions: give at most 64"):
        window_stats(lm, documents_of([3]), context=65)
    with pytest.raises(ValueError, match=r"document 1 is float64 of shape \(2,\), not one row"):
        window_stats(lm, [*documents_of([3]), np.zeros(2)])
    with pytest.raises(ValueError, match="document 0 is list of shape"):
        window_stats(lm, [[1, 2]])  # type: ignore[list-item]
