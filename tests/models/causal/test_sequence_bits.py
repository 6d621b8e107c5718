"""sequence_bits of models of other libraries, and of sequences of any lengths."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.causal_models import bits64, documents_of, model_of

import fastmem
from fastmem import CausalLM, sequence_bits
from fastmem.models.engine import FusedEngine
from fastmem.models.score import NotFinite

pytest.importorskip("transformers")

RAGGED = documents_of([20, 2, 0, 1, 64, 7])


def sums(model: Any, documents: Any) -> list[float]:
    return [float(bits64(model, np.asarray(tokens, np.int64)).sum()) for tokens in documents]


@pytest.mark.parametrize(
    "form",
    [
        lambda rows: rows,
        lambda rows: [row.tolist() for row in rows],
        lambda rows: [torch.from_numpy(row) for row in rows],
        lambda rows: [torch.from_numpy(row).short() for row in rows],
        lambda rows: np.array(rows, dtype=object),
        lambda rows: pytest.importorskip("pyarrow").array(rows),
        lambda rows: pytest.importorskip("pandas").Series(rows),
        lambda rows: pytest.importorskip("datasets").Dataset.from_dict({"x": rows})["x"],
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tokens_of_any_lengths(form: Any) -> None:
    """Fails if a form of ragged tokens is refused, or an empty document is not 0 bits."""
    model = model_of("Llama")
    bits = sequence_bits(model, form(RAGGED))
    assert bits.dtype == np.float64
    np.testing.assert_allclose(bits, sums(model, RAGGED), rtol=0, atol=1e-3)
    assert (bits[2], bits[3]) == (0, 0)


def test_sets_of_sequences(tmp_path: Path) -> None:
    """Fails if a data set, a file or an array is scored as other tokens."""
    model = model_of("Olmo2")
    made = fastmem.UniformSequences(30, length=12, vocab=100)
    tokens = made.tokens(slice(None), np.int64)
    expected = sums(model, tokens)
    fastmem.write(made, tmp_path / "set.npy", format="npy")
    lm = CausalLM(model)
    for given in (
        made,
        tokens,
        tokens.tolist(),
        torch.from_numpy(tokens),
        tmp_path / "set.npy",
        str(tmp_path / "set.npy"),
        fastmem.TokenFile.open(tmp_path / "set.npy"),
    ):
        np.testing.assert_allclose(sequence_bits(lm, given), expected, rtol=0, atol=1e-3)
    prefixed = fastmem.PrefixedSequences(made, 5)
    each = [bits64(model, row)[4:].sum() for row in prefixed.tokens(slice(None), np.int64)]
    np.testing.assert_allclose(sequence_bits(model, prefixed), each, rtol=0, atol=1e-3)
    np.testing.assert_allclose(sequence_bits(lm, made, batch=7), expected, rtol=0, atol=1e-3)


def test_a_folder_as_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a path is not loaded, its model is probed twice, or our own folder does not go
    through the C++ core."""
    own = fastmem.GPT(fastmem.GPTConfig(1, 16, 2, vocab=100, length=64))
    own.to_hf(tmp_path / "own")
    (tmp_path / "own" / "run.json").write_text("{}")
    rows = np.stack(documents_of([30] * 4))
    expected = sequence_bits(own, rows)
    in_core: list[object] = []
    bits = FusedEngine.bits
    with monkeypatch.context() as patched:
        patched.setattr(
            FusedEngine,
            "bits",
            lambda self, tokens: (in_core.append(tokens), bits(self, tokens))[1],
        )
        np.testing.assert_array_equal(sequence_bits(tmp_path / "own", rows), expected)
    assert in_core
    probes: list[object] = []
    probe = CausalLM._probe
    monkeypatch.setattr(CausalLM, "_probe", lambda self: (probes.append(self), probe(self)))
    model = model_of("Llama")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    np.testing.assert_allclose(
        sequence_bits(tmp_path, RAGGED), sums(model, RAGGED), rtol=0, atol=1e-3
    )
    assert len(probes) == 1


def test_sequences_longer_than_the_model() -> None:
    """Fails if tokens beyond the positions are lost: windows score them."""
    model = model_of("GPT2")
    (tokens,) = documents_of([150])
    parts = [
        bits64(model, tokens[:65]),
        bits64(model, tokens[64:129]),
        bits64(model, tokens[85:])[-21:],
    ]
    bits = sequence_bits(model, [tokens, tokens[:3]])
    assert abs(bits[0] - sum(part.sum() for part in parts)) < 1e-3


def test_a_gpt_takes_sequences_of_any_lengths() -> None:
    """Fails if a GPT scores ragged sequences otherwise than rows of one length."""
    model = fastmem.GPT(fastmem.GPTConfig(1, 16, 2, vocab=100, length=64))
    rows = documents_of([30] * 4)
    whole = sequence_bits(model, np.stack(rows))
    ragged = sequence_bits(model, [*rows, np.zeros(0, np.int64)])
    np.testing.assert_allclose(ragged[:4], whole, rtol=1e-6)
    with pytest.raises(ValueError, match="token 100 is outside of the 100 embeddings of GPT"):
        sequence_bits(model, [[100, 1], [3]])


def test_bad_input() -> None:
    """Fails if what cannot be scored gives numbers, or not one line."""
    model = model_of("Llama")
    for tokens, message in (
        ([[100, 1], [3]], "token 100 is outside of the 100 embeddings"),
        ([[1, 100], [3]], "token 100 is outside of the 100 logits"),
        ([[1.5, 2.0], [3.0]], "sequences must be a set of sequences"),
        ([["a"], ["b", "c"]], "sequences must be a set of sequences"),
        ([], "sequences must be a set of sequences"),
        (["a text"], r"sequences are texts, not tokens: use fastmem.score\("),
        ("nothing.npy", "nothing.npy"),
        (7, "sequences must be a set of sequences"),
        ({"a": [1]}, "sequences must be a set of sequences"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            sequence_bits(model, tokens)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"'bf16-true' is for a fastmem\.GPT: convert"):
        sequence_bits(model, RAGGED, "bf16-true")
    with pytest.raises(ValueError, match="batch must be at least 1, not 0"):
        sequence_bits(model, RAGGED, batch=0)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = torch.nan  # type: ignore[union-attr,index]
    with pytest.raises(NotFinite, match="the bits of sequence 0 are not finite"):
        sequence_bits(model, RAGGED)


def test_a_fallback_is_told() -> None:
    """Fails if a model is scored through its logits without a word."""
    model = model_of("Phi")
    model.lm_head.register_forward_hook(lambda m, a, out: out + torch.arange(100) / 50)  # type: ignore
    with pytest.warns(UserWarning, match="PhiForCausalLM is scored through its logits: bits by"):
        bits = sequence_bits(model, RAGGED)
    np.testing.assert_allclose(bits, sums(model, RAGGED), rtol=0, atol=1e-3)
