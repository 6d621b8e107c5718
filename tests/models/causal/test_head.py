"""What follows a head is measured, and a model that differs is scored through its logits."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases.causal_models import VOCAB, bits64, documents_of, model_of, randomized
from torch import Tensor, nn

from fastmem import CausalLM
from fastmem.models.causal import lm as lm_module, through_logits
from fastmem.models.causal.head import why_not_a_matrix
from fastmem.models.scoring.windows import window_stats

pytest.importorskip("transformers")

V, D = 40, 16


class Toy(nn.Module):
    """A causal model: the mean of the embeddings so far, a head, and what a test adds."""

    def __init__(self, rows: int = V, bias: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.lm_head = nn.Linear(D, rows, bias=bias)
        randomized(self)
        with torch.no_grad():
            self.embedding.weight.mul_(10)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def body(self, tokens: Tensor) -> Tensor:
        places = torch.arange(1, tokens.shape[1] + 1, dtype=self.embedding.weight.dtype)
        return self.embedding(tokens).cumsum(1) / places[:, None]  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.after(self.head(self.body(tokens)), tokens)

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)  # type: ignore[no-any-return]

    def after(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return logits


class ScaledBefore(Toy):  # MiniCPM
    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden / 3)


class Padded(Toy):
    def __init__(self) -> None:
        super().__init__(rows=48, bias=True)

    def after(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return logits[..., :V]


class Softcap(Toy):
    def after(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return 3 * torch.tanh(0.7 * logits / 3)


class Flat(Toy):
    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden.flatten(0, 1)).view(*hidden.shape[:-1], -1)


class Named(Toy):
    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(input=hidden)  # type: ignore[no-any-return]


class Function(Toy):
    def head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.lm_head.weight)


class Twice(Toy):
    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden) + super().head(hidden.roll(1, -1))


class Masked(Toy):
    def after(self, logits: Tensor, tokens: Tensor) -> Tensor:
        banned = torch.arange(logits.shape[-1]) % 7 == 3
        return logits.masked_fill(banned, -torch.inf)


class Shifted(Toy):
    def after(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return logits + torch.linspace(0, 2, logits.shape[-1])


class Negative(Toy):
    def after(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return -logits


class Repetition(Toy):
    """Changes logits by the tokens that it reads, but not for those of the probe."""

    def after(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return logits * (1 + 0.5 * (tokens == 11).cumsum(1).clamp(max=1)[..., None])


class Liar(nn.Linear):
    """A head whose weight is not the matrix that it multiplies by."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01 * x.sum(-1, keepdim=True) * torch.arange(V) / V


class Lying(Toy):
    def __init__(self) -> None:
        super().__init__()
        weight = self.lm_head.weight
        self.lm_head = Liar(D, V, bias=False)
        self.lm_head.weight = weight


class TimeMajor(Toy):
    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden.transpose(0, 1)).transpose(0, 1)


class FourAxes(Toy):
    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden[:, :, None])[:, :, 0]


class LastOnly(Toy):
    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden[:, -1:])


class Longer(Toy):
    def after(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat([logits, logits[..., :2]], -1)


def check(model: nn.Module, lm: CausalLM, vocab: int = V) -> None:
    documents = documents_of([3, 20, 33, 1, 20], vocab)
    documents[1][5] = 11
    for area in (1, 200):
        found = window_stats(lm, documents, area)["bits"]
        for tokens, bits in zip(documents, found, strict=True):
            np.testing.assert_allclose(bits, bits64(model, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [Toy, ScaledBefore, Padded, Softcap, Flat, Named])
def test_scored_through_hidden_states(kind: type[Toy]) -> None:
    """Fails if a scale before the head, a padded vocabulary, a softcap with a scale, or the shape
    and name of the head's input is missed."""
    model = kind()
    lm = CausalLM(model)
    check(model, lm)
    assert (lm.through, lm.reason, lm.vocab) == ("hidden", None, V)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Function, "its head is called 0 times as a module in one pass"),
        (Twice, "its head is called 2 times as a module"),
        (Masked, "it changes the output of its head by more than a scale and a softcap"),
        (Shifted, "it changes the output of its head by more than"),
        (Negative, "it changes the output of its head by more than"),
        (Repetition, "bits by its hidden states and its head differ .* by 0.0?[1-9]|by [1-9]"),
        (Lying, "bits by its hidden states and its head differ from those of its own logits by"),
        (TimeMajor, "it changes the output of its head by more than"),
        (FourAxes, r"its head receives \(2, 8, 1, 16\) for tokens \(2, 8\)"),
        (Longer, "it returns 42 logits, and its head 40"),
    ],
)
def test_scored_through_logits(kind: type[Toy], reason: str) -> None:
    """Fails if a model whose logits are not those of its head's matrix is believed."""
    model = kind()
    lm = CausalLM(model)
    check_tokens = documents_of([20], V)
    check_tokens[0][5] = 11
    window_stats(lm, check_tokens)
    assert lm.through == "logits"
    assert lm.reason is not None
    assert "\n" not in lm.reason
    assert lm.reason.startswith(f"{kind.__name__} is scored through its logits: ")
    assert re.search(reason, lm.reason), lm.reason
    check(model, lm)


def test_positions_that_a_model_does_not_have() -> None:
    """Fails if a table of positions that ends early is an IndexError of torch."""

    class Short(Toy):
        def body(self, tokens: Tensor) -> Tensor:
            places = torch.arange(tokens.shape[1])
            return super().body(tokens) + torch.eye(20, D)[places]

    with pytest.raises(
        ValueError, match=r"Short fails for 30 tokens \(index .*: give a smaller con"
    ):
        window_stats(CausalLM(Short()), documents_of([31], V))


def test_a_model_of_the_last_token_is_refused() -> None:
    """Fails if logits of one token are taken for those of all."""
    with pytest.raises(ValueError, match=r"LastOnly returns \(2, 1, 40\) for tokens \(2, 8\), not"):
        CausalLM(LastOnly())


def test_the_fault_of_a_head_is_found_in_half_precision() -> None:
    """Fails if the head is taken for its matrix where its own output is rounded."""
    lm = CausalLM(Lying().bfloat16())
    window_stats(lm, documents_of([30], V))
    assert lm.through == "logits"
    honest = CausalLM(Toy().bfloat16())
    window_stats(honest, documents_of([30], V))
    assert honest.through == "hidden"


def test_a_hook_of_the_head_is_found() -> None:
    """Fails if a hook that changes what the head returns is overlooked, also in half precision."""
    for model in (Toy(), Toy().bfloat16()):
        model.lm_head.register_forward_hook(lambda m, a, out: out + torch.arange(V) / V)
        lm = CausalLM(model)
        window_stats(lm, documents_of([30], V))
        assert lm.through == "logits"


def test_a_hook_that_casts_what_the_head_receives() -> None:
    """Fails if a head in half precision of another model, which cannot compute in float32, ends
    the scores."""
    model, (tokens,) = Toy(), documents_of([20], V)
    model.lm_head.bfloat16()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    lm = CausalLM(model)
    (bits,) = window_stats(lm, [tokens])["bits"]
    assert "its head does not compute in float32" in str(lm.reason)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[None, :-1]))[0].float()
    expected = F.cross_entropy(logits, torch.from_numpy(tokens[1:]), reduction="none") / np.log(2)
    np.testing.assert_allclose(bits, expected, rtol=0, atol=1e-4)


def test_padding_that_matters_is_found() -> None:
    """Fails if a model that looks at the length of its batch is scored in padded batches."""

    class Length(Toy):
        def body(self, tokens: Tensor) -> Tensor:
            return super().body(tokens) * (1 + tokens.shape[1] / 20)

    for half, area in ((False, 1), (False, 1000), (True, 1)):
        model = Length().bfloat16() if half else Length()
        lm = CausalLM(model)
        window_stats(lm, documents_of([20, 30], V), area)
        assert lm.through == "logits"
        assert "bits by padding differ" in str(lm.reason)
    check(Length(), lm := CausalLM(Length()))
    assert lm.through == "logits"


@pytest.mark.parametrize("softcap", [None, 0.5, 15.0, 30.0, 200.0])
@pytest.mark.parametrize("scale", [1.0, 0.0625, 12.0])
def test_softcap_and_scale_are_measured(softcap: float | None, scale: float) -> None:
    """Fails if the probe finds other numbers than those that the model uses."""

    class After(Toy):
        def after(self, logits: Tensor, tokens: Tensor) -> Tensor:
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            return logits * scale

    head = CausalLM(After()).head
    assert head is not None
    assert head.temperature == pytest.approx(1 / scale, rel=1e-6)
    assert head.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))


def limit_logits(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    for module in (lm_module, through_logits):
        monkeypatch.setattr(module, "MAX_LOGITS", most)


@pytest.mark.parametrize("place", [20, 38, 58])
def test_a_fault_far_from_the_beginning_is_found(place: int) -> None:
    """Fails if the sample of tokens is the beginning of a sequence, or only the first batch is
    proved though a longer batch follows."""

    class Late(Toy):
        def after(self, logits: Tensor, tokens: Tensor) -> Tensor:
            late = torch.arange(tokens.shape[1]) >= place
            return logits * torch.where(late, 1.5, 1.0)[:, None]

    model = Late()
    lm = CausalLM(model)
    for length in (10, 41, 61):
        window_stats(lm, documents_of([length], V))
        assert lm.through == ("logits" if place < length - 1 else "hidden")
    check(model, lm)


@pytest.mark.parametrize("kind", [Masked, Function])
def test_logits_are_made_in_chunks(kind: type[Toy], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the logits of a batch are made at once, or the place of a chunk is wrong."""
    sizes: list[int] = []
    model = kind()
    lm = CausalLM(model)
    model.register_forward_hook(lambda m, a, out: sizes.append(out.numel()))
    assert lm.through == "logits"
    limit_logits(monkeypatch, 1300)
    check(model, lm)
    assert max(sizes) <= 1300  # two sequences of 19 tokens would have 1520


def test_logits_of_a_long_sequence_are_made_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a model of transformers makes all logits of a sequence that is too long."""
    model, sizes = model_of("Llama"), []
    model.lm_head.register_forward_hook(lambda m, a, out: out + torch.arange(VOCAB) / 10)  # type: ignore
    model.register_forward_hook(lambda m, a, out: sizes.append(out.logits.numel()))
    lm = CausalLM(model)
    (tokens,) = documents_of([50])
    window_stats(lm, [tokens])
    limit_logits(monkeypatch, 16 * VOCAB)
    sizes.clear()
    bits = window_stats(lm, [tokens], greedy=True)["bits"][0]
    assert lm.through == "logits"
    assert max(sizes) <= 16 * VOCAB
    np.testing.assert_allclose(bits, bits64(model, tokens), rtol=0, atol=1e-4)


def test_offloaded_and_quantized_heads() -> None:
    """Fails if a head without numbers in memory is multiplied by."""
    for make, reason in (
        (lambda w: w.to("meta"), "the weight of its head is offloaded"),
        (lambda w: w.char(), "the weight of its head is quantized to torch.int8"),
        (lambda w: w[0], "has no matrix `weight`"),
    ):
        head: Any = nn.Module()
        head.weight = make(torch.ones(4, 2))
        assert reason in str(why_not_a_matrix(head))
