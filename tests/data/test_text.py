"""Text as a data set: indices, samples, held-out sequences, descriptions, files, tokenizers."""

import json
import math
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.written_files import FORMATS

import fastmem
from fastmem import TextCorpus, TextSequences, TokenFile, prepare_text
from fastmem.data.tokenizers import load_tokenizer, train_tokenizer

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["alpha ", "beta ", "gamma ", "naïve ", "да ", "日本 ", "0 ", "\n", "x" * 9]


def texts(n: int = 60) -> list[str]:
    rng = random.Random(1)
    return ["".join(rng.choices(WORDS, k=rng.randrange(20, 90))) for _ in range(n)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TextCorpus:
    return prepare_text(texts(), tmp_path_factory.mktemp("text") / "c", length=8)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> TextCorpus:
    folder = tmp_path_factory.mktemp("text") / "c"
    return prepare_text(texts(), folder, length=8, train_tokenizer=300)


def test_indices(corpus: TextCorpus) -> None:
    """Fails if a slice, an index or an array gives other tokens, or another dtype."""
    train = corpus.train
    whole = np.load(corpus.folder / "train.npy")
    assert train.count == len(whole) == corpus.counts["splits"]["train"]
    assert train[:].dtype == np.uint16
    assert train[:].tolist() == whole.tolist()
    assert train[5].tolist() == whole[5].tolist()
    assert train[-2].tolist() == whole[-2].tolist()
    assert train[9:2:-3].tolist() == whole[9:2:-3].tolist()
    assert train[np.array([7, 7, 0])].tolist() == whole[[7, 7, 0]].tolist()
    assert train.tokens([3], np.int64).dtype == np.int64
    assert math.isnan(train.entropy_bits)
    assert train.uniform_bits == 7 * 8


def test_samples(corpus: TextCorpus) -> None:
    """Fails if a sample repeats a sequence, ignores its seed, or is not a part of a larger one."""
    train = corpus.train
    whole = [row.tolist() for row in train]
    small, large = train.sample(20, seed=4), train.sample(90, seed=4)
    assert small[:].tolist() == large[:20].tolist()
    places = [whole.index(row.tolist()) for row in large]
    assert len({*places}) == 90
    assert places != sorted(places)
    assert train.sample(90, seed=5)[:].tolist() != large[:].tolist()
    everything = train.sample(train.count, seed=0)
    assert sorted(map(tuple, everything)) == sorted(map(tuple, train))
    assert large[[5, 3]].tolist() == [whole[places[5]], whole[places[3]]]
    assert large.texts([5])[0] == bytes(whole[places[5]]).decode(errors="replace")


def test_start(corpus: TextCorpus) -> None:
    """Fails if a set that starts later is another part of the order, or forgets where it starts."""
    folder, train = corpus.folder, corpus.train
    for seed in (None, 4):
        whole = TextSequences(folder, "train", 90, seed)
        part = TextSequences(folder, "train", 30, seed, start=60)
        np.testing.assert_array_equal(part[:], whole[60:])
        np.testing.assert_array_equal(part[[5, 0]], whole[[65, 60]])
        np.testing.assert_array_equal(part.documents([5, 0]), whole.documents([65, 60]))
        assert fastmem.from_description(part.description()) == part
        assert part.texts(3) == whole.texts(63)
    assert TextSequences(folder, "train", start=60).count == train.count - 60
    with pytest.raises(ValueError, match=rf"fewer than {train.count + 1:,}"):
        TextSequences(folder, "train", 2, 0, train.count - 1)
    with pytest.raises(ValueError, match="start must be from 0"):
        TextSequences(folder, "train", None, 0, train.count)


def test_held_out(corpus: TextCorpus) -> None:
    """Fails if held-out sequences are members, or follow another seed."""
    held_out = corpus.train.sample(10, seed=3).held_out(12)
    assert held_out == corpus.test.sample(12, seed=3)
    members = {row.tobytes() for row in corpus.train[:]}
    assert not members & {row.tobytes() for row in corpus.test[:]}
    assert not members & {row.tobytes() for row in corpus.reference[:]}
    with pytest.raises(ValueError, match="split reference has no held-out sequences"):
        corpus.reference.held_out(3)


def test_limits(corpus: TextCorpus, tmp_path: Path) -> None:
    """Fails if a corpus that is too small does not say how many sequences it has."""
    n = corpus.train.count
    with pytest.raises(ValueError, match=f"split train of .* has {n} sequences, fewer than 9,999"):
        corpus.train.sample(9999)
    with pytest.raises(ValueError, match=rf"has {n} sequences, fewer than {n + 1}"):
        TextSequences(corpus.folder, "train", np.int64(n), start=1)
    with pytest.raises(ValueError, match=r"split test .* fewer than 9,999"):
        corpus.train.sample(9).held_out(9999)
    with pytest.raises(ValueError, match="is a sample: take samples of the split"):
        corpus.train.sample(9).sample(3)
    with pytest.raises(ValueError, match="count must be from 1"):
        corpus.train.sample(0)
    with pytest.raises(ValueError, match="split must be one of train, test, reference"):
        TextSequences(corpus.folder, "training")
    with pytest.raises(ValueError, match="does not hold a prepared corpus"):
        TextSequences(tmp_path)


def test_round_trips(corpus: TextCorpus) -> None:
    """Fails if a description, a pickle or JSON gives another set, or a pickle has the tokens."""
    for one in (corpus.train, corpus.test.sample(9, seed=2), TextSequences(corpus.folder, count=4)):
        description = json.loads(json.dumps(one.description()))
        for again in (fastmem.from_description(description), pickle.loads(pickle.dumps(one))):
            assert again == one
            assert hash(again) == hash(one)
            assert again[:].tolist() == one[:].tolist()
    assert len(pickle.dumps(corpus.train)) < 1000
    assert corpus.train != corpus.test
    assert corpus.train.sample(9) != corpus.train.sample(9, seed=1)
    assert corpus.train.sample(9) != TextSequences(corpus.folder, count=9)


def test_altered_files(tmp_path: Path) -> None:
    """Fails if a file that lost sequences opens."""
    corpus = prepare_text(texts(), tmp_path / "c", length=8)
    np.save(tmp_path / "c" / "train.npy", corpus.train[:5].astype(np.uint8))
    with pytest.raises(ValueError, match=r"train.npy has shape \(5, 8\), its manifest"):
        TextSequences(tmp_path / "c")
    with (tmp_path / "c" / "train.npy").open("r+b") as file:
        file.truncate(140)
    with pytest.raises(ValueError, match=r"train.npy is damaged \(.*: prepare the text again"):
        TextSequences(tmp_path / "c")


@pytest.mark.parametrize("format", FORMATS)
def test_files(corpus: TextCorpus, tmp_path: Path, format: Any) -> None:
    """Fails if a format holds other tokens, or its manifest does not lead back to the text."""
    sample = corpus.train.sample(30, seed=1)
    manifest = fastmem.write(sample, tmp_path / "sample", format, shards=2)
    file = TokenFile.open(manifest)
    assert file[:].tolist() == sample[:].tolist()
    assert file.known == sample
    assert fastmem.verify(manifest) == 30


def test_training(corpus: TextCorpus) -> None:
    """Fails if text does not train, or canaries in it are not where they should be."""
    sample = corpus.train.sample(16, seed=0)
    config = fastmem.TrainConfig(steps=4, batch=8)
    gpt = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=256, length=8))
    result = fastmem.train(gpt, sample, config)
    assert result.steps == 4
    bits = fastmem.sequence_bits(gpt, sample)
    assert bits.shape == (16,)
    planted = fastmem.CanarySequences(sample, fastmem.UniformSequences(4, 8, 256, seed=9), times=2)
    assert fastmem.from_description(planted.description()) == planted
    assert planted[planted.places[0, 0]].tolist() == planted.canaries[0].tolist()
    rest = np.setdiff1d(np.arange(planted.count), planted.places.ravel())
    assert sorted(map(tuple, planted[rest])) == sorted(map(tuple, sample[:]))


def test_pieces(pieces: TextCorpus) -> None:
    """Fails if tokens of a trained tokenizer spell another text, or characters get lost."""
    assert pieces.train.vocab == 300
    assert pieces.counts["tokens"] < pieces.counts["bytes"]
    wanted = {text.encode() for text in texts()}
    for split in (pieces.train, pieces.test, pieces.reference):
        documents = split.documents()
        for document in np.unique(documents):
            rows = np.flatnonzero(documents == document)
            for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
                raw = b"".join(split.text_bytes(run, first=0))
                assert any(raw in text or raw[: len(raw) // 2] in text for text in wanted)
    first = pieces.train.text_bytes([0], first=0)[0]
    assert first.endswith(pieces.train.text_bytes([0])[0])
    assert len(first) > len(pieces.train.text_bytes([0])[0])


def test_the_trained_tokenizer_knows_the_reference_alone(tmp_path: Path) -> None:
    """Fails if text of members or held-out sequences reaches the tokenizer."""
    corpus = prepare_text(texts(), tmp_path / "a", length=8, train_tokenizer=300)
    names = corpus.reference.sources(np.unique(corpus.reference.documents()))
    expected = train_tokenizer([texts()[int(name)] for name in names], 300)
    assert (corpus.folder / "tokenizer.json").read_text() == expected.saved


def test_tokens_are_those_of_the_library(tmp_path: Path) -> None:
    """Fails if padding, truncation or special tokens of a tokenizer change the tokens, or if the
    caller's tokenizer is changed; for a file, a folder and an object."""
    plain = tokenizers.Tokenizer.from_str(train_tokenizer(texts(), 280).saved)
    plain.add_special_tokens(["<é>"])
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="<é> $A", special_tokens=[("<é>", plain.token_to_id("<é>"))]
    )
    plain.enable_truncation(5)
    plain.enable_padding(length=50)
    before = plain.to_str()
    (tmp_path / "model").mkdir()
    plain.save(str(tmp_path / "model" / "tokenizer.json"))
    for given in (plain, tmp_path / "model", tmp_path / "model" / "tokenizer.json"):
        found = load_tokenizer(given)
        assert plain.to_str() == before
        rows, n, sizes = found.cut(texts(9), [b""] * 9, 4)
        plain.no_truncation()
        plain.no_padding()
        wanted = [plain.encode(text, add_special_tokens=False).ids for text in texts(9)]
        assert sizes.tolist() == [len(ids) for ids in wanted]
        assert n.tolist() == [len(ids) // 4 for ids in wanted]
        cut = [ids[i : i + 4] for ids in wanted for i in range(0, len(ids) - 3, 4)]
        assert rows.tolist() == cut
        plain = tokenizers.Tokenizer.from_str(before)
    with_special = np.array([[plain.token_to_id("<é>")], [plain.token_to_id("Ġ")]])
    assert load_tokenizer(plain).to_bytes(with_special) == ["<é>".encode(), b" "]


def test_every_byte() -> None:
    """Fails if a byte-level tokenizer spells another byte than it read."""
    found = train_tokenizer(texts(), 280)
    for text in ("".join(map(chr, range(0x800))), "日本\U0001f600", "a\n\t b"):
        rows, _, sizes = found.cut([text], [b""], 1)
        assert b"".join(found.to_bytes(rows)) == text.encode()
        assert len(rows) == sizes[0]


def test_word_tokenizer() -> None:
    """Fails if a tokenizer that is not made of bytes does not spell its words."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 7, "?": 2}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found = load_tokenizer(words)
    assert found.vocab == 8  # holes count
    rows, _, _ = found.cut(["a b c a"], [b""], 2)
    assert rows.tolist() == [[0, 7], [2, 0]]
    assert found.to_bytes(rows) == [b"a b", b"? a"]
