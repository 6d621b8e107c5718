"""Tokens of documents: which texts a tokenizer does not give back."""

from pathlib import Path

import pytest
from cases.score_cases import byte_tokenizer, llama_folder, small_llama
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastmem.cli.main import main
from fastmem.models.scoring.scores import score

KEPT = ["", " two  spaces ", "\n\ta", "É <s> \U0001f600", "don ' t .", "x ,y", "\ufeffmark"]


def lossy(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[float]:
    found = score(small_llama(), texts, tokenizer=tokenizer)
    assert found.summary["lossy"] == found.documents["lossy"].sum()
    return [float(value) for value in found.documents["lossy"]]


def words(normalizer: normalizers.Normalizer | None) -> PreTrainedTokenizerFast:
    """A tokenizer of words with an unknown word, which marks spaces as SentencePiece does."""
    vocab = {"<unk>": 0, "\u2581see": 1, "\u2581a": 2, "\u2581cat": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_bytes_keep_every_text() -> None:
    """Fails if a text that bytes spell out, such as one with spaces at an end, counts as lost."""
    assert not any(lossy(byte_tokenizer(), KEPT))


def test_texts_that_are_not_given_back() -> None:
    """Fails if an unknown word or a letter's case is dropped in silence, or a space that the
    tokenizer adds before a text counts as lost."""
    assert lossy(words(None), ["see a cat", "see a dog", "See a cat"]) == [0, 1, 1]
    assert lossy(words(normalizers.Lowercase()), ["see a cat", "See a cat"]) == [0, 1]


def test_a_tokenizer_that_fails() -> None:
    """Fails if an error of the tokenizers library, an Exception, is not one that a user reads."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    with pytest.raises(ValueError, match=r"cannot encode the text \(WordLevel error: Missing"):
        score(small_llama(), ["see"], tokenizer=tokenizer)


def test_tokens_have_no_text() -> None:
    """Fails if tokens without a text count as lost or kept."""
    assert score(small_llama(), [[3, 1, 2]]).summary["lossy"] is None


def test_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if bits a byte of a text that was changed stand without a word, in the terminal or on
    the page."""
    model = llama_folder(tmp_path / "model")
    words(None).save_pretrained(model)
    (tmp_path / "one.txt").write_text("see a dog")
    out = tmp_path / "scores"
    with pytest.raises(SystemExit, match="0"):
        main(["score", f"{model}", f"{tmp_path / 'one.txt'}", "--out", f"{out}"])
    said = "The tokenizer does not give the text of 1 document back. Its bits a byte leave out"
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in (out / "score.html").read_text()
