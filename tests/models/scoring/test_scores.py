"""fastmem.score: the bits of documents, whatever the batches; its folder, killed and resumed."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from cases.score_cases import (
    BOS,
    EOS,
    POSITIONS,
    byte_tokenizer,
    oracle_bits,
    small_llama,
    token_ids,
)
from fastmem.kernels.reference import token_stats
from transformers import LlamaForCausalLM

import fastmem
from fastmem.base import storage
from fastmem.base.lock import locked
from fastmem.models.causal.memory import Memory
from fastmem.models.scoring import scores
from fastmem.models.scoring.folder import ScoreFolder
from fastmem.models.scoring.identity import model_identity
from fastmem.models.scoring.scores import read_scores, score

TEXTS = ["", "a", "hello", "<s>é</s>", "\x00 null", "long " * 30, "b" * 40]
GPT = fastmem.GPTConfig(1, 8, 2, vocab=16, length=8)
rng = np.random.default_rng(0)
TOKENS = [rng.integers(0, 16, n).tolist() for n in (0, 1, 2, 30, 8, 9, 100, 3, 0, 17)]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return small_llama()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two batches, so that small data has many."""
    monkeypatch.setattr(scores, "BATCHES_OF_A_CHUNK", 2)


def by_document(found: scores.Scores, name: str = "bits") -> list[Any]:
    """A column of tokens, cut into documents."""
    assert found.tokens is not None
    count = len(found.documents["document"])
    return [found.tokens[name][found.tokens["document"] == i] for i in range(count)]


@pytest.mark.parametrize("bos", ["auto", "never"])
def test_bits_are_those_of_float64_logits(llama: LlamaForCausalLM, bos: Any) -> None:
    """Fails if a token's bits, its place, or a sum over a document is wrong, an empty document is
    not 0, or a special token that a text spells is one token unasked."""
    found = score(llama, TEXTS, tokenizer=byte_tokenizer(), bos=bos, tokens=True)
    added = [BOS] if bos == "auto" else []
    for i, text in enumerate(TEXTS):
        own = token_ids(text)
        wanted = oracle_bits(llama, added + own) if added + own else np.zeros(0)
        bits = by_document(found)[i]
        np.testing.assert_allclose(bits, wanted, atol=1e-4)
        assert by_document(found, "token")[i].tolist() == (own if added else own[1:])
        assert by_document(found, "position")[i].tolist() == [*range(1 - len(added), len(own))]
        raw = text.encode()
        row = {name: column[i] for name, column in found.documents.items()}
        assert row["tokens"] == len(own)
        assert row["coded_tokens"] == len(bits)
        assert row["bytes"] == len(raw)
        assert row["zlib_bits"] == 8 * len(zlib.compress(raw))
        assert row["bits"] == pytest.approx(wanted.sum(), abs=1e-3)
        assert row["bits_per_byte"] == pytest.approx(row["bits"] / max(1, len(raw)))
    total = found.summary
    assert total["bits"] == pytest.approx(found.documents["bits"].sum())
    assert total["bits_per_byte"] == pytest.approx(total["bits"] / total["bytes"])
    assert total["bos"] == {
        "policy": bos,
        "token": BOS if added else None,
        "text": "<s>" if added else None,
        "is": "BOS" if added else None,
    }
    assert total["windowed_documents"] == 2
    assert json.loads(json.dumps(total, allow_nan=False)) == total


@pytest.mark.parametrize(("context", "stride"), [(None, None), (5, None), (5, 2), (7, 1)])
@pytest.mark.usefixtures("small_chunks")
def test_batches_and_chunks_change_nothing(
    llama: LlamaForCausalLM, context: int | None, stride: int | None, tmp_path: Path
) -> None:
    """Fails if the size of batches or chunks, a cut through a document, or the folder changes a
    token's bits, or a token is scored twice or not at all."""
    tokens = [token_ids(text) for text in TEXTS]
    wanted = [oracle_bits(llama, t, context or POSITIONS, stride) if t else [] for t in tokens]
    for batch_tokens in (1, 10, 1000):
        out = tmp_path / f"{batch_tokens}"
        found = score(
            llama,
            tokens,
            out,
            context=context,
            stride=stride,
            batch_tokens=batch_tokens,
            tokens=True,
        )
        for bits, right in zip(by_document(found), wanted, strict=True):
            np.testing.assert_allclose(bits, right, atol=1e-4)
        assert found.tokens is not None
        order = found.tokens["document"] * 1000 + found.tokens["position"]
        assert (np.diff(order) > 0).all()
        sums = [float(np.sum(right)) for right in wanted]
        np.testing.assert_allclose(found.documents["bits"], sums, atol=1e-2)
        assert np.isnan(found.documents["bytes"]).all()
        assert found.summary["bytes"] is found.summary["bits_per_byte"] is None


def test_statistics_on_request(llama: LlamaForCausalLM) -> None:
    """Fails if a statistic is in the wrong column, of another token, or there unasked."""
    tokens = [token_ids("statistics"), token_ids("of tokens")]
    found = score(llama, tokens, also=("lse", "greedy", "entropy", "variance"), tokens=True)
    assert [*(found.tokens or {})][4:] == ["entropy_bits", "variance", "is_greedy", "lse_bits"]
    for i, own in enumerate(tokens):
        ids = torch.tensor([own])
        with torch.no_grad():
            hidden = llama.model(ids[:, :-1]).last_hidden_state[0]
        right = token_stats(hidden.double(), llama.lm_head.weight.detach().double(), ids[0, 1:])
        for name in ("entropy_bits", "variance", "is_greedy", "lse_bits"):
            np.testing.assert_allclose(by_document(found, name)[i], getattr(right, name), atol=1e-3)
    assert [*(score(llama, tokens, tokens=True).tokens or {})][4:] == []
    with pytest.raises(ValueError, match="also takes some of entropy, variance, greedy, lse"):
        score(llama, tokens, also="entropy")


def test_the_first_token(llama: LlamaForCausalLM) -> None:
    """Fails if the policy of the first token is another than documented, for texts or tokens."""

    def coded(data: Any, policy: Any, **tokenizer: bool) -> list[int]:
        found = score(llama, data, tokenizer=byte_tokenizer(**tokenizer), bos=policy)
        return [int(n) for n in found.documents["coded_tokens"]]

    assert coded(["", "a"], "auto") == [0, 1]
    assert coded(["", "a"], "auto", adds=False) == [0, 0]
    assert coded(["", "a"], "always", adds=False) == [0, 1]
    assert coded(["", "a"], "always", bos=False, adds=False) == [0, 1]
    assert coded(["", "a"], "never") == [0, 0]
    tokens = [[1, 2], [BOS, 1, 2], []]
    assert coded(tokens, "auto") == [1, 2, 0]
    assert coded(tokens, "always") == [2, 2, 0]
    found = score(llama, ["a"], tokenizer=byte_tokenizer(bos=False, adds=False), bos="always")
    assert found.summary["bos"] == {"policy": "always", "token": EOS, "text": "</s>", "is": "EOS"}
    with pytest.raises(ValueError, match="no tokenizer with BOS or EOS"):
        score(llama, tokens, bos="always")
    with pytest.raises(ValueError, match="bos must be auto, always or never, got 'yes'"):
        score(llama, tokens, bos="yes")  # type: ignore[arg-type]


def test_special_tokens_and_chats_on_request(llama: LlamaForCausalLM) -> None:
    """Fails if --special-tokens or --chat-template do nothing, or are done unasked."""
    tokenizer = byte_tokenizer()

    def tokens(data: Any, **options: Any) -> list[int]:
        found = score(llama, data, tokenizer=tokenizer, tokens=True, **options)
        return [int(token) for token in by_document(found, "token")[0]]

    assert tokens(["a</s>"]) == token_ids("a</s>")
    assert tokens(["a</s>"], special_tokens=True) == [*token_ids("a"), EOS]
    with pytest.raises(ValueError, match="chat_template: the tokenizer has none"):
        tokens(["a"], chat_template=True)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    wanted = [*token_ids("user:hi"), EOS]
    assert tokens(["hi"], chat_template=True) == wanted
    message = {"role": "user", "content": "hi"}
    assert tokens([[message]], chat_template=True) == wanted
    with pytest.raises(ValueError, match="0 is a list of messages: give chat_template"):
        tokens([[message]])


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Fails if a run that was killed (kill -9) after any chunk loses, repeats or changes a row, or
    scores a chunk again."""
    model, whole = tmp_path / "model", tmp_path / "whole"
    fastmem.GPT(GPT).to_hf(model)
    (model / "run.json").write_text("{}")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": tokens}) + "\n" for tokens in TOKENS))
    score(model, data, whole, batch_tokens=20)
    out = tmp_path / "out"
    program = (
        "import os, sys\n"
        "from fastmem.models.scoring import scores\n"
        "from fastmem.models.scoring.folder import ScoreFolder\n"
        "scores.BATCHES_OF_A_CHUNK = 2\n"
        "add, left = ScoreFolder.add, [2]\n"
        "def killing(self, *chunk):\n"
        "    add(self, *chunk)\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), 9)\n"
        "ScoreFolder.add = killing\n"
        "scores.score(*sys.argv[1:], batch_tokens=20)\n"
    )
    killed = 0
    while killed < 10:
        command = [sys.executable, "-c", program, str(model), str(data), str(out)]
        code = subprocess.run(command, capture_output=True).returncode
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
        assert ScoreFolder(out).parts() == 2 * killed
        assert not (out / "summary.json").exists()
    assert 2 <= killed < 10
    for name in ("tokens.parquet", "documents.parquet", "passages.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not (out / "parts").exists()
    assert pyarrow.parquet.ParquetFile(out / "tokens.parquet").num_row_groups > killed


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("small_chunks")
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a full disk, at any file, leaves half a file or a folder that does not go on."""
    model, names = fastmem.GPT(GPT), ("tokens.parquet", "documents.parquet", "passages.json")
    score(model, TOKENS, tmp_path / "whole", batch_tokens=20)
    whole = [(tmp_path / "whole" / name).read_bytes() for name in names]
    sync, failed = os.fsync, 0
    for room in range(100):
        left, out = [room], tmp_path / f"{room}"

        def full(descriptor: int, left: list[int] = left) -> None:
            left[0] -= stat.S_ISREG(os.fstat(descriptor).st_mode)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(storage.os, "fsync", full)
            try:
                score(model, TOKENS, out, batch_tokens=20)
                break
            except OSError as error:
                description = (error.errno, str(out) in str(error))
        failed += 1
        assert description == (errno.ENOSPC, True)
        assert not [name for name in files_of(out) if name.endswith(".part")]
        assert not (out / "summary.json").exists()
        score(model, TOKENS, out, batch_tokens=20)
        assert [(out / name).read_bytes() for name in names] == whole
    assert failed > 10  # a lock, settings, two files a chunk, two tables, passages, a summary


def test_a_finished_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a finished folder is scored again unasked, or its scores are read otherwise."""
    model = fastmem.GPT(GPT)
    first = score(model, TOKENS, tmp_path, tokens=True)
    assert {p.name for p in tmp_path.iterdir()} == {
        "documents.parquet",
        "lock",
        "passages.json",
        "settings.json",
        "summary.json",
        "tokens.parquet",
    }
    before = files_of(tmp_path)
    (tmp_path / "parts").mkdir()  # of a run that was killed after it wrote summary.json
    (tmp_path / "parts" / "000000.tokens.parquet").write_bytes(b"")
    with monkeypatch.context() as patched:
        patched.setattr(scores, "load_model", None)
        again = score(model, TOKENS, tmp_path, tokens=True)
    assert files_of(tmp_path) == before
    assert again.summary == first.summary == read_scores(tmp_path).summary
    for name, column in score(model, TOKENS, tokens=True).documents.items():
        np.testing.assert_array_equal(again.documents[name], column)
    assert read_scores(tmp_path).tokens is None
    passes: list[Any] = []
    token_stats = fastmem.CausalLM.token_stats

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        passes.append(arguments)
        return token_stats(self, *arguments, **options)

    monkeypatch.setattr(fastmem.CausalLM, "token_stats", counted)
    score(model, TOKENS, tmp_path)
    assert not passes
    score(model, TOKENS, tmp_path, overwrite=True)
    assert passes


def test_numbers_that_do_not_repeat_have_no_dictionary(tmp_path: Path) -> None:
    """Fails if bits are written with a dictionary, which takes twice the time and a third more
    bytes, or tokens are written without one."""
    score(fastmem.GPT(GPT), TOKENS, tmp_path, also=("entropy",))
    columns = pyarrow.parquet.ParquetFile(tmp_path / "tokens.parquet").metadata.row_group(0)
    found = [columns.column(i) for i in range(columns.num_columns)]
    assert {one.path_in_schema: one.has_dictionary_page for one in found} == {
        "document": True,
        "position": True,
        "token": True,
        "bits": False,
        "entropy_bits": False,
    }


def test_another_tokenizer_is_another_score(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """Fails if a folder with the scores of one tokenizer is taken for those of another, by its
    vocabulary, its rules, its special tokens or its chat template."""
    first = byte_tokenizer()
    score(llama, ["ab"], tmp_path, tokenizer=first)
    assert score(llama, ["ab"], tmp_path, tokenizer=byte_tokenizer()).summary["tokens"] == 2
    chatty, ended = byte_tokenizer(), byte_tokenizer()
    chatty.chat_template = "{{ messages[0].content }}"
    ended.eos_token = "<s>"
    for other in (byte_tokenizer(adds=False), byte_tokenizer(bos=False), chatty, ended):
        with pytest.raises(ValueError, match=r"other scores .tokenizer \w+ is not what it was"):
            score(llama, ["ab"], tmp_path, tokenizer=other)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, tokenizer in zip(folders, (first, chatty), strict=True):
        tokenizer.save_pretrained(folder)
    score(llama, ["ab"], tmp_path / "out", tokenizer=folders[0])
    with pytest.raises(ValueError, match=r"holds other scores .tokenizer is "):
        score(llama, ["ab"], tmp_path / "out", tokenizer=folders[1])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_another_base_of_an_adapter_is_another_model(tmp_path: Path) -> None:
    """Fails if a folder with scores of an adapter is taken for scores of it on another base."""
    peft = pytest.importorskip("peft")
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    small_llama().save_pretrained(base)
    config = peft.LoraConfig(target_modules=["q_proj"], r=1)
    adapted = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(adapter)
    score(adapter, [[1, 2]], out)
    score(adapter, [[1, 2]], out)
    small_llama(seed=1).save_pretrained(base)
    with pytest.raises(ValueError, match=r"holds other scores .model .* is not what it was"):
        score(adapter, [[1, 2]], out)


def test_weights_that_are_elsewhere_or_quantized() -> None:
    """Fails if the identity of a model reads weights that are on meta, or of a tensor subclass."""
    model = small_llama().to("meta")
    assert model_identity(model) == model_identity(small_llama(seed=1).to("meta"))
    quantization = pytest.importorskip("torchao.quantization")
    model = small_llama()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert model_identity(model) != model_identity(small_llama())


def test_what_a_folder_refuses(tmp_path: Path) -> None:
    """Fails if scores of another model, data or setting are mixed, a file of somebody else's is
    touched, or two processes write one folder."""
    model, out = fastmem.GPT(GPT), tmp_path / "out"
    score(model, TOKENS, out, context=5)
    before = files_of(out)
    for other, data, options, message in (
        (fastmem.GPT(GPT, seed=1), TOKENS, {"context": 5}, "model GPT is not what it was"),
        (model, TOKENS[:5], {"context": 5}, "data memory is not what it was"),
        (model, TOKENS, {"context": 6}, "context is 5 there, 6 here.* the same context, or"),
        (model, TOKENS, {"context": 5, "stride": 1}, "stride is None there, 1 here"),
        (model, TOKENS, {"context": 5, "also": ["lse"]}, "also is .* there"),
    ):
        with pytest.raises(ValueError, match=f"{out} holds other scores .{message}"):
            score(other, data, out, **options)  # type: ignore[arg-type]
    assert files_of(out) == before
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / ".settings.json.part").write_text("{")
    (killed / "lock").write_text("")
    score(model, TOKENS[:5], killed)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not the folder of a score, and holds mine"):
        score(model, TOKENS, notes)
    score(model, TOKENS, notes, overwrite=True)
    score(model, TOKENS[:5], notes, overwrite=True)
    assert (notes / "mine.txt").read_text() == "mine"
    assert len(read_scores(notes).documents["bits"]) == 5
    with (
        locked(out),
        pytest.raises(ValueError, match="another fastmem is at work"),
    ):
        score(model, TOKENS[:5], out, overwrite=True)
    assert files_of(out).keys() == before.keys()


def test_data_that_was_mended(tmp_path: Path) -> None:
    """Fails if an error in the first chunk leaves a folder that needs --overwrite."""
    data, out = tmp_path / "a.jsonl", tmp_path / "out"
    data.write_text('{"text": [1, 2]}\n{"text": 5}\n')
    model = fastmem.GPT(GPT)
    with pytest.raises(ValueError, match="line 2"):
        score(model, data, out)
    data.write_text('{"text": [1, 2]}\n{"text": [5]}\n')
    assert score(model, data, out).summary["documents"] == 2


def test_what_cannot_be_scored(llama: LlamaForCausalLM) -> None:
    """Fails if a token of another vocabulary, text without a tokenizer, weights that are not finite
    or a wrong number give anything but an error that names the document."""
    with pytest.raises(
        ValueError, match=r"1: token 16 at position 2 is outside .* vocabulary of 16"
    ):
        score(fastmem.GPT(GPT), [[1, 2], [1, 2, 16]])
    with pytest.raises(ValueError, match="0: token -1 at position 0 is outside"):
        score(fastmem.GPT(GPT), [[-1, 2]])
    with pytest.raises(ValueError, match="1: token 999999 at position 0 is outside"):
        score(fastmem.GPT(GPT), [[1], [999999]])
    with pytest.raises(ValueError, match="0 is text, and the model has no tokenizer"):
        score(llama, ["a"])
    broken = fastmem.GPT(GPT)
    with torch.no_grad():
        broken.token_embedding.weight[3] = torch.nan
    with pytest.raises(ValueError, match="0: the bits of the token at position 1 are not finite"):
        score(broken, [[1, 2]])
    for options, message in (
        ({"context": 0}, "context must be from 1"),
        ({"context": 33}, "context 33 for a model of 32 positions"),
        ({"stride": 0}, "stride must be from 1"),
        ({"context": 4, "stride": 5}, "stride 5 with context 4"),
        ({"batch_tokens": 0}, "batch_tokens must be from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            score(llama, [[1, 2]], **options)  # type: ignore[arg-type]


def test_a_batch_fits_into_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a batch on a GPU is larger than its free memory, or small where there is room."""
    lm = fastmem.CausalLM(fastmem.GPT(fastmem.GPTConfig(1, 8, 2, 16, 8)))
    assert scores.default_batch_tokens(lm, 8) == 512
    lm.device = torch.device("cuda")
    memory = Memory(fastmem.CausalLM(fastmem.GPT(fastmem.GPTConfig(1, 8, 2, 16, 8))))
    monkeypatch.setattr(scores, "Memory", lambda _: memory)
    for free in (1 << 18, 1 << 40):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _, free=free: (free, 1 << 41))
        tokens = scores.default_batch_tokens(lm, 8)
        assert memory(tokens // 8, 8) <= free
        assert tokens == 32768 or 2 * memory(tokens // 8, 8) > 0.8 * free
    free = int(memory(1, 8) / scores.FREE_FRACTION) - 2
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free, 1 << 41))
    with pytest.raises(ValueError, match=r"a window of 8 tokens needs .*: give context, such as 4"):
        scores.default_batch_tokens(lm, 8)


def test_no_documents(tmp_path: Path) -> None:
    """Fails if empty data is an error, or gives NaN."""
    for out in (None, tmp_path / "out"):
        found = score(fastmem.GPT(GPT), [], out, tokens=True)
        assert found.summary["documents"] == found.summary["bits"] == 0
        assert found.summary["bits_per_token"] == 0
        assert found.tokens is not None
        assert [len(column) for column in found.tokens.values()] == [0] * 4


def test_scores_are_short(llama: LlamaForCausalLM) -> None:
    """Fails if the scores of a cell fill a notebook with arrays, or tokens get bits a byte."""
    found = score(llama, TOKENS)
    per = found.summary["bits_per_token"]
    assert repr(found).endswith(f" tokens: {per:.3f} bits a token)")
    found = score(llama, TEXTS, tokenizer=byte_tokenizer())
    assert f"tokens: {found.summary['bits_per_byte']:.3f} bits a byte, " in repr(found)
    assert len(repr(found)) < 100
