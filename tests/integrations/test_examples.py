"""The examples of docs/integrations.md run as printed."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from cases.host_models import host_model, host_tokenizer

DOCUMENT = Path(__file__).parents[2] / "docs" / "integrations.md"
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.M | re.S))
NEEDS = {
    "lm-evaluation-harness": "lm_eval",
    "transformers": "transformers",
    "TRL": "trl",
    "mimir": "transformers",
    "torchtitan": "torchtitan",
    "PyTorch Lightning": "lightning",
}
TASK = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: ask
doc_to_choice: [" mat", " dog"]
doc_to_target: 0
"""


def test_every_section_has_an_example() -> None:
    """Fails if a library is added without an example that a test runs."""
    assert SECTIONS.keys() == NEEDS.keys()
    assert all("```python" in text for text in SECTIONS.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("section", NEEDS)
def test_examples_run(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an example does not run beside a folder "model" and a folder "tasks"."""
    pytest.importorskip(NEEDS[section])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    host_model("llama", 300).save_pretrained("model")
    host_tokenizer().save_pretrained("model")
    Path("tasks").mkdir()
    Path("tasks", "choices.yaml").write_text(TASK)
    Path("tasks", "rows.jsonl").write_text(json.dumps({"ask": "the cat sat on the"}) + "\n")
    for program in re.findall(r"^```python\n(.*?)^```$", SECTIONS[section], re.M | re.S):
        exec(compile(program, f"{DOCUMENT.name}: {section}", "exec"), {"__name__": "example"})
