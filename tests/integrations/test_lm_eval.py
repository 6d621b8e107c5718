"""FastmemLM against HFLM in lm-evaluation-harness."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from cases.host_models import TEXT, host_model, host_tokenizer
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fastmem.integrations.lm_eval import FastmemLM

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]
WORDS = TEXT.split()
ROWS: dict[str, list[dict[str, Any]]] = {
    "choices": [
        {"ask": " ".join(WORDS[i : i + 9]), "options": [WORDS[i + 9], "a dog", "!"], "gold": i % 3}
        for i in range(12)
    ],
    "rolling": [{"text": TEXT[i : i + 40 + 60 * i]} for i in range(6)],
    "greedy": [{"ask": " ".join(WORDS[i : i + 5]), "want": " " + WORDS[i + 5]} for i in range(8)],
}
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: ask
doc_to_choice: options
doc_to_target: gold
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
    "greedy": """
output_type: loglikelihood
doc_to_text: ask
doc_to_target: want
metric_list: [{metric: perplexity}, {metric: acc}]
target_delimiter: ""
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer and three tasks."""
    folder = tmp_path_factory.mktemp("harness")
    host_model("llama", 300).save_pretrained(folder / "model")
    host_tokenizer().save_pretrained(folder / "model")
    (folder / "tasks").mkdir()
    for name, rows in ROWS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n" + TASKS[name]
        )
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))


def numbers(model: Any, folder: Path, **settings: Any) -> tuple[dict[str, Any], list[Any]]:
    """The metrics of the three tasks, and each answer of the model."""
    found = simple_evaluate(
        model,
        model_args=f"pretrained={folder}/model" if isinstance(model, str) else None,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        device="cpu",
        **settings,
    )
    metrics = {
        f"{task} {name}": value
        for task, row in found["results"].items()
        for name, value in row.items()
        if isinstance(value, float)
    }
    answers = [
        answer[0] if isinstance(answer[0], tuple) else answer
        for task in TASKS
        for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        for answer in sample["resps"]
    ]
    return metrics, answers


def test_the_three_tasks_have_the_numbers_of_hflm(folder: Path) -> None:
    """Fails if a metric differs by 1e-4, or an answer by more than rounding."""
    theirs, their_answers = numbers("hf", folder, batch_size=3)
    assert theirs.keys() >= {"choices acc,none", "rolling bits_per_byte,none", "greedy acc,none"}
    for size in (1, 3, "auto"):
        ours, our_answers = numbers("fastmem", folder, batch_size=size)
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-4)  # perplexities of 75,000
        for mine, his in zip(our_answers, their_answers, strict=True):
            assert mine[0] == pytest.approx(his[0], abs=2e-4)  # up to 400 tokens
            assert mine[1:] == his[1:]


def both(kind: str = "llama", **settings: Any) -> tuple[HFLM, FastmemLM]:
    model, tokenizer = host_model(kind, 300), host_tokenizer()
    return tuple(
        cls(pretrained=model, tokenizer=tokenizer, **settings) for cls in (HFLM, FastmemLM)
    )  # type: ignore[return-value]


def instances(*arguments: tuple[str, ...]) -> list[Instance]:
    return [Instance("loglikelihood", {}, args, i) for i, args in enumerate(arguments)]


PAIRS = [
    ("", "the cat"),
    ("", "<|end|>the cat"),  # the prefix token itself
    ("the cat ", "sat on"),  # the space moves to the continuation
    ("the c", "at sat"),  # tokens across the border
    ("a bird", " in"),
    ("a bird", " is"),  # shares the pass of the request before
    ("a bird", "!"),
    (TEXT[:600], " they say"),  # more tokens than the model has positions
    ("<|end|>who are", " they?"),
]


@pytest.mark.parametrize("settings", [
    {"batch_size": 1}, {"batch_size": 4}, {"batch_size": 4, "logits_cache": False},
    {"add_bos_token": True}, {"max_length": 20, "batch_size": 9}, {"prefix_token_id": 7},
    {"mixed_precision_dtype": "bfloat16"},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_requests(kind: str, settings: dict[str, Any]) -> None:
    """Fails if a rule of HFLM for contexts, prefixes, truncation or greedy answers is missed."""
    their, our = both(kind, **settings)
    rounded = "mixed_precision_dtype" in settings  # HFLM rounds logits too, so that some tie
    atol = 0.3 if rounded else 1e-4
    theirs = their.loglikelihood(instances(*PAIRS), disable_tqdm=True)
    ours = our.loglikelihood(instances(*PAIRS), disable_tqdm=True)
    assert our._head is not None
    for (mine, my_greedy), (his, his_greedy) in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(his, abs=atol)
        assert my_greedy == his_greedy or rounded
    texts = [(TEXT[:n],) for n in (1, 3, 50, 700)]
    theirs = their.loglikelihood_rolling(instances(*texts), disable_tqdm=True)
    ours = our.loglikelihood_rolling(instances(*texts), disable_tqdm=True)
    assert ours == pytest.approx(theirs, abs=20 * atol)


def test_greedy_answers_are_found() -> None:
    """Fails if is_greedy is False for the greedy continuation, or True for another one."""
    their, our = both()
    tokens = torch.tensor([our.tok_encode("the cat sat")])
    best = our.model.generate(tokens, max_new_tokens=3, do_sample=False)[0, tokens.shape[1] :]
    requests = [
        (("", ""), tokens[0].tolist(), best.tolist()),
        (("", ""), tokens[0].tolist(), [*best[:2].tolist(), (int(best[2]) + 1) % 300]),
    ]
    for lm in (their, our):
        assert [same for _, same in lm._loglikelihood_tokens(requests, True)] == [True, False]


def test_one_group_with_continuations_of_several_lengths() -> None:
    """Fails if requests with the same tokens, but cut at another place, get another's rows."""
    their, our = both(logits_cache=False)
    cached = FastmemLM(pretrained=our.model, tokenizer=our.tokenizer)
    requests = [(("", str(i)), [5, 6, 7, 8][: 4 - i], [5, 6, 7, 8, 9 + i][4 - i :]) for i in (0, 2)]
    theirs = their._loglikelihood_tokens(requests, True)
    for lm in (our, cached):
        for mine, his in zip(lm._loglikelihood_tokens(requests, True), theirs, strict=True):
            assert mine == pytest.approx(his, abs=1e-4)


def test_no_logits_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the head runs for a scored batch, or for the search of a batch size."""
    _, our = both(batch_size="auto", max_batch_size=4)
    assert our._head is not None  # its proof needs the head once
    monkeypatch.setattr(our.model.lm_head, "forward", lambda *_: pytest.fail("logits"))
    our.loglikelihood(instances(*PAIRS), disable_tqdm=True)
    our.loglikelihood_rolling(instances((TEXT[:99],)), disable_tqdm=True)
    assert set(our.batch_sizes.values()) == {4}


def test_generation_is_that_of_hflm() -> None:
    """Fails if generate_until gives another text."""
    requests = [Instance("generate_until", {}, ("the cat", {"until": ["!"], "max_gen_toks": 5}), 0)]
    their, our = both()
    our.loglikelihood(instances(*PAIRS), disable_tqdm=True)
    assert our.generate_until(requests, True) == their.generate_until(requests, True)


def test_other_models_are_hflms(caplog: pytest.LogCaptureFixture) -> None:
    """Fails if a model that needs its logits is not scored by HFLM, or the log lacks the reason."""
    their, our = both("gpt2")
    original = our.model.forward
    our.model.forward = lambda *a, **k: _squared(original(*a, **k))
    answers = our.loglikelihood(instances(*PAIRS), disable_tqdm=True)
    assert answers == their.loglikelihood(instances(*PAIRS), disable_tqdm=True)
    assert "scored by HFLM: GPT2LMHeadModel is scored through its logits: " in caplog.text


def _squared(output: Any) -> Any:
    output.logits = output.logits**2
    return output


def test_a_foreign_tokenizer_is_named() -> None:
    """Fails if a target that the model does not have becomes NaN."""
    _, our = both()
    with pytest.raises(ValueError, match="token 300 is outside of the 300 logits of Llama"):
        our._loglikelihood_tokens([(("", ""), [1], [300])], True)


def test_the_names() -> None:
    """Fails if the harness does not find the model by its name or by its entry point."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["lm_eval.models"]["fastmem"]
    assert EntryPoint("fastmem", value, "lm_eval.models").load() is FastmemLM
    assert get_model("fastmem") is FastmemLM


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    """Fails if `python -m fastmem.integrations.lm_eval` does not run the harness with the model."""
    command = [sys.executable, "-m", "fastmem.integrations.lm_eval", "run", "--model", "fastmem"]
    command += ["--model_args", f"pretrained={folder}/model", "--tasks", "choices"]
    command += ["--include_path", f"{folder}/tasks", "--device", "cpu"]
    command += ["--output_path", str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert told.returncode == 0, told.stderr[-2000:]
    assert "fastmem ({'pretrained'" in told.stdout
    assert "|choices|" in told.stdout
